"""Where a training run is, and what it has found so far: all that a checkpoint holds besides the trainer's parts."""

from __future__ import annotations

import math
import uuid
from collections.abc import Generator as GeneratorType
from typing import TYPE_CHECKING, Any

import torch

from captum_idexpo.training import checkpoint
from captum_idexpo.training.generators import Generator
from captum_idexpo.training.history import History
from captum_idexpo.training.loaders import is_accelerates, left, with_last

if TYPE_CHECKING:
    from accelerate import Accelerator


class Run:
    """Where a run is, and what it has found so far."""

    def __init__(self, generators: list[Generator], accelerator: Accelerator) -> None:
        self.generators = generators
        self._accelerator = accelerator
        self.history = History()
        self.id = uuid.uuid4().hex
        self.epoch, self.step, self.updates = 1, 0, 0
        self.best_score, self.best_epoch = -math.inf, 0
        self.best_weights: dict[str, Any] | None = None
        self.finished = False
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._epoch_start: dict[str, Any] | None = None
        self._here: dict[str, Any] | None = None

    @property
    def shown(self) -> list[str]:
        """The names that a progress bar shows."""
        return [name for name in self._sums if not name.startswith("seconds") and not name.endswith("_norm")]

    def batches(self, loader: Any) -> GeneratorType[tuple[Any, bool], None, None]:
        """This epoch's batches and whether one is the last; those done before the run was resumed are passed over."""
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
        """Counts a step and what it measured."""
        self.step += 1
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over the epoch's steps; of skipped batches the number."""
        return {name: value if name == "skipped" else value / self._counts[name] for name, value in self._sums.items()}

    def next_epoch(self) -> None:
        """Ends an epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self._sums, self._counts, self._epoch_start = {}, {}, None

    def random_state(self) -> dict[str, Any]:
        """This process's random streams."""
        return checkpoint.random_state(self.generators, self._accelerator.device)

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Puts them back."""
        checkpoint.set_random_state(state, self.generators, self._accelerator.device)

    def random_states(self) -> list[dict[str, Any]]:
        """The random streams of each process, now and at the epoch's start."""
        own = {"here": self.random_state(), "epoch_start": self._epoch_start}
        if self._accelerator.num_processes == 1:
            return [own]
        gathered: list[Any] = [None] * self._accelerator.num_processes
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the run."""
        return {
            "id": self.id,
            "history": [dict(row) for row in self.history],
            "position": [self.epoch, self.step, self.updates],
            "best": [self.best_score, self.best_epoch],
            "best_weights": self.best_weights,
            "finished": self.finished,
            "sums": self._sums,
            "counts": self._counts,
        }

    def load_state_dict(self, state: dict[str, Any], randoms: list[dict[str, Any]]) -> None:
        """Puts the run where it was."""
        self.id = state["id"]
        self.history[:] = state["history"]
        self.epoch, self.step, self.updates = state["position"]
        self.best_score, self.best_epoch = state["best"]
        self.best_weights, self.finished = state["best_weights"], state["finished"]
        self._sums, self._counts = state["sums"], state["counts"]
        own = randoms[self._accelerator.process_index]
        self._epoch_start = own["epoch_start"]
        if self._epoch_start is None:  # between two epochs
            self.set_random_state(own["here"])
        else:
            self._here = own["here"]
