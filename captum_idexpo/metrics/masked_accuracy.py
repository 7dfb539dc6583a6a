"""Masked accuracy: does the model still classify inputs of which a share of the features is masked at random?

A model that was never trained with masks answers masked copies with anything (Jain et al. 2022, arXiv 2204.08945), and
LIME and KernelSHAP then explain these answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from captum_idexpo._core.captum import TargetType
from captum_idexpo._core.errors import NAN_OF_MASKED_ROWS, InputError, NonFiniteError
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.forward import BatchForward, evaluate_given
from captum_idexpo._core.inputs import Baselines, Tensors, check_inputs, check_optional_count
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo._core.targets import Outputs, explained_class, positive_labels, target_indices
from captum_idexpo.metrics._scoring import TargetScorer, check_outputs, is_raw, predicted_class
from captum_idexpo.metrics.masks import HardMasks


@no_graph()
def masked_accuracy(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    target: Any,
    *,
    baselines: Baselines = None,
    feature_mask: Tensors | None = None,
    additional_forward_args: object = None,
    share: float = 0.5,
    outputs: Outputs = "logits",
    generator: Generator | None = None,
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Classify each example with a share of its features masked at random, and compare with the label.

    Of D features exactly round(share x D) are masked, drawn per example. Without a feature mask a feature is an
    element, of images ``(B, C, H, W)`` a pixel with all its channels.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, C)`` (or ``(B,)``).
        inputs: a tensor ``(B, ...)`` or a tuple of them.
        target: the labels: ``(B,)`` integers, an integer for all examples, or soft labels ``(B, C)``; for "multilabel"
            a multi-hot ``(B, L)``, or ``(B,)`` indices of true labels.
        baselines: values of masked features: None (zero), numbers, tensors that broadcast, or a callable of the inputs
            that returns them (`captum_idexpo.baselines`).
        feature_mask: integers that group positions into features, of the inputs' shape or broadcasting to it.
        additional_forward_args: passed to the forward function after the inputs.
        share: share of the features that is masked, in [0, 1]; 0 gives the plain accuracy.
        outputs: what the forward function returns: "logits", "log_probabilities", "probabilities" or "multilabel", as
            for `insertion_deletion`.
        generator: source of the masks; None: torch's global generator of the inputs' device.
        max_examples_per_batch: rows per forward pass; None: chosen from the model's largest layer output.
        check_finite: check for NaN and infinity, which costs a synchronisation on an accelerator.

    Returns:
        ``(B,)`` of 1.0 where the prediction is right and 0.0 where it is wrong; for a multi-hot target the share of the
        labels that are predicted right.

    Raises:
        ValueError: values are not finite, shapes do not fit, the target is missing, the batch is empty, the share lies
            outside [0, 1], or the outputs have no classes ("raw", or a function).
        TypeError: a tensor has the wrong type.
        IndexError: a label is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import masked_accuracy
        >>> x = torch.tensor([[3.0, 3.0], [-1.0, 2.0]])
        >>> def forward(x):  # the logit of class 1
        ...     return x.sum(dim=1)
        >>> masked_accuracy(forward, x, torch.tensor([1, 1]), share=0.0)
        tensor([1., 1.])
        >>> masked_accuracy(forward, x, torch.tensor([1, 0]), share=1.0)  # only the baseline is left: class 0
        tensor([0., 1.])
    """
    check_outputs(outputs)
    if is_raw(outputs):
        raise InputError(f"Masked accuracy needs classes, which outputs={outputs!r} do not have.")
    share = check_share(share)
    tensors, aligned = check_inputs(inputs, baselines, check_finite)
    truth = _labels(target, len(tensors[0]), tensors[0].device, outputs)
    max_rows = check_optional_count("max_examples_per_batch", max_examples_per_batch)
    one_label = truth if truth.dim() == 1 else truth.float().argmax(dim=1)
    scorer = TargetScorer(forward_func, tensors, one_label, additional_forward_args, outputs, check_finite, max_rows)
    if truth.dim() == 2 and truth.shape[1] != scorer.n_columns:
        raise InputError(
            f"The multi-hot target has {truth.shape[1]} labels, the output {scorer.n_columns} columns: give one for "
            "each."
        )
    layout = masked_features(feature_mask, tensors)
    kept = random_masks(layout, len(tensors[0]), tensors[0].device, share, generator)
    copies = MaskedInputs(tensors, aligned, layout, finite=check_finite or None).copies(kept[None])
    predicted = _predictions(forward_func, copies, additional_forward_args, outputs, scorer.max_rows)
    if truth.dim() == 2:
        return (predicted == truth).float().mean(dim=1)
    right = predicted.gather(1, truth[:, None])[:, 0] if outputs == "multilabel" else predicted == truth
    return right.float()


def check_share(share: float) -> float:
    """Return a share; InputError for a number outside [0, 1]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise InputError(f"share must be a number in [0, 1], given: {share!r}.")
    return float(share)


def masked_features(feature_mask: Tensors | None, tensors: tuple[Tensor, ...]) -> FeatureLayout:
    """Return the features that are masked: groups, elements, or of images and volumes positions with all channels."""
    if feature_mask is not None:
        return FeatureLayout.of_mask(feature_mask, tensors)
    shapes = [tensor.shape[1:] if tensor.dim() < 4 else torch.Size((1, *tensor.shape[2:])) for tensor in tensors]
    return FeatureLayout.of_positions(shapes)


def random_masks(
    layout: FeatureLayout, n_examples: int, device: torch.device, share: float, generator: Generator | None
) -> Tensor:
    """Return masks ``(B, D)`` of 0 for round(share x D) random features of each example and 1 for the others."""
    present = layout.present()
    counts = torch.tensor([layout.n_features]) if present is None else present.sum(dim=1)
    n_masked = (counts.double().cpu() * share).round().long().to(device).expand(n_examples)
    at = source(device, generator)
    noise = drawn_for(n_examples, lambda n: torch.rand(n, layout.n_features, device=at, generator=generator))
    masks = HardMasks(noise.to(device), None if present is None else present.expand(n_examples, -1))
    return masks(masks.thresholds(n_masked[None]), complement=True)[0]


def _predictions(
    forward_func: Callable[..., Any],
    copies: tuple[Tensor, ...],
    additional_forward_args: object,
    outputs: Outputs,
    max_rows: int,
) -> Tensor:
    """Return the predicted classes ``(B,)`` of masked inputs ``(1, B, ...)``, or which labels are predicted."""
    forward = BatchForward(forward_func, additional_forward_args, copies[0].shape[1])

    def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
        output: Tensor = forward(rows, examples, n_copies)
        if bool(output.isnan().any()):  # which has no largest entry
            raise NonFiniteError(f"The forward function returned NaN on a masked input.{NAN_OF_MASKED_ROWS}")
        return output > 0 if outputs == "multilabel" else predicted_class(output, outputs)

    return evaluate_given(evaluate, copies, max_rows)[:, 0]


def _labels(target: TargetType, n_examples: int, device: torch.device, outputs: Outputs) -> Tensor:
    """Return labels ``(B,)``, or booleans ``(B, L)`` for a multi-hot target."""
    if outputs == "multilabel":
        positive = positive_labels(target)
        if positive is not None:
            return positive.to(device)
    indices = target_indices(explained_class(target, outputs), n_examples, device)
    if indices is None or indices.shape[1] != 1:
        raise InputError(f"Masked accuracy needs the labels, one class per example; given: {target!r}.")
    return indices[:, 0]
