"""What a user passes, read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.errors import NonFiniteError, all_finite


def as_tuple(tensors: Any, name: str) -> tuple[Tensor, ...]:
    """A tensor or a tuple of tensors as a tuple; TypeError for anything else, with the cure for a mapping."""
    formatted: tuple[Tensor, ...] = tensors if isinstance(tensors, tuple) else (tensors,)
    for tensor in formatted:
        if isinstance(tensor, Mapping):
            keys = ", ".join(map(str, tensor))
            raise TypeError(
                f"{name} must be a tensor or a tuple of tensors, given: a mapping of {keys}. Let the loader yield the "
                "tensors that are explained, and wrap the model in a module whose forward method takes these, such "
                f"as\n    def forward(self, {keys}):\n"
                f"        return self.model({', '.join(f'{key}={key}' for key in tensor)})"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or a tuple of tensors, given: {type(tensor).__name__}.")
    return formatted


def check_inputs(inputs: Any, baselines: Any, check_finite: bool) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs and baselines as tuples that fit each other.

    Raises:
        ValueError: an empty batch, tensors of different batch sizes, values that are not finite, a baseline that
            does not fit.
        TypeError: something else than tensors, or for baselines numbers.
    """
    tensors = as_tuple(inputs, "inputs")
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"The input tensors have different batch sizes: {[tuple(t.shape) for t in tensors]}.")
    if sizes == {0}:
        raise ValueError("The batch is empty: there is nothing to score.")
    if baselines is None:
        baselines = (0,) * len(tensors)
    elif not isinstance(baselines, tuple):
        baselines = (baselines,)
    for baseline in baselines:
        if not isinstance(baseline, (Tensor, int, float)):
            raise TypeError(f"baselines must be numbers or tensors, given: {type(baseline).__name__}.")
    if len(baselines) == len(tensors):
        baselines = tuple(map(with_batch_axis, baselines, tensors))
    aligned = align_baselines(baselines, tensors)
    if check_finite:
        require_finite(tensors, "inputs")
    return tensors, aligned


def require_finite(tensors: tuple[Tensor, ...], name: str) -> None:
    """Raises NonFiniteError where a tensor holds NaN or infinity."""
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point() and not all_finite(tensor):
            rows = (~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)).nonzero().flatten().tolist()
            which = f"{name}[{index}]" if len(tensors) > 1 else name
            raise NonFiniteError(f"NaN or infinity in {which}, examples {rows[:5]}{' ...' * (len(rows) > 5)}.")


def align_baselines(baselines: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Baselines that broadcast against their inputs in slices of the batch.

    As in Captum, a tensor whose leading size is the batch's holds one baseline an example; any other broadcasts.

    Raises:
        ValueError: the number of baselines or the shape of one does not fit.
    """
    if len(baselines) != len(inputs):
        raise ValueError(
            f"baselines holds {len(baselines)} values for {len(inputs)} input tensors: give one baseline a tensor."
        )
    return tuple(_align_baseline(baseline, tensor) for baseline, tensor in zip(baselines, inputs, strict=True))


def with_batch_axis(value: Any, tensor: Tensor) -> Any:
    """A mask or baseline that lacks the input's leading axes, with axes of size 1 in their place.

    It then broadcasts whatever the batch's size is; Captum would take ``(n, ...)`` for one row an example where n
    happens to be that size.
    """
    if not isinstance(value, Tensor) or not value.dim() or value.dim() >= tensor.dim():
        return value
    return value.reshape(*[1] * (tensor.dim() - value.dim()), *value.shape)


def _align_baseline(baseline: Any, tensor: Tensor) -> Any:
    if not isinstance(baseline, Tensor):
        return baseline
    aligned = baseline.to(tensor.device)
    if aligned.is_floating_point() and tensor.is_floating_point():
        aligned = aligned.to(tensor.dtype)
    if tensor.dim() and aligned.dim() and len(aligned) == len(tensor) > 1:
        missing = tensor.dim() - aligned.dim()
        aligned = aligned.reshape(len(aligned), *[1] * max(missing, 0), *aligned.shape[1:])
    try:
        fits = torch.broadcast_shapes(aligned.shape, tensor.shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"A baseline of shape {tuple(baseline.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a number, a tensor of the input's shape, or one with a batch axis of size 1."
        )
    return aligned
