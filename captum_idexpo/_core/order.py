"""Values in order along the last axis, and the rank of each; on a CPU by NumPy, several times faster than torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ascending(values: Tensor) -> Tensor:
    """Sorted along the last axis, without a graph."""
    values = values.detach()
    try:
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    except (RuntimeError, TypeError):  # on an accelerator, or otherwise not for NumPy to read
        return values.sort(dim=-1).values


def descending_ranks(values: Tensor) -> Tensor:
    """How many values come before each when the largest comes first, NaN before all, ties in order of positions.

    Args:
        values: float32 or float64, ``(..., D)``.

    Returns:
        int32, of the values' shape.
    """
    values = values.detach()
    positions = torch.arange(values.shape[-1], device=values.device)
    if values.device.type == "cpu" and values.dtype == torch.float32:
        # A float's bits are in an integer's order, but for negative ones; the position below them leaves no ties.
        # -0.0 equals 0.0, and one NaN another.
        bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32)
        downwards = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        order = ascending((downwards.long() << 32) | positions) & 0xFFFFFFFF
    else:
        order = values.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order, dtype=torch.int32)
    return ranks.scatter_(-1, order, positions.int().expand(order.shape))
