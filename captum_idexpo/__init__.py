"""Captum's attributions, trainable: train PyTorch models for faithful explanations.

`attr` holds Captum's classes with a graph into the model's weights, `metrics` insertion, deletion and sensitivity-n,
`regularizers` the loss terms made of them, `training` a loss module and a trainer.
"""

from captum_idexpo._core.errors import InputError, InputTypeError, NonFiniteError
from captum_idexpo._version import __version__
from captum_idexpo.training import ExplanationRegularizedLoss, ExplanationRegularizedTrainer

__all__ = [
    "ExplanationRegularizedLoss",
    "ExplanationRegularizedTrainer",
    "InputError",
    "InputTypeError",
    "NonFiniteError",
    "__version__",
]
