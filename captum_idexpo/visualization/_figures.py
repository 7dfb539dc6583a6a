"""Helpers of all plots: figures without pyplot, looks that differ in colour and in grey, finite arrays."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_idexpo._core.inputs import require_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv<>"
_LINES = ("-", "--", "-.", ":")
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "oo", "----")


def line_look(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of a series by its number; the looks repeat from the 29th series on."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markersize": 5,
    }


def bar_look(index: int) -> dict[str, Any]:
    """Return colour and hatch of a series of bars by its number; the looks repeat from the 50th series on."""
    hatch = _HATCHES[(index + index // len(COLORS)) % len(_HATCHES)]
    return {"facecolor": COLORS[index % len(COLORS)], "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def new_figure(
    n_rows: int, n_columns: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> Figure:
    """Return a figure of a size in inches with its axes, without pyplot; rows of equal or of given heights."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install 'captum-idexpo[plot]'`.") from error
    figure = Figure(figsize=size, layout="constrained")
    figure.subplots(n_rows, n_columns, height_ratios=heights)
    return figure


def figure_of(axis: Axes) -> Figure:
    """Return the figure of an axis."""
    return cast("Figure", axis.get_figure())


def one_axis(axis: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given axis, or that of a new figure."""
    return new_figure(1, 1, size).axes[0] if axis is None else axis


def wrapped(name: str) -> str:
    """Return a name with line breaks, at most 24 characters per line where words allow it."""
    return textwrap.fill(name, 24, break_on_hyphens=False)


def finite_array(values: Tensor, name: str) -> NDArray[np.float64]:
    """Return a tensor as a NumPy array; raise NonFiniteError if it holds NaN or infinity."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: a tensor is needed, given: {type(values).__name__}.")
    require_finite((values,), name)
    array: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array


def require_some(given: Sized, name: str, example: str) -> None:
    """Raise ValueError if there is nothing to draw."""
    if not len(given):
        raise ValueError(f"{name} is empty, nothing can be drawn: give at least one, such as {example}.")
