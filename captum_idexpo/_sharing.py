"""Random numbers of a batch that several processes share: each draws them all and keeps those of its own examples.

So that what is drawn for an example does not depend on how many processes there are, as long as their generators are
in the same state. Processes hold equal parts of the batch, in the order of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch

Drawn = TypeVar("Drawn")
_share: ContextVar[tuple[int, int]] = ContextVar("_share", default=(0, 1))


@contextmanager
def share_of_batch() -> Iterator[None]:
    """Inside, the batch at hand is this process's share of a larger one, if there are several processes."""
    share = (0, 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        share = (torch.distributed.get_rank(), torch.distributed.get_world_size())
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def drawn_for(n_examples: int, draw: Callable[[int], Drawn]) -> Drawn:
    """What ``draw(n)``, tensors (or None) with one entry an example, draws for the examples of this process."""
    rank, n_processes = _share.get()
    if n_processes == 1:
        return draw(n_examples)
    own = slice(rank * n_examples, (rank + 1) * n_examples)
    drawn: Any = draw(n_examples * n_processes)
    if isinstance(drawn, tuple):
        return cast(Drawn, tuple(None if part is None else part[own] for part in drawn))
    return cast(Drawn, drawn[own])
