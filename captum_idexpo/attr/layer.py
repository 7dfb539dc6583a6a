"""Trainable attributions of layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import captum.attr as captum
from torch import Tensor, nn

from captum_idexpo._core.captum import (
    LayerInputBaselineXGradient,
    compute_layer_gradients_and_eval,
    format_additional_forward_args,
    format_output,
    format_tensor_into_tuples,
    forward_layer_eval,
)
from captum_idexpo._core.inputs import Tensors
from captum_idexpo._core.modes import refused_inside_checkpoints
from captum_idexpo.attr._graph import keeps_graph
from captum_idexpo.attr._trainable import Tap, Trainable, part
from captum_idexpo.attr.ablation import FeatureAblation, FeaturePermutation
from captum_idexpo.attr.gradients import OF_A_DISTRIBUTION, InSteps, IntegratedGradients, smoothed_over_baselines
from captum_idexpo.attr.layouts import ReshapeTransform, reshaped

Layers = nn.Module | list[nn.Module]
PER_ACTIVATION = "One value per activation, a tuple if the layer has several tensors, a list for a list of layers."
PER_ACTIVATION_WITH_DELTA = "One value per activation; or a pair of that and the convergence delta."
OF_A_LAYERS_FEATURES = {
    "layer_baselines": "what a feature is replaced by: None (zero), a number, a tensor that broadcasts to the "
    "activations, or a tuple of these.",
    "layer_mask": "whole numbers, equal ones for the activations of one feature; None: every activation is a feature.",
    "perturbations_per_eval": "features replaced in one forward pass; None: chosen automatically.",
}


class OfLayer(Trainable):
    """Base class of attributions of a layer, or of a neuron in a layer. A `Tap` replaces the layer."""

    _hands_on_copies = False
    layer: Any
    device_ids: list[int] | None

    def _tapped(self, arguments: dict[str, Any]) -> tuple[Tap, ...]:
        several = isinstance(self.layer, list)
        layers = self.layer if several else [self.layer]
        taps = [Tap(layer, _of_its_input(arguments), self._hands_on_copies) for layer in layers]
        self.layer = taps if several else taps[0]
        return tuple(taps)

    def _activations(self, inputs: Tensors, arguments: dict[str, Any], additional_forward_args: object = None) -> Any:
        """Return the layer's tensors as a tuple, or a list of tuples for a list of layers."""
        return forward_layer_eval(
            self.forward_func,
            inputs,
            self.layer,
            additional_forward_args,
            device_ids=self.device_ids,
            attribute_to_layer_input=_of_its_input(arguments),
            grad_enabled=keeps_graph(),
        )

    def _of_activations(self, ablation: type, inputs: Tensors, arguments: dict[str, Any], **features: Any) -> Any:
        """Return an ablation of the layer's activations."""
        additional = format_additional_forward_args(arguments["additional_forward_args"]) or ()
        originals = format_tensor_into_tuples(inputs) + additional
        activations = self._activations(originals, arguments)
        tap, forward_func = self.layer, self.forward_func
        layer = tap.__dict__["layer"]

        def forward(*given: Any) -> Any:
            tap.replacement = given[: len(activations)]
            outside = _outside_checkpoints(layer, _of_its_input(arguments))
            with outside if keeps_graph() else nullcontext():
                return forward_func(*given[len(activations) :])

        return part(ablation)(
            ablation(forward),
            activations if len(activations) > 1 else activations[0],
            target=arguments["target"],
            additional_forward_args=originals,
            perturbations_per_eval=arguments["perturbations_per_eval"],
            **features,
        )


def _of_its_input(arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("attribute_to_layer_input") or arguments.get("attribute_to_neuron_input"))


class LayerGradCam(OfLayer, captum.LayerGradCam):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), as `captum.attr.LayerGradCam`, with the correct gradient.

    The arguments and the values are those of Captum's class. With ``create_graph=True`` the channel weights keep their
    graph. The gradient of a loss on the map then includes the second-order term, which Captum's default leaves out
    without a warning.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.
        reshape_transform: a function that brings the layer's tensor to ``(B, C, h, w)`` or ``(B, C, T)``, for layers
            whose channels are not second: `tokens_to_map`, `channels_first`, `steps_first`, or your own. It is applied
            to activations and gradients before the channel weights. Of the last block of a vision transformer take the
            first normalisation: behind it, only the class token has a gradient.

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

    _summary = "Return the layer's activations, weighted by the mean gradient of the target over each channel."
    _returns = "``(B, 1, h, w)`` for a layer of ``(B, C, h, w)``, a tuple if the layer has several tensors."

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        device_ids: list[int] | None = None,
        *,
        reshape_transform: ReshapeTransform | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.reshape_transform = reshape_transform

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        if self.reshape_transform is None:
            return super()._compute(inputs, arguments)
        gradients, activations = compute_layer_gradients_and_eval(
            self.forward_func,
            self.layer,
            format_tensor_into_tuples(inputs),
            arguments["target"],
            format_additional_forward_args(arguments["additional_forward_args"]),
            device_ids=self.device_ids,
            attribute_to_layer_input=arguments["attribute_to_layer_input"],
            grad_kwargs=arguments["grad_kwargs"],
        )
        maps = [
            _grad_cam(
                reshaped(gradient, self.reshape_transform),
                reshaped(activation, self.reshape_transform),
                arguments["attr_dim_summation"],
                arguments["relu_attributions"],
            )
            for gradient, activation in zip(gradients, activations, strict=True)
        ]
        return tuple(maps) if len(maps) > 1 else maps[0]


def _grad_cam(gradient: Tensor, activation: Tensor, sum_channels: bool, relu: bool) -> Tensor:
    """Return Grad-CAM's map of activations ``(B, C, ...)``."""
    weighted = gradient.mean(dim=tuple(range(2, gradient.dim())), keepdim=True) * activation
    map = weighted.sum(dim=1, keepdim=True) if sum_channels else weighted
    return map.relu() if relu else map


class LayerGradientXActivation(OfLayer, captum.LayerGradientXActivation):
    """Activations of a layer times the target's gradient, as `captum.attr.LayerGradientXActivation`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module, or list of modules, whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the activations; else return the gradient.
        memory_efficient: move the results to the CPU early. create_graph is then an error.

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

    _summary = "Return the layer's activations times the gradient of the target with respect to them."
    _returns = PER_ACTIVATION

    def _refuse(self, create_graph: bool) -> None:
        if create_graph and self._memory_efficient:
            raise RuntimeError(
                "memory_efficient=True detaches the activations, so there can be no graph: leave it out to train."
            )


class LayerActivation(OfLayer, captum.LayerActivation):
    """Activations of a layer, as `captum.attr.LayerActivation`.

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

    _summary = "Return the layer's activations."
    _returns = PER_ACTIVATION
    _by_gradients = False

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        evaluated = self._activations(inputs, arguments, arguments["additional_forward_args"])
        if isinstance(self.layer, nn.Module):
            return format_output(len(evaluated) > 1, evaluated)
        return [format_output(len(single) > 1, single) for single in evaluated]


class LayerConductance(InSteps, OfLayer, captum.LayerConductance):
    """The integrated gradient that flows through a layer (Dhamdhere et al. 2018, arXiv 1805.12233).

    The counterpart of `captum.attr.LayerConductance`. Captum ignores ``grad_kwargs`` here; this class honours
    ``create_graph``.

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

    _summary = "Return the activations' gradient, summed over their changes on the way from baselines to inputs."
    _returns = PER_ACTIVATION_WITH_DELTA
    _steps_shared_by_chunks = 1


class InternalInfluence(InSteps, OfLayer, captum.InternalInfluence):
    """Mean gradient of a layer on the path from a baseline to the input (Leino et al. 2018, arXiv 1802.03788).

    The counterpart of `captum.attr.InternalInfluence`. It is trainable also with an ``internal_batch_size``.

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

    _summary = "Return the mean gradient of the layer's activations on the way from the baselines to the inputs."
    _returns = PER_ACTIVATION


class LayerIntegratedGradients(OfLayer, captum.LayerIntegratedGradients):
    """Integrated gradients of a layer's activations, for example of token embeddings.

    The path leads from the activations of the baselines to those of the inputs. The counterpart of
    `captum.attr.LayerIntegratedGradients`. It is trainable also with an ``internal_batch_size``. A layer in a part of
    the model that `torch.utils.checkpoint` runs is an error.

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
        >>> attribution.sum(dim=-1).shape  # one value per token
        torch.Size([2, 3])
        >>> attribution.square().sum().backward()
    """

    _summary = "Return the integral of the gradient from the baselines' activations to those of the inputs."
    _returns = PER_ACTIVATION_WITH_DELTA
    _hands_on_copies = True  # without copies, an in-place operation would write into the points on the path

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layers,
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(forward_func, layer, device_ids, multiply_by_inputs)
        self.ig = IntegratedGradients(forward_func, multiply_by_inputs)

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        outside = _outside_checkpoints(self.layer, arguments["attribute_to_layer_input"])
        with super()._one_call(arguments) as explainer, outside:
            # Captum sets a gradient function on `ig` that refers to the explainer, so each call has its own copy.
            explainer.ig = copy.copy(self.ig)
            try:
                yield explainer
            finally:
                explainer.ig = self.ig


class LayerGradientShap(OfLayer, captum.LayerGradientShap):
    """Expected gradients of a layer's activations, as `captum.attr.LayerGradientShap`.

    The random numbers are drawn as in `GradientShap`.

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

    _summary = "Return the mean gradient of the activations at random points between inputs and baselines."
    _returns = PER_ACTIVATION_WITH_DELTA
    _takes_distribution = True
    _parameters: ClassVar[dict[str, str]] = OF_A_DISTRIBUTION
    _more: ClassVar[dict[str, Any]] = {"internal_batch_size": None}

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        between = LayerInputBaselineXGradient(self.forward_func, self.layer, self.device_ids, self.multiplies_by_inputs)
        return smoothed_over_baselines(between, inputs, **arguments)


class LayerFeatureAblation(OfLayer, captum.LayerFeatureAblation):
    """Decrease of the output when a layer's activations are replaced, as `captum.attr.LayerFeatureAblation`.

    With ``create_graph=True``, a layer in a part of the model that `torch.utils.checkpoint` runs is an error.

    Args:
        forward_func: takes the inputs and the additional arguments; must not be a DataParallel of several devices.
        layer: the module whose output (or input) is explained.
        device_ids: an argument of Captum's signature.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerFeatureAblation
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = LayerFeatureAblation(model, model[1]).attribute(torch.randn(5, 3), target=1)
        >>> attribution.shape
        torch.Size([5, 4])
    """

    _summary = "Return the output minus that with each part of the activations replaced by its baseline."
    _returns = PER_ACTIVATION
    _parameters: ClassVar[dict[str, str]] = OF_A_LAYERS_FEATURES
    _defaults: ClassVar[dict[str, Any]] = {"perturbations_per_eval": None}
    _by_gradients = False

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        return self._of_activations(
            FeatureAblation,
            inputs,
            arguments,
            baselines=arguments["layer_baselines"],
            feature_mask=arguments["layer_mask"],
        )


class LayerFeaturePermutation(OfLayer, captum.LayerFeaturePermutation):
    """Decrease of the output when a layer's activations are permuted among the examples.

    The counterpart of `captum.attr.LayerFeaturePermutation`. The random numbers are drawn as in `FeaturePermutation`.
    With ``create_graph=True``, a layer in a part of the model that `torch.utils.checkpoint` runs is an error.

    Args:
        forward_func: takes the inputs and the additional arguments; must not be a DataParallel of several devices.
        layer: the module whose output is explained.
        device_ids: an argument of Captum's signature.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerFeaturePermutation
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = LayerFeaturePermutation(model, model[1]).attribute(torch.randn(5, 3), target=1)
        >>> attribution.shape
        torch.Size([5, 4])
    """

    _summary = "Return the output minus that with each part of the activations exchanged among the examples."
    _returns = PER_ACTIVATION
    _parameters: ClassVar[dict[str, str]] = OF_A_LAYERS_FEATURES
    _defaults: ClassVar[dict[str, Any]] = {"perturbations_per_eval": None}
    _by_gradients = False

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        return self._of_activations(FeaturePermutation, inputs, arguments, feature_mask=arguments["layer_mask"])


def _outside_checkpoints(layers: Layers, its_input: bool) -> Any:
    """Return a context that raises RuntimeError if `torch.utils.checkpoint` runs one of the layers."""
    why = (
        "without what this attribution puts in place of its tensors: turn checkpointing off while explaining "
        "(`model.gradient_checkpointing_disable()` in transformers), or choose a layer outside."
    )
    return refused_inside_checkpoints(layers if isinstance(layers, list) else [layers], why, output_only=not its_input)
