"""The loss that training minimises, as one module: task loss plus regularizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from captum_idexpo._core.batch import Batch, Unpack, unpacked
from captum_idexpo._core.errors import InputTypeError, NonFiniteError, warn
from captum_idexpo._core.modes import belong_together
from captum_idexpo._core.rng import share_of_batch
from captum_idexpo.regularizers import Regularizer

_ROW = ("epoch", "loss", "valscore", "seconds_per_step")
"""Names beside the terms in a row of the history."""


class ExplanationRegularizedLoss(nn.Module):
    """Task loss and regularizers of one batch, in one forward pass: the module that DDP wraps.

    Args:
        model: called with the batch's inputs, then its additional arguments (a tuple of inputs is spread over
            positional arguments, a mapping over keyword arguments).
        regularizers: a `captum_idexpo.regularizers.Regularizer` each, or any module that is called as
            ``regularizer(inputs, target, annotations)`` and returns weighted terms by name. Where the batch has
            additional arguments, it also gets ``additional_forward_args=``.
        loss_fn: (model output, target) -> scalar.
        unpack: a function that returns the `captum_idexpo.Batch` of what the loader yields. None: the loader yields
            (inputs, target), (inputs, target, annotations), a `Batch`, or a mapping with the names of its fields.

    Attributes:
        regularizer_factor: factor on all terms of the regularizers.
        seconds: seconds of the last call by name: "task", "explainer", "metric".

    Raises:
        TypeError: a regularizer that is no module.
        ValueError: a regularizer of another model.

    Example:
        >>> import torch
        >>> from captum_idexpo import ExplanationRegularizedLoss
        >>> from captum_idexpo.attr import LayerGradCam
        >>> from captum_idexpo.regularizers import InsertionDeletion
        >>> conv = torch.nn.Conv2d(1, 4, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3))
        >>> loss = ExplanationRegularizedLoss(model, [InsertionDeletion(LayerGradCam(model, conv), baselines=0.0)])
        >>> total, parts = loss((torch.randn(2, 1, 8, 8), torch.tensor([0, 2])))
        >>> list(parts)
        ['task', 'insertion', 'deletion']
        >>> total.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        regularizers: Iterable[nn.Module] = (),
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
        *,
        unpack: Unpack | None = None,
    ) -> None:
        super().__init__()
        if isinstance(regularizers, nn.Module) and not isinstance(regularizers, nn.ModuleList):
            raise TypeError(f"regularizers must be a sequence of modules: write [{type(regularizers).__name__}(...)].")
        regularizers = list(regularizers)
        for regularizer in regularizers:
            if not isinstance(regularizer, nn.Module):
                raise TypeError(f"Each regularizer must be a torch.nn.Module, given: {type(regularizer).__name__}.")
        if loss_fn is cross_entropy and any(getattr(r, "outputs", None) == "multilabel" for r in regularizers):
            warn(
                "outputs='multilabel' announces a sigmoid for each label, but the loss is cross_entropy, under which "
                "the labels compete: pass loss_fn=torch.nn.BCEWithLogitsLoss().",
            )
        for regularizer in regularizers:
            check_is_of_model(regularizer, model)
        self.model = model
        self.regularizers = nn.ModuleList(regularizers)
        self.loss_fn = loss_fn
        self.unpack = unpack
        self.regularizer_factor = 1.0
        self.seconds: dict[str, float] = {}

    @property
    def known_regularizers(self) -> list[Regularizer]:
        """Those of the regularizers that are a `Regularizer`, and so have more to tell than their terms."""
        return [regularizer for regularizer in self.regularizers if isinstance(regularizer, Regularizer)]

    def forward(self, batch: object) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, in a form that `unpack` names.

        Returns:
            The scalar loss, and its parts by name, detached: "task", then the terms of each regularizer. A name that
            is already used gets a number ("insertion_2").

        Raises:
            TypeError: a batch of another form.
            ValueError: an empty batch, a task loss that is no scalar, or cross-entropy of a single column.
        """
        terms = self.terms(batch)
        loss = torch.stack([term.to(terms["task"].dtype) for term in terms.values()]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def terms(self, batch: object) -> dict[str, Tensor]:
        """Return the loss's parts by name, with their graphs; errors as for `forward`."""
        read = unpacked(batch, self.unpack)
        target = read.target
        if isinstance(target, Tensor) and not target.numel():
            raise ValueError("The batch is empty: there is no loss of it. Drop it, or give the loader another sampler.")
        started = time.perf_counter()
        output = call_model(self.model, read)
        refuse_cross_entropy_of_one_column(self.loss_fn, output)
        task = self.loss_fn(output, target)
        if task.dim():
            raise ValueError(f"loss_fn must return a scalar, given: shape {tuple(task.shape)}; use reduction='mean'.")
        terms, self.seconds = {"task": task}, {"task": time.perf_counter() - started}
        with share_of_batch():
            for regularizer in self.regularizers:
                started = time.perf_counter()
                for name, term in _regularize(regularizer, read, task).items():
                    terms[unused(name, (*terms, *_ROW))] = (
                        term if self.regularizer_factor == 1 else self.regularizer_factor * term
                    )
                self._time(regularizer, time.perf_counter() - started)
        return terms

    def _time(self, regularizer: nn.Module, seconds: float) -> None:
        """Split a regularizer's time into that of its explainer and the rest."""
        explainer = regularizer.explainer_seconds if isinstance(regularizer, Regularizer) else 0.0
        for name, part in (("explainer", explainer), ("metric", seconds - explainer)):
            self.seconds[name] = self.seconds.get(name, 0.0) + part


def check_is_of_model(regularizer: nn.Module, model: nn.Module) -> None:
    """Raise ValueError if a regularizer explains another model, such as a copy: they share no parameter."""
    explained = regularizer.models if isinstance(regularizer, Regularizer) else []
    if not belong_together(explained, model):
        name = type(regularizer).__name__
        raise ValueError(
            f"{name} explains another {type(explained[0]).__name__} than the one that is trained: they share no "
            f"parameter. Make its explainer, and {name}, from the model that you train. A copy needs its own."
        )


def call_model(model: Callable[..., Any], batch: Batch) -> Any:
    """Return the model's output for the inputs and additional arguments of a batch.

    Raises:
        InputTypeError: a mapping of inputs beside additional arguments.
    """
    # The model may write into its inputs, which the regularizers need unchanged.
    if isinstance(batch.inputs, Mapping):
        if batch.additional_forward_args is not None:
            raise InputTypeError(
                "The inputs are a mapping, for keyword arguments, and additional_forward_args are for positional ones: "
                "give tensors as inputs, and wrap the model in captum_idexpo.KeywordModel."
            )
        return model(**{name: _copied(value) for name, value in batch.inputs.items()})
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    side = batch.additional_forward_args
    side = () if side is None else side if isinstance(side, tuple) else (side,)
    return model(*map(_copied, (*inputs, *side)))


def refuse_cross_entropy_of_one_column(loss_fn: Callable[..., Any], output: object) -> None:
    """Raise ValueError for such a loss, which is 0 whatever the model returns."""
    is_cross_entropy = loss_fn is cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)
    if is_cross_entropy and isinstance(output, Tensor) and output.dim() > 1 and output.shape[1] == 1:
        raise ValueError(
            f"The loss is cross_entropy, which is always 0 for outputs of one column, given: {tuple(output.shape)}. "
            "Pass loss_fn=torch.nn.BCEWithLogitsLoss() and float targets of that shape for two classes, or the loss of "
            "your regression."
        )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _regularize(regularizer: nn.Module, batch: Batch, task: Tensor) -> dict[str, Tensor]:
    """Return a regularizer's terms; an error about NaN names the term in which it arose."""
    inputs, target, annotations, side = batch
    more = {} if side is None else {"additional_forward_args": side}
    try:
        if isinstance(regularizer, Regularizer):
            regularizer.calibrate(task, inputs, target, annotations, **more)
        terms = regularizer(inputs, target, annotations, **more)
    except NonFiniteError as error:
        term = type(regularizer).__name__ if bool(task.isfinite()) else "task"
        raise NonFiniteError(f"The loss term {term!r} is not finite: {error}") from error
    _check_terms(regularizer, terms)
    return dict(terms)


def _check_terms(regularizer: nn.Module, terms: object) -> None:
    if not isinstance(terms, Mapping):
        given, wanted = type(terms).__name__, "a mapping of terms by name, such as {'name': weight * penalty}"
    else:
        odd = {name: term for name, term in terms.items() if not isinstance(term, Tensor) or term.dim()}
        if not odd:
            return
        name, term = next(iter(odd.items()))
        shape = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
        given, wanted = f"{shape} as {name!r}", "scalar tensors, means over the batch"
    raise TypeError(f"{type(regularizer).__name__} must return {wanted}; it returned: {given}.")


def unused(name: str, taken: Iterable[str]) -> str:
    """Return the name, with a number from 2 on if it is taken."""
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
