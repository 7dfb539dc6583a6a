"""The position of a training run and its results so far: what a checkpoint holds beside the trainer's parts."""

from __future__ import annotations

import math
import uuid
from collections.abc import Generator as GeneratorType
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from captum_idexpo._core import rng
from captum_idexpo.training.accuracy_floor import Classified
from captum_idexpo.training.history import History
from captum_idexpo.training.loaders import is_accelerates, left, with_last

if TYPE_CHECKING:
    from accelerate import Accelerator


_EXAMPLES_AT_THE_START = 64
"""So many give the loss at the start: the loss of one small batch is too noisy, and later batches are those of another
model."""


class Run:
    """The position of a run and its results so far."""

    def __init__(self, generators: list[rng.AnyGenerator], accelerator: Accelerator) -> None:
        self.generators = generators
        self._accelerator = accelerator
        self.history = History()
        self.id = uuid.uuid4().hex
        self.epoch, self.step, self.updates = 1, 0, 0
        self.best_score, self.best_epoch = -math.inf, 0
        self.best_weights: dict[str, Any] | None = None
        self.start_weights: dict[str, Any] | None = None
        self.start: Classified | None = None
        self.finished = False
        self._start_losses: list[float] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._epoch_start: dict[str, Any] | None = None
        self._here: dict[str, Any] | None = None

    @property
    def shown(self) -> list[str]:
        """The names that a progress bar shows."""
        return [name for name in self._sums if not name.startswith("seconds") and not name.endswith("_norm")]

    def batches(self, loader: Iterable[Any]) -> GeneratorType[tuple[Any, bool], None, None]:
        """Yield this epoch's batches, and whether each is the last; skip those done before the run was resumed."""
        done, here = self.step, self._here
        if is_accelerates(loader):
            loader.iteration = self.epoch - 1  # accelerate counts epochs for samplers that depend on them
        if here is None:
            self._epoch_start = self.random_state()
        else:  # the same order again, then on with the streams of the moment
            assert self._epoch_start is not None
            self.set_random_state(self._epoch_start)
        with left(loader):
            batches = with_last(loader, look_ahead=self._accelerator.gradient_accumulation_steps > 1)
            for _ in range(done):
                next(batches, None)
            if here is not None:
                self.set_random_state(here)
                self._here = None
            yield from batches

    def add(self, parts: dict[str, float]) -> None:
        """Count a step and add what it measured."""
        self.step += 1
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def note_start(self, task_loss: float, n_examples: int) -> None:
        """Keep the task loss of the run's first batches, before many updates have changed the model."""
        if self.epoch == 1 and n_examples * len(self._start_losses) < _EXAMPLES_AT_THE_START:
            self._start_losses.append(task_loss)

    @property
    def start_loss(self) -> float:
        """The mean task loss of the first batches."""
        return sum(self._start_losses) / max(1, len(self._start_losses))

    def means(self) -> dict[str, float]:
        """Return means over the epoch's steps."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}

    def next_epoch(self) -> None:
        """End an epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self._sums, self._counts, self._epoch_start = {}, {}, None

    def random_state(self) -> dict[str, Any]:
        """Return this process's random state."""
        return rng.random_state(self._accelerator.device, self.generators)

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Put a random state back."""
        rng.set_random_state(state, self._accelerator.device, self.generators)

    def random_states(self) -> list[dict[str, Any]]:
        """Return the random states of each process, now and at the start of the epoch."""
        own = {"here": self.random_state(), "epoch_start": self._epoch_start}
        if self._accelerator.num_processes == 1:
            return [own]
        gathered: list[Any] = [None] * self._accelerator.num_processes
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the run."""
        return {
            "id": self.id,
            "history": [dict(row) for row in self.history],
            "position": [self.epoch, self.step, self.updates],
            "best": [self.best_score, self.best_epoch],
            "best_weights": self.best_weights,
            "start_weights": self.start_weights,
            "start": None if self.start is None else self.start.state_dict(),
            "finished": self.finished,
            "start_losses": self._start_losses,
            "sums": self._sums,
            "counts": self._counts,
        }

    def load_state_dict(self, state: dict[str, Any], randoms: list[dict[str, Any]]) -> None:
        """Put the run where it was."""
        self.id = state["id"]
        self.history[:] = state["history"]
        self.epoch, self.step, self.updates = state["position"]
        self.best_score, self.best_epoch = state["best"]
        self.best_weights, self.finished = state["best_weights"], state["finished"]
        self.start_weights = state.get("start_weights")
        self.start = None if state.get("start") is None else Classified(**state["start"])
        self._start_losses = state["start_losses"]
        self._sums, self._counts = state["sums"], state["counts"]
        own = randoms[self._accelerator.process_index]
        self._epoch_start = own["epoch_start"]
        if self._epoch_start is None:  # between two epochs
            self.set_random_state(own["here"])
        else:
            self._here = own["here"]
