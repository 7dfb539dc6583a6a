"""Interpretable features: how D values lie over the tensors of an input.

Perturbation methods and metrics speak of D features (pixels, superpixels, columns), the model of tensors.
`FeatureLayout` is the one place that goes from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def as_numbers(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Masks in another dtype; booleans by way of their bytes, zeros and ones, which is several times faster."""
    return (masks.view(torch.uint8) if masks.dtype == torch.bool else masks).to(dtype)


class FeatureLayout:
    """Where each of `n_features` features lies in the tensors of an input.

    Args:
        shapes: for each input tensor, the shape over which its features are laid out, without the batch axis; it
            broadcasts against the tensor, so that ``(1, H, W)`` moves all channels of a pixel together.
        indices: for each input tensor, the feature of every position, an int64 tensor ``(1, P)`` or ``(B, P)`` with
            ``P = prod(shape)``, or None where the positions are features of their own, numbered in order.
        n_features: D.
    """

    def __init__(self, shapes: Sequence[torch.Size], indices: Sequence[Tensor | None], n_features: int) -> None:
        self.shapes = tuple(shapes)
        self.indices = tuple(indices)
        self.n_features = n_features

    @classmethod
    def of_positions(cls, shapes: Sequence[torch.Size]) -> FeatureLayout:
        """Every position of every shape is one feature (Captum's default feature mask)."""
        return cls(shapes, [None] * len(shapes), sum(math.prod(shape) for shape in shapes))

    @classmethod
    def of_mask(cls, feature_mask: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> FeatureLayout:
        """Positions with the same number in a Captum feature mask are one feature.

        Raises:
            TypeError: a mask is not an integer tensor.
            ValueError: the number of masks or the shape of one does not fit the inputs, or a number is negative.
        """
        if len(feature_mask) != len(inputs):
            raise ValueError(
                f"feature_mask holds {len(feature_mask)} tensors for {len(inputs)} input tensors: give one for each."
            )
        masks = [_aligned_mask(mask, tensor) for mask, tensor in zip(feature_mask, inputs, strict=True)]
        numbers = [mask for mask in masks if mask.numel()]
        if numbers and min(int(mask.min()) for mask in numbers) < 0:
            raise ValueError("feature_mask holds negative numbers: number the features from 0.")
        n_features = 1 + max((int(mask.max()) for mask in numbers), default=-1)
        return cls([mask.shape[1:] for mask in masks], [mask.reshape(len(mask), -1) for mask in masks], n_features)

    def spread(self, values: Tensor, examples: slice = slice(None)) -> tuple[Tensor, ...]:
        """Each feature's value at each of its positions.

        Args:
            values: ``(k, b, D)``, k sets of values for each of b examples.
            examples: which b examples of the batch these are.

        Returns:
            For each input tensor ``(k, b, *shape)``.
        """
        spread, start = [], 0
        for shape, index in zip(self.shapes, self.indices, strict=True):
            if index is None:
                stop = start + math.prod(shape)
                whole = stop - start == self.n_features
                positions, start = values if whole else values[..., start:stop], stop
            else:
                # gather, since index_select is up to 17 times slower here.
                index = index if len(index) == 1 else index[examples]
                rows = (len(values), max(values.shape[1], len(index)))
                positions = values.expand(*rows, -1).gather(-1, index.expand(*rows, -1))
            spread.append(positions.reshape(*positions.shape[:2], *shape))
        return tuple(spread)

    def sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each feature's sum over its positions, ``(B, D)``, of one ``(B, ...)`` tensor for each input tensor."""
        flat = [
            tensor.sum_to_size(len(tensor), *shape).reshape(len(tensor), -1)
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        ]
        if all(index is None for index in self.indices):
            return torch.cat(flat, dim=1)
        total = flat[0].new_zeros(len(flat[0]), self.n_features)
        for positions, index in zip(flat, self.indices, strict=True):
            assert index is not None  # a mask numbers the positions of every tensor
            total = total.scatter_add(1, index.expand(len(positions), -1), positions)
        return total

    def present(self) -> Tensor | None:
        """Which features lie somewhere at all, ``(1, D)`` or ``(B, D)``; None where all do."""
        if all(index is None for index in self.indices):
            return None
        per_example = max(len(index) for index in self.indices if index is not None)
        ones = [torch.ones_like(index).expand(per_example, -1) for index in self.indices if index is not None]
        counts = ones[0].new_zeros(per_example, self.n_features)
        for one, index in zip(ones, self.indices, strict=True):
            assert index is not None
            counts.scatter_add_(1, index.expand(per_example, -1), one)
        present = counts > 0
        return None if bool(present.all()) else present


def _aligned_mask(mask: Tensor, tensor: Tensor) -> Tensor:
    """A feature mask as int64 ``(1 or B, *shape)``, shape broadcasting against the tensor's positions."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"feature_mask must hold integers, the number of each position's feature; given: {given}.")
    aligned = mask.long().to(tensor.device)
    if len(tensor) > 1 and mask.dim() and len(mask) == len(tensor):
        # As in Captum, a leading size equal to the batch's means one mask an example.
        lead, rest = mask.shape[:1], mask.shape[1:]
    else:
        lead, rest = (mask.shape[:1], mask.shape[1:]) if mask.dim() == tensor.dim() else (torch.Size([1]), mask.shape)
    missing = tensor.dim() - 1 - len(rest)
    fits = missing >= 0 and lead[0] in (1, len(tensor))
    shape = torch.Size([1] * max(missing, 0) + list(rest))
    if not fits or any(size not in (1, full) for size, full in zip(shape, tensor.shape[1:], strict=True)):
        raise ValueError(
            f"feature_mask of shape {tuple(mask.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a mask of the input's shape, or one that broadcasts to it."
        )
    return aligned.reshape(*lead, *shape)


def masked_copies(
    inputs: tuple[Tensor, ...],
    baselines: tuple[Any, ...],
    layout: FeatureLayout,
    keep: Tensor,
    examples: slice = slice(None),
) -> tuple[Tensor, ...]:
    """Copies of the inputs, the baseline standing where a boolean or soft mask says so.

    Args:
        inputs: each ``(B, ...)``.
        baselines: each a number or a tensor that broadcasts against its input, aligned by `align_baselines`.
        layout: where the D features lie in the inputs.
        keep: ``(k, b, D)``: True (or 1) keeps the feature, False (or 0) puts the baseline.
        examples: which b examples.
    """
    chosen = [
        baseline[examples]
        if isinstance(baseline, Tensor) and baseline.dim() == tensor.dim() and len(baseline) > 1
        else baseline
        for baseline, tensor in zip(baselines, inputs, strict=True)
    ]
    dtypes = [_copies_dtype(tensor, baseline, keep) for tensor, baseline in zip(inputs, chosen, strict=True)]
    # A mask of the inputs' type multiplies several times faster than a boolean one chooses; it is smallest before it
    # is laid out over the inputs.
    if len(set(dtypes)) == 1:
        masks = layout.spread(as_numbers(keep, dtypes[0]), examples)
    else:
        masks = tuple(map(as_numbers, layout.spread(keep, examples), dtypes))
    return tuple(
        _mix(tensor[examples].to(dtype), baseline, mask)
        for tensor, baseline, mask, dtype in zip(inputs, chosen, masks, dtypes, strict=True)
    )


def _copies_dtype(tensor: Tensor, baseline: Any, keep: Tensor) -> torch.dtype:
    if tensor.is_floating_point() and not isinstance(baseline, Tensor):
        return tensor.dtype
    dtype = torch.result_type(tensor, baseline)
    return dtype if dtype.is_floating_point or not keep.is_floating_point() else keep.dtype


def _mix(tensor: Tensor, baseline: Any, mask: Tensor) -> Tensor:
    """The tensor where the mask is 1, the baseline where it is 0, both to the last digit; mixtures between."""
    copies: Tensor = mask * tensor
    if not isinstance(baseline, Tensor) and baseline == 0:
        return copies
    if mask.dtype == torch.bool:
        return torch.where(mask, tensor, baseline)
    baseline = baseline.to(mask.dtype) if isinstance(baseline, Tensor) else baseline
    copies = mask * tensor + (baseline - mask * baseline)
    return copies
