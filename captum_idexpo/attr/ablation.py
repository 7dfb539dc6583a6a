"""Trainable attributions from outputs on perturbed inputs: ablation, permutation and occlusion."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import captum.attr as captum
import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor

from captum_idexpo._core.captum import (
    BaselineType,
    NullProgress,
    TargetType,
    format_and_verify_sliding_window_shapes,
    format_and_verify_strides,
    parse_forward_out,
    progress,
)
from captum_idexpo._core.chunks import copies_per_forward, repeated_rows, slices
from captum_idexpo._core.compiled import eagerly
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.forward import BatchForward, evaluate_batches
from captum_idexpo._core.inputs import Tensors, as_baselines, as_tuple, check_optional_count
from captum_idexpo._core.modes import module_of
from captum_idexpo.attr._graph import by_outputs, note_output
from captum_idexpo.attr._trainable import TensorOrTensors, logged

_log = logging.getLogger(__name__)
_WINDOWS_AT_ONCE = 256


class BatchOutputs:
    """The outputs that an ablation compares: the output on the batch and the outputs on perturbed copies.

    Args:
        explainer: the attribution. Its name and its forward function are used.
        inputs: a tensor ``(B, ...)`` or a tuple of them.
        target: index of the output to explain.
        additional_forward_args: passed to the forward function after the inputs.
        perturbations_per_eval: copies in one forward pass; None: chosen in `on_copies`.

    Attributes:
        tensors: the inputs as a tuple.
        plain: the output on the inputs.

    Raises:
        AssertionError: as Captum, on arguments that do not fit.
    """

    def __init__(
        self,
        explainer: Attribution,
        inputs: object,
        target: TargetType,
        additional_forward_args: object,
        perturbations_per_eval: int | None,
    ) -> None:
        self._at_a_time = check_optional_count("perturbations_per_eval", perturbations_per_eval)
        self._is_tuple = isinstance(inputs, tuple)
        self.tensors = as_tuple(inputs, "inputs")
        self._description = f"{explainer.get_name()} attribution"
        self._forward = BatchForward(explainer.forward_func, additional_forward_args, len(self.tensors[0]), target)
        self.plain = self._evaluate(repeated_rows(self.tensors), 1)
        note_output(self.plain)

    def masked(self, baselines: object, feature_mask: object) -> MaskedInputs:
        """Return the batch with its features and baselines; for the errors see `FeatureAblation`."""
        layout = FeatureLayout.of(feature_mask, self.tensors)
        return MaskedInputs(self.tensors, as_baselines(baselines, self.tensors), layout)

    def on_copies(
        self,
        perturb: Callable[[slice], tuple[Tensor, ...]],
        n_copies: int,
        perturbed: tuple[Tensor, ...],
        show_progress: bool,
    ) -> Tensor:
        """Return the outputs on perturbed copies, ``(n_copies, *plain.shape)``.

        Args:
            perturb: makes a slice of the copies, tensors ``(k, B, ...)``.
            n_copies: number of copies to evaluate.
            perturbed: the batch with every feature perturbed. Several copies share a forward pass if the outputs on the
                batch do not change when `perturbed` is in the same forward pass.
            show_progress: show a progress bar over the forward passes.
        """
        at_a_time = self._at_a_time
        if at_a_time is None:

            def together(order: list[int]) -> Any:
                pairs = zip(perturbed, self.tensors, strict=True)
                return self._evaluate(tuple(torch.cat([pair[kind] for kind in order]) for pair in pairs), len(order))

            with eagerly(module_of(self._forward.forward_func)):
                at_a_time = copies_per_forward(self.plain, together, self.tensors)
        bar_class: Any = progress if show_progress else NullProgress
        with bar_class(total=1 + math.ceil(n_copies / at_a_time), desc=self._description) as bar:
            bar.update()
            return evaluate_batches(self._evaluate, perturb, n_copies, at_a_time, self.plain, bar.update)

    def laid_out(self, values: Tensor, layout: FeatureLayout) -> tuple[Tensor, ...]:
        """Spread values ``(D, *plain.shape)`` over their features' locations: ``(*plain.shape, *input.shape[1:])``.

        Raises:
            InputError: there is a feature mask per example, but the output has no row per example.
        """
        shape, n_examples = self.plain.shape, len(self.tensors[0])
        per_example = bool(shape) and shape[0] == n_examples
        if not per_example and any(index is not None and len(index) > 1 for index in layout.indices):
            raise InputError(
                f"feature_mask holds a mask per example, but the output of shape {tuple(shape)} has no row per "
                "example: give one mask for all, with a batch axis of size 1."
            )
        rest = shape[1:] if per_example else shape
        # The axes of `sets` are (further outputs, examples, features).
        n_sets = n_examples if per_example else 1
        sets = values.reshape(len(values), n_sets, math.prod(rest)).permute(2, 1, 0)
        laid_out = []
        for spread, tensor in zip(layout.spread(sets), self.tensors, strict=True):
            full = spread.expand(-1, -1, *tensor.shape[1:]).movedim(0, 1)
            laid_out.append(full.reshape(*shape, *tensor.shape[1:]))
        return tuple(laid_out)

    def formatted(self, attributions: tuple[Tensor, ...]) -> Any:
        """Return the attributions as a tuple if the user passed a tuple, else as a single tensor."""
        return attributions if self._is_tuple else attributions[0]

    def _evaluate(self, rows: tuple[Tensor, ...], n_copies: int) -> Tensor:
        output: Tensor = parse_forward_out(self._forward(rows, n_copies=n_copies))
        output = output if output.dim() else output[None]
        return output.to(rows[0].device)  # a Python number becomes a tensor on the CPU


class FeatureAblation(captum.FeatureAblation):
    """Decrease of the output when a feature is replaced by its baseline, as `captum.attr.FeatureAblation`.

    Args:
        forward_func: takes the inputs and the additional arguments. It returns outputs ``(B, ...)``, from which the
            target is chosen, or one value for the whole batch.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import FeatureAblation
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> attribution = FeatureAblation(model).attribute(x, target=1, create_graph=True)
        >>> torch.allclose(attribution, x * model.weight[1], atol=1e-6)
        True
        >>> attribution.sum().backward()
        >>> torch.allclose(model.weight.grad[1], x.sum(dim=0), atol=1e-5)
        True
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """Return the output on the inputs minus the output with the feature replaced.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: replaces a feature: None (zero), a number, a tensor that broadcasts to the inputs, or a tuple of
                these. A tensor with fewer axes than its input has no batch axis.
            target: int, tensor (B,) or list: the output index to explain; None if there is one output per row.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: whole numbers; the locations of one feature have the same number. The mask has the inputs'
                shape or broadcasts to it. For a tuple of inputs, a tuple of such tensors. None: every element is a
                feature.
            perturbations_per_eval: features replaced in one forward pass, which then has this many times B rows.
                None: chosen automatically; 1 if copies of the batch in one pass influence each other.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            A tensor of the inputs' shape, or a tuple for a tuple of inputs. Without a target, the first axis has one
            row per output. The dtype is that of the outputs.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            ValueError: baselines or feature masks do not fit the inputs.
            TypeError: a feature mask does not hold whole numbers.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """

        def compute(inputs: Tensors) -> Any:
            outputs = BatchOutputs(self, inputs, target, additional_forward_args, perturbations_per_eval)
            masked = outputs.masked(baselines, feature_mask)
            features = torch.arange(masked.layout.n_features, device=outputs.tensors[0].device)

            def without_features(chunk: slice) -> tuple[Tensor, ...]:
                return masked.copies((features[chunk, None] != features)[:, None])

            perturbed = outputs.on_copies(without_features, len(features), masked.emptied(), show_progress)
            return _one_row_per_output(outputs, outputs.plain - perturbed, masked.layout)

        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution


class FeaturePermutation(FeatureAblation, captum.FeaturePermutation):
    """Decrease of the output when a feature is permuted among the examples, as `captum.attr.FeaturePermutation`.

    This is permutation importance (Fisher et al. 2018, arXiv 1801.01489), per example. The values equal Captum's for
    the same seed of torch's global generator and ``perturbations_per_eval=1``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        perm_func: (tensor, boolean mask of the feature) -> the tensor with the feature permuted. None: a random
            permutation of the examples.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import FeaturePermutation
        >>> model = torch.nn.Linear(3, 2)
        >>> FeaturePermutation(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

    def __init__(
        self, forward_func: Callable[..., Any], perm_func: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        captum.FeaturePermutation.__init__(self, forward_func, exchanged if perm_func is None else perm_func)

    # Unlike FeatureAblation, Captum's method has no positional `baselines`, so mypy reports an incompatible override.
    @logged
    def attribute(  # type: ignore[override]
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        n_samples: int = 1,
        baselines: object | None = None,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """Return the output on the inputs minus the output with the feature permuted.

        For the other arguments, the result and the errors see `FeatureAblation`.

        Args:
            n_samples: permutations of each feature; the attribution is the mean over them.
            baselines: ignored, as in Captum.

        Raises:
            ValueError: n_samples below 1.
        """
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, given: {n_samples}.")

        def compute(inputs: Tensors) -> Any:
            outputs = BatchOutputs(self, inputs, target, additional_forward_args, perturbations_per_eval)
            layout = FeatureLayout.of(feature_mask, outputs.tensors)
            regions = _exchangeable(layout, outputs.tensors) * n_samples

            def with_exchanged_features(chunk: slice) -> tuple[Tensor, ...]:
                # Permutations are drawn one by one, so that the random numbers do not depend on the chunk size.
                copies = [self._exchanged_in(outputs.tensors, *region) for region in regions[chunk]]
                return tuple(map(torch.stack, zip(*copies, strict=True)))

            sheared = tuple(map(_sheared, outputs.tensors))
            perturbed = outputs.on_copies(with_exchanged_features, len(regions), sheared, show_progress)
            lost = outputs.plain - perturbed
            if n_samples > 1:
                lost = lost.to(torch.promote_types(lost.dtype, torch.float32))
                lost = lost.reshape(n_samples, -1, *outputs.plain.shape).mean(dim=0)
            numbers = torch.tensor([number for number, _ in regions[: len(lost)]], dtype=torch.long)
            values = lost.new_zeros(layout.n_features, *outputs.plain.shape)
            return _one_row_per_output(outputs, values.index_copy(0, numbers.to(lost.device), lost), layout)

        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution

    def _exchanged_in(
        self, tensors: tuple[Tensor, ...], _number: int, regions: tuple[Tensor | None, ...]
    ) -> list[Tensor]:
        return [
            tensor if region is None else self.perm_func(tensor.clone(), region.to(tensor.device))
            for tensor, region in zip(tensors, regions, strict=True)
        ]


def exchanged(tensor: Tensor, region: Tensor) -> Tensor:
    """Permute a region's values among the examples at random, with the same random draws as Captum.

    Args:
        tensor: ``(B, ...)`` with at least two examples.
        region: booleans that broadcast to the tensor.
    """
    in_order = torch.arange(len(tensor))
    order = torch.randperm(len(tensor))
    while torch.equal(order, in_order):
        order = torch.randperm(len(tensor))
    return torch.where(region, tensor[order.to(tensor.device)], tensor)


def _exchangeable(layout: FeatureLayout, tensors: tuple[Tensor, ...]) -> list[tuple[int, tuple[Tensor | None, ...]]]:
    """Return the features that can be permuted among examples, in Captum's order: tensor by tensor.

    An entry holds the feature's number and, per tensor, its boolean mask (None: the feature is not in this tensor).
    """
    masks = layout.masks()
    numbers = [mask.unique().tolist() for mask in masks]
    alone = {number for tensor, some in zip(tensors, numbers, strict=True) if len(tensor) < 2 for number in some}
    if alone:
        _log.warning("A batch of one example has no other to exchange values with: the attribution is 0.")
    in_order = dict.fromkeys(number for some in numbers for number in some if number not in alone)
    return [
        (
            number,
            tuple((mask == number) if number in some else None for mask, some in zip(masks, numbers, strict=True)),
        )
        for number in in_order
    ]


def _sheared(tensor: Tensor) -> Tensor:
    """Shift the values of element number c along the batch axis by c examples."""
    rows = torch.arange(len(tensor), device=tensor.device)[:, None]
    columns = torch.arange(tensor[:1].numel(), device=tensor.device)
    moved = tensor.reshape(len(tensor), len(columns))[(rows + columns) % max(1, len(tensor)), columns]
    return moved.view_as(tensor)


class Occlusion(captum.Occlusion, FeatureAblation):
    """Decrease of the output under a sliding window (Zeiler, Fergus 2014, arXiv 1311.2901), as `captum.attr.Occlusion`.

    Captum's class averages in float32. This class keeps the precision of the outputs.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Occlusion
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
        >>> x = torch.randn(4, 1, 8, 8)
        >>> map = Occlusion(model).attribute(x, sliding_window_shapes=(1, 4, 4), strides=2, target=1, create_graph=True)
        >>> map.shape
        torch.Size([4, 1, 8, 8])
        >>> map.square().sum().backward()
    """

    # As in Captum, sliding windows replace FeatureAblation's feature mask, so mypy reports an incompatible override.
    @logged
    def attribute(  # type: ignore[override]
        self,
        inputs: TensorOrTensors,
        sliding_window_shapes: Any,
        strides: Any = None,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """Return, for each element, the mean decrease of the output over the windows that cover it.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            sliding_window_shapes: the window's shape without the batch axis; a tuple of shapes for several tensors.
            strides: step of the window, a number or one per axis; a tuple of these for several tensors.
            baselines: values of the elements inside the window; None: 0.
            target: an integer, a tensor ``(B,)`` or a list: the output index to explain; None if each row has one
                output.
            additional_forward_args: passed to the forward function after the inputs.
            perturbations_per_eval: copies of the batch per forward pass; None: chosen automatically.
            show_progress: show a progress bar.
            create_graph: keep the graph, so that the attribution can be trained through.

        Returns:
            A tensor of the inputs' shape, or a tuple for a tuple of inputs. The dtype is that of the outputs, at least
            float32.

        Raises:
            RuntimeError, AssertionError, IndexError: as for `FeatureAblation`.
        """

        def compute(inputs: Tensors) -> Any:
            outputs = BatchOutputs(self, inputs, target, additional_forward_args, perturbations_per_eval)
            windows = _Windows(outputs.tensors, sliding_window_shapes, strides)
            masked = outputs.masked(baselines, None)
            everything = masked.layout.n_features * [False]
            covered = masked.copies(torch.tensor(everything, device=outputs.tensors[0].device)[None, None])
            perturbed = outputs.on_copies(
                lambda chunk: masked.without(windows(chunk)),
                windows.n,
                tuple(copy[0] for copy in covered),
                show_progress,
            )
            lost = outputs.plain - perturbed
            return outputs.formatted(windows.means(lost.to(torch.promote_types(lost.dtype, torch.float32)).flatten(1)))

        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution


class _Windows:
    """The sliding windows of all tensors, in Captum's order: tensor by tensor, along the first axis first.

    Args:
        tensors: the inputs.
        shapes: the window shape of each tensor.
        strides: the step of the window along each axis.

    Raises:
        AssertionError: as Captum, on windows and strides that do not fit.
    """

    def __init__(self, tensors: tuple[Tensor, ...], shapes: Any, strides: Any) -> None:
        self._tensors = tensors
        self._shapes = format_and_verify_sliding_window_shapes(shapes, tensors)
        self._strides = [
            stride if isinstance(stride, tuple) else (stride,) * (tensor.dim() - 1)
            for stride, tensor in zip(format_and_verify_strides(strides, tensors), tensors, strict=True)
        ]
        self._counts = [
            [self._count(*axis) for axis in zip(tensor.shape[1:], shape, stride, strict=True)]
            for tensor, shape, stride in zip(tensors, self._shapes, self._strides, strict=True)
        ]
        self._stops = np.cumsum([math.prod(counts) for counts in self._counts]).tolist()
        self.n: int = self._stops[-1]

    @staticmethod
    def _count(full: int, size: int, stride: int) -> int:
        assert size <= full, f"Sliding window dimensions {size} cannot exceed input dimensions {full}."
        assert size == full or stride <= size, (
            f"Stride dimension {stride} cannot be larger than sliding window shape dimension {size}."
        )
        return math.ceil((full - size) / stride) + 1

    def __call__(self, chunk: slice) -> tuple[Tensor | None, ...]:
        """Return for each tensor booleans ``(k, 1, ...)``, True in the window; None if no window is in this tensor."""
        numbers = torch.arange(self.n)[chunk]
        starts = [0, *self._stops]
        return tuple(
            self._regions(index, numbers - start, (numbers >= start) & (numbers < stop))
            for index, (start, stop) in enumerate(zip(starts, self._stops, strict=False))
        )

    def _regions(self, index: int, numbers: Tensor, own: Tensor) -> Tensor | None:
        if not own.any():
            return None
        tensor = self._tensors[index]
        regions = own
        for axis, (size, stride, count) in enumerate(
            zip(self._shapes[index], self._strides[index], self._counts[index], strict=True), start=1
        ):
            start = (numbers % count * stride)[:, None]
            numbers = numbers // count
            positions = torch.arange(tensor.shape[axis])
            along = (positions >= start) & (positions < start + size)
            regions = regions[..., None] & along.reshape(len(along), *[1] * (axis - 1), -1)
        return regions[:, None].to(tensor.device)

    def means(self, lost: Tensor) -> tuple[Tensor, ...]:
        """Average the windows' values ``(n, outputs)`` over each element's windows: ``(outputs, ...)`` per tensor."""
        sizes = [math.prod(tensor.shape[1:]) for tensor in self._tensors]
        sums = [lost.new_zeros(lost.shape[1], size) for size in sizes]
        covers = [lost.new_zeros(size) for size in sizes]
        for chunk in slices(self.n, _WINDOWS_AT_ONCE):
            for index, regions in enumerate(self(chunk)):
                if regions is not None:
                    flat = regions.flatten(1).to(lost.dtype)
                    sums[index] = sums[index] + lost[chunk].T @ flat
                    covers[index] += flat.sum(dim=0)
        return tuple(
            (total / cover).reshape(lost.shape[1], *tensor.shape[1:])
            for total, cover, tensor in zip(sums, covers, self._tensors, strict=True)
        )


def _one_row_per_output(outputs: BatchOutputs, values: Tensor, layout: FeatureLayout) -> Any:
    laid_out = outputs.laid_out(values, layout)
    n_outputs = outputs.plain.numel()
    pairs = zip(laid_out, outputs.tensors, strict=True)
    return outputs.formatted(tuple(full.reshape(n_outputs, *tensor.shape[1:]) for full, tensor in pairs))
