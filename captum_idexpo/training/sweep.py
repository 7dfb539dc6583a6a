"""A grid of settings, one training run each, restartable at any point; the front of accuracy against faithfulness."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captum_idexpo.visualization.fronts import pareto_front

Settings = dict[str, Any]
Row = dict[str, Any]


class Sweep(list[Row]):
    """One row per setting: what was set and the scores it led to."""

    def front(self, x: str = "accuracy", y: str = "insertion") -> list[Row]:
        """Return the rows that no other row beats in both scores, by descending x; none whose score is NaN."""
        return pareto_front(self, x, y)

    def table(self, x: str = "accuracy", y: str = "insertion") -> str:
        """Return a Markdown table in which the rows of the front are marked."""
        front = self.front(x, y)
        names = list(dict.fromkeys(name for row in self for name in row))
        lines = ["| " + " | ".join([*names, "front"]) + " |", "| " + " | ".join(["---"] * (len(names) + 1)) + " |"]
        for row in self:
            cells = [
                f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names
            ]
            mark = "yes" if any(row is other for other in front) else ""
            lines.append("| " + " | ".join([*cells, mark]) + " |")
        return "\n".join(lines)

    def plot(self, x: str = "accuracy", y: str = "insertion") -> Any:
        """Return a matplotlib figure of all settings and the front; ImportError without matplotlib."""
        from captum_idexpo.visualization import plot_front

        return plot_front(self, self.front(x, y), x, y)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame; ImportError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Sweep.to_pandas needs pandas: `pip install 'captum-idexpo[plot]'`.") from error
        return pd.DataFrame(list(self))


def sweep(
    run: Callable[..., Mapping[str, float]],
    grid: Mapping[str, Sequence[Any]],
    path: str | Path,
) -> Sweep:
    """Run every combination of a grid that has not been run yet, and return all of them.

    Each result is written to a file at once, as a line of JSON. A sweep that was killed continues where it stopped, and
    a larger grid adds what is missing. To use several devices, start one process per device, each with a part of the
    grid and the same file, and then read all results by a call with the whole grid.

    Args:
        run: called with the settings as keyword arguments; trains and returns scores by name, those of
            `ExplanationRegularizedTrainer.evaluate` for example.
        grid: for each setting the values to try: numbers, strings, booleans or None.
        path: the file of results.

    Returns:
        A `Sweep`, in the order of the grid.

    Raises:
        ValueError: an empty grid, or a setting named like a score.
        TypeError: a value of another type.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from captum_idexpo.training import sweep
        >>> def run(weight, seed):  # trains a model
        ...     return {"accuracy": 0.9 - weight, "insertion": 0.5 + 10 * weight - seed}
        >>> path = Path(tempfile.mkdtemp()) / "sweep.jsonl"
        >>> found = sweep(run, {"weight": [0.0, 0.01], "seed": [0]}, path)
        >>> [row["insertion"] for row in found.front()]
        [0.5, 0.6]
        >>> print(found.table().splitlines()[-1])
        | 0.01 | 0 | 0.89 | 0.6 | yes |
    """
    path = Path(path)
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError("The grid is empty: give each setting at least one value.")
    grid = {name: [_plain(name, value) for value in values] for name, values in grid.items()}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    done = _read(path)
    missing = [settings for settings in combinations if _key(settings) not in done]
    for settings in missing:
        scores = run(**settings)
        if set(scores) & set(settings):
            raise ValueError(f"Scores and settings share names: {sorted(set(scores) & set(settings))}.")
        row = {"settings": settings, "scores": {name: float(value) for name, value in scores.items()}}
        _append(path, row)
        done[_key(settings)] = row
    rows = [done[_key(settings)] for settings in combinations]
    return Sweep({**row["settings"], **row["scores"]} for row in rows)


def _read(path: Path) -> dict[str, Row]:
    """Return what the file holds, without a line that was cut short, whose setting is run again."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[_key(row["settings"])] = row
    return rows


def _append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    start = "\n" if content and not content.endswith(b"\n") else ""  # after a line that was cut short
    with path.open("a") as file:
        file.write(start + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _plain(name: str, value: object) -> Any:
    """Return a setting that JSON can write, with Python's numbers in place of NumPy's."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        json.dumps(value)
    except TypeError:
        raise TypeError(
            f"The grid's {name} holds {value!r}, a {type(value).__name__}, which cannot be written down: give "
            "numbers, strings, booleans or None, and let run() make of them what it needs."
        ) from None
    return value


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)
