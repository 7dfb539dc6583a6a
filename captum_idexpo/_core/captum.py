"""All of Captum's private names that this package uses.

Captum may change them in any release. So the required version of Captum has an upper bound, and no other module imports
private names. Public names (`captum.attr`, `captum.metrics`) are imported where they are needed.
"""

# With these functions arguments are read, outputs are chosen and results are formed exactly as in Captum.
from captum._utils.common import _expand_additional_forward_args as expand_additional_forward_args
from captum._utils.common import _expand_target as expand_target
from captum._utils.common import _format_additional_forward_args as format_additional_forward_args
from captum._utils.common import _format_output as format_output
from captum._utils.common import _format_tensor_into_tuples as format_tensor_into_tuples
from captum._utils.common import _reduce_list as reduce_list
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _select_targets as select_targets
from captum._utils.common import _verify_select_neuron as verify_select_neuron

# Activations of layers, and gradients of layers and neurons.
from captum._utils.gradient import _forward_layer_eval as forward_layer_eval
from captum._utils.gradient import compute_layer_gradients_and_eval, construct_neuron_grad_fn

# The surrogates that users pass to Captum's LIME. They are replaced by those of `attr.surrogates`.
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum._utils.models.model import Model

# The progress bar of Captum's show_progress.
from captum._utils.progress import NullProgress, progress

# The types of Captum's signatures.
from captum._utils.typing import BaselineType, TargetType
from captum.attr._core.feature_ablation import _parse_forward_out as parse_forward_out

# The points between inputs and baselines of GradientShap and its layer form.
from captum.attr._core.gradient_shap import InputBaselineXGradient
from captum.attr._core.layer.layer_gradient_shap import LayerInputBaselineXGradient

# LIME's defaults, to detect whether a user has changed them.
from captum.attr._core.lime import default_perturb_func, get_exp_kernel_similarity_function

# The default rules of layers. The rules that a user can choose are imported below.
from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
from captum.attr._core.noise_tunnel import SUPPORTED_NOISE_TUNNEL_TYPES

# The steps and step sizes of a path integral.
from captum.attr._utils.approximation_methods import approximation_parameters
from captum.attr._utils.common import (
    _format_and_verify_sliding_window_shapes as format_and_verify_sliding_window_shapes,
)
from captum.attr._utils.common import _format_and_verify_strides as format_and_verify_strides
from captum.attr._utils.common import _format_callable_baseline as format_callable_baseline
from captum.attr._utils.common import _validate_noise_tunnel_type as validate_noise_tunnel_type
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule, PropagationRule

__all__ = [
    "SUPPORTED_LAYERS_WITH_RULES",
    "SUPPORTED_NOISE_TUNNEL_TYPES",
    "SUPPORTED_NON_LINEAR_LAYERS",
    "Alpha1_Beta0_Rule",
    "BaselineType",
    "EpsilonRule",
    "GammaRule",
    "IdentityRule",
    "InputBaselineXGradient",
    "LayerInputBaselineXGradient",
    "Model",
    "NullProgress",
    "PropagationRule",
    "SkLearnLasso",
    "SkLearnLinearRegression",
    "SkLearnRidge",
    "TargetType",
    "approximation_parameters",
    "compute_layer_gradients_and_eval",
    "construct_neuron_grad_fn",
    "default_perturb_func",
    "expand_additional_forward_args",
    "expand_target",
    "format_additional_forward_args",
    "format_and_verify_sliding_window_shapes",
    "format_and_verify_strides",
    "format_callable_baseline",
    "format_output",
    "format_tensor_into_tuples",
    "forward_layer_eval",
    "get_exp_kernel_similarity_function",
    "parse_forward_out",
    "progress",
    "reduce_list",
    "run_forward",
    "select_targets",
    "validate_noise_tunnel_type",
    "verify_select_neuron",
]
