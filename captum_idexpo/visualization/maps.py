"""Attributions of images: conversion for Captum's visualization, and heat maps beside their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_idexpo._core.errors import warn
from captum_idexpo.visualization._figures import figure_of, finite_array, new_figure, require_some, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OVERLAY = 0.7
_MAX_ROUNDING = 1e-3


def to_captum(attributions: Tensor) -> NDArray[np.float32]:
    """Convert attributions or inputs to what `captum.attr.visualization` takes: NumPy arrays with channels last.

    Args:
        attributions: with or without a graph, on any device. An image ``(C, H, W)`` or a batch ``(B, C, H, W)``. Tokens
            ``(T,)``, maps ``(H, W)`` and series ``(C, T)`` keep their axes (series are for
            `visualize_timeseries_attr(..., channels_last=False)`). Three axes are always one image: reshape maps
            ``(B, H, W)`` to ``(B, 1, H, W)`` first.

    Returns:
        float32, ``(H, W, C)`` for an image, ``(B, H, W, C)`` for a batch. There is a warning of maps that are 0
        everywhere, which Captum cannot draw.

    Raises:
        ValueError: values are NaN or infinite, or there is no axis or more than four.
        TypeError: not a tensor. Convert the tensors of a tuple one by one.

    Example:
        >>> import torch
        >>> from captum.attr import visualization
        >>> from captum_idexpo.attr import InputXGradient
        >>> from captum_idexpo.visualization import to_captum
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
        >>> x = torch.rand(1, 3, 8, 8)
        >>> attribution = InputXGradient(net).attribute(x, target=1, create_graph=True)
        >>> attributions, images = to_captum(attribution), to_captum(x)
        >>> attributions.shape
        (1, 8, 8, 3)
        >>> figure, axis = visualization.visualize_image_attr(
        ...     attributions[0], images[0], "blended_heat_map", use_pyplot=False
        ... )
    """
    array = _channels_last(attributions)
    _warn_of_zeros(array if array.ndim == 4 else array[None])
    return array


def _channels_last(attributions: Tensor) -> NDArray[np.float32]:
    """Return the array that `to_captum` returns, without its warning."""
    if isinstance(attributions, Tensor) and not 1 <= attributions.dim() <= 4:
        raise ValueError(
            f"Shape {tuple(attributions.shape)}: give (T,), (H, W), (C, H, W) or (B, C, H, W); of volumes take a slice."
        )
    array = finite_array(attributions, "attributions").astype(np.float32)
    return np.moveaxis(array, -3, -1) if array.ndim > 2 else array


def _warn_of_zeros(arrays: NDArray[np.float32]) -> None:
    empty = int((~arrays.any(axis=tuple(range(1, arrays.ndim)))).sum())
    if empty:
        warn(
            f"{empty} of {len(arrays)} maps or images are 0 everywhere. Captum's visualization cannot scale such a map "
            "and stops with an AssertionError: draw it with captum_idexpo.visualization.draw_heat_map, which shows it "
            "as empty.",
        )


def plot_explanations(
    images: Tensor, attributions: Mapping[str, Tensor], titles: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Plot images and their heat maps: one row per image, one column per model.

    `draw_heat_map` draws the maps in the same colours. Each map has its own scale: colours compare locations within a
    map, not maps with each other.

    Args:
        images: ``(B, C, H, W)`` with C = 1 or 3, in [0, 1].
        attributions: maps ``(B, 1, H, W)`` by model name. For ``(B, C, H, W)`` the sum over the channels is drawn.
        titles: for each name, one line per image.

    Returns:
        The figure.

    Raises:
        ValueError: there are no images or no maps, shapes or titles do not fit, images are outside [0, 1], or values
            are NaN or infinite.

    Example:
        >>> import torch
        >>> from captum_idexpo.visualization import plot_explanations
        >>> figure = plot_explanations(torch.rand(2, 1, 8, 8), {"before": torch.rand(2, 1, 8, 8)})
    """
    require_some(images, "images", "a tensor (1, C, H, W)")
    require_some(attributions, "attributions", '{"before": maps}')
    for name, maps in attributions.items():
        if len(maps) != len(images):
            raise ValueError(f"{len(maps)} maps of {name!r} for {len(images)} images: give one for each.")
        if titles is not None and len(titles.get(name, ())) != len(images):
            raise ValueError(f"{len(titles.get(name, ()))} titles of {name!r} for {len(images)} images.")
    signed = any(bool((_one_channel(map) < 0).any()) for maps in attributions.values() for map in maps)
    n_columns = 1 + len(attributions)
    figure = new_figure(len(images), n_columns, (1.7 * n_columns + 0.4, 1.7 * len(images) + 0.2))
    grid = [figure.axes[row * n_columns : (row + 1) * n_columns] for row in range(len(images))]
    for row, (axes, image) in enumerate(zip(grid, images, strict=True)):
        draw_image(axes[0], image, "image" if row == 0 else "")
        for axis, (name, maps) in zip(axes[1:], attributions.items(), strict=True):
            lines = [wrapped(name)] if row == 0 else []
            lines += [titles[name][row]] if titles else []
            draw_heat_map(axis, image, maps[row], "\n".join(lines), signed=signed)
    _add_colorbar(figure, signed)
    return figure


def draw_image(axis: Axes, image: Tensor, title: str = "") -> None:
    """Draw an image ``(C, H, W)`` in [0, 1] without axes."""
    axis.imshow(_image(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def draw_heat_map(axis: Axes, image: Tensor, attribution: Tensor, title: str = "", signed: bool | None = None) -> None:
    """Draw a map ``(1, H, W)`` over its image ``(C, H, W)``, with Captum's `visualize_image_attr`.

    The colours of a map without negative values run from black (0) to yellow. Those of a map with negative values run
    from dark blue (against the class) over grey (0) to yellow (for it). Higher values are brighter, so the order is
    visible in grey and to colour-blind readers, except where the image shines through.

    A map with the same value everywhere says nothing about places. It is drawn in the colour of 0, with the words
    "empty map" or "constant map".

    Args:
        axis: axis to draw on.
        image: in [0, 1].
        attribution: ``(1, H, W)`` or ``(H, W)``. For ``(C, H, W)`` the sum over the channels is drawn.
        title: a small line above the map.
        signed: True for the colours of maps with negative values; None: True if this map has negative values.

    Raises:
        ValueError: the map has another size, the image is outside [0, 1], or values are NaN or infinite.
    """
    from captum.attr import visualization

    pixels, values = _image(image), _one_channel(attribution)
    if values.shape != pixels.shape[:2]:
        raise ValueError(
            f"A map of {values.shape} pixels on an image of {pixels.shape[:2]}: bring a layer's map to the image's "
            f"size, captum.attr.LayerAttribution.interpolate(attribution, {pixels.shape[:2]})."
        )
    signed = bool(values.min() < 0) if signed is None else signed
    values = values if signed else values.clip(0)
    if values.min() == values.max():  # Captum cannot scale a map of zeros, and would draw a constant one as evidence
        _draw_empty(axis, image, title, signed, "constant map" if values.any() else "empty map")
        return
    visualization.visualize_image_attr(
        values / abs(values).max(),
        pixels,
        method="blended_heat_map",
        sign="all" if signed else "positive",
        cmap=_colormap(signed),
        plt_fig_axis=(figure_of(axis), axis),
        title=None,
        use_pyplot=False,
        alpha_overlay=_OVERLAY,
    )
    axis.set_title(title, fontsize=8)


def _draw_empty(axis: Axes, image: Tensor, title: str, signed: bool, name: str) -> None:
    """Draw an image under the colour of 0, with the name of what there is to see."""
    draw_image(axis, image, title)
    zeros = np.zeros(image.shape[-2:])
    axis.imshow(zeros, cmap=_colormap(signed), vmin=-1 if signed else 0, vmax=1, alpha=_OVERLAY)
    axis.text(0.5, 0.5, name, transform=axis.transAxes, ha="center", va="center", color="white", fontsize=8)


def _colormap(signed: bool) -> str:
    return "cividis" if signed else "inferno"


def _add_colorbar(figure: Figure, signed: bool) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-1 if signed else 0, 1), _colormap(signed))
    bar = figure.colorbar(scale, ax=figure.axes, shrink=0.8, aspect=30)
    ticks = {-1: "against", 0: "0", 1: "for"} if signed else {0: "0", 1: "most"}
    bar.set_ticks(list(ticks), labels=list(ticks.values()), fontsize=8)


def _image(image: Tensor) -> NDArray[np.float32]:
    """Return an image as an array ``(H, W, C)`` in [0, 1]."""
    pixels = _channels_last(image)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"An image is (C, H, W) with 1 or 3 channels; given: {tuple(image.shape)}.")
    if pixels.min() < -_MAX_ROUNDING or pixels.max() > 1 + _MAX_ROUNDING:
        raise ValueError(
            f"The image's values lie in [{pixels.min():.3g}, {pixels.max():.3g}], not in [0, 1]: undo its "
            "normalisation (image * std + mean), or divide bytes by 255."
        )
    return pixels.clip(0, 1)


def _one_channel(attribution: Tensor) -> NDArray[np.float32]:
    """Return a map ``(H, W)``, the sum over the channels, as Captum draws it."""
    values = _channels_last(attribution)
    if values.ndim not in (2, 3):
        raise ValueError(f"A map is (H, W) or (C, H, W); given: {tuple(attribution.shape)}.")
    return values.sum(axis=2) if values.ndim == 3 else values
