"""Bar plots of attributions of tables: one bar per feature and model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_idexpo.visualization._figures import bar_look, figure_of, finite_array, one_axis, require_some, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = NDArray[np.float64]

_LINE_LENGTH = 60  # characters per legend line; each name takes 7 more for its patch


def plot_attribution_bars(
    attributions: Mapping[str, Tensor],
    feature_names: Sequence[str] | None = None,
    *,
    top: int | None = None,
    axis: Axes | None = None,
) -> Figure:
    """Plot attributions of a table's features as bars, several models side by side.

    Features are ordered by their longest bar in any of the models, the longest first.

    Args:
        attributions: attributions by model name, of one example ``(D,)`` or of several ``(B, D)``. Several examples
            are drawn as means, with whiskers for the standard errors (if B > 1). Signs cancel in a mean: pass
            ``abs()`` of the attributions to show how much a feature matters in either direction.
        feature_names: one name per feature; None: the features' numbers.
        top: largest number of features to draw; None: all.
        axis: axis to draw on; None: a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: there are no attributions, the numbers of features or names differ, values are NaN or infinite, or
            top is below 1.

    Example:
        >>> import torch
        >>> from captum_idexpo.visualization import plot_attribution_bars
        >>> maps = {"before": torch.tensor([0.1, -0.4, 0.2]), "after": torch.tensor([0.0, -0.5, 0.1])}
        >>> figure = plot_attribution_bars(maps, ["age", "income", "debt"], top=2)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['income', 'debt']
    """
    require_some(attributions, "attributions", '{"before": attribution}')
    bars = {name: _bar_lengths(values, name) for name, values in attributions.items()}
    lengths = {name: len(means) for name, (means, _) in bars.items()}
    (n_features, *others) = set(lengths.values())
    if others:
        raise ValueError(f"Attributions of different numbers of features: {lengths}.")
    names = [f"feature {i}" for i in range(n_features)] if feature_names is None else list(feature_names)
    if len(names) != n_features:
        raise ValueError(f"{len(names)} feature names for {n_features} features: give one for each.")
    if top is not None and top < 1:
        raise ValueError(f"top={top}: at least one feature has to be drawn.")
    size = np.max([abs(means) for means, _ in bars.values()], axis=0)
    order = np.argsort(-size, kind="stable")[:top]
    thickness = 0.8 / len(bars)
    n_columns = max(1, min(3, len(bars), _LINE_LENGTH // (max(map(len, bars)) + 7)))
    n_lines = math.ceil(len(bars) / n_columns)
    axis = one_axis(axis, (5, 1 + 0.2 * n_lines + len(order) * (0.12 + 0.18 * len(bars))))
    for number, (name, (means, errors)) in enumerate(bars.items()):
        places = np.arange(len(order)) + (number - (len(bars) - 1) / 2) * thickness
        whiskers = None if errors is None else errors[order]
        axis.barh(places, means[order], thickness, xerr=whiskers, capsize=2, label=name, **bar_look(number))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(order)), labels=[wrapped(names[i]) for i in order])
    axis.set_ylim(len(order) - 0.5, -0.5)  # the largest on top
    averaged = any(errors is not None for _, errors in bars.values())
    axis.set_xlabel("mean attribution ± standard error" if averaged else "attribution")
    axis.legend(frameon=False, fontsize=8, ncols=n_columns, loc="lower right", bbox_to_anchor=(1, 1))
    return figure_of(axis)


def _bar_lengths(attributions: Tensor, name: str) -> tuple[Array, Array | None]:
    """Return means over the examples and their standard errors; None instead of errors for a single example."""
    values = finite_array(attributions, f"attributions of {name!r}")
    if values.ndim not in (1, 2) or not values.size:
        raise ValueError(f"Attributions of {name!r} of shape {values.shape}: give (D,) or (B, D).")
    values = np.atleast_2d(values)
    errors = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return values.mean(axis=0), errors
