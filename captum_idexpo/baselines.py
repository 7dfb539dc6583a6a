"""Baselines: what masked features are set to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor

from captum_idexpo._core.batch import Unpack, unpacked
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.inputs import Tensors, as_tuple

Axes = tuple[int, ...] | None


def mean_inputs(
    loader: Iterable[Any], *, axes: Axes | tuple[Axes, ...] = None, unpack: Unpack | None = None
) -> Tensors:
    """Return the mean of a loader's inputs, as baselines.

    Args:
        loader: yields (inputs, target), with annotations third, or `captum_idexpo.Batch`.
        axes: axes that the mean is taken over, 0 (the examples) among them; for several tensors one tuple, or None, for
            each. None: for rows ``(B, D)`` the examples, for images and volumes ``(B, C, h, w)`` the examples and the
            positions. Of three axes nothing says which one has the channels: pass ``(0, 2)`` for series ``(B, C, T)``
            and ``(0, 1)`` for ``(B, T, F)``.
        unpack: a function that returns the `captum_idexpo.Batch` of what the loader yields, as for the trainer.

    Returns:
        For each tensor its mean, with axes of size 1 in place of those that the mean is taken over: ``(1, D)`` for
        rows, ``(1, C, 1, 1)`` for images.

    Raises:
        ValueError: the loader yields no batch; inputs of three axes without ``axes``; axes that the inputs do not have.
        TypeError: the inputs are neither tensors nor tuples of them.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import mean_inputs
        >>> mean_inputs([(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1]))])
        tensor([[2., 4.]])
    """
    sums: list[Tensor] = []
    n_examples, is_tuple = 0, False
    for batch in loader:
        inputs = unpacked(batch, unpack).inputs
        is_tuple = isinstance(inputs, tuple)
        tensors = as_tuple(inputs, "inputs")
        of_each = _axes_of_each(axes, len(tensors))
        means = [_means_per_example(tensor.double(), own) for tensor, own in zip(tensors, of_each, strict=True)]
        totals = [mean.sum(dim=0, keepdim=True) for mean in means]
        sums = [a + b for a, b in zip(sums, totals, strict=True)] if sums else totals
        n_examples += len(tensors[0])
    if not n_examples:
        raise ValueError("The loader yielded no batch to take the mean of.")
    baselines = tuple((total / n_examples).to(t.dtype) for total, t in zip(sums, tensors, strict=True))
    return baselines if is_tuple else baselines[0]


def _axes_of_each(axes: Axes | tuple[Axes, ...], n_tensors: int) -> tuple[Axes, ...]:
    if axes is None:
        return (None,) * n_tensors
    if isinstance(axes, int):
        raise InputError(f"axes must be a tuple, given: {axes}. Example: axes=(0, {axes}).")
    flat = all(isinstance(axis, int) for axis in axes)
    if n_tensors == 1 and flat:
        return (cast(Axes, axes),)
    if flat or len(axes) != n_tensors:
        raise InputError(f"axes={axes} for {n_tensors} input tensors: give one tuple of axes, or None, for each.")
    return cast(tuple[Axes, ...], axes)


def _means_per_example(tensor: Tensor, axes: Axes) -> Tensor:
    if axes is None:
        if tensor.dim() == 3 and 1 not in tensor.shape[1:]:
            raise InputError(
                f"The axes of inputs of shape {tuple(tensor.shape)} cannot be told apart, so their mean may mix unlike "
                "columns. Say over which axes it is taken: mean_inputs(loader, axes=(0, 1)) for (B, T, F), axes=(0, 2) "
                "for (B, C, T); pass the result as baselines."
            )
        axes = (0, *range(2, tensor.dim())) if tensor.dim() != 3 or tensor.shape[1] == 1 else (0, 1)
    if 0 not in axes or not all(0 <= axis < tensor.dim() for axis in axes):
        raise InputError(
            f"axes must be those of the inputs {tuple(tensor.shape)} that the mean is taken over, 0 among them; given: "
            f"{axes}."
        )
    others = tuple(axis for axis in axes if axis)
    return tensor.mean(dim=others, keepdim=True) if others else tensor
