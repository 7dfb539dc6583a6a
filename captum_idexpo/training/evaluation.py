"""How good a model and its explanations are, averaged over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Generator as GeneratorType
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from captum_idexpo._core.batch import Batch, Unpack, unpacked
from captum_idexpo._core.modes import eval_mode, module_of, no_graph
from captum_idexpo._core.rng import seeded
from captum_idexpo._core.targets import class_labels, soft_classes
from captum_idexpo.metrics._scoring import is_raw, predicted_class
from captum_idexpo.regularizers import InsertionDeletion, Regularizer
from captum_idexpo.training.accuracy_floor import Classified, paired_change
from captum_idexpo.training.loaders import as_in_first_pass, failing_together, gathered_examples, left
from captum_idexpo.training.loss import call_model, refuse_cross_entropy_of_one_column

if TYPE_CHECKING:
    from accelerate import Accelerator


@no_graph()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    judge: InsertionDeletion | None,
    regularizers: Iterable[Regularizer],
    *,
    accuracy_weight: float,
    explain: Literal["predicted", "label"],
    masked_share: float | None = None,
    start: Classified | None = None,
    unpack: Unpack | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return mean scores over the examples of all processes; see `ExplanationRegularizedTrainer.evaluate`.

    An example without a true label has no scores of an explanation.

    With the predictions at the start it also returns the paired change of accuracy.

    Raises:
        ValueError: an unknown choice of what to explain, a masked share without a judge, or a loader that yields no
            batch.
    """
    found: dict[str, list[Tensor]] = {}
    classified: list[tuple[Any, dict[str, Tensor]]] = []
    scored = _scored(model, loader, judge, regularizers, explain, masked_share, unpack, accelerator)
    with closing(scored) as batches:
        for output, target, labels, scores in batches:
            if start is not None:
                classified.append((labels, scores))
            refuse_cross_entropy_of_one_column(loss_fn, output)
            scores = {"loss": loss_fn(output, target).expand(_n_examples(output, target)), **scores}
            for name, values in scores.items():
                found.setdefault(name, []).append(values.cpu().double())
    means = {"loss": float(torch.cat(found["loss"]).mean()), **_means(found, len(found["loss"]))}
    change = {} if start is None else paired_change(start, Classified.of(classified))
    return {**_with_validation_score(means, accuracy_weight), **change}


@no_graph()
def classify(
    model: nn.Module,
    loader: Iterable[Any],
    judge: InsertionDeletion | None,
    regularizers: Iterable[Regularizer],
    *,
    unpack: Unpack | None,
    accelerator: Accelerator,
) -> Classified:
    """Return which examples of a loader the model classifies right; nothing is explained."""
    scored = _scored(model, loader, judge, regularizers, None, None, unpack, accelerator)
    return Classified.of([(labels, scores) for _, _, labels, scores in scored])


@no_graph()
def example_scores(
    model: nn.Module,
    loader: Iterable[Any],
    judge: InsertionDeletion | None,
    regularizers: Iterable[Regularizer],
    *,
    explain: Literal["predicted", "label"],
    masked_share: float | None = None,
    unpack: Unpack | None,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Return the scores per example; see `ExplanationRegularizedTrainer.example_scores`."""
    scored = _scored(model, loader, judge, regularizers, explain, masked_share, unpack, accelerator)
    batches = [scores for _, _, _, scores in scored]
    names = [name for name in batches[0] if all(name in scores for scores in batches)]
    return {name: torch.cat([scores[name].cpu() for scores in batches]) for name in names}


def _scored(
    model: nn.Module,
    loader: Iterable[Any],
    judge: InsertionDeletion | None,
    regularizers: Iterable[Regularizer],
    explain: Literal["predicted", "label"] | None,
    masked_share: float | None,
    unpack: Unpack | None,
    accelerator: Accelerator,
) -> GeneratorType[tuple[Any, Any, Any, dict[str, Tensor]], None, None]:
    """Yield outputs, targets, labels and scores per example, batch by batch, of all processes.

    Labels are targets as accuracy takes them. With None to explain, nothing is.
    """
    from accelerate.utils import send_to_device

    if explain not in ("predicted", "label", None):
        raise ValueError(f"explain must be 'predicted' or 'label', given: {explain!r}.")
    if masked_share is not None and judge is None:
        raise ValueError(
            "Masked accuracy needs baselines, those of a judge: pass evaluation=InsertionDeletion(explainer, "
            "baselines=...) to the trainer."
        )
    judges = [] if judge is None else [judge]
    announced = [*judges, *regularizers]
    of_classes = [each for each in announced if not is_raw(each.outputs)]
    n_examples = 0
    masks = torch.Generator().manual_seed(torch.initial_seed())  # a stream of their own: they change no other score
    # Every evaluation draws the same masks, from the seeds that the user has set.
    generators = [generator for judge in judges for generator in judge.generators]
    same_numbers = seeded(torch.initial_seed(), accelerator.device, generators)
    with as_in_first_pass(loader), left(loader), eval_mode(model), same_numbers:
        for batch in loader:
            batch = send_to_device(unpacked(batch, unpack), accelerator.device)
            target = batch.target
            with failing_together(accelerator):
                output = call_model(model, batch)
                scores: dict[str, Tensor] = {}
                if judge is not None and explain is not None:
                    scores = _judge_batch(judge, batch, explain, masked_share, masks)
                predicted = _predicted(model, batch, output, judge, announced)
                scores = scores if predicted is None else {"predicted": predicted, **scores}
            # Gathered without the examples that fill up the last batch, before anything is averaged or decided.
            output, target, scores = gathered_examples(accelerator, loader, (output, target, scores), n_examples)
            n_examples += _n_examples(output, target)
            predicted = scores.pop("predicted", None)
            labels = of_classes[0].transformed(target) if of_classes else target
            accuracy = _accuracy(predicted, labels, bool(of_classes), _is_column(output))
            yield output, target, labels, {**accuracy, **scores}
    if not n_examples:
        raise ValueError("The loader yielded no batch to evaluate on.")


def _means(found: Mapping[str, list[Tensor]], n_batches: int) -> dict[str, float]:
    """Return the means of the scores that every batch has, over the examples that have them, which are not NaN."""
    scores = {name: torch.cat(parts) for name, parts in found.items() if name != "loss" and len(parts) == n_batches}
    return {name: float(values.nanmean()) for name, values in scores.items() if not values.isnan().all()}


def _n_examples(output: Any, target: Any) -> int:
    """Return the size of a batch whose target is a tensor, a nest of tensors, or a list with one entry per example."""
    from accelerate.utils import find_batch_size

    for tensor in (target, output):
        if isinstance(tensor, Tensor) and tensor.dim():
            return len(tensor)
    of_tensors = isinstance(target, Mapping) or isinstance(target[0], Tensor)
    return int(find_batch_size(target)) if of_tensors else len(target)


def _judge_batch(
    judge: InsertionDeletion, batch: Batch, explain: str, masked_share: float | None, masks: torch.Generator
) -> dict[str, Tensor]:
    """Return hard scores per example, ``(B,)``; NaN for an example without a true label to explain."""
    needs_target = explain == "label" or is_raw(judge.outputs)
    result = judge.scores(
        batch.inputs, batch.target if needs_target else None, additional_forward_args=batch.additional_forward_args
    )
    scores = {"insertion": result.insertion, "deletion": result.deletion}
    if result.insertion_gain is not None and result.deletion_gain is not None:
        scores.update(insertion_gain=result.insertion_gain, deletion_gain=result.deletion_gain)
    if not is_raw(judge.outputs):
        scores["one_minus_deletion"] = 1 - result.deletion
    if masked_share is not None:
        side = batch.additional_forward_args
        scores["masked_accuracy"] = judge.masked_accuracy(
            batch.inputs, batch.target, share=masked_share, additional_forward_args=side, generator=masks
        )
    return scores


def _is_column(output: object) -> bool:
    """Return True if an output is one number per example, ``(B,)`` or ``(B, 1)``."""
    return isinstance(output, Tensor) and (output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1))


def _predicted(
    model: nn.Module, batch: Batch, output: object, judge: InsertionDeletion | None, announced: list[Regularizer]
) -> Tensor | None:
    """Return the predicted class per example ``(B,)``, or which labels are predicted ``(B, L)``.

    It is None if the outputs are not announced as those of classes or labels. No value decides which they are.

    Args:
        model: the model.
        batch: what it was called with.
        output: what it returned.
        judge, announced: the judge, and with it the regularizers, whose `outputs` announce what forward functions
            return.
    """
    if not isinstance(output, Tensor) or output.dim() not in (1, 2):
        return None
    said = [each.outputs for each in announced if module_of(each.forward_func) is model]
    if judge is not None and is_raw(judge.outputs):
        return None
    if "multilabel" in said:
        return output > 0
    around = [each for each in announced if each.model is not None and model in {*each.model.modules()}]
    of_judge = judge in around and all(map(is_raw, said))
    if judge is not None and of_judge and judge.outputs == "multilabel":
        return judge.predicted_labels(batch.inputs, additional_forward_args=batch.additional_forward_args)
    if _is_column(output):
        if judge is not None and of_judge:
            # The judge's forward function makes classes of the model's column.
            return judge.predicted_class(batch.inputs, additional_forward_args=batch.additional_forward_args)
        if judge is None and any(map(is_raw, said)):
            return None
        if not said and any(each.outputs != "logits" for each in around):
            return None  # They explain a function around the model, and nobody says what its own column is.
    return predicted_class(output, next((kind for kind in said if not is_raw(kind)), "logits"))


def _accuracy(predicted: Tensor | None, target: Any, of_classes: bool, is_column: bool) -> dict[str, Tensor]:
    """Return which examples are classified right, ``(B,)`` of 0 and 1; nothing if the target holds no labels.

    Of several labels the accuracy is the share of the right ones, beside the examples in which all are right.
    """
    if predicted is None or not isinstance(target, Tensor):
        return {}
    if predicted.dim() == 2:
        if target.shape != predicted.shape:
            return {}
        right = predicted == (target > 0.5)
        return {"accuracy": right.float().mean(dim=1), "exact_match": right.all(dim=1).float()}
    # Zeros and ones are labels where classes are announced. Otherwise floats are the targets of a regression.
    labels = soft_classes(target) if of_classes else None
    if labels is None:
        labels = class_labels(target) if of_classes else target
    if labels.dim() != 1 or labels.is_floating_point():
        return {}
    if is_column and not bool(((labels == 0) | (labels == 1)).all()):
        return {}  # a regression of whole numbers
    return {"accuracy": (predicted == labels).float()}


def _with_validation_score(means: dict[str, float], accuracy_weight: float) -> dict[str, float]:
    """Add eq. (15), accuracy_weight x accuracy + insertion + 1 - deletion, with the terms that there are."""
    score = accuracy_weight * means.get("accuracy", -means["loss"]) + means.get("insertion", 0.0)
    return {**means, "valscore": score + means.get("one_minus_deletion", -means.get("deletion", 0.0))}
