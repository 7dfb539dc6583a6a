"""DeepLIFT and its mean over baselines, of inputs and of layers, trainable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr as captum
import torch
import torch.nn.functional as F
from captum._utils.typing import BaselineType, TargetType
from torch import Tensor, nn

from captum_idexpo.attr._graph import asks_for_graph, by_gradients
from captum_idexpo.attr._hooks import HookedOnce
from captum_idexpo.attr._usage import logged

_POOLS: dict[type[nn.Module], tuple[Callable[..., Any], Callable[..., Any]]] = {
    nn.MaxPool1d: (F.max_pool1d, F.max_unpool1d),
    nn.MaxPool2d: (F.max_pool2d, F.max_unpool2d),
    nn.MaxPool3d: (F.max_pool3d, F.max_unpool3d),
}


class RescaleRule(HookedOnce):
    """DeepLIFT's multipliers of non-linear modules, with a graph.

    Captum's rules take inputs and outputs of these modules for constants, and MaxPool's runs without gradients. Modules
    have to be used once each, and to be of the types that Captum knows.
    """

    eps: float

    def _forget(self) -> None:
        self.forward_handles: list[Any] = []
        self.backward_handles: list[Any] = []
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._pass = torch._C._current_graph_task_id()

    def _forward_pre_hook(self, module: nn.Module, inputs: Any) -> None:
        self._see(module, inputs)

    def _forward_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._see(module, outputs)

    def _see(self, module: nn.Module, tensors: Any) -> None:
        if torch._C._current_graph_task_id() != self._pass:
            return  # the backward pass computes a checkpointed part again
        # A copy, since the module may work in place.
        self._seen.setdefault(module, []).append((tensors[0] if isinstance(tensors, tuple) else tensors).clone())

    def _backward_hook(self, module: nn.Module, grad_input: Tensor, grad_output: Tensor) -> Tensor | None:
        if not self._active:
            return None
        if len(self._seen.get(module, [])) != 2:
            raise RuntimeError(
                f"{module} is used more than once in the forward pass, where DeepLIFT has no rule: give each use a "
                "module of its own."
            )
        inputs, outputs = self._seen.pop(module)
        return _multiplied(module, inputs, outputs, grad_input, grad_output, self.eps)

    def _attribute(
        self,
        attribute: Callable[..., Any],
        inputs: Any,
        create_graph: bool,
        return_convergence_delta: bool,
        **arguments: Any,
    ) -> Any:
        """One of Captum's bodies, with the rules of this class."""
        with self.for_one_call() as explainer:
            compute = partial(attribute, explainer, return_convergence_delta=return_convergence_delta, **arguments)
            # The hooks of modules before a layer, too, want tensors that require gradient.
            return by_gradients(
                self, compute, inputs, create_graph, of_inputs=True, with_delta=return_convergence_delta
            )


def _multiplied(
    module: nn.Module, inputs: Tensor, outputs: Tensor, grad_input: Tensor, grad_output: Tensor, eps: float
) -> Tensor:
    """The output's gradient times the module's multipliers; of the first half of the rows and of their baselines."""
    delta_in = inputs.chunk(2)[0] - inputs.chunk(2)[1]
    delta_in = torch.cat([delta_in, delta_in])
    # Where nothing changes the gradient stands in. Dividing by 1 there keeps the quotient's own gradient finite.
    unchanged = delta_in.abs() < eps
    divisor = torch.where(unchanged, 1, delta_in)
    if type(module) in _POOLS:
        return torch.where(unchanged, grad_input, _unpooled(module, inputs, outputs, grad_output) / divisor)
    delta_out = outputs.chunk(2)[0] - outputs.chunk(2)[1]
    multiplied = torch.where(unchanged, grad_input, grad_output * torch.cat([delta_out, delta_out]) / divisor)
    if isinstance(module, nn.Softmax):
        return multiplied - multiplied.sum() / multiplied.numel()  # Captum's normalisation, over all rows
    return multiplied


def _unpooled(module: Any, inputs: Tensor, outputs: Tensor, grad_output: Tensor) -> Tensor:
    """What a pool's outputs gained over those of the baselines, given back to where the maxima were."""
    pool, unpool = _POOLS[type(module)]
    output, reference = outputs.chunk(2)
    greater = torch.maximum(output, reference)
    gained = torch.cat([greater - reference, output - greater])
    with torch.no_grad():
        _, indices = pool(
            inputs,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.ceil_mode,
            True,
        )
    spread = unpool(
        grad_output * gained, indices, module.kernel_size, module.stride, module.padding, list(inputs.shape)
    )
    both = spread.chunk(2)[0] + spread.chunk(2)[1]
    return torch.cat([both, both])


class DeepLift(RescaleRule, captum.DeepLift):
    """DeepLIFT with the rescale rule (Shrikumar et al. 2017, arXiv 1704.02685), `captum.attr.DeepLift`.

    Captum's attribution requires gradient, too, but its multipliers are constants. Where a MaxPool's input equals its
    baseline, the gradient of that very example stands in; Captum takes the first example's for all.

    Args:
        model: a module whose non-linear modules are used once each.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.
        eps: differences below this count as none.

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

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """What each input contributes to the output's difference from that on the baselines.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: what the inputs are compared with: None (zero), a number, a tensor that broadcasts, or a tuple of
                these.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            return_convergence_delta: also return by how much the attribution misses the outputs' difference, ``(B,)``,
                detached.
            custom_attribution_func: (multipliers, inputs, baselines) -> attributions, tuples of tensors.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; or a pair of that and the convergence delta.

        Raises:
            RuntimeError: create_graph where no graph can exist; a module used twice; `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        return self._attribute(
            super().attribute.__wrapped__,
            inputs,
            create_graph,
            return_convergence_delta,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class DeepLiftShap(RescaleRule, captum.DeepLiftShap):
    """DeepLIFT's mean over a distribution of baselines (Lundberg, Lee 2017, arXiv 1705.07874).

    `captum.attr.DeepLiftShap`.

    Args:
        model: a module whose non-linear modules are used once each.
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

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        target: TargetType = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean contribution over baselines, tensors ``(n, ...)`` with n > 1 or a callable that returns them.

        The other arguments, the result and the errors as for `DeepLift`; the convergence delta is ``(B * n,)``.
        """
        return self._attribute(
            super().attribute.__wrapped__,
            inputs,
            create_graph,
            return_convergence_delta,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class LayerDeepLift(RescaleRule, captum.LayerDeepLift):
    """DeepLIFT of a layer's activations, `captum.attr.LayerDeepLift`.

    Args:
        model: a module whose non-linear modules are used once each.
        layer: the module whose output (or input) is explained.
        multiply_by_inputs: multiply by the activations' difference from those of the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerDeepLift
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> LayerDeepLift(model, model[0]).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """What each activation contributes to the output's difference from that on the baselines.

        Arguments and errors as for `DeepLift` and `LayerGradCam`. Returns one value an activation, and the convergence
        delta if asked for.
        """
        return self._attribute(
            super().attribute.__wrapped__,
            inputs,
            asks_for_graph(create_graph, grad_kwargs),
            return_convergence_delta,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            custom_attribution_func=custom_attribution_func,
            grad_kwargs=grad_kwargs,
        )


class LayerDeepLiftShap(RescaleRule, captum.LayerDeepLiftShap):
    """DeepLIFT of a layer's activations, the mean over a distribution of baselines, `captum.attr.LayerDeepLiftShap`.

    Args:
        model: a module whose non-linear modules are used once each.
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

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        target: TargetType = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean contribution of each activation over baselines, tensors ``(n, ...)`` with n > 1 or a callable.

        The other arguments, the result and the errors as for `LayerDeepLift`.
        """
        return self._attribute(
            super().attribute.__wrapped__,
            inputs,
            create_graph,
            return_convergence_delta,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            custom_attribution_func=custom_attribution_func,
        )
