r"""ID-ExpO: insertion and deletion of the explanation as loss terms (Yoshikawa, Iwata 2024, arXiv 2310.12553).

.. math::

    \Omega_\text{ins} = -\operatorname{mean}_s \log p_y(\text{insertion}_s), \qquad
    \Omega_\text{del} = -\operatorname{mean}_s \log (1 - p_y(\text{deletion}_s)),

with the soft masks of eq. (7)-(8) (eq. 9-11). The gradient reaches the weights through the prediction on the masked
copies, through the attribution inside the masks, and, for Grad-CAM, through its channel weights. The paper's own
experiments have another form of the deletion term, ``deletion_form="ratio"``:
:math:`-\operatorname{mean}_s [\log p_y(x) - \log p_y(\text{deletion}_s)]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.captum import BaselineType, TargetType
from captum_idexpo._core.chunks import default_rows_per_forward
from captum_idexpo._core.errors import warn
from captum_idexpo._core.features import MaskedInputs
from captum_idexpo._core.forward import BatchForward, evaluate_given
from captum_idexpo._core.inputs import (
    Baseline,
    Baselines,
    Tensors,
    check_count_or_zero,
    check_inputs,
    check_not_negative,
    check_optional_count,
    require_finite,
    with_batch_axis,
)
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.modes import module_of, no_graph
from captum_idexpo._core.targets import Outputs, positive_labels
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.baselines import generators_of, mean_inputs
from captum_idexpo.metrics._locations import Locations, check_group_reduction, groups_of
from captum_idexpo.metrics._masking import (
    InsertionDeletionScores,
    Masking,
    RandomOrders,
    StepSchedule,
    check_temperature,
    make_masks,
)
from captum_idexpo.metrics._scoring import TargetScorer, is_raw, predicted_class
from captum_idexpo.metrics.masked_accuracy import masked_accuracy
from captum_idexpo.regularizers._explaining import Explaining, per_row, require_attribution, takes_gradients
from captum_idexpo.regularizers.base import Regularizer, check_n_labels

DELETION_FORMS = ("ratio", "log", "complement")
_FLOOR_SHARE = "deletion_floor_share"
_REPORTED_FLOOR_SHARE = 0.05  # fewer copies at the floor hardly change the loss


class InsertionDeletion(Regularizer):
    r"""Penalises explanations whose insertion is low and whose deletion is high: ID-ExpO's loss terms, eq. (9)-(11).

    Called as ``regularizer(inputs, target)`` it returns named, weighted terms, means over the batch. Any training loop
    can add them to its loss: ``loss = cross_entropy(model(x), y) + sum(regularizer(x, y).values())``. Under
    `torch.no_grad` the terms have the same values and no graph.

    Locations are ranked from the most positive attribution, so pass magnitudes (``abs`` of Saliency) where signs do not
    matter. For images ``(B, C, H, W)`` without a feature mask, channels are averaged and a location is a pixel. A
    layer's attribution is enlarged to the size of the inputs (by the nearest value, as in the paper). The attribution
    of an embedding ``(B, T, E)`` of rows ``(B, T)`` is summed over E.

    Args:
        explainer: an attribution of `captum_idexpo.attr`.
        baselines: what masked locations are set to: a number, a tensor, a tuple of these, or a callable of the inputs
            that returns them, such as those of `captum_idexpo.baselines`. "mean" is the mean of the training inputs
            over examples and positions, which the trainer measures before it starts
            (`captum_idexpo.baselines.mean_inputs`). Explainers that take baselines get the same ones.
        forward_func: the function that is masked and scored; None: the explainer's forward function.
        model: the module that is held in eval mode, if it is not found behind the forward functions.
        insertion_weight: weight of the insertion term (the paper: 0.001 to 0.1); 0 leaves it out.
        deletion_weight: weight of the deletion term (the paper: 0.001 to 0.1); 0 leaves it out.
        l2_weight: weight of the attribution's squared norm, summed over the locations (a layer's own cells, or the
            groups of the feature mask).
        fraction: share of the locations that is inserted or deleted. The default is 0.5, as in the paper's training;
            the metrics `captum_idexpo.metrics.insertion` and `deletion` take all locations by default.
        step_size: locations per step; None: the smallest number that gives at most 32 steps.
        outputs: what the forward function returns, as for `captum_idexpo.metrics.insertion_deletion`. With "multilabel"
            one of the true labels of a multi-hot target is explained, drawn per example and call. With a function as
            outputs the explainer explains its own forward function, without a target.
        max_examples_per_batch: rows per forward pass; None: chosen automatically.
        reshape_transform: where the channels of an explained layer are, see `Regularizer`.
        target_transform: a function of the loader's target that returns the target of explainer and score: labels of
            another form, or the column of several regression outputs; see `Regularizer`.
        temperature: as for `captum_idexpo.metrics.insertion_deletion`; None is the hard mask, through which the
            attribution gets no gradient. No gradient flows through temperature and threshold of the soft mask. Hold
            them fixed when you check with finite differences.
        steps_per_update: draw this many of the n steps per example and call, one from each of as many strata of nearly
            equal size, at the same place of each stratum. The estimate is unbiased, at a fraction of the cost. If n is
            at most this number, all steps are taken. None: all steps, which `scores` and the trainer's `evaluate`
            always take.
        deletion_form: "complement" is the mean of log(1 - p(deletion)), negated, which is bounded below by 0. "ratio"
            is the paper's choice, eq. (10): the mean of log p(x) - log p(deletion), negated. "log" is the mean of
            log p(deletion). For raw outputs each is the mean of f(deletion).
        deletion_floor: for "ratio" and "log", which have no lower bound: below this probability a copy adds no more
            reward. None: no floor. `floor_share` is the share of copies at the floor in the last call.
        feature_mask: a Captum feature mask, or a callable of the inputs that returns one (superpixels). Explainers that
            take a feature mask get the same.
        group_reduction: rank the groups of the feature mask by the "mean" of the attribution over their positions, or
            by its "sum".
        attribute_kwargs: further arguments of ``explainer.attribute``, such as n_samples. Pass those that it needs and
            that are not listed here (a neuron_selector, a distribution of baselines). Without n_samples, LIME and
            KernelSHAP take three masked copies for each feature, with ``sampling="independent"``.
            ``additional_forward_args`` also go to the forward function.
        eval_mode: explain and score in eval mode (BatchNorm, dropout), so that running statistics do not change and no
            example depends on the others of its batch.
        generator: source of the drawn steps, and of the explainer's masks unless Captum's own code draws them. None:
            torch's global generator.
        memory_budget: bytes of activations that the graphs of the explanation and of the masked copies may keep until
            the backward pass. What exceeds it is computed again there, with the same gradient. None: no bound.
        n_random_orders: `scores`, and so the trainer's `evaluate` and validation, also measure the gains over this many
            random orders of the locations, see `captum_idexpo.metrics.insertion_deletion`. Where a layer's map is
            enlarged to pixels, a random order of pixels destroys an image sooner than one of the layer's cells: pass a
            ``feature_mask`` of these cells to compare like with like.

    Raises:
        TypeError: the explainer is no attribution, or one of Captum's own classes.
        ValueError: an argument out of range. When it is called: LIME or KernelSHAP of more than 1,024 features without
            n_samples.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradCam
        >>> from captum_idexpo.regularizers import InsertionDeletion
        >>> conv = torch.nn.Conv2d(1, 4, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3))
        >>> regularizer = InsertionDeletion(LayerGradCam(model, conv), baselines=0.0)
        >>> x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
        >>> terms = regularizer(x, y)
        >>> sorted(terms)
        ['deletion', 'insertion']
        >>> (torch.nn.functional.cross_entropy(model(x), y) + sum(terms.values())).backward()
    """

    _explaining: Explaining

    def __init__(
        self,
        explainer: Attribution,
        *,
        baselines: Baselines | Literal["mean"],
        forward_func: Callable[..., Any] | None = None,
        model: nn.Module | None = None,
        insertion_weight: float = 0.01,
        deletion_weight: float = 0.01,
        l2_weight: float = 0.0,
        fraction: float = 0.5,
        step_size: int | None = None,
        steps_per_update: int | None = 4,
        deletion_form: Literal["ratio", "log", "complement"] = "complement",
        deletion_floor: float | None = 1e-6,
        temperature: float | Literal["auto"] | None = "auto",
        outputs: Outputs = "logits",
        reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        feature_mask: Tensors | Callable[[Any], Tensors] | None = None,
        group_reduction: Literal["mean", "sum"] = "mean",
        attribute_kwargs: Mapping[str, Any] | None = None,
        eval_mode: bool = True,
        generator: Generator | None = None,
        max_examples_per_batch: int | None = None,
        memory_budget: float | None = None,
        n_random_orders: int = 0,
    ) -> None:
        super().__init__(
            require_attribution(explainer).forward_func if forward_func is None else forward_func,
            model=model,
            outputs=outputs,
            eval_mode=eval_mode,
            explainer=explainer,
            attribute_kwargs=attribute_kwargs,
            reshape_transform=reshape_transform,
            target_transform=target_transform,
            generator=generator,
        )
        self.baselines = baselines
        self.measures_baselines = isinstance(baselines, str)
        self.insertion_weight = check_not_negative("insertion_weight", insertion_weight)
        self.deletion_weight = check_not_negative("deletion_weight", deletion_weight)
        self.l2_weight = check_not_negative("l2_weight", l2_weight)
        self.fraction = fraction
        self.step_size = step_size
        self.steps_per_update = check_optional_count("steps_per_update", steps_per_update)
        self.deletion_form = deletion_form
        self.deletion_floor = deletion_floor
        self.temperature = temperature
        self.feature_mask = feature_mask
        self.group_reduction = check_group_reduction(group_reduction)
        self.max_examples_per_batch = check_optional_count("max_examples_per_batch", max_examples_per_batch)
        self.memory_budget = memory_budget
        self.n_random_orders = check_count_or_zero("n_random_orders", n_random_orders)
        self._floor_reported = False
        self._check_settings()

    @property
    def needs_second_derivative(self) -> bool:
        """True if the explainer takes gradients of the model."""
        return takes_gradients(self.explainer)

    @property
    def models_differentiated_twice(self) -> list[nn.Module]:
        """The module that is explained. The module that is scored may be a compiled form of it."""
        explained = module_of(self._explaining.explainer.forward_func)
        return [] if explained is None else [explained]

    @property
    def generators(self) -> list[Generator]:
        """The random generators that terms and baselines draw from, beside the global ones."""
        return list(dict.fromkeys([*super().generators, *generators_of(self.baselines)]))

    @property
    def explains_groups(self) -> bool:
        """True if the explainer takes the feature mask and gives one value for each of its groups."""
        return "feature_mask" in self._explaining.takes

    @property
    def floor_share(self) -> Tensor | None:
        """The share of masked copies at the deletion floor in the last call; None without a floor."""
        return self.measurements.get(_FLOOR_SHARE)

    def prepare(self, loader: Iterable[Any]) -> None:
        """Measure the mean of the training inputs, if it is the baseline."""
        if isinstance(self.baselines, str):
            self.baselines = mean_inputs(loader)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms "insertion", "deletion" and "l2", those whose weight is not 0.

        Raises:
            RuntimeError: under enabled gradients, the explanation can have no graph.
            ValueError, TypeError, IndexError: as `captum_idexpo.metrics.insertion_deletion`.
        """
        self.measurements = {}
        create_graph, explained = torch.is_grad_enabled(), self.explained(batch)
        memory = MemoryBudget.of(self.memory_budget, create_graph, *self.models)
        masking, cells = self._masking(batch, explained.target, self.temperature, create_graph, memory)
        check_n_labels(explained.n_labels, masking.scorer.n_columns)
        steps, weights = self._draw_steps(masking.schedule, len(cells), cells.dtype)
        if explained.contributes is not None:  # an example without a label to explain counts 0
            weights = weights * explained.contributes[:, None]
            cells = cells * explained.contributes[:, None]
        terms = {}
        if self.insertion_weight:
            log_p = masking.scores("insertion", "log_probability", steps)
            terms["insertion"] = -self.insertion_weight * (weights * log_p).sum(dim=1).mean()
        if self.deletion_weight:
            terms["deletion"] = self.deletion_weight * (weights * self._deletion(masking, steps)).sum(dim=1).mean()
        if self.l2_weight:
            terms["l2"] = self.l2_weight * cells.square().sum(dim=1).mean()
        return terms

    @no_graph()
    def scores(
        self, inputs: Tensors, target: Any = None, *, additional_forward_args: object = None
    ) -> InsertionDeletionScores:
        """Return hard insertion and deletion of this explainer's attributions, with these settings and all steps.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: the explained class; None: the predicted one (raw outputs: the only column). A multi-hot target
                ``(B, L)`` of ``outputs="multilabel"`` gives means over the true labels of each example, NaN if none
                is true.
            additional_forward_args: what the model takes after the inputs.

        Returns:
            As `captum_idexpo.metrics.insertion_deletion`.
        """
        batch = self._read(inputs, target, None, additional_forward_args)
        with self.held_in_eval_mode():
            if target is None and not is_raw(self.outputs):
                return self._hard_scores(batch, self._predicted_class(batch))
            if self.outputs == "multilabel":
                labels = self.transformed(target)
                positive = positive_labels(labels)
                return self._hard_scores(batch, labels) if positive is None else self._label_means(batch, positive)
            return self._hard_scores(batch, self.explained(batch).target)

    @no_graph()
    def scores_and_attribution(
        self,
        inputs: Tensors,
        target: Any,
        *,
        additional_forward_args: object = None,
        random_orders: RandomOrders | None = None,
    ) -> tuple[InsertionDeletionScores, tuple[Tensor, ...]]:
        """Return the hard scores and the attribution that they judge. The attribution is computed once.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: the explained class; for "multilabel" the indices ``(B,)`` of the explained labels.
            additional_forward_args: what the model takes after the inputs.
            random_orders: those of earlier calls with the same model, inputs, target, baselines and feature mask, to
                share them; None: `n_random_orders` new ones.

        Returns:
            As `scores`, and for each input tensor a map of its shape, or with one channel, in which high values speak
            for the target.
        """
        batch = self._read(inputs, target, None, additional_forward_args)
        with self.held_in_eval_mode():
            masking, _ = self._masking(batch, self.explained(batch).target, None, create_graph=False)
            scores = masking.result(self._random_orders() if random_orders is None else random_orders)
            return scores, _spread(masking, masking.masks.values)

    def masked_accuracy(
        self,
        inputs: Tensors,
        target: Any,
        *,
        share: float = 0.5,
        additional_forward_args: object = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Return `captum_idexpo.metrics.masked_accuracy` with this regularizer's baselines and feature mask, ``(B,)``.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: the labels.
            share: share of the features that is masked, drawn per example.
            additional_forward_args: what the model takes after the inputs.
            generator: source of the masks; None: that of the regularizer.
        """
        batch = self._read(inputs, target, None, additional_forward_args)
        feature_mask = self.feature_mask(inputs) if callable(self.feature_mask) else self.feature_mask
        with self.held_in_eval_mode():
            return masked_accuracy(
                self.forward_func,
                inputs,
                self.transformed(target),
                baselines=self._measured_baselines(),
                feature_mask=feature_mask,
                additional_forward_args=batch.additional_forward_args,
                share=share,
                outputs=self.outputs,
                generator=self.generator if generator is None else generator,
                max_examples_per_batch=self.max_examples_per_batch,
            )

    @no_graph()
    def attribution(
        self, inputs: Tensors, target: Any, *, additional_forward_args: object = None
    ) -> tuple[Tensor, ...]:
        """Return the attribution that is scored: for each input tensor a map of its shape, or with one channel.

        For a multi-hot target one of the true labels is explained, drawn per example. Of a single logit the column is
        explained, whose high values speak for class 1. The scores rank the map of an example of class 0 by its
        negative.
        """
        batch = self._read(inputs, target, None, additional_forward_args)
        with self.held_in_eval_mode():
            masking, _ = self._masking(batch, self.explained(batch).target, None, create_graph=False)
            return _spread(masking, masking.locations.values)

    @no_graph()
    def predicted_class(self, inputs: Tensors, *, additional_forward_args: object = None) -> Tensor:
        """Return the class (or label) that is most probable for each example, ``(B,)``.

        Raises:
            ValueError: raw outputs, which have no classes.
        """
        batch = self._read(inputs, None, None, additional_forward_args)
        with self.held_in_eval_mode():
            return self._predicted_class(batch)

    @no_graph()
    def predicted_labels(self, inputs: Tensors, *, additional_forward_args: object = None) -> Tensor:
        """Return which labels of ``outputs="multilabel"`` are more probable than not, booleans ``(B, L)``."""
        batch = self._read(inputs, None, None, additional_forward_args)
        with self.held_in_eval_mode():
            return self._evaluated(batch, lambda output: output > 0)

    def _predicted_class(self, batch: Batch) -> Tensor:
        return self._evaluated(batch, lambda output: predicted_class(output, self.outputs))

    def _evaluated(self, batch: Batch, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a function reads from the output on each example."""
        tensors, _ = check_inputs(batch.inputs, None, check_finite=True)
        forward = BatchForward(self.forward_func, batch.additional_forward_args, len(tensors[0]))

        def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            return read(forward(rows, examples, n_copies))

        max_rows = self.max_examples_per_batch or default_rows_per_forward(tensors)
        return evaluate_given(evaluate, tuple(tensor[None].clone() for tensor in tensors), max_rows)[:, 0]

    def _hard_scores(self, batch: Batch, target: TargetType) -> InsertionDeletionScores:
        masking, _ = self._masking(batch, target, None, create_graph=False)
        return masking.result(self._random_orders())

    def _random_orders(self) -> RandomOrders:
        return RandomOrders(self.n_random_orders, lambda: self.generator)

    def _label_means(self, batch: Batch, positive: Tensor) -> InsertionDeletionScores:
        """Return means of the scores over the true labels ``(B, L)`` of each example, NaN without any."""
        counts = positive.sum(dim=1)
        in_order = positive.float().argsort(dim=1, descending=True, stable=True)  # the true labels first
        totals: dict[str, Tensor] = {}
        for number in range(max(1, int(counts.max()))):
            scores = self._hard_scores(batch, in_order[:, number])
            share = torch.where(counts > 0, (number < counts) / counts, torch.nan)
            for name, part in scores._asdict().items():
                if name != "fractions" and part is not None:
                    totals[name] = totals.get(name, 0.0) + per_row(part, share) * part
        return scores._replace(**totals)

    def _masking(
        self,
        batch: Batch,
        target: TargetType,
        temperature: float | Literal["auto"] | None,
        create_graph: bool,
        memory: MemoryBudget | None = None,
    ) -> tuple[Masking, Tensor]:
        """Return the batch, ready to be masked by its explanation, and the explanation at its own cells ``(B, D)``."""
        inputs, side = batch.inputs, batch.additional_forward_args
        tensors, aligned = check_inputs(inputs, self._measured_baselines(), check_finite=True)
        feature_mask = self.feature_mask(inputs) if callable(self.feature_mask) else self.feature_mask
        groups = groups_of(feature_mask, tensors)
        scored = batch.target if callable(self.outputs) else target
        max_rows = self.max_examples_per_batch
        scorer = TargetScorer(self.forward_func, tensors, scored, side, self.outputs, max_rows=max_rows)
        one_column = target is None or self._is_one_column(scorer, tensors, side)
        baselines = _like(inputs, tuple(map(_expanded, aligned, tensors)))
        offered = {
            "baselines": baselines,
            "feature_mask": _broadcasting(feature_mask, inputs),
            "memory_budget": memory,
            "generator": self.generator,
        }
        if side is not None:
            offered["additional_forward_args"] = side
        given = {"baselines": baselines, "feature_mask": feature_mask, **self.attribute_kwargs}
        self._report_unread_masks(batch, given["baselines"], given["feature_mask"], max_rows)
        maps, cells = self._located(inputs, tensors, None if one_column else target, create_graph, offered)
        locations = Locations.of(maps, tensors, groups, self.group_reduction)
        require_finite((locations.values.detach(),), "attributions")
        self._report_constant_maps(locations.values.detach(), locations.present)
        if cells is None:
            cells = locations.values
        schedule = StepSchedule.of(locations.counts, self.fraction, self.step_size, tensors[0].device)
        sign = self._explaining.sign_of_map(scorer.sign_of_one_column()) if one_column else None
        masks = make_masks(locations, sign, temperature, tensors)
        # In training, a term that is not finite is the loss's to report, by name.
        check_scores = not create_graph
        masked = MaskedInputs(tensors, aligned, locations.layout, finite=True)  # checked above
        return Masking(masked, locations, scorer, schedule, masks, check_scores, memory), cells

    def _measured_baselines(self) -> Baselines:
        if isinstance(self.baselines, str):
            raise ValueError(
                f"baselines={self.baselines!r} is measured when the trainer's fit starts: before it, and in a loop of "
                "your own, pass baselines=mean_inputs(train_loader)."
            )
        return self.baselines

    def _is_one_column(self, scorer: TargetScorer, tensors: tuple[Tensor, ...], side: object) -> bool:
        """Return True if the explainer explains a single column, so that it takes no target."""
        if self._explaining.explainer.forward_func is self.forward_func:
            return scorer.n_columns == 1
        return self._explaining.n_columns(tensors, side) == 1

    def _located(
        self,
        inputs: Tensors,
        tensors: tuple[Tensor, ...],
        target: TargetType,
        create_graph: bool,
        offered: dict[str, Any],
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return attributions at the inputs' locations, and a layer's at its own cells ``(B, n_cells)``, else None."""
        maps = self._explaining(inputs, create_graph, target=target, **offered)
        if self._explaining.of_layer:
            expanded, cells = self._cells(maps, tensors)
            return (expanded,), cells
        average = self.feature_mask is None
        return tuple(m.mean(1, keepdim=True) if average and m.dim() > 3 else m for m in maps), None

    def _deletion(self, masking: Masking, steps: Tensor) -> Tensor:
        """Return the deletion penalty of each copy, ``(B, n_steps)``."""
        if is_raw(self.outputs):
            return masking.scores("deletion", "probability", steps)
        if self.deletion_form == "complement":
            return -masking.scores("deletion", "log_complement", steps)
        log_p = masking.scores("deletion", "log_probability", steps)
        if self.deletion_floor:
            lowest = math.log(self.deletion_floor)
            self._report_floor((log_p.detach() < lowest).float().mean())
            log_p = log_p.clamp_min(lowest)
        return (
            log_p - masking.scorer.unmasked(masking.inputs, "log_probability", masking.memory)
            if self.deletion_form == "ratio"
            else log_p
        )

    def _report_floor(self, share: Tensor) -> None:
        self.measurements[_FLOOR_SHARE] = share
        if not self._floor_reported and bool(share >= _REPORTED_FLOOR_SHARE):
            self._floor_reported = True
            warn(
                f"The deletion floor of {self.deletion_floor} binds for {float(share):.1%} of the masked copies: they "
                "add no more reward. Take deletion_form='complement', which needs no floor, or lower deletion_weight.",
            )

    def _draw_steps(self, schedule: StepSchedule, n_examples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return steps ``(B or 1, n)`` and their weights, which add up to 1 for each example."""
        if self.steps_per_update is None:
            return schedule.steps, schedule.weights(dtype)
        return schedule.draw(self.steps_per_update, n_examples, dtype, self.generator)

    def _check_settings(self) -> None:
        StepSchedule.check_fraction(self.fraction, self.step_size)
        check_temperature(self.temperature)
        if self.deletion_form not in DELETION_FORMS:
            raise ValueError(f"deletion_form must be one of {DELETION_FORMS}, given: {self.deletion_form!r}.")
        if self.deletion_floor is not None and not 0 <= self.deletion_floor < 1:
            raise ValueError(f"deletion_floor must be a probability below 1, or None; given: {self.deletion_floor}.")
        if isinstance(self.baselines, str) and self.baselines != "mean":
            raise ValueError(f"baselines must be numbers, tensors, a callable or 'mean', given: {self.baselines!r}.")
        MemoryBudget.of(self.memory_budget, graph=False)


def _spread(masking: Masking, values: Tensor) -> tuple[Tensor, ...]:
    """Return values of the locations ``(B, D)`` as maps of the inputs' shapes, or with one channel."""
    spread = masking.locations.layout.spread(values[None])
    pairs = [(map[0], tensor) for map, tensor in zip(spread, masking.inputs, strict=True)]
    return tuple(
        map if map.dim() > 2 and map.shape[2:] == tensor.shape[2:] else map.expand_as(tensor).clone()
        for map, tensor in pairs
    )


def _like(inputs: Tensors, values: tuple[Baseline, ...]) -> BaselineType:
    """Return one value per tensor, as a tuple if the inputs are one."""
    return values if isinstance(inputs, tuple) else values[0]


def _expanded(baseline: Baseline, tensor: Tensor) -> Baseline:
    """Return a number, or a baseline whose examples have the input's shape: not every explainer broadcasts it."""
    if isinstance(baseline, Tensor) and not baseline.dim():
        return cast("float", baseline.item())
    if isinstance(baseline, Tensor) and baseline.dim() == tensor.dim():
        return baseline.expand(len(baseline), *tensor.shape[1:])
    return baseline


def _broadcasting(feature_mask: Tensors | None, inputs: Tensors) -> Tensors | None:
    """Return a feature mask that Captum broadcasts over the batch, whatever its size."""
    if isinstance(feature_mask, tuple):
        return tuple(map(with_batch_axis, feature_mask, inputs))
    return with_batch_axis(feature_mask, inputs[0] if isinstance(inputs, tuple) else inputs)
