"""Attributions made of outputs on perturbed inputs, feature by feature, trainable."""

from __future__ import annotations

from functools import partial
from typing import Any

import captum.attr as captum
import torch
from captum._utils.common import (
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _format_feature_mask,
    _format_output,
    _is_tuple,
    _run_forward,
)
from captum._utils.progress import NullProgress
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.feature_ablation import _parse_forward_out, process_initial_eval
from captum.attr._utils.common import _format_input_baseline
from torch import Tensor

from captum_idexpo._core.chunks import copies_per_forward
from captum_idexpo._core.inputs import align_baselines, with_batch_axis
from captum_idexpo.attr._graph import by_outputs, note_output
from captum_idexpo.attr._usage import TensorOrTensors, logged, part


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
        **kwargs: Any,
    ) -> TensorOrTensors:
        """The output on the inputs minus that on the inputs with the feature replaced.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: what stands in place of a feature: None (zero), a number, a tensor that broadcasts to the
                inputs, or a tuple of these.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: integers numbering the features, of the inputs' shape or broadcasting to it; None: every
                element is a feature.
            perturbations_per_eval: features replaced in one forward pass, which then has this many times B rows.
                None: as many as suit the device, where copies of the batch in one pass give what they give alone;
                else 1 (one value for the whole batch, arguments that are no example's, dropout).
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the model's graph; else it is detached.
            kwargs: what subclasses of Captum's class hand their own methods.

        Returns:
            Of the inputs' shape, tuple in, tuple out; without a target, of one leading row an output. dtype that of
            the outputs.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        compute = partial(
            self._ablate,
            baselines=baselines,
            target=target,
            additional_forward_args=_format_additional_forward_args(additional_forward_args),
            feature_mask=feature_mask,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            **kwargs,
        )
        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution

    def _ablate(
        self,
        inputs: Any,
        baselines: Any,
        target: TargetType,
        additional_forward_args: Any,
        feature_mask: Any,
        perturbations_per_eval: int | None,
        show_progress: bool,
        **kwargs: Any,
    ) -> Any:
        """Captum's computation in the ambient gradient mode, averaged in the outputs' precision."""
        is_tuple = _is_tuple(inputs)
        tensors, baselines = _format_input_baseline(inputs, baselines)
        masks = tuple(map(with_batch_axis, _format_feature_mask(feature_mask, tensors), tensors))
        assert perturbations_per_eval is None or (
            isinstance(perturbations_per_eval, int) and perturbations_per_eval >= 1
        ), f"perturbations_per_eval must be None or an integer of at least 1, given: {perturbations_per_eval}."
        output = _parse_forward_out(_run_forward(self.forward_func, tensors, target, additional_forward_args))
        note_output(output)
        if perturbations_per_eval is None:
            together = partial(self._together, tensors, baselines, target, additional_forward_args)
            perturbations_per_eval = copies_per_forward(output, None, together, tensors)
        sums, weights, _, flat_output, n_outputs, dtype = process_initial_eval(output, tensors, self.use_weights)
        progress: Any = NullProgress()
        if show_progress:
            progress = self._attribute_progress_setup(
                tensors, masks, **kwargs, perturbations_per_eval=perturbations_per_eval
            )
            progress.update()
        with progress:
            sums, weights = self._attribute_with_cross_tensor_feature_masks(
                tensors,
                additional_forward_args,
                target,
                baselines,
                masks,
                progress,
                flat_output,
                output,
                n_outputs,
                sums,
                weights,
                dtype,
                perturbations_per_eval,
                **kwargs,
            )
        if self.use_weights:
            dtype = torch.promote_types(dtype, torch.float32)
            sums = [total.to(dtype) / weight for total, weight in zip(sums, weights, strict=True)]
        return _format_output(is_tuple, tuple(sums))

    def _together(
        self,
        tensors: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        target: TargetType,
        additional_forward_args: Any,
        order: list[int],
    ) -> Any:
        """The output, in one pass, on copies of the batch (1) and on copies of which every feature is perturbed (0)."""
        n, arguments = len(order), additional_forward_args
        arguments = _expand_additional_forward_args(arguments, n) if arguments else None
        kinds = zip(self._perturbed(tensors, baselines), tensors, strict=True)
        copies = tuple(torch.cat([pair[kind] for kind in order]) for pair in kinds)
        return _run_forward(self.forward_func, copies, _expand_target(target, n), arguments)

    def _perturbed(self, tensors: tuple[Tensor, ...], baselines: tuple[Any, ...]) -> tuple[Tensor, ...]:
        aligned = align_baselines(baselines, tensors)
        return tuple(torch.as_tensor(b).to(t).expand_as(t) for b, t in zip(aligned, tensors, strict=True))


class FeaturePermutation(FeatureAblation, captum.FeaturePermutation):
    """What the output loses when a feature's values are exchanged among the examples, `captum.attr.FeaturePermutation`.

    Permutation importance (Fisher et al. 2018, arXiv 1801.01489), per example. The same numbers as Captum's for the
    same seed of torch's global generator and the same ``perturbations_per_eval``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        perm_func: (a tensor, where its feature lies) -> the tensor with the feature exchanged.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import FeaturePermutation
        >>> model = torch.nn.Linear(3, 2)
        >>> FeaturePermutation(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

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
        create_graph: bool = False,
        **kwargs: Any,
    ) -> TensorOrTensors:
        """The output on the inputs minus that with the feature exchanged; arguments as for `FeatureAblation`."""
        kwargs.pop("baselines", None)
        if perturbations_per_eval is None and isinstance(inputs, tuple) and len(inputs) > 1:
            perturbations_per_eval = 1  # of several tensors the order of the draws depends on it
        attribution: TensorOrTensors = part(FeatureAblation)(
            self,
            inputs,
            target=target,
            additional_forward_args=additional_forward_args,
            feature_mask=feature_mask,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            create_graph=create_graph,
            **kwargs,
        )
        return attribution

    def _perturbed(self, tensors: tuple[Tensor, ...], baselines: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Every element's values moved on by another number of examples."""
        return tuple(map(_sheared, tensors))


def _sheared(tensor: Tensor) -> Tensor:
    rows = torch.arange(len(tensor), device=tensor.device)[:, None]
    columns = torch.arange(tensor[0].numel(), device=tensor.device)
    return tensor.reshape(len(tensor), -1)[(rows + columns) % len(tensor), columns].view_as(tensor)


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
        """The mean, over the windows that cover an element, of what the output loses.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            sliding_window_shapes: the window's shape without the batch axis; a tuple of them for several tensors.
            strides: by how much the window moves, a number or one for each axis; a tuple of them for several tensors.
            baselines, target, additional_forward_args, perturbations_per_eval, show_progress, create_graph: as for
                `FeatureAblation`.

        Returns:
            Of the inputs' shape, tuple in, tuple out; dtype that of the outputs, at least float32.

        Raises:
            RuntimeError, AssertionError, IndexError: as for `FeatureAblation`.
        """
        # Captum's body lays out the windows and goes on to FeatureAblation, the one above.
        compute = partial(
            captum.Occlusion.attribute.__wrapped__,
            self,
            sliding_window_shapes=sliding_window_shapes,
            strides=strides,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution
