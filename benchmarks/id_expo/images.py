"""Images: CIFAR-10 and Imagenette, Grad-CAM and LIME; is ID-ExpO's gain more than fine-tuning, or its rivals, give?

The experiment of ID-ExpO (arXiv 2310.12553) on images: a trained network is fine-tuned plainly (CE-only), with ExpO's
Stability or Fidelity on masked copies (ExpO-S, ExpO-F: the paper's appendix B.1), or with insertion and deletion of
its Grad-CAM or LIME explanation. For each explainer and eta of eq. (15), validation images choose weight and epoch. The
hard metrics on test images, the predicted class explained, are kept example by example, so that changes can be counted.

* `cifar10`: the pretrained ResNet-20 of He et al., Grad-CAM on its 8x8 stage, LIME on superpixels of 4x4 pixels.
* `imagenette`: a ResNet-18 trained here on 2,000 photographs of 96x96 pixels, Grad-CAM on its 6x6 stage, LIME on
  superpixels of 12x12 pixels.

    python -m benchmarks.id_expo.images run cifar10 --data-root FOLDER       compact files, see benchmarks/cifar10.py
    python -m benchmarks.id_expo.images run cifar10                          torchvision downloads into ./data
    python -m benchmarks.id_expo.images report cifar10

A run that was stopped goes on where it stopped, a setting at a time. Chosen models are kept in `<out>/models`, for
`judges.py`. `--full` is the paper's size: all training images, 50 epochs, M = 200, all steps; it wants a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cifar10
from benchmarks.cifar10 import MEAN, STD
from benchmarks.id_expo import imagenette
from benchmarks.id_expo.experiment import ETAS, SCORES, Judge, Results, Row, fine_tune, markdown, means, with_error
from captum_idexpo.attr import LayerGradCam, id_expo_lime
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import InsertionDeletionScores
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, MaskedNeighbors, Stability
from captum_idexpo.visualization import draw_heat_map, draw_image, plot_curves, plot_fronts, plot_quadrants

EXPLAINERS = ("Grad-CAM", "LIME")
METHODS = ("CE-only", "ExpO-S", "ExpO-F", "ID-ExpO")
FRACTIONS = (0.3, 0.5)
SENSITIVITY_N = 4
KEPT = (0.5, 2.0)  # fraction and eta whose models and examples are kept


class Setting(NamedTuple):
    """One fine-tuning."""

    method: str
    weight: float = 0.0
    explainer: str | None = None  # ID-ExpO's
    n_train: int = 0
    epochs: int = 0


class Task(NamedTuple):
    """A data set, its network, and what is tried on it."""

    settings: tuple[Setting, ...]
    explainers: tuple[str, ...]
    load: Callable[[Path | None, str, slice], TensorDataset]
    pretrained: Callable[[Path | None], nn.Module]
    layer: str  # Grad-CAM's
    cell: int  # pixels of a superpixel's side
    fidelity_cell: int  # larger, since ExpO-F needs more copies than superpixels
    step_size: int  # pixels of a step, for Grad-CAM
    n_val: dict[str, int]  # images to select by, the first after those that are trained on
    n_test: dict[str, int]  # the first of the test images, to judge explanations of
    n_classified: int  # and to measure accuracy on
    first_val: int
    learning_rate: float = 3e-4
    batch_size: int = 8
    n_samples: int = 100
    steps_per_update: int | None = 2

    @property
    def judges(self) -> dict[str, tuple[Judge, Judge]]:
        """For selection, and the final one with all steps and M = 200."""
        return {
            "Grad-CAM": tuple(
                Judge(partial(self.insertion_deletion, "Grad-CAM", step_size=step, fraction=0.5), FRACTIONS, 50)
                for step in (2 * self.step_size, self.step_size)
            ),
            "LIME": tuple(
                Judge(partial(self.insertion_deletion, "LIME", n_samples=n, fraction=0.5), FRACTIONS, 50)
                for n in (100, 200)
            ),
        }

    def insertion_deletion(
        self, explainer: str, model: nn.Module, *, n_samples: int = 200, seed: int = 0, **arguments: Any
    ) -> InsertionDeletion:
        """Of an explainer; masked pixels take the training images' mean colour, 0 of normalised images."""
        arguments |= {"baselines": 0.0, "generator": Generator().manual_seed(seed)}
        if explainer == "Grad-CAM":
            grad_cam = LayerGradCam(model, model.get_submodule(self.layer))
            return InsertionDeletion(grad_cam, attribute_kwargs={"relu_attributions": True}, **arguments)
        return InsertionDeletion(
            id_expo_lime(model),
            forward_func=model,
            feature_mask=lambda images: grid(images, self.cell),
            attribute_kwargs={"n_samples": n_samples, "sampling": "independent"},
            **arguments,
        )

    def regularizers(self, setting: Setting, model: nn.Module) -> list[nn.Module]:
        """A setting's."""
        generator = Generator().manual_seed(1)
        if setting.method == "CE-only":
            return []
        if setting.method == "ExpO-S":
            cells = MaskedNeighbors(feature_mask=lambda images: grid(images, self.cell))
            return [Stability(model, cells, weight=setting.weight, n_neighbors=8, generator=generator)]
        if setting.method == "ExpO-F":
            cells = MaskedNeighbors(feature_mask=lambda images: grid(images, self.fidelity_cell))
            return [Fidelity(model, cells, weight=setting.weight, n_neighbors=24, generator=generator)]
        return [
            self.insertion_deletion(
                setting.explainer,
                model,
                n_samples=self.n_samples,
                seed=1,
                fraction=0.5,
                step_size=self.step_size if setting.explainer == "Grad-CAM" else 1,
                insertion_weight=setting.weight,
                deletion_weight=setting.weight,
                steps_per_update=self.steps_per_update,
            )
        ]


CIFAR: dict[str, Any] = {"n_train": 512, "epochs": 4}
IMAGENETTE: dict[str, Any] = {"n_train": 256, "epochs": 2}
TASKS = {
    "cifar10": Task(
        (
            Setting("CE-only", **CIFAR),
            *(Setting("ID-ExpO", weight, "Grad-CAM", **CIFAR) for weight in (0.03, 0.1, 0.01)),
            # LIME's step is dear: fewer images, or half of the epochs.
            *(Setting("ID-ExpO", weight, "LIME", 192, 2) for weight in (0.1, 0.03)),
            *(Setting("ExpO-S", weight, **CIFAR) for weight in (1.0, 0.1)),
            Setting("ID-ExpO", 0.1, "LIME", 512, 2),
            Setting("ExpO-F", 1.0, **CIFAR),
        ),
        EXPLAINERS,
        cifar10.load_images,
        cifar10.pretrained_resnet20,
        layer="layer3",
        cell=4,
        fidelity_cell=8,
        step_size=16,
        n_val={"Grad-CAM": 128, "LIME": 48},
        n_test={"Grad-CAM": 250, "LIME": 64},
        n_classified=2000,
        first_val=40_000,
    ),
    "imagenette": Task(
        (
            Setting("CE-only", **IMAGENETTE),
            Setting("ID-ExpO", 0.1, "Grad-CAM", **IMAGENETTE),
            Setting("ExpO-S", 1.0, **IMAGENETTE),
            Setting("ID-ExpO", 0.03, "Grad-CAM", **IMAGENETTE),
        ),
        ("Grad-CAM",),
        imagenette.load_images,
        imagenette.pretrained_resnet18,
        layer="layer3",
        cell=12,
        fidelity_cell=24,
        step_size=288,
        n_val={"Grad-CAM": 32},
        n_test={"Grad-CAM": 80},
        n_classified=1000,
        first_val=1800,
        learning_rate=1e-3,
    ),
}


def full(task: Task, n_train: int, n_val: int, n_test: int) -> Task:
    """The paper's size."""
    grid_ = [Setting("CE-only", n_train=n_train, epochs=50)]
    for weight in (0.1, 0.01, 0.001):
        grid_ += [Setting("ID-ExpO", weight, explainer, n_train, 50) for explainer in EXPLAINERS]
        grid_ += [Setting(method, 10 * weight, None, n_train, 50) for method in ("ExpO-S", "ExpO-F")]
    counts = {"n_val": dict.fromkeys(EXPLAINERS, n_val), "n_test": dict.fromkeys(EXPLAINERS, n_test)}
    return task._replace(
        explainers=EXPLAINERS, settings=tuple(grid_),
        n_samples=200, steps_per_update=None, batch_size=128, learning_rate=1e-4,
        n_classified=n_test, fidelity_cell=task.cell, **counts,
    )  # fmt: skip


FULL_SIZES = {"cifar10": (40_000, 10_000, 10_000), "imagenette": (1800, 200, 1000)}


# --- running -------------------------------------------------------------------------------------------------------


def run(name: str, task: Task, root: Path | None, out: Path) -> None:
    """The pretrained network is judged, then all fine-tunings that are not yet done."""
    results = Results(out / f"{name}.jsonl")
    images = Images(task, root)
    if not results.has(method="before"):
        model = task.pretrained(root)
        judged = [row for explainer in task.explainers for row in test(task, images, model, explainer)]
        results.add({"method": "before", "judged": judged})
    (before,) = results.where(method="before")
    for setting in task.settings:
        if not results.has(**setting._asdict()):
            start = time.perf_counter()
            row = measure(name, task, images, setting, before, root, out)
            results.add({**setting._asdict(), "seconds_in_all": round(time.perf_counter() - start), **row})
            print(name, *setting, row["seconds"], summary(row), flush=True)


class Images:
    """A task's images, read when they are needed."""

    def __init__(self, task: Task, root: Path | None) -> None:
        self.task, self.root = task, root
        self.classified = task.load(root, "test", slice(0, task.n_classified))

    def val(self, explainer: str) -> TensorDataset:
        """To select by."""
        first = self.task.first_val
        return self.task.load(self.root, "train", slice(first, first + self.task.n_val[explainer]))

    def explained(self, explainer: str) -> TensorDataset:
        """To test explanations of."""
        return TensorDataset(*self.classified[: self.task.n_test[explainer]])


def measure(name: str, task: Task, images: Images, setting: Setting, before: Row, root: Path | None, out: Path) -> Row:
    """Fine-tunes; tests and keeps what the validation images chose."""
    torch.manual_seed(0)
    model = task.pretrained(root)
    explainers = [explainer for explainer in task.explainers if setting.explainer in (None, explainer)]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=task.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    best, seconds = fine_tune(
        model,
        task.regularizers(setting, model),
        task.load(root, "train", slice(0, setting.n_train)),
        {explainer: (task.judges[explainer][0], images.val(explainer)) for explainer in explainers},
        optimizer=optimizer,
        epochs=setting.epochs,
        batch_size=task.batch_size,
        seed=0,
    )
    judged: list[Row] = []
    tested: dict[tuple[str, int], list[Row]] = {
        (explainer, 0): [row for row in before["judged"] if row["explainer"] == explainer] for explainer in explainers
    }
    for (explainer, fraction, eta), chosen in best.items():
        model.load_state_dict(chosen.weights)
        if (explainer, chosen.epoch) not in tested:
            tested[explainer, chosen.epoch] = test(task, images, model, explainer)
        row = next(row for row in tested[explainer, chosen.epoch] if row["fraction"] == fraction)
        judged.append({**row, "eta": eta, "epoch": chosen.epoch, "valscore": round(chosen.score, 5)})
        if (fraction, eta) == KEPT:
            path = out / "models" / f"{model_name(name, setting.method, setting.weight, explainer)}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.cpu().contiguous() for key, value in chosen.weights.items()}, path)
        else:
            del judged[-1]["examples"]
    return {"seconds": round(seconds), "judged": judged}


@torch.no_grad()
def test(task: Task, images: Images, model: nn.Module, explainer: str) -> list[Row]:
    """For each fraction the means, accuracy on more images than are explained, and each example's scores."""
    batches = DataLoader(images.classified, batch_size=250)
    device = next(model.parameters()).device
    right = torch.cat([model.eval()(x.to(device)).argmax(dim=1).cpu() == y for x, y in batches])
    scores = task.judges[explainer][1].scores(
        model, images.explained(explainer), SENSITIVITY_N, lambda x: grid(x, task.cell)
    )
    return [
        {
            "explainer": explainer,
            "fraction": fraction,
            **means(found),
            "accuracy": round(float(right.double().mean()), 5),
            "examples": {key: rounded(found[key]) for key in ("insertion", "one_minus_deletion", "sensitivity_n")},
        }
        for fraction, found in scores.items()
    ]


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def model_name(name: str, method: str, weight: float, explainer: str) -> str:
    return f"{name}_{method}_{weight}_{explainer}"


def summary(row: Row) -> list[Any]:
    kept = [judged for judged in row["judged"] if (judged["fraction"], judged["eta"]) == KEPT]
    return [(j["explainer"], j["epoch"], j["accuracy"], j["insertion"], j["one_minus_deletion"]) for j in kept]


# --- the report ----------------------------------------------------------------------------------------------------

Chosen = dict[tuple[str, float, float, str], Row]
"""(explainer, fraction, eta, method) -> what validation chose; "before" at every eta."""


def chosen(results: Results) -> Chosen:
    """Of each method the weight and epoch with the best validation score."""
    best: Chosen = {}
    for run in results.rows:
        for judged in run["judged"]:
            for eta in ETAS if run["method"] == "before" else [judged["eta"]]:
                key = (judged["explainer"], judged["fraction"], eta, run["method"])
                if key not in best or judged["valscore"] > best[key]["valscore"]:
                    best[key] = {**judged, "weight": run.get("weight")}
    return best


def load_chosen(name: str, method: str, explainer: str, results: Results, root: Path | None, out: Path) -> nn.Module:
    """The network that validation chose among a method's, for an explainer at eta = 2 and S = 0.5."""
    model = TASKS[name].pretrained(root)
    if method != "before":
        weight = chosen(results)[(explainer, *KEPT, method)]["weight"]
        model.load_state_dict(load_file(out / "models" / f"{model_name(name, method, weight, explainer)}.safetensors"))
    return model.eval()


def report(name: str, task: Task, out: Path) -> str:
    """Tables at eta = 2 and S = 0.5, and figures."""
    results = Results(out / f"{name}.jsonl")
    found = chosen(results)
    draw_fronts(results, task.explainers).savefig(out / f"{name}_fronts.png", dpi=110)
    draw_quadrants(found, task.explainers).savefig(out / f"{name}_quadrants.png", dpi=110)
    parts = []
    for explainer in task.explainers:
        parts.append(f"#### {explainer}, {task.n_test[explainer]} test images\n\n{table(found, explainer)}")
    return "\n\n".join(parts) + "\n"


def methods(found: Chosen, explainer: str) -> list[str]:
    """Those that were run, in the order of the tables."""
    return [method for method in ("before", *METHODS) if (explainer, *KEPT, method) in found]


def table(found: Chosen, explainer: str) -> str:
    """Means, in brackets the paired difference to CE-only; the shares of images on which both scores rise, or fall."""
    lines = []
    for method in methods(found, explainer):
        row, plain = (found[(explainer, *KEPT, which)] for which in (method, "CE-only"))
        line = [method, f"{row['accuracy']:.3f}"]
        for score in list(SCORES)[1:]:
            line.append(f"{row[score]:.3f}")
            if method not in ("before", "CE-only"):
                own, other = row["examples"][score], plain["examples"][score]
                differences = [a - b for a, b in zip(own, other, strict=True)]
                line[-1] += f" ({with_error(differences, '+.3f')})"
        line += (
            [f"{share:.1%}" for share in rising_and_falling(found, explainer, method)]
            if method != "before"
            else [""] * 2
        )
        lines.append(line)
    return markdown(["method", *SCORES.values(), "both rise", "both fall"], lines)


def rising_and_falling(found: Chosen, explainer: str, method: str) -> tuple[float, float]:
    """Of the images, the shares whose insertion and 1 - deletion both rise, and both fall, from before."""
    before, after = (found[(explainer, *KEPT, which)]["examples"] for which in ("before", method))
    changes = [
        (a - b, c - d)
        for a, b, c, d in zip(
            *(scores[score] for score in ("insertion", "one_minus_deletion") for scores in (after, before)), strict=True
        )
    ]
    n = len(changes)
    return sum(a > 0 and b > 0 for a, b in changes) / n, sum(a < 0 and b < 0 for a, b in changes) / n


def draw_fronts(results: Results, explainers: tuple[str, ...]) -> Figure:
    """Scores against accuracy, of every weight and what each eta chose of its epochs: the paper's figures 2 and 3."""
    scores = ("insertion", "one_minus_deletion", "sensitivity_n")
    figure = Figure(figsize=(10.5, 3.4 * len(explainers)), layout="constrained")
    for axes, explainer in zip(figure.subplots(len(explainers), 3, squeeze=False), explainers, strict=True):
        points: dict[str, list[Row]] = {}
        for run in results.rows:
            judged = [row for row in run["judged"] if (row["explainer"], row["fraction"]) == (explainer, KEPT[0])]
            points.setdefault(run["method"], []).extend(judged)
        for axis, score in zip(axes, scores, strict=True):
            plot_fronts(points, "accuracy", score, axis=axis)
            axis.set(title=explainer, ylabel=SCORES[score])
        for axis in axes[1:]:
            axis.get_legend().remove()
    return figure


def draw_quadrants(found: Chosen, explainers: tuple[str, ...]) -> Figure:
    """Each test image's change by each method, where validation chose to change the network: the paper's figure 4."""
    panels = [
        (explainer, method)
        for explainer in explainers
        for method in methods(found, explainer)[1:]
        if found[(explainer, *KEPT, method)]["epoch"]
    ]
    n_rows = max(1, (len(panels) + 1) // 2)
    figure = Figure(figsize=(8, 4 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, 2).flat)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (explainer, method) in zip(axes, panels, strict=False):
        before, after = (as_scores(found[(explainer, *KEPT, which)]) for which in ("before", method))
        plot_quadrants(before, after, axis)
        axis.set_title(f"{explainer}, {method}\n{axis.get_title()}", fontsize=9)
    return figure


def as_scores(row: Row) -> InsertionDeletionScores:
    """Scores without their curves."""
    insertion, kept = (torch.tensor(row["examples"][score]) for score in ("insertion", "one_minus_deletion"))
    return InsertionDeletionScores(insertion, 1 - kept, torch.ones(1), insertion[:, None], 1 - kept[:, None])


def draw_examples(name: str, task: Task, root: Path | None, out: Path) -> Figure:
    """The first test images that all networks recognise, their Grad-CAM maps and curves: the paper's figure 5."""
    results = Results(out / f"{name}.jsonl")
    networks = {
        method: load_chosen(name, method, "Grad-CAM", results, root, out) for method in ("before", "CE-only", "ID-ExpO")
    }
    x, y = task.load(root, "test", slice(0, 60)).tensors
    with torch.no_grad():
        recognised = torch.stack([model(x).argmax(dim=1) == y for model in networks.values()]).all(dim=0)
    shown = recognised.nonzero()[:4, 0]
    x, y = x[shown], y[shown]
    judges = {
        title: task.insertion_deletion("Grad-CAM", model, step_size=task.step_size, fraction=KEPT[0])
        for title, model in networks.items()
    }
    scores = {title: judge.scores(x, y) for title, judge in judges.items()}
    maps = {title: judge.attribution(x, y)[0] for title, judge in judges.items()}
    figure = Figure(figsize=(13, 2.3 * len(shown)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(shown), 6)):
        draw_image(axes[0], x[row] * STD + MEAN)
        for axis, title in zip(axes[1:], networks, strict=False):
            draw_heat_map(axis, x[row] * STD + MEAN, maps[title][row], title)
        plot_curves(scores, axes[4:], example=row)
        for axis in axes[4:]:
            axis.tick_params(labelsize=6)
            axis.set_title(axis.get_title(), fontsize=8)
            axis.xaxis.label.set_size(7)
            axis.yaxis.label.set_size(7)
            axis.legend(frameon=False, fontsize=6)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data-root", type=Path, help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--full", action="store_true", help="the paper's size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on every machine of this kind, however many cores it has
    task = TASKS[arguments.task]
    if arguments.full:
        task = full(task, *FULL_SIZES[arguments.task])
    if arguments.command == "run":
        run(arguments.task, task, arguments.data_root, arguments.out)
        examples = draw_examples(arguments.task, task, arguments.data_root, arguments.out)
        examples.savefig(arguments.out / f"{arguments.task}_examples.png", dpi=110)
    (arguments.out / f"{arguments.task}.md").write_text(report(arguments.task, task, arguments.out))


if __name__ == "__main__":
    main()
