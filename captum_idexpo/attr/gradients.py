"""Attributions made of gradients in the inputs, trainable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr as captum
import torch
from captum._utils.common import _format_tensor_into_tuples, _is_tuple
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.gradient_shap import InputBaselineXGradient
from captum.attr._core.noise_tunnel import SUPPORTED_NOISE_TUNNEL_TYPES
from captum.attr._utils.common import _format_callable_baseline, _validate_noise_tunnel_type
from torch import Tensor

from captum_idexpo.attr._graph import by_gradients, by_outputs, keeps_graph
from captum_idexpo.attr._usage import TensorOrTensors, logged, part, require_trainable
from captum_idexpo.attr.path import InSteps


class Saliency(captum.Saliency):
    """The gradient of the target in the inputs (Simonyan et al. 2013, arXiv 1312.6034), `captum.attr.Saliency`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Saliency
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> saliency = Saliency(model).attribute(torch.randn(5, 3), target=1, create_graph=True)
        >>> saliency.shape
        torch.Size([5, 3])
        >>> saliency.sum().backward()
        >>> bool(model[0].weight.grad.ne(0).any())
        True
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        abs: bool = True,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """The gradient of the target in the inputs.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: which output is explained, as everywhere in Captum.
            abs: return absolute values.
            additional_forward_args: passed to the forward function after the inputs.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on a target that does not fit.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self,
            target=target,
            abs=abs,
            additional_forward_args=additional_forward_args,
        )
        attribution: TensorOrTensors = by_gradients(self, compute, inputs, create_graph, of_inputs=True)
        return attribution


class InputXGradient(captum.InputXGradient):
    """The gradient times the input (Shrikumar et al. 2016, arXiv 1605.01713), `captum.attr.InputXGradient`.

    Captum's attribution requires gradient, too, but its gradient takes the inner one for a constant.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import InputXGradient
        >>> model, x = torch.nn.Linear(3, 2, bias=False), torch.randn(5, 3)
        >>> attribution = InputXGradient(model).attribute(x, target=1, create_graph=True)
        >>> torch.allclose(attribution.sum(dim=1), model(x)[:, 1], atol=1e-6)
        True
        >>> attribution.sum().backward()
        >>> torch.allclose(model.weight.grad[1], x.sum(dim=0), atol=1e-6)
        True
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """The inputs times the gradient of the target in them; arguments, result and errors as for `Saliency`."""
        compute = partial(
            super().attribute.__wrapped__, self, target=target, additional_forward_args=additional_forward_args
        )
        attribution: TensorOrTensors = by_gradients(self, compute, inputs, create_graph, of_inputs=True)
        return attribution


class IntegratedGradients(InSteps, captum.IntegratedGradients):
    """The gradient's mean on the way from a baseline (Sundararajan et al. 2017, arXiv 1703.01365).

    `captum.attr.IntegratedGradients`, trainable also with an ``internal_batch_size``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        multiply_by_inputs: multiply by the inputs' difference from the baselines, so that attributions add up to the
            outputs' difference.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import IntegratedGradients
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> attribution = IntegratedGradients(model).attribute(x, target=1, internal_batch_size=20, create_graph=True)
        >>> gap = (model(x) - model(torch.zeros_like(x)))[:, 1]
        >>> torch.allclose(attribution.sum(dim=1), gap, atol=1e-3)
        True
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The integral of the gradient from the baselines to the inputs.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: where the path starts: None (zero), a number, a tensor that broadcasts, or a tuple of these.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            n_steps: gradients taken of each example.
            method: the quadrature: "gausslegendre" or "riemann_left", "_right", "_middle", "_trapezoid".
            internal_batch_size: rows of a forward pass; None: all at once.
            return_convergence_delta: also return by how much the attribution misses the outputs' difference, ``(B,)``,
                detached.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; or a pair of that and the convergence delta.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self.in_steps_of(internal_batch_size),
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            return_convergence_delta=return_convergence_delta,
        )
        return by_gradients(self, compute, inputs, create_graph, with_delta=return_convergence_delta)


class NoiseTunnel(captum.NoiseTunnel):
    """Mean, mean square or variance of an attribution under noise, `captum.attr.NoiseTunnel`.

    SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825), its square (Hooker et al. 2018, arXiv 1806.10758) and VarGrad
    (Adebayo et al. 2018, arXiv 1810.03292). The noise is that of torch's global generator.

    Args:
        attribution_method: an attribution of `captum_idexpo.attr`; without create_graph also one of Captum's.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NoiseTunnel, Saliency
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> smooth = NoiseTunnel(Saliency(model)).attribute(
        ...     torch.randn(5, 3), nt_samples=10, stdevs=0.1, target=1, create_graph=True
        ... )
        >>> smooth.sum().backward()
        >>> bool(model[2].weight.grad.ne(0).any())
        True
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        *,
        create_graph: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The attribution of noisy copies of the inputs, summarised.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            nt_type: "smoothgrad" (mean), "smoothgrad_sq" (mean of squares) or "vargrad" (variance).
            nt_samples: copies of each example.
            nt_samples_batch_size: copies at a time; None: all.
            stdevs: the noise's standard deviation, a float or one for each tensor.
            draw_baseline_from_distrib: draw the baseline of each copy from the baselines given.
            create_graph: attach the attribution to the model's graph; else it is detached.
            kwargs: the attribution method's own arguments (target, baselines, ...).

        Returns:
            What the attribution method returns.

        Raises:
            TypeError: create_graph with an attribution method that has none.
            RuntimeError, AssertionError: as the attribution method.
        """
        if create_graph:
            require_trainable(self.attribution_method)
        compute = partial(
            self._smooth,
            nt_type=nt_type,
            sizes=_sizes(nt_samples, nt_samples_batch_size),
            stdevs=stdevs,
            draw_baselines=draw_baseline_from_distrib,
            arguments=kwargs,
        )
        if not self.is_gradient_method:
            return by_outputs(self, compute, inputs, create_graph)
        return by_gradients(self, compute, inputs, create_graph, with_delta=self._returns_delta(kwargs))

    def _smooth(
        self,
        inputs: Any,
        nt_type: str,
        sizes: list[int],
        stdevs: float | tuple[float, ...],
        draw_baselines: bool,
        arguments: dict[str, Any],
    ) -> Any:
        _validate_noise_tunnel_type(nt_type, SUPPORTED_NOISE_TUNNEL_TYPES)
        is_tuple, tensors = _is_tuple(inputs), _format_tensor_into_tuples(inputs)
        returns_delta = self._returns_delta(arguments)
        sums: list[Any] = []
        sums_of_squares: list[Any] = []
        deltas: list[Tensor] = []
        with torch.set_grad_enabled(keeps_graph()):
            for number, size in enumerate(sizes):
                if number == 0 or size != sizes[number - 1]:
                    expanded = dict(arguments)
                    self._expand_partial(size, expanded, tensors, draw_baselines)
                noisy = self._add_noise_to_inputs(size, tensors, stdevs)
                parts, is_attribution_tuple, delta = self._compute_partial_attribution(
                    noisy, expanded, is_tuple, returns_delta
                )
                sums = sums or [None] * len(parts)
                sums_of_squares = sums_of_squares or [None] * len(parts)
                self._update_partial_attribution_and_delta(
                    parts, delta, sums, sums_of_squares, deltas, size, returns_delta
                )
            n_samples = sum(sizes)
            means = tuple(total * 1 / n_samples for total in sums)
            mean_squares = tuple(total * 1 / n_samples for total in sums_of_squares)
            smoothed = self._compute_smoothing(means, mean_squares, nt_type)
        delta = torch.cat(deltas) if returns_delta else None
        return self._apply_checks_and_return_attributions(smoothed, is_attribution_tuple, returns_delta, delta)

    def _returns_delta(self, arguments: dict[str, Any]) -> bool:
        return bool(self.is_delta_supported and arguments.get("return_convergence_delta"))


def _sizes(n_samples: int, at_a_time: int | None) -> list[int]:
    """How many samples each chunk has."""
    size = n_samples if at_a_time is None else min(n_samples, at_a_time)
    rest = n_samples % size
    return [size] * (n_samples // size) + [rest] * (rest > 0)


class GradientShap(captum.GradientShap):
    """Expected gradients between baselines and inputs (Lundberg, Lee 2017; Erion et al. 2021, arXiv 1906.10670).

    `captum.attr.GradientShap`. As in Captum, noise and the choice of baselines come from torch's and NumPy's global
    generators, the points between from NumPy's: the same numbers need both seeds.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import GradientShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = GradientShap(model).attribute(
        ...     torch.randn(5, 3), baselines=torch.zeros(1, 3), n_samples=20, target=1, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean of the gradient at random points between inputs and baselines.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: the distribution of baselines, tensors ``(n, ...)``, or a callable that returns them.
            n_samples: points drawn for each example.
            stdevs: standard deviation of the noise added to the inputs.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            return_convergence_delta: also return by how much the attributions miss the outputs' differences,
                ``(B * n_samples,)``, detached.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; or a pair of that and the convergence delta.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        between = InputBaselineXGradient(self.forward_func, self.multiplies_by_inputs)
        between.gradient_func = self.gradient_func
        compute = partial(
            smoothed_over_baselines,
            between,
            baselines=baselines,
            nt_samples=n_samples,
            stdevs=stdevs,
            target=target,
            additional_forward_args=additional_forward_args,
            return_convergence_delta=return_convergence_delta,
        )
        return by_gradients(self, compute, inputs, create_graph, with_delta=return_convergence_delta)


def smoothed_over_baselines(between: Any, inputs: Any, baselines: Any, **arguments: Any) -> Any:
    """The mean of an attribution over noise and baselines, as GradientShap and its layer form take it."""
    distribution = _format_callable_baseline(baselines, inputs)
    assert isinstance(distribution[0], Tensor), (
        f"baselines must be a distribution, tensors (n, ...) of n baselines, given: {baselines!r}."
    )
    tunnel = NoiseTunnel(between)
    return part(NoiseTunnel)(tunnel, inputs, draw_baseline_from_distrib=True, baselines=distribution, **arguments)
