r"""Insertion and deletion: does the prediction rise and fall with the locations that an attribution ranks first?

With :math:`\alpha_s` the mask of the s highest locations, x the input and b the baseline (ID-ExpO, arXiv 2310.12553,
eq. (1)-(4); Petsiuk et al. 2018, arXiv 1806.07421):

.. math::

    \text{insertion} = \operatorname{mean}_s p_y(\alpha_s x + (1 - \alpha_s) b), \qquad
    \text{deletion} = \operatorname{mean}_s p_y((1 - \alpha_s) x + \alpha_s b).

The soft metric (eq. 7-8) replaces :math:`\alpha_s` by the masks of `SoftMasks`. It is differentiable with respect to
the attribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Generator, Tensor

from captum_idexpo._core.inputs import Baselines, Tensors, check_count_or_zero
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics._masking import InsertionDeletionScores, Masking, RandomOrders


def insertion_deletion(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensors,
    *,
    baselines: Baselines = None,
    feature_mask: Tensors | None = None,
    group_reduction: Literal["mean", "sum"] = "mean",
    additional_forward_args: object = None,
    target: Any = None,
    fraction: float = 1.0,
    step_size: int | None = None,
    temperature: float | Literal["auto"] | None = None,
    outputs: Outputs = "logits",
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
    n_random_orders: int = 0,
    generator: Generator | None = None,
) -> InsertionDeletionScores:
    """Compute insertion and deletion scores of attributions, with their curves.

    The scores are means over s = step_size, 2 step_size, ... up to S = floor(fraction x D) of the D locations.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, C)`` (or ``(B,)``).
        inputs: a tensor ``(B, ...)`` or a tuple of them, whose locations are ranked together.
        attributions: of the inputs' shape (a location is an element). For ``(B, C, H, W)`` also of shape ``(B, H, W)``
            or ``(B, 1, H, W)`` (a location is a pixel; all its channels are masked together).
        baselines: values of deleted locations, and of locations that are not inserted yet: None (zero), numbers,
            tensors that broadcast, or a callable of the inputs that returns them (`captum_idexpo.baselines`).
        feature_mask: integers that group positions into locations, of the inputs' shape or broadcasting to it.
        group_reduction: a group's attribution is the "mean" or the "sum" over its positions.
        additional_forward_args: passed to the forward function after the inputs.
        target: the class: an integer, ``(B,)`` integers, or tuples for outputs with more axes. None if there is one
            output per row. Soft labels ``(B, C)`` stand for their largest class.
        fraction: share of the locations that is inserted or deleted, in (0, 1]. The default is 1.0 (all locations)
            here. In `captum_idexpo.regularizers.InsertionDeletion` it is 0.5, as in ID-ExpO's training.
        step_size: locations per step. None: the smallest number that gives at most 32 steps.
        temperature: None: the hard metric (ties are ordered by position). "auto": the soft metric at the paper's
            temperature. A positive number: the soft metric at that multiple of the paper's temperature.
        outputs: what the forward function returns: "logits", "log_probabilities", "probabilities" (classes along the
            last axis), "multilabel" (logits of labels along the last axis, each with a sigmoid of its own), or "raw"
            (regression: the scores are means of outputs). A single column is class 1, and its complement is class 0.
            The attribution explains the column; for class 0 its sign is flipped. Or a function (output, target) ->
            ``(n_rows,)``, whose value is the score; the tensors of the target follow their examples.
        max_examples_per_batch: rows per forward pass; it changes the result by rounding only. None: chosen from the
            model's largest layer output and the device.
        check_finite: check for NaN and infinity, which costs a synchronisation on an accelerator.
        n_random_orders: also compute the gains over so many random orders of the same locations, drawn per example.
            Each order costs as much as the scores. 0: no gains.
        generator: source of the random orders; None: torch's global generator of the inputs' device.

    Returns:
        Scores and curves, and the gains with n_random_orders. A raw score also depends on how the model takes masked
        inputs in general. A gain does not, and is about 0 for an attribution that ranks no better than chance. The
        scores lie in [0, 1] except for "raw". They have a graph if gradients are enabled.

    Raises:
        ValueError: values are not finite, shapes do not fit, the target is missing, the batch is empty, or a fraction,
            step size or temperature is out of range.
        TypeError: a tensor has the wrong type.
        IndexError: a target is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import insertion_deletion
        >>> def forward(x):  # class 1 is the sum of the features
        ...     return torch.stack([torch.zeros(len(x)), x.sum(dim=1)], dim=1)
        >>> x = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
        >>> scores = insertion_deletion(forward, x, attributions=x, target=1)
        >>> scores.fractions
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
        >>> scores.insertion_curve
        tensor([[0.9820, 0.9991, 0.9999, 1.0000]])
        >>> scores.deletion_curve
        tensor([[0.9975, 0.9526, 0.7311, 0.5000]])
        >>> scores = insertion_deletion(forward, x, attributions=x, target=1, n_random_orders=100)
        >>> bool(scores.insertion_gain > 0)  # better than a random order
        True
    """
    n_random_orders = check_count_or_zero("n_random_orders", n_random_orders)
    masking = Masking.of(
        forward_func,
        inputs,
        attributions,
        baselines=baselines,
        feature_mask=feature_mask,
        group_reduction=group_reduction,
        additional_forward_args=additional_forward_args,
        target=target,
        fraction=fraction,
        step_size=step_size,
        temperature=temperature,
        outputs=outputs,
        max_examples_per_batch=max_examples_per_batch,
        check_finite=check_finite,
    )
    return masking.result(RandomOrders(n_random_orders, lambda: generator))


def insertion(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensors,
    *,
    baselines: Baselines = None,
    feature_mask: Tensors | None = None,
    group_reduction: Literal["mean", "sum"] = "mean",
    additional_forward_args: object = None,
    target: Any = None,
    fraction: float = 1.0,
    step_size: int | None = None,
    temperature: float | Literal["auto"] | None = None,
    outputs: Outputs = "logits",
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Compute the mean probability of the target while the highest-ranked locations are inserted into the baseline.

    The result has shape ``(B,)``. See ID-ExpO (arXiv 2310.12553), eq. (1)-(2). Arguments, errors and conventions are
    those of `insertion_deletion`: ``fraction`` defaults to 1.0 (all locations), not to 0.5 as in
    `captum_idexpo.regularizers.InsertionDeletion`.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import insertion
        >>> x = torch.tensor([[2.0, -1.0]])
        >>> insertion(lambda x: x.sum(1), x, attributions=x, outputs="raw", step_size=1)  # mean of 2 and 2 - 1
        tensor([1.5000])
    """
    masking = Masking.of(
        forward_func,
        inputs,
        attributions,
        baselines=baselines,
        feature_mask=feature_mask,
        group_reduction=group_reduction,
        additional_forward_args=additional_forward_args,
        target=target,
        fraction=fraction,
        step_size=step_size,
        temperature=temperature,
        outputs=outputs,
        max_examples_per_batch=max_examples_per_batch,
        check_finite=check_finite,
    )
    return masking.schedule.mean(masking.scores("insertion", "probability"))


def deletion(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensors,
    *,
    baselines: Baselines = None,
    feature_mask: Tensors | None = None,
    group_reduction: Literal["mean", "sum"] = "mean",
    additional_forward_args: object = None,
    target: Any = None,
    fraction: float = 1.0,
    step_size: int | None = None,
    temperature: float | Literal["auto"] | None = None,
    outputs: Outputs = "logits",
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Compute the mean probability of the target while the highest-ranked locations are replaced by the baseline.

    The result has shape ``(B,)``. See ID-ExpO (arXiv 2310.12553), eq. (3)-(4). Arguments, errors and conventions are
    those of `insertion_deletion`: ``fraction`` defaults to 1.0 (all locations), not to 0.5 as in
    `captum_idexpo.regularizers.InsertionDeletion`.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import deletion
        >>> x = torch.tensor([[2.0, -1.0]])
        >>> deletion(lambda x: x.sum(1), x, attributions=x, outputs="raw", step_size=1)  # mean of -1 and 0
        tensor([-0.5000])
    """
    masking = Masking.of(
        forward_func,
        inputs,
        attributions,
        baselines=baselines,
        feature_mask=feature_mask,
        group_reduction=group_reduction,
        additional_forward_args=additional_forward_args,
        target=target,
        fraction=fraction,
        step_size=step_size,
        temperature=temperature,
        outputs=outputs,
        max_examples_per_batch=max_examples_per_batch,
        check_finite=check_finite,
    )
    return masking.schedule.mean(masking.scores("deletion", "probability"))
