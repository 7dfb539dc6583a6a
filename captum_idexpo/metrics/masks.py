r"""Masks of the locations that step s of insertion or deletion selects: hard masks and differentiable soft masks.

Paper: ID-ExpO (arXiv 2310.12553), eq. (1)-(4) for the hard masks, eq. (7)-(8) for the soft ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = (torch.float32, torch.float64)
"""Dtypes that represent every rank exactly: float32 up to 2^24 locations, an image of 4096 x 4096."""


_ROUNDING = 16
"""Differences up to this many machine epsilons (relative) count as rounding."""


class HardMasks:
    """Masks of the s locations with the highest attributions: ``masks(masks.thresholds(steps))``.

    Of equal attributions the earlier position comes first.

    Args:
        values: attributions ``(B, D)``.
        present: ``(B, D)``, False where an example does not have the location; None: it has all.
        dtype: dtype of the masks if it is float32 or float64; otherwise the masks are int32.
    """

    def __init__(self, values: Tensor, present: Tensor | None = None, dtype: torch.dtype = torch.int32) -> None:
        self.values = _in_single_or_double(values).detach()
        self._present, self._dtype = present, dtype
        ranks = _descending_ranks(_without_absent(self.values, present))
        self._rank = ranks.to(dtype) if dtype in _EXACT else ranks

    def shuffled(self, noise: Tensor) -> HardMasks:
        """Return masks of the same locations in another order, that of the noise ``(B, D)``."""
        return HardMasks(noise, self._present, self._dtype)

    def thresholds(self, steps: Tensor) -> Tensor:
        """Return the rank of the first location left out, ``(k, B, 1)``, for numbers of locations ``(k, B)``."""
        return steps[..., None].to(self._rank.dtype)

    def __call__(
        self,
        thresholds: Tensor,
        examples: slice = slice(None),
        values: Tensor | None = None,
        *,
        complement: bool = False,
    ) -> Tensor:
        """Return masks ``(k, b, D)`` of zeros and ones for thresholds ``(k, b, 1)`` of the given examples.

        ``complement`` selects all other locations. ``values`` is not used.
        """
        _check_thresholds(thresholds)
        # The comparison writes masks of the ranks' dtype, which is several times faster than booleans.
        ranks = self._rank[examples]
        masks = ranks.new_empty(*thresholds.shape[:2], ranks.shape[1])
        compare = torch.ge if complement else torch.lt
        return compare(ranks, thresholds, out=masks)


class SoftMasks:
    r"""Soft masks :math:`r_s = \sigma(T (\phi - t_s))`, differentiable with respect to the attributions :math:`\phi`.

    The threshold :math:`t_s` lies midway between the s-th and the (s+1)-th largest attribution. For s = D it lies half
    a mean gap below the smallest attribution. T is the inverse of the mean gap between distinct attributions. No
    gradient flows through :math:`t_s` and T. A constant attribution has no order: its masks are 1/2 with gradient 0.
    The masks are called like `HardMasks`: ``masks(masks.thresholds(steps))``.

    Args:
        values: attributions ``(B, D)``.
        present: ``(B, D)``, False where an example does not have the location; None: it has all.
        temperature: factor of T.
    """

    def __init__(self, values: Tensor, present: Tensor | None = None, temperature: float = 1.0) -> None:
        self.values = _in_single_or_double(values)
        self._present, self._temperature = present, temperature
        ordered = _without_absent(self.values.detach(), present).sort(dim=-1, descending=True).values
        self._ordered = ordered
        self._n_locations = _count(present, ordered)
        self._smallest = ordered.gather(1, self._n_locations - 1)
        self._spread = ordered[:, :1] - self._smallest
        # Values that differ by rounding count as one. Otherwise the number of gaps, and T, would depend on the chunk
        # size.
        largest = torch.maximum(ordered[:, :1].abs(), self._smallest.abs())
        distinct = ordered[:, :-1] - ordered[:, 1:] > _ROUNDING * torch.finfo(ordered.dtype).eps * largest
        self._n_gaps = distinct.logical_and_(ordered[:, 1:].isfinite()).sum(1, keepdim=True)
        # A map so flat that 1 / (mean gap) overflows counts as constant.
        slope = temperature * self._n_gaps / self._spread
        self._slope = torch.where(slope.isfinite(), slope, 0.0)

    def shuffled(self, noise: Tensor) -> SoftMasks:
        """Return masks of the same attributions, as constants, in the order of the noise ``(B, D)``.

        The values move to other locations, so thresholds and temperature stay those of the attributions.
        """
        ranks = _descending_ranks(_without_absent(noise, self._present)).long()
        values = self._ordered.gather(1, ranks)
        if self._present is not None:
            values = values.masked_fill(~self._present, 0.0)
        return SoftMasks(values, self._present, self._temperature)

    def thresholds(self, steps: Tensor) -> Tensor:
        """Return the thresholds :math:`t_s`, ``(k, B, 1)``, for numbers of locations ``(k, B)``."""
        rows = self._ordered.expand(len(steps), *self._ordered.shape)
        last = rows.gather(2, steps[..., None] - 1)
        first_left_out = rows.gather(2, steps.clamp(max=rows.shape[2] - 1)[..., None])
        below_all = self._smallest - self._spread / (2 * self._n_gaps.clamp(min=1))
        return torch.where((steps < self._n_locations.T)[..., None], (last + first_left_out) / 2, below_all)

    def __call__(
        self,
        thresholds: Tensor,
        examples: slice = slice(None),
        values: Tensor | None = None,
        *,
        complement: bool = False,
    ) -> Tensor:
        """Return masks ``(k, b, D)`` in (0, 1) for thresholds ``(k, b, 1)`` of the given examples.

        Gradients flow to ``values``, the same attributions ``(B, D)`` on another graph; None: to those given to the
        class. ``complement`` returns 1 minus the masks.
        """
        _check_thresholds(thresholds)
        values = self.values if values is None else values
        slope = -self._slope[examples] if complement else self._slope[examples]
        # In place, which saves the memory of two masks. Autograd does not need the overwritten values.
        return (values[examples] - thresholds).mul_(slope).sigmoid_()


def _check_thresholds(thresholds: Tensor) -> None:
    if thresholds.dim() != 3:
        raise ValueError(
            f"Masks are made of thresholds (k, b, 1), given: {tuple(thresholds.shape)}; of numbers of locations make "
            "these first: masks(masks.thresholds(steps))."
        )


def _in_single_or_double(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _without_absent(values: Tensor, present: Tensor | None) -> Tensor:
    """Return the values, with -inf at absent locations, so that these come last."""
    return values if present is None else values.masked_fill(~present, -torch.inf)


def _count(present: Tensor | None, ordered: Tensor) -> Tensor:
    if present is None:
        return torch.full((len(ordered), 1), ordered.shape[1], device=ordered.device)
    return present.sum(dim=1, keepdim=True).expand(len(ordered), 1)


def _descending_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, ``(B, D)``: 0 for the largest. Ties are ordered by position."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    positions = torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, positions.expand(order.shape))
