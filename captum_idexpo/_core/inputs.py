"""What a user passes, read once: inputs, baselines, counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from captum_idexpo._core.captum import BaselineType
from captum_idexpo._core.errors import InputError, InputTypeError, NonFiniteError, all_finite

Tensors = Tensor | tuple[Tensor, ...]
"""One tensor, or one for each input of the model."""
Baseline = Tensor | int | float
Baselines = BaselineType | Callable[[Any], BaselineType]
"""What a metric or a regularizer takes: numbers, tensors, or a callable of the inputs that returns them."""
Value = TypeVar("Value")


def as_tuple(tensors: object, name: str) -> tuple[Tensor, ...]:
    """Return a tensor or a tuple of tensors as a tuple.

    Raises:
        InputTypeError: anything else; for a mapping the error shows how to wrap the model.
    """
    formatted: tuple[Any, ...] = tensors if isinstance(tensors, tuple) else (tensors,)
    for tensor in formatted:
        if isinstance(tensor, Mapping):
            keys = ", ".join(map(str, tensor))
            names = ", ".join(repr(str(key)) for key in tensor)
            raise InputTypeError(
                f"{name} must be a tensor or a tuple of tensors, given: a mapping of {keys}. Let the loader yield the "
                f"tensors that are explained, and wrap the model: captum_idexpo.KeywordModel(model, {names}), or a "
                f"module with a forward method such as\n    def forward(self, {keys}):\n"
                f"        return self.model({', '.join(f'{key}={key}' for key in tensor)})"
            )
        if not isinstance(tensor, Tensor):
            cure = " Leave it out, or give it to the forward function by a lambda." if tensor is None else ""
            raise InputTypeError(
                f"{name} must be a tensor or a tuple of tensors, given: {type(tensor).__name__}.{cure}"
            )
    return formatted


def as_batch(inputs: object) -> tuple[Tensor, ...]:
    """Return the tensors ``(B, ...)`` of a batch as a tuple.

    Raises:
        InputTypeError: inputs that are no tensors.
        InputError: an empty batch, or tensors of different batch sizes.
    """
    tensors = as_tuple(inputs, "inputs")
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) > 1:
        raise InputError(f"The input tensors have different batch sizes: {[tuple(t.shape) for t in tensors]}.")
    if sizes in ({0}, set()):
        raise InputError("The batch is empty: give at least one example.")
    return tensors


def as_baselines(baselines: object, tensors: tuple[Tensor, ...]) -> tuple[Baseline, ...]:
    """Return baselines that broadcast against slices of their inputs, one per tensor; None is zero.

    A tensor with as many axes as its input has a batch axis of size 1 or B. A tensor with fewer axes has none.

    Raises:
        InputTypeError: a baseline that is neither a number nor a tensor.
        InputError: the number of baselines, or the shape of one, does not fit.
    """
    if baselines is None:
        baselines = tuple(False if tensor.dtype == torch.bool else 0 for tensor in tensors)
    elif not isinstance(baselines, tuple):
        baselines = (baselines,)
    for baseline in baselines:
        if not isinstance(baseline, (Tensor, int, float)):
            mean = isinstance(baseline, str)
            cure = " For the mean pass captum_idexpo.baselines.mean_inputs(train_loader)." if mean else ""
            raise InputTypeError(f"baselines must be numbers or tensors, given: {type(baseline).__name__}.{cure}")
    if len(baselines) != len(tensors):
        raise InputError(
            f"baselines holds {len(baselines)} values for {len(tensors)} input tensors: give one baseline per tensor."
        )
    return tuple(_align_baseline(baseline, tensor) for baseline, tensor in zip(baselines, tensors, strict=True))


def check_inputs(
    inputs: object, baselines: object, check_finite: bool
) -> tuple[tuple[Tensor, ...], tuple[Baseline, ...]]:
    """Return inputs and baselines as tuples that fit each other; a callable is called with the inputs.

    Raises:
        NonFiniteError: inputs or baselines hold NaN or infinity.
        InputError, InputTypeError: see `as_batch` and `as_baselines`.
    """
    tensors = as_batch(inputs)
    aligned = as_baselines(baselines(inputs) if callable(baselines) else baselines, tensors)
    if check_finite:
        require_finite(tensors, "inputs")
        if not all(map(all_finite, aligned)):
            raise NonFiniteError("NaN or infinity in baselines.")
    return tensors, aligned


def require_finite(tensors: tuple[Tensor, ...], name: str, hint: str = "") -> None:
    """Raise NonFiniteError, whose message ends with the hint, if a tensor holds NaN or infinity."""
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point() and not all_finite(tensor):
            rows = (~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)).nonzero().flatten().tolist()
            which = f"{name}[{index}]" if len(tensors) > 1 else name
            raise NonFiniteError(f"NaN or infinity in {which}, examples {rows[:5]}{' ...' * (len(rows) > 5)}.{hint}")


def require_real(tensors: tuple[Tensor, ...]) -> None:
    """Raise TypeError for token ids and other integers, which have no gradient and take no noise."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(
                f"inputs of {tensor.dtype} have no gradient, and noise cannot be added to them: pass embeddings to a "
                "forward function that takes them, or explain an embedding layer "
                "(explainer=LayerIntegratedGradients(model, layer))."
            )


def check_count(name: str, value: object, or_none: str = "") -> int:
    """Return a positive integer; InputError for anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be {or_none}a positive integer, given: {value!r}.")
    return int(value)


def check_count_or_zero(name: str, value: object) -> int:
    """Return a positive integer or 0; InputError for anything else."""
    if isinstance(value, Integral) and not isinstance(value, bool) and value == 0:
        return 0
    return check_count(name, value, "0 or ")


def check_optional_count(name: str, value: object) -> int | None:
    """Return a positive integer or None; InputError for anything else."""
    return None if value is None else check_count(name, value, "None or ")


def check_not_negative(name: str, value: object) -> float:
    """Return a finite number that is zero or positive; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number and not negative, given: {value}.")
    return float(value)


def with_batch_axis(value: Value, tensor: Tensor) -> Value:
    """Return a mask or baseline with axes of size 1 in place of the leading axes that it lacks.

    A tensor with fewer axes than the input has no batch axis, whatever the sizes are. Captum reads ``(n, ...)`` as one
    row per example if n happens to be the batch's size.
    """
    if not isinstance(value, Tensor) or value.dim() >= tensor.dim():
        return value
    return cast(Value, value.reshape(*[1] * (tensor.dim() - value.dim()), *value.shape))


def broadcasts(value: Tensor, tensor: Tensor) -> bool:
    """Return True if a tensor has the axes of another one, each of the same size or of size 1."""
    same_axes = value.dim() == tensor.dim()
    return same_axes and all(size in (1, full) for size, full in zip(value.shape, tensor.shape, strict=True))


def _align_baseline(baseline: Baseline, tensor: Tensor) -> Baseline:
    if not isinstance(baseline, Tensor):
        # Integers, such as token ids, stay integers where the baseline is one, too.
        whole = isinstance(baseline, float) and baseline.is_integer() and not tensor.is_floating_point()
        return int(baseline) if whole else baseline
    given = baseline.to(tensor.device)
    if given.is_floating_point() and (tensor.is_floating_point() or bool((given == given.round()).all())):
        given = given.to(tensor.dtype)
    if not given.dim():
        return given
    aligned = with_batch_axis(given, tensor)
    if not broadcasts(aligned, tensor):
        raise InputError(
            f"A baseline of shape {tuple(baseline.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a number, a tensor of the input's shape, or one with a batch axis of size 1 or without one."
        )
    return aligned
