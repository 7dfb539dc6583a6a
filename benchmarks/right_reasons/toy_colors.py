"""Toy colours: two rules tell the class, and either can be forbidden (Ross, Hughes, Doshi-Velez 2017).

Images of 5x5 pixels in four colours. In the first class the four corners are of one colour and the three pixels in the
middle of the top row of three different ones; in the second, neither. A network may use either rule. Annotations on the
corners, or on the top row's middle, forbid one: accuracy stays, the large input gradients move to the other. The search
for other explanations needs no annotations: its first model uses one rule, the second the other. Later ones live on
what is left of both, until accuracy falls.

The units are tanh. A rectified network may be forbidden both rules in every image and hardly suffers: among four
colours it is flat where the images lie, as the penalty asks, and steep in between.

The weight is chosen by the accuracy on validation images whose forbidden rule says nothing: the mean over both rules
and three seeds.

    python benchmarks/right_reasons/toy_colors.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import (
    Results,
    Row,
    accuracy,
    chosen_weight,
    markdown,
    mlp,
    parse_arguments,
    train,
    weighted,
    with_error,
    write_table,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Generator, Tensor, nn

from captum_idexpo.attr import Saliency
from captum_idexpo.regularizers import RightForTheRightReasons, find_another_explanation
from captum_idexpo.visualization import COLORS

SIZE = 5
PALETTE = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 128, 255], [128, 0, 255]]) / 255
SEEDS = range(5)
N_IMAGES = 20_000
EPOCHS = 60
WEIGHTS = (100.0, 1000.0, 10_000.0)
VALIDATION_SEEDS = range(100, 103)
LARGE = 0.67
MAX_MODELS = 10
PAPER = "1.0"


class Rule(NamedTuple):
    """Some pixels, and whether they obey the rule: colours ``(N, P)`` -> ``(N,)``."""

    rows: list[int]
    columns: list[int]
    obeyed: Callable[[Tensor], Tensor]

    @property
    def area(self) -> Tensor:
        """1 on the rule's pixels, ``(5, 5)``."""
        area = torch.zeros(SIZE, SIZE)
        area[self.rows, self.columns] = 1
        return area


def all_same(colors: Tensor) -> Tensor:
    return (colors == colors[:, :1]).all(dim=1)


def all_different(colors: Tensor) -> Tensor:
    return (colors.sort(dim=1).values.diff(dim=1) > 0).all(dim=1)


RULES = {
    "corners": Rule([0, 0, -1, -1], [0, -1, 0, -1], all_same),
    "top middle": Rule([0, 0, 0], [1, 2, 3], all_different),
}
SETTINGS = {
    "plain": (),
    **{f"{rule} forbidden": (rule,) for rule in RULES},
    "both forbidden": tuple(RULES),
    "both forbidden, rectified": tuple(RULES),
}
PREFACE = f"""Mean ± standard error over {len(SEEDS)} seeds, on {N_IMAGES:,} test images. Share of large gradients: of
the pixels whose input gradient, of the predicted class's log probability, exceeds {LARGE} of the image's largest, those
in an area ({", ".join(f"{name}: {len(rule.rows)} of {SIZE**2} pixels" for name, rule in RULES.items())}). Validation
images chose RRR's weight. Each model of the search may not use what those before it used, image by image; {MAX_MODELS}
at most.
"""


class Images(NamedTuple):
    """Images ``(N, 3, 5, 5)`` in [0, 1] and labels; class 0 obeys both rules, class 1 neither."""

    x: Tensor
    y: Tensor

    @classmethod
    def drawn(cls, n: int, generator: Generator, silent: str | None = None) -> Images:
        """Half of each class; a silent rule is obeyed by half of the images of either class."""
        halves = [_colors(n // 2, obeying, generator, silent) for obeying in (True, False)]
        return cls(
            PALETTE[torch.cat(halves)].permute(0, 3, 1, 2).contiguous(), torch.arange(2).repeat_interleave(n // 2)
        )


def _colors(n: int, obeying: bool, generator: Generator, silent: str | None) -> Tensor:
    """The palette's numbers ``(n, 5, 5)``, at random but for the rules' pixels, which all obey or all violate them."""
    colors = torch.randint(len(PALETTE), (n, SIZE, SIZE), generator=generator)
    for name, rule in RULES.items():
        candidates = torch.randint(len(PALETTE), (100 * n, len(rule.rows)), generator=generator)
        obeyed = rule.obeyed(candidates)
        colors[:, rule.rows, rule.columns] = candidates[obeyed == obeying][:n]
        if name == silent:
            colors[::2, rule.rows, rule.columns] = candidates[obeyed != obeying][: (n + 1) // 2]
    return colors


def fit(
    images: Images,
    annotations: Tensor,
    seed: int,
    weight: float,
    epochs: int = EPOCHS,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Module:
    """The network that may not use what is annotated, ``(N, 3, 5, 5)``."""
    torch.manual_seed(seed)
    model = mlp(3 * SIZE**2, 2, activation=activation)
    regularizers = [RightForTheRightReasons(model, weight=weight)] if bool(annotations.any()) else []
    make_optimizer = partial(torch.optim.Adam, lr=3e-3)
    return train(model, (*images, annotations), regularizers, epochs=epochs, seed=seed, make_optimizer=make_optimizer)


def large_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Where any channel's gradient is large for its image, ``(N, 5, 5)``."""
    gradients = Saliency(lambda images: model(images).log_softmax(dim=1).amax(dim=1)).attribute(x)
    return (gradients > LARGE * gradients.amax(dim=(1, 2, 3), keepdim=True)).any(dim=1).float()


def judge(model: nn.Module, test: Images) -> Row:
    """Accuracy, the share of large gradients in each rule's area, and how often a pixel's is large."""
    large = large_gradients(model, test.x)
    shares = {name: round(float((large * rule.area).sum() / large.sum()), 5) for name, rule in RULES.items()}
    return {"accuracy": accuracy(model, *test), **shares, "used": rounded(large.mean(dim=0))}


def rounded(area: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in area.tolist()]


def measure(setting: str, weight: float, seed: int, n_images: int = N_IMAGES, epochs: int = EPOCHS) -> Row:
    """A network that may use both rules, or only one."""
    images, test = data(seed, n_images)
    annotations = torch.zeros_like(images.x)
    for rule in SETTINGS[setting]:
        annotations += RULES[rule].area
    activation = nn.ReLU if setting.endswith("rectified") else nn.Tanh
    return judge(fit(images, annotations, seed, weight, epochs, activation), test)


def validation_accuracy(weight: float, seed: int, n_images: int = N_IMAGES, epochs: int = EPOCHS) -> float:
    """Mean accuracy on images whose forbidden rule says nothing, over both rules."""
    images, _ = data(seed, n_images)
    generator, accuracies = Generator().manual_seed(seed + 1000), []
    for name, rule in RULES.items():
        model = fit(images, rule.area.expand_as(images.x), seed, weight, epochs)
        accuracies.append(accuracy(model, *Images.drawn(n_images, generator, silent=name)))
    return statistics.fmean(accuracies)


def search(weight: float, seed: int, n_images: int = N_IMAGES, epochs: int = EPOCHS) -> Row:
    """The models of a search for other explanations, one after the other."""
    images, test = data(seed, n_images)
    found = find_another_explanation(
        partial(fit, images, seed=seed, weight=weight, epochs=epochs),
        lambda model: accuracy(model, *test),
        images.x,
        threshold=LARGE,
        max_explanations=MAX_MODELS,
    )
    forbidden = [rounded(explanation.annotations.amax(dim=1).mean(dim=0)) for explanation in found]
    judged = [judge(explanation.model, test) for explanation in found]
    return {"models": [{**row, "forbidden": area} for row, area in zip(judged, forbidden, strict=True)]}


def data(seed: int, n_images: int) -> tuple[Images, Images]:
    """Training and test images."""
    generator = Generator().manual_seed(seed)
    return Images.drawn(n_images, generator), Images.drawn(n_images, generator)


def table(results: Results, weight: float) -> str:
    """What may be used, then the search's models, one a line."""
    columns = ("accuracy", *RULES)
    rows = []
    for name in SETTINGS:
        paper = "" if name.startswith("both") else PAPER
        rows.append([name, *(with_error(results.column(weighted(name, weight), column)) for column in columns), paper])
    searches = results.column(weighted("search", weight), "models")
    places = {
        f"model {place + 1}": [models[place] for models in searches if place < len(models)]
        for place in range(max(map(len, searches)))
    }
    for name, models in {**places, "the last model": [models[-1] for models in searches]}.items():
        measured = (with_error([model[column] for model in models]) for column in columns)
        rows.append([f"search, {name} ({len(models)} seeds)", *measured, ""])
    head = ["training", "accuracy", *(f"large gradients: {rule}" for rule in RULES), "accuracy, paper"]
    return markdown(head, rows)


def report(results: Results, weight: float, out: Path) -> None:
    """The table, and a picture of what the first seed's models use and may not use."""
    write_table(out / "toy_colors.md", f"{PREFACE.strip()} The weight is {weight:g}.", table(results, weight))
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    draw_settings(above, results, weight)
    draw_search(below, results.rows[weighted("search", weight)][str(SEEDS[0])]["models"])
    figure.savefig(out / "toy_colors.png", dpi=110)


def draw_settings(figure: SubFigure, results: Results, weight: float) -> None:
    """An image of each class; how often each pixel's gradient is large, what is forbidden framed."""
    figure.suptitle("two images, and where gradients are large")
    axes = figure.subplots(1, 2 + len(SETTINGS))
    images, _ = data(SEEDS[0], 2)
    for axis, image, label in zip(axes, images.x, images.y, strict=False):
        axis.imshow(image.permute(1, 2, 0))
        axis.set_title(f"class {label + 1}", fontsize=9)
        axis.set_axis_off()
    for axis, (name, rules) in zip(axes[2:], SETTINGS.items(), strict=True):
        draw_area(axis, results.rows[weighted(name, weight)][str(SEEDS[0])], name)
        for rule in rules:
            frame(axis, RULES[rule].area)


def draw_search(figure: SubFigure, models: list[Row]) -> None:
    """The search's models: where gradients are large, what was forbidden in most images framed."""
    figure.suptitle("the search: one model after the other")
    for place, (axis, model) in enumerate(zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True)):
        draw_area(axis, model, f"model {place + 1}")
        frame(axis, torch.tensor(model["forbidden"]).round())


def draw_area(axis: Axes, row: Row, title: str) -> None:
    axis.imshow(row["used"], cmap="Blues", vmin=0, vmax=1)
    axis.set_title(f"{title}\naccuracy {row['accuracy']:.3f}", fontsize=9)
    axis.set_axis_off()


def frame(axis: Axes, area: Tensor) -> None:
    """A frame around each pixel of an area."""
    for row, column in area.nonzero().tolist():
        axis.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, fill=False, color=COLORS[2], linewidth=2))


def main() -> None:
    out = parse_arguments(__doc__).out
    results = Results(out / "toy_colors.json")
    weight = chosen_weight(results, "one rule forbidden", WEIGHTS, VALIDATION_SEEDS, validation_accuracy)
    for seed in SEEDS:
        for name in SETTINGS:
            results.measure(weighted(name, weight), seed, partial(measure, name, weight, seed))
        results.measure(weighted("search", weight), seed, partial(search, weight, seed))
    report(results, weight, out)


if __name__ == "__main__":
    main()
