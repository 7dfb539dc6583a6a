"""Scores of the target from a forward function's output: its probability, its log probability, or a raw value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_idexpo._core.chunks import look
from captum_idexpo._core.errors import InputTypeError, NonFiniteError, all_finite, warn
from captum_idexpo._core.forward import BatchForward, evaluate_copies, repeated_for_chunks
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.targets import Outputs, explained_class, target_indices

_ENOUGH_LOGITS = 20
OUTPUTS = ("logits", "log_probabilities", "probabilities", "multilabel", "raw")
Score = Literal["probability", "log_probability", "log_complement"]
"""p_y, log p_y or log(1 - p_y). For raw outputs each of them is the output itself."""


def check_outputs(outputs: Outputs) -> None:
    """Raise ValueError if `outputs` is neither one of `OUTPUTS` nor a function."""
    if not callable(outputs) and outputs not in OUTPUTS:
        raise ValueError(
            f"outputs must be one of {OUTPUTS} or a function (output, target) -> (B,), given: {outputs!r}."
        )


def is_raw(outputs: Outputs) -> bool:
    """Return True if the scores are numbers of any size, which have no logarithm and no complement."""
    return callable(outputs) or outputs == "raw"


def _one_class(target: Tensor, outputs: Outputs) -> Tensor:
    """Return the class or label of each example that a target ``(B, L > 1)`` stands for."""
    if outputs == "multilabel":
        raise InputTypeError(
            f"An attribution explains one label per example, given: a target of shape {tuple(target.shape)}. Pass the "
            "index of that label, (B,)."
        )
    return target if is_raw(outputs) else explained_class(target, outputs)


class TargetScorer:
    """Scorer of the target on the rows of copies of one batch.

    Args:
        forward_func: takes the inputs and the additional arguments, returns ``outputs``.
        inputs: the batch, tensors ``(B, ...)``.
        target: an integer, a tensor of one or ``(B,)``, a list of B integers or tuples, a tuple (earlier axes first,
            the class last), or None if the output has a single column. For a function as ``outputs`` whatever that
            takes; its tensors follow their examples.
        additional_forward_args: passed to the forward function after the inputs.
        outputs: what the forward function returns, one of `OUTPUTS`, classes or labels along the last axis; or a
            function (output, target) -> ``(n_rows,)``, which is the score.
        check_values: check the output's values, which costs a synchronisation on an accelerator.
        max_rows: chunk size; None: chosen automatically.

    Attributes:
        max_rows: chunk size.
        is_compiled: True if the forward function is a model with compiled parts.

    Raises:
        ValueError: ``outputs`` is unknown; the target is missing; the target or the output has the wrong shape; the
            output's values contradict ``outputs``.
        TypeError: the target has the wrong type.
        IndexError: the target is out of range.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        target: Any,
        additional_forward_args: object = None,
        outputs: Outputs = "logits",
        check_values: bool = True,
        max_rows: int | None = None,
    ) -> None:
        check_outputs(outputs)
        self.outputs = outputs
        n_examples = len(inputs[0])
        if isinstance(target, Tensor) and target.dim() == 2 and target.shape[1] > 1:
            target = _one_class(target, outputs)
        self._target = None if callable(outputs) else target_indices(target, n_examples, inputs[0].device)
        self._repeated_target = repeated_for_chunks(target if callable(outputs) else self._target, n_examples)
        self._forward = BatchForward(forward_func, additional_forward_args, n_examples)
        # The output on a few unmasked inputs gives the number of columns, and lets target and values be checked early.
        together = max_rows is not None and n_examples <= max_rows < 2 * n_examples
        seen = look(forward_func, self._output, inputs, max_rows, together=together)
        output: Tensor = seen.output
        self.max_rows = seen.max_rows
        self.is_compiled = self._forward.is_compiled
        self.n_columns: int = output[0].numel()
        self.one_column = self.n_columns == 1 and not is_raw(outputs) and outputs != "multilabel"
        if not callable(outputs):
            self._check_target(output)
        if check_values:
            _check_values(output, outputs)

    def __call__(self, rows: tuple[Tensor, ...], examples: slice, n_copies: int, score: Score) -> Tensor:
        """Return one score per row of ``n_copies`` copies of the given examples."""
        output = self._output(rows, examples, n_copies)
        target = self._repeated_target(examples, n_copies)
        if callable(self.outputs):
            return _checked_score(self.outputs(output, target), len(output))
        if target is None:
            target = torch.full((len(output), 1), int(self.one_column), device=output.device)
        *columns, label = target.unbind(1)
        for column in columns:
            output = output[torch.arange(len(output), device=output.device), column]
        if self.outputs == "raw":
            return output.gather(1, label[:, None]).squeeze(1)
        if self.one_column:
            return _BINARY[self.outputs](output.squeeze(1), label, score)
        return _MULTICLASS[self.outputs](output, label, score)

    def unmasked(self, inputs: tuple[Tensor, ...], score: Score, memory: MemoryBudget | None = None) -> Tensor:
        """Return the score of the unmasked inputs, ``(B, 1)``."""

        def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            return self(rows, examples, n_copies, score)

        def plain(examples: slice, _: slice, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor[None, examples].clone() for tensor in inputs)  # the function may write into its input

        return evaluate_copies(evaluate, plain, len(inputs[0]), 1, self.max_rows, through=inputs, memory=memory)

    def sign(self) -> Tensor | None:
        """Return the sign of the attribution per example, ``(B, 1)``; None if no sign has to change.

        An attribution explains the single column, which is class 1. Class 0 is the complement, so its sign is -1.
        """
        return self.sign_of_one_column() if self.one_column else None

    def sign_of_one_column(self) -> Tensor | None:
        """Return the sign of an attribution that explains another function's single column, ``(B, 1)``.

        It is None for raw outputs, without a target, and for more than two columns.
        """
        two_classes = not is_raw(self.outputs) and self.outputs != "multilabel" and self.n_columns <= 2
        if not two_classes or self._target is None:
            return None
        return 2 * self._target[:, -1:] - 1

    def _output(self, rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
        output = self._forward(rows, examples, n_copies)
        if not isinstance(output, Tensor) or not output.dim() or len(output) != len(rows[0]):
            given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The forward function must return a tensor with one row for each of its {len(rows[0])} inputs; "
                f"given: {given}."
            )
        if callable(self.outputs):
            return output
        if math.prod(output.shape[1:]) == 1:
            output = output.reshape(-1, 1)
        return output if output.dtype == torch.float64 else output.float()

    def _check_target(self, output: Tensor) -> None:
        sizes = torch.tensor([2] if self.one_column else list(output.shape[1:]), device=output.device)
        if self._target is None:
            if self.n_columns != 1:
                raise ValueError(
                    f"target is missing: the forward function returns {tuple(output.shape[1:])} values an example; "
                    "pass target= (labels, or predictions: model(inputs).argmax(1)), or a regularizer's "
                    "target_transform=, which chooses the column."
                )
        elif self._target.shape[1] != len(sizes):
            raise ValueError(
                f"target must hold {len(sizes)} numbers an example to choose from outputs of shape "
                f"{tuple(output.shape)}; given: {self._target.shape[1]}."
            )
        elif bool(((self._target < 0) | (self._target >= sizes)).any()):
            raise IndexError(
                f"target lies between {self._target.amin(0).tolist()} and {self._target.amax(0).tolist()}, out of "
                f"range for outputs of size {sizes.tolist()}: numbers start at 0."
            )


def _checked_score(score: object, n_rows: int) -> Tensor:
    if isinstance(score, Tensor) and score.shape == (n_rows,):
        return score if score.dtype == torch.float64 else score.float()
    given = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
    raise ValueError(
        f"outputs must be a function (output, target) -> (n_rows,), one score per row; given: {given} for {n_rows}."
    )


def predicted_class(output: Tensor, outputs: Outputs) -> Tensor:
    """Return the class of highest probability, ``(B,)``, from outputs ``(B, C)``, ``(B, 1)`` or ``(B,)``."""
    if callable(outputs) or outputs not in (*_LOWEST_OF_CLASS_1, "multilabel"):
        raise ValueError(f"outputs={outputs!r} have no predicted class: pass a target.")
    output = output if output.dim() > 1 else output[:, None]
    if output.dim() > 2:
        raise ValueError(f"Outputs of shape {tuple(output.shape)} have no single predicted class: pass a target.")
    if output.shape[1] > 1 or outputs == "multilabel":
        return output.argmax(dim=1)
    return (output.squeeze(1) > _LOWEST_OF_CLASS_1[outputs]).long()


def log_probabilities(output: Tensor, outputs: Outputs) -> Tensor:
    """Return the log probability of each class, ``(B, C)``.

    Outputs ``(B, 1)`` or ``(B,)`` have two classes. Of L labels these are the logarithms for true and for false,
    ``(B, 2L)``.
    """
    output = (output if output.dim() > 1 else output[:, None]).to(torch.promote_types(output.dtype, torch.float32))
    if callable(outputs) or outputs == "raw":
        raise ValueError("Raw outputs have no probabilities: pass outputs='logits', or whatever the model returns.")
    if outputs == "multilabel":
        return torch.cat([F.logsigmoid(output), F.logsigmoid(-output)], dim=1)
    if output.shape[1] > 1:
        if outputs == "logits":
            return output.log_softmax(dim=1)
        return _log(output) if outputs == "probabilities" else output
    labels = torch.tensor([0, 1], device=output.device)
    return _BINARY[outputs](output, labels, "log_probability")


def _multiclass_logits(output: Tensor, label: Tensor, score: Score) -> Tensor:
    if score == "probability":
        return _pick(output.softmax(dim=-1), label)
    log_probabilities = output.log_softmax(dim=-1)
    if score == "log_probability":
        return _pick(log_probabilities, label)
    return log_probabilities.masked_fill(F.one_hot(label, output.shape[-1]).bool(), -torch.inf).logsumexp(dim=-1)


def _multiclass_log_probabilities(output: Tensor, label: Tensor, score: Score) -> Tensor:
    log_p = _pick(output, label)
    if score == "log_complement":
        return output.masked_fill(F.one_hot(label, output.shape[-1]).bool(), -torch.inf).logsumexp(dim=-1)
    return log_p.exp() if score == "probability" else log_p


def _multilabel(output: Tensor, label: Tensor, score: Score) -> Tensor:
    logit = _pick(output, label)
    if score == "probability":
        return logit.sigmoid()
    return F.logsigmoid(logit if score == "log_probability" else -logit)


def _multiclass_probabilities(output: Tensor, label: Tensor, score: Score) -> Tensor:
    if score == "log_complement":  # 1 - p would lose the digits of a small complement
        return _log(output.masked_fill(F.one_hot(label, output.shape[-1]).bool(), 0.0).sum(dim=-1))
    p = _pick(output, label)
    return p if score == "probability" else _log(p)


def _binary_logits(output: Tensor, label: Tensor, score: Score) -> Tensor:
    signed = output * (2 * label - 1)
    if score == "probability":
        return signed.sigmoid()
    return F.logsigmoid(signed if score == "log_probability" else -signed)


def _binary_log_probabilities(output: Tensor, label: Tensor, score: Score) -> Tensor:
    if score == "probability":
        return torch.where(label == 1, output.exp(), -output.expm1())
    of_column = (label == 1) == (score == "log_probability")
    return torch.where(of_column, output, _log(-output.expm1()))


def _binary_probabilities(output: Tensor, label: Tensor, score: Score) -> Tensor:
    of_column = (label == 1) == (score != "log_complement")
    p = torch.where(of_column, output, 1 - output)
    return p if score == "probability" else _log(p)


_MULTICLASS = {
    "logits": _multiclass_logits,
    "log_probabilities": _multiclass_log_probabilities,
    "probabilities": _multiclass_probabilities,
    "multilabel": _multilabel,
}
_LOWEST_OF_CLASS_1 = {"logits": 0.0, "log_probabilities": math.log(0.5), "probabilities": 0.5}
_BINARY = {
    "logits": _binary_logits,
    "log_probabilities": _binary_log_probabilities,
    "probabilities": _binary_probabilities,
}


def _pick(values: Tensor, label: Tensor) -> Tensor:
    return values.gather(-1, label[:, None]).squeeze(-1)


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _check_values(output: Tensor, outputs: Outputs) -> None:
    """Raise an error for values that contradict `outputs`; warn about logits that look like probabilities."""
    if not all_finite(output) and not (outputs == "log_probabilities" and bool((output <= 0).all())):
        raise NonFiniteError("The forward function returned NaN or infinity on the inputs themselves.")
    rows_sum_to_one = output.shape[-1] > 1 and bool(
        ((output >= 0).all(dim=-1) & ((output.sum(dim=-1) - 1).abs() < 1e-4)).all()
    )
    if outputs == "logits" and rows_sum_to_one:
        warn(
            "Each row of the forward function's output already sums to one: these look like probabilities, but "
            "outputs='logits' takes their softmax again. Pass outputs='probabilities' if that is what they are.",
        )
    # Fewer logits than this may lie in [0, 1] by chance.
    enough = output.numel() >= _ENOUGH_LOGITS
    if outputs == "multilabel" and enough and bool(((output >= 0) & (output <= 1)).all()):
        warn(
            "All outputs lie in [0, 1]: these look like probabilities, but outputs='multilabel' takes their sigmoid "
            "again. Let the forward function return logits.",
        )
    if outputs == "probabilities" and not bool(((output >= -1e-6) & (output <= 1 + 1e-6)).all()):
        raise ValueError("outputs='probabilities', but the forward function returned values outside [0, 1].")
    if outputs == "log_probabilities" and not bool((output <= 1e-6).all()):
        raise ValueError("outputs='log_probabilities', but the forward function returned positive values.")
