"""Annotations: masks that say where evidence must be, or must not be."""

from __future__ import annotations

import torch
from torch import Tensor


def check_annotations(annotations: object, tensors: tuple[Tensor, ...], unknown: str) -> tuple[Tensor, ...]:
    """Return annotations that broadcast against their inputs, in the inputs' dtype.

    Raises:
        ValueError: they are missing, of another number or shape than the inputs, or lie outside [0, 1].
    """
    if annotations is None:
        raise ValueError(
            "annotations are missing: call regularizer(inputs, target, annotations), or let the loader yield (inputs, "
            f"target, annotations); for an example of which nothing is known {unknown}."
        )
    masks = annotations if isinstance(annotations, (tuple, list)) else (annotations,)
    if len(masks) != len(tensors):
        raise ValueError(f"There are {len(masks)} annotations for {len(tensors)} input tensors: give one for each.")
    return tuple(_fitting(mask, tensor) for mask, tensor in zip(masks, tensors, strict=True))


def _fitting(mask: object, tensor: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"annotations must be tensors, given: {type(mask).__name__}.")
    fitting = mask.to(tensor.device, tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype())
    if fitting.dim() == tensor.dim() - 1 and tensor.dim() == 4:
        fitting = fitting[:, None]
    try:
        fits = fitting.dim() == tensor.dim() and torch.broadcast_shapes(fitting.shape, tensor.shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"annotations of shape {tuple(mask.shape)} do not fit inputs of shape {tuple(tensor.shape)}: give one mask "
            "per example, of the input's shape or with axes of size 1; (B, H, W) also fits images."
        )
    if not bool(((fitting >= 0) & (fitting <= 1)).all()):
        raise ValueError(
            "annotations must lie between 0 and 1 (1 where they mark something), given: "
            f"{float(fitting.min()):g} to {float(fitting.max()):g}."
        )
    return fitting.expand(len(tensor), *fitting.shape[1:])


def summed_like(map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return a map summed along the axes that its annotation does not tell apart, and the annotation in its shape.

    Where the map has one value for several positions of the annotation, as a layer's map has for the channels of a
    pixel, the annotation is averaged.
    """
    for axis in range(1, map.dim()):
        if mask.shape[axis] == 1 < map.shape[axis]:
            map = map.sum(axis, keepdim=True)
    return map, averaged_like(mask, map)


def averaged_like(mask: Tensor, map: Tensor) -> Tensor:
    """Return an annotation, averaged along the axes along which the map has one value for several positions."""
    for axis in range(1, min(map.dim(), mask.dim())):
        if map.shape[axis] == 1 < mask.shape[axis]:
            mask = mask.mean(axis, keepdim=True)
    return mask
