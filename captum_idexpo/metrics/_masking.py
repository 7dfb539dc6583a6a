"""Masked copies of a batch and their scores. Locations are masked step by step, in the order of an attribution.

The metrics use all steps and the target's probability. The regularizer uses some steps and log probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from captum_idexpo._core.errors import NAN_OF_MASKED_ROWS, warn
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
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics._locations import Locations, constant_maps_message, groups_of
from captum_idexpo.metrics._scoring import Score, TargetScorer
from captum_idexpo.metrics.masks import HardMasks, SoftMasks

MAX_DEFAULT_STEPS = 32

Direction = Literal["insertion", "deletion"]


class InsertionDeletionScores(NamedTuple):
    """Insertion and deletion scores per example, with their curves. A score is the mean of its curve.

    Attributes:
        insertion: ``(B,)``, high if the attribution is faithful.
        deletion: ``(B,)``, low if the attribution is faithful.
        fractions: share of the locations inserted or deleted at each step, ``(n_steps,)``. ``(B, n_steps)`` if a
            feature mask gives the examples different numbers of locations. A curve then repeats its last value after
            the example's own steps.
        insertion_curve: ``(B, n_steps)``.
        deletion_curve: ``(B, n_steps)``.
        insertion_gain: ``(B,)``, insertion minus the mean insertion along random orders of the same locations; None if
            none were drawn.
        deletion_gain: ``(B,)``, the mean deletion along these orders minus deletion. Both gains are high if the
            attribution is faithful, and about 0 if it ranks the locations no better than chance.
    """

    insertion: Tensor
    deletion: Tensor
    fractions: Tensor
    insertion_curve: Tensor
    deletion_curve: Tensor
    insertion_gain: Tensor | None = None
    deletion_gain: Tensor | None = None


@dataclass(frozen=True)
class StepSchedule:
    """Numbers of inserted or deleted locations at which a score is computed.

    Attributes:
        steps: numbers of locations ``(B or 1, n_steps)``, ascending; an example with fewer steps repeats its last.
        n_steps: the example's own number of steps, ``(B or 1, 1)``.
        n_locations: D, ``(B or 1, 1)``.
    """

    steps: Tensor
    n_steps: Tensor
    n_locations: Tensor

    @classmethod
    def of(
        cls, n_locations: Tensor, fraction: float, step_size: int | None, device: torch.device | None = None
    ) -> StepSchedule:
        """Return the steps s = step_size, 2 step_size, ... up to S = floor(fraction x D).

        Args:
            n_locations: D per example, or one D for all; on the CPU.
            fraction, step_size: as for `insertion_deletion`.
            device: device of the schedule's tensors; None: the CPU.

        Raises:
            ValueError: fraction is not in (0, 1], step_size is not positive, or S is less than one step in every
                example.
        """
        cls.check_fraction(fraction, step_size)
        counts = n_locations[:, None]
        total = (counts.double() * fraction + 1e-9).floor().long()
        most = int(total.max())
        if most < (step_size or 1):
            raise ValueError(
                f"fraction={fraction} of {int(counts.max())} locations is {most}, less than one step of "
                f"{step_size or 1}: raise fraction" + (" or lower step_size." if step_size else ".")
            )
        size = total // (MAX_DEFAULT_STEPS + 1) + 1 if step_size is None else torch.full_like(total, step_size)
        # An example with less than one step in S (an image of few superpixels) takes one step of up to step_size
        # locations, since every example needs a score.
        n_steps = (total // size).clamp_min(1)
        numbers = torch.arange(1, int(n_steps.max()) + 1, device=counts.device)
        steps = torch.minimum(torch.minimum(numbers, n_steps) * size, counts)
        return cls(steps.to(device), n_steps.to(device), counts.to(device))

    @staticmethod
    def check_fraction(fraction: float, step_size: int | None) -> None:
        """Raise ValueError if fraction is not in (0, 1], or step_size is neither None nor a positive integer."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], given: {fraction}.")
        if step_size is not None:
            check_count("step_size", step_size)

    def mean(self, curve: Tensor) -> Tensor:
        """Return the mean ``(B,)`` of a curve ``(B, n_steps)`` over each example's own steps."""
        return (curve * self.weights(curve.dtype)).sum(dim=1) if len(self.steps) > 1 else curve.mean(dim=1)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weight of each step in an example's mean, ``(B or 1, n_steps)``."""
        own = torch.arange(self.steps.shape[1], device=self.steps.device) < self.n_steps
        return own.to(dtype) / self.n_steps

    def draw(
        self, k: int, n_examples: int, dtype: torch.dtype, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw one step from each of k strata of nearly equal size, at the same place of every stratum.

        The place is drawn separately for each example. The weighted sum over the drawn steps is an unbiased estimate
        of the mean over all steps. The weight of a stratum is its share of the steps. If there are no more than k
        steps, all are taken.

        Returns:
            The steps and their weights, both ``(n_examples, k)``, or ``(n_examples, n_steps)`` if all are taken.
        """
        device = self.steps.device
        at = source(device, generator)
        # Drawn in any case: of several processes some may take all steps, and their generators must stay in step.
        # One place for all strata has less noise than a place for each (benchmarks/fewer_evaluations.py).
        place = drawn_for(n_examples, lambda n: torch.rand(n, 1, device=at, generator=generator)).to(device)
        if k >= self.steps.shape[1]:
            return self.steps.expand(n_examples, -1), self.weights(dtype).expand(n_examples, -1)
        bounds = torch.arange(k + 1, device=device) * self.n_steps // k
        sizes = bounds.diff(dim=1)
        drawn = bounds[:, :-1] + torch.minimum((place * sizes).long(), (sizes - 1).clamp_min(0))
        drawn = torch.minimum(drawn, self.n_steps - 1)
        weights = sizes.to(dtype) / self.n_steps
        return self.steps.expand(n_examples, -1).gather(1, drawn), weights.expand(n_examples, -1)

    def fractions(self, dtype: torch.dtype) -> Tensor:
        """Return the share of locations at each step: ``(n_steps,)``, or ``(B, n_steps)`` if the examples differ."""
        fractions = self.steps.to(dtype) / self.n_locations
        return fractions[0] if len(fractions) == 1 else fractions


@dataclass(frozen=True)
class Masking:
    """A batch, the order of its locations and a scorer: everything that is needed to score masked copies."""

    masked: MaskedInputs
    locations: Locations
    scorer: TargetScorer
    schedule: StepSchedule
    masks: HardMasks | SoftMasks
    check_finite: bool
    memory: MemoryBudget | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The batch's input tensors."""
        return self.masked.inputs

    @classmethod
    def of(
        cls,
        forward_func: Callable[..., Any],
        inputs: Tensors,
        attributions: Tensors,
        *,
        baselines: Baselines,
        feature_mask: Tensors | None,
        group_reduction: Literal["mean", "sum"],
        additional_forward_args: object,
        target: Any,
        fraction: float,
        step_size: int | None,
        temperature: float | str | None,
        outputs: Outputs,
        max_examples_per_batch: int | None,
        check_finite: bool,
    ) -> Masking:
        """Check a metric's arguments and prepare the masking."""
        tensors, aligned = check_inputs(inputs, baselines, check_finite)
        locations = Locations.of(attributions, tensors, groups_of(feature_mask, tensors), group_reduction)
        if check_finite:
            require_finite((locations.values,), "attributions")
        message = constant_maps_message(locations.values, locations.present, counted=False)
        if message:
            warn(message)
        check_temperature(temperature)
        schedule = StepSchedule.of(locations.counts, fraction, step_size, tensors[0].device)
        max_rows = check_optional_count("max_examples_per_batch", max_examples_per_batch)
        scorer = TargetScorer(forward_func, tensors, target, additional_forward_args, outputs, check_finite, max_rows)
        masks = make_masks(locations, scorer.sign(), temperature, tensors)
        masked = MaskedInputs(tensors, aligned, locations.layout, finite=check_finite or None)
        return cls(masked, locations, scorer, schedule, masks, check_finite)

    def scores(self, direction: Direction, score: Score, steps: Tensor | None = None) -> Tensor:
        """Return the score of each masked copy, ``(B, n)``.

        Args:
            direction: insertion or deletion.
            score: the score to compute.
            steps: numbers of locations ``(B or 1, n)``; None: all steps of the schedule.
        """
        steps = self.schedule.steps if steps is None else steps
        n_examples = len(self.inputs[0])
        thresholds = self.masks.thresholds(steps.expand(n_examples, -1).T)

        def perturb(examples: slice, copies: slice, values: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            kept = self.masks(thresholds[copies, examples], examples, values, complement=direction == "deletion")
            return self.masked.copies(kept, examples, inputs)

        def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            return self.scorer(rows, examples, n_copies, score)

        through = (self.masks.values, *self.inputs)
        scores = evaluate_copies(
            evaluate,
            perturb,
            n_examples,
            len(thresholds),
            self.scorer.max_rows,
            through=through,
            memory=self.memory,
            one_size=self.scorer.is_compiled,
        )
        if self.check_finite:
            require_finite((scores.detach(),), f"the forward function's output during {direction}", NAN_OF_MASKED_ROWS)
        return scores

    def result(self, random_orders: RandomOrders) -> InsertionDeletionScores:
        """Return both scores with their curves, and their gains over random orders, if there are any."""
        insertion_curve = self.scores("insertion", "probability")
        deletion_curve = self.scores("deletion", "probability")
        insertion, deletion = self.schedule.mean(insertion_curve), self.schedule.mean(deletion_curve)
        scores = InsertionDeletionScores(
            insertion, deletion, self.schedule.fractions(insertion_curve.dtype), insertion_curve, deletion_curve
        )
        means = random_orders.means(self)
        if means is None:
            return scores
        inserted, deleted = means
        return scores._replace(insertion_gain=insertion - inserted, deletion_gain=deleted - deletion)

    def in_random_order(self, generator: Generator | None) -> Masking:
        """Return the same masking along a random order of each example's locations."""
        n_examples, n_locations = self.locations.values.shape
        device = self.locations.values.device
        at = source(device, generator)
        noise = drawn_for(n_examples, lambda n: torch.rand(n, n_locations, device=at, generator=generator)).to(device)
        return replace(self, masks=self.masks.shuffled(noise))


class RandomOrders:
    """Mean insertion and deletion along random orders of a batch's locations, as a reference for attributions.

    Hard masks in a random order do not depend on the attribution. So attributions of one batch that share model,
    target, baselines, feature mask and schedule can share the random orders, which are then scored once.

    Args:
        n_orders: number of random orders; with 0 there are no means.
        make_generator: called before the orders of new locations are drawn. So a function that makes a generator of the
            same seed gives values that do not depend on which attributions share them.
    """

    def __init__(self, n_orders: int, make_generator: Callable[[], Generator | None]) -> None:
        self._n_orders = n_orders
        self._make_generator = make_generator
        self._means: dict[object, tuple[Tensor, Tensor]] = {}

    def means(self, masking: Masking) -> tuple[Tensor, Tensor] | None:
        """Return mean insertion and mean deletion, ``(B,)`` each; None without orders."""
        if not self._n_orders:
            return None
        locations = masking.locations.layout.shapes  # without a feature mask, those of the attribution
        if locations not in self._means:
            generator = self._make_generator()
            orders = [masking.in_random_order(generator) for _ in range(self._n_orders)]
            inserted = [order.schedule.mean(order.scores("insertion", "probability")) for order in orders]
            deleted = [order.schedule.mean(order.scores("deletion", "probability")) for order in orders]
            self._means[locations] = torch.stack(inserted).mean(dim=0), torch.stack(deleted).mean(dim=0)
        return self._means[locations]


def check_temperature(temperature: float | str | None) -> None:
    """Raise ValueError unless temperature is None, "auto" or a positive finite number."""
    if temperature is None or temperature == "auto":
        return
    if isinstance(temperature, str) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be None, 'auto' or a positive number, given: {temperature!r}.")


def make_masks(
    locations: Locations, sign: Tensor | None, temperature: float | str | None, inputs: tuple[Tensor, ...]
) -> HardMasks | SoftMasks:
    """Return the masks of the locations, in the order of their attributions times the sign.

    Raises:
        TypeError: the masks are soft and an input holds integers.
    """
    values = locations.values if sign is None else locations.values * sign
    if temperature is None:
        dtypes = {tensor.dtype for tensor in inputs}  # hard masks multiply the inputs, so they get their dtype
        return HardMasks(values, locations.present, *(dtypes if len(dtypes) == 1 else ()))
    for tensor in inputs:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(
                f"inputs of {tensor.dtype}, such as token ids, cannot be interpolated with their baseline by soft "
                "masks: pass embeddings to a forward function that takes them, inputs.float() if the integers are "
                "amounts, or temperature=None for hard masks."
            )
    return SoftMasks(values, locations.present, 1.0 if temperature == "auto" else float(temperature))
