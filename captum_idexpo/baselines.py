"""Baselines: what masked features are set to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from captum_idexpo._core.batch import unpacked
from captum_idexpo._core.inputs import Tensors, as_tuple


def mean_inputs(loader: Iterable[Any]) -> Tensors:
    """Return the mean of a loader's inputs, as baselines: for each tensor ``(1, C, 1, ...)``, or ``(1, D)`` for rows.

    Raises:
        ValueError: the loader yields no batch.
        TypeError: its inputs are neither tensors nor tuples of them.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import mean_inputs
        >>> mean_inputs([(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1]))])
        tensor([[2., 4.]])
    """
    sums: list[Tensor] = []
    n_examples, is_tuple = 0, False
    for batch in loader:
        inputs = unpacked(batch, None).inputs
        is_tuple = isinstance(inputs, (tuple, list))
        tensors = as_tuple(tuple(inputs) if is_tuple else inputs, "inputs")
        channels = [_channel_means(tensor.double()) for tensor in tensors]
        totals = [channel.sum(dim=0, keepdim=True) for channel in channels]
        sums = [a + b for a, b in zip(sums, totals, strict=True)] if sums else totals
        n_examples += len(tensors[0])
    if not n_examples:
        raise ValueError("The loader yielded no batch to take the mean of.")
    baselines = tuple((total / n_examples).to(t.dtype) for total, t in zip(sums, tensors, strict=True))
    return baselines if is_tuple else baselines[0]


def _channel_means(tensor: Tensor) -> Tensor:
    """Return means over all axes behind the first two."""
    return tensor.mean(dim=tuple(range(2, tensor.dim())), keepdim=True) if tensor.dim() > 2 else tensor
