"""Plots of training runs: the history of one run, the fronts of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captum_idexpo.visualization._figures import COLORS, figure_of, line_look, new_figure, one_axis, require_some
from captum_idexpo.visualization.fronts import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NO_LOSSES = ("epoch", "deletion_floor_share", "learning_rate", "eligible")
_MAX_NAMES_INSIDE = 6
_TOO_COSTLY = "accuracy falls too far"


def plot_history(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plot the loss and its parts (left) and the validation scores (right) of each epoch.

    Args:
        history: rows as `captum_idexpo.ExplanationRegularizedTrainer.fit` returns them. A missing value or NaN is a gap
            in the line.

    Returns:
        The figure.

    Raises:
        ValueError: there is no row, or a row has no epoch.

    Example:
        >>> from captum_idexpo.visualization import plot_history
        >>> figure = plot_history([{"epoch": 1, "loss": 0.7, "valscore": 2.5}])
    """
    from matplotlib.ticker import MaxNLocator

    require_some(history, "history", '{"epoch": 1, "loss": 0.7}')
    if any("epoch" not in row for row in history):
        raise ValueError('A row of the history has no "epoch": give each the number of its own.')
    every = dict.fromkeys(name for row in history for name in row)
    names = [name for name in every if name not in _NO_LOSSES and not name.startswith("seconds")]
    names = [name for name in names if not name.endswith(("_weight", "_gradient_norm", "_standard_error"))]
    scores = [name for name in names if name.startswith("val_") or name == "valscore"]
    losses = [name for name in names if name not in scores]
    many = max(len(losses), len(scores)) > _MAX_NAMES_INSIDE
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2} if many else {}
    n_lines = math.ceil(max(len(losses), len(scores) + 1) / 2)
    figure = new_figure(1, 2, (8, 3 + 0.17 * n_lines * many))
    for axis, group, title in zip(figure.axes, (losses, scores), ("training loss", "validation"), strict=True):
        for number, name in enumerate(group):
            epochs, values = [row["epoch"] for row in history], [row.get(name, math.nan) for row in history]
            axis.plot(epochs, values, **line_look(number), markevery=max(1, len(history) // 12), label=name)
        if group is scores:
            _mark_epochs(axis, [row["epoch"] for row in history if not row.get("eligible", True)])
        axis.set(title=title, xlabel="epoch")
        if group:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(frameon=False, fontsize=7, **below)
        else:
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
    return figure


def _mark_epochs(axis: Axes, epochs: Sequence[float]) -> None:
    """Shade the epochs that cannot be kept."""
    for number, epoch in enumerate(epochs):
        label = "_nolegend_" if number else _TOO_COSTLY
        axis.axvspan(epoch - 0.5, epoch + 0.5, color="0.85", linewidth=0, zorder=0, label=label)


def plot_front(
    rows: Sequence[Mapping[str, float]],
    front: Sequence[Mapping[str, float]],
    x: str = "accuracy",
    y: str = "insertion",
    *,
    x_error: str | None = None,
    y_error: str | None = None,
    labels: Sequence[str] = (),
) -> Figure:
    """Plot the settings of a sweep by two scores, and join the settings on the front by a line.

    Settings that are not "eligible", whose accuracy falls further than allowed, are crosses.

    Args:
        rows: the scores of each setting.
        front: the rows on the front.
        x: name of the score on the horizontal axis; higher is better.
        y: name of the score on the vertical axis; higher is better.
        x_error: name of the standard error of x, drawn as bars; None: no bars.
        y_error: name of the standard error of y, drawn as bars; None: no bars.
        labels: texts beside the points of the front, one each; empty: none.

    Returns:
        The figure.

    Raises:
        ValueError: there are no rows; scores are missing, NaN or infinite; labels and front differ in number.

    Example:
        >>> from captum_idexpo.visualization import plot_front
        >>> rows = [{"accuracy": 0.9, "insertion": 0.5}, {"accuracy": 0.8, "insertion": 0.4}]
        >>> figure = plot_front(rows, rows[:1])
    """
    require_some(rows, "rows", f'{{"{x}": 0.9, "{y}": 0.5}}')
    if labels and len(labels) != len(front):
        raise ValueError(f"labels must be one text per row of the front, {len(front)}, given: {len(labels)}.")
    axis = one_axis(None, (5, 3.5))
    errors = (("xerr", x_error), ("yerr", y_error))
    bars: dict[str, Any] = {side: _column(rows, name) for side, name in errors if name is not None}
    axis.errorbar(_column(rows, x), _column(rows, y), **bars, fmt="none", ecolor="0.7", elinewidth=1)
    kept, costly = _by_eligibility(rows)
    axis.plot(_column(kept, x), _column(kept, y), "o", color=COLORS[0], fillstyle="none", label="settings")
    if costly:
        axis.plot(_column(costly, x), _column(costly, y), "x", color=COLORS[2], label=_TOO_COSTLY)
    points = sorted(zip(_column(front, x), _column(front, y), strict=True))
    axis.plot([a for a, _ in points], [b for _, b in points], "o-", color=COLORS[1], label="front")
    for row, text in zip(front, labels, strict=False):
        axis.annotate(text, (row[x], row[y]), (5, 5), textcoords="offset points", fontsize=7)
    axis.margins(x=0.2 if labels else 0.05)
    _name_axes(axis, x, y)
    axis.legend(frameon=False, fontsize=8)
    return figure_of(axis)


def plot_fronts(
    methods: Mapping[str, Sequence[Mapping[str, float]]],
    x: str = "accuracy",
    y: str = "insertion",
    *,
    x_error: str | None = None,
    y_error: str | None = None,
    axis: Axes | None = None,
) -> Figure:
    """Plot the settings of several methods by two scores on one axis, and join each method's front by a line.

    Args:
        methods: the scores of each method's settings, by method name, for example a `captum_idexpo.training.Sweep`.
            Full markers are the settings on the method's Pareto front. Hollow markers are the other settings, crosses
            those that are not "eligible".
        x: name of the score on the horizontal axis; higher is better.
        y: name of the score on the vertical axis; higher is better.
        x_error: name of the standard error of x, drawn as bars; None: no bars.
        y_error: name of the standard error of y, drawn as bars; None: no bars.
        axis: axis to draw on; None: a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: there are no methods, a method has no rows, or scores are missing, NaN or infinite.

    Example:
        >>> from captum_idexpo.visualization import plot_fronts
        >>> plain = [{"accuracy": 0.9, "insertion": 0.5, "error": 0.02}]
        >>> ours = [{"accuracy": 0.9, "insertion": 0.6, "error": 0.01}, {"accuracy": 0.8, "insertion": 0.7, "error": 0}]
        >>> figure = plot_fronts({"plain": plain, "ID-ExpO": ours}, y_error="error")
    """
    require_some(methods, "methods", '{"plain": rows}')
    axis = one_axis(axis, (5, 3.5))
    errors = {"xerr": x_error, "yerr": y_error}
    handles: list[Any] = []
    any_beaten = any_costly = False
    for number, (name, rows) in enumerate(methods.items()):
        require_some(rows, f"methods[{name!r}]", f'{{"{x}": 0.9, "{y}": 0.5}}')
        look = line_look(number)
        for score in filter(None, (x, y, x_error, y_error)):
            _column(rows, score)
        front = pareto_front(rows, x, y)
        kept, costly = _by_eligibility(rows)
        beaten = [row for row in kept if not any(row is other for other in front)]
        handles.append(_draw_points(axis, front, x, y, errors, **look, label=name))
        if beaten:
            _draw_points(axis, beaten, x, y, errors, **look | {"linestyle": "none"}, fillstyle="none", alpha=0.7)
        if costly:
            _draw_points(axis, costly, x, y, errors, **look | {"linestyle": "none", "marker": "x"}, alpha=0.7)
        any_beaten, any_costly = any_beaten or bool(beaten), any_costly or bool(costly)
    if any_beaten:
        handles += axis.plot([], [], "o", color="black", fillstyle="none", label="beaten by the same method")
    if any_costly:
        handles += axis.plot([], [], "x", color="black", linestyle="none", label=_TOO_COSTLY)
    _name_axes(axis, x, y)
    axis.legend(handles=handles, frameon=False, fontsize=8)
    return figure_of(axis)


def _draw_points(
    axis: Axes, rows: Sequence[Mapping[str, float]], x: str, y: str, errors: Mapping[str, str | None], **look: Any
) -> Any:
    """Draw points and return their legend handle."""
    whiskers: dict[str, Any] = {side: [row[name] for row in rows] for side, name in errors.items() if name is not None}
    return axis.errorbar(
        [row[x] for row in rows], [row[y] for row in rows], **whiskers, capsize=2, elinewidth=1, **look
    )


def _by_eligibility(rows: Sequence[Mapping[str, float]]) -> tuple[list[Any], list[Any]]:
    """Return the rows that may be chosen, and those whose accuracy falls too far."""
    kept = [row for row in rows if row.get("eligible", True)]
    return kept, [row for row in rows if not row.get("eligible", True)]


def _name_axes(axis: Axes, x: str, y: str) -> None:
    axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Return a score of each row; raise ValueError if one is missing or not finite."""
    for row in rows:
        if name not in row:
            raise ValueError(f"A row has no {name!r}; it has: {', '.join(map(repr, row))}.")
        if not math.isfinite(row[name]):
            raise ValueError(f"{name!r} is {row[name]} in a row: leave such settings out.")
    return [row[name] for row in rows]
