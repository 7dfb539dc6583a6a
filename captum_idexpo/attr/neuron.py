"""Attributions of one neuron to the inputs, trainable.

Each has the arguments of its counterpart for outputs, with ``neuron_selector`` in place of the target: an index, a
tuple of indices or slices (summed over), or a callable that picks a value an example from the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr as captum
from captum._utils.common import _verify_select_neuron
from captum._utils.gradient import _forward_layer_eval, construct_neuron_grad_fn
from captum._utils.typing import BaselineType, TargetType
from torch import Tensor

from captum_idexpo.attr._graph import asks_for_graph, by_gradients, by_outputs, keeps_graph
from captum_idexpo.attr._usage import TensorOrTensors, logged, part
from captum_idexpo.attr.ablation import FeatureAblation
from captum_idexpo.attr.deep_lift import DeepLift, DeepLiftShap
from captum_idexpo.attr.gradients import GradientShap, IntegratedGradients
from captum_idexpo.attr.guided import Deconvolution, GuidedBackprop
from captum_idexpo.attr.path import InSteps


class NeuronGradient(captum.NeuronGradient):
    """The gradient of a neuron in the inputs, `captum.attr.NeuronGradient`.

    Args:
        forward_func: takes the inputs and the additional arguments.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronGradient
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronGradient(model, model[1]).attribute(
        ...     torch.randn(5, 3), neuron_selector=2, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """The gradient of the neuron in the inputs.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            neuron_selector: an index, a tuple of indices or slices, or a callable of the layer's output.
            additional_forward_args: passed to the forward function after the inputs.
            attribute_to_neuron_input: the neuron is one of the layer's input.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on a selector that does not fit.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self,
            neuron_selector=neuron_selector,
            additional_forward_args=additional_forward_args,
            attribute_to_neuron_input=attribute_to_neuron_input,
        )
        attribution: TensorOrTensors = by_gradients(self, compute, inputs, create_graph, of_inputs=True)
        return attribution


class NeuronConductance(InSteps, captum.NeuronConductance):
    """How the integrated gradient of the target flows from the inputs through a neuron (arXiv 1805.12233).

    `captum.attr.NeuronConductance`.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronConductance
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronConductance(model, model[1]).attribute(
        ...     torch.randn(5, 3), neuron_selector=2, target=1, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        n_steps: int = 50,
        method: str = "riemann_trapezoid",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The inputs' integrated gradient through the neuron; arguments as `IntegratedGradients`, `NeuronGradient`."""
        compute = partial(
            super().attribute.__wrapped__,
            self.in_steps_of(internal_batch_size),
            neuron_selector=neuron_selector,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            attribute_to_neuron_input=attribute_to_neuron_input,
            grad_kwargs=grad_kwargs,
        )
        return by_gradients(self, compute, inputs, asks_for_graph(create_graph, grad_kwargs))


class NeuronIntegratedGradients(captum.NeuronIntegratedGradients):
    """Integrated gradients of a neuron, `captum.attr.NeuronIntegratedGradients`.

    Args:
        forward_func: takes the inputs and the additional arguments.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronIntegratedGradients
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronIntegratedGradients(model, model[1]).attribute(
        ...     torch.randn(5, 3), neuron_selector=2, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        baselines: BaselineType = None,
        additional_forward_args: object | None = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The integral of the neuron's gradient; arguments as for `IntegratedGradients` and `NeuronGradient`."""
        return _of_neuron(
            self,
            IntegratedGradients(self.forward_func, self.multiplies_by_inputs),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            baselines=baselines,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            internal_batch_size=internal_batch_size,
        )


class NeuronGradientShap(captum.NeuronGradientShap):
    """Expected gradients of a neuron, `captum.attr.NeuronGradientShap`; random numbers as `GradientShap`.

    Args:
        forward_func: takes the inputs and the additional arguments.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronGradientShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronGradientShap(model, model[1]).attribute(
        ...     torch.randn(5, 3), neuron_selector=2, baselines=torch.zeros(1, 3), create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean of the neuron's gradient at random points; arguments as for `GradientShap` and `NeuronGradient`."""
        return _of_neuron(
            self,
            GradientShap(self.forward_func, self.multiplies_by_inputs),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            baselines=baselines,
            n_samples=n_samples,
            stdevs=stdevs,
            additional_forward_args=additional_forward_args,
        )


class NeuronDeepLift(captum.NeuronDeepLift):
    """DeepLIFT of a neuron, `captum.attr.NeuronDeepLift`.

    Args:
        model: a module whose non-linear modules are used once each.
        layer: the module whose output (or input) holds the neuron.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronDeepLift
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronDeepLift(model, model[2]).attribute(
        ...     torch.randn(5, 3), neuron_selector=1, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        baselines: BaselineType = None,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """What each input contributes to the neuron; arguments as for `DeepLift` and `NeuronGradient`."""
        return _of_neuron(
            self,
            DeepLift(self.forward_func, self.multiplies_by_inputs),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            baselines=baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class NeuronDeepLiftShap(captum.NeuronDeepLiftShap):
    """DeepLIFT of a neuron, the mean over a distribution of baselines, `captum.attr.NeuronDeepLiftShap`.

    Args:
        model: a module whose non-linear modules are used once each.
        layer: the module whose output (or input) holds the neuron.
        multiply_by_inputs: multiply by the inputs' difference from the baselines.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronDeepLiftShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronDeepLiftShap(model, model[2]).attribute(
        ...     torch.randn(5, 3), neuron_selector=1, baselines=torch.randn(10, 3), create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The mean contribution to the neuron over baselines; arguments as `DeepLiftShap` and `NeuronGradient`."""
        return _of_neuron(
            self,
            DeepLiftShap(self.forward_func, self.multiplies_by_inputs),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            baselines=baselines,
            additional_forward_args=additional_forward_args,
            custom_attribution_func=custom_attribution_func,
        )


class NeuronGuidedBackprop(captum.NeuronGuidedBackprop):
    """Guided backpropagation of a neuron, `captum.attr.NeuronGuidedBackprop`.

    Args:
        model: a module with ReLU modules.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronGuidedBackprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> attribution = NeuronGuidedBackprop(model, model[2]).attribute(
        ...     torch.randn(5, 3), neuron_selector=1, create_graph=True
        ... )
        >>> attribution.sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The guided gradient of the neuron; arguments, result and errors as for `NeuronGradient`."""
        return _of_neuron(
            self,
            GuidedBackprop(self.forward_func),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            additional_forward_args=additional_forward_args,
        )


class NeuronDeconvolution(captum.NeuronDeconvolution):
    """Deconvolution of a neuron, `captum.attr.NeuronDeconvolution`.

    Args:
        model: a module with ReLU modules.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronDeconvolution
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> attribution = NeuronDeconvolution(model, model[2]).attribute(
        ...     torch.randn(5, 3), neuron_selector=1, create_graph=True
        ... )
        >>> attribution.sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The deconvolved gradient of the neuron; arguments, result and errors as for `NeuronGradient`."""
        return _of_neuron(
            self,
            Deconvolution(self.forward_func),
            inputs,
            neuron_selector,
            attribute_to_neuron_input,
            create_graph,
            additional_forward_args=additional_forward_args,
        )


class NeuronFeatureAblation(captum.NeuronFeatureAblation):
    """What a neuron loses when a feature is replaced by its baseline, `captum.attr.NeuronFeatureAblation`.

    Args:
        forward_func: takes the inputs and the additional arguments.
        layer: the module whose output (or input) holds the neuron.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import NeuronFeatureAblation
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> attribution = NeuronFeatureAblation(model, model[1]).attribute(
        ...     torch.randn(5, 3), neuron_selector=2, create_graph=True
        ... )
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        baselines: BaselineType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        attribute_to_neuron_input: bool = False,
        perturbations_per_eval: int | None = None,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """The neuron minus that with the feature replaced; arguments as for `FeatureAblation` and `NeuronGradient`."""

        def neuron(*arguments: Any) -> Tensor:
            evaluated = _forward_layer_eval(
                self.forward_func,
                arguments,
                self.layer,
                device_ids=self.device_ids,
                attribute_to_layer_input=attribute_to_neuron_input,
                grad_enabled=keeps_graph(),
            )
            selected: Tensor = _verify_select_neuron(evaluated, neuron_selector)
            return selected

        compute = partial(
            part(FeatureAblation),
            FeatureAblation(neuron),
            baselines=baselines,
            additional_forward_args=additional_forward_args,
            feature_mask=feature_mask,
            perturbations_per_eval=perturbations_per_eval,
        )
        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution


def _of_neuron(
    neuron: Any,
    explainer: Any,
    inputs: Any,
    neuron_selector: Any,
    of_its_input: bool,
    create_graph: bool,
    **arguments: Any,
) -> Any:
    """An explainer's attribution of a neuron in place of an output."""
    explainer.gradient_func = construct_neuron_grad_fn(
        neuron.layer, neuron_selector, neuron.device_ids, attribute_to_neuron_input=of_its_input
    )
    compute = partial(part(type(explainer)), explainer, **arguments)
    return by_gradients(neuron, compute, inputs, create_graph, of_inputs=True)
