"""A grid of settings, one training run each, restartable at any point; the front of accuracy against faithfulness."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

Settings = dict[str, Any]
Row = dict[str, Any]


class Sweep(list[Row]):
    """A row a setting: what was set and the scores it led to."""

    def front(self, x: str = "accuracy", y: str = "insertion") -> list[Row]:
        """The rows that no other row beats in both scores, by descending x; none whose score is NaN."""
        rows = [row for row in self if not math.isnan(row[x]) and not math.isnan(row[y])]
        rows.sort(key=lambda row: (-row[x], -row[y]))
        best = -math.inf
        front = []
        for row in rows:
            if row[y] > best:
                front.append(row)
                best = row[y]
        return front

    def table(self, x: str = "accuracy", y: str = "insertion") -> str:
        """A Markdown table, the front's rows marked."""
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
        """A matplotlib figure of all settings and the front; ImportError without matplotlib."""
        from captum_idexpo.visualization import plot_front

        return plot_front(self, self.front(x, y), x, y)

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame; ImportError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Sweep.to_pandas needs pandas: `pip install 'captum-idexpo[plot]'`.") from error
        return pd.DataFrame(list(self))


def sweep(
    run: Callable[..., Mapping[str, float]],
    grid: Mapping[str, Sequence[Any]],
    path: str | Path,
    *,
    devices: Sequence[str] = (),
) -> Sweep:
    """Runs every combination of a grid that has not been run yet, and returns all of them.

    Each result is a line of JSON in a file, written when it is there: a sweep that is killed and started again goes on
    where it stopped, and a larger grid adds what is missing.

    Args:
        run: called with the settings as keyword arguments; trains and returns scores by name, those of
            `ExplanationRegularizedTrainer.evaluate` for example. With several devices it is given ``device`` as well,
            and has to be a module's function, since it runs in processes of its own.
        grid: for each setting the values to try: numbers, strings, booleans or None.
        path: the file of results.
        devices: names of devices, such as ``["cuda:0", "cuda:1"]``, on each of which one setting runs at a time; none:
            one after the other in this process.

    Returns:
        A `Sweep`, in the order of the grid.

    Raises:
        ValueError: an empty grid, or a setting named like a score or "device".
        TypeError: a value that is neither of these.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from captum_idexpo.training import sweep
        >>> def run(weight, seed):  # trains, in earnest
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
    if "device" in grid:
        raise ValueError("'device' is what `devices` hands out: name the setting otherwise.")
    grid = {name: [_plain(name, value) for value in values] for name, values in grid.items()}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    done = _read(path)
    missing = [settings for settings in combinations if _key(settings) not in done]
    finished = _side_by_side(run, missing, devices) if devices else ((s, run(**s)) for s in missing)
    for settings, scores in finished:
        if set(scores) & set(settings):
            raise ValueError(f"Scores and settings share names: {sorted(set(scores) & set(settings))}.")
        row = {"settings": settings, "scores": {name: float(value) for name, value in scores.items()}}
        _append(path, row)
        done[_key(settings)] = row
    rows = [done[_key(settings)] for settings in combinations]
    return Sweep({**row["settings"], **row["scores"]} for row in rows)


def _side_by_side(run: Callable[..., Mapping[str, float]], missing: list[Settings], devices: Sequence[str]) -> Any:
    """(settings, scores) as they come in, one setting at a time on each device; an error when those that run are in."""
    context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
    with ProcessPoolExecutor(len(devices), mp_context=context) as pool:
        waiting, free = list(missing), list(devices)
        running: dict[Future[Mapping[str, float]], tuple[Settings, str]] = {}
        error: BaseException | None = None
        while running or (waiting and error is None):
            while waiting and free and error is None:
                settings, device = waiting.pop(0), free.pop(0)
                running[pool.submit(run, **settings, device=device)] = settings, device
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                settings, device = running.pop(future)
                free.append(device)
                if future.exception() is None:
                    yield settings, future.result()
                error = error or future.exception()
        if error is not None:
            raise error


def _read(path: Path) -> dict[str, Row]:
    """What the file holds; a line that was cut short is left out, and run again."""
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


def _plain(name: str, value: Any) -> Any:
    """A setting as JSON knows it, NumPy's numbers as Python's."""
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
