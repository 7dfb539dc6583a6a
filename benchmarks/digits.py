"""Handwritten digits: does fine-tuning with ID-ExpO make explanations more faithful than plain fine-tuning?

A small CNN is trained on scikit-learn's digits, then fine-tuned twice from the same weights: plainly, and with
insertion and deletion of its explanation in the loss (Grad-CAM on the 8x8 stage, a location being a pixel; or LIME
over 16 cells of 2x2 pixels). Both are selected on validation images by eq. (15) of ID-ExpO (arXiv 2310.12553) and
judged on held-out images by the hard metrics, the predicted class explained.

    python benchmarks/digits.py demo     both explainers, one seed: a table and a picture
    python benchmarks/digits.py front    both explainers, five seeds, a front of weights: JSON lines, a table, a picture
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam, id_expo_lime
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import InsertionDeletionScores, sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS, draw_heat_map, draw_image, plot_curves

EXPLAINERS = {"gradcam": "Grad-CAM", "lime": "LIME"}
WEIGHTS = (0.0, 0.001, 0.002, 0.005, 0.01)
SEEDS = range(5)
# Those that `front` chooses by the validation images of all splits.
DEMO_WEIGHT = {"gradcam": 0.005, "lime": 0.01}
DEMO_ACCURACY_DROP = 0.01
EPOCHS = {"gradcam": 20, "lime": 8}
SCORES = ("accuracy", "insertion", "1 - deletion", "sensitivity-n")
GAINS = ("gain (ins.)", "gain (del.)")


class Split(NamedTuple):
    """The 1,797 images: 60 % to train on, 20 % to select by, 20 % held out."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset

    @classmethod
    def of_seed(cls, seed: int) -> Split:
        """A random split."""
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        return cls(*(TensorDataset(x[part], y[part]) for part in order.split([1078, 359, 360])))


def pretrain(split: Split, seed: int) -> nn.Sequential:
    """A CNN of three convolutions at full resolution and two linear layers, trained in the usual way."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = DataLoader(split.train, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    for _ in range(15):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def make_regularizer(
    model: nn.Sequential, explainer: str, weight: float, seed: int, layer: nn.Module | None = None
) -> InsertionDeletion:
    """ID-ExpO's terms at equal weights; masked pixels are black; Grad-CAM explains the last ReLU unless told."""
    settings = {
        "baselines": 0.0,
        "forward_func": model,
        "insertion_weight": weight,
        "deletion_weight": weight,
        "fraction": 0.5,
        "generator": torch.Generator().manual_seed(seed),
    }
    if explainer == "gradcam":
        grad_cam = LayerGradCam(model, model[5] if layer is None else layer)
        return InsertionDeletion(grad_cam, step_size=4, attribute_kwargs={"relu_attributions": True}, **settings)
    return InsertionDeletion(
        id_expo_lime(model),
        feature_mask=lambda images: grid(images, 2),
        attribute_kwargs={"n_samples": 48, "sampling": "independent"},
        **settings,
    )


def fine_tune(
    pretrained: nn.Sequential,
    split: Split,
    explainer: str,
    weight: float,
    seed: int,
    show_progress: bool,
    max_accuracy_drop: float | None = None,
) -> nn.Sequential:
    """A fine-tuned copy, plainly where the weight is 0; the same judge selects the epoch either way."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained)
    regularizer = make_regularizer(model, explainer, weight, seed)
    epochs = EPOCHS[explainer]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        [regularizer] if weight else [],
        evaluation=regularizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        max_accuracy_drop=max_accuracy_drop,
        patience=epochs,
        show_progress=show_progress,
    )
    batches = DataLoader(split.train, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(seed))
    trainer.fit(batches, DataLoader(split.val, batch_size=len(split.val)), epochs=epochs)
    return model


class Judgement(NamedTuple):
    """A model's explanations of the held-out images."""

    means: dict[str, float]
    scores: InsertionDeletionScores
    maps: Tensor


@torch.no_grad()
def judge(
    model: nn.Sequential,
    images: TensorDataset,
    explainer: str,
    layer: nn.Module | None = None,
    n_random_orders: int = 0,
) -> Judgement:
    """Accuracy and hard faithfulness, the predicted class explained; sensitivity-n with n = 4 locations."""
    x, y = images.tensors
    regularizer = make_regularizer(model, explainer, 0.0, seed=0, layer=layer)
    regularizer.n_random_orders = n_random_orders
    predicted = model(x).argmax(dim=1)
    scores = regularizer.scores(x, predicted)
    regularizer.generator.manual_seed(0)  # the same masks, so the same explanations
    (maps,) = regularizer.attribution(x, predicted)
    mask = grid(x, 2) if explainer == "lime" else None
    generator = torch.Generator().manual_seed(0)
    correlation = sensitivity_n(model, x, maps, 4, feature_mask=mask, target=predicted, generator=generator)
    means = (
        (predicted == y).float().mean(),
        scores.insertion.mean(),
        1 - scores.deletion.mean(),
        correlation.mean(),
    )
    named = dict(zip(SCORES, map(float, means), strict=True))
    if scores.insertion_gain is not None and scores.deletion_gain is not None:
        gains = (scores.insertion_gain, scores.deletion_gain)
        named |= {name: float(gain.mean()) for name, gain in zip(GAINS, gains, strict=True)}
    return Judgement(named, scores, maps)


# --- the demo ------------------------------------------------------------------------------------------------------


def demo(out: Path) -> None:
    """Both explainers, before, plainly fine-tuned and with ID-ExpO: prints a table and writes a picture."""
    start = time.perf_counter()
    torch.set_num_threads(2)  # the same numbers on every machine of this kind, however many cores it has
    show_progress = sys.stderr.isatty()
    split = Split.of_seed(0)
    pretrained = pretrain(split, 0)
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subfigures(2, 1)
    columns = (*SCORES, *GAINS)
    lines = [f"{'explainer':10}{'model':9}" + "".join(f"{name:>14}" for name in columns)]
    for panel, (explainer, title) in zip(panels, EXPLAINERS.items(), strict=True):
        weight = DEMO_WEIGHT[explainer]
        print(f"{title}: fine-tuning plainly, then with ID-ExpO at weight {weight}", flush=True)
        models = {
            "before": pretrained,
            "plain": fine_tune(pretrained, split, explainer, 0.0, 0, show_progress, DEMO_ACCURACY_DROP),
            "ID-ExpO": fine_tune(pretrained, split, explainer, weight, 0, show_progress, DEMO_ACCURACY_DROP),
        }
        judgements = {name: judge(model, split.test, explainer, n_random_orders=5) for name, model in models.items()}
        for name, judgement in judgements.items():
            lines.append(f"{title:10}{name:9}" + "".join(f"{judgement.means[score]:14.3f}" for score in columns))
        draw_panel(panel, title, split, judgements)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "digits.png", dpi=110)
    print("\n" + "\n".join(lines))
    print(
        "\ngain: over random orders of the same pixels; an epoch is kept if it costs at most one point of validation "
        "accuracy"
        f"\none split, {len(split.test)} held-out images (over five splits: benchmarks/results/digits.md); "
        f"picture: {out / 'digits.png'}; {time.perf_counter() - start:.0f} s"
    )


def draw_panel(panel: Figure, title: str, split: Split, judgements: dict[str, Judgement]) -> None:
    """Left, digits with their heat maps before and after; right, the mean curves."""
    images, labels = split.test.tensors
    left, right = panel.subfigures(1, 2, width_ratios=(1, 1.5))
    panel.suptitle(title, fontsize=13)
    shown = [int((labels == label).nonzero()[0]) for label in (2, 3, 5, 8)]
    axes = left.subplots(len(shown), 1 + len(judgements))
    for row, (cells, index) in enumerate(zip(axes, shown, strict=True)):
        draw_image(cells[0], images[index], "image" if row == 0 else "")
        for cell, (name, judgement) in zip(cells[1:], judgements.items(), strict=True):
            draw_heat_map(cell, images[index], judgement.maps[index], name if row == 0 else "")
    plot_curves({name: judgement.scores for name, judgement in judgements.items()}, right.subplots(1, 2))


# --- the front -----------------------------------------------------------------------------------------------------


def front(out: Path, explainers: Iterable[str]) -> None:
    """Five seeds over a front of weights; a run that was stopped goes on where it stopped."""
    out.mkdir(parents=True, exist_ok=True)
    for explainer in explainers:
        results = out / f"digits_{explainer}.jsonl"
        done = read_results(results)
        for seed in SEEDS:
            missing = [weight for weight in WEIGHTS if (seed, weight) not in done]
            if not missing:
                continue
            split = Split.of_seed(seed)
            pretrained = pretrain(split, seed)
            for weight in missing:
                start = time.perf_counter()
                model = fine_tune(pretrained, split, explainer, weight, seed, show_progress=False)
                row = {"seed": seed, "weight": weight, **judge(model, split.test, explainer).means}
                row["validation"] = judge(model, split.val, explainer).means
                row["seconds"] = round(time.perf_counter() - start, 1)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(explainer, row, flush=True)
    report(out)


def read_results(path: Path) -> dict[tuple[int, float], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["seed"], row["weight"]): row for row in rows}


def report(out: Path) -> None:
    """The table of means and of paired differences to plain fine-tuning, with standard errors; the fronts drawn."""
    lines = []
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (explainer, title) in zip(figure.subplots(1, len(EXPLAINERS)), EXPLAINERS.items(), strict=True):
        done = read_results(out / f"digits_{explainer}.jsonl")
        complete = [seed for seed in SEEDS if all((seed, weight) in done for weight in WEIGHTS)]
        if not complete:
            continue
        values = {
            score: {weight: [done[seed, weight][score] for seed in complete] for weight in WEIGHTS} for score in SCORES
        }
        validation = {
            score: {weight: [done[seed, weight]["validation"][score] for seed in complete] for weight in WEIGHTS}
            for score in SCORES
        }
        lines += [f"### {title}, {len(complete)} seeds", "", *table(values), ""]
        lines += [f"Weight that validation chooses: {best_weight(validation)}", ""]
        names = [str(weight or "plain") for weight in WEIGHTS]
        for color, score in zip(COLORS, SCORES[:3], strict=False):
            means, errors = zip(*(mean_and_error(values[score][weight]) for weight in WEIGHTS), strict=True)
            axis.errorbar(names, means, errors, fmt="o-", color=color, label=score, capsize=3)
        axis.set(title=title, xlabel="weight of both terms", ylim=(None, 1))
        axis.legend(frameon=False)
    (out / "digits.md").write_text("\n".join(lines))
    figure.savefig(out / "digits_front.png", dpi=110)
    print("\n".join(lines))


def best_weight(values: dict[str, dict[float, list[float]]]) -> float:
    """The weight with the best mean validation score, eq. (15) at eta = 2."""
    means = {score: {weight: statistics.fmean(own) for weight, own in rows.items()} for score, rows in values.items()}
    return max(WEIGHTS, key=lambda w: 2 * means["accuracy"][w] + means["insertion"][w] + means["1 - deletion"][w])


def table(values: dict[str, dict[float, list[float]]]) -> list[str]:
    """Means of each score at each weight, then the paired differences to weight 0, as Markdown."""
    gains = ("insertion", "1 - deletion", "accuracy")
    head = ["weight", *SCORES, *(f"{score} over plain" for score in gains)]
    rows = [head, ["---"] * len(head)]
    for weight in WEIGHTS:
        row = [str(weight or "plain")]
        row += ["{:.3f} ± {:.3f}".format(*mean_and_error(values[score][weight])) for score in SCORES]
        for score in gains if weight else ():
            differences = [a - b for a, b in zip(values[score][weight], values[score][0.0], strict=True)]
            row.append("{:+.3f} ± {:.3f}".format(*mean_and_error(differences)))
        rows.append(row + [""] * (len(head) - len(row)))
    return ["| " + " | ".join(row) + " |" for row in rows]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["demo", "front"])
    parser.add_argument("--out", type=Path, help="folder of the results (default: demo/ or benchmarks/results/)")
    parser.add_argument("--explainer", choices=list(EXPLAINERS), help="one of the front's two explainers only")
    arguments = parser.parse_args()
    if arguments.command == "demo":
        demo(arguments.out or Path("demo"))
    else:
        explainers = [arguments.explainer] if arguments.explainer else list(EXPLAINERS)
        front(arguments.out or Path(__file__).parent / "results", explainers)


if __name__ == "__main__":
    main()
