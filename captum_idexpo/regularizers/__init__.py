"""Loss terms made of an explanation and a metric: one paper a file."""

from captum_idexpo.regularizers.attribution_priors import Smoothness, Sparsity
from captum_idexpo.regularizers.expo import Fidelity, GaussianNeighbors, MaskedNeighbors, Stability, UniformNeighbors
from captum_idexpo.regularizers.insertion_deletion import InsertionDeletion, mean_inputs
from captum_idexpo.regularizers.right_reasons import Explanation, RightForTheRightReasons, find_another_explanation
from captum_idexpo.regularizers.saliency_guided import SaliencyGuided

__all__ = [
    "Explanation",
    "Fidelity",
    "GaussianNeighbors",
    "InsertionDeletion",
    "MaskedNeighbors",
    "RightForTheRightReasons",
    "SaliencyGuided",
    "Smoothness",
    "Sparsity",
    "Stability",
    "UniformNeighbors",
    "find_another_explanation",
    "mean_inputs",
]
