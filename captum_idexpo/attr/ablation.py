"""Attributions made of outputs on perturbed inputs, feature by feature, trainable."""

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
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.forward import BatchForward, evaluate_batches
from captum_idexpo._core.inputs import Tensors, as_baselines, as_tuple, check_optional_count
from captum_idexpo.attr._graph import by_outputs, note_output
from captum_idexpo.attr._trainable import TensorOrTensors, logged

_log = logging.getLogger(__name__)
_WINDOWS_AT_ONCE = 256


class BatchOutputs:
    """The outputs that an ablation compares: those on the batch, and those on perturbed copies of it.

    Args:
        explainer: the attribution, for its name and its forward function.
        inputs: a tensor ``(B, ...)`` or a tuple of them.
        target: which output is explained.
        additional_forward_args: passed to the forward function after the inputs.
        perturbations_per_eval: copies in one forward pass; None: chosen when they are evaluated.

    Attributes:
        tensors: the inputs as a tuple.
        plain: the output on them.

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
        """Return the batch in terms of its features, with what replaces them; errors as for `FeatureAblation`."""
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
            perturb: makes the copies asked for, tensors ``(k, B, ...)``.
            n_copies: copies to evaluate.
            perturbed: the batch with every feature perturbed. Copies share forward passes if the outputs on the batch
                are the same beside it as alone.
            show_progress: show a progress bar over the forward passes.
        """
        at_a_time = self._at_a_time
        if at_a_time is None:

            def together(order: list[int]) -> Any:
                pairs = zip(perturbed, self.tensors, strict=True)
                return self._evaluate(tuple(torch.cat([pair[kind] for kind in order]) for pair in pairs), len(order))

            at_a_time = copies_per_forward(self.plain, together, self.tensors)
        bar_class: Any = progress if show_progress else NullProgress
        with bar_class(total=1 + math.ceil(n_copies / at_a_time), desc=self._description) as bar:
            bar.update()
            return evaluate_batches(self._evaluate, perturb, n_copies, at_a_time, self.plain, bar.update)

    def laid_out(self, values: Tensor, layout: FeatureLayout) -> tuple[Tensor, ...]:
        """Return values ``(D, *plain.shape)`` at the positions of their features, ``(*plain.shape, *input.shape[1:])``.

        Raises:
            InputError: a feature mask per example where the outputs are no examples'.
        """
        shape, n_examples = self.plain.shape, len(self.tensors[0])
        per_example = bool(shape) and shape[0] == n_examples
        if not per_example and any(index is not None and len(index) > 1 for index in layout.indices):
            raise InputError(
                f"feature_mask holds a mask per example, but the output of shape {tuple(shape)} has no row per "
                "example: give one mask for all, with a batch axis of size 1."
            )
        rest = shape[1:] if per_example else shape
        # Sets of values in the order (further outputs, examples, features).
        n_sets = n_examples if per_example else 1
        sets = values.reshape(len(values), n_sets, math.prod(rest)).permute(2, 1, 0)
        laid_out = []
        for spread, tensor in zip(layout.spread(sets), self.tensors, strict=True):
            full = spread.expand(-1, -1, *tensor.shape[1:]).movedim(0, 1)
            laid_out.append(full.reshape(*shape, *tensor.shape[1:]))
        return tuple(laid_out)

    def formatted(self, attributions: tuple[Tensor, ...]) -> Any:
        """Return one attribution per tensor in the form of the user's inputs."""
        return attributions if self._is_tuple else attributions[0]

    def _evaluate(self, rows: tuple[Tensor, ...], n_copies: int) -> Tensor:
        output: Tensor = parse_forward_out(self._forward(rows, n_copies=n_copies))
        output = output if output.dim() else output[None]
        return output.to(rows[0].device)  # a number of Python's is on the CPU


class FeatureAblation(captum.FeatureAblation):
    """What the output loses when a feature is replaced by its baseline, `captum.attr.FeatureAblation`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``, of which the target
            is explained, or one value for the whole batch.

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
        """Return the output on the inputs minus that on the inputs with the feature replaced.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: what stands in place of a feature: None (zero), a number, a tensor that broadcasts to the
                inputs, or a tuple of these. A tensor with fewer axes than its input has no batch axis.
            target: int, tensor (B,) or list: the output index to explain; None if there is one output per row.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: whole numbers, equal ones for the positions of one feature, of the inputs' shape or
                broadcasting to it; a tuple of such tensors for a tuple of inputs. None: every element is a feature.
            perturbations_per_eval: features replaced in one forward pass, which then has this many times B rows.
                None: chosen automatically; 1 if copies of the batch in one pass influence each other.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; without a target, one leading row per output. dtype of the
            outputs.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            ValueError: baselines or feature masks that do not fit the inputs.
            TypeError: feature masks that do not hold whole numbers.
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
    """What the output loses when a feature's values are exchanged among the examples, `captum.attr.FeaturePermutation`.

    Permutation importance (Fisher et al. 2018, arXiv 1801.01489), per example. The same numbers as Captum's for the
    same seed of torch's global generator and ``perturbations_per_eval=1``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        perm_func: (a tensor, where its feature lies) -> the tensor with the feature exchanged. None: by a random
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

    # FeatureAblation's baselines have no meaning here: Captum's signature lacks them.
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
        """Return the output on the inputs minus that with the feature exchanged.

        The arguments that are not listed here, the result and the errors are those of `FeatureAblation`.

        Args:
            n_samples: permutations of each feature; the attribution is the mean over them.
            baselines: accepted and not used, as in Captum.

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
                # Feature by feature, so that the random stream does not depend on the chunk size.
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
    """Exchange a region's values among the examples by a random permutation, drawn as Captum draws it.

    Args:
        tensor: ``(B, ...)``, of two or more examples.
        region: booleans that broadcast to the tensor.
    """
    in_order = torch.arange(len(tensor))
    order = torch.randperm(len(tensor))
    while torch.equal(order, in_order):
        order = torch.randperm(len(tensor))
    return torch.where(region, tensor[order.to(tensor.device)], tensor)


def _exchangeable(layout: FeatureLayout, tensors: tuple[Tensor, ...]) -> list[tuple[int, tuple[Tensor | None, ...]]]:
    """Return the features whose values can be exchanged, in Captum's order: tensor by tensor.

    Each is its number and, for each tensor, booleans where it lies (None: nowhere).
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
    """Move each element's values on by another number of examples."""
    rows = torch.arange(len(tensor), device=tensor.device)[:, None]
    columns = torch.arange(tensor[:1].numel(), device=tensor.device)
    moved = tensor.reshape(len(tensor), len(columns))[(rows + columns) % max(1, len(tensor)), columns]
    return moved.view_as(tensor)


class Occlusion(captum.Occlusion, FeatureAblation):
    """What the output loses when a window is covered (Zeiler, Fergus 2014, arXiv 1311.2901), `captum.attr.Occlusion`.

    Unlike Captum's class, which averages in float32, it keeps the precision of the outputs.

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

    # FeatureAblation's feature mask is the sliding window here, as in Captum.
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
        """Return the mean, over the windows that cover an element, of what the output loses.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            sliding_window_shapes: the window's shape without the batch axis; a tuple of them for several tensors.
            strides: by how much the window moves, a number or one for each axis; a tuple of them for several tensors.
            baselines, target, additional_forward_args, perturbations_per_eval, show_progress, create_graph: as for
                `FeatureAblation`.

        Returns:
            Of the inputs' shape, tuple in, tuple out; dtype of the outputs, at least float32.

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
    """The windows that slide over tensors, in Captum's order: tensor by tensor, along the first axis first.

    Args:
        tensors: the inputs.
        shapes: the window of each tensor.
        strides: how far it moves along each axis.

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
        """Return for each tensor booleans ``(k, 1, ...)``, True under the window; None where it has none of them."""
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
        """Return the mean of losses ``(n, outputs)`` over an element's windows, ``(outputs, ...)`` for each tensor."""
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
