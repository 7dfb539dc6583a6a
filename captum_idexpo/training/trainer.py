"""A trainer that adds explanation regularizers to an ordinary optimizer loop, on Hugging Face accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from captum_idexpo._errors import NonFiniteError
from captum_idexpo._modes import eval_mode, training_mode
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training.evaluation import evaluate
from captum_idexpo.training.history import History
from captum_idexpo.training.loss import ExplanationRegularizedLoss, call_model, unpack_batch
from captum_idexpo.training.processes import failing_together

if TYPE_CHECKING:
    from accelerate import Accelerator


class ExplanationRegularizedTrainer:
    """Fine-tunes a model so that its explanations become faithful, and selects it by accuracy and faithfulness.

    Args:
        model: a classifier or regressor with at least one parameter that requires gradient.
        optimizer: any torch optimizer of the model's parameters.
        regularizers: such as `captum_idexpo.regularizers.InsertionDeletion`; none trains plainly.
        loss_fn: (model output, target) -> scalar, the task loss.
        scheduler: a torch learning-rate scheduler, stepped after each epoch (`ReduceLROnPlateau` with the mean loss).
        accelerator: a Hugging Face ``Accelerator``; None makes one, which uses a GPU where there is one.
        evaluation: the `InsertionDeletion` whose explainer and settings judge the model (hard scores); None: the first
            one among the regularizers. Without any, only loss and accuracy are measured.
        freeze_batch_norm: keep BatchNorm's statistics while training. Explaining and masking leave them alone anyway.
        accuracy_weight: eta of the validation score, eq. (15) of ID-ExpO (arXiv 2310.12553):
            eta x accuracy + insertion + 1 - deletion.
        patience: stop after this many epochs without a better validation score.
        show_progress: show a progress bar an epoch, with the loss's parts.

    Raises:
        ImportError: accelerate or tqdm is not installed (extra ``train``).
        ValueError: all parameters of the model are frozen, or none of them belongs to the optimizer.

    Example:
        >>> import torch
        >>> from captum_idexpo import ExplanationRegularizedTrainer
        >>> from captum_idexpo.attr import LayerGradCam
        >>> from captum_idexpo.regularizers import InsertionDeletion
        >>> conv = torch.nn.Conv2d(1, 4, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3))
        >>> trainer = ExplanationRegularizedTrainer(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.01),
        ...     [InsertionDeletion(LayerGradCam(model, conv), baselines=0.0, steps_per_update=4)],
        ...     show_progress=False,
        ... )
        >>> data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> history = trainer.fit(loader, val_loader=loader, epochs=2)
        >>> [sorted(row)[:4] for row in history]
        [['deletion', 'epoch', 'insertion', 'loss'], ['deletion', 'epoch', 'insertion', 'loss']]
        >>> sorted(trainer.evaluate(loader))
        ['accuracy', 'deletion', 'insertion', 'loss', 'one_minus_deletion', 'valscore']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        regularizers: Iterable[nn.Module] = (),
        loss_fn: Callable[[Any, Any], Tensor] = cross_entropy,
        *,
        scheduler: Any = None,
        accelerator: Accelerator | None = None,
        evaluation: InsertionDeletion | None = None,
        freeze_batch_norm: bool = True,
        accuracy_weight: float = 2.0,
        patience: int = 10,
        show_progress: bool = True,
    ) -> None:
        _check_trainable(model, optimizer)
        if patience < 1:
            raise ValueError(f"patience must be at least 1 epoch, given: {patience}.")
        loss = ExplanationRegularizedLoss(model, regularizers, loss_fn)
        self.model = model
        self.accelerator = _accelerator() if accelerator is None else accelerator
        self._loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.scheduler = scheduler
        self.loss_fn = loss_fn
        judges = [regularizer for regularizer in loss.regularizers if isinstance(regularizer, InsertionDeletion)]
        self.evaluation = evaluation if evaluation is not None else next(iter(judges), None)
        self.freeze_batch_norm = freeze_batch_norm
        self.accuracy_weight = accuracy_weight
        self.patience = patience
        self.show_progress = show_progress
        self.history = History()
        self._prepared: dict[int, tuple[Any, Any]] = {}

    def fit(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None, epochs: int = 1) -> History:
        """Trains, and keeps the weights of the epoch with the best validation score.

        Args:
            train_loader: yields (inputs, target) or (inputs, target, annotations); inputs are a tensor, a tuple or,
                where no regularizer explains them, a mapping.
            val_loader: yields (inputs, target), for selection and early stopping; None: the last weights are kept.
            epochs: passes over the training data at most.

        Returns:
            A row an epoch: "epoch", "loss" and its parts by name; with a val_loader also the scores of `evaluate`,
            their names prefixed with "val" ("val_accuracy"), and "valscore". A weight that is "auto" is reported as
            "<term>_weight".

        Raises:
            NonFiniteError: the loss turned NaN or infinite; the message names the term, the epoch and the step. The
                model is left with the last weights whose task loss is finite on the last batch before. Or a validation
                score did; then with the best weights so far. `history` holds the epochs before.
            TypeError, ValueError: a loader that yields something else, or nothing.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, given: {epochs}.")
        train_loader, val_loader = self._prepare(train_loader), self._prepare(val_loader)
        self.optimizer.zero_grad()
        history = self.history = History()
        best_score, best_epoch, best_weights = -math.inf, 0, None
        for epoch in range(1, epochs + 1):
            row: dict[str, float] = {"epoch": epoch, **self._train_epoch(train_loader, epoch, epochs)}
            row.update(self._automatic_weights())
            history.append(row)
            self._step_scheduler(row["loss"])
            if val_loader is None:
                continue
            scores = self._evaluate(val_loader, "predicted")
            for name, value in scores.items():
                if not math.isfinite(value):
                    if best_weights is not None:
                        self.model.load_state_dict(best_weights)
                    raise NonFiniteError(f"The validation score {name!r} turned {value} in epoch {epoch}.")
            row.update({name if name == "valscore" else f"val_{name}": value for name, value in scores.items()})
            if row["valscore"] > best_score:
                best_score, best_epoch, best_weights = row["valscore"], epoch, _copied(self.model.state_dict())
            elif epoch - best_epoch >= self.patience:
                break
        if best_weights is not None:
            self.model.load_state_dict(best_weights)
        return history

    def evaluate(
        self, loader: Iterable[Any], *, explain: Literal["predicted", "label"] = "predicted"
    ) -> dict[str, float]:
        """Means over a loader's examples, measured in eval mode, with the same random masks at every call.

        Args:
            loader: yields (inputs, target).
            explain: which class is explained and scored, the predicted one or the label.

        Returns:
            "loss" (the task's), "accuracy", "insertion", "deletion", "one_minus_deletion" and "valscore" (eq. 15).
            Without an `InsertionDeletion` to judge, only loss, accuracy and valscore; for raw outputs (regression)
            neither accuracy nor one_minus_deletion, and the valscore is insertion - deletion - accuracy_weight x loss.
        """
        return self._evaluate(self._prepare(loader), explain)

    def _automatic_weights(self) -> dict[str, float]:
        """The weights that regularizers set themselves, "<term>_weight"."""
        regularizers = self.accelerator.unwrap_model(self._loss).regularizers
        automatic = [regularizer for regularizer in regularizers if getattr(regularizer, "is_automatic", False)]
        return {f"{regularizer.term}_weight": regularizer.weight for regularizer in automatic}

    def _evaluate(self, loader: Any, explain: Literal["predicted", "label"]) -> dict[str, float]:
        return evaluate(
            self.model,
            loader,
            self.loss_fn,
            self.evaluation,
            accuracy_weight=self.accuracy_weight,
            explain=explain,
            accelerator=self.accelerator,
        )

    def _train_epoch(self, loader: Any, epoch: int, epochs: int) -> dict[str, float]:
        """One pass over the data; means of the loss and its parts."""
        from tqdm.auto import tqdm

        weights, last_batch = _Weights(self.model), None
        totals: dict[str, float] = {}
        n_steps = 0
        hidden = not (self.show_progress and self.accelerator.is_local_main_process)
        with tqdm(loader, desc=f"epoch {epoch}/{epochs}", disable=hidden) as bar, self._training_mode():
            for step, batch in enumerate(bar, start=1):
                where = f"epoch {epoch}, step {step}"
                try:
                    parts = self._step(batch, where, weights)
                except NonFiniteError as error:
                    self._return_to_good(weights, last_batch)
                    where = "" if where in str(error) else f" ({where})"
                    raise NonFiniteError(f"{error}{where} The model is left with its last good weights.") from error
                last_batch = batch
                totals = {name: totals.get(name, 0.0) + value for name, value in parts.items()}
                n_steps += 1
                bar.set_postfix({name: f"{value:.4g}" for name, value in parts.items()})
        if not n_steps:
            raise ValueError(
                f"The training loader yielded no batch in epoch {epoch}: give a DataLoader or a list of batches (an "
                "iterator is empty after one pass)."
            )
        self.optimizer.zero_grad()
        if not self._task_loss_is_finite(last_batch):
            weights.restore()
            raise NonFiniteError(
                f"After the last step of epoch {epoch} the loss is NaN or infinite: lower the learning rate. The model "
                "is left with the weights before that step."
            )
        return {name: total / n_steps for name, total in totals.items()}

    def _step(self, batch: Any, where: str, weights: _Weights) -> dict[str, float]:
        """One update; the loss and its parts, means over processes."""
        from accelerate.utils import send_to_device

        batch = send_to_device(batch, self.accelerator.device)
        with self.accelerator.accumulate(self._loss):
            with failing_together(self.accelerator):
                loss, parts = self._loss(batch)
            values = self.accelerator.reduce(torch.stack([loss.detach(), *parts.values()]), reduction="mean").tolist()
            named = dict(zip(["loss", *parts], values, strict=True))
            for name in [*parts, "loss"]:
                if not math.isfinite(named[name]):
                    raise NonFiniteError(f"The loss term {name!r} turned {named[name]} in {where}.")
            self.accelerator.backward(loss)
            if self.accelerator.scaler is None:
                with failing_together(self.accelerator):
                    _check_gradients(self.model, where)
            weights.keep()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return named

    def _return_to_good(self, weights: _Weights, last_batch: Any) -> None:
        """Undoes what a failed step did: its statistics, and the last update if that is what made it fail."""
        weights.restore_buffers()
        if last_batch is None or not self._task_loss_is_finite(last_batch):
            weights.restore()

    @torch.no_grad()
    def _task_loss_is_finite(self, batch: Any) -> bool:
        """Whether the current weights are good for a finite task loss on a batch, in every process."""
        from accelerate.utils import send_to_device

        with eval_mode(self.model):
            inputs, target, _ = unpack_batch(send_to_device(batch, self.accelerator.device))
            finite = self.loss_fn(call_model(self.model, inputs), target).isfinite().all()
        return bool(self.accelerator.reduce(finite.float(), reduction="mean") == 1)

    def _training_mode(self) -> Any:
        return training_mode(self._loss, freeze_batch_norm=self.freeze_batch_norm)

    def _step_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _prepare(self, loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            return loader
        if id(loader) not in self._prepared:  # the accelerator keeps every loader that it has prepared
            self._prepared[id(loader)] = (loader, self.accelerator.prepare_data_loader(loader))
        return self._prepared[id(loader)][1]


class _Weights:
    """A copy of a model's parameters and buffers that can be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters, self._buffers = list(model.parameters()), list(model.buffers())
        self._parameter_copies = [parameter.detach().clone() for parameter in self._parameters]
        self._buffer_copies = [buffer.detach().clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Copies them as they are now."""
        self._copy(self._parameters, self._parameter_copies)
        self._copy(self._buffers, self._buffer_copies)

    def restore(self) -> None:
        """Puts the copies back."""
        self._copy(self._parameter_copies, self._parameters)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Puts the buffers' copies back."""
        self._copy(self._buffer_copies, self._buffers)

    @staticmethod
    @torch.no_grad()
    def _copy(sources: list[Any], destinations: list[Any]) -> None:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)


def _check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "All parameters of the model are frozen, so there is nothing to train: unfreeze some with "
            "`parameter.requires_grad_(True)`."
        )
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not trainable & owned:
        raise ValueError(
            "The optimizer owns none of the model's trainable parameters: make it from this model, as in "
            "torch.optim.SGD(model.parameters(), lr=0.01)."
        )


def _check_gradients(model: nn.Module, where: str) -> None:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients.values()]
    finite = [value.isfinite().all() for value in values]
    if finite and not bool(torch.stack(finite).all()):
        name = list(gradients)[[bool(check) for check in finite].index(False)]
        raise NonFiniteError(f"The gradient of the loss in {name!r} turned NaN or infinite in {where}.")


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _accelerator() -> Accelerator:
    try:
        import tqdm  # noqa: F401
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "ExplanationRegularizedTrainer needs accelerate and tqdm: `pip install 'captum-idexpo[train]'`."
        ) from error
    return Accelerator()
