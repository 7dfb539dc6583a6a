"""Where the channels of a layer are: functions that bring a layer's tensor to ``(B, C, h, w)`` or ``(B, C, T)``.

Each can be passed as ``reshape_transform`` of `LayerGradCam`, of `GuidedGradCam` and of the regularizers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from captum_idexpo._core.errors import InputError

ReshapeTransform = Callable[[Tensor], Tensor]
"""A layer's tensor -> the same values as ``(B, C, h, w)`` or ``(B, C, T)``."""


def tokens_to_map(height: int, width: int, n_prefix: int = 1) -> ReshapeTransform:
    """Return a function that brings the tokens of a vision transformer, ``(B, N, D)``, to a map ``(B, D, h, w)``.

    Args:
        height: number of patches in a column of the image.
        width: number of patches in a row of the image.
        n_prefix: tokens before the patches, such as a class token; they have no place in the map and are left out.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import tokens_to_map
        >>> tokens_to_map(14, 14)(torch.zeros(2, 197, 384)).shape
        torch.Size([2, 384, 14, 14])
    """

    def transform(tokens: Tensor) -> Tensor:
        if tokens.dim() != 3 or tokens.shape[1] != n_prefix + height * width:
            raise InputError(
                f"tokens_to_map({height}, {width}, n_prefix={n_prefix}) needs tokens (B, "
                f"{n_prefix + height * width}, D), given: {tuple(tokens.shape)}. Give the number of patches in a "
                "column and in a row, and the number of tokens before them."
            )
        patches: Tensor = tokens[:, n_prefix:].unflatten(1, (height, width))
        return patches.movedim(-1, 1)

    return transform


def channels_first(tensor: Tensor) -> Tensor:
    """Return a channels-last tensor ``(B, h, w, C)`` as ``(B, C, h, w)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import channels_first
        >>> channels_first(torch.zeros(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """
    if tensor.dim() < 4:
        raise InputError(f"channels_first needs a tensor (B, h, w, C), given: {tuple(tensor.shape)}.")
    return tensor.movedim(-1, 1)


def steps_first(tensor: Tensor) -> Tensor:
    """Return a tensor whose steps come before its channels, ``(B, T, D)``, as ``(B, D, T)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import steps_first
        >>> steps_first(torch.zeros(2, 50, 16)).shape
        torch.Size([2, 16, 50])
    """
    if tensor.dim() != 3:
        raise InputError(f"steps_first needs a tensor (B, T, D), given: {tuple(tensor.shape)}.")
    return tensor.movedim(-1, 1)


def reshaped(tensor: Tensor, transform: ReshapeTransform) -> Tensor:
    """Return a transformed tensor; InputError if that is no tensor ``(B, C, ...)`` with the same number of rows."""
    result = transform(tensor)
    if isinstance(result, Tensor) and result.dim() >= 3 and len(result) == len(tensor):
        return result
    given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    raise InputError(
        f"reshape_transform must return a tensor (B, C, h, w) or (B, C, T) with {len(tensor)} rows for the layer's "
        f"{tuple(tensor.shape)}; it returned: {given}."
    )
