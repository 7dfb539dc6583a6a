"""Metrics of attributions, beside `captum.metrics`: how faithful is an explanation to the model?"""

from captum_idexpo.metrics.insertion_deletion import (
    InsertionDeletionScores,
    deletion,
    insertion,
    insertion_deletion,
)
from captum_idexpo.metrics.sensitivity_n import sensitivity_n

__all__ = ["InsertionDeletionScores", "deletion", "insertion", "insertion_deletion", "sensitivity_n"]
