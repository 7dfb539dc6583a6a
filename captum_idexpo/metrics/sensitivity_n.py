"""Sensitivity-n: does the sum of n locations' attributions predict how much masking them changes the output?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from captum_idexpo._core.errors import NAN_OF_MASKED_ROWS
from captum_idexpo._core.features import MaskedInputs
from captum_idexpo._core.forward import evaluate_copies
from captum_idexpo._core.inputs import (
    Baselines,
    Tensors,
    check_count,
    check_inputs,
    check_optional_count,
    require_finite,
)
from captum_idexpo._core.rng import source
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics._locations import Locations, groups_of
from captum_idexpo.metrics._scoring import TargetScorer


def sensitivity_n(
    forward_func: Callable[..., Any],
    inputs: Tensors,
    attributions: Tensors,
    n: int,
    *,
    baselines: Baselines = None,
    feature_mask: Tensors | None = None,
    group_reduction: Literal["mean", "sum"] = "mean",
    additional_forward_args: object = None,
    target: Any = None,
    n_samples: int = 100,
    outputs: Outputs = "logits",
    generator: Generator | None = None,
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    r"""Compute Pearson's correlation between the attribution sum of n locations and the prediction's drop.

    The correlation is over random subsets A of n locations (Ancona et al. 2018, arXiv 1711.06104). For an example x
    with attributions :math:`\phi` it is that of :math:`\sum_{d \in A} \phi_d` and :math:`p_y(x) - p_y(x_{A \to b})`.

    Arguments not listed here are those of `insertion_deletion`.

    Args:
        n: size of the subsets, 1 to D.
        n_samples: random subsets per example, at least 2.
        generator: source of the subsets; None: torch's global generator of the inputs' device.

    Returns:
        ``(B,)`` in [-1, 1]; 0 if the sum or the drop is the same for all subsets.

    Raises:
        ValueError: n or n_samples is out of range, or an error of `insertion_deletion`.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import sensitivity_n
        >>> x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])  # a linear function's attributions are exact
        >>> sensitivity_n(lambda x: x.sum(1), x, attributions=x, n=2, outputs="raw").round(decimals=4)
        tensor([1.])
    """
    check_count("n", n)
    if check_count("n_samples", n_samples) < 2:
        raise ValueError(f"n_samples must be at least 2 for a correlation, given: {n_samples}.")
    tensors, aligned = check_inputs(inputs, baselines, check_finite)
    locations = Locations.of(attributions, tensors, groups_of(feature_mask, tensors), group_reduction)
    if check_finite:
        require_finite((locations.values,), "attributions")
    smallest = int(locations.counts.min())
    if n > smallest:
        raise ValueError(f"n must lie between 1 and the number of locations, {smallest}; given: {n}.")
    max_rows = check_optional_count("max_examples_per_batch", max_examples_per_batch)
    scorer = TargetScorer(forward_func, tensors, target, additional_forward_args, outputs, check_finite, max_rows)
    sign = scorer.sign()
    values = locations.values if sign is None else locations.values * sign
    chosen = _random_subsets(locations, n, n_samples, generator)
    subsets = torch.zeros(n_samples, *values.shape, dtype=torch.bool, device=values.device).scatter_(-1, chosen, True)

    masked = MaskedInputs(tensors, aligned, locations.layout)

    def perturb(examples: slice, copies: slice, *_: Tensor) -> tuple[Tensor, ...]:
        return masked.copies(~subsets[copies, examples], examples)

    def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
        return scorer(rows, examples, n_copies, "probability")

    n_examples = len(tensors[0])
    unmasked = scorer.unmasked(tensors, "probability")
    scores = evaluate_copies(evaluate, perturb, n_examples, n_samples, scorer.max_rows)
    if check_finite:
        require_finite((scores.detach(),), "the forward function's output on masked inputs", NAN_OF_MASKED_ROWS)
    sums = values.expand(n_samples, -1, -1).gather(-1, chosen).sum(dim=-1).T
    scale = torch.maximum(unmasked.detach().abs(), scores.detach().abs().amax(dim=1, keepdim=True))
    return _correlation(sums, unmasked - scores, n * values.detach().abs().amax(dim=1, keepdim=True), scale)


def _random_subsets(locations: Locations, n: int, n_samples: int, generator: Generator | None) -> Tensor:
    """Draw subsets of n of each example's locations, all equally likely, as indices ``(n_samples, B, n)``."""
    values = locations.values
    at = source(values.device, generator)
    noise = torch.rand(n_samples, *values.shape, device=at, generator=generator).to(values.device)
    if locations.present is not None:
        noise = noise.masked_fill(~locations.present, -1.0)
    return noise.topk(n, dim=-1).indices


def _correlation(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """Return Pearson's correlation along the last axis; 0 if a side varies by no more than its scale's rounding."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    rounding = 16 * torch.finfo(dtype).eps
    varies = (a.abs().amax(1) > rounding * scale_a.squeeze(1)) & (b.abs().amax(1) > rounding * scale_b.squeeze(1))
    a, b = _unit(a, varies), _unit(b, varies)
    return torch.where(varies, (a * b).sum(dim=1), 0.0).clamp(-1, 1)


def _unit(vectors: Tensor, varies: Tensor) -> Tensor:
    """Return vectors ``(B, n)`` of length 1; unchanged if constant. No square under- or overflows on the way."""
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    scaled = vectors / torch.where(varies[:, None], largest, 1.0)
    return scaled / torch.where(varies, scaled.square().sum(dim=1), 1.0).sqrt()[:, None]
