"""Plots of insertion and deletion: the curves of several models, and the changes of the scores per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from captum_idexpo.visualization._figures import figure_of, finite_array, line_look, new_figure, one_axis, require_some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from captum_idexpo.metrics import InsertionDeletionScores

    Array = NDArray[np.float64]

_MAX_NAMES_INSIDE = 4


def plot_curves(
    scores: Mapping[str, InsertionDeletionScores],
    axes: Sequence[Axes] | None = None,
    *,
    example: int | None = None,
    ylabel: str = "probability of the class",
) -> Figure:
    """Plot insertion and deletion curves of several models or explanations, with their scores.

    Args:
        scores: results of `captum_idexpo.metrics.insertion_deletion` by name; the legend also shows their gains over
            random orders, if these were measured.
        axes: two axes, for insertion and for deletion; None: a new figure.
        example: None: the means over the examples. A number: the curves of this example, drawn as steps. The area under
            a curve, divided by the share of locations that it covers, is the example's score.
        ylabel: label of the y axis, for outputs that are not probabilities.

    Returns:
        The figure.

    Raises:
        ValueError: there are no scores, values are NaN or infinite, or there are not two axes.
        IndexError: the example's number is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import insertion_deletion
        >>> from captum_idexpo.visualization import plot_curves
        >>> x = torch.rand(2, 8)
        >>> scores = insertion_deletion(torch.nn.Linear(8, 2), x, attributions=x, target=1)
        >>> figure = plot_curves({"linear": scores})
        >>> figure = plot_curves({"linear": scores}, example=1)
    """
    require_some(scores, "scores", '{"before": insertion_deletion(...)}')
    below = len(scores) > _MAX_NAMES_INSIDE
    axes = new_figure(1, 2, (7, 3 + 0.17 * len(scores) * below)).axes if axes is None else axes
    if len(axes) != 2:
        raise ValueError(f"Curves need two axes, insertion's and deletion's; given: {len(axes)}.")
    for axis, kind, better in zip(axes, ("insertion", "deletion"), ("higher", "lower"), strict=True):
        lowest, highest = 0.0, 1.0
        for number, (name, score) in enumerate(scores.items()):
            fractions, curves, values = _curves(score, kind, name)
            look = line_look(number)
            if example is None:
                x, y = _mean_curve(fractions, curves)
                axis.plot(x, y, **look, markevery=max(1, len(x) // 6))
            else:
                x, y = _steps(fractions, curves, _checked(example, len(values), name))
                axis.plot(x, y, **look, drawstyle="steps-pre", markevery=max(1, len(x) // 6))
                axis.fill_between(x, y, step="pre", color=look["color"], alpha=0.15, linewidth=0)
            axis.lines[-1].set_label(f"{name} ({_summary(score, kind, name, example)})")
            lowest, highest = min(lowest, y.min()), max(highest, y.max())
        outputs_are_raw = lowest < 0 or highest > 1
        axis.set(title=f"{kind} ({better} is better)", xlabel="share of locations", ylabel=ylabel)
        axis.set_ylim(None if outputs_are_raw else (-0.02, 1.02))
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)} if below else {"loc": "best"}
        axis.legend(frameon=False, fontsize=8, **place)
    return figure_of(axes[0])


def plot_quadrants(
    before: InsertionDeletionScores, after: InsertionDeletionScores, axis: Axes | None = None, *, gains: bool = False
) -> Figure:
    """Plot the change of insertion (x) and of 1 - deletion (y), one point per example.

    Each corner gives the share of examples strictly inside its quadrant: both scores rise, only one rises, or both
    fall. The title gives the mean changes and, if it is not zero, the share of examples on an axis. Means alone, as in
    a table, do not distinguish a few large gains from many small ones.

    Args:
        before: result of `captum_idexpo.metrics.insertion_deletion`.
        after: a second result, for the same examples in the same order.
        axis: axis to draw on; None: a new figure.
        gains: plot the changes of the gains over random orders instead.

    Returns:
        The figure.

    Raises:
        ValueError: there are no examples, their numbers differ, values are NaN or infinite, or gains were not measured.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import insertion_deletion
        >>> from captum_idexpo.visualization import plot_quadrants
        >>> x, net = torch.rand(5, 8), torch.nn.Linear(8, 2)
        >>> before, after = (insertion_deletion(net, x, maps, target=1) for maps in (x, x * net.weight[1]))
        >>> figure = plot_quadrants(before, after)
    """
    _require_same_examples(before, after)
    names = ("insertion gain", "deletion gain") if gains else ("insertion", "1 - deletion")
    if gains:
        insertion, kept = (_change(before, after, f"{kind}_gain") for kind in ("insertion", "deletion"))
    else:
        insertion, kept = _change(before, after, "insertion"), -_change(before, after, "deletion")
    axis = one_axis(axis, (4.2, 4.2))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.plot(insertion, kept, "o", color="#0072B2", markersize=5, markeredgecolor="none", alpha=0.5)
    reach = 1.35 * max(abs(insertion).max(), abs(kept).max()) or 1.0
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.set(xlabel=f"change of {names[0]}", ylabel=f"change of {names[1]}")
    for right, top, name in (
        (True, True, "both rise"),
        (False, True, f"only {names[1]} rises"),
        (True, False, f"only {names[0]} rises"),
        (False, False, "both fall"),
    ):
        inside = (insertion > 0 if right else insertion < 0) & (kept > 0 if top else kept < 0)
        text = axis.text(0.98 if right else 0.02, 0.98 if top else 0.02, f"{name}\n{inside.mean():.0%}", fontsize=8)
        text.set(transform=axis.transAxes, ha="right" if right else "left", va="top" if top else "bottom")
    lines = [f"mean change: {names[0]} {insertion.mean():+.3f}, {names[1]} {kept.mean():+.3f}"]
    if on_an_axis := ((insertion == 0) | (kept == 0)).mean():
        lines.append(f"{on_an_axis:.1%} on an axis")
    axis.set_title("\n".join(lines), fontsize=8)
    return figure_of(axis)


def _curves(score: InsertionDeletionScores, kind: str, name: str) -> tuple[Array, Array, Array]:
    """Return fractions and curves, both ``(B, n_steps)``, and scores ``(B,)``."""
    curves = finite_array(getattr(score, f"{kind}_curve"), f"{kind} curves of {name!r}")
    fractions = np.broadcast_to(finite_array(score.fractions, f"fractions of {name!r}"), curves.shape)
    return fractions, curves, _scores(score, kind, name)


def _mean_curve(fractions: Array, curves: Array) -> tuple[Array, Array]:
    """Return the mean of linearly interpolated curves at every fraction that occurs in an example."""
    x = np.unique(fractions)
    return x, np.mean([np.interp(x, *row) for row in zip(fractions, curves, strict=True)], axis=0)


def _steps(fractions: Array, curves: Array, example: int) -> tuple[Array, Array]:
    """Return one example's curve, starting at 0. Each value belongs to the step that ends at its fraction."""
    x, y = fractions[example], curves[example]
    return np.append(0.0, x), np.append(y[0], y)


def _checked(example: int, n_examples: int, name: str) -> int:
    if not 0 <= example < n_examples:
        raise IndexError(f"Example {example} of {name!r}: its scores hold 0 to {n_examples - 1}.")
    return example


def _require_same_examples(before: InsertionDeletionScores, after: InsertionDeletionScores) -> None:
    if len(before.insertion) != len(after.insertion) or not len(before.insertion):
        raise ValueError(
            "Quadrants compare the same examples before and after; given: "
            f"{len(before.insertion)} and {len(after.insertion)} scores."
        )


def _summary(score: InsertionDeletionScores, kind: str, name: str, example: int | None) -> str:
    """Return a score, and its gain if there is one: the means, or those of an example."""
    chosen = slice(None) if example is None else example
    text = f"{_scores(score, kind, name)[chosen].mean():.2f}"
    if getattr(score, f"{kind}_gain") is None:
        return text
    return f"{text}, gain {_scores(score, f'{kind}_gain', name)[chosen].mean():+.2f}"


def _change(before: InsertionDeletionScores, after: InsertionDeletionScores, kind: str) -> Array:
    if getattr(before, kind) is None or getattr(after, kind) is None:
        raise ValueError("Gains were not measured: pass n_random_orders=10 to insertion_deletion.")
    return _scores(after, kind, "after") - _scores(before, kind, "before")


def _scores(scores: InsertionDeletionScores, kind: str, name: str) -> Array:
    return finite_array(getattr(scores, kind), f"{kind} of {name!r}")
