"""How good a model and its explanations are, averaged over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, nn

from captum_idexpo._modes import eval_mode, module_of
from captum_idexpo.metrics._scoring import predicted_class
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training.loss import call_model, unpack_batch

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    judge: InsertionDeletion | None,
    *,
    accuracy_weight: float,
    explain: Literal["predicted", "label"],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean scores over all examples and processes; see `ExplanationRegularizedTrainer.evaluate`.

    Raises:
        ValueError: an unknown choice of what to explain, or a loader that yields no batch.
    """
    from accelerate.utils import send_to_device

    if explain not in ("predicted", "label"):
        raise ValueError(f"explain must be 'predicted' or 'label', given: {explain!r}.")
    columns: dict[str, list[Tensor]] = {}
    with eval_mode(model), _same_random_numbers(judge, accelerator.device):
        for batch in loader:
            inputs, target, _ = unpack_batch(send_to_device(batch, accelerator.device))
            scores = _score_batch(model, inputs, target, loss_fn, judge, explain)
            for name, values in scores.items():
                columns.setdefault(name, []).append(accelerator.gather_for_metrics(values))
    if not columns:
        raise ValueError("The loader yielded no batch to evaluate on.")
    means = {name: float(torch.cat(values).double().mean()) for name, values in columns.items()}
    return _with_validation_score(means, accuracy_weight)


def _score_batch(
    model: nn.Module,
    inputs: Any,
    target: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    judge: InsertionDeletion | None,
    explain: str,
) -> dict[str, Tensor]:
    """Scores of each example, ``(B,)``; the loss, which only is known as the batch's mean, repeated."""
    output = call_model(model, inputs)
    loss = loss_fn(output, target).detach().reshape(1)
    scores = {"loss": loss.repeat(len(target))}
    regression = judge is not None and judge.outputs == "raw"
    if not regression and isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point():
        # A judge of another forward function than the model says nothing of what the model returns.
        outputs = judge.outputs if judge is not None and module_of(judge.forward_func) is model else "logits"
        scores["accuracy"] = (predicted_class(output, outputs) == target).float()
    if judge is not None:
        result = judge.scores(inputs, target if explain == "label" else None)
        scores.update(insertion=result.insertion, deletion=result.deletion)
        if not regression:
            scores["one_minus_deletion"] = 1 - result.deletion
    return scores


def _with_validation_score(means: dict[str, float], accuracy_weight: float) -> dict[str, float]:
    """Adds eq. (15), accuracy_weight x accuracy + insertion + 1 - deletion, as far as its terms are there."""
    score = accuracy_weight * means.get("accuracy", -means["loss"]) + means.get("insertion", 0.0)
    return {**means, "valscore": score + means.get("one_minus_deletion", -means.get("deletion", 0.0))}


@contextmanager
def _same_random_numbers(judge: InsertionDeletion | None, device: torch.device) -> Iterator[None]:
    """Every evaluation draws the same masks, from the seeds the user set, and leaves all streams as they were."""
    generators = [g for g in _generators(judge) if isinstance(g, Generator)]
    states = [generator.get_state() for generator in generators]
    devices = [device] if device.type not in ("cpu", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(torch.initial_seed())
        for generator in generators:
            generator.manual_seed(generator.initial_seed())
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _generators(judge: InsertionDeletion | None) -> list[Any]:
    return [] if judge is None else [judge.generator, judge.attribute_kwargs.get("generator")]
