"""How the weights of regularizers change while a model is trained."""

from __future__ import annotations

from collections.abc import Callable


def linear_warmup(n_updates: int) -> Callable[[int], float]:
    """Return a weight schedule that raises the regularizers' weights from 0 to theirs over so many updates.

    Example:
        >>> from captum_idexpo.training import linear_warmup
        >>> [linear_warmup(4)(update) for update in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if n_updates < 1:
        raise ValueError(f"n_updates must be at least 1, given: {n_updates}.")
    return lambda update: min(1.0, update / n_updates)
