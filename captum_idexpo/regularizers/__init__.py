"""Loss terms made of an explanation and a metric: one paper a file."""

from captum_idexpo.baselines import mean_inputs
from captum_idexpo.regularizers.attribution_distillation import AttributionDistillation
from captum_idexpo.regularizers.attribution_priors import Smoothness, Sparsity
from captum_idexpo.regularizers.attribution_supervision import AttributionSupervision
from captum_idexpo.regularizers.base import Penalty, Regularizer
from captum_idexpo.regularizers.expo import Fidelity, Stability
from captum_idexpo.regularizers.insertion_deletion import InsertionDeletion
from captum_idexpo.regularizers.neighbors import GaussianNeighbors, MaskedNeighbors, Neighborhood, UniformNeighbors
from captum_idexpo.regularizers.random_masking import RandomMasking
from captum_idexpo.regularizers.right_reasons import Explanation, RightForTheRightReasons, find_another_explanation
from captum_idexpo.regularizers.saliency_guided import SaliencyGuided

__all__ = [
    "AttributionDistillation",
    "AttributionSupervision",
    "Explanation",
    "Fidelity",
    "GaussianNeighbors",
    "InsertionDeletion",
    "MaskedNeighbors",
    "Neighborhood",
    "Penalty",
    "RandomMasking",
    "Regularizer",
    "RightForTheRightReasons",
    "SaliencyGuided",
    "Smoothness",
    "Sparsity",
    "Stability",
    "UniformNeighbors",
    "find_another_explanation",
    "mean_inputs",
]
