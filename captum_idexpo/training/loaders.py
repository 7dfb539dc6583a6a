"""Loaders as accelerate prepares them, or any iterable of batches: where they end, and what fills their last batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator


def is_accelerates(loader: Any) -> bool:
    """Whether a loader is one that accelerate has prepared."""
    return hasattr(loader, "end_of_dataloader")


@contextmanager
def left(loader: Any) -> Iterator[None]:
    """Ends a loader's pass also where it breaks off; accelerate would go on taking it for the one that is running."""
    try:
        yield
    finally:
        if is_accelerates(loader) and loader in loader.gradient_state.dataloader_references:
            loader.end()


@contextmanager
def as_in_first_pass(loader: Any) -> Iterator[None]:
    """A pass in the order of the first one: accelerate counts them, for samplers that shuffle anew in each."""
    if not is_accelerates(loader):
        yield
        return
    n_passes, loader.iteration = loader.iteration, 0
    try:
        yield
    finally:
        loader.iteration = n_passes


def with_last(loader: Any, look_ahead: bool) -> Iterator[tuple[Any, bool]]:
    """A loader's batches and whether one is the last; one of unknown length is looked into only if asked to."""
    batches = iter(loader)
    if is_accelerates(loader):
        return ((batch, loader.end_of_dataloader) for batch in batches)
    if isinstance(loader, Sized) and not isinstance(loader, DataLoader):  # whose length says nothing of its batches
        return ((batch, number == len(loader)) for number, batch in enumerate(batches, start=1))
    return _looked_ahead(batches) if look_ahead else ((batch, False) for batch in batches)


def is_its_own(loader: DataLoader[Any], accelerator: Accelerator) -> bool:
    """Whether a loader yields its batches in a way of its own, of which accelerate would make an ordinary loader.

    Raises:
        ValueError: several processes, which only an ordinary loader can share.
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


def start_workers(loader: Any) -> None:
    """Starts worker processes that persist, as a run's first epoch does, which draws a number for them."""
    ordinary = getattr(loader, "base_dataloader", loader)
    if isinstance(ordinary, DataLoader) and ordinary.persistent_workers:
        iter(ordinary)


def gathered_examples(accelerator: Accelerator, loader: Any, values: Any, n_before: int) -> Any:
    """The values of all processes' examples, without those that fill up a loader's last batch.

    Args:
        accelerator: of the processes.
        loader: what the batch is from.
        values: tensors, one value an example, in any nest.
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
    """How many examples an ordinary sampler drew for the examples seen; None where accelerate alone can know it."""
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
