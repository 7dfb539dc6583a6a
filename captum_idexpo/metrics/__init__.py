"""Metrics of attributions, in addition to `captum.metrics`: how faithful is an explanation to the model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captum_idexpo.attr.local_linear import LinearExplanation, LocalLinearModels
from captum_idexpo.metrics._masking import InsertionDeletionScores
from captum_idexpo.metrics.insertion_deletion import deletion, insertion, insertion_deletion
from captum_idexpo.metrics.local_fidelity import neighborhood_fidelity, point_fidelity, stability
from captum_idexpo.metrics.masked_accuracy import masked_accuracy
from captum_idexpo.metrics.road import road
from captum_idexpo.metrics.sensitivity_n import sensitivity_n

if TYPE_CHECKING:
    from captum_idexpo.metrics.torchmetrics import Deletion, Insertion

__all__ = [
    "Deletion",
    "Insertion",
    "InsertionDeletionScores",
    "LinearExplanation",
    "LocalLinearModels",
    "deletion",
    "insertion",
    "insertion_deletion",
    "masked_accuracy",
    "neighborhood_fidelity",
    "point_fidelity",
    "road",
    "sensitivity_n",
    "stability",
]


def __getattr__(name: str) -> Any:
    """Import the torchmetrics classes on first access, since torchmetrics is an optional dependency."""
    if name in ("Deletion", "Insertion"):
        from captum_idexpo.metrics import torchmetrics

        return getattr(torchmetrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
