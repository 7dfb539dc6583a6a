"""Captum's attributions, trainable: train PyTorch models for faithful explanations.

`attr` holds Captum's classes with a graph into the model's weights, `metrics` insertion, deletion and sensitivity-n,
`regularizers` the loss terms made of them, `training` a loss module and a trainer.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.errors import InputError, InputTypeError, NonFiniteError
from captum_idexpo._version import __version__
from captum_idexpo.keyword_model import KeywordModel
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training import ExplanationRegularizedLoss, ExplanationRegularizedTrainer

if TYPE_CHECKING:
    from captum_idexpo import (
        attr,
        baselines,
        feature_masks,
        jury,
        metrics,
        regularizers,
        testing,
        training,
        visualization,
    )

__all__ = [
    "Batch",
    "ExplanationRegularizedLoss",
    "ExplanationRegularizedTrainer",
    "InputError",
    "InputTypeError",
    "InsertionDeletion",
    "KeywordModel",
    "NonFiniteError",
    "__version__",
    "attr",
    "baselines",
    "feature_masks",
    "jury",
    "metrics",
    "regularizers",
    "testing",
    "training",
    "visualization",
]


def __getattr__(name: str) -> ModuleType:
    """Import a submodule when it is used first."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return all public names, those of submodules that are not imported yet among them."""
    return sorted({*globals(), *__all__})
