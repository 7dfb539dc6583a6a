"""Interpretable features: the conversion between D feature values and the tensors of an input.

Perturbation methods and metrics use D features (pixels, superpixels, columns). A model takes tensors. `FeatureLayout`
converts between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_idexpo._core.errors import InputError, all_finite
from captum_idexpo._core.inputs import Baseline, broadcasts, with_batch_axis


def as_numbers(masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return masks in another dtype. Booleans are viewed as bytes first, which is several times faster."""
    return (masks.view(torch.uint8) if masks.dtype == torch.bool else masks).to(dtype)


class FeatureLayout:
    """The positions of `n_features` features in the tensors of an input.

    Args:
        shapes: for each input tensor, the shape of the positions, without the batch axis. It broadcasts against the
            tensor: ``(1, H, W)`` masks all channels of a pixel together.
        indices: for each input tensor, the feature of every position, an int64 tensor ``(1, P)`` or ``(B, P)`` with
            ``P = prod(shape)``. None: every position is one feature, numbered in order.
        n_features: D.
    """

    def __init__(self, shapes: Sequence[torch.Size], indices: Sequence[Tensor | None], n_features: int) -> None:
        self.shapes = tuple(shapes)
        self.indices = tuple(indices)
        self.n_features = n_features

    @classmethod
    def of_positions(cls, shapes: Sequence[torch.Size]) -> FeatureLayout:
        """Return the layout in which every position of every shape is one feature (Captum's default feature mask)."""
        return cls(shapes, [None] * len(shapes), sum(math.prod(shape) for shape in shapes))

    @classmethod
    def of(cls, feature_mask: object, inputs: tuple[Tensor, ...]) -> FeatureLayout:
        """Return the layout of a feature mask; without a mask every position is one feature.

        It raises the errors of `of_mask`.
        """
        if feature_mask is None:
            return cls.of_positions([tensor.shape[1:] for tensor in inputs])
        return cls.of_mask(feature_mask, inputs)

    @classmethod
    def of_mask(cls, feature_mask: object, inputs: tuple[Tensor, ...]) -> FeatureLayout:
        """Return the layout of a Captum feature mask, in which equal numbers mark one feature.

        Only the numbers that occur are features, in ascending order.

        Args:
            feature_mask: whole numbers, a tensor or one tensor per input, each of its input's shape or broadcasting to
                it. A mask with fewer axes than its input has no batch axis.
            inputs: tensors ``(B, ...)``.

        Raises:
            TypeError: a mask is not a tensor, or does not hold whole numbers.
            InputError: the number of masks, or the shape of one, does not fit the inputs.
        """
        given = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
        if len(given) != len(inputs):
            raise InputError(
                f"feature_mask holds {len(given)} tensors for {len(inputs)} input tensors: give one for each."
            )
        masks = [_aligned_mask(mask, tensor) for mask, tensor in zip(given, inputs, strict=True)]
        names, numbers = torch.cat([mask.flatten() for mask in masks]).unique(return_inverse=True)
        indices = numbers.split([mask.numel() for mask in masks])
        flat = [index.view(len(mask), -1) for index, mask in zip(indices, masks, strict=True)]
        return cls([mask.shape[1:] for mask in masks], flat, len(names))

    def spread(self, values: Tensor, examples: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return each feature's value at each of its positions.

        Args:
            values: ``(k, b, D)``, k sets of values for each of b examples.
            examples: the slice of the batch that holds these b examples.

        Returns:
            One tensor ``(k, b, *shape)`` per input tensor.
        """
        spread, start = [], 0
        for shape, index in zip(self.shapes, self.indices, strict=True):
            if index is None:
                stop = start + math.prod(shape)
                whole = stop - start == self.n_features
                positions, start = values if whole else values[..., start:stop], stop
            else:
                # index_select would be up to 17 times slower than gather here.
                index = index if len(index) == 1 else index[examples]
                rows = (len(values), max(values.shape[1], len(index)))
                positions = values.expand(*rows, -1).gather(-1, index.expand(*rows, -1))
            spread.append(positions.reshape(*positions.shape[:2], *shape))
        return tuple(spread)

    def sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return each feature's sum over its positions, ``(B, D)``, of one tensor ``(B, ...)`` per input tensor."""
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

    def masks(self) -> tuple[Tensor, ...]:
        """Return the layout as a Captum feature mask, one tensor ``(1 or B, *shape)`` per input."""
        masks, start = [], 0
        for shape, index in zip(self.shapes, self.indices, strict=True):
            if index is None:
                index = torch.arange(start, start + math.prod(shape))[None]  # on the default device
                start += math.prod(shape)
            masks.append(index.view(len(index), *shape))
        return tuple(masks)

    def present(self) -> Tensor | None:
        """Return booleans ``(1, D)`` or ``(B, D)``, True where a feature occurs; None if every example has all."""
        if all(index is None or len(index) == 1 for index in self.indices):
            return None
        per_example = max(len(index) for index in self.indices if index is not None)
        present: Tensor | None = None
        for index in self.indices:
            assert index is not None  # a mask numbers the positions of every tensor
            present = index.new_zeros(per_example, self.n_features) if present is None else present
            present.scatter_(1, index.expand(per_example, -1), 1)
        return None if present is None or bool(present.all()) else present.bool()

    def of_rows(self, rows: Tensor, present: Tensor) -> FeatureLayout:
        """Return the layout of some examples. Each example's own features are numbered again, in order.

        Args:
            rows: indices of examples that have equally many features.
            present: booleans ``(len(rows), D)``, True where the example has the feature.
        """
        own_numbers = present.cumsum(dim=1) - 1
        indices = []
        for index in self.indices:
            assert index is not None  # only a feature mask gives examples different features
            index = index.expand(len(rows), -1) if len(index) == 1 else index[rows]
            indices.append(own_numbers.gather(1, index))
        return FeatureLayout(self.shapes, indices, int(present[0].sum()))


class MaskedInputs:
    """A batch with baselines, from which masked copies are made.

    Args:
        inputs: tensors ``(B, ...)``.
        baselines: for each tensor a number or a tensor that broadcasts against it, see `as_baselines`.
        layout: positions of the features.
        finite: True if inputs and baselines are known to hold neither NaN nor infinity. None: the values are checked.
            On an accelerator that would cost a synchronisation, so None counts as False there.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Baseline, ...],
        layout: FeatureLayout,
        finite: bool | None = None,
    ) -> None:
        self.inputs = inputs
        self.baselines = baselines
        self.layout = layout
        if finite is None:
            finite = inputs[0].device.type == "cpu" and all(map(all_finite, (*inputs, *baselines)))
        # On a CPU a product with a mask is 5 to 20 times faster than torch.where, but NaN and infinity times 0 are NaN.
        self._combine = _mix if finite else _choose

    def copies(
        self, keep: Tensor, examples: slice = slice(None), inputs: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Return masked copies ``(k, b, ...)`` of each input tensor.

        Args:
            keep: ``(k, b, D)``, or ``(k, 1, D)`` for all examples alike. 1 or True keeps a feature, 0 or False replaces
                it by the baseline. Numbers between 0 and 1 mix both.
            examples: the slice of the batch that holds these b examples.
            inputs: tensors of the same values on another autograd graph; None: the batch's tensors.
        """
        tensors = self.inputs if inputs is None else inputs
        chosen = [
            _of_examples(baseline, tensor, examples) for baseline, tensor in zip(self.baselines, tensors, strict=True)
        ]
        dtypes = [_copies_dtype(tensor, baseline, keep) for tensor, baseline in zip(tensors, chosen, strict=True)]
        # Multiplying by a mask of the inputs' dtype is several times faster than choosing by a boolean mask. The dtype
        # is changed before the mask is spread over the inputs, where it is smallest.
        if len(set(dtypes)) == 1:
            masks = self.layout.spread(as_numbers(keep, dtypes[0]), examples)
        else:
            masks = tuple(map(as_numbers, self.layout.spread(keep, examples), dtypes))
        return tuple(
            self._combine(tensor[examples].to(dtype), baseline, mask)
            for tensor, baseline, mask, dtype in zip(tensors, chosen, masks, dtypes, strict=True)
        )

    def emptied(self) -> tuple[Tensor, ...]:
        """Return the batch with every feature replaced by its baseline, tensors of the inputs' shapes."""
        return tuple(
            torch.as_tensor(baseline, device=tensor.device).to(torch.result_type(tensor, baseline)).expand_as(tensor)
            for tensor, baseline in zip(self.inputs, self.baselines, strict=True)
        )

    def without(self, regions: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Return copies ``(k, B, ...)`` in which baselines replace regions, such as windows, instead of features.

        Args:
            regions: for each tensor booleans ``(k, 1, ...)`` that broadcast against it, True where the baseline
                replaces the input; None: nowhere.
        """
        n_copies = max(len(region) for region in regions if region is not None)
        copies = []
        for tensor, baseline, region in zip(self.inputs, self.baselines, regions, strict=True):
            if region is None:
                copies.append(torch.stack([tensor] * n_copies))
                continue
            dtype = _copies_dtype(tensor, baseline, region)
            copies.append(self._combine(tensor.to(dtype), baseline, as_numbers(~region, dtype)))
        return tuple(copies)


def _of_examples(baseline: Baseline, tensor: Tensor, examples: slice) -> Baseline:
    if isinstance(baseline, Tensor) and baseline.dim() == tensor.dim() > 0 and len(baseline) > 1:
        return baseline[examples]
    return baseline


def _copies_dtype(tensor: Tensor, baseline: Baseline, keep: Tensor) -> torch.dtype:
    if tensor.is_floating_point() and not isinstance(baseline, Tensor):
        return tensor.dtype
    dtype = torch.result_type(tensor, baseline)
    return dtype if dtype.is_floating_point or not keep.is_floating_point() else keep.dtype


def _mix(tensor: Tensor, baseline: Baseline, mask: Tensor) -> Tensor:
    """Return exactly the tensor where the mask is 1, exactly the baseline where it is 0, a mixture in between."""
    copies: Tensor = mask * tensor
    if not isinstance(baseline, Tensor) and baseline == 0:
        return copies
    if mask.dtype == torch.bool:
        return torch.where(mask, tensor, baseline)
    baseline = baseline.to(mask.dtype) if isinstance(baseline, Tensor) else baseline
    mixed: Tensor = copies + (baseline - mask * baseline)
    return mixed


def _choose(tensor: Tensor, baseline: Baseline, mask: Tensor) -> Tensor:
    """Return what `_mix` returns, except at NaN and infinity: there a mask above 1/2 keeps the tensor."""
    baseline = torch.as_tensor(baseline, device=tensor.device).to(mask.dtype)
    finite = tensor.isfinite() & baseline.isfinite()
    # NaN and infinity are replaced before the product, since its gradient would hold 0 times infinity, which is NaN.
    nothing = torch.zeros_like(baseline)
    mixed = _mix(torch.where(finite, tensor, nothing), torch.where(finite, baseline, nothing), mask)
    return torch.where(finite, mixed, torch.where(mask > 0.5, tensor, baseline))


def _aligned_mask(mask: object, tensor: Tensor) -> Tensor:
    """Return a feature mask as int64 ``(1 or B, ...)`` that broadcasts against its input."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"feature_mask must be a tensor of whole numbers, given: {type(mask).__name__}.")
    whole = not mask.is_complex() and mask.dtype != torch.bool
    if whole and mask.is_floating_point():
        whole = bool((mask == mask.round()).all())
    if not whole:
        raise TypeError(
            f"feature_mask must hold whole numbers, one per feature, given: {mask.dtype}; for regions marked by True "
            "pass mask.long()."
        )
    aligned: Tensor = with_batch_axis(mask.to(tensor.device, torch.long), tensor)
    if not broadcasts(aligned, tensor):
        raise InputError(
            f"feature_mask of shape {tuple(mask.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a mask of the input's shape, or one that broadcasts to it."
        )
    # If every example has the same mask, one row is enough.
    return aligned[:1] if len(aligned) > 1 and bool((aligned == aligned[:1]).all()) else aligned
