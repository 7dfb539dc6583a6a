"""Shapley values from sampled orders of the features, or exactly from all coalitions, trainable."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import captum.attr as captum
import torch
from captum._utils.common import _format_feature_mask, _format_output, _is_tuple
from captum._utils.progress import NullProgress, progress
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.feature_ablation import _parse_forward_out
from captum.attr._core.shapley_value import _perm_generator, _shape_feature_mask
from captum.attr._utils.common import _find_output_mode_and_verify, _format_input_baseline
from torch import Tensor

from captum_idexpo._evaluation import BatchForward, align_baselines, default_rows_per_forward, masked_copies, slices
from captum_idexpo._features import FeatureLayout
from captum_idexpo.attr._graph import by_outputs
from captum_idexpo.attr._usage import TensorOrTensors, logged

_MANY_COALITIONS = 2**16


class ShapleyValueSampling(captum.ShapleyValueSampling):
    """Shapley values, the mean over random orders of the features (Strumbelj, Kononenko 2010).

    `captum.attr.ShapleyValueSampling` for the same seed of torch's global generator; a batch of coalitions is one
    computation, each coalition is evaluated once, and the precision of the outputs is kept.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``, of which the target
            is explained, or one value for the whole batch.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import ShapleyValueSampling
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> attribution = ShapleyValueSampling(model).attribute(x, target=1, n_samples=10, create_graph=True)
        >>> gap = (model(x) - model(torch.zeros_like(x)))[:, 1]
        >>> torch.allclose(attribution.sum(dim=1), gap, atol=1e-5)
        True
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """What a feature adds to those before it, the mean over random orders.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: what stands in place of a missing feature: None (zero), a number, a tensor that broadcasts to the
                inputs, or a tuple of these.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: integers numbering the features from 0, of the inputs' shape or broadcasting to it; None:
                every element is a feature.
            n_samples: orders drawn.
            perturbations_per_eval: coalitions of each example in one forward pass, which then has this many times B
                rows. None: as many as fit 2^18 input values on a CPU, 2^24 on an accelerator; 1 where the forward
                function returns one value a batch.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; without a target, of the shape of the outputs and then of an
            input. dtype that of the outputs, at least float32.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            ValueError: n_samples below 1; baselines that do not fit.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, given: {n_samples}.")
        attribution: TensorOrTensors = by_outputs(
            self,
            partial(
                self._explain,
                baselines=baselines,
                target=target,
                additional_forward_args=additional_forward_args,
                feature_mask=feature_mask,
                n_samples=n_samples,
                perturbations_per_eval=perturbations_per_eval,
                show_progress=show_progress,
            ),
            inputs,
            create_graph,
        )
        return attribution

    def _explain(
        self,
        inputs: Any,
        baselines: Any,
        target: TargetType,
        additional_forward_args: Any,
        feature_mask: Any,
        n_samples: int,
        perturbations_per_eval: int | None,
        show_progress: bool,
    ) -> Any:
        is_tuple = _is_tuple(inputs)
        tensors, baselines = _format_input_baseline(inputs, baselines)
        masks = _shape_feature_mask(_format_feature_mask(feature_mask, tensors), tensors)
        assert perturbations_per_eval is None or (
            isinstance(perturbations_per_eval, int) and perturbations_per_eval >= 1
        ), f"perturbations_per_eval must be None or an integer of at least 1, given: {perturbations_per_eval}."
        layout = FeatureLayout.of_mask(masks, tensors)
        coalitions, coefficients = self._coalitions(layout.n_features, n_samples, tensors[0].device)
        outputs = self._evaluate(
            coalitions,
            tensors,
            align_baselines(baselines, tensors),
            layout,
            BatchForward(self.forward_func, additional_forward_args, len(tensors[0]), target),
            masks,
            perturbations_per_eval,
            show_progress,
        )
        values = coefficients.to(outputs.dtype) @ outputs.flatten(1)
        return _format_output(is_tuple, _laid_out(values, outputs.shape[1:], layout, tensors))

    def _coalitions(self, n_features: int, n_samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Distinct coalitions, ``(M, D)`` booleans, and the values' coefficients in their outputs, ``(D, M)``."""
        orders = torch.tensor(list(_perm_generator(n_features, n_samples))).reshape(n_samples, n_features)
        position = orders.argsort(dim=1)
        sizes = torch.arange(n_features + 1)
        prefixes = position[:, None, :] < sizes[None, :, None]  # (n, D + 1, D)
        coalitions, number = prefixes.flatten(0, 1).unique(dim=0, return_inverse=True)
        number = number.reshape(n_samples, n_features + 1)
        coefficients = torch.zeros(n_features, len(coalitions), dtype=torch.float64)
        share = torch.full(orders.shape, 1 / n_samples, dtype=torch.float64)
        coefficients.index_put_((orders, number[:, 1:]), share, accumulate=True)
        coefficients.index_put_((orders, number[:, :-1]), -share, accumulate=True)
        return coalitions.to(device), coefficients.to(device)

    def _evaluate(
        self,
        coalitions: Tensor,
        tensors: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        layout: FeatureLayout,
        forward: BatchForward,
        masks: tuple[Tensor, ...],
        perturbations_per_eval: int | None,
        show_progress: bool,
    ) -> Tensor:
        """The outputs of each coalition, ``(M, *outputs)``, in double precision where they are."""
        n_examples = len(tensors[0])

        def evaluate(chunk: Tensor) -> Tensor:
            keep = chunk[:, None].expand(-1, n_examples, -1)
            rows = tuple(copies.flatten(0, 1) for copies in masked_copies(tensors, baselines, layout, keep))
            output: Tensor = torch.atleast_1d(_parse_forward_out(forward(rows, n_copies=len(chunk))))
            return output

        first = evaluate(coalitions[:1])
        _find_output_mode_and_verify(first, n_examples, perturbations_per_eval or 1, masks, allow_multi_outputs=True)
        size = perturbations_per_eval or self._coalitions_at_a_time(first, evaluate, coalitions, tensors)
        chunks = list(slices(len(coalitions) - 1, size))
        outputs = [first[None]]
        bar_class = progress if show_progress else NullProgress
        with bar_class(total=1 + len(chunks), desc=f"{self.get_name()} attribution") as bar:
            bar.update()
            for chunk in chunks:
                outputs.append(evaluate(coalitions[1:][chunk]).reshape(-1, *first.shape))
                bar.update()
        evaluated = torch.cat(outputs)
        return evaluated.to(torch.promote_types(evaluated.dtype, torch.float32))

    def _coalitions_at_a_time(
        self, first: Tensor, evaluate: Any, coalitions: Tensor, tensors: tuple[Tensor, ...]
    ) -> int:
        """As many as a forward pass likes, 1 where more rows do not give more outputs."""
        n_examples = len(tensors[0])
        if len(first) != n_examples:
            return 1
        if n_examples == 1 and len(coalitions) > 1:  # one row does not tell one output a row from one a batch
            try:
                with torch.no_grad():
                    if len(evaluate(coalitions[:2])) != 2:
                        return 1
            except Exception:
                return 1  # it may know one row only
        return max(1, default_rows_per_forward(tensors) // n_examples)


class ShapleyValues(ShapleyValueSampling, captum.ShapleyValues):
    """Exact Shapley values (Shapley 1953), `captum.attr.ShapleyValues`.

    Captum goes through all D! orders; here each of the 2^D coalitions is evaluated once, for the same values.

    Args:
        forward_func: as for `ShapleyValueSampling`.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import ShapleyValues
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> attribution = ShapleyValues(model).attribute(x, target=1, create_graph=True)
        >>> torch.allclose(attribution, x * model.weight[1], atol=1e-5)
        True
    """

    # The number of samples is none of its arguments, as in Captum.
    @logged
    def attribute(  # type: ignore[override]
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
        """What a feature adds to a coalition, the mean over all orders; arguments as for `ShapleyValueSampling`."""
        sample: Any = ShapleyValueSampling.attribute
        attribution: TensorOrTensors = sample.__wrapped__(
            self,
            inputs,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            feature_mask=feature_mask,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            create_graph=create_graph,
        )
        return attribution

    def _coalitions(self, n_features: int, n_samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if 2**n_features > _MANY_COALITIONS:
            warnings.warn(
                f"Exact Shapley values of {n_features} features take 2^{n_features} evaluations of each example: group "
                "them with a feature_mask, or use ShapleyValueSampling or KernelShap.",
                stacklevel=2,
            )
        numbers = torch.arange(2**n_features, device=device)
        coalitions = (numbers[:, None] >> torch.arange(n_features, device=device)).bitwise_and(1).bool()
        # A coalition S adds |S|! (D - |S| - 1)! / D! of its output to the features outside, with a minus.
        shares = [1 / (n_features * math.comb(n_features - 1, size)) for size in range(n_features)]
        share = torch.tensor([0.0, *shares, 0.0], dtype=torch.float64, device=device)
        size = coalitions.sum(dim=1)
        return coalitions, torch.where(coalitions, share[size][:, None], -share[size + 1][:, None]).T


def _laid_out(
    values: Tensor, output_shape: torch.Size, layout: FeatureLayout, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Values ``(D, outputs)`` at each feature's positions: for each tensor, the outputs' shape and then the input's."""
    n_examples = len(tensors[0])
    per_example = bool(output_shape) and output_shape[0] == n_examples
    rest = output_shape[1:] if per_example else output_shape
    # One set of values an example and further output, in the order (further outputs, examples, features).
    sets = values.reshape(len(values), n_examples if per_example else 1, -1).permute(2, 1, 0)
    examples = slice(None) if per_example else slice(0, 1)
    laid_out = []
    for spread, tensor in zip(layout.spread(sets, examples), tensors, strict=True):
        full = spread.expand(-1, -1, *tensor.shape[1:]).movedim(0, 1)
        shape = (n_examples, *rest) if per_example else tuple(rest)
        laid_out.append(full.reshape(*shape, *tensor.shape[1:]).contiguous())
    return tuple(laid_out)
