"""The Pareto front of settings by two scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])


def pareto_front(rows: Iterable[Row], x: str, y: str) -> list[Row]:
    """Return the rows on the Pareto front, by descending x.

    No other row is at least as good in both scores and better in one. Of equal rows the first is returned. Rows with a
    NaN score are left out, and rows that are marked as not "eligible" (their accuracy fell too far).

    Args:
        rows: the scores of each setting, by name.
        x: name of the score on the horizontal axis; higher is better.
        y: name of the score on the vertical axis; higher is better.

    Raises:
        ValueError: a row has no score of such a name.

    Example:
        >>> from captum_idexpo.visualization.fronts import pareto_front
        >>> rows = [{"accuracy": 0.9, "insertion": 0.5}, {"accuracy": 0.8, "insertion": 0.4}]
        >>> pareto_front(rows, "accuracy", "insertion")
        [{'accuracy': 0.9, 'insertion': 0.5}]
    """
    rows = list(rows)
    for name in (x, y):
        if not all(name in row for row in rows):
            names = list(dict.fromkeys(name for row in rows for name in row))
            raise ValueError(f"Not every row has a score {name!r}; their names are {names}. Choose two, as x= and y=.")
    scored = [row for row in rows if row.get("eligible", True) and not math.isnan(row[x] + row[y])]
    scored.sort(key=lambda row: (-row[x], -row[y]))
    best = -math.inf
    front = []
    for row in scored:
        if row[y] > best:
            front.append(row)
            best = row[y]
    return front
