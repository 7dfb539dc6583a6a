"""A jury: several models compared by several explainers, baselines and metrics, on the same examples.

A gain of one score, with the explainer and the baseline of the training, may be an adaptation of the model to this
score. Judges that took no part in the training show whether it is more: another explainer, another baseline, another
metric.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import captum.metrics
import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map

from captum_idexpo._core.batch import Batch, Unpack, unpacked
from captum_idexpo._core.captum import NullProgress, progress
from captum_idexpo._core.chunks import default_rows_per_forward
from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.inputs import (
    Baselines,
    Tensors,
    as_batch,
    check_count,
    check_count_or_zero,
    check_inputs,
    check_not_negative,
)
from captum_idexpo._core.modes import belong_together, eval_mode, module_of, no_graph
from captum_idexpo._core.rng import random_state, seeded, set_random_state
from captum_idexpo._core.targets import Outputs, explained_class, positive_labels
from captum_idexpo.baselines import generators_of
from captum_idexpo.metrics import masked_accuracy
from captum_idexpo.metrics._masking import RandomOrders
from captum_idexpo.metrics._scoring import is_raw, log_probabilities
from captum_idexpo.metrics.masked_accuracy import masked_features, random_masks
from captum_idexpo.metrics.road import road
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.regularizers._explaining import require_attribution
from captum_idexpo.visualization.comparisons import (
    LOWER_IS_BETTER,
    better_arrow,
    change_text,
    comparison_page,
    plot_comparison,
)

METRICS = (
    "accuracy",
    "masked_accuracy",
    "insertion",
    "deletion",
    "insertion_gain",
    "deletion_gain",
    "road",
    "infidelity",
    "sensitivity",
)
"""The metrics of `compare`, in the order of its results."""

_OF_CLASSES = ("accuracy", "masked_accuracy", "road", "infidelity")
_BY_MASKS = ("insertion", "deletion", "insertion_gain", "deletion_gain")
_INFIDELITY_SHARE = 0.2  # of the features is masked in each perturbation
_BATCHES = 2**20  # fewer than half as many, so that runs with neighbouring seeds share no seed of a batch
_PERTURBATIONS_OF_INFIDELITY = 5  # times those of sensitivity, each of which costs an explanation
FeatureMask = Tensors | Callable[[Any], Tensors] | None


class Judge(NamedTuple):
    """One judge: a metric, with the explainer and the baseline that it uses, None where it uses none."""

    metric: str
    explainer: str | None = None
    baseline: str | None = None

    def __str__(self) -> str:
        """Return its parts in one line."""
        return ", ".join(part for part in self if part is not None)


class Comparison:
    """What the judges say about each model, see `compare`.

    Args:
        examples: for each model and judge the value of each example, ``(N,)``.
        clusters: the cluster of each example, integers ``(N,)``; None: each example is its own.
        reference: the model that the others are compared with.
        trained_on: names of explainers, baselines and metrics that took part in training or selection.
        settings: further settings to print on the page of `to_html`, by name.

    Attributes:
        rows: one mapping for each model and judge: "model", "metric", "explainer", "baseline", "value" (the mean),
            "standard_error", "difference" (to the reference, paired by example), "difference_standard_error",
            "better" (in standard errors of the difference, positive where the model is better than the reference; NaN
            where the difference has no error), "held_out" (see `held_out`), "n_examples" and
            "n_clusters".
    """

    def __init__(
        self,
        examples: Mapping[str, Mapping[Judge, Tensor]],
        *,
        clusters: Tensor | None,
        reference: str,
        trained_on: frozenset[str] | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.examples = {model: dict(scores) for model, scores in examples.items()}
        self.clusters = clusters
        self.reference = reference
        self.trained_on = trained_on
        self.settings = dict(settings)
        self.rows = [self._row(model, judge) for model in self.examples for judge in self.judges]

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return list(self.examples)

    @property
    def judges(self) -> list[Judge]:
        """All judges."""
        return list(self.examples[self.reference])

    def held_out(self, judge: Judge) -> bool | None:
        """Return True if at least one part of a judge took no part in the training; None if that is not known."""
        if self.trained_on is None:
            return None
        return not all(part is None or part in self.trained_on for part in judge)

    def row(self, model: str, judge: Judge) -> dict[str, Any]:
        """Return the row of a model and a judge."""
        wanted = (model, *judge)
        return next(
            row for row in self.rows if (row["model"], row["metric"], row["explainer"], row["baseline"]) == wanted
        )

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame; ImportError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Comparison.to_pandas needs pandas: `pip install 'captum-idexpo[plot]'`.") from error
        return pd.DataFrame(self.rows)

    def table(self) -> str:
        """Return a Markdown table: a line for each judge, a column for each model.

        Each mean is followed by the difference to the reference, with its standard error. An arrow says whether higher
        or lower values are better. Judges that are not held out are marked by an asterisk.
        """
        heads = ["judge", *map(_escaped, self.models)]
        lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
        for judge in self.judges:
            mark = "*" if self.held_out(judge) is False else ""
            cells = [_cell(self.row(model, judge), model == self.reference) for model in self.models]
            name = f"{_escaped(judge)} {better_arrow(judge.metric)}{mark}"
            lines.append(f"| {' | '.join([name, *cells])} |")
        return "\n".join(lines)

    def plot(self) -> Any:
        """Return a figure: for each metric the differences to the reference, with standard errors.

        Raises ImportError without matplotlib.
        """
        return plot_comparison(self.rows, self.reference)

    def to_html(self, path: str | Path) -> None:
        """Write one page to hand on: verdicts, picture, table and settings, in a single file.

        Raises ImportError without matplotlib. A file that exists is replaced when the page is complete.
        """
        path = Path(path)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(comparison_page(self), encoding="utf-8")
        temporary.replace(path)

    def _row(self, model: str, judge: Judge) -> dict[str, Any]:
        values = self.examples[model][judge].double()
        difference = values - self.examples[self.reference][judge].double()
        change, error = float(difference.mean()), standard_error(difference, self.clusters)
        sign = -1 if judge.metric in LOWER_IS_BETTER else 1
        return {
            "model": model,
            **judge._asdict(),
            "value": float(values.mean()),
            "standard_error": standard_error(values, self.clusters),
            "difference": change,
            "difference_standard_error": error,
            "better": sign * change / error if error > 0 else float("nan"),
            "held_out": self.held_out(judge),
            "n_examples": len(values),
            "n_clusters": len(values) if self.clusters is None else len(self.clusters.unique()),
        }


def standard_error(values: Tensor, clusters: Tensor | None = None) -> float:
    r"""Return the standard error of the mean of values ``(N,)`` whose clusters are independent of each other.

    It is :math:`\frac1N \sqrt{\frac{G}{G-1} \sum_g (\sum_{i \in g} (v_i - \bar v))^2}` over G clusters. With clusters
    of one example each, this is the usual standard error. It is NaN for a single cluster.
    """
    deviations = values - values.mean()
    if clusters is not None:
        _, numbers = clusters.unique(return_inverse=True)
        deviations = torch.zeros(int(numbers.max()) + 1, dtype=values.dtype).index_add_(0, numbers, deviations)
    n_clusters = len(deviations)
    if n_clusters < 2:
        return float("nan")
    return float((n_clusters / (n_clusters - 1) * deviations.square().sum()).sqrt()) / len(values)


def compare(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    explainers: Mapping[str, Callable[[Any], Attribution]],
    baselines: Mapping[str, Baselines],
    metrics: Sequence[str] | None = None,
    *,
    reference: str | None = None,
    trained_on: Iterable[str] | None = None,
    clusters: Callable[[Batch], Any] | None = None,
    feature_mask: FeatureMask | Mapping[str, FeatureMask] = None,
    attribute_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    outputs: Outputs = "logits",
    explain: Literal["predicted", "label"] = "predicted",
    fraction: float = 1.0,
    step_size: int | None = None,
    n_random_orders: int = 4,
    masked_share: float = 0.5,
    n_perturbations: int = 10,
    perturbation_radius: float = 0.02,
    unpack: Unpack | None = None,
    max_examples_per_batch: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Comparison:
    """Judge several models on the same examples, with the same random masks.

    The metrics, which have a value for each example:

    * "accuracy", and "masked_accuracy" with each baseline (`captum_idexpo.metrics.masked_accuracy`);
    * "insertion", "deletion", and their gains over random orders, "insertion_gain" and "deletion_gain", with each
      explainer and baseline (`captum_idexpo.metrics.insertion_deletion`, hard);
    * "road", for images, with each explainer (`captum_idexpo.metrics.road`);
    * "infidelity", with each explainer and baseline: Captum's infidelity, normalised. A perturbation sets a random
      fifth of the features to the baseline. Lower is better;
    * "sensitivity", with each explainer: Captum's max-sensitivity. Lower is better. It explains each example
      1 + n_perturbations times, with fixed baselines. All copies are explained with the same random numbers.

    "road" and "sensitivity" take the explanations with the first baseline.

    Args:
        models: modules by name, on one device, for example the model before training, trained plainly, and trained with
            its explanations. They are judged in eval mode.
        loader: yields (inputs, target) or what `unpack` takes; it is read once.
        explainers: by name, functions that make an attribution of `captum_idexpo.attr` of a model: classes, such as
            ``Saliency``, or ``lambda model: LayerGradCam(model, model.layer3)``.
        baselines: by name, numbers, tensors, or callables of the inputs (`captum_idexpo.baselines`).
        metrics: the metrics to compute; None: all that fit the outputs and the inputs.
        reference: the model that the others are compared with; None: the first.
        trained_on: names of the explainers, baselines and metrics that took part in training or selection, so that the
            other judges can be marked as held out. Accuracy, insertion, deletion and the gains always count as metrics
            of the training. None: nothing is marked.
        clusters: a function of a `Batch` that returns the cluster of each example, integers ``(B,)`` such as patients
            or videos. Standard errors then take the clusters as independent, not the examples.
        feature_mask: as for `captum_idexpo.regularizers.InsertionDeletion`, for all explainers or by their names.
            Masked accuracy masks the features of the first explainer that has one.
        attribute_kwargs: by explainer, further arguments of its ``attribute``.
        outputs: what the models return, as for `captum_idexpo.metrics.insertion_deletion`.
        explain: explain and score each model's own predicted class, or the label. With ``outputs="multilabel"`` and
            "label" the loader must yield the index of one label per row.
        fraction: share of the locations that is inserted or deleted.
        step_size: locations per step; None: the smallest number that gives at most 32 steps.
        n_random_orders: random orders that the gains are measured against. Explainers with the same feature mask, and
            with maps of the same shape, share them: they are scored once for each model and baseline.
        masked_share: share of the features that masked accuracy masks.
        n_perturbations: perturbations per example for sensitivity. Infidelity takes five times as many.
        perturbation_radius: largest change of a value for sensitivity, in the inputs' units.
        unpack: a function that returns the `captum_idexpo.Batch` of what the loader yields.
        max_examples_per_batch: rows per forward pass; None: chosen automatically.
        seed: the seed of all random numbers. The states of global generators are restored afterwards.
        show_progress: show a progress bar over models and batches.

    Returns:
        A `Comparison`, with ``to_pandas()``, ``table()``, ``plot()`` and ``to_html(path)``.

    Raises:
        ValueError: an unknown name or metric; a metric that does not fit outputs or inputs; models on several devices;
            an explainer of another model; a loader that yields nothing; errors of the metrics.
        TypeError: no mapping where one is needed; something else than a module or an attribution.

    Example:
        >>> import torch
        >>> from captum_idexpo import jury
        >>> from captum_idexpo.attr import InputXGradient, KernelShap
        >>> from captum_idexpo.baselines import resampled
        >>> x, y = torch.randn(40, 5), torch.arange(40) % 3
        >>> models = {name: torch.nn.Linear(5, 3) for name in ("before", "after")}
        >>> found = jury.compare(
        ...     models,
        ...     [(x[:20], y[:20]), (x[20:], y[20:])],
        ...     {"gradient": InputXGradient, "KernelSHAP": KernelShap},
        ...     {"zero": 0.0, "another row": resampled()},
        ...     metrics=["accuracy", "insertion_gain"],
        ...     trained_on=["gradient", "zero"],
        ... )
        >>> [str(judge) for judge in found.judges if found.held_out(judge)][0]
        'insertion_gain, gradient, another row'
    """
    _check_mapping("models", models, '{"before": before, "after": model}')
    _check_mapping("explainers", explainers, '{"Saliency": Saliency}')
    _check_mapping("baselines", baselines, '{"zero": 0.0}')
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"models[{name!r}] must be a torch.nn.Module, given: {type(model).__name__}.")
    reference = next(iter(models)) if reference is None else reference
    if reference not in models:
        raise InputError(f"reference={reference!r} is none of the models: {list(models)}.")
    panel = _Panel(
        explainers=explainers,
        baselines=baselines,
        metrics=_known_metrics(metrics, outputs),
        by_default=metrics is None,
        feature_masks=_by_name(feature_mask, explainers, "feature_mask"),
        attribute_kwargs={name: {} for name in explainers} | _checked_names(attribute_kwargs or {}, explainers),
        outputs=outputs,
        explain=_checked_choice(explain),
        fraction=fraction,
        step_size=step_size,
        n_random_orders=_checked_orders(n_random_orders, metrics),
        masked_share=masked_share,
        n_perturbations=check_count("n_perturbations", n_perturbations),
        perturbation_radius=check_not_negative("perturbation_radius", perturbation_radius),
        max_examples_per_batch=max_examples_per_batch,
    )
    known = frozenset((*explainers, *baselines, *METRICS))
    if isinstance(trained_on, str):
        raise InputTypeError(f"trained_on must be a list of names, given: {trained_on!r}. Pass [{trained_on!r}].")
    trained = None if trained_on is None else frozenset(trained_on)
    if trained is not None and trained - known:
        raise InputError(f"trained_on names {sorted(trained - known)}, which are no judges: {sorted(known)}.")
    shared = {*explainers} & {*baselines} | {*METRICS} & {*explainers, *baselines}
    if trained is not None and shared & trained:
        raise InputError(
            f"trained_on names {sorted(shared & trained)}, which several of explainers, baselines and metrics are "
            "called: give each its own name."
        )
    device = _device_of(models)
    found: dict[str, dict[Judge, list[Tensor]]] = {name: {} for name in models}
    numbers: list[Tensor] = []
    generators = [generator for baseline in baselines.values() for generator in generators_of(baseline)]
    members = {name: panel.members(model) for name, model in models.items()}
    quiet = seeded(seed, device, generators)
    with no_graph(), eval_mode(*models.values()), quiet, _bar(loader, len(models), show_progress) as bar:
        for number, yielded in enumerate(loader, start=1):  # the loader and the baselines have the seed itself
            batch = _moved(unpacked(yielded, unpack), device)
            state = random_state(device, generators)
            for name, model in models.items():
                set_random_state(state, device, generators)  # the same numbers for each model
                for judge, values in panel.judge(model, members[name], batch, seed * _BATCHES + number).items():
                    found[name].setdefault(judge, []).append(values.detach().double().cpu())
                bar.update()
            if clusters is not None:
                numbers.append(_cluster_numbers(clusters(batch), len(as_batch(batch.inputs)[0])))
    if not found[reference]:
        raise InputError("The loader yielded no batch to judge on.")
    return Comparison(
        {name: {judge: torch.cat(parts) for judge, parts in scores.items()} for name, scores in found.items()},
        clusters=torch.cat(numbers) if numbers else None,
        reference=reference,
        trained_on=None if trained is None else trained | {"accuracy", *_BY_MASKS},
        settings={**panel.settings(), "seed": seed},
    )


class _Member(NamedTuple):
    """A model's explainer and a baseline, as one regularizer that explains and scores."""

    explainer: str
    baseline: str
    regularizer: InsertionDeletion


@dataclass(frozen=True)
class _Panel:
    """The judges of a comparison and their settings, see `compare`."""

    explainers: Mapping[str, Callable[[Any], Attribution]]
    baselines: Mapping[str, Baselines]
    metrics: Sequence[str]
    by_default: bool
    feature_masks: Mapping[str, FeatureMask]
    attribute_kwargs: Mapping[str, Mapping[str, Any]]
    outputs: Outputs
    explain: str
    fraction: float
    step_size: int | None
    n_random_orders: int
    masked_share: float
    n_perturbations: int
    perturbation_radius: float
    max_examples_per_batch: int | None

    def settings(self) -> dict[str, Any]:
        """Return by name what the values depend on; what only other metrics use is left out."""
        masks = {name: mask for name, mask in self.feature_masks.items() if mask is not None}
        uses = {
            "step size": (self.step_size, _BY_MASKS if self.step_size is not None else ()),
            "share of the locations inserted or deleted": (self.fraction, _BY_MASKS),
            "random orders": (self.n_random_orders, _BY_MASKS[2:]),
            "share masked for masked accuracy": (self.masked_share, ("masked_accuracy",)),
            "perturbations": (self.n_perturbations, ("infidelity", "sensitivity")),
            "perturbation radius": (self.perturbation_radius, ("sensitivity",)),
        }
        return {
            "explained class": "predicted by each model" if self.explain == "predicted" else "label",
            **{f"arguments of {name}": _listed(given) for name, given in self.attribute_kwargs.items() if given},
            **{f"feature mask of {name}": _shown(mask) for name, mask in masks.items()},
            **{name: value for name, (value, users) in uses.items() if {*users} & {*self.metrics}},
        }

    def members(self, model: nn.Module) -> list[_Member]:
        """Return a model's explainers with each baseline."""
        return [
            _Member(
                explainer,
                baseline,
                InsertionDeletion(
                    _explainer_of(model, make, explainer),
                    baselines=given,
                    forward_func=model,
                    outputs=self.outputs,
                    feature_mask=self.feature_masks[explainer],
                    attribute_kwargs=self.attribute_kwargs[explainer],
                    fraction=self.fraction,
                    step_size=self.step_size,
                    generator=Generator(),
                    max_examples_per_batch=self.max_examples_per_batch,
                ),
            )
            for explainer, make in self.explainers.items()
            for baseline, given in self.baselines.items()
        ]

    def judge(self, model: nn.Module, members: list[_Member], batch: Batch, seed: int) -> dict[Judge, Tensor]:
        """Return the values of all judges for the examples of a batch."""
        inputs = batch.inputs
        metrics = self._fitting(as_batch(inputs))
        # Drawn once for a batch, so that all judges see the same baselines and groups.
        baselines = {name: given(inputs) if callable(given) else given for name, given in self.baselines.items()}
        masks = self._feature_masks(inputs)
        values: dict[Judge, Tensor] = {}
        accuracy = functools.partial(self._accuracy, model, batch, masks, seed)
        if "accuracy" in metrics:
            values[Judge("accuracy")] = accuracy(None, 0.0)
        if "masked_accuracy" in metrics:
            for name, baseline in baselines.items():
                values[Judge("masked_accuracy", None, name)] = accuracy(baseline, self.masked_share)
        if {*metrics} - {"accuracy", "masked_accuracy"}:
            # Random orders take most of the time, so explainers with the same baseline and feature mask share them.
            n_orders = self.n_random_orders if {*metrics} & {*_BY_MASKS[2:]} else 0
            shared: dict[tuple[str, int], RandomOrders] = {}
            for member in members:
                mask = masks[member.explainer]
                orders = RandomOrders(n_orders, lambda: Generator().manual_seed(seed))
                orders = shared.setdefault((member.baseline, id(mask)), orders)
                member.regularizer.baselines = baselines[member.baseline]
                member.regularizer.feature_mask = mask
                member.regularizer.generator = Generator().manual_seed(seed)
                values |= self._explained(model, member, batch, metrics, seed, orders)
        return {judge: values[judge] for judge in sorted(values, key=lambda judge: METRICS.index(judge.metric))}

    def _feature_masks(self, inputs: Tensors) -> dict[str, Any]:
        """Return the feature mask of each explainer. A function that several of them have is called once."""
        distinct = {id(given): given for given in self.feature_masks.values()}
        made = {key: given(inputs) if callable(given) else given for key, given in distinct.items()}
        return {name: made[id(given)] for name, given in self.feature_masks.items()}

    def _fitting(self, tensors: tuple[Tensor, ...]) -> list[str]:
        """Return the metrics that fit the inputs: by default "road" for images and "sensitivity" for real numbers."""
        real = all(tensor.is_floating_point() for tensor in tensors)
        is_image = real and len(tensors) == 1 and tensors[0].dim() == 4
        unfit = ({"road"} if not is_image else set()) | ({"sensitivity"} if not real else set())
        if unfit & {*self.metrics} and not self.by_default:
            given = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
            raise InputError(
                f"'road' needs images (B, C, H, W), 'sensitivity' floating-point inputs; given: {given}. Leave "
                f"{sorted(unfit & {*self.metrics})} out of metrics."
            )
        return [metric for metric in self.metrics if metric not in unfit]

    def _accuracy(
        self, model: nn.Module, batch: Batch, masks: Mapping[str, Any], seed: int, baselines: Baselines, share: float
    ) -> Tensor:
        """Return which examples are classified right, with the groups of the first explainer that has some."""
        return masked_accuracy(
            model,
            batch.inputs,
            batch.target,
            baselines=baselines,
            feature_mask=next((mask for mask in masks.values() if mask is not None), None),
            additional_forward_args=batch.additional_forward_args,
            share=share,
            outputs=self.outputs,
            generator=Generator().manual_seed(seed),
            max_examples_per_batch=self.max_examples_per_batch,
        )

    def _explained(
        self,
        model: nn.Module,
        member: _Member,
        batch: Batch,
        metrics: list[str],
        seed: int,
        random_orders: RandomOrders,
    ) -> dict[Judge, Tensor]:
        """Return the values of the judges that need an explanation, made once."""
        regularizer, target = member.regularizer, self._target(member.regularizer, batch)
        side, device = {"additional_forward_args": batch.additional_forward_args}, as_batch(batch.inputs)[0].device
        # Explainers and Captum's metrics may draw from the global streams. Whichever others there are, they have the
        # same numbers. A judge has others than the explainer: LIME would fit the perturbations that it is judged on.
        for_judge = functools.partial(seeded, seed + _BATCHES // 2, device)
        with seeded(seed, device):
            scores, maps = regularizer.scores_and_attribution(batch.inputs, target, random_orders=random_orders, **side)
        values = {
            Judge(name, member.explainer, member.baseline): value
            for name, value in scores._asdict().items()
            if name in metrics and value is not None
        }
        if "infidelity" in metrics:
            judge = Judge("infidelity", member.explainer, member.baseline)
            with for_judge():
                values[judge] = self._infidelity(model, regularizer, batch, maps, target)
        if member.baseline == next(iter(self.baselines)):
            if "road" in metrics:
                values[Judge("road", member.explainer)] = road(
                    self._log_probabilities(model),
                    batch.inputs,
                    maps[0],
                    target=target,
                    outputs="log_probabilities",
                    generator=Generator().manual_seed(seed),
                    max_examples_per_batch=self.max_examples_per_batch,
                    **side,
                )
            if "sensitivity" in metrics:
                with for_judge():
                    values[Judge("sensitivity", member.explainer)] = self._sensitivity(regularizer, batch, target, seed)
        return values

    def _target(self, regularizer: InsertionDeletion, batch: Batch) -> Any:
        """Return the explained class of each example, ``(B,)``; of raw outputs what the loader yields."""
        if is_raw(self.outputs):
            return batch.target if callable(self.outputs) else regularizer.explained(batch).target
        if self.explain == "predicted":
            side = batch.additional_forward_args
            return regularizer.predicted_class(batch.inputs, additional_forward_args=side)
        if self.outputs == "multilabel" and positive_labels(batch.target) is not None:
            raise InputError(
                "explain='label' needs the index of one label per example, (B,), given: a multi-hot target. Let the "
                "loader yield indices, or take explain='predicted'."
            )
        return explained_class(batch.target, self.outputs)

    def _log_probabilities(self, model: nn.Module) -> Callable[..., Tensor]:
        """Return a function with one column for each class, also of a single logit.

        The maps speak for the target already, so no metric may flip them for class 0 of a single column.
        """
        return lambda *inputs: log_probabilities(model(*inputs), self.outputs)

    def _infidelity(
        self,
        model: nn.Module,
        regularizer: InsertionDeletion,
        batch: Batch,
        maps: tuple[Tensor, ...],
        target: Any,
    ) -> Tensor:
        """Return Captum's infidelity, normalised, of masks of a fifth of the features."""
        tensors, aligned = check_inputs(batch.inputs, regularizer.baselines, check_finite=False)
        layout = masked_features(cast("Tensors | None", regularizer.feature_mask), tensors)
        n_examples, share = len(tensors[0]), max(_INFIDELITY_SHARE, 1 / layout.n_features)
        masked = MaskedInputs(tensors, aligned, layout)
        weights = _weights(regularizer, layout, tensors)

        def perturb(rows: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            n_copies = len(rows[0] if isinstance(rows, tuple) else rows) // n_examples
            draws = [random_masks(layout, n_examples, tensors[0].device, share, None) for _ in range(n_copies)]
            kept = torch.stack(draws)
            removed = layout.spread((1 - kept.to(weights.dtype)) * weights)
            wide = [each.expand(n_copies, *tensor.shape) for each, tensor in zip(removed, tensors, strict=True)]
            return _example_by_example(wide), _example_by_example(masked.copies(kept))

        n_perturbations = _PERTURBATIONS_OF_INFIDELITY * self.n_perturbations
        rows = self.max_examples_per_batch or default_rows_per_forward(tensors)
        log_probability = self._log_probabilities(model)
        values: Tensor = captum.metrics.infidelity(
            lambda *inputs: log_probability(*inputs).exp(),
            perturb,
            tensors if len(tensors) > 1 else tensors[0],
            tuple(map.expand_as(tensor) for map, tensor in zip(maps, tensors, strict=True)),
            additional_forward_args=batch.additional_forward_args,
            target=target,
            n_perturb_samples=n_perturbations,
            max_examples_per_batch=min(n_examples * n_perturbations, max(n_examples, rows)),
            normalize=True,
        )
        return values

    def _sensitivity(self, regularizer: InsertionDeletion, batch: Batch, target: Any, seed: int) -> Tensor:
        """Return Captum's max-sensitivity of the explanation.

        Each call explains one copy of the batch. So an example has the same random numbers in all of its copies, and
        baselines and masks that belong to it.
        """

        def explanation(rows: tuple[Tensor, ...], target: Any = None, **side: Any) -> tuple[Tensor, ...]:
            regularizer.generator = Generator().manual_seed(seed)
            return regularizer.attribution(rows if isinstance(batch.inputs, tuple) else rows[0], target, **side)

        side = batch.additional_forward_args
        values: Tensor = captum.metrics.sensitivity_max(
            explanation,
            batch.inputs,
            perturb_func=_moved_uniformly,
            perturb_radius=self.perturbation_radius,
            n_perturb_samples=self.n_perturbations,
            max_examples_per_batch=len(as_batch(batch.inputs)[0]),
            target=target,
            **({} if side is None else {"additional_forward_args": side}),
        )
        return values


def _explainer_of(model: nn.Module, make: Callable[[Any], Attribution], name: str) -> Attribution:
    """Return a model's explainer; InputError if it explains another model, since `make` ignores its argument."""
    explainer = require_attribution(make(model))
    explained = module_of(explainer.forward_func)
    if explained is not None and not belong_together([explained], model):
        raise InputError(
            f"explainers[{name!r}] returns an attribution of another model than it is given: they share no parameter. "
            "Make it from the argument, as in lambda model: LayerGradCam(model, model.layer4)."
        )
    return explainer


def _weights(regularizer: InsertionDeletion, layout: FeatureLayout, tensors: tuple[Tensor, ...]) -> Tensor:
    """Return what each position of a feature counts, ``(1 or B, D)``.

    A position of a map holds the mean attribution of its feature. An explainer of groups gives one value for each
    group, which counts once. The values of other explainers add up over the positions.
    """
    ones = tuple(torch.ones_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
    sizes = layout.sums(ones).clamp_min(1)
    return 1 / sizes if regularizer.explains_groups else torch.ones_like(sizes)


def _example_by_example(copies: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return copies ``(n, B, ...)`` as rows, all copies of an example in a row, as Captum repeats them."""
    return tuple(each.transpose(0, 1).flatten(0, 1) for each in copies)


def _moved_uniformly(inputs: Any, radius: float) -> tuple[Tensor, ...]:
    """Return inputs plus uniform noise, in their own dtype, which Captum's function does not keep."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(each + radius * (2 * torch.rand_like(each) - 1) for each in tensors)


def _cell(row: dict[str, Any], is_reference: bool) -> str:
    text = f"{row['value']:.3f}"
    if is_reference:
        return text
    return f"{text} ({change_text(row)})"


def _listed(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of an explainer in one line."""
    return ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())


def _shown(value: Any) -> str:
    """Return tensors by their shapes and functions by their names."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def _escaped(name: object) -> str:
    """Return a name that does not end a cell of a Markdown table."""
    return str(name).replace("|", "\\|")


def _check_mapping(name: str, given: object, example: str) -> None:
    if not isinstance(given, Mapping):
        raise InputTypeError(f"{name} must be a mapping by name, such as {example}; given: {type(given).__name__}.")
    if not given:
        raise InputError(f"{name} is empty: give at least one, such as {example}.")


def _known_metrics(metrics: Sequence[str] | None, outputs: Outputs) -> list[str]:
    unfit = (*_OF_CLASSES, *(["sensitivity"] if callable(outputs) else [])) if is_raw(outputs) else ()
    if metrics is None:
        return [metric for metric in METRICS if metric not in unfit]
    given = [metrics] if isinstance(metrics, str) else list(metrics)
    unknown = [metric for metric in given if metric not in METRICS]
    if unknown or not given:
        raise InputError(f"metrics must be some of {METRICS}, given: {given}.")
    if {*given} & {*unfit}:
        raise InputError(f"{sorted({*given} & {*unfit})} need classes, which outputs={outputs!r} do not have.")
    return [metric for metric in METRICS if metric in given]


def _checked_orders(n_random_orders: int, metrics: Sequence[str] | None) -> int:
    if check_count_or_zero("n_random_orders", n_random_orders) == 0 and {*(metrics or METRICS)} & {*_BY_MASKS[2:]}:
        raise InputError("Gains need random orders: pass n_random_orders=4, or metrics without the gains.")
    return n_random_orders


def _checked_choice(explain: str) -> str:
    if explain not in ("predicted", "label"):
        raise InputError(f"explain must be 'predicted' or 'label', given: {explain!r}.")
    return explain


def _checked_names(given: Mapping[str, Any], explainers: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping) or {*given} - {*explainers}:
        raise InputError(f"attribute_kwargs must be by explainer, {list(explainers)}; given: {given!r}.")
    return dict(given)


def _by_name(given: Any, explainers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one value for each explainer."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(explainers, given)
    if {*given} - {*explainers}:
        raise InputError(f"{name} names {sorted({*given} - {*explainers})}, which are no explainers: {[*explainers]}.")
    return {explainer: given.get(explainer) for explainer in explainers}


def _device_of(models: Mapping[str, nn.Module]) -> torch.device:
    devices = {next(iter(model.parameters()), torch.zeros(())).device for model in models.values()}
    if len(devices) > 1:
        raise InputError(f"The models lie on several devices, {sorted(map(str, devices))}: move them to one.")
    return devices.pop()


def _cluster_numbers(given: Any, n_examples: int) -> Tensor:
    if not isinstance(given, Tensor) and not all(isinstance(number, Integral) for number in given):
        raise InputTypeError(f"clusters must return integers, given: {given!r}. Number the clusters.")
    numbers = torch.as_tensor(given).cpu()
    if numbers.shape != (n_examples,) or numbers.is_floating_point():
        raise InputError(
            f"clusters must return one integer per example, ({n_examples},); given: {numbers.dtype} of shape "
            f"{tuple(numbers.shape)}."
        )
    return numbers


def _moved(batch: Batch, device: torch.device) -> Batch:
    moved: Batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
    return moved


@contextmanager
def _bar(loader: Iterable[Any], n_models: int, show_progress: bool) -> Iterator[Any]:
    """Yield a progress bar over batches and models."""
    total = len(loader) * n_models if isinstance(loader, Sized) else None
    with (progress if show_progress else NullProgress)(total=total, desc="jury") as bar:
        yield bar
