"""Loaders that accelerate has prepared, or any iterable of batches: where they end, and what all processes gather."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.utils.data import BatchSampler, DataLoader

from captum_idexpo._core.errors import NonFiniteError

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_accelerates(loader: object) -> TypeGuard[Any]:
    """Return True for a loader that accelerate has prepared."""
    return hasattr(loader, "end_of_dataloader")


@contextmanager
def left(loader: object) -> Iterator[None]:
    """End a loader's pass also when it breaks off, since accelerate would take it for the one that is running."""
    try:
        yield
    finally:
        if is_accelerates(loader) and loader in loader.gradient_state.dataloader_references:
            loader.end()


@contextmanager
def as_in_first_pass(loader: object) -> Iterator[None]:
    """Iterate as in the first epoch: accelerate shuffles by the number of the epoch, which it counts."""
    if not is_accelerates(loader):
        yield
        return
    n_passes, loader.iteration = loader.iteration, 0
    try:
        yield
    finally:
        loader.iteration = n_passes


def with_last(loader: Iterable[Any], look_ahead: bool) -> Iterator[tuple[Any, bool]]:
    """Yield a loader's batches, and whether each is the last; without a known length only with ``look_ahead``."""
    batches = iter(loader)
    if is_accelerates(loader):
        return ((batch, loader.end_of_dataloader) for batch in batches)
    if isinstance(loader, Sized) and not isinstance(loader, DataLoader):  # whose length says nothing of its batches
        return ((batch, number == len(loader)) for number, batch in enumerate(batches, start=1))
    return _looked_ahead(batches) if look_ahead else ((batch, False) for batch in batches)


def is_its_own(loader: DataLoader[Any], accelerator: Accelerator) -> bool:
    """Return True for a subclass of DataLoader with an ``__iter__`` of its own, which accelerate would not call.

    Raises:
        ValueError: there are several processes, which only an ordinary loader can share.
    """
    known = type(loader).__module__.startswith("torchdata.") or is_accelerates(loader)
    if known or type(loader).__iter__ is DataLoader.__iter__:
        return False
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{type(loader).__name__} has an __iter__ of its own, which several processes cannot share: do what it "
            "does in the data set or in a collate_fn, or prepare the loader for each process yourself."
        )
    return True


def start_workers(loader: object) -> None:
    """Start workers that persist. The first epoch of a run does, and draws a random number for them."""
    ordinary = getattr(loader, "base_dataloader", loader)
    if isinstance(ordinary, DataLoader) and ordinary.persistent_workers:
        iter(ordinary)


def gathered_examples(accelerator: Accelerator, loader: Any, values: Any, n_before: int) -> Any:
    """Return the values of all processes' examples, without those that fill up a loader's last batch.

    accelerate's own `gather_for_metrics` computes how many fill it up from the length of the data set, which is wrong
    for a sampler of another length and for a collate_fn that makes more or fewer examples.

    Args:
        accelerator: of the processes.
        loader: where the batch comes from.
        values: tensors, one value per example, in any nest.
        n_before: examples of the batches before.
    """
    from accelerate.utils import find_batch_size, recursively_apply

    values = accelerator.gather(values)
    if accelerator.num_processes == 1 or not getattr(loader, "end_of_dataloader", False):
        return values  # nothing is filled up
    n_drawn = _n_drawn(loader, n_before + find_batch_size(values))
    n_own = loader.remainder if n_drawn is None else n_drawn - n_before
    return recursively_apply(lambda tensor: tensor[:n_own], values) if n_own > 0 else values


def _n_drawn(loader: Any, n_seen: int) -> int | None:
    """Return how many examples an ordinary sampler drew for the examples seen; None if only accelerate can know it."""
    from accelerate.data_loader import DataLoaderDispatcher

    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(sampler, "batch_sampler", sampler)  # behind a process's share of it
    dispatched = isinstance(loader, DataLoaderDispatcher)
    if dispatched or type(sampler) is not BatchSampler or not isinstance(sampler.sampler, Sized):
        return None
    n_drawn, n_rows = len(sampler.sampler), loader.total_batch_size
    # Another number of examples is that of a collate_fn which makes more or less of them.
    return n_drawn if -(-n_drawn // n_rows) * n_rows == n_seen else n_seen


def _looked_ahead(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    nothing = before = object()
    for batch in batches:
        if before is not nothing:
            yield before, False
        before = batch
    if before is not nothing:
        yield before, True


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Raise the `NonFiniteError` of one process in all of them, which would else wait for it in the next collective."""
    error: NonFiniteError | None = None
    try:
        yield
    except NonFiniteError as own:
        error = own
    if accelerator.num_processes > 1:
        failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device))
        if float(failed) and error is None:
            error = NonFiniteError("Another process met NaN or infinity; its message says where.")
    if error is not None:
        raise error
