"""The public face of a regularizer: named, weighted terms, computed in eval mode.

`Regularizer` is what the loss and the trainer know. `Penalty` is a regularizer of one term with a weight, which may be
chosen from the first batch. `AttributionPenalty` is a penalty on the attribution of an explainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch, as_side_inputs
from captum_idexpo._core.captum import TargetType
from captum_idexpo._core.chunks import default_rows_per_forward
from captum_idexpo._core.compiled import eagerly
from captum_idexpo._core.errors import InputError, NonFiniteError, warn
from captum_idexpo._core.features import MaskedInputs
from captum_idexpo._core.forward import BatchForward, evaluate_given
from captum_idexpo._core.inputs import Tensors, as_batch, check_inputs, check_not_negative
from captum_idexpo._core.modes import eval_mode as held_in_eval_mode
from captum_idexpo._core.modes import module_of, no_graph
from captum_idexpo._core.rng import accelerators, kept_streams, seeded
from captum_idexpo._core.targets import Outputs, drawn_label, explained_class, positive_labels
from captum_idexpo.attr.layouts import ReshapeTransform, reshaped
from captum_idexpo.metrics._locations import constant_maps_message
from captum_idexpo.metrics._scoring import check_outputs, is_raw, predicted_class
from captum_idexpo.metrics.masked_accuracy import masked_features, random_masks
from captum_idexpo.regularizers._explaining import (
    Explaining,
    layer_cells,
    per_row,
    require_attribution,
    takes_gradients,
)
from captum_idexpo.regularizers._reading import MaskReading

Weight = float | Literal["auto"]
_HEAVIEST = 1e8  # a larger automatic weight would amplify rounding errors
_NEARLY_ZERO = 1e-3  # a task loss from which no useful automatic weight can be made


class Explained(NamedTuple):
    """What is explained and scored.

    Attributes:
        target: as Captum takes it.
        contributes: 1 for examples with a label to explain, 0 for the others, ``(B,)``; None: all have one.
        n_labels: how many labels a multi-hot target has; None: it is none.
    """

    target: TargetType
    contributes: Tensor | None = None
    n_labels: int | None = None


class Regularizer(nn.Module):
    """Loss terms made of a model's explanations: called as ``regularizer(inputs, target, annotations)``.

    A subclass computes its `terms` from a `captum_idexpo.Batch`. They are called with the model in eval mode
    (BatchNorm, dropout), whatever mode the training loop has set. `ExplanationRegularizedLoss` and the trainer also
    read the attributes below, which a subclass may override.

    Args:
        forward_func: the function that is explained or evaluated: a module, or a callable of the input tensors.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        outputs: what the forward function returns, as for `captum_idexpo.metrics.insertion_deletion`.
        eval_mode: hold the model in eval mode while the terms are computed.
        explainer: an attribution of `captum_idexpo.attr` that the terms use, see `explain`.
        attribute_kwargs: further arguments of ``explainer.attribute``. Without n_samples, LIME and KernelSHAP take
            three masked copies for each feature, with ``sampling="independent"``, and refuse more than 1,024 features.
            The feature_mask may be a callable of the inputs, and the baselines one of `captum_idexpo.baselines`.
        reshape_transform: a function that brings the attribution of a layer to ``(B, C, h, w)`` or ``(B, C, T)``, such
            as `captum_idexpo.attr.steps_first`; needed where the axes of a layer cannot be told apart.
        target_transform: a function of the loader's target that returns the target of explainer and score; None: the
            rules of `outputs`. With a function as `outputs` it gives the target of the explainer alone. Soft labels are
            explained by their largest class. Multi-hot targets of ``outputs="multilabel"`` are explained by one of the
            true labels, drawn per example and call; an example without a true label contributes 0. Accuracies are by
            what it returns, too: that of the judge, else that of the first regularizer.
        generator: source of random numbers that the terms draw; None: torch's global generator.

    Attributes:
        explainer_seconds: seconds that the explainer took in the last call.
        measurements: numbers that the last call measured beside its terms, by name, as detached scalar tensors. The
            trainer reports their means.

    Raises:
        TypeError: a forward function that cannot be called, an explainer that is none or cannot be trained through.
        ValueError: unknown outputs, arguments that the explainer lacks.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import InputXGradient
        >>> from captum_idexpo.regularizers import Regularizer
        >>> class Norms(Regularizer):
        ...     def terms(self, batch):
        ...         (maps,) = self.explain(batch)
        ...         return {"l1": 0.1 * maps.abs().mean(), "l2": 0.1 * maps.square().mean()}
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout())
        >>> regularizer = Norms(model, explainer=InputXGradient(model))
        >>> terms = regularizer(torch.randn(5, 4), torch.randint(3, (5,)))
        >>> sum(terms.values()).backward()
    """

    forward_func: Callable[..., Any]
    model: nn.Module | None

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        model: nn.Module | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        explainer: Attribution | None = None,
        attribute_kwargs: Mapping[str, Any] | None = None,
        reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        check_outputs(outputs)
        if not callable(forward_func):
            raise TypeError(
                f"forward_func must be a module or a forward function, given: {type(forward_func).__name__}."
            )
        # The model belongs to the user. As a submodule, its parameters would be in a second state dict.
        self.__dict__["forward_func"] = forward_func
        self.__dict__["model"] = module_of(forward_func) if model is None else model
        self.outputs = outputs
        self.eval_mode = eval_mode
        if explainer is None and attribute_kwargs:
            raise ValueError("attribute_kwargs belong to an explainer: pass explainer= as well.")
        self._explaining = None if explainer is None else Explaining(explainer, attribute_kwargs)
        self._n_columns: int | None = None
        if self._explaining is not None:
            self._explaining.check_transform(reshape_transform)
        self.reshape_transform = reshape_transform
        self.target_transform = target_transform
        self.generator = generator
        self._constant_reported = False
        self._reading = MaskReading()
        self.explainer_seconds = 0.0
        self.measurements: dict[str, Tensor] = {}
        if eval_mode and not self.models:
            warn(
                "The forward function is neither a module nor a module's method, so BatchNorm and dropout cannot be "
                "held in eval mode: pass model=, or eval_mode=False if there is nothing to hold.",
            )

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms: scalars by name, means over the batch.

        Under `torch.no_grad` they have the same values and no graph.
        """
        raise NotImplementedError

    def forward(
        self,
        inputs: Tensors,
        target: Any,
        annotations: Tensors | None = None,
        *,
        additional_forward_args: object = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms, scalars by name.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: labels ``(B,)``, or the targets of a regression.
            annotations: what a loader yields third, see `RightForTheRightReasons`.
            additional_forward_args: what the model takes after the inputs, see `captum_idexpo.Batch`: tensors with one
                row per example, and values of other types, which are passed as they are.

        Raises:
            ValueError: a target that contradicts `outputs`; a tensor among the additional arguments that has not one
                row per example.
        """
        batch = self._read(inputs, target, annotations, additional_forward_args)
        with self.held_in_eval_mode():
            terms = self.terms(batch)
        if self._explaining is not None:
            self.explainer_seconds = self._explaining.seconds
        return terms

    def explain(self, batch: Batch, explained: Explained | None = None) -> tuple[Tensor, ...]:
        """Return the explainer's attribution, one map per input tensor, a layer's in the size of the input.

        Under enabled gradients it is attached to the graph of the model's parameters. An example that has no label to
        explain has an attribution of 0.

        Args:
            batch: what is explained.
            explained: the explained target; None: that of `explained`.

        Raises:
            RuntimeError: the regularizer has no explainer; the attribution can have no graph.
            TypeError: a target that names no class.
        """
        if self._explaining is None:
            raise RuntimeError(f"{type(self).__name__} has no explainer: pass explainer= to Regularizer's constructor.")
        tensors = as_batch(batch.inputs)
        explained = self.explained(batch) if explained is None else explained
        n_columns = None if explained.target is None else self._n_explained_columns(batch, tensors)
        check_n_labels(explained.n_labels, n_columns)
        target = explained.target if n_columns != 1 else None
        side = batch.additional_forward_args
        more = {} if side is None else {"additional_forward_args": side}
        given = self.attribute_kwargs
        self._report_unread_masks(batch, given.get("baselines"), given.get("feature_mask"))
        arguments = {"target": target, "generator": self.generator, **more}
        maps = self._explaining(batch.inputs, torch.is_grad_enabled(), **arguments)
        self._report_constant_maps(torch.cat([map.detach().flatten(1) for map in maps], dim=1))
        if self._explaining.of_layer:
            maps = (self._cells(maps, tensors)[0],)
        return maps if explained.contributes is None else tuple(per_row(m, explained.contributes) * m for m in maps)

    def explained(self, batch: Batch) -> Explained:
        """Return what is explained and scored for the target of a batch, see `target_transform` and `outputs`."""
        if callable(self.outputs):
            return Explained(None if self.target_transform is None else self.target_transform(batch.target))
        target = self.transformed(batch.target)
        if self.outputs != "multilabel":
            return Explained(explained_class(target, self.outputs))
        positive = positive_labels(target)
        if positive is None:
            return Explained(target)
        return Explained(drawn_label(positive, self.generator), positive.any(dim=1).float(), positive.shape[1])

    def transformed(self, target: Any) -> Any:
        """Return a loader's target after `target_transform`."""
        return target if self.target_transform is None else self.target_transform(target)

    def held_in_eval_mode(self) -> AbstractContextManager[None]:
        """Hold the model in eval mode inside a ``with`` statement, unless `eval_mode` is False."""
        return held_in_eval_mode(*self.models) if self.eval_mode else nullcontext()

    @property
    def models(self) -> list[nn.Module]:
        """The modules that are held in eval mode: `model`, and those behind the forward function and the explainer."""
        functions = [self.forward_func] if self.explainer is None else [self.forward_func, self.explainer.forward_func]
        candidates = (self.model, *map(module_of, functions))
        return list(dict.fromkeys(module for module in candidates if module is not None))

    @property
    def models_differentiated_twice(self) -> list[nn.Module]:
        """The modules of which the terms may contain gradients, where `needs_second_derivative` is True."""
        return self.models

    @property
    def explainer(self) -> Attribution | None:
        """The attribution that the terms use, if there is one."""
        return None if self._explaining is None else self._explaining.explainer

    @property
    def attribute_kwargs(self) -> dict[str, Any]:
        """What the explainer's ``attribute`` is always given."""
        return {} if self._explaining is None else self._explaining.arguments

    @property
    def needs_second_derivative(self) -> bool:
        """True if the terms contain gradients of the model, whose own gradient is a second derivative.

        Compiled models have none. A subclass whose terms are made of the model's outputs alone returns False.
        """
        return True

    @property
    def generators(self) -> list[Generator]:
        """The random generators that the terms draw from, beside the global ones. A resumed run restores them."""
        of_explainer = [] if self._explaining is None else self._explaining.generators
        return [generator for generator in (self.generator, *of_explainer) if generator is not None]

    @property
    def automatic_weights(self) -> dict[str, float]:
        """The weights that the regularizer has chosen itself, by term."""
        return {}

    def prepare(self, loader: Iterable[Any]) -> None:
        """Measure what depends on the training data. The trainer calls this before the first epoch."""

    def calibrate(
        self,
        task_loss: Tensor,
        inputs: Tensors,
        target: Any,
        annotations: Tensors | None = None,
        *,
        additional_forward_args: object = None,
    ) -> None:
        """Choose automatic weights from the first batch. The loss calls this before each of its calls."""

    def _read(self, inputs: Tensors, target: Any, annotations: Tensors | None, side_inputs: object) -> Batch:
        """Return a batch whose additional arguments are a tuple, the explainer's constant ones among them, or None."""
        self._check_target(target)
        constant = self.attribute_kwargs.get("additional_forward_args")
        if side_inputs is None:
            return Batch(inputs, target, annotations, constant)
        if constant is not None:
            raise InputError(
                "additional_forward_args are given with the batch and in attribute_kwargs: leave them out of one."
            )
        return Batch(inputs, target, annotations, as_side_inputs(side_inputs, len(as_batch(inputs)[0])))

    def _report_constant_maps(self, values: Tensor, present: Tensor | None = None) -> None:
        """Warn once of maps ``(B, D)`` that rank no location."""
        message = None if self._constant_reported else constant_maps_message(values, present)
        if message:
            self._constant_reported = True
            warn(message)

    def _report_unread_masks(
        self, batch: Batch, baselines: object, feature_mask: Any, max_rows: int | None = None
    ) -> None:
        """Warn once before masked copies are explained that the model cannot read. It leaves no trace."""
        explaining, reading = self._explaining, self._reading
        if explaining is None or not explaining.asks_masked_copies or is_raw(self.outputs) or reading.is_settled:
            return
        tensors = as_batch(batch.inputs)
        n_examples, device = len(tensors[0]), tensors[0].device
        held = held_in_eval_mode(*self.models)
        with no_graph(), seeded(0, device, self.generators), held, eagerly(*self.models):
            _, aligned = check_inputs(batch.inputs, baselines, check_finite=False)
            layout = masked_features(feature_mask(batch.inputs) if callable(feature_mask) else feature_mask, tensors)
            n_copies = reading.n_copies(n_examples)
            kept = torch.stack([random_masks(layout, n_examples, device, 0.5, None) for _ in range(n_copies)])
            kept = torch.cat([torch.ones_like(kept[:1]), kept])  # first the unmasked examples
            copies = MaskedInputs(tensors, aligned, layout).copies(kept)
            decisions = evaluate_given(self._decisions(batch), copies, max_rows or default_rows_per_forward(tensors))
        message = reading.add(decisions[:, 0], decisions[:, 1:])
        if message:
            warn(message)

    def _decisions(self, batch: Batch) -> Callable[[tuple[Tensor, ...], slice, int], Tensor]:
        """Return a function of rows: their predicted classes, or which labels are predicted.

        It is 0 for every row whose output has no single class.
        """
        forward = BatchForward(self.forward_func, batch.additional_forward_args, len(as_batch(batch.inputs)[0]))

        def decide(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            output: Tensor = forward(rows, examples, n_copies)
            if output.dim() not in (1, 2) or len(output) != len(rows[0]):
                return torch.zeros(len(rows[0]), dtype=torch.long)
            return output > 0 if self.outputs == "multilabel" else predicted_class(output, self.outputs)

        return decide

    def _check_target(self, target: Any) -> None:
        """Refuse a target that contradicts `outputs`, also where nothing reads it: the outputs would be misread."""
        if target is None or is_raw(self.outputs) or self.target_transform is not None:
            return
        real = isinstance(target, Tensor) and target.is_floating_point()
        if real and not bool(((target >= 0) & (target <= 1)).all()):
            raise ValueError(
                f"The targets are real numbers, as those of a regression, but outputs={self.outputs!r} announces "
                "classes: pass outputs='raw', or integer labels."
            )
        if self.outputs == "multilabel":
            positive_labels(target)
        else:
            explained_class(target, self.outputs)

    def _cells(self, maps: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return a layer's attribution at the locations of the input, and at its own cells."""
        assert self._explaining is not None
        if self.reshape_transform is None:
            return layer_cells(maps, tensors, self._explaining.layout, self._explaining.layer_shape)
        if self._explaining.layout == "named" and tensors[0].dim() > 3:
            raise ValueError(
                "reshape_transform is given to LayerGradCam and to the regularizer: leave it out of the regularizer, "
                "since the map is (B, 1, h, w) already."
            )
        return layer_cells(tuple(reshaped(map, self.reshape_transform) for map in maps), tensors, "placed")

    def _n_explained_columns(self, batch: Batch, tensors: tuple[Tensor, ...]) -> int:
        """Return how many columns the explained output has; of a single one the explainer takes no target."""
        assert self._explaining is not None
        if self._n_columns is None:
            # Looked at once, and without a trace in random streams: a run that is resumed looks again.
            streams, held = kept_streams(accelerators(tensors[0].device)), held_in_eval_mode(*self.models)
            with no_graph(), streams, held, eagerly(*self.models):
                self._n_columns = self._explaining.n_columns(tensors, batch.additional_forward_args)
        return self._n_columns


def check_n_labels(n_labels: int | None, n_columns: int | None) -> None:
    """Raise InputError for a multi-hot target that has not one column for each output."""
    if n_labels is not None and n_columns is not None and n_labels != n_columns:
        raise InputError(
            f"The multi-hot target has {n_labels} labels, the output {n_columns} columns: give one for each, or the "
            "indices (B,) of the labels to explain."
        )


class Penalty(Regularizer):
    """A regularizer of one term: ``weight * penalty``, the penalty a mean over the batch.

    A subclass computes its `penalty`. An automatic weight makes the term ``ratio`` times the task loss when training
    starts, as the authors of ExpO set theirs (Plumb et al. 2020), so that one ratio serves many data sets.

    Args:
        term: name of the term.
        forward_func: the function that is explained or evaluated: a module, or a callable of the input tensors.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        weight: a number, or "auto".
        ratio: of the term to the task loss at the start, for an automatic weight.
        outputs: what the forward function returns, as for `captum_idexpo.metrics.insertion_deletion`.
        eval_mode: hold the model in eval mode while the penalty is computed.
        explainer: an attribution of `captum_idexpo.attr` that the penalty uses, see `Regularizer.explain`.
        attribute_kwargs: further arguments of ``explainer.attribute``.
        reshape_transform: where the channels of an explained layer are, see `Regularizer`.
        target_transform: a function of the loader's target that returns the target of the explainer, see `Regularizer`.
        generator: source of random numbers that the penalty draws; None: torch's global generator.

    Raises:
        TypeError: a forward function that cannot be called.
        ValueError: an argument out of range.
    """

    auto_weight: Tensor

    def __init__(
        self,
        term: str,
        forward_func: Callable[..., Any],
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        explainer: Attribution | None = None,
        attribute_kwargs: Mapping[str, Any] | None = None,
        reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            forward_func,
            model=model,
            outputs=outputs,
            eval_mode=eval_mode,
            explainer=explainer,
            attribute_kwargs=attribute_kwargs,
            reshape_transform=reshape_transform,
            target_transform=target_transform,
            generator=generator,
        )
        self.term = term
        self.is_automatic = weight == "auto"
        if isinstance(weight, str):
            if weight != "auto":
                raise ValueError(f"weight must be a number or 'auto', given: {weight!r}.")
            # A buffer, so that a resumed run continues with the weight it started with.
            self.register_buffer("auto_weight", torch.tensor(math.nan))
        else:
            self._weight = check_not_negative("weight", weight)
        self.ratio = check_not_negative("ratio", ratio)
        self._waits = False

    def penalty(self, batch: Batch) -> Tensor:
        """Return the scalar before it is weighted, a mean over the batch."""
        raise NotImplementedError

    @property
    def weight(self) -> float:
        """The term's weight; NaN while an automatic one is not chosen."""
        return float(self.auto_weight) if self.is_automatic else self._weight

    @property
    def needs_calibration(self) -> bool:
        """True if the weight is automatic and not chosen yet."""
        return self.is_automatic and math.isnan(self.weight)

    @property
    def automatic_weights(self) -> dict[str, float]:
        """The term's weight, if it is automatic."""
        return {self.term: self.weight} if self.is_automatic else {}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted term. An evaluation before an automatic weight is chosen gives 0.

        Raises:
            RuntimeError: an automatic weight that was never chosen, in training.
        """
        penalty = self.penalty(batch)
        if not self.needs_calibration:
            return {self.term: self.weight * penalty}
        if not self._waits and self._in_training:
            raise RuntimeError(
                f"The weight of {type(self).__name__} is 'auto' and not set yet: before each step call "
                "`regularizer.calibrate(task_loss, inputs, target)`, which chooses it on the first batch. "
                "ExplanationRegularizedLoss and the trainer do."
            )
        self._waits = False
        return {self.term: 0.0 * penalty}

    def calibrate(
        self,
        task_loss: Tensor,
        inputs: Tensors,
        target: Any,
        annotations: Tensors | None = None,
        *,
        additional_forward_args: object = None,
    ) -> None:
        """Choose an automatic weight from the first batch of the training: ``ratio * task_loss / penalty``, once.

        An evaluation, in eval mode or under `torch.no_grad`, chooses nothing. Over several processes task loss and
        penalty are means over all of them. A penalty of nearly 0 (a batch without annotations, a model that is linear
        before it is trained) or a task loss of 0 leaves the weight to the next batch, and the term is 0 for this one.

        Raises:
            NonFiniteError: the task loss or the penalty is NaN or infinite.
            ValueError: the task loss is negative, so that there is no share of it.
        """
        if not self.needs_calibration or not self._in_training:
            return
        batch = self._read(inputs, target, annotations, additional_forward_args)
        with no_graph(), self.held_in_eval_mode():
            penalty_now = self.penalty(batch)
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
            if task < _NEARLY_ZERO and not is_raw(self.outputs):  # a regression may have small units
                warn(
                    f"The task loss is {task:.1e}, as that of a model that is already trained, so weight='auto' gives "
                    f"{type(self).__name__} the weight {self.ratio * task / penalty:.1e}, which may change nothing. "
                    "Pass a number as weight."
                )
        else:
            self._waits = True

    @property
    def _in_training(self) -> bool:
        return self.training and torch.is_grad_enabled()


class AttributionPenalty(Penalty):
    """A penalty on an explainer's attribution, which therefore comes first and brings the explained function along."""

    def __init__(self, term: str, explainer: Attribution, **arguments: Any) -> None:
        super().__init__(term, require_attribution(explainer).forward_func, explainer=explainer, **arguments)

    @property
    def needs_second_derivative(self) -> bool:
        """True if the explainer takes gradients of the model."""
        return takes_gradients(self.explainer)
