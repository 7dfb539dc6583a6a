"""Training with explanation regularizers: the loss as one module, a trainer, its history."""

from captum_idexpo.training.history import History
from captum_idexpo.training.loss import ExplanationRegularizedLoss
from captum_idexpo.training.trainer import ExplanationRegularizedTrainer

__all__ = ["ExplanationRegularizedLoss", "ExplanationRegularizedTrainer", "History"]
