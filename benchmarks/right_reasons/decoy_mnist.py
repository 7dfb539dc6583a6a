"""Decoy MNIST: a grey patch in a corner tells the digit in training and lies in test (Ross et al. 2017).

Every image gets a patch of 4x4 pixels in a random corner, of grey 255 - 25 y: y is the label in training, a random
digit in test. A plain network learns the patch; told by annotations where the patch is, it reads the digit, as well as
a network that never saw one. Annotations are 1 on each example's own patch and 0 in the other corners, as in the
paper.

The authors' weight of RRR is 1000, for inputs in [0, 1]: 1000 / 255^2. Weights are chosen between a tenth and ten times
that by accuracy on 10,000 training images that are held out. Their patches say a random digit, as those of the test.

Two other ways to say the same, with Saliency maps: attribution supervision, annotated where the patch is not; and
attribution distillation from the RRR network, whose students never see an annotation. They train on the labels, not on
their teacher's probabilities, so that nothing but the maps tells them of the patch.

    python benchmarks/right_reasons/decoy_mnist.py --data-root FOLDER     with mnist.npz (x_train, y_train and so on)
    python benchmarks/right_reasons/decoy_mnist.py                        with torchvision's MNIST, downloaded
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from experiment import (
    Results,
    Row,
    accuracy,
    chosen_weight,
    markdown,
    mean_and_error,
    mlp,
    parse_arguments,
    train,
    weighted,
    with_error,
    write_table,
)
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_idexpo.attr import Saliency
from captum_idexpo.regularizers import AttributionDistillation, AttributionSupervision, RightForTheRightReasons
from captum_idexpo.visualization import COLORS

SEEDS = range(3)
EPOCHS = 20
PATCH = 4
N_FIT = 50_000  # training images that weights are tried on; the others validate
WEIGHT = 1000 / 255**2  # the authors'
WEIGHTS = {
    "RRR": (0.1 * WEIGHT, WEIGHT, 10 * WEIGHT),
    "attribution supervision": (1.0, 10.0, 100.0),
    "attribution distillation": (1.0, 10.0, 100.0),
}


class Setting(NamedTuple):
    """How a network is trained, and the paper's accuracy."""

    regularizer: Callable[[nn.Module, float], nn.Module] | None = None
    decoys: bool = True
    paper: str = ""
    distills: bool = False


def supervision(model: nn.Module, weight: float) -> AttributionSupervision:
    """Penalise the share of the saliency that lies on the patch."""
    return AttributionSupervision(Saliency(model), weight=weight)


def distillation(model: nn.Module, teacher: nn.Module, weight: float) -> AttributionDistillation:
    """Ask for the direction of the teacher's input gradient, signs included."""
    signed = {"abs": False}
    return AttributionDistillation(Saliency(model), Saliency(teacher), weight=weight, attribute_kwargs=signed)


def rrr(model: nn.Module, weight: float) -> RightForTheRightReasons:
    """Penalise gradients of the log probabilities on the patch."""
    return RightForTheRightReasons(model, weight=weight)


SETTINGS = {
    "plain": Setting(paper=".516"),
    "RRR": Setting(rrr, paper=".961"),
    "attribution supervision": Setting(supervision),
    "attribution distillation": Setting(distills=True),
    "plain, no decoys": Setting(decoys=False, paper=".961"),
}
PREFACE = f"""Accuracy, mean ± standard error over {len(SEEDS)} seeds, {EPOCHS} epochs. Both parts have patches or,
in the last line, none; a training image's patch tells its digit, a test image's says nothing about it. Validation
images chose the weights.
"""


class Digits(NamedTuple):
    """Images ``(N, 28, 28)`` in [0, 1], labels, and masks of the patches."""

    x: Tensor
    y: Tensor
    patches: Tensor


@cache
def load_mnist(root: Path | None, part: str) -> tuple[Tensor, Tensor]:
    """The images, uint8, and labels of "train" or "test"."""
    if root is None:
        from torchvision.datasets import MNIST

        data = MNIST("data", train=part == "train", download=True)
        return data.data, data.targets
    with np.load(root / "mnist.npz") as arrays:
        return torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long()


def load(root: Path | None, part: str, decoys: bool, seed: int) -> Digits:
    """The images with their decoys, or without; decoys of test and validation images say a random digit.

    "fit" and "validation" are two parts of the training images.
    """
    images, y = load_mnist(root, "test" if part == "test" else "train")
    rows = {"fit": slice(0, N_FIT), "validation": slice(N_FIT, None)}.get(part, slice(None))
    images, y, tells = images[rows], y[rows], part in ("train", "fit")
    generator = torch.Generator().manual_seed(2 * seed + (not tells))
    patches = corners(len(y), images.shape[-1], generator)
    said = y if tells else torch.randint(10, y.shape, generator=generator)
    with_decoys = torch.where(patches, (255 - 25 * said)[:, None, None], images.long())
    return Digits((with_decoys if decoys else images) / 255, y, patches.float())


def corners(n: int, size: int, generator: torch.Generator) -> Tensor:
    """A patch in a random corner of each of n square images, booleans."""
    starts = torch.randint(2, (2, n, 1), generator=generator) * (size - PATCH)
    pixels = torch.arange(size)
    rows, columns = (pixels >= starts) & (pixels < starts + PATCH)
    return rows[:, :, None] & columns[:, None, :]


def measure(name: str, weights: dict[str, float], root: Path | None, seed: int, validate: bool = False) -> Row:
    """A network trained in one way: accuracy on its training images and on test (or validation) images."""
    setting = SETTINGS[name]
    digits, test = (
        load(root, part, setting.decoys, seed) for part in (("fit", "validation") if validate else ("train", "test"))
    )
    regularizers: list[nn.Module] = []
    torch.manual_seed(seed)
    model = mlp(digits.x[0].numel(), 10)
    if setting.distills:
        torch.manual_seed(seed + 100)
        teacher = mlp(digits.x[0].numel(), 10)
        train(teacher, digits, [rrr(teacher, weights["RRR"])], epochs=EPOCHS, seed=seed)
        regularizers = [distillation(model, teacher, weights[name])]
        digits = digits._replace(patches=torch.zeros_like(digits.patches))  # the student is told nothing of them
    elif setting.regularizer:
        regularizers = [setting.regularizer(model, weights[name])]
    if setting.regularizer is supervision:  # where the evidence must be
        digits = digits._replace(patches=1 - digits.patches)
    torch.manual_seed(seed)
    start = time.perf_counter()
    train(model, digits, regularizers, epochs=EPOCHS, seed=seed)
    seconds = round(time.perf_counter() - start, 1)
    parts = {"train": accuracy(model, digits.x, digits.y), "test": accuracy(model, test.x, test.y)}
    return {**parts, "seconds": seconds}


def table(results: Results, weights: dict[str, float]) -> str:
    head = ["training", "weight", "training images", "test images", "test images, paper"]
    lines = []
    for name, setting in SETTINGS.items():
        weight = weights.get(name, 0.0)
        measured = (with_error(results.column(weighted(name, weight), part)) for part in ("train", "test"))
        lines.append([name, f"{weight:.3g}" if weight else "", *measured, setting.paper])
    return markdown(head, lines)


def report(results: Results, weights: dict[str, float], root: Path | None, out: Path) -> None:
    """The table beside the paper's figures, and the picture: images with their patches, accuracies."""
    write_table(out / "decoy_mnist.md", PREFACE, table(results, weights))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    draw_images(left, root)
    draw_accuracies(right, results, weights)
    figure.savefig(out / "decoy_mnist.png", dpi=110)


def draw_images(figure: Figure, root: Path | None) -> None:
    """Of each part three images, and what they say."""
    for axes, part in zip(figure.subplots(2, 3), ("train", "test"), strict=True):
        digits = load(root, part, True, 0)
        for axis, image, label in zip(axes, digits.x, digits.y, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{part}: {label}", fontsize=9)
            axis.set_axis_off()


def draw_accuracies(figure: Figure, results: Results, weights: dict[str, float]) -> None:
    """A bar for each way to train, the paper's figure as a mark."""
    axis = figure.subplots()
    for place, (name, setting) in enumerate(SETTINGS.items()):
        mean, error = mean_and_error(results.column(weighted(name, weights.get(name, 0.0)), "test"))
        axis.barh(
            place,
            mean,
            xerr=error,
            color=COLORS[1] if setting.regularizer or setting.distills else COLORS[0],
            height=0.6,
        )
        axis.annotate(f"{mean:.3f}", (0.02, place), va="center", color="white", fontweight="bold")
        if setting.paper:
            axis.plot(float(setting.paper), place, "D", color=COLORS[2], label="paper" if place == 0 else None)
    axis.set_yticks(range(len(SETTINGS)), labels=list(SETTINGS))
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="accuracy on test images")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.6, 1))


def main() -> None:
    arguments = parse_arguments(__doc__)
    root, out = arguments.data_root, arguments.out
    results = Results(out / "decoy_mnist.json")
    weights: dict[str, float] = {}
    for name, candidates in WEIGHTS.items():
        validate = partial(validation_accuracy, name, weights, root)
        teacher = f" of RRR {weights['RRR']:.4g}" if SETTINGS[name].distills else ""
        weights[name] = chosen_weight(results, name + teacher, candidates, SEEDS[:1], validate)
    for name in SETTINGS:
        for seed in SEEDS:
            setting = weighted(name, weights.get(name, 0.0))
            results.measure(setting, seed, lambda name=name, seed=seed: measure(name, weights, root, seed))
    report(results, weights, root, out)


def validation_accuracy(name: str, weights: dict[str, float], root: Path | None, weight: float, seed: int) -> float:
    """The accuracy of a weight on validation images; distillation has a teacher with the weights chosen before."""
    return float(measure(name, {**weights, name: weight}, root, seed, validate=True)["test"])


if __name__ == "__main__":
    main()
