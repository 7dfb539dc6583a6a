"""Training with explanation regularizers: the loss as one module, a trainer, its history."""

from captum_idexpo.training.checkpoint import CheckpointError
from captum_idexpo.training.fsdp import gathered
from captum_idexpo.training.history import History
from captum_idexpo.training.loss import ExplanationRegularizedLoss
from captum_idexpo.training.schedules import linear_warmup
from captum_idexpo.training.sweep import Sweep, sweep
from captum_idexpo.training.trainer import ExplanationRegularizedTrainer

__all__ = [
    "CheckpointError",
    "ExplanationRegularizedLoss",
    "ExplanationRegularizedTrainer",
    "History",
    "Sweep",
    "gathered",
    "linear_warmup",
    "sweep",
]
