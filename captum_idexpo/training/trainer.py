"""A trainer that adds explanation regularizers to an ordinary optimizer loop, on Hugging Face accelerate."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError
from torch.utils.data import DataLoader

from captum_idexpo._core.batch import Batch, Unpack, unpacked
from captum_idexpo._core.compiled import can_run_eagerly, eagerly, has_compiled_parts
from captum_idexpo._core.errors import NonFiniteError, warn
from captum_idexpo._core.inputs import check_count, check_optional_count
from captum_idexpo._core.modes import Snapshot, has_new_statistics, is_batch_norm, no_graph, training_mode
from captum_idexpo._core.rng import AnyGenerator
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.regularizers.base import Regularizer
from captum_idexpo.training import checkpoint
from captum_idexpo.training.accuracy_floor import CHANGE, ERROR, Classified, check_max_drop, is_eligible, paired_change
from captum_idexpo.training.evaluation import classify, evaluate, example_scores
from captum_idexpo.training.fsdp import (
    check_sharding,
    gathered,
    is_sharded,
    load_optimizer_state,
    load_weights,
    local,
    optimizer_state_of,
    prepare,
    weights_of,
)
from captum_idexpo.training.history import History
from captum_idexpo.training.loaders import failing_together, is_its_own, start_workers
from captum_idexpo.training.loss import ExplanationRegularizedLoss, call_model, check_is_of_model, unused
from captum_idexpo.training.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

Callback = Callable[["ExplanationRegularizedTrainer", dict[str, float]], None]
_DWARFS = 10  # times the task's gradient
# A first epoch is bad whose mean task loss exceeds the loss at the start so many times, and by this much. The second is
# for models that fit their data nearly perfectly, whose loss may rise a hundredfold without harm.
_FAR_ABOVE, _HARMLESS = 3, 0.1
_FROZEN = " With a learning rate that has to stay large, pass freeze_batch_norm=False."


class ExplanationRegularizedTrainer:
    """Trains a model with explanation regularizers, and selects it by accuracy and faithfulness.

    Args:
        model: a classifier or regressor with at least one parameter that requires gradient.
        optimizer: a torch optimizer of the model's parameters whose step needs no closure (unlike that of LBFGS).
        regularizers: such as `captum_idexpo.regularizers.InsertionDeletion`. Without any, only the task is trained.
        loss_fn: (model output, target) -> scalar, the task loss.
        unpack: a function that returns the `captum_idexpo.Batch` of what a loader yields; see
            `ExplanationRegularizedLoss`.
        scheduler: a torch learning-rate scheduler. The history shows "learning_rate", that of the first group of
            parameters, as mean over the batches of the epoch.
        scheduler_interval: "epoch" steps the scheduler after each epoch (`ReduceLROnPlateau` with the mean loss).
            "update" steps it after each update. A scheduler whose length is a number of updates needs "update".
        accelerator: a Hugging Face ``Accelerator``. None makes one, which uses a GPU if there is one.
            `gradient_accumulation_steps` of the accelerator is read once, here.
        evaluation: the `InsertionDeletion` whose explainer and settings judge the model (hard scores); None: the first
            one among the regularizers. Without any, only loss and accuracy are measured.
        freeze_batch_norm: train the task with BatchNorm's running statistics, and keep them. Regularizers in eval mode
            explain with the running statistics, so that both see the same function. Pass False to train from random
            weights, or with large updates: a frozen layer passes on each shift that the layers before it make.
        accuracy_weight: eta of the validation score, eq. (15) of ID-ExpO (arXiv 2310.12553):
            eta x accuracy + insertion + 1 - deletion.
        max_accuracy_drop: how much accuracy the training may cost, as a share of the validation examples (0.01 is one
            point). The change of accuracy from the start is computed example by example. An epoch can be kept if this
            change plus one standard error is at least minus this. With 60 validation examples the error can be 5
            points, so a loss of 6 points can pass. If there is no such epoch, the model keeps its starting weights,
            with a warning. None: no limit; the validation score alone may trade several points of accuracy for
            faithfulness.
        patience: stop after this many epochs without a better validation score.
        max_grad_norm: clip the gradient to this norm before each update.
        weight_schedule: (number of updates so far) -> a factor on the terms of all regularizers, such as
            `linear_warmup(500)`.
        gradient_norms_every: measure the gradient norm of each term once in this many updates, and warn if one is more
            than ten times that of the task. Each of several processes measures its share of the batch. A measurement
            costs another forward and backward pass.
        checkpoint_dir: where checkpoints are written, the last two kept; see `resume`. Resuming from an older
            checkpoint deletes the newer ones.
        checkpoint_every: also write a checkpoint each time this many updates are done, and not only after each epoch.
        averaged_model: weights averaged over time, ``torch.optim.swa_utils.AveragedModel(model, ...)``. It is updated
            after each update. `fit` evaluates and selects the averaged weights. After `fit` the model has these
            weights, and a further `fit` starts from them. In a callback `evaluate` judges the model's own weights. An
            average with ``use_buffers=False`` has the model's own BatchNorm statistics.
        callbacks: called after each epoch with the trainer and the row of the history.
        update_callbacks: called after each update, before the average and the scheduler follow, with the trainer and a
            row of that update: "epoch", "update" (their number so far), "loss" and its parts for the last batch, and
            seconds.
        generators: random generators that the data set, the model or the loss draw from, of torch, NumPy or Python.
            Checkpoints restore them, as they do the global streams and the generators of loaders, samplers and
            regularizers, which the trainer finds itself.
        show_progress: show a progress bar per epoch, with the parts of the loss.

    Trackers of the accelerator (``Accelerator(log_with="tensorboard", project_dir=...)`` after its ``init_trackers``)
    get each row of the history.

    Raises:
        ImportError: accelerate or tqdm is not installed (extra ``train``).
        ValueError: all parameters of the model are frozen, or none of them belongs to the optimizer; the optimizer is
            LBFGS; a regularizer or `evaluation` explains another model, or needs the second derivative of a compiled
            one; the model is sharded in a way that cannot be trained (FSDP1, layers only, with statistics of its own in
            each process); `averaged_model` belongs to another model; `scheduler_interval` is "update" for
            ReduceLROnPlateau; an argument is out of range.
        TypeError: a generator of an unknown kind; `averaged_model` is no AveragedModel.

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
        ...     [InsertionDeletion(LayerGradCam(model, conv), baselines=0.0)],
        ...     show_progress=False,
        ... )
        >>> data = torch.utils.data.TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(3, (16,)))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8)
        >>> history = trainer.fit(loader, val_loader=loader, epochs=2)
        >>> [name for name in history[0] if "seconds" not in name][:5]
        ['epoch', 'loss', 'task', 'insertion', 'deletion']
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
        unpack: Unpack | None = None,
        scheduler: Any = None,
        scheduler_interval: Literal["epoch", "update"] = "epoch",
        accelerator: Accelerator | None = None,
        evaluation: InsertionDeletion | None = None,
        freeze_batch_norm: bool = True,
        accuracy_weight: float = 2.0,
        max_accuracy_drop: float | None = None,
        patience: int = 10,
        max_grad_norm: float | None = None,
        weight_schedule: Callable[[int], float] | None = None,
        gradient_norms_every: int | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        averaged_model: AveragedModel | None = None,
        callbacks: Iterable[Callback] = (),
        update_callbacks: Iterable[Callback] = (),
        generators: Iterable[AnyGenerator] = (),
        show_progress: bool = True,
    ) -> None:
        _check_trainable(model, optimizer)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, given: {max_grad_norm}.")
        loss = ExplanationRegularizedLoss(model, regularizers, loss_fn, unpack=unpack)
        _check_compiled(loss.regularizers, model)
        if evaluation is not None:
            check_is_of_model(evaluation, model)
        self.model = model
        self.accelerator = _accelerator() if accelerator is None else accelerator
        self._unwrapped = loss
        self._loss, self.optimizer = prepare(self.accelerator, loss, optimizer)
        check_sharding(model, freeze_batch_norm=freeze_batch_norm)
        self.scheduler = scheduler
        self.scheduler_interval = _checked_interval(scheduler_interval, scheduler)
        self.loss_fn = loss_fn
        self.unpack = unpack
        judges = [regularizer for regularizer in loss.regularizers if isinstance(regularizer, InsertionDeletion)]
        self.evaluation = evaluation if evaluation is not None else next(iter(judges), None)
        self._judges = judges if evaluation is None else [*judges, evaluation]
        self.freeze_batch_norm = freeze_batch_norm
        self.accuracy_weight = accuracy_weight
        self.max_accuracy_drop = check_max_drop(max_accuracy_drop)
        self.patience = check_count("patience", patience)
        self.max_grad_norm = max_grad_norm
        self.weight_schedule = weight_schedule
        self.gradient_norms_every = check_optional_count("gradient_norms_every", gradient_norms_every)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_every = check_optional_count("checkpoint_every", checkpoint_every)
        self.averaged_model = _checked_average(averaged_model, model, self.accelerator.device)
        self.callbacks = list(callbacks)
        self.update_callbacks = list(update_callbacks)
        self.generators = checkpoint.checked_generators(generators)
        self.show_progress = show_progress
        self.history = History()
        self._n_passes = self.accelerator.gradient_accumulation_steps
        self._average_before: dict[str, Any] | None = None
        self._prepared: dict[int, tuple[Any, Any]] = {}
        self._resumed: dict[str, Any] | None = None
        self._start_weights: dict[str, Any] | None = None

    def fit(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None, epochs: int = 1) -> History:
        """Train, and keep the weights of the epoch with the best validation score.

        Args:
            train_loader: yields (inputs, target), (inputs, target, annotations) or whatever `unpack` takes; inputs are
                a tensor, a tuple or, where no regularizer explains them, a mapping.
            val_loader: yields the same, for selection and early stopping; None: the last weights are kept.
            epochs: the largest number of passes over the training data. After `resume` it includes the passes before.

        Returns:
            One row per epoch: "epoch", "loss" and its parts by name, "seconds_per_step", and the seconds of these spent
            on the task, the explainers, the metrics and the backward pass; the rest are the optimizer and checks. With
            a val_loader also the scores of `evaluate` with the prefix "val" ("val_accuracy"), and "valscore"; with
            `max_accuracy_drop` "val_accuracy_change", its standard error, and "eligible", 1 or 0. Automatic weights are
            "<term>_weight", gradient norms "<term>_gradient_norm". "learning_rate" is there with a scheduler, and
            "deletion_floor_share" is the share of masked copies at the deletion floor.

        Raises:
            NonFiniteError: the loss turned NaN or infinite. The message names the term, the epoch and the step. The
                model then has the last weights whose task loss was finite on the batch before, and `averaged_model` has
                their average. If a validation score turned NaN, the model has the best weights so far. `history` holds
                the epochs before.
            TypeError, ValueError: a loader that yields something else, or nothing.
            CheckpointError: a checkpoint could not be written. The one before is untouched.
        """
        check_count("epochs", epochs)
        if self.max_accuracy_drop is not None and val_loader is None:
            raise ValueError("max_accuracy_drop compares accuracies on validation data: pass fit(..., val_loader).")
        self._warn_of_new_statistics()
        for regularizer in (*self._unwrapped.known_regularizers, *self._judges):
            regularizer.prepare(self._unpacked(train_loader))
        train_loader = self._prepare(train_loader)
        val_loader = None if val_loader is None else self._prepare(val_loader)
        # Every accelerator of a process shares this number: one that was made since may have changed it.
        self.accelerator.gradient_accumulation_steps = self._n_passes
        self._drop_gradients()
        run = self._start(train_loader, val_loader)
        if self.max_accuracy_drop is not None and val_loader is not None and run.start is None:
            run.start, run.start_weights = self._classify(val_loader), weights_of(self.model)
            paired_change(run.start, self._classify(val_loader))  # now rather than after an epoch: is the order fixed?
            run.best_weights = run.start_weights
        self._start_weights = run.start_weights
        while run.epoch <= epochs and not run.finished:
            row: dict[str, float] = {"epoch": run.epoch, **self._train_epoch(train_loader, run, epochs)}
            row.update(self._automatic_weights())
            run.history.append(row)
            if run.epoch == 1:
                self._warn_of_a_bad_start(run.start_loss, row["task"])
            if self.scheduler_interval == "epoch":
                self._step_scheduler(row["loss"])
            if val_loader is not None:
                with self._averaged_weights():
                    scores = self._evaluate(val_loader, start=run.start)
                self._select(run, row, scores)
            self.accelerator.log(row, step=run.epoch)
            for callback in self.callbacks:
                callback(self, row)
            run.next_epoch()
            self._save(run)
        if run.start is not None and not run.best_epoch:
            self._warn_of_lost_accuracy(run)
        if run.best_weights is not None:
            load_weights(self.model, run.best_weights)
        elif self.averaged_model is not None:
            load_weights(self.model, self._weights_to_judge())
        return run.history

    def resume(self, path: str | Path | None = None) -> None:
        """Let the next `fit` continue where a killed run stopped, with the same model, optimizer and loaders.

        Everything is put back: weights, optimizer, scheduler, automatic weights, all random streams, the position in
        the epoch, the best weights and the history. On a CPU the result is that of a run that was never killed, bit for
        bit. The batches of the epoch that are already done are read again and skipped. So resuming in the middle of an
        epoch is exact if the random numbers of the data set come from worker processes that do not persist or from one
        of `generators`, and approximate if the data set draws from the global generator in this process.

        Args:
            path: a checkpoint file, or a folder whose latest good one is taken; None: `checkpoint_dir`.

        Raises:
            CheckpointError: there is no good checkpoint; or it belongs to another model, optimizer, scheduler or set of
                regularizers, which are then left unchanged; or checkpoint_dir holds the checkpoints of another run.
            ValueError: neither a path nor a checkpoint_dir.
        """
        folder = self.checkpoint_dir if path is None else Path(path)
        if folder is None:
            raise ValueError("resume() needs a path, or a trainer with a checkpoint_dir.")
        state, found = checkpoint.load_latest(folder)
        if len(state["random"]) != self.accelerator.num_processes:
            raise checkpoint.CheckpointError(
                f"{found} was written by {len(state['random'])} processes, these are {self.accelerator.num_processes}: "
                "continue with as many."
            )
        self._refuse_another_run(found, state["run"]["id"])
        before = Snapshot(self._unwrapped, parameters=True)
        average = None if self.averaged_model is None else weights_of(self.averaged_model)
        optimizer = copy.deepcopy(optimizer_state_of(self.model, self.optimizer))
        try:
            self._load(state)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            before.restore()
            if self.averaged_model is not None and average is not None:
                self.averaged_model.load_state_dict(average)
            load_optimizer_state(self.model, self.optimizer, optimizer)
            raise checkpoint.CheckpointError(
                f"{found} belongs to another model, optimizer, scheduler or set of regularizers: {error}"
            ) from error
        self._resumed = state

    def _kinds(self) -> dict[str, Any]:
        """Return the kinds of the parts that a checkpoint has to be put back into."""
        has_state = isinstance(self.loss_fn, nn.Module) and len(self.loss_fn.state_dict())
        return {
            "list of regularizers": [type(regularizer).__name__ for regularizer in self._unwrapped.regularizers],
            "number of judges": len(self._judges),
            "scheduler": self._kind_of_scheduler(),
            "max_accuracy_drop": self.max_accuracy_drop,
            "averaged_model": None if self.averaged_model is None else type(self.averaged_model).__name__,
            "loss_fn": type(self.loss_fn).__name__ if has_state else None,
        }

    def _kind_of_scheduler(self) -> str | None:
        if self.scheduler is None:
            return None
        return type(self.scheduler).__name__ + (" by the update" if self.scheduler_interval == "update" else "")

    def _refuse_another_run(self, found: Path, run_id: str) -> None:
        """Refuse a folder with the checkpoints of another run, which would be deleted."""
        folder = self.checkpoint_dir
        if folder is None or folder.resolve() == found.parent.resolve() or not checkpoint.checkpoints(folder):
            return
        try:
            there, _ = checkpoint.load_latest(folder)
        except checkpoint.CheckpointError:
            return  # none of them is good
        if there["run"]["id"] != run_id:
            raise checkpoint.CheckpointError(
                f"{folder} holds checkpoints of another run than {found}, which would be removed: choose another "
                "checkpoint_dir."
            )

    def _load(self, state: dict[str, Any]) -> None:
        """Put back what a checkpoint holds of the trainer; that of the run waits for `fit`."""
        for part, kinds in self._kinds().items():
            if state["kinds"].get(part) != kinds:
                raise ValueError(f"its {part} is {state['kinds'].get(part)}, this one's {kinds}.")
        load_weights(self.model, state["model"])
        if self.averaged_model is not None:
            self.averaged_model.load_state_dict(state["averaged_model"])
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.load_state_dict(state["loss_fn"])
        for regularizer, own in zip(self._unwrapped.regularizers, state["regularizers"], strict=True):
            regularizer.load_state_dict(own)
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for judge, baselines in zip(self._judges, state["measured_baselines"], strict=True):
            if judge.measures_baselines:
                judge.baselines = baselines

    def evaluate(
        self,
        loader: Iterable[Any],
        *,
        explain: Literal["predicted", "label"] = "predicted",
        masked_share: float | None = None,
    ) -> dict[str, float]:
        """Return mean scores over a loader's examples, in eval mode and with the same random masks at every call.

        Args:
            loader: yields (inputs, target).
            explain: which class is explained and scored: the "predicted" class or the "label".
            masked_share: also measure "masked_accuracy", with this share of the features masked at random, with the
                baselines and the feature mask of the judge; see `captum_idexpo.metrics.masked_accuracy`.

        Returns:
            "loss" (the task's), "accuracy", "insertion", "deletion", "one_minus_deletion" and "valscore" (eq. 15).
            Without an `InsertionDeletion` to judge there are only loss, accuracy and valscore. One with
            ``n_random_orders`` adds "insertion_gain" and "deletion_gain". For raw outputs (regression) there is no
            accuracy and no one_minus_deletion, and the valscore is insertion - deletion - accuracy_weight x loss.
            Targets other than 0 and 1 for a single column are those of a regression, too, and have no accuracy. With
            `max_accuracy_drop`, after `fit`, there is "accuracy_change", the change from the weights at the start,
            paired by example, and "accuracy_change_standard_error". If the loader has another order in each pass, these
            two are left out, with a warning.
        """
        loader = self._prepare(loader)
        return self._evaluate(loader, explain, masked_share, self._classified_at_start(loader))

    def example_scores(
        self,
        loader: Iterable[Any],
        *,
        explain: Literal["predicted", "label"] = "predicted",
        masked_share: float | None = None,
    ) -> dict[str, Tensor]:
        """Return the scores per example, in the order of the loader, as `evaluate` averages them.

        Args:
            loader: yields (inputs, target).
            explain: the "predicted" class or the "label".
            masked_share: also measure the accuracy with this share of the features masked.

        Returns:
            By name, tensors ``(N,)`` on the CPU: "accuracy" (0 or 1), "insertion", "deletion", "one_minus_deletion".
            Scores that cannot be measured are left out. Without a true label to explain, an example of
            ``outputs="multilabel"`` has NaN, and `evaluate` leaves it out of the mean.
        """
        with gathered(self.model):
            return example_scores(
                self.model,
                self._prepare(loader),
                self.evaluation,
                self._unwrapped.known_regularizers,
                explain=explain,
                masked_share=masked_share,
                unpack=self.unpack,
                accelerator=self.accelerator,
            )

    @property
    def regularizers(self) -> list[nn.Module]:
        """The regularizers that the model is trained with."""
        return list(self._unwrapped.regularizers)

    def _automatic_weights(self) -> dict[str, float]:
        """Return the weights that regularizers chose, "<term>_weight"; the second of a term is "<term>_weight_2"."""
        weights: dict[str, float] = {}
        for regularizer in self._unwrapped.known_regularizers:
            for term, weight in regularizer.automatic_weights.items():
                weights[unused(f"{term}_weight", weights)] = weight
        return weights

    def _start(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None) -> Run:
        """Return a new run, or the one that is resumed."""
        run = Run(self._generators_of(train_loader, val_loader), self.accelerator)
        if self._resumed is not None:
            if self._resumed["run"]["position"][0] > 1:
                start_workers(train_loader)
            run.load_state_dict(self._resumed["run"], self._resumed["random"])
            self._resumed = None
        elif self.checkpoint_dir is not None and checkpoint.checkpoints(self.checkpoint_dir):
            raise checkpoint.CheckpointError(
                f"{self.checkpoint_dir} holds checkpoints of another run: call resume() to continue it, or "
                "choose another checkpoint_dir."
            )
        if self.checkpoint_dir is not None:
            with failing_together(self.accelerator):
                checkpoint.make(self.checkpoint_dir)  # now, rather than after an epoch
        self.history = run.history
        return run

    def _generators_of(self, *loaders: object) -> list[AnyGenerator]:
        """Return the generators that a run draws from, each once, in an order that depends on the arguments alone."""
        regularizers = (*self._unwrapped.known_regularizers, *self._judges)
        of_regularizers = [generator for regularizer in regularizers for generator in regularizer.generators]
        every = [*checkpoint.generators_of(*loaders), *of_regularizers, *self.generators]
        return list({id(generator): generator for generator in every}.values())

    def _select(self, run: Run, row: dict[str, float], scores: dict[str, float]) -> None:
        """Add validation scores to a row, keep the best weights, and end the run when patience runs out."""
        for name, value in scores.items():
            if not math.isfinite(value):
                if run.best_weights is not None:
                    load_weights(self.model, run.best_weights)
                raise NonFiniteError(f"The validation score {name!r} turned {value} in epoch {run.epoch}.")
        row.update({name if name == "valscore" else f"val_{name}": value for name, value in scores.items()})
        if self.max_accuracy_drop is not None:
            row["eligible"] = float(is_eligible(scores[CHANGE], scores[ERROR], self.max_accuracy_drop))
        if row.get("eligible", True) and row["valscore"] > run.best_score:
            run.best_score, run.best_epoch = row["valscore"], run.epoch
            run.best_weights = self._weights_to_judge()
        elif run.epoch - run.best_epoch >= self.patience:
            run.finished = True

    def _checkpoint_is_due(self, run: Run) -> bool:
        """Return True between two updates; never between the batches that one update accumulates."""
        every = self.checkpoint_every
        return bool(every and run.updates and not run.updates % every and self.accelerator.sync_gradients)

    def _save(self, run: Run) -> None:
        """Write a checkpoint, if there is a folder for them; all processes wait for it."""
        if self.checkpoint_dir is None:
            return
        randoms, weights = run.random_states(), weights_of(self.model)
        optimizer = optimizer_state_of(self.model, self.optimizer)
        if self.accelerator.is_main_process:
            state = {
                "model": weights,
                "averaged_model": None if self.averaged_model is None else self.averaged_model.state_dict(),
                "optimizer": optimizer,
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "loss_fn": self.loss_fn.state_dict() if isinstance(self.loss_fn, nn.Module) else {},
                "regularizers": [regularizer.state_dict() for regularizer in self._unwrapped.regularizers],
                "kinds": self._kinds(),
                "measured_baselines": [j.baselines if j.measures_baselines else None for j in self._judges],
                "run": run.state_dict(),
                "random": randoms,
            }
            checkpoint.save(state, self.checkpoint_dir, run.updates)
        self.accelerator.wait_for_everyone()

    def _evaluate(
        self,
        loader: Iterable[Any],
        explain: Literal["predicted", "label"] = "predicted",
        masked_share: float | None = None,
        start: Classified | None = None,
    ) -> dict[str, float]:
        with gathered(self.model):
            return evaluate(
                self.model,
                loader,
                self.loss_fn,
                self.evaluation,
                self._unwrapped.known_regularizers,
                accuracy_weight=self.accuracy_weight,
                explain=explain,
                masked_share=masked_share,
                start=start,
                unpack=self.unpack,
                accelerator=self.accelerator,
            )

    def _classify(self, loader: Iterable[Any]) -> Classified:
        """Return which examples the model classifies right."""
        with gathered(self.model):
            regularizers = self._unwrapped.known_regularizers
            context = {"unpack": self.unpack, "accelerator": self.accelerator}
            return classify(self.model, loader, self.evaluation, regularizers, **context)

    def _classified_at_start(self, loader: Iterable[Any]) -> Classified | None:
        """Return which examples the model classified right before it was trained, if accuracy is limited."""
        if self._start_weights is None:
            return None
        with self._having(self._start_weights):
            start, again = self._classify(loader), self._classify(loader)
        if start.has_the_examples_of(again):
            return start
        warn("The loader yields its examples in another order in each pass: the change of accuracy is left out.")
        return None

    def _train_epoch(self, loader: Iterable[Any], run: Run, epochs: int) -> dict[str, float]:
        """Go over the data once, or over the rest of it, and return the means of the loss and its parts."""
        from tqdm.auto import tqdm

        weights, last_batch = Snapshot(self._unwrapped, parameters=True), None
        self._average_before = None  # there is no update to undo
        hidden = not (self.show_progress and self.accelerator.is_local_main_process)
        description = f"epoch {run.epoch}/{epochs}"
        with (
            closing(run.batches(loader)) as batches,
            tqdm(batches, desc=description, disable=hidden, initial=run.step) as bar,
        ):
            for batch, is_last in bar:
                where = f"epoch {run.epoch}, step {run.step + 1}"
                with self._training_mode():  # a loader may use the model between batches, in another mode
                    started = time.perf_counter()
                    try:
                        parts = self._step(batch, is_last, where, weights, run)
                    except NonFiniteError as error:
                        self._return_to_good(weights, last_batch, run)
                        where = "" if where in str(error) else f" ({where})"
                        raise NonFiniteError(f"{error}{where} The model is left with its last good weights.") from error
                parts["seconds_per_step"] = time.perf_counter() - started
                last_batch = batch
                run.add(parts)
                if self.accelerator.sync_gradients:
                    self._finish_update({"epoch": run.epoch, "update": run.updates, **parts})
                bar.set_postfix({name: f"{value:.4g}" for name, value in parts.items() if name in run.shown})
                if self._checkpoint_is_due(run):
                    self._save(run)
        if not run.step:
            raise ValueError(
                f"The training loader yielded no batch in epoch {run.epoch}: give a DataLoader or a list of batches "
                "(an iterator is empty after one pass)."
            )
        self._drop_gradients()
        with self._training_mode():
            finite = last_batch is None or self._task_loss_is_finite(last_batch, run)
        if not finite:
            self._undo_update(weights)
            raise NonFiniteError(
                f"After the last step of epoch {run.epoch} the loss is NaN or infinite: lower the learning rate. The "
                "model is left with the weights before that step."
            )
        return run.means()

    def _step(self, batch: Any, is_last: bool, where: str, weights: Snapshot, run: Run) -> dict[str, float]:
        """Train on one batch and return the loss and its parts, means over processes."""
        from accelerate.utils import send_to_device

        batch = send_to_device(unpacked(batch, self.unpack), self.accelerator.device)
        module = self._unwrapped
        module.regularizer_factor = 1.0 if self.weight_schedule is None else float(self.weight_schedule(run.updates))
        norms = self._gradient_norms(batch, run)
        rate = float(self.optimizer.param_groups[0]["lr"])
        if is_last:  # of the epoch: the update is made of fewer passes
            self.accelerator.step = self.accelerator.gradient_accumulation_steps - 1
        # FSDP averages the gradients of each pass; DDP waits until the last one.
        waiting = [] if is_sharded(self.model) else [self._loss]
        with self.accelerator.accumulate(*waiting):
            with gathered(self.model):
                named = self._backward(batch, where)
            run.note_start(named["task"], self.accelerator.num_processes * _n_examples(batch))
            if self.accelerator.scaler is None:
                with failing_together(self.accelerator):
                    _check_gradients(module, where)
            self._keep_weights(weights)
            if self.accelerator.sync_gradients:
                self._clip_gradients()
                run.updates += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self._drop_gradients()
        shares = {f"seconds_{name}": seconds for name, seconds in module.seconds.items()}
        if self.scheduler is not None:
            named[unused("learning_rate", named)] = rate
        return {**named, **norms, **self._measurements(named), **shares}

    def _finish_update(self, row: dict[str, float]) -> None:
        """Do what follows each update of the weights."""
        for callback in self.update_callbacks:
            callback(self, row)
        if not self.optimizer.step_was_skipped:  # by the scaler of half precision
            if self.averaged_model is not None:
                self.averaged_model.update_parameters(self.model)
            if self.scheduler_interval == "update":
                self._step_scheduler(row["loss"])

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if self.averaged_model is None:
            yield
            return
        with self._having(self._weights_to_judge()):
            yield

    @contextmanager
    def _having(self, weights: dict[str, Any]) -> Iterator[None]:
        """Inside, the model has other weights."""
        own = weights_of(self.model)
        load_weights(self.model, weights)
        try:
            yield
        finally:
            load_weights(self.model, own)

    def _weights_to_judge(self) -> dict[str, Any]:
        """Return a copy of the model's state, with the averaged weights if there are any.

        What modules keep beside their tensors is the model's own, since an average does not follow it.
        """
        state = weights_of(self.model)
        if self.averaged_model is not None:
            average = weights_of(self.averaged_model.module)
            state.update({name: value for name, value in average.items() if not name.endswith("_extra_state")})
        return state

    def _keep_weights(self, weights: Snapshot) -> None:
        weights.keep()
        self._average_before = None if self.averaged_model is None else weights_of(self.averaged_model)

    def _undo_update(self, weights: Snapshot) -> None:
        """Put the weights, and their average, back to what they were before the last update."""
        weights.restore()
        if self.averaged_model is not None and self._average_before is not None:
            self.averaged_model.load_state_dict(self._average_before)

    def _backward(self, batch: Any, where: str) -> dict[str, float]:
        """Compute the gradient of a batch and return the loss and its parts, means over processes."""
        with failing_together(self.accelerator):
            loss, parts = self._loss(batch)
        values = self.accelerator.reduce(torch.stack([loss.detach(), *parts.values()]), reduction="mean").tolist()
        named = dict(zip(["loss", *parts], values, strict=True))
        for name in [*parts, "loss"]:
            if not math.isfinite(named[name]):
                raise NonFiniteError(f"The loss term {name!r} turned {named[name]} in {where}.")
        started = time.perf_counter()
        with _explained_checkpoint_errors():
            self.accelerator.backward(loss)
        self._unwrapped.seconds["backward"] = time.perf_counter() - started
        return named

    def _clip_gradients(self) -> None:
        """Clip the gradients of what the optimizer owns, or of the whole sharded model."""
        if self.max_grad_norm is None:
            return
        parameters = list(self.model.parameters()) if is_sharded(self.model) else self._owned_parameters()
        if self.accelerator.scaler is None:
            self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        else:  # accelerate's own function would unscale the gradients of every optimizer that it knows
            self.accelerator.unscale_gradients(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)

    def _owned_parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _drop_gradients(self) -> None:
        """Drop all gradients: also those that the optimizer does not own, and those of an unfinished update."""
        self.accelerator.step = 0
        for parameter in (*self._unwrapped.parameters(), *self._owned_parameters()):
            parameter.grad = None

    def _measurements(self, taken: Iterable[str]) -> dict[str, float]:
        """Return what regularizers measured beside their terms, under names that no term has."""
        found: dict[str, float] = {}
        for regularizer in self._unwrapped.known_regularizers:
            for name, value in regularizer.measurements.items():
                found[unused(name, (*taken, *found))] = float(value)
        return found

    def _gradient_norms(self, batch: Any, run: Run) -> dict[str, float]:
        """Return the gradient norm of each term at the chosen interval; warn if one dwarfs that of the task."""
        if self.gradient_norms_every is None or run.updates % self.gradient_norms_every:
            return {}
        norms = {}
        models = [model for regularizer in self._unwrapped.known_regularizers for model in regularizer.models]
        with eagerly(self.model, *models), self._without_trace(run), gathered(self.model):
            with self.accelerator.autocast():
                terms = self._unwrapped.terms(batch)
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            for name, term in terms.items():
                if term.requires_grad:
                    with _explained_checkpoint_errors():
                        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
                    norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        task = norms.get("task", 0.0)
        for name, norm in norms.items():
            if norm > _DWARFS * task > 0:
                warn(
                    f"The gradient of {name!r} is {norm / task:.0f} times the task's: lower its weight, or raise it "
                    "slowly with weight_schedule.",
                )
        return {f"{name}_gradient_norm": norm for name, norm in norms.items()}

    @contextmanager
    def _without_trace(self, run: Run) -> Iterator[None]:
        """Restore random state and buffers (BatchNorm's statistics, automatic weights) afterwards."""
        state, before = run.random_state(), Snapshot(self._unwrapped)
        try:
            yield
        finally:
            run.set_random_state(state)
            before.restore()

    def _return_to_good(self, weights: Snapshot, last_batch: Any, run: Run) -> None:
        """Undo what a failed step did to the buffers, and the update before it if that made the loss infinite."""
        weights.restore_buffers()
        if last_batch is None or not self._task_loss_is_finite(last_batch, run):
            self._undo_update(weights)

    @no_graph()
    def _task_loss_is_finite(self, batch: Any, run: Run) -> bool:
        """Return True if the task loss on a batch is finite with the current weights, in every process."""
        from accelerate.utils import send_to_device

        with eagerly(self.model), self._without_trace(run), self.accelerator.autocast(), gathered(self.model):
            read = send_to_device(unpacked(batch, self.unpack), self.accelerator.device)
            finite = self.loss_fn(call_model(self.model, read), read.target).isfinite().all()
        return bool(self.accelerator.reduce(finite.float(), reduction="mean") == 1)

    def _warn_of_new_statistics(self) -> None:
        """Warn if BatchNorm would be frozen before it has seen a batch."""
        new = [name for name, module in self.model.named_modules() if has_new_statistics(module)]
        if self.freeze_batch_norm and new:
            warn(
                f"BatchNorm's statistics are still those of new layers in {new[:3]}, and freeze_batch_norm=True keeps "
                "them: pass freeze_batch_norm=False to train from random weights, or run some batches through the new "
                "layers in training mode first.",
            )

    def _warn_of_lost_accuracy(self, run: Run) -> None:
        """Warn that no epoch could be kept."""
        assert self.max_accuracy_drop is not None
        row = max(run.history, key=lambda row: row.get(f"val_{CHANGE}", -math.inf))
        warn(
            f"Every epoch costs more accuracy than max_accuracy_drop={self.max_accuracy_drop} allows; the best changed "
            f"it by {row[f'val_{CHANGE}']:+.4f} ± {row[f'val_{ERROR}']:.4f}. The model keeps its starting weights. "
            "Lower the weights of the regularizers or the learning rate, or train with RandomMasking first.",
        )

    def _warn_of_a_bad_start(self, start: float, mean: float) -> None:
        """Warn if the first epoch has undone what the model knew before."""
        if start < 0 or mean <= _FAR_ABOVE * start + _HARMLESS:
            return
        warn(
            f"The task loss was {start:.3g} on the first batches, and {mean:.3g} as the mean of the first epoch: "
            "training may have undone what the model knew. Lower the learning rate, or raise it slowly (scheduler, "
            "scheduler_interval='update')."
            + (" Lower the regularizers' weights, or raise them slowly (weight_schedule)." if self.regularizers else "")
            + (_FROZEN if self.freeze_batch_norm and self._has_batch_norm else ""),
        )

    @property
    def _has_batch_norm(self) -> bool:
        return any(map(is_batch_norm, self.model.modules()))

    def _training_mode(self) -> Any:
        return training_mode(self._loss, freeze_batch_norm=self.freeze_batch_norm)

    def _step_scheduler(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            with warnings.catch_warnings():  # the updates before it may have been those of a run that is resumed
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def _unpacked(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of a loader, whose pass begins when the first one is asked for."""
        for batch in loader:
            yield unpacked(batch, self.unpack)

    def _prepare(self, loader: Iterable[Any]) -> Any:
        if not isinstance(loader, DataLoader) or is_its_own(loader, self.accelerator):
            return loader
        if id(loader) not in self._prepared:  # the accelerator keeps every loader that it has prepared
            self._prepared[id(loader)] = (loader, self.accelerator.prepare_data_loader(loader))
        return self._prepared[id(loader)][1]


def _check_compiled(regularizers: Iterable[nn.Module], model: nn.Module) -> None:
    """Refuse regularizers of a compiled model that need its second derivative, before training starts."""
    for regularizer in regularizers:
        used = twice = [model]
        if isinstance(regularizer, Regularizer):
            used, twice = regularizer.models, regularizer.models_differentiated_twice
        if not has_compiled_parts(*used):
            continue
        name = type(regularizer).__name__
        if getattr(regularizer, "needs_second_derivative", True) and has_compiled_parts(*twice):
            raise ValueError(
                f"torch.compile has no second derivative, which {name} needs: give {name} and its explainer the module "
                "that was given to torch.compile, and leave model.compile() out. A regularizer of your own that takes "
                "no gradients says so by `needs_second_derivative = False`."
            )
        if not can_run_eagerly():
            raise ValueError(
                f"{name} of a compiled model needs torch.compiler.set_stance, so that not every kind of call is "
                f"compiled, and PyTorch {torch.__version__} has none: install PyTorch 2.6 or later, or train the "
                "module that was given to torch.compile."
            )


@contextmanager
def _explained_checkpoint_errors() -> Iterator[None]:
    """Say what to do where the backward pass computes a checkpointed part of the model in another way."""
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(
            "torch.utils.checkpoint computed a part of the model again in the backward pass, and in another way. "
            "Attention: train inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`, the "
            "kernel that explanations need for their second derivative. Stochastic depth and other layers that are "
            "random in training mode: set their rates to 0. Or turn checkpointing off."
        ) from error


def _n_examples(batch: Batch) -> int:
    """Return the length of the first tensor of the target or the inputs; 1 if there is none."""
    leaves = tree_leaves((batch.target, batch.inputs))
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _checked_interval(interval: str, scheduler: Any) -> str:
    if interval not in ("epoch", "update"):
        raise ValueError(f"scheduler_interval must be 'epoch' or 'update', given: {interval!r}.")
    if interval == "update" and isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau compares the losses of epochs: leave scheduler_interval='update' out, or choose a "
            "scheduler that follows the number of updates."
        )
    return interval


def _checked_average(averaged: AveragedModel | None, model: nn.Module, device: torch.device) -> AveragedModel | None:
    if averaged is None:
        return None
    if not isinstance(averaged, AveragedModel):
        raise TypeError(
            f"averaged_model must be a torch.optim.swa_utils.AveragedModel, given: {type(averaged).__name__}. Average "
            "in another way in update_callbacks."
        )
    if is_sharded(model):
        raise ValueError("averaged_model needs the whole model in each process: leave it out for a sharded model.")
    shapes, expected = _shapes(averaged.module), _shapes(model)
    if shapes != expected:
        differ = sorted(dict(shapes ^ expected))
        raise ValueError(
            f"averaged_model must average the model that is trained, AveragedModel(model): they differ in {differ[:3]}."
        )
    return averaged.to(device)


def _shapes(model: nn.Module) -> set[tuple[str, torch.Size]]:
    return {(name, value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _check_trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step, for which the trainer has no closure: use another "
            "optimizer, or ExplanationRegularizedLoss in a loop of your own."
        )
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


def _check_gradients(loss: ExplanationRegularizedLoss, where: str) -> None:
    named = ((name.removeprefix("model."), parameter.grad) for name, parameter in loss.named_parameters())
    gradients = {name: local(gradient) for name, gradient in named if gradient is not None}
    values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients.values()]
    finite = [value.isfinite().all() for value in values]
    if finite and not bool(torch.stack(finite).all()):
        name = list(gradients)[[bool(check) for check in finite].index(False)]
        raise NonFiniteError(f"The gradient of the loss in {name!r} turned NaN or infinite in {where}.")


def _accelerator() -> Accelerator:
    try:
        import tqdm  # noqa: F401
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "ExplanationRegularizedTrainer needs accelerate and tqdm: `pip install 'captum-idexpo[train]'`."
        ) from error
    return Accelerator()
