"""Captum's attributions, trainable: the same classes, arguments and numbers, with a graph into the model's weights."""

from captum_idexpo.attr.kernel_shap import KernelShap
from captum_idexpo.attr.layer import LayerGradCam
from captum_idexpo.attr.lime import Lime, id_expo_lime
from captum_idexpo.attr.similarity import MaskSimilarity

__all__ = ["KernelShap", "LayerGradCam", "Lime", "MaskSimilarity", "id_expo_lime"]
