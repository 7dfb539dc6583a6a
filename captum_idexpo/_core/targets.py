"""Which output is explained and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor

from captum_idexpo._core.captum import TargetType
from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.rng import drawn_for, source

Outputs = str | Callable[[Tensor, Any], Tensor]
"""What a forward function returns, by name, or the user's score (output, target) -> ``(B,)``."""


def explained_class(target: Any, outputs: Outputs) -> Any:
    """Return a loader's target as the class that is explained; None where the outputs are not those of classes.

    Soft labels are explained by their largest class: rows of fractions ``(B, C)`` that sum to 1, and fractions of class
    1 ``(B,)`` or ``(B, 1)``.

    Raises:
        InputTypeError: a tensor ``(B, L > 1)`` that holds no soft labels.
    """
    if callable(outputs) or (outputs == "raw" and isinstance(target, Tensor) and target.is_floating_point()):
        return None
    if outputs != "raw" and isinstance(target, Tensor) and target.dim() == 2 and target.shape[1] > 1:
        largest = soft_classes(target)
        if largest is not None:
            return largest
        raise InputTypeError(
            f"target of {target.dtype} and shape {tuple(target.shape)} names no class per example: pass "
            "target.argmax(dim=1) for classes that are coded as columns of 0 and 1, or outputs='multilabel' if several "
            "labels of an example can be true."
        )
    labels = class_labels(target)
    if outputs != "raw" and isinstance(labels, Tensor) and labels.is_floating_point():
        return (labels > 0.5).long() if bool(((labels >= 0) & (labels <= 1)).all()) else labels
    return labels


def class_labels(target: Any) -> Any:
    """Return a loader's labels as int64 ``(B,)``: also those of a binary loss, floats 0.0 and 1.0 ``(B, 1)``."""
    if not isinstance(target, Tensor):
        return target
    if target.dim() == 2 and target.shape[1] == 1:
        target = target.squeeze(1)
    zeros_and_ones = target.is_floating_point() and bool(((target == 0) | (target == 1)).all())
    real = target.is_floating_point() or target.is_complex()
    return target.long() if zeros_and_ones or not real else target


def positive_labels(target: object) -> Tensor | None:
    """Return which labels of a multi-hot target ``(B, L)`` are true, as booleans; None for indices of labels.

    Raises:
        InputTypeError: neither; a multi-hot target that holds other values than 0 and 1.
    """
    if isinstance(target, Tensor) and target.dim() == 2:
        if bool(((target == 0) | (target == 1)).all()):
            return target.bool()
        raise InputTypeError(
            f"A multi-hot target holds zeros and ones, given: {float(target.min()):g} to {float(target.max()):g}. Pass "
            "target_transform=lambda target: (target > 0.5).float() for smoothed labels."
        )
    if isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point():
        return None
    if _is_integer(target) or (isinstance(target, list) and all(map(_is_integer, target))):
        return None
    given = f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    raise InputTypeError(
        "outputs='multilabel' needs a multi-hot target (B, L) of zeros and ones, or indices (B,) of the label that is "
        f"explained; given: {given}."
    )


def drawn_label(positive: Tensor, generator: Generator | None) -> Tensor:
    """Return one of the true labels ``(B, L)`` of each example at random, ``(B,)``; any label where none is true."""
    at = source(positive.device, generator)
    n_labels = positive.shape[1]
    noise = drawn_for(len(positive), lambda n: torch.rand(n, n_labels, generator=generator, device=at))
    return noise.to(positive.device).masked_fill(~positive, -1.0).argmax(dim=1)


def soft_classes(target: Tensor) -> Tensor | None:
    """Return the largest class of soft labels, rows of fractions ``(B, C)`` that sum to 1; None for other targets."""
    if target.dim() != 2 or target.shape[1] == 1 or not target.is_floating_point():
        return None
    wide = target.to(torch.promote_types(target.dtype, torch.float32))
    tolerance = 1e-3 + torch.finfo(target.dtype).eps  # of a row whose fractions are rounded
    sums_to_one = bool((wide >= 0).all()) and bool(((wide.sum(dim=1) - 1).abs() < tolerance).all())
    return target.argmax(dim=1) if sums_to_one else None


def target_indices(target: TargetType, n_examples: int, device: torch.device) -> Tensor | None:
    """Return a target in any of Captum's forms as indices ``(B, n)``, one for each axis of an output; None for None.

    Errors: see `captum_target`.
    """
    target = captum_target(target, n_examples)
    if target is None:
        return None
    if isinstance(target, Tensor):
        return target.reshape(-1, 1).to(device).expand(n_examples, 1)
    rows = target if isinstance(target, list) and len(target) == n_examples else [target] * n_examples
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    if len({len(row) for row in rows}) != 1:
        raise InputError("target is a list of tuples of different lengths: give as many numbers for each example.")
    return torch.tensor(rows, dtype=torch.long, device=device)


def captum_target(target: Any, n_examples: int | None = None) -> Any:
    """Return a target of an attribution as Captum reads it: integers of other types as int64, columns as rows.

    Args:
        target: the user's: an integer, a tuple of integers, a tensor, a list of integers or tuples, or None.
        n_examples: rows of the output; None: Captum compares the target with the output itself.

    Raises:
        InputTypeError: booleans, fractions, or objects that are neither numbers nor tensors.
        InputError: a tensor or list that has neither one entry per example nor one for all.
    """
    if target is None:
        return None
    if isinstance(target, Tensor):
        return _target_tensor(target, n_examples)
    if not all(map(_is_integer, _numbers_of(target))):
        given = repr(target) if isinstance(target, (list, tuple)) else type(target).__name__
        cure = "torch.as_tensor(target)" if hasattr(target, "__array__") else "an integer"
        raise InputTypeError(
            f"target must be an integer, a tuple of integers, a tensor, a list or None; given: {given}. Pass {cure}."
        )
    if isinstance(target, list) and n_examples is not None and len(target) != n_examples:
        raise InputError(
            f"target is a list of {len(target)} for {n_examples} examples: give one for each, or one number for all."
        )
    return target if isinstance(target, (list, tuple)) else int(target)


def require_integers(target: Tensor) -> None:
    """Raise InputTypeError for a tensor that names no classes, such as soft labels."""
    if target.dtype != torch.bool and not target.is_floating_point() and not target.is_complex():
        return
    soft = target.dim() == 2 and target.shape[1] > 1
    cure = "target.argmax(dim=1) for soft labels" if soft else "target.long() for labels"
    raise InputTypeError(
        f"target must hold integers, the numbers of outputs; given: {target.dtype} of shape {tuple(target.shape)}. "
        f"Pass {cure}; for a regression no target, or outputs='raw'."
    )


def _target_tensor(target: Tensor, n_examples: int | None) -> Tensor:
    require_integers(target)
    if target.dim() == 2 and target.shape[1] == 1:
        target = target.squeeze(1)
    if n_examples is not None and (target.dim() > 1 or target.numel() not in (1, n_examples)):
        raise InputError(
            f"target of shape {tuple(target.shape)} does not fit {n_examples} examples: give ({n_examples},), or one "
            "number for all."
        )
    return target.long()


def _numbers_of(target: object) -> list[object]:
    """Return the numbers in an integer, a tuple of integers, or a list of either."""
    rows = target if isinstance(target, list) else [target]
    return [number for row in rows for number in (row if isinstance(row, tuple) else (row,))]


def require_tensor(output: object, numbers: bool = False) -> None:
    """Raise InputTypeError if a forward function returns something else than a tensor.

    Args:
        output: what it returned.
        numbers: one of Python's will do.
    """
    if isinstance(output, (Tensor, torch.futures.Future)) or (numbers and isinstance(output, (int, float))):
        return
    given, cure = type(output).__name__, ""
    if isinstance(output, (Mapping, tuple, list)) and len(output):
        first = next(iter(output)) if isinstance(output, Mapping) else 0
        given = f"a {given}" + (f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else "")
        cure = f" Choose the explained part in it: lambda *inputs: model(*inputs)[{first!r}]."
    raise InputTypeError(f"The forward function must return a tensor, given: {given}.{cure}")


def _is_integer(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
