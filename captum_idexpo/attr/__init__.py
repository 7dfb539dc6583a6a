"""Captum's attribution classes with the same arguments and values, and with a graph to the model's weights."""

from captum_idexpo.attr.ablation import FeatureAblation, FeaturePermutation, Occlusion
from captum_idexpo.attr.dataloader import DataLoaderAttribution
from captum_idexpo.attr.deep_lift import DeepLift, DeepLiftShap, LayerDeepLift, LayerDeepLiftShap
from captum_idexpo.attr.gradients import GradientShap, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from captum_idexpo.attr.guided import Deconvolution, GuidedBackprop, GuidedGradCam
from captum_idexpo.attr.kernel_shap import KernelShap
from captum_idexpo.attr.layer import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerFeatureAblation,
    LayerFeaturePermutation,
    LayerGradCam,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from captum_idexpo.attr.layouts import channels_first, steps_first, tokens_to_map
from captum_idexpo.attr.lime import Lime, id_expo_lime
from captum_idexpo.attr.lime_base import LimeBase
from captum_idexpo.attr.lrp import LRP, LayerLRP
from captum_idexpo.attr.neuron import (
    NeuronConductance,
    NeuronDeconvolution,
    NeuronDeepLift,
    NeuronDeepLiftShap,
    NeuronFeatureAblation,
    NeuronGradient,
    NeuronGradientShap,
    NeuronGuidedBackprop,
    NeuronIntegratedGradients,
)
from captum_idexpo.attr.shapley import ShapleyValues, ShapleyValueSampling
from captum_idexpo.attr.similarity import MaskSimilarity

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
