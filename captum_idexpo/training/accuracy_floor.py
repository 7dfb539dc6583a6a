"""The accuracy that training may cost: paired differences to the model at the start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHANGE, ERROR = "accuracy_change", "accuracy_change_standard_error"
_ROUNDING = 1e-9


def check_max_drop(max_drop: object) -> float | None:
    """Return an allowed drop of accuracy or None; ValueError for a number outside [0, 1)."""
    if max_drop is None:
        return None
    if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not 0 <= max_drop < 1:
        raise ValueError(
            "max_accuracy_drop must be a share of the examples, at least 0 and less than 1 (0.01 is one point); "
            f"given: {max_drop!r}."
        )
    return float(max_drop)


def is_eligible(change: float, error: float, max_drop: float) -> bool:
    """Return True if a change of accuracy, plus one standard error, is no larger drop than allowed."""
    return change + error >= -max_drop - _ROUNDING


def paired_change(before: Classified, after: Classified) -> dict[str, float]:
    """Return the mean change of accuracy over the examples and its standard error, by name.

    Raises:
        ValueError: the examples are not the same ones in the same order.
    """
    if not before.has_the_examples_of(after):
        raise ValueError(
            "max_accuracy_drop compares the predictions for each example with those at the start, but the loader "
            "yields other examples, or in another order, in each pass: give a DataLoader with shuffle=False over the "
            "same data."
        )
    changes = after.right - before.right
    error = float(changes.std()) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    return {CHANGE: float(changes.mean()), ERROR: error}


class Classified:
    """Which examples of a loader are classified right, in its order.

    Args:
        right: ``(N,)``, 1 for right and 0 for wrong; of several labels the share of the right ones.
        labels: the targets, ``(N, ...)``, which tell whether another pass has the same examples.
    """

    def __init__(self, right: Tensor, labels: Tensor) -> None:
        self.right = right.double().cpu()
        self.labels = labels.detach().cpu()

    @classmethod
    def of(cls, scored: list[tuple[Any, dict[str, Tensor]]]) -> Classified:
        """Return the predictions of all batches, from their labels and scores.

        Raises:
            ValueError: a batch has no accuracy.
        """
        if not all("accuracy" in scores for _, scores in scored):
            raise ValueError(
                "max_accuracy_drop needs the accuracy of a classifier, and these outputs and targets have none: leave "
                "it out for a regression."
            )
        return cls(
            torch.cat([scores["accuracy"].cpu() for _, scores in scored]), torch.cat([y.cpu() for y, _ in scored])
        )

    def has_the_examples_of(self, other: Classified) -> bool:
        """Return True if another pass had the same labels in the same order."""
        same_shape = self.labels.shape == other.labels.shape
        return same_shape and bool((self.labels == other.labels).all())

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""
        return {"right": self.right, "labels": self.labels}
