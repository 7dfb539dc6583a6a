"""Trainable attributions of one neuron to the inputs.

Most classes have the arguments of their counterpart for outputs, with ``neuron_selector`` instead of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import captum.attr as captum
from torch import Tensor

from captum_idexpo._core.captum import construct_neuron_grad_fn, verify_select_neuron
from captum_idexpo._core.inputs import Tensors
from captum_idexpo.attr._trainable import part
from captum_idexpo.attr.ablation import FeatureAblation
from captum_idexpo.attr.deep_lift import DeepLift, DeepLiftShap
from captum_idexpo.attr.gradients import OF_A_DISTRIBUTION, GradientShap, InSteps, IntegratedGradients
from captum_idexpo.attr.guided import Deconvolution, GuidedBackprop
from captum_idexpo.attr.layer import OfLayer


class OfNeuron(OfLayer):
    """An attribution of a neuron that runs the corresponding attribution of outputs.

    Attributes:
        _counterpart: the corresponding class of `captum_idexpo.attr`.
    """

    _counterpart: ClassVar[Any]
    _of_inputs = True
    _explained: Callable[..., Any]
    multiplies_by_inputs: bool

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        with super()._one_call(arguments) as explainer:
            explainer._explained = self.forward_func
            yield explainer

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        own = ("neuron_selector", "attribute_to_neuron_input")
        counterpart = self._counterpart(self._explained)
        counterpart._multiply_by_inputs = self.multiplies_by_inputs
        counterpart._of_outputs = False
        counterpart.forward_func, counterpart.layer = self.forward_func, self.layer
        counterpart.gradient_func = construct_neuron_grad_fn(
            self.layer,
            arguments["neuron_selector"],
            self.device_ids,
            attribute_to_neuron_input=arguments["attribute_to_neuron_input"],
        )
        rest = {name: value for name, value in arguments.items() if name not in own}
        return part(self._counterpart)(counterpart, inputs, **rest)


class NeuronGradient(OfLayer, captum.NeuronGradient):
    """Gradient of a neuron with respect to the inputs, as `captum.attr.NeuronGradient`.

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

    _summary = "Return the gradient of the neuron with respect to the inputs."
    _of_inputs = True


class NeuronConductance(InSteps, OfLayer, captum.NeuronConductance):
    """The part of the inputs' integrated gradient that flows through a neuron (arXiv 1805.12233).

    The counterpart of `captum.attr.NeuronConductance`.

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

    _summary = "Return the part of the inputs' integrated gradient that flows through the neuron."
    _of_inputs = True


class NeuronIntegratedGradients(OfNeuron, captum.NeuronIntegratedGradients):
    """Integrated gradients of a neuron, as `captum.attr.NeuronIntegratedGradients`.

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

    _summary = "Return the integral of the neuron's gradient from the baselines to the inputs."
    _counterpart = IntegratedGradients


class NeuronGradientShap(OfNeuron, captum.NeuronGradientShap):
    """Expected gradients of a neuron, as `captum.attr.NeuronGradientShap`.

    The random numbers are drawn as in `GradientShap`.

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

    _summary = "Return the mean of the neuron's gradient at random points between inputs and baselines."
    _counterpart = GradientShap
    _takes_distribution = True
    _parameters: ClassVar[dict[str, str]] = OF_A_DISTRIBUTION


class NeuronDeepLift(OfNeuron, captum.NeuronDeepLift):
    """DeepLIFT of a neuron, as `captum.attr.NeuronDeepLift`.

    Args:
        model: a module. Each of its non-linear modules must be used once.
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

    _summary = "Return what each input contributes to the neuron's difference from that on the baselines."
    _counterpart = DeepLift
    _modules_only = True


class NeuronDeepLiftShap(OfNeuron, captum.NeuronDeepLiftShap):
    """Mean of a neuron's DeepLIFT over a distribution of baselines, as `captum.attr.NeuronDeepLiftShap`.

    Args:
        model: a module. Each of its non-linear modules must be used once.
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

    _summary = "Return the mean contribution of each input over a distribution of baselines."
    _counterpart = DeepLiftShap
    _modules_only = True
    _takes_distribution = True
    _parameters: ClassVar[dict[str, str]] = OF_A_DISTRIBUTION


class NeuronGuidedBackprop(OfNeuron, captum.NeuronGuidedBackprop):
    """Guided backpropagation of a neuron, as `captum.attr.NeuronGuidedBackprop`.

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

    _summary = "Return the guided gradient of the neuron with respect to the inputs."
    _counterpart = GuidedBackprop
    _modules_only = True


class NeuronDeconvolution(OfNeuron, captum.NeuronDeconvolution):
    """Deconvolution of a neuron, as `captum.attr.NeuronDeconvolution`.

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

    _summary = "Return the deconvolved gradient of the neuron with respect to the inputs."
    _counterpart = Deconvolution
    _modules_only = True


class NeuronFeatureAblation(OfLayer, captum.NeuronFeatureAblation):
    """Decrease of a neuron when a feature is replaced by its baseline, as `captum.attr.NeuronFeatureAblation`.

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

    _summary = "Return the neuron minus that with the feature replaced by its baseline."
    _parameters: ClassVar[dict[str, str]] = {
        "feature_mask": "whole numbers, equal ones for the positions of one feature; None: every element is a feature.",
        "perturbations_per_eval": "features replaced in one forward pass; None: chosen automatically.",
    }
    _defaults: ClassVar[dict[str, Any]] = {"perturbations_per_eval": None}
    _by_gradients = False

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        arguments = dict(arguments)
        selector = arguments.pop("neuron_selector")
        of_its_input = {"attribute_to_neuron_input": arguments.pop("attribute_to_neuron_input")}

        def neuron(*given: Any) -> Tensor:
            selected: Tensor = verify_select_neuron(self._activations(given, of_its_input), selector)
            return selected

        return part(FeatureAblation)(FeatureAblation(neuron), inputs, **arguments)
