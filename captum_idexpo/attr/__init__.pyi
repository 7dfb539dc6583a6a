"""Signatures for type checkers, made by ``python -m tests.attr.test_stub``."""

from collections.abc import Callable
from typing import Any, TypeVar

import captum.attr
from captum._utils.typing import BaselineType, TargetType
from torch import Tensor

from captum_idexpo.attr.ablation import FeatureAblation as FeatureAblation
from captum_idexpo.attr.ablation import FeaturePermutation as FeaturePermutation
from captum_idexpo.attr.ablation import Occlusion as Occlusion
from captum_idexpo.attr.dataloader import DataLoaderAttribution as DataLoaderAttribution
from captum_idexpo.attr.kernel_shap import KernelShap as KernelShap
from captum_idexpo.attr.layouts import channels_first as channels_first
from captum_idexpo.attr.layouts import steps_first as steps_first
from captum_idexpo.attr.layouts import tokens_to_map as tokens_to_map
from captum_idexpo.attr.lime import Lime as Lime
from captum_idexpo.attr.lime import id_expo_lime as id_expo_lime
from captum_idexpo.attr.lime_base import LimeBase as LimeBase
from captum_idexpo.attr.shapley import ShapleyValues as ShapleyValues
from captum_idexpo.attr.shapley import ShapleyValueSampling as ShapleyValueSampling
from captum_idexpo.attr.similarity import MaskSimilarity as MaskSimilarity

__all__ = [
    "LRP",
    "DataLoaderAttribution",
    "Deconvolution",
    "DeepLift",
    "DeepLiftShap",
    "FeatureAblation",
    "FeaturePermutation",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "LayerActivation",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "Lime",
    "LimeBase",
    "MaskSimilarity",
    "NeuronConductance",
    "NeuronDeconvolution",
    "NeuronDeepLift",
    "NeuronDeepLiftShap",
    "NeuronFeatureAblation",
    "NeuronGradient",
    "NeuronGradientShap",
    "NeuronGuidedBackprop",
    "NeuronIntegratedGradients",
    "NoiseTunnel",
    "Occlusion",
    "Saliency",
    "ShapleyValueSampling",
    "ShapleyValues",
    "channels_first",
    "id_expo_lime",
    "steps_first",
    "tokens_to_map",
]

TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, ...])

class LRP(captum.attr.LRP):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class Deconvolution(captum.attr.Deconvolution):
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class DeepLift(captum.attr.DeepLift):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class DeepLiftShap(captum.attr.DeepLiftShap):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        internal_batch_size: int | None = None,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class GradientShap(captum.attr.GradientShap):
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
        internal_batch_size: int | None = None,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class GuidedBackprop(captum.attr.GuidedBackprop):
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class GuidedGradCam(captum.attr.GuidedGradCam):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class InputXGradient(captum.attr.InputXGradient):
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class IntegratedGradients(captum.attr.IntegratedGradients):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class InternalInfluence(captum.attr.InternalInfluence):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerActivation(captum.attr.LayerActivation):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any: ...

class LayerConductance(captum.attr.LayerConductance):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerDeepLift(captum.attr.LayerDeepLift):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerDeepLiftShap(captum.attr.LayerDeepLiftShap):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        internal_batch_size: int | None = None,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerFeatureAblation(captum.attr.LayerFeatureAblation):
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
    ) -> Any: ...

class LayerFeaturePermutation(captum.attr.LayerFeaturePermutation):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        layer_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int | None = None,
        *,
        create_graph: bool = False,
    ) -> Any: ...

class LayerGradCam(captum.attr.LayerGradCam):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerGradientShap(captum.attr.LayerGradientShap):
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
        internal_batch_size: int | None = None,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerGradientXActivation(captum.attr.LayerGradientXActivation):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerIntegratedGradients(captum.attr.LayerIntegratedGradients):
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
        memory_budget: float | None = None,
    ) -> Any: ...

class LayerLRP(captum.attr.LayerLRP):
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> Any: ...

class NeuronConductance(captum.attr.NeuronConductance):
    def attribute(
        self,
        inputs: TensorOrTensors,
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
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronDeconvolution(captum.attr.NeuronDeconvolution):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronDeepLift(captum.attr.NeuronDeepLift):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        baselines: BaselineType = None,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronDeepLiftShap(captum.attr.NeuronDeepLiftShap):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        custom_attribution_func: Callable[..., tuple[Tensor, ...]] | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronFeatureAblation(captum.attr.NeuronFeatureAblation):
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
    ) -> TensorOrTensors: ...

class NeuronGradient(captum.attr.NeuronGradient):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronGradientShap(captum.attr.NeuronGradientShap):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        baselines: Tensor | tuple[Tensor, ...] | Callable[..., Any],
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.0,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronGuidedBackprop(captum.attr.NeuronGuidedBackprop):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        additional_forward_args: object | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NeuronIntegratedGradients(captum.attr.NeuronIntegratedGradients):
    def attribute(
        self,
        inputs: TensorOrTensors,
        neuron_selector: Any,
        baselines: BaselineType = None,
        additional_forward_args: object | None = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        attribute_to_neuron_input: bool = False,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...

class NoiseTunnel(captum.attr.NoiseTunnel):
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
        memory_budget: float | None = None,
        **kwargs: Any,
    ) -> Any: ...

class Saliency(captum.attr.Saliency):
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        abs: bool = True,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
        memory_budget: float | None = None,
    ) -> TensorOrTensors: ...
