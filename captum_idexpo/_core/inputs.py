"""What a user passes, read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_idexpo._core.errors import InputError, InputTypeError, NonFiniteError, all_finite


def as_tuple(tensors: Any, name: str) -> tuple[Tensor, ...]:
    """Return a tensor or a tuple of tensors as a tuple; TypeError for anything else, with the cure for a mapping."""
    formatted: tuple[Tensor, ...] = tensors if isinstance(tensors, tuple) else (tensors,)
    for tensor in formatted:
        if isinstance(tensor, Mapping):
            keys = ", ".join(map(str, tensor))
            raise InputTypeError(
                f"{name} must be a tensor or a tuple of tensors, given: a mapping of {keys}. Let the loader yield the "
                "tensors that are explained, and wrap the model in a module whose forward method takes these, such "
                f"as\n    def forward(self, {keys}):\n"
                f"        return self.model({', '.join(f'{key}={key}' for key in tensor)})"
            )
        if not isinstance(tensor, Tensor):
            cure = " Leave it out, or give it to the forward function by a lambda." if tensor is None else ""
            raise InputTypeError(
                f"{name} must be a tensor or a tuple of tensors, given: {type(tensor).__name__}.{cure}"
            )
    return formatted


def check_inputs(inputs: Any, baselines: Any, check_finite: bool) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return inputs and baselines as tuples that fit each other.

    Raises:
        InputError: an empty batch, tensors of different batch sizes, a baseline that does not fit.
        NonFiniteError: inputs or baselines hold NaN or infinity.
        TypeError: inputs that are no tensors, baselines that are neither numbers nor tensors.
    """
    tensors = as_tuple(inputs, "inputs")
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1:
        raise InputError(f"The input tensors have different batch sizes: {[tuple(t.shape) for t in tensors]}.")
    if sizes == {0}:
        raise InputError("The batch is empty: there is nothing to score.")
    if baselines is None:
        baselines = (0,) * len(tensors)
    elif not isinstance(baselines, tuple):
        baselines = (baselines,)
    for baseline in baselines:
        if not isinstance(baseline, (Tensor, int, float)):
            raise TypeError(f"baselines must be numbers or tensors, given: {type(baseline).__name__}.")
    aligned = align_baselines(baselines, tensors)
    if check_finite:
        require_finite(tensors, "inputs")
        if not all(map(all_finite, aligned)):
            raise NonFiniteError("NaN or infinity in baselines.")
    return tensors, aligned


def require_finite(tensors: tuple[Tensor, ...], name: str) -> None:
    """Raise NonFiniteError if a tensor holds NaN or infinity."""
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point() and not all_finite(tensor):
            rows = (~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)).nonzero().flatten().tolist()
            which = f"{name}[{index}]" if len(tensors) > 1 else name
            raise NonFiniteError(f"NaN or infinity in {which}, examples {rows[:5]}{' ...' * (len(rows) > 5)}.")


def align_baselines(baselines: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return baselines that broadcast against slices of their inputs.

    A tensor with as many axes as its input has a batch axis of size 1 or B. A tensor with fewer axes has none.

    Raises:
        InputError: the number of baselines, or the shape of one, does not fit.
    """
    if len(baselines) != len(inputs):
        raise InputError(
            f"baselines holds {len(baselines)} values for {len(inputs)} input tensors: give one baseline per tensor."
        )
    return tuple(_align_baseline(baseline, tensor) for baseline, tensor in zip(baselines, inputs, strict=True))


def with_batch_axis(value: Any, tensor: Tensor) -> Any:
    """Return a mask or baseline with axes of size 1 in place of the leading axes that it lacks.

    A tensor with fewer axes than the input has no batch axis, whatever the sizes are. Captum reads ``(n, ...)`` as one
    row per example if n happens to be the batch's size.
    """
    if not isinstance(value, Tensor) or value.dim() >= tensor.dim():
        return value
    return value.reshape(*[1] * (tensor.dim() - value.dim()), *value.shape)


def broadcasts(value: Tensor, tensor: Tensor) -> bool:
    """Return True if a tensor has the axes of another one, each of the same size or of size 1."""
    same_axes = value.dim() == tensor.dim()
    return same_axes and all(size in (1, full) for size, full in zip(value.shape, tensor.shape, strict=True))


def _align_baseline(baseline: Any, tensor: Tensor) -> Any:
    if not isinstance(baseline, Tensor):
        # Integers, such as token ids, stay integers where the baseline is one, too.
        whole = isinstance(baseline, float) and baseline.is_integer() and not tensor.is_floating_point()
        return int(baseline) if whole else baseline
    aligned = baseline.to(tensor.device)
    if aligned.is_floating_point() and (tensor.is_floating_point() or bool((aligned == aligned.round()).all())):
        aligned = aligned.to(tensor.dtype)
    if not aligned.dim():
        return aligned
    aligned = with_batch_axis(aligned, tensor)
    if not broadcasts(aligned, tensor):
        raise InputError(
            f"A baseline of shape {tuple(baseline.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a number, a tensor of the input's shape, or one with a batch axis of size 1 or without one."
        )
    return aligned
