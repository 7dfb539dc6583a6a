"""Random numbers of a batch that is shared out, to several processes or to the passes that accumulate its gradient.

Each process draws them all and keeps those of its own examples, so that what is drawn for an example does not depend on
how many processes there are, as long as their generators are in the same state. The first pass of an update draws for
those that follow. Shares are equal parts of the batch, pass by pass, in each pass in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

Drawn = TypeVar("Drawn")


@dataclass
class _Share:
    """One part of a batch: the process's, in one of the passes of an update."""

    rank: int = 0
    n_processes: int = 1
    a_pass: int = 0
    n_passes: int = 1
    drawn: list[tuple[Any, Any]] = field(default_factory=list)
    n_taken: int = 0

    def draw(self, draw: Callable[[], Drawn], like: tuple[Any, ...]) -> Drawn:
        """What the first pass drew at this place, where it was of the same kind; else what is drawn now."""
        if self.n_passes == 1:
            return draw()
        place, self.n_taken = self.n_taken, self.n_taken + 1
        if self.a_pass == 0:
            self.drawn.append((like, draw()))
        known, drawn = self.drawn[place] if place < len(self.drawn) else (None, None)
        return cast(Drawn, drawn) if known == like else draw()


_share: ContextVar[_Share] = ContextVar("_share", default=_Share())  # noqa: B039 - alone, it is never changed


@contextmanager
def share_of_batch(a_pass: int = 0, n_passes: int = 1, drawn: list[tuple[Any, Any]] | None = None) -> Iterator[None]:
    """Inside, the batch at hand is this process's share of a larger one, and one of the passes of an update.

    Args:
        a_pass: which pass, from 0.
        n_passes: how many of them accumulate the gradient of an update.
        drawn: what the first pass drew, kept by the caller for the others.
    """
    drawn = [] if drawn is None else drawn
    if a_pass == 0:
        drawn.clear()
    rank, n_processes = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, n_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    token = _share.set(_Share(rank, n_processes, a_pass, n_passes, drawn))
    try:
        yield
    finally:
        _share.reset(token)


def drawn_for(n_examples: int, draw: Callable[[int], Drawn], *like: Any) -> Drawn:
    """What ``draw(n)``, tensors (or None) with one entry an example, draws for the examples of this share.

    Args:
        n_examples: of this share.
        draw: draws for so many examples.
        like: what else decides the shape of what is drawn.
    """
    share = _share.get()
    n_shares = share.n_processes * share.n_passes
    if n_shares == 1:
        return draw(n_examples)
    drawn: Any = share.draw(lambda: draw(n_examples * n_shares), (n_examples, *like))
    index = share.a_pass * share.n_processes + share.rank
    own = slice(index * n_examples, (index + 1) * n_examples)
    if isinstance(drawn, tuple):
        return cast(Drawn, tuple(None if part is None else part[own] for part in drawn))
    return cast(Drawn, drawn[own])


def drawn_for_all(draw: Callable[[], Drawn], *like: Any) -> Drawn:
    """What is drawn once for all examples of an update."""
    return _share.get().draw(draw, like)
