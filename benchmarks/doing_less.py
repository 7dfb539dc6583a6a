"""What do cheaper estimates of ID-ExpO's loss cost in faithfulness, and what do they save?

Grad-CAM's loss is nearly all insertion and deletion steps: of 32, only k are drawn in an update (`steps_per_update`).
LIME's is nearly all perturbations: M per example, drawn afresh in every update (`n_samples`), beside k = 4 steps; less
noise: orthogonal masks and a ridge whose strength the samples choose. Each
setting fine-tunes the same weights on the same images, and the same judge (all steps, M = 200) scores it on images
that were neither trained on nor selected by. The cheapest useful setting is also run for as many model evaluations as
the dearest one takes. An evaluation is a row that goes through the model while it is trained.

    python benchmarks/doing_less.py run --studies digits_gradcam digits_lime
    python benchmarks/doing_less.py run --studies cifar_gradcam cifar_lime --data-root FOLDER     see cifar10.py
    python benchmarks/doing_less.py run --bfloat16 --studies digits_gradcam         trained and judged in bfloat16
    python benchmarks/doing_less.py report

A run that was stopped goes on where it stopped; it writes JSON lines, the report a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from cifar10 import load_images, pretrained_resnet20
from digits import Split, mean_and_error, pretrain
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam, Lime, id_expo_lime
from captum_idexpo.attr.surrogates import BayesianRidge
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS

SCORES = {"valscore": "score", "accuracy": "accuracy", "insertion": "insertion", "one_minus_deletion": "1 - deletion"}
JUDGE_SAMPLES = 200
PREFACE = """Mean ± standard error over seeds; differences are paired by seed. Score: eq. (15), 2 x accuracy + insertion
+ 1 - deletion, on images not trained on. Evaluations: rows through the model while it is trained, per training image;
shares are of the second setting's. Longer: for as many evaluations as that. Settings in bfloat16 are also judged in it.
"""


class Setting(NamedTuple):
    """How the loss is estimated; `longer`: for as many model evaluations as the study's reference takes."""

    name: str
    steps: int | None = None
    n_samples: int = JUDGE_SAMPLES
    weight: float | None = None  # None: the study's
    longer: bool = False
    batch_size: int | None = None  # None: the study's
    quiet: bool = False  # masks and a ridge with less noise
    bfloat16: bool = False  # autocast


# The first is plain fine-tuning, the second what the others are compared with.
GRAD_CAM_SETTINGS = (
    Setting("plain", weight=0.0),
    Setting("all 32 steps"),
    Setting("k = 4", 4),
    Setting("k = 4, longer", 4, longer=True),
    Setting("k = 2", 2),
    Setting("k = 8", 8),
    Setting("k = 4, bfloat16", 4, bfloat16=True),
    Setting("k = 2, bfloat16", 2, bfloat16=True),
    Setting("plain, as many epochs", 4, weight=0.0, longer=True),
)
# As many updates as `longer` takes, at the same cost.
SMALL_BATCHES = Setting("all 32 steps, batches of 6", batch_size=6)
LIME_SETTINGS = (
    Setting("plain", weight=0.0),
    Setting("M = 200", 4),
    Setting("M = 25", 4, 25),
    Setting("M = 25, longer", 4, 25, longer=True),
    Setting("M = 50", 4, 50),
    Setting("M = 100", 4, 100),
    Setting("plain, as many epochs", 4, 25, weight=0.0, longer=True),
    Setting("M = 25, less noise", 4, 25, quiet=True),
    Setting("M = 50, less noise", 4, 50, quiet=True),
)
# On 64 superpixels.
CIFAR_LIME_SETTINGS = (
    Setting("plain", weight=0.0),
    Setting("M = 200", 4),
    Setting("M = 100", 4, 100),
    Setting("M = 100, less noise", 4, 100, quiet=True),
    Setting("M = 100, less noise, half the weight", 4, 100, weight=0.005, quiet=True),
)


JUDGE = Setting("judge")


class Task(NamedTuple):
    """A trained model and one seed's images: some to fine-tune on; others to classify, and to judge explanations of."""

    model: nn.Module
    train: TensorDataset
    classified: Dataset[Any]
    explained: Dataset[Any]


class Study(NamedTuple):
    """One data set with one explainer."""

    title: str
    task: Callable[[int, Path], Task]
    settings: tuple[Setting, ...]
    weight: float
    optimizer: Callable[..., torch.optim.Optimizer]
    epochs: int
    batch_size: int
    n_seeds: int
    learning_rate: float = 1e-3
    layer: str | None = None  # Grad-CAM's; None: LIME
    cell_size: int = 0  # LIME's


def digits_task(seed: int, root: Path) -> Task:
    """Another split for each seed, and a CNN trained on it."""
    split = Split.of_seed(seed)
    return Task(pretrain(split, seed), split.train, split.test, split.test)


def cifar_task(n_train: int, n_explained: int, seed: int, root: Path) -> Task:
    """The pretrained ResNet-20, other training images for each seed, the same test images to judge by."""
    train = load_images(root, "train", slice(seed * n_train, (seed + 1) * n_train))
    test = load_images(root, "test", slice(0, 2000))
    return Task(pretrained_resnet20(root), train, test, Subset(test, range(n_explained)))


DIGITS: dict[str, Any] = {"optimizer": torch.optim.Adam, "batch_size": 32}
CIFAR: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, momentum=0.9), "batch_size": 8}
STUDIES = {
    "digits_gradcam": Study(
        "digits, Grad-CAM",
        digits_task,
        (*GRAD_CAM_SETTINGS, SMALL_BATCHES),
        0.001,
        epochs=6,
        n_seeds=12,
        layer="5",
        **DIGITS,
    ),
    "digits_lime": Study("digits, LIME", digits_task, LIME_SETTINGS, 0.01, epochs=2, n_seeds=5, cell_size=2, **DIGITS),
    "cifar_gradcam": Study(
        "CIFAR-10, Grad-CAM",
        partial(cifar_task, 128, 192),
        GRAD_CAM_SETTINGS,
        0.02,
        epochs=4,
        n_seeds=7,
        layer="layer2",
        **CIFAR,
    ),
    "cifar_lime": Study(
        "CIFAR-10, LIME",
        partial(cifar_task, 96, 64),
        CIFAR_LIME_SETTINGS,
        0.01,
        epochs=2,
        n_seeds=3,
        learning_rate=5e-4,
        cell_size=4,
        **CIFAR,
    ),
}


# --- running -------------------------------------------------------------------------------------------------------


def run(name: str, out: Path, root: Path, bfloat16: bool) -> None:
    """All settings of a study that are not yet done, seed by seed.

    accelerate has one precision in a process, so those in bfloat16 are run by themselves.
    """
    study, results = STUDIES[name], out / f"doing_less_{name}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    done = read_results(results)
    for seed in range(study.n_seeds):
        wanted = [setting for setting in study.settings if setting.bfloat16 is bfloat16]
        missing = [setting for setting in wanted if (seed, setting.name) not in done]
        task = study.task(seed, root) if missing else None
        for setting in missing:
            row = {"seed": seed, "setting": setting.name, **train_and_judge(study, task, setting, seed)}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, row, flush=True)


def train_and_judge(study: Study, task: Task, setting: Setting, seed: int) -> dict[str, float]:
    """One setting's cost and scores; the last epoch's weights are judged, so nothing is selected."""
    torch.manual_seed(seed)
    model = copy.deepcopy(task.model)
    epochs = study.epochs
    if setting.longer:
        epochs = epochs * rows_an_image(study, study.settings[1]) // rows_an_image(study, setting)
    optimizer = study.optimizer(model.parameters(), lr=study.learning_rate)
    weight = study.weight if setting.weight is None else setting.weight
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        [make_regularizer(study, model, weight, setting, seed)] if weight else [],
        accelerator=Accelerator(mixed_precision="bf16" if setting.bfloat16 else "no"),
        evaluation=make_regularizer(study, model, 0.0, JUDGE, seed),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        show_progress=False,
    )
    generator = torch.Generator().manual_seed(seed)
    batch_size = setting.batch_size or study.batch_size
    batches = DataLoader(task.train, batch_size=batch_size, shuffle=True, generator=generator)
    start = time.perf_counter()
    with counted_rows(model) as rows:
        trainer.fit(batches, epochs=epochs)
    seconds = time.perf_counter() - start
    cost = {"epochs": epochs, "evaluations": sum(rows) / len(task.train), "seconds": round(seconds, 2)}
    return {**cost, **judge(trainer, task)}


def judge(trainer: ExplanationRegularizedTrainer, task: Task) -> dict[str, float]:
    """Eq. (15) of ID-ExpO and its terms; accuracy costs little, so it may be that on more images."""
    plain = ExplanationRegularizedTrainer(trainer.model, trainer.optimizer, show_progress=False)
    accuracy = plain.evaluate(DataLoader(task.classified, batch_size=128))["accuracy"]
    scores = {**trainer.evaluate(DataLoader(task.explained, batch_size=128)), "accuracy": accuracy}
    scores["valscore"] = 2 * accuracy + scores["insertion"] + scores["one_minus_deletion"]
    return {score: round(scores[score], 5) for score in SCORES}


def rows_an_image(study: Study, setting: Setting) -> int:
    """Evaluations of an image in an update: by steps, the explainer, the task, a check and the deletion ratio."""
    explainer = 1 if study.layer else setting.n_samples + 1
    return 2 * (setting.steps or 32) + explainer + 3


def make_regularizer(study: Study, model: nn.Module, weight: float, setting: Setting, seed: int) -> InsertionDeletion:
    """ID-ExpO's two terms at equal weights, over half of the locations; masked locations are black, or mean grey."""
    settings = {
        "baselines": 0.0,
        "forward_func": model,
        "insertion_weight": weight,
        "deletion_weight": weight,
        "fraction": 0.5,
        "steps_per_update": setting.steps,
        "deletion_form": "ratio",
        "generator": torch.Generator().manual_seed(seed),
    }
    if study.layer is not None:
        grad_cam = LayerGradCam(model, model.get_submodule(study.layer))
        return InsertionDeletion(grad_cam, attribute_kwargs={"relu_attributions": True}, **settings)
    lime = id_expo_lime(model)
    if setting.quiet:
        lime = Lime(lime.forward_func, BayesianRidge(), lime.similarity_func)
    sampling = "orthogonal" if setting.quiet else "independent"
    return InsertionDeletion(
        lime,
        feature_mask=lambda images: grid(images, study.cell_size),
        attribute_kwargs={"n_samples": setting.n_samples, "sampling": sampling},
        **settings,
    )


@contextmanager
def counted_rows(model: nn.Module) -> Iterator[list[int]]:
    """The sizes of all batches that go through a model."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()


# --- reporting -----------------------------------------------------------------------------------------------------

Row = dict[str, Any]
Runs = dict[str, dict[int, Row]]
"""Setting -> seed -> its line."""


def read_results(path: Path) -> dict[tuple[int, str], Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["seed"], row["setting"]): row for row in rows}


def report(out: Path) -> None:
    """A table and a panel for each study that has results."""
    lines, panels = [PREFACE], []
    for study_name, study in STUDIES.items():
        done = read_results(out / f"doing_less_{study_name}.jsonl")
        settings = [setting.name for setting in study.settings if any(setting.name == name for _, name in done)]
        runs = {setting: {seed: row for (seed, name), row in done.items() if name == setting} for setting in settings}
        if {setting.name for setting in study.settings[:2]} <= set(settings):
            lines += [f"### {study.title}", "", *table(runs), ""]
            panels.append((study.title, runs))
    if not panels:
        return
    (out / "doing_less.md").write_text("\n".join(lines))
    n_rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4 * n_rows), layout="constrained")
    for axis, (title, runs) in zip(figure.subplots(n_rows, 2, squeeze=False).flat, panels, strict=False):
        draw(axis, title, runs)
    figure.savefig(out / "doing_less.png", dpi=110)
    print("\n".join(lines))


def table(runs: Runs) -> list[str]:
    """Evaluations (and their share of the reference's) and scores, with paired differences, as Markdown."""
    plain, reference = list(runs)[:2]
    head = ["setting", "seeds", "epochs", "evaluations an image", "share of them"]
    head += [*SCORES.values(), f"score over {plain}", f"score over {reference}"]
    rows = [head, ["---"] * len(head)]
    for setting, results in runs.items():
        row = [setting, str(len(results)), str(mean(results, "epochs")), f"{mean(results, 'evaluations'):.0f}"]
        row.append(f"{mean(results, 'evaluations') / mean(runs[reference], 'evaluations'):.2f}")
        row += [with_error([result[score] for result in results.values()]) for score in SCORES]
        for other in (plain, reference):
            row.append("" if setting == other else with_error(gains(results, runs[other]), "+"))
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def mean(results: dict[int, Row], cost: str) -> float:
    return statistics.mean(result[cost] for result in results.values())


def gains(results: dict[int, Row], others: dict[int, Row]) -> list[float]:
    """Differences of the validation score, of the same seeds."""
    return [results[seed]["valscore"] - others[seed]["valscore"] for seed in results.keys() & others.keys()]


def with_error(values: list[float], sign: str = "") -> str:
    """Mean and standard error."""
    center, error = mean_and_error(values)
    return f"{center:{sign}.3f} ± {error:.3f}" if len(values) > 1 else f"{center:{sign}.3f}"


def draw(axis: Axes, title: str, runs: Runs) -> None:
    """What each setting adds to plain fine-tuning's validation score, against its model evaluations."""
    plain, *others = runs
    looks = product("os", (*COLORS[1:], COLORS[0]))
    for (marker, color), setting in zip(looks, others, strict=False):
        gain, error = mean_and_error(gains(runs[setting], runs[plain]))
        evaluations = mean(runs[setting], "evaluations")
        axis.errorbar(evaluations, gain, error, fmt=marker, color=color, capsize=3, label=setting)
    axis.set(title=title, xscale="log", xlabel="model evaluations a training image")
    axis.set_xticks([50, 100, 200, 400], labels=["50", "100", "200", "400"])
    axis.minorticks_off()
    axis.set_ylabel("validation score over plain fine-tuning")
    axis.legend(fontsize=8, framealpha=0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of CIFAR-10, see cifar10.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--bfloat16", action="store_true", help="run the settings in bfloat16, and only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers however many cores a machine has
    # A sure network's deleted copies may lie below the floor; that they do is no news here.
    warnings.filterwarnings("ignore", message="The deletion floor")
    if arguments.command == "run":
        for name in arguments.studies:
            run(name, arguments.out, arguments.data_root, arguments.bfloat16)
    report(arguments.out)


if __name__ == "__main__":
    main()
