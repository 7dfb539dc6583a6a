"""Pictures beside `captum.attr.visualization`: insertion and deletion curves, explanations before and after, histories.

Matplotlib figures, returned and never shown. Colours are Okabe and Ito's, which the colour-blind tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from captum_idexpo.metrics import InsertionDeletionScores

_NO_LOSSES = ("epoch", "skipped", "deletion_floor_share")
COLORS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_curves(scores: Mapping[str, InsertionDeletionScores], axes: Sequence[Axes] | None = None) -> Figure:
    """Mean insertion and deletion curves of several models or explanations, with their scores.

    Args:
        scores: results of `captum_idexpo.metrics.insertion_deletion` by name.
        axes: where insertion and deletion are drawn; None: a new figure.

    Returns:
        The figure.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import insertion_deletion
        >>> from captum_idexpo.visualization import plot_curves
        >>> x = torch.rand(2, 8)
        >>> scores = insertion_deletion(torch.nn.Linear(8, 2), x, attributions=x, target=1)
        >>> figure = plot_curves({"linear": scores})
    """
    axes = _figure(1, 2, (7, 3)).axes if axes is None else axes
    for color, (name, score) in zip(COLORS, scores.items(), strict=False):
        for axis, values, curve in (
            (axes[0], score.insertion, score.insertion_curve),
            (axes[1], score.deletion, score.deletion_curve),
        ):
            fractions = score.fractions.mean(dim=0) if score.fractions.dim() > 1 else score.fractions
            mean_curve = curve.detach().mean(dim=0)
            label = f"{name} ({float(values.detach().mean()):.2f})"
            axis.plot(fractions.cpu(), mean_curve.cpu(), color=color, label=label)
    for axis, title in zip(axes, ("insertion (higher is better)", "deletion (lower is better)"), strict=False):
        axis.set(title=title, xlabel="share of locations", ylabel="probability of the class", ylim=(0, 1))
        axis.legend(frameon=False)
    return _parent(axes[0])


def plot_explanations(
    images: Tensor, attributions: Mapping[str, Tensor], titles: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Images and, in a column a model, their heat maps, drawn by Captum's `visualize_image_attr`.

    Args:
        images: ``(B, C, H, W)`` with C = 1 or 3, in [0, 1].
        attributions: maps ``(B, 1, H, W)`` by name.
        titles: for each name one line for each image.

    Returns:
        The figure, a row an image.

    Example:
        >>> import torch
        >>> from captum_idexpo.visualization import plot_explanations
        >>> figure = plot_explanations(torch.rand(2, 1, 8, 8), {"before": torch.rand(2, 1, 8, 8)})
    """
    n_columns = 1 + len(attributions)
    figure = _figure(len(images), n_columns, (1.7 * n_columns, 1.7 * len(images)))
    grid = [figure.axes[row * n_columns : (row + 1) * n_columns] for row in range(len(images))]
    for row, (axes, image) in enumerate(zip(grid, images, strict=True)):
        draw_image(axes[0], image, "image" if row == 0 else "")
        for axis, (name, maps) in zip(axes[1:], attributions.items(), strict=True):
            lines = [name] if row == 0 else []
            lines += [titles[name][row]] if titles else []
            draw_heat_map(axis, image, maps[row], "\n".join(lines))
    return figure


def draw_image(axis: Axes, image: Tensor, title: str = "") -> None:
    """An image ``(C, H, W)`` in [0, 1] without its axes."""
    axis.imshow(_channels_last(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def draw_heat_map(axis: Axes, image: Tensor, attribution: Tensor, title: str = "") -> None:
    """A map ``(1, H, W)`` over its image ``(C, H, W)``, by Captum's `visualize_image_attr`.

    A map without negative values runs from black to yellow, one with both signs from red to green.
    """
    from captum.attr import visualization

    figure = _parent(axis)
    values = _channels_last(attribution)
    largest = abs(values).max()
    if not largest:  # Captum cannot scale a map of zeros
        return draw_image(axis, image, title)
    visualization.visualize_image_attr(
        values / largest,
        _channels_last(image),
        method="blended_heat_map",
        sign="positive" if values.min() >= 0 else "all",
        cmap="inferno" if values.min() >= 0 else None,
        plt_fig_axis=(figure, axis),
        title=None,
        use_pyplot=False,
        alpha_overlay=0.7,
    )
    axis.set_title(title, fontsize=8)


def plot_history(history: Sequence[Mapping[str, float]]) -> Figure:
    """The loss and its parts (left) and the validation scores (right) of each epoch.

    Args:
        history: rows as `captum_idexpo.ExplanationRegularizedTrainer.fit` returns them.

    Returns:
        The figure.

    Example:
        >>> from captum_idexpo.visualization import plot_history
        >>> figure = plot_history([{"epoch": 1, "loss": 0.7, "valscore": 2.5}])
    """
    figure = _figure(1, 2, (8, 3))
    every = dict.fromkeys(name for row in history for name in row)
    names = [name for name in every if name not in _NO_LOSSES and not name.startswith("seconds")]
    names = [name for name in names if not name.endswith(("_weight", "_gradient_norm"))]
    scores = [name for name in names if name.startswith("val_") or name == "valscore"]
    losses = [name for name in names if name not in scores]
    for axis, group, title in zip(figure.axes, (losses, scores), ("training loss", "validation"), strict=True):
        for color, name in zip(COLORS * (1 + len(group) // len(COLORS)), group, strict=False):
            values = [row.get(name, math.nan) for row in history]
            axis.plot([row["epoch"] for row in history], values, "o-", color=color, label=name)
        axis.set(title=title, xlabel="epoch")
        if group:
            axis.legend(frameon=False, fontsize=7)
    return figure


def plot_front(
    rows: Sequence[Mapping[str, float]], front: Sequence[Mapping[str, float]], x: str = "accuracy", y: str = "insertion"
) -> Figure:
    """Settings of a sweep by two scores, those that no other beats in both joined by a line.

    Args:
        rows: the scores of each setting.
        front: those on the front.
        x, y: names of the scores, higher being better.

    Returns:
        The figure.

    Example:
        >>> from captum_idexpo.visualization import plot_front
        >>> rows = [{"accuracy": 0.9, "insertion": 0.5}, {"accuracy": 0.8, "insertion": 0.4}]
        >>> figure = plot_front(rows, rows[:1])
    """
    figure = _figure(1, 1, (5, 3.5))
    (axis,) = figure.axes
    axis.plot([row[x] for row in rows], [row[y] for row in rows], "o", color=COLORS[0], label="settings")
    ordered = sorted(front, key=lambda row: row[x])
    axis.plot([row[x] for row in ordered], [row[y] for row in ordered], "o-", color=COLORS[1], label="front")
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    axis.legend(frameon=False)
    return figure


def _figure(n_rows: int, n_columns: int, size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install 'captum-idexpo[plot]'`.") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(n_rows, n_columns)
    return figure


def _parent(axis: Any) -> Figure:
    figure: Figure = axis.get_figure()
    return figure


def _channels_last(image: Tensor) -> Any:
    return image.detach().to("cpu", torch.float32).movedim(0, -1).numpy()
