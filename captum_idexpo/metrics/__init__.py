"""Metrics of attributions, beside `captum.metrics`: how faithful is an explanation to the model?"""

from captum_idexpo.metrics.insertion_deletion import (
    InsertionDeletionScores,
    deletion,
    insertion,
    insertion_deletion,
)
from captum_idexpo.metrics.local_fidelity import (
    LinearExplanation,
    LocalLinearModels,
    neighborhood_fidelity,
    point_fidelity,
    stability,
)
from captum_idexpo.metrics.sensitivity_n import sensitivity_n

__all__ = [
    "InsertionDeletionScores",
    "LinearExplanation",
    "LocalLinearModels",
    "deletion",
    "insertion",
    "insertion_deletion",
    "neighborhood_fidelity",
    "point_fidelity",
    "sensitivity_n",
    "stability",
]
