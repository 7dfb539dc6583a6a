"""Attributions of images: as Captum's visualization takes them, and as heat maps beside their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_idexpo.visualization._figures import figure_of, finite_array, new_figure, require_some, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OVERLAY = 0.7
_MAX_ROUNDING = 1e-3


def to_captum(attributions: Tensor) -> NDArray[np.float32]:
    """Attributions, or inputs, as `captum.attr.visualization` takes them: NumPy on the CPU, an image's channels last.

    Args:
        attributions: with a graph or without, on any device. Images ``(C, H, W)`` or a batch ``(B, C, H, W)``; what has
            no channels to move stays as it is: tokens ``(T,)``, maps ``(H, W)``, series ``(C, T)`` (for
            `visualize_timeseries_attr(..., channels_last=False)`). Maps ``(B, H, W)`` have to become ``(B, 1, H, W)``
            first: three axes are one image.

    Returns:
        float32, ``(H, W, C)`` for images, ``(B, H, W, C)`` for batches of them.

    Raises:
        ValueError: NaN or infinity, no axis or more than four.
        TypeError: not a tensor, a tuple of them for example: take one after the other.

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
    if isinstance(attributions, Tensor) and not 1 <= attributions.dim() <= 4:
        raise ValueError(
            f"Shape {tuple(attributions.shape)}: give (T,), (H, W), (C, H, W) or (B, C, H, W); of volumes take a slice."
        )
    array = finite_array(attributions, "attributions").astype(np.float32)
    return np.moveaxis(array, -3, -1) if array.ndim > 2 else array


def plot_explanations(
    images: Tensor, attributions: Mapping[str, Tensor], titles: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Images and, in a column a model, their heat maps, drawn by `draw_heat_map` in the same colours.

    Each map is scaled by itself: colours compare locations within a map, not maps with each other.

    Args:
        images: ``(B, C, H, W)`` with C = 1 or 3, in [0, 1].
        attributions: maps ``(B, 1, H, W)`` by name; of several channels ``(B, C, H, W)`` the sum is drawn.
        titles: for each name one line for each image.

    Returns:
        The figure, a row an image.

    Raises:
        ValueError: no images or no maps, shapes or titles that do not fit, images outside [0, 1], NaN or infinity.

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
    """An image ``(C, H, W)`` in [0, 1] without its axes."""
    axis.imshow(_image(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def draw_heat_map(axis: Axes, image: Tensor, attribution: Tensor, title: str = "", signed: bool | None = None) -> None:
    """A map ``(1, H, W)`` over its image ``(C, H, W)``, by Captum's `visualize_image_attr`.

    A map without negative values runs from black (0) to yellow, one with both signs from dark blue (against the class)
    over grey (0) to yellow (for it). Both get brighter with the value, so that the colour-blind and a print in grey
    keep the order, as far as the image does not shine through.

    Args:
        axis: where it is drawn.
        image: in [0, 1].
        attribution: of the image's height and width; ``(H, W)`` will do, and of several channels the sum is drawn.
        title: a small line above.
        signed: the colours of maps with both signs; None: as this map asks for.

    Raises:
        ValueError: a map of another size, an image outside [0, 1], NaN or infinity.
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
    largest = abs(values).max()
    if not largest:  # which Captum cannot scale
        draw_image(axis, image, title)
        axis.imshow(values, cmap=_colormap(signed), vmin=-1 if signed else 0, vmax=1, alpha=_OVERLAY)
        return
    visualization.visualize_image_attr(
        values / largest,
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
    """An image ``(H, W, C)`` in [0, 1]."""
    pixels = to_captum(image)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"An image is (C, H, W) with 1 or 3 channels; given: {tuple(image.shape)}.")
    if pixels.min() < -_MAX_ROUNDING or pixels.max() > 1 + _MAX_ROUNDING:
        raise ValueError(
            f"The image's values lie in [{pixels.min():.3g}, {pixels.max():.3g}], not in [0, 1]: undo its "
            "normalisation (image * std + mean), or divide bytes by 255."
        )
    return pixels.clip(0, 1)


def _one_channel(attribution: Tensor) -> NDArray[np.float32]:
    """A map ``(H, W)``, the sum over the channels, as Captum draws it."""
    values = to_captum(attribution)
    if values.ndim not in (2, 3):
        raise ValueError(f"A map is (H, W) or (C, H, W); given: {tuple(attribution.shape)}.")
    return values.sum(axis=2) if values.ndim == 3 else values
