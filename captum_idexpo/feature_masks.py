"""Feature masks for a batch of images: grids and superpixels, in the form that Captum's attributions take.

A mask numbers the superpixels of each image from 0. All channels of a pixel belong to the same superpixel. Each
function, with its options bound, can be the ``feature_mask`` of a regularizer:
``feature_mask=functools.partial(slic, n_segments=50)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.errors import NonFiniteError, all_finite


def grid(inputs: Tensor, cell_size: int | tuple[int, int]) -> Tensor:
    """Return a feature mask of rectangular cells, the same for every image.

    Args:
        inputs: images ``(B, C, H, W)``; only their size and device matter.
        cell_size: height and width of a cell in pixels; cells at the lower and right edge may be smaller.

    Returns:
        ``(1, 1, H, W)``, int64.

    Raises:
        ValueError: the inputs are not images, or a cell size is below 1.

    Example:
        >>> import torch
        >>> from captum_idexpo.feature_masks import grid
        >>> grid(torch.zeros(8, 3, 4, 4), 2)[0, 0]
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [2, 2, 3, 3],
                [2, 2, 3, 3]])
    """
    height, width = _size(inputs)
    sides = (cell_size, cell_size) if isinstance(cell_size, int) else cell_size
    if not isinstance(sides, tuple) or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"cell_size must be a number of pixels or a pair (height, width), given: {cell_size!r}.")
    cell_height, cell_width = sides
    rows = torch.arange(height, device=inputs.device) // cell_height
    columns = torch.arange(width, device=inputs.device) // cell_width
    return (rows[:, None] * (columns[-1] + 1) + columns)[None, None]


def slic(inputs: Tensor, n_segments: int = 50, **options: Any) -> Tensor:
    """Compute SLIC superpixels (Achanta et al. 2012) of about equal size, with `skimage.segmentation.slic`.

    Args:
        inputs: images ``(B, C, H, W)`` in any units; each is rescaled to [0, 1] first.
        n_segments: approximate number of superpixels per image.
        options: further keyword arguments of scikit-image's function, such as ``compactness`` or ``sigma``.

    Returns:
        ``(B, 1, H, W)``, int64, on the inputs' device.

    Raises:
        ImportError: scikit-image is not installed (extra ``image``).
        ValueError: the inputs are not images, or hold NaN or infinity.

    Example:
        >>> import torch
        >>> from captum_idexpo.feature_masks import slic
        >>> slic(torch.rand(2, 3, 16, 16), n_segments=4).shape
        torch.Size([2, 1, 16, 16])
    """
    return _superpixels("slic", inputs, n_segments=n_segments, start_label=0, **options)


def felzenszwalb(inputs: Tensor, scale: float = 100, **options: Any) -> Tensor:
    """Compute the superpixels of Felzenszwalb and Huttenlocher 2004, with `skimage.segmentation.felzenszwalb`.

    Args:
        inputs: images ``(B, C, H, W)`` in any units; each is rescaled to [0, 1] first.
        scale: a higher scale gives larger superpixels.
        options: further keyword arguments of scikit-image's function, such as ``sigma`` or ``min_size``.

    Returns:
        ``(B, 1, H, W)``, int64, on the inputs' device.

    Raises:
        ImportError: scikit-image is not installed (extra ``image``).
        ValueError: the inputs are not images, or hold NaN or infinity.

    Example:
        >>> import torch
        >>> from captum_idexpo.feature_masks import felzenszwalb
        >>> felzenszwalb(torch.rand(2, 1, 16, 16), scale=10).shape
        torch.Size([2, 1, 16, 16])
    """
    return _superpixels("felzenszwalb", inputs, scale=scale, **options)


def quickshift(inputs: Tensor, **options: Any) -> Tensor:
    """Compute quick shift superpixels (Vedaldi, Soatto 2008), with `skimage.segmentation.quickshift`.

    LIME uses these superpixels for images.

    Args:
        inputs: images ``(B, C, H, W)`` in any units; each is rescaled to [0, 1] first. Colour images are compared in
            Lab space.
        options: keyword arguments of scikit-image's function, such as ``kernel_size``, ``max_dist`` or ``ratio``.

    Returns:
        ``(B, 1, H, W)``, int64, on the inputs' device.

    Raises:
        ImportError: scikit-image is not installed (extra ``image``).
        ValueError: the inputs are not images, or hold NaN or infinity.

    Example:
        >>> import torch
        >>> from captum_idexpo.feature_masks import quickshift
        >>> quickshift(torch.rand(2, 3, 16, 16), kernel_size=2).shape
        torch.Size([2, 1, 16, 16])
    """
    _size(inputs)
    convert2lab = options.pop("convert2lab", inputs.shape[1] == 3)
    return _superpixels("quickshift", inputs, convert2lab=convert2lab, **options)


def _superpixels(name: str, inputs: Tensor, **options: Any) -> Tensor:
    segment = _segmentation(name)
    _size(inputs)
    if not all_finite(inputs):
        raise NonFiniteError(f"captum_idexpo.feature_masks.{name}: the images hold NaN or infinity.")
    images = _rescaled(inputs.detach().cpu().double()).movedim(1, -1).numpy()
    masks = [torch.as_tensor(segment(image, channel_axis=-1, **options)).long() for image in images]
    return torch.stack(masks)[:, None].to(inputs.device)


def _segmentation(name: str) -> Callable[..., Any]:
    try:
        from skimage import segmentation
    except ImportError as error:
        raise ImportError(
            f"captum_idexpo.feature_masks.{name} needs scikit-image: `pip install 'captum-idexpo[image]'`."
        ) from error
    function: Callable[..., Any] = getattr(segmentation, name)
    return function


def _rescaled(images: Tensor) -> Tensor:
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / torch.where(high > low, high - low, torch.ones_like(high))


def _size(inputs: Tensor) -> tuple[int, int]:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.numel():
        given = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"Superpixels are made for images (B, C, H, W), given: {given}.")
    return inputs.shape[2], inputs.shape[3]
