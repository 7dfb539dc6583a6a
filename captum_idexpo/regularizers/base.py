"""What regularizers with a single term share: its weight, the model's mode, and checks of the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_idexpo._core.errors import NonFiniteError, warn
from captum_idexpo._core.inputs import as_tuple
from captum_idexpo._core.modes import eval_mode as held_in_eval_mode
from captum_idexpo._core.modes import module_of, no_graph
from captum_idexpo._core.rng import accelerators, kept_streams
from captum_idexpo._core.targets import class_labels, require_integers
from captum_idexpo.metrics._scoring import OUTPUTS
from captum_idexpo.regularizers._explaining import Explaining

Weight = float | Literal["auto"]
_HEAVIEST = 1e8  # beyond it an automatic weight would raise rounding errors


class Regularizer(nn.Module):
    """One named, weighted loss term: ``weight * penalty``, the penalty a mean over the batch.

    Subclasses say what the penalty is. An automatic weight makes the term ``ratio`` times the task loss when training
    starts, as the authors of ExpO set theirs (Plumb et al. 2020), so that one ratio serves many data sets.

    Args:
        term: the term's name.
        forward_func: what is evaluated; kept out of the submodules, since it belongs to the user.
        model: the module held in eval mode; None: the forward function, if it is a module or a module's method.
        weight: a number, or "auto".
        ratio: of an automatically weighted term to the task loss, at the start.
        eval_mode: whether passes for this term run in eval mode (BatchNorm, dropout).
        outputs: what the forward function returns, as for `captum_idexpo.metrics.insertion_deletion`.

    Raises:
        ValueError: an argument out of range.
    """

    forward_func: Callable[..., Any]
    model: nn.Module | None
    auto_weight: Tensor

    def __init__(
        self,
        term: str,
        forward_func: Callable[..., Any],
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        eval_mode: bool = True,
        outputs: str = "logits",
    ) -> None:
        super().__init__()
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs must be one of {OUTPUTS}, given: {outputs!r}.")
        if not callable(forward_func):
            raise TypeError(f"The model must be a module or a forward function, given: {type(forward_func).__name__}.")
        self.term = term
        self.__dict__["forward_func"] = forward_func
        self.__dict__["model"] = module_of(forward_func) if model is None else model
        self.is_automatic = isinstance(weight, str)
        if isinstance(weight, str):
            if weight != "auto":
                raise ValueError(f"weight must be a number or 'auto', given: {weight!r}.")
            # A buffer, so that a resumed run goes on with the weight it started with.
            self.register_buffer("auto_weight", torch.tensor(math.nan))
        else:
            self._weight = not_negative("weight", weight)
        self.ratio = not_negative("ratio", ratio)
        self._waits = False
        self._explains_one_column: bool | None = None
        self.eval_mode = eval_mode
        self.outputs = outputs
        if eval_mode and self.model is None:
            warn(
                "The forward function is neither a module nor a module's method, so BatchNorm and dropout cannot be "
                "held in eval mode: give the module itself (or model= beside an explainer), or pass eval_mode=False if "
                "there is nothing to hold.",
            )

    @property
    def weight(self) -> float:
        """The term's weight; NaN while an automatic one is not set."""
        return float(self.auto_weight) if self.is_automatic else self._weight

    @property
    def needs_calibration(self) -> bool:
        """Whether the weight is automatic and not set yet."""
        return self.is_automatic and math.isnan(self.weight)

    def forward(self, inputs: Any, target: Any, annotations: Any = None) -> dict[str, Tensor]:
        """The weighted term, by name.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: labels ``(B,)``, or a regression's targets.
            annotations: what a loader yields third, see `RightForTheRightReasons`; else not used.

        Returns:
            A scalar by name. Under `torch.no_grad` it has the same value and no graph. An evaluation before an
            automatic weight is set gives 0.

        Raises:
            RuntimeError: an automatic weight that was never set, in training.
        """
        penalty = self._held_penalty(inputs, target, annotations)
        if not self.needs_calibration:
            return {self.term: self.weight * penalty}
        if not self._waits and self._in_training:
            raise RuntimeError(
                f"The weight of {type(self).__name__} is 'auto' and not set yet: before each step call "
                "`regularizer.calibrate(task_loss, inputs, target)`, which does nothing once it is set, nor under "
                "torch.no_grad(); ExplanationRegularizedLoss and the trainer do."
            )
        self._waits = False
        return {self.term: 0.0 * penalty}

    @property
    def _in_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def calibrate(self, task_loss: Tensor, inputs: Any, target: Any, annotations: Any = None) -> None:
        """Set an automatic weight from the first batch of the training: ``ratio * task_loss / penalty``, once.

        An evaluation, in eval mode or under `torch.no_grad`, sets nothing.
        Over several processes both are means over all of them. A penalty of next to nothing (a batch without
        annotations, a model that is linear before it is trained) or a task loss of 0 leaves the weight to the next
        batch, for which this has to be called again; the term counts for nothing with this one.

        Raises:
            NonFiniteError: the task loss or the penalty is NaN or infinite.
            ValueError: the task loss is negative, so that there is no share of it.
        """
        if not self.needs_calibration or not self._in_training:
            return
        with no_graph():
            penalty_now = self._held_penalty(inputs, target, annotations)
        both = torch.stack([task_loss.detach().float(), penalty_now.float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        task, penalty = both.tolist()
        if not math.isfinite(task + penalty):
            raise NonFiniteError(f"The task loss is {task:g}, the penalty {penalty:g}: there is no ratio of them.")
        if task < 0:
            raise ValueError(f"weight='auto' needs a task loss that is not negative, given: {task:g}; pass a number.")
        if 0 < task < penalty * _HEAVIEST:
            self.auto_weight.fill_(self.ratio * task / penalty)
        else:
            self._waits = True

    def penalty(self, inputs: Any, target: Any, annotations: Any) -> Tensor:
        """The scalar, before it is weighted."""
        raise NotImplementedError

    def _held_penalty(self, inputs: Any, target: Any, annotations: Any) -> Tensor:
        self._check_target(target)
        with held_in_eval_mode(self.model) if self.eval_mode else nullcontext():
            return self.penalty(inputs, target, annotations)

    def explained_target(self, explaining: Explaining, tensors: tuple[Tensor, ...], target: Any) -> Any:
        """The target as an explainer takes it: none for a regression, and none where a single column is explained."""
        if self.outputs == "raw" and isinstance(target, Tensor) and target.is_floating_point():
            return None
        if self._explains_one_column is None:
            # Once, and so without a trace in random streams: a run that is resumed looks again.
            with no_graph(), kept_streams(accelerators(tensors[0].device)), held_in_eval_mode(self.model):
                self._explains_one_column = explaining.of_one_column(tensors)
        if self._explains_one_column:
            return None
        labels = class_labels(target)
        if isinstance(labels, Tensor):
            require_integers(labels)
        return labels

    def _check_target(self, target: Any) -> None:
        """Refuses a regression's targets where the outputs are said to be classes."""
        if self.outputs == "raw" or not isinstance(target, Tensor) or not target.is_floating_point():
            return
        if not bool(((target >= 0) & (target <= 1)).all()):
            raise ValueError(
                f"The targets are real numbers, as a regression's, but outputs={self.outputs!r} speaks of classes: "
                "pass outputs='raw', or integer labels."
            )


def as_tensors(inputs: Any) -> tuple[Tensor, ...]:
    """A batch's tensors; TypeError for anything else, ValueError for an empty batch."""
    tensors = as_tuple(inputs, "inputs")
    if not tensors or not len(tensors[0]):
        raise ValueError("The batch is empty: there is nothing to regularize.")
    return tensors


def require_real(tensors: tuple[Tensor, ...]) -> None:
    """Refuses token ids and the like, which have no gradient and no neighbours; TypeError."""
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(
                f"inputs of {tensor.dtype} have no gradient and no neighbours: pass embeddings to a forward function "
                "that takes them, or explain an embedding layer (explainer=LayerIntegratedGradients(model, layer))."
            )


def not_negative(name: str, value: float) -> float:
    """A finite number, zero or positive; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number and not negative, given: {value}.")
    return value
