"""Trainable DeepLIFT and its mean over baselines, for inputs and for layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import captum.attr as captum
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_idexpo._core.captum import format_callable_baseline
from captum_idexpo._core.errors import InputError, warn
from captum_idexpo._core.inputs import Tensors, as_tuple
from captum_idexpo._core.modes import depends_on_batch, precision
from captum_idexpo.attr._graph import keeps_graph
from captum_idexpo.attr._hooks import change_gradient
from captum_idexpo.attr._trainable import ForwardFunction, Tap, Trainable
from captum_idexpo.attr.gradients import OF_A_DISTRIBUTION, WITH_DELTA, detached
from captum_idexpo.attr.guided import quietly
from captum_idexpo.attr.layer import PER_ACTIVATION_WITH_DELTA, OfLayer

_POOLS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
}
# Modules that need no rule. Most are linear in their input, up to a constant.
_LINEAR = (
    nn.Linear,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.conv._ConvNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Fold,
    nn.Unfold,
)
_LARGE = 0.01
"""A warning is given if the attributions miss more than this share of the largest output difference."""


class RescaleRule(Trainable):
    """DeepLIFT's multipliers of non-linear modules, with a graph.

    Captum's rules treat inputs and outputs of these modules as constants, and its rule for MaxPool runs without
    gradients. Each module must be used once, and its type must be one that Captum has a rule for.
    """

    _parameters: ClassVar[dict[str, str]] = {
        "baselines": "what the inputs are compared with: None (zero), a number, a tensor of the inputs' shape or with "
        "a batch axis of size 1, or a tuple of these."
    }
    _modules_only = True
    _complete = False
    """True if the attributions must add up to the outputs' difference."""
    _of_outputs = True
    """True if the attributions explain the model's outputs, False if they explain a neuron."""
    eps: float
    model: nn.Module
    _seen: dict[nn.Module, list[Tensor]]
    _uncovered: dict[nn.Module, None]
    _outputs: Tensor | None
    _pass: int
    forward_handles: list[Any]
    backward_handles: list[Any]
    multiplies_by_inputs: bool

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        with super()._one_call(arguments) as explainer, quietly():
            explainer.forward_handles, explainer.backward_handles = [], []
            explainer._seen, explainer._uncovered, explainer._outputs = {}, {}, None
            explainer._pass = torch._C._current_graph_task_id()
            # This hook must run before Captum's hook, which splits the output.
            check = self._output_check(arguments if self._of_outputs else {})
            handle = self.model.register_forward_hook(lambda _module, _arguments, output: check(output))
            tap = getattr(explainer, "layer", None)
            explainer.forward_func = ForwardFunction(self.model)  # used for the convergence delta, without a tap
            try:
                # The tap's hooks come before those of the rules, because the layer's input comes before its rule.
                with tap.in_place() if isinstance(tap, Tap) else nullcontext():
                    yield explainer
            finally:
                handle.remove()
                explainer._seen.clear()

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        result = super()._compute(inputs, arguments)
        contributions = self.multiplies_by_inputs and arguments["custom_attribution_func"] is None
        if contributions and self._outputs is not None:
            self._warn_of_gap(result[0] if arguments["return_convergence_delta"] else result)
        return result

    def _construct_forward_func(self, *arguments: Any) -> Callable[[], Tensor]:
        """Return Captum's forward function of inputs and baselines, which also stores the output in `_outputs`."""
        forward: Any = super()._construct_forward_func(*arguments)  # type: ignore[misc]

        def noted() -> Tensor:
            tap = getattr(self, "layer", None)
            with tap.called_once() if isinstance(tap, Tap) else nullcontext():
                output: Tensor = forward()
            self._outputs = output.detach() if self._complete and self._of_outputs else None
            return output

        noted.__dict__.update(vars(forward))  # Captum reads the `device_ids` of a DataParallel
        return noted

    def _register_hooks(self, module: nn.Module, attribute_to_layer_input: bool = True) -> None:
        """Set the rule of a module; Captum calls this for each module of the model."""
        handles = self.forward_handles
        if self._can_register_hook(module):  # type: ignore[attr-defined]
            handles.append(module.register_forward_pre_hook(self._see))
            change_gradient(module, self._rule, handles)
            handles.append(module.register_forward_hook(lambda module, _, output: self._see(module, output)))
        if self._has_a_gap(module):
            handles.append(module.register_forward_hook(lambda module, *_: self._uncovered.update({module: None})))

    def _has_a_gap(self, module: nn.Module) -> bool:
        """Return True if a module has no rule, or if contributions do not add up under its rule."""
        if isinstance(module, nn.Softmax) or depends_on_batch(module):
            return True
        ruled = self._can_register_hook(module)  # type: ignore[attr-defined]
        return not (ruled or list(module.children()) or isinstance(module, _LINEAR))

    def _see(self, module: nn.Module, tensors: Any) -> None:
        if torch._C._current_graph_task_id() != self._pass:
            return  # the backward pass recomputes a checkpointed part, which must not be recorded twice
        # A copy is stored, because the module may work in place.
        tensor = tensors[0] if isinstance(tensors, tuple) else tensors
        self._seen.setdefault(module, []).append(tensor.clone())

    def _rule(self, module: nn.Module, grad_input: Tensor, grad_output: Tensor) -> Tensor:
        seen = self._seen.pop(module, [])
        if len(seen) != 2:
            raise InputError(
                f"{module} is used more than once in the forward pass, where DeepLIFT has no rule: give each use a "
                "module of its own."
            )
        inputs, outputs = seen
        wide = torch.promote_types(grad_output.dtype, torch.float32)  # half precision would overflow in the quotients
        inputs, outputs = inputs.to(wide), outputs.to(wide)
        return _multiplied(module, inputs, outputs, grad_input.to(wide), grad_output.to(wide), self.eps).to(
            grad_input.dtype
        )

    def _warn_of_gap(self, attribution: Any) -> None:
        """Warn if the attributions do not add up to the outputs' difference and name the modules without a rule."""
        assert self._outputs is not None
        tensors = as_tuple(attribution, "attribution")
        sums = torch.stack([tensor.detach().reshape(len(tensor), -1).sum(dim=1) for tensor in tensors]).sum(dim=0)
        output, reference = self._outputs.chunk(2)
        if not len(sums) or output.numel() % len(sums):
            return
        difference = (output - reference).reshape(len(sums), -1).mean(dim=1)  # over the baselines
        gap, scale = (sums - difference).abs().max(), difference.abs().max()
        is_double = output.dtype == torch.float64
        eps = torch.finfo(output.dtype if is_double else precision(output.device)).eps  # autocast may lower precision
        rounding = 16 * max(eps, torch.finfo(output.dtype).eps) * output.abs().max()
        if not bool(gap > _LARGE * scale + rounding):
            return
        names = dict.fromkeys(
            type(module).__name__ + " in training mode" * depends_on_batch(module) for module in self._uncovered
        )
        what = ", ".join(names) if names else "functions that are no modules (torch.nn.functional, products)"
        warn(
            f"The attributions of {type(self).__name__} miss the outputs' difference by up to {float(gap):.3g} of "
            f"{float(scale):.3g}: DeepLIFT has no rule that adds up for {what}. Use modules that it has one for (ReLU, "
            "ELU, LeakyReLU, Softplus, Sigmoid, Tanh, MaxPool), or IntegratedGradients, which adds up for any model."
        )


def _multiplied(
    module: nn.Module, inputs: Tensor, outputs: Tensor, grad_input: Tensor, grad_output: Tensor, eps: float
) -> Tensor:
    """Return the gradient with respect to the output times the module's multipliers, for inputs and baselines."""
    delta_in = inputs.chunk(2)[0] - inputs.chunk(2)[1]
    delta_in = torch.cat([delta_in, delta_in])
    # Unchanged elements use the plain gradient. Dividing by 1 there keeps the gradient of the quotient finite.
    unchanged = (delta_in.abs() < eps) | (delta_in == 0)
    divisor = torch.where(unchanged, 1, delta_in)
    if type(module) in _POOLS:
        return torch.where(unchanged, grad_input, _unpooled(module, inputs, outputs, grad_output) / divisor)
    delta_out = outputs.chunk(2)[0] - outputs.chunk(2)[1]
    multiplied = torch.where(unchanged, grad_input, grad_output * (torch.cat([delta_out, delta_out]) / divisor))
    if isinstance(module, nn.Softmax):
        axis = module.dim if module.dim is not None else 0 if inputs.dim() in (1, 3) else 1  # torch's default axis
        return multiplied - multiplied.mean(dim=axis, keepdim=True)
    return multiplied


def _unpooled(module: Any, inputs: Tensor, outputs: Tensor, grad_output: Tensor) -> Tensor:
    """Return the gradient times the change of a pool's outputs, scattered to the locations of the maxima."""
    output, reference = outputs.chunk(2)
    greater = torch.maximum(output, reference)
    gained = torch.cat([greater - reference, output - greater])
    settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    with torch.no_grad():
        _, indices = _POOLS[type(module)](inputs, *settings, return_indices=True)
    n_axes = inputs.dim() - 2
    # Overlapping windows may share their maximum, so values are added.
    spread = torch.zeros_like(inputs).flatten(-n_axes)
    spread = spread.scatter_add(-1, indices.flatten(-n_axes), (grad_output * gained).flatten(-n_axes))
    of_inputs, of_baselines = spread.view_as(inputs).chunk(2)
    both = of_inputs + of_baselines
    return torch.cat([both, both])


class DeepLift(RescaleRule, captum.DeepLift):
    """DeepLIFT with the rescale rule (Shrikumar et al. 2017, arXiv 1704.02685), as `captum.attr.DeepLift`.

    Captum's attribution also requires grad, but its multipliers are constants. Captum's attributions do not add up if
    non-linear modules follow each other or pooling windows overlap. Those of this class do. GELU, SiLU, LayerNorm and
    similar modules have no rule; their plain gradients are used. The rule for Softmax does not add up. If the gap is
    large, a warning names these modules.

    Args:
        model: a module. Each of its non-linear modules must be used once.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.
        eps: differences of a module's inputs below this value count as zero.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import DeepLift
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> attribution = DeepLift(model).attribute(x, target=1, create_graph=True)
        >>> gap = (model(x) - model(torch.zeros_like(x)))[:, 1]
        >>> torch.allclose(attribution.sum(dim=1), gap, atol=1e-5)
        True
        >>> attribution.square().sum().backward()
    """

    _summary = "Return what each input contributes to the output's difference from that on the baselines."
    _returns = WITH_DELTA
    _of_inputs = True
    _complete = True


class OverBaselines(RescaleRule):
    """The mean of DeepLIFT over a distribution of baselines, in forward passes of ``internal_batch_size`` rows."""

    _takes_distribution = True
    _parameters: ClassVar[dict[str, str]] = {
        **OF_A_DISTRIBUTION,
        "internal_batch_size": "rows of a forward pass, of which two or three baselines of the batch need 4 to 6 B; "
        "None: all at once.",
    }
    _more: ClassVar[dict[str, Any]] = {"internal_batch_size": None}

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        arguments = dict(arguments)
        n_rows, baselines = arguments.pop("internal_batch_size", None), arguments.pop("baselines")
        baselines = format_callable_baseline(baselines, inputs)
        if n_rows is None or not isinstance(baselines[0], Tensor):
            return super()._compute(inputs, {**arguments, "baselines": baselines})
        n_examples, n_baselines = len(as_tuple(inputs, "inputs")[0]), len(baselines[0])
        parts = []
        for chunk in _chunks_of_baselines(n_baselines, n_rows, n_examples):
            some = tuple(baseline[chunk] for baseline in baselines)
            part = super()._compute(inputs, {**arguments, "baselines": some})
            share = len(some[0]) / n_baselines
            parts.append((share, part if keeps_graph() else detached(part)))
        if not arguments["return_convergence_delta"]:
            return _mean(parts)
        deltas = torch.cat([delta.view(n_examples, -1) for _, (_, delta) in parts], dim=1)
        return _mean([(share, attribution) for share, (attribution, _) in parts]), deltas.flatten()


def _chunks_of_baselines(n_baselines: int, n_rows: int, n_examples: int) -> list[slice]:
    """Return slices of the baselines so that a forward pass has about ``n_rows`` rows.

    A slice has at least two baselines, because Captum needs two.
    """
    if n_rows < 1:
        raise InputError(f"internal_batch_size must be at least 1, given: {n_rows}.")
    at_a_time = max(2, n_rows // (2 * n_examples))
    if n_rows < 4 * n_examples:
        warn(
            f"internal_batch_size={n_rows} is less than two baselines of {n_examples} examples: {4 * n_examples} rows "
            "are evaluated at a time."
        )
    n_chunks = min(-(-n_baselines // at_a_time), max(1, n_baselines // 2))
    ends = [n_baselines * number // n_chunks for number in range(n_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _mean(parts: list[tuple[float, Any]]) -> Any:
    """Return the sum of the attributions, weighted by their shares."""
    if isinstance(parts[0][1], tuple):
        columns = zip(*(part for _, part in parts), strict=True)
        return tuple(
            _mean([(share, tensor) for (share, _), tensor in zip(parts, column, strict=True)]) for column in columns
        )
    return sum(share * tensor for share, tensor in parts)


class DeepLiftShap(OverBaselines, captum.DeepLiftShap):
    """Mean of DeepLIFT over a distribution of baselines (Lundberg, Lee 2017, arXiv 1705.07874).

    The counterpart of `captum.attr.DeepLiftShap`.

    Args:
        model: a module. Each of its non-linear modules must be used once.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import DeepLiftShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> attribution = DeepLiftShap(model).attribute(
        ...     torch.randn(5, 3), baselines=torch.randn(10, 3), target=1, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    _summary = "Return the mean contribution of each input over a distribution of baselines."
    _returns = WITH_DELTA
    _of_inputs = True
    _complete = True


class LayerDeepLift(RescaleRule, OfLayer, captum.LayerDeepLift):
    """DeepLIFT of a layer's activations, as `captum.attr.LayerDeepLift`.

    Args:
        model: a module. Each of its non-linear modules must be used once.
        layer: the module whose output (or input) is explained.
        multiply_by_inputs: multiply by the activations' difference from those of the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerDeepLift
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> LayerDeepLift(model, model[0]).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

    _summary = "Return what each activation contributes to the output's difference from that on the baselines."
    _returns = PER_ACTIVATION_WITH_DELTA


class LayerDeepLiftShap(OverBaselines, OfLayer, captum.LayerDeepLiftShap):
    """Mean of a layer's DeepLIFT over a distribution of baselines, as `captum.attr.LayerDeepLiftShap`.

    Args:
        model: a module. Each of its non-linear modules must be used once.
        layer: the module whose output (or input) is explained.
        multiply_by_inputs: multiply by the activations' difference from those of the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerDeepLiftShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = LayerDeepLiftShap(model, model[0]).attribute(
        ...     torch.randn(5, 3), baselines=torch.randn(10, 3), target=1, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    _summary = "Return the mean contribution of each activation over a distribution of baselines."
    _returns = PER_ACTIVATION_WITH_DELTA
