"""Trainable attributions from gradients with respect to the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import captum.attr as captum
import torch
from torch import Tensor

from captum_idexpo._core.captum import (
    SUPPORTED_NOISE_TUNNEL_TYPES,
    InputBaselineXGradient,
    approximation_parameters,
    format_callable_baseline,
    format_tensor_into_tuples,
    validate_noise_tunnel_type,
)
from captum_idexpo._core.chunks import slices
from captum_idexpo._core.errors import InputError, warn
from captum_idexpo._core.inputs import Tensors, as_tuple
from captum_idexpo._core.targets import captum_target
from captum_idexpo.attr._graph import by_outputs, keeps_graph
from captum_idexpo.attr._trainable import Trainable, captums_method, logged, part, read_inputs, require_trainable

OF_A_DISTRIBUTION = {
    "baselines": "the distribution of baselines, tensors ``(n, ...)``, or a callable that returns them.",
    "return_convergence_delta": "also return by how much the attributions miss the outputs' differences, one number "
    "per example and baseline or sample, detached.",
}
WITH_DELTA = "Of the inputs' shape, tuple in, tuple out; or a pair of that and the convergence delta."


class Saliency(Trainable, captum.Saliency):
    """Gradient of the target (Simonyan et al. 2013, arXiv 1312.6034), as `captum.attr.Saliency`.

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

    _summary = "Return the gradient of the target with respect to the inputs."
    _of_inputs = True


class InputXGradient(Trainable, captum.InputXGradient):
    """Gradient times input (Shrikumar et al. 2016, arXiv 1605.01713), as `captum.attr.InputXGradient`.

    Captum's attribution also requires grad, but it treats the gradient factor as a constant.

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

    _summary = "Return the inputs times the gradient of the target with respect to them."
    _of_inputs = True


class InSteps(Trainable):
    """A path integral whose steps are evaluated in chunks of ``internal_batch_size`` rows.

    Each chunk keeps its graph. Captum detaches all chunks but the first.
    """

    _steps_shared_by_chunks = 0
    """1 if the method compares consecutive steps; then each chunk starts with the last step of the previous chunk."""
    _internal_batch_size: int | None = None

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        with super()._one_call(arguments) as explainer:
            explainer._internal_batch_size = arguments["internal_batch_size"]
            yield explainer

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        # None disables Captum's chunks, which cut the graph.
        return super()._compute(inputs, {**arguments, "internal_batch_size": None})

    def _attribute(self, *, inputs: tuple[Tensor, ...], n_steps: int, method: str, **arguments: Any) -> Any:
        """Run Captum's computation over all steps at once, or sum it over chunks of them."""
        attribute: Any = super()._attribute  # type: ignore[misc]
        if self._internal_batch_size is None or "step_sizes_and_alphas" in arguments:
            return attribute(inputs=inputs, n_steps=n_steps, method=method, **arguments)
        shared = self._steps_shared_by_chunks
        size = _steps_at_a_time(self._internal_batch_size, len(inputs[0]), 1 + shared)
        step_sizes, alphas = (function(n_steps + shared) for function in approximation_parameters(method))
        total: Any = None
        for start in range(0, n_steps, size - shared):
            chunk = attribute(
                inputs=inputs,
                n_steps=len(alphas[start : start + size]) - shared,
                method=method,
                step_sizes_and_alphas=(step_sizes[start : start + size], alphas[start : start + size]),
                **arguments,
            )
            total = _added(total, chunk if isinstance(chunk, tuple) else (chunk,))
        return total if isinstance(chunk, tuple) else total[0]


def _added(total: tuple[Tensor, ...] | None, chunk: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the sum of the chunks so far; without a graph to keep, the chunk is detached."""
    chunk = chunk if keeps_graph() else tuple(tensor.detach() for tensor in chunk)
    return chunk if total is None else tuple(map(torch.add, total, chunk))


def _steps_at_a_time(internal_batch_size: int, n_examples: int, at_least: int) -> int:
    if internal_batch_size < at_least * n_examples:
        warn(
            f"internal_batch_size={internal_batch_size} is less than {at_least} steps of {n_examples} examples: "
            f"{at_least * n_examples} rows are evaluated at a time.",
        )
    return max(at_least, internal_batch_size // n_examples)


class IntegratedGradients(InSteps, captum.IntegratedGradients):
    """Mean gradient on the path from a baseline to the input (Sundararajan et al. 2017, arXiv 1703.01365).

    The counterpart of `captum.attr.IntegratedGradients`. It is trainable also with an ``internal_batch_size``.

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

    _summary = "Return the integral of the gradient from the baselines to the inputs."
    _between_inputs = True
    _returns = WITH_DELTA


class NoiseTunnel(Trainable, captum.NoiseTunnel):
    """Mean, mean square or variance of an attribution under input noise, as `captum.attr.NoiseTunnel`.

    These are SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825), SmoothGrad squared (Hooker et al. 2018, arXiv
    1806.10758) and VarGrad (Adebayo et al. 2018, arXiv 1810.03292). Torch's global generator draws the noise.

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

    _summary = "Return the attribution of noisy copies of the inputs, summarised."
    _between_inputs = True
    _returns = "What the attribution method returns."

    def _refuse(self, create_graph: bool) -> None:
        if create_graph:
            require_trainable(self.attribution_method)

    def _read(self, arguments: dict[str, Any]) -> None:
        """Check the inputs and the target; the attribution method checks the other arguments."""
        read_inputs(arguments["inputs"])
        if "target" in arguments:
            arguments["target"] = captum_target(arguments["target"])

    def _explain(self, inputs: Tensors, create_graph: bool, arguments: dict[str, Any]) -> Any:
        if self.is_gradient_method:
            return super()._explain(inputs, create_graph, arguments)
        self._refuse(create_graph)
        budget = arguments.pop("memory_budget")
        given = arguments if budget is None else {**arguments, "memory_budget": budget}  # LIME and KernelSHAP take it
        return by_outputs(self, lambda inputs: self._compute(inputs, given), inputs, create_graph)

    def _arguments_of_examples(self, arguments: dict[str, Any]) -> set[str]:
        names: set[str] = self.attribution_method._arguments_of_examples(arguments)
        return names - {"baselines"} if arguments["draw_baseline_from_distrib"] else names

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[NoiseTunnel]:
        yield self  # no copy is needed, because the attribution method copies itself

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        own = inspect.signature(captums_method(NoiseTunnel)).parameters
        return self._smooth(
            inputs,
            arguments["nt_type"],
            _sizes(arguments["nt_samples"], arguments["nt_samples_batch_size"]),
            arguments["stdevs"],
            arguments["draw_baseline_from_distrib"],
            {name: value for name, value in arguments.items() if name not in own},
        )

    def _smooth(
        self,
        inputs: Tensors,
        nt_type: str,
        sizes: list[int],
        stdevs: float | tuple[float, ...],
        draw_baselines: bool,
        arguments: dict[str, Any],
    ) -> Any:
        validate_noise_tunnel_type(nt_type, SUPPORTED_NOISE_TUNNEL_TYPES)
        tensors = format_tensor_into_tuples(inputs)
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
                noisy = tuple(map(_as_precise, noisy, tensors))  # Captum's noise is float32
                parts, is_attribution_tuple, delta = self._compute_partial_attribution(
                    noisy, expanded, isinstance(inputs, tuple), returns_delta
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


def _as_precise(noisy: Tensor, tensor: Tensor) -> Tensor:
    return noisy.to(tensor.dtype) if tensor.is_floating_point() else noisy


def _sizes(n_samples: int, at_a_time: int | None) -> list[int]:
    """Return the number of samples of each chunk."""
    size = n_samples if at_a_time is None else min(n_samples, at_a_time)
    rest = n_samples % size
    return [size] * (n_samples // size) + [rest] * (rest > 0)


class GradientShap(Trainable, captum.GradientShap):
    """Expected gradients between baselines and inputs (Lundberg, Lee 2017; Erion et al. 2021, arXiv 1906.10670).

    The counterpart of `captum.attr.GradientShap`. As in Captum, the noise and the choice of baselines come from torch's
    and NumPy's global generators, and the points between them from NumPy's. To reproduce values, seed both.

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

    _summary = "Return the mean of the gradient at random points between inputs and baselines."
    _between_inputs = True
    _returns = WITH_DELTA
    _takes_distribution = True
    _parameters: ClassVar[dict[str, str]] = OF_A_DISTRIBUTION
    _more: ClassVar[dict[str, Any]] = {"internal_batch_size": None}

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        between = InputBaselineXGradient(self.forward_func, self.multiplies_by_inputs)
        between.gradient_func = self.gradient_func
        return smoothed_over_baselines(between, inputs, **arguments)


def smoothed_over_baselines(
    between: Any, inputs: Tensors, baselines: Any, n_samples: int, internal_batch_size: int | None, **arguments: Any
) -> Any:
    """Return the mean of an attribution over noise and baselines, for `GradientShap` and `LayerGradientShap`."""
    distribution = format_callable_baseline(baselines, inputs)
    if not isinstance(distribution[0], Tensor):
        raise InputError(f"baselines must be a distribution, tensors (n, ...) of n baselines, given: {baselines!r}.")
    if internal_batch_size is not None:
        between = RowsAtATime(between, internal_batch_size)
    return part(NoiseTunnel)(
        NoiseTunnel(between),
        inputs,
        nt_samples=n_samples,
        draw_baseline_from_distrib=True,
        baselines=distribution,
        **arguments,
    )


class RowsAtATime(captum.GradientAttribution):
    """An attribution between inputs and baselines that is evaluated in chunks of rows.

    The result does not depend on the chunk size. The noise and the baselines are drawn before, and NumPy's generator
    draws the points between in the same order for any chunk size.

    Args:
        attribution: one of Captum's attributions whose rows are independent.
        n_rows: rows of a forward pass.
    """

    def __init__(self, attribution: Any, n_rows: int) -> None:
        if n_rows < 1:
            raise InputError(f"internal_batch_size must be at least 1, given: {n_rows}.")
        super().__init__(attribution.forward_func)
        self._attribution = attribution
        self._n_rows = n_rows

    def has_convergence_delta(self) -> bool:
        """Return True."""
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        """True if the attributions are multiplied by the inputs' difference from the baselines."""
        return bool(self._attribution.multiplies_by_inputs)

    @logged
    def attribute(
        self,
        inputs: Tensors,
        baselines: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        **arguments: Any,
    ) -> Any:
        """Return the attribution, and the convergence deltas if asked for.

        Inputs, baselines, targets and additional arguments have one row per sample, because Captum has repeated them.
        """
        tensors = as_tuple(inputs, "inputs")
        found = []
        for rows in slices(len(tensors[0]), self._n_rows):
            of_rows = part(type(self._attribution))(
                self._attribution,
                _rows(inputs, rows),
                _rows(baselines, rows),
                target=target[rows] if _one_per_row(target) else target,
                additional_forward_args=_rows(additional_forward_args, rows),
                return_convergence_delta=return_convergence_delta,
                **arguments,
            )
            found.append(of_rows if keeps_graph() else detached(of_rows))
        return _joined(found)


def _one_per_row(target: Any) -> bool:
    return isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)


def _rows(values: Any, rows: slice) -> Any:
    if isinstance(values, tuple):
        return tuple(_rows(value, rows) for value in values)
    return values[rows] if isinstance(values, Tensor) and values.dim() else values


def detached(values: Any) -> Any:
    """Return tensors, or tuples of them, without a graph."""
    return tuple(map(detached, values)) if isinstance(values, tuple) else values.detach()


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*values, strict=True))
    return torch.cat(values)
