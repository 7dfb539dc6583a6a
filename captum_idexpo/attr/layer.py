"""Attributions of a layer, trainable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import captum.attr as captum
from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
)
from captum._utils.gradient import _forward_layer_eval
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.layer.layer_gradient_shap import LayerInputBaselineXGradient
from torch import Tensor, nn

from captum_idexpo._core.checkpointing import refused_inside
from captum_idexpo.attr._graph import asks_for_graph, by_gradients, by_outputs, keeps_graph, with_gradients
from captum_idexpo.attr._usage import logged, part
from captum_idexpo.attr.ablation import FeatureAblation
from captum_idexpo.attr.gradients import IntegratedGradients, smoothed_over_baselines
from captum_idexpo.attr.path import InSteps

Layers = nn.Module | list[nn.Module]


class LayerGradCam(captum.LayerGradCam):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), `captum.attr.LayerGradCam` with its true gradient.

    Same arguments and same numbers as Captum's class. With ``create_graph=True`` the channel weights keep their graph:
    a loss on the map has its second-order term in the weights, which Captum's default silently leaves out.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradCam
        >>> conv, head = torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(2, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
        >>> map = LayerGradCam(model, conv).attribute(torch.randn(4, 1, 8, 8), target=0, create_graph=True)
        >>> map.shape
        torch.Size([4, 1, 6, 6])
        >>> map.square().sum().backward()  # reaches the head through the channel weights
        >>> bool(head.weight.grad[0].ne(0).all())
        True
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The layer's activations, weighted by the mean gradient of the target over each channel.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            attribute_to_layer_input: explain the layer's input instead of its output.
            relu_attributions: keep the positive part only, eq. (13) of ID-ExpO (arXiv 2310.12553).
            attr_dim_summation: sum over the channels; else return ``(B, C, ...)``.
            grad_kwargs: further arguments of `torch.autograd.grad`; ``{"create_graph": True}`` counts as create_graph.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            ``(B, 1, h, w)`` for a layer of ``(B, C, h, w)``, a tuple where the layer's output is one.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on a target that does not fit.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self,
            target=target,
            additional_forward_args=additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            relu_attributions=relu_attributions,
            attr_dim_summation=attr_dim_summation,
            grad_kwargs=grad_kwargs,
        )
        return by_gradients(self, compute, inputs, asks_for_graph(create_graph, grad_kwargs))


class LayerGradientXActivation(captum.LayerGradientXActivation):
    """A layer's activation times the target's gradient in it, `captum.attr.LayerGradientXActivation`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module, or list of modules, whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the activations; else return the gradient.
        memory_efficient: move what is returned to the CPU early; has no graph.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradientXActivation
        >>> embedding = torch.nn.Embedding(10, 4)
        >>> model = torch.nn.Sequential(embedding, torch.nn.Flatten(), torch.nn.Linear(12, 2), torch.nn.Tanh())
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> attribution = LayerGradientXActivation(model, embedding).attribute(tokens, target=1, create_graph=True)
        >>> attribution.shape
        torch.Size([2, 3, 4])
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The layer's activations times the gradient of the target in them.

        Arguments and errors as for `LayerGradCam`. Returns one value an activation, a list for a list of layers.
        """
        create_graph = asks_for_graph(create_graph, grad_kwargs)
        if create_graph and self._memory_efficient:
            raise RuntimeError(
                "memory_efficient=True detaches the activations, so there can be no graph: leave it out to train."
            )
        compute = partial(
            super().attribute.__wrapped__,
            self,
            target=target,
            additional_forward_args=additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        return by_gradients(self, compute, inputs, create_graph)


class LayerActivation(captum.LayerActivation):
    """A layer's activations, `captum.attr.LayerActivation`.

    Args:
        forward_func: takes the inputs and the additional arguments.
        layer: the module, or list of modules, whose output (or input) is returned.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerActivation
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
        >>> LayerActivation(model, model[0]).attribute(torch.randn(5, 3), create_graph=True).sum().backward()
        >>> model[0].bias.grad
        tensor([5., 5., 5., 5.])
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The layer's activations; arguments and errors as for `LayerGradCam`, a list for a list of layers."""

        def compute(inputs: Any) -> Any:
            evaluated = _forward_layer_eval(
                self.forward_func,
                inputs,
                self.layer,
                additional_forward_args,
                device_ids=self.device_ids,
                attribute_to_layer_input=attribute_to_layer_input,
                grad_enabled=keeps_graph(),
            )
            if isinstance(self.layer, nn.Module):
                return _format_output(len(evaluated) > 1, evaluated)
            return [_format_output(len(single) > 1, single) for single in evaluated]

        return by_outputs(self, compute, inputs, create_graph)


class LayerConductance(InSteps, captum.LayerConductance):
    """The integrated gradient that flows through a layer (Dhamdhere et al. 2018, arXiv 1805.12233).

    `captum.attr.LayerConductance`, whose ``grad_kwargs`` are accepted and never used, so that its gradient is wrong.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerConductance
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> conductance = LayerConductance(model, model[1]).attribute(torch.randn(5, 3), target=1, create_graph=True)
        >>> conductance.shape
        torch.Size([5, 4])
        >>> conductance.square().sum().backward()
    """

    _steps_shared_by_chunks = 1

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
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The activations' gradient, summed over their changes on the way from the baselines to the inputs.

        Arguments and errors as for `IntegratedGradients` and `LayerGradCam`. Returns one value an activation, and the
        convergence delta if asked for.
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
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        create_graph = asks_for_graph(create_graph, grad_kwargs)
        return by_gradients(self, compute, inputs, create_graph, with_delta=return_convergence_delta)


class InternalInfluence(InSteps, captum.InternalInfluence):
    """The mean gradient of a layer on the way from a baseline (Leino et al. 2018, arXiv 1802.03788).

    `captum.attr.InternalInfluence`, trainable also with an ``internal_batch_size``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import InternalInfluence
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> influence = InternalInfluence(model, model[0]).attribute(torch.randn(5, 3), target=1, create_graph=True)
        >>> influence.square().sum().backward()
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
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean gradient of the layer's activations from the baselines to the inputs.

        Arguments and errors as for `IntegratedGradients` and `LayerGradCam`. Returns one value an activation.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self.in_steps_of(internal_batch_size),
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        return by_gradients(self, compute, inputs, asks_for_graph(create_graph, grad_kwargs))


class LayerIntegratedGradients(captum.LayerIntegratedGradients):
    """Integrated gradients of a layer's activations, from those of the baselines, as for token embeddings.

    `captum.attr.LayerIntegratedGradients`, trainable also with an ``internal_batch_size``.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module, or list of modules, whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the activations' difference from those of the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerIntegratedGradients
        >>> embedding = torch.nn.Embedding(10, 4)
        >>> model = torch.nn.Sequential(embedding, torch.nn.Flatten(), torch.nn.Linear(12, 2), torch.nn.Tanh())
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> attribution = LayerIntegratedGradients(model, embedding).attribute(
        ...     tokens, baselines=torch.zeros_like(tokens), target=1, create_graph=True
        ... )
        >>> attribution.sum(dim=-1).shape  # one value a token
        torch.Size([2, 3])
        >>> attribution.square().sum().backward()
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, multiply_by_inputs)
        self.ig = IntegratedGradients(forward_func, multiply_by_inputs)

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
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The integral of the gradient from the baselines' activations to the inputs'.

        Arguments and errors as for `IntegratedGradients` and `LayerGradCam`; a layer inside a part that is run by
        `torch.utils.checkpoint` is an error. Returns one value an activation, a list for a list of layers, and the
        convergence delta if asked for.
        """
        integrate: Callable[..., Any] = super().attribute.__wrapped__

        def compute(inputs: Any) -> Any:
            with _outside_checkpoints(self.layer, attribute_to_layer_input):
                return integrate(
                    _evaluated_with_gradients(self),
                    inputs,
                    baselines=baselines,
                    target=target,
                    additional_forward_args=additional_forward_args,
                    n_steps=n_steps,
                    method=method,
                    internal_batch_size=internal_batch_size,
                    return_convergence_delta=return_convergence_delta,
                    attribute_to_layer_input=attribute_to_layer_input,
                    grad_kwargs=grad_kwargs,
                )

        create_graph = asks_for_graph(create_graph, grad_kwargs)
        return by_gradients(self, compute, inputs, create_graph, with_delta=return_convergence_delta)


class LayerGradientShap(captum.LayerGradientShap):
    """Expected gradients of a layer's activations, `captum.attr.LayerGradientShap`; random numbers as `GradientShap`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the activations' difference from those of the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradientShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = LayerGradientShap(model, model[1]).attribute(
        ...     torch.randn(5, 3), baselines=torch.zeros(1, 3), target=1, create_graph=True
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
        attribute_to_layer_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean gradient of the activations at random points between inputs and baselines.

        Arguments and errors as for `GradientShap` and `LayerGradCam`. Returns one value an activation, and the
        convergence delta if asked for.
        """

        def compute(inputs: Any) -> Any:
            between = LayerInputBaselineXGradient(
                with_gradients(self.forward_func), self.layer, self.device_ids, self.multiplies_by_inputs
            )
            return smoothed_over_baselines(
                between,
                inputs,
                baselines,
                nt_samples=n_samples,
                stdevs=stdevs,
                target=target,
                additional_forward_args=additional_forward_args,
                return_convergence_delta=return_convergence_delta,
                attribute_to_layer_input=attribute_to_layer_input,
            )

        return by_gradients(self, compute, inputs, create_graph, with_delta=return_convergence_delta)


class LayerFeatureAblation(captum.LayerFeatureAblation):
    """What the output loses when parts of a layer's activations are replaced, `captum.attr.LayerFeatureAblation`.

    Args:
        forward_func: takes the inputs and the additional arguments; must not be a DataParallel of several devices.
        layer: the module whose output (or input) is explained.
        device_ids: kept for Captum's signature.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerFeatureAblation
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = LayerFeatureAblation(model, model[1]).attribute(torch.randn(5, 3), target=1)
        >>> attribution.shape
        torch.Size([5, 4])
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        layer_mask: Tensor | tuple[Tensor, ...] | None = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The output minus that with each part of the activations replaced by its baseline.

        Arguments and errors as for `FeatureAblation`, baselines and mask being the layer's; create_graph with a layer
        inside a part that is run by `torch.utils.checkpoint` is an error. Returns one value an activation.
        """

        def compute(inputs: Any) -> Any:
            originals = _format_tensor_into_tuples(inputs) + (
                _format_additional_forward_args(additional_forward_args) or ()
            )
            activations = _forward_layer_eval(
                self.forward_func,
                originals,
                self.layer,
                attribute_to_layer_input=attribute_to_layer_input,
                grad_enabled=keeps_graph(),
            )

            def forward(*arguments: Any) -> Any:
                replacements, rest = arguments[: len(activations)], arguments[len(activations) :]
                outside = _outside_checkpoints(self.layer, attribute_to_layer_input)
                with (
                    outside if keeps_graph() else nullcontext(),
                    _replaced(self.layer, replacements, attribute_to_layer_input),
                ):
                    return self.forward_func(*rest)

            return part(FeatureAblation)(
                FeatureAblation(forward),
                activations if len(activations) > 1 else activations[0],
                baselines=layer_baselines,
                target=target,
                additional_forward_args=originals,
                feature_mask=layer_mask,
                perturbations_per_eval=perturbations_per_eval,
            )

        return by_outputs(self, compute, inputs, create_graph)


def _evaluated_with_gradients(explainer: Any) -> Any:
    """The explainer for one call, its layer evaluated with gradients although Captum switches these off."""
    explainer = copy.copy(explainer)
    explainer.forward_func = with_gradients(explainer.forward_func)
    return explainer


@contextmanager
def _replaced(layer: nn.Module, tensors: tuple[Tensor, ...], its_input: bool) -> Iterator[None]:
    """Puts tensors in place of a layer's output, or of its input, in the form that the layer has it."""

    def in_form_of(original: Any) -> Any:
        return tensors if isinstance(original, tuple) else tensors[0]

    if its_input:
        handle = layer.register_forward_pre_hook(lambda _module, args: in_form_of(args))
    else:
        handle = layer.register_forward_hook(lambda _module, _args, output: in_form_of(output))
    try:
        yield
    finally:
        handle.remove()


def _outside_checkpoints(layers: Layers, its_input: bool) -> Any:
    """Refuses layers whose tensors are replaced inside a checkpointed part of a model."""
    why = (
        "without what this attribution puts in place of its tensors: turn checkpointing off while explaining "
        "(`model.gradient_checkpointing_disable()` in transformers), or choose a layer outside."
    )
    return refused_inside(layers if isinstance(layers, list) else [layers], why, output_only=not its_input)
