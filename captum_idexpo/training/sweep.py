"""A grid of settings, one training run each, restartable at any point; the front of accuracy against faithfulness."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from captum_idexpo.training.accuracy_floor import CHANGE, ERROR, check_max_drop, is_eligible
from captum_idexpo.visualization.fronts import pareto_front

Settings = dict[str, Any]
Row = dict[str, Any]


class Sweep(list[Row]):
    """One row per setting: what was set and the scores it led to.

    In `front`, `table` and `plot` a higher score is a better one: for deletion take "one_minus_deletion".

    Args:
        rows: settings and scores by name.
        settings: the names of the settings; the others are scores.
        max_accuracy_drop: rows whose "accuracy_change", plus its standard error, is a larger drop are not "eligible".
            They are left out of the front, and marked in table and plot. None: no limit.

    Example:
        >>> from captum_idexpo.training import Sweep
        >>> rows = [{"weight": 0.1, "seed": seed, "accuracy": 0.8 + 0.1 * seed} for seed in (0, 1)]
        >>> (row,) = Sweep(rows, settings=("weight", "seed")).mean(over="seed")
        >>> [f"{name} {value:.2f}" for name, value in row.items()]
        ['weight 0.10', 'n_runs 2.00', 'accuracy 0.85', 'accuracy_standard_error 0.05']
    """

    def __init__(
        self, rows: Iterable[Row] = (), settings: Iterable[str] = (), max_accuracy_drop: float | None = None
    ) -> None:
        self.max_accuracy_drop = check_max_drop(max_accuracy_drop)
        super().__init__(map(self._judged, rows))
        self.settings = tuple(settings)

    def _judged(self, row: Row) -> Row:
        """Return a row that says whether its accuracy is within the limit."""
        if self.max_accuracy_drop is None:
            return row
        _require_change(row)
        return {**row, "eligible": is_eligible(row[CHANGE], row.get(ERROR, 0.0), self.max_accuracy_drop)}

    def mean(self, over: str = "seed") -> Sweep:
        """Return the mean scores over one setting, with their standard errors.

        Args:
            over: the setting whose runs repeat the others.

        Returns:
            One row per combination of the other settings: these, "n_runs", and for each score that all of its runs have
            the mean and "<score>_standard_error", the standard deviation of the runs divided by sqrt(n_runs). If the
            runs have such an error themselves, it is at least the mean of theirs, since runs that are judged on the
            same examples share the chance of these examples. With `max_accuracy_drop` the mean change of accuracy says
            whether a row is "eligible". Without, it is if all its runs are, should they say so.

        Raises:
            ValueError: there is no such setting; a combination has one run, or two with the same value of it; the rows
                are means already, or scores have the names that are to be added.
        """
        if over not in self.settings:
            raise ValueError(f"over must be one of the settings {list(self.settings)}, given: {over!r}.")
        others = [name for name in self.settings if name != over]
        groups: dict[str, list[Row]] = {}
        for row in self:
            groups.setdefault(_key({name: row[name] for name in others}), []).append(row)
        means = [self._mean(runs, others, over) for runs in groups.values()]
        return Sweep(means, others, self.max_accuracy_drop)

    def _mean(self, runs: list[Row], others: list[str], over: str) -> Row:
        """Return the row of runs that differ in one setting alone."""
        first = {name: runs[0][name] for name in others}
        n_values = len({_key({over: run[over]}) for run in runs})
        if n_values < max(2, len(runs)):
            raise ValueError(
                f"A standard error needs two runs or more, each with another {over!r}; {first} has {len(runs)} runs "
                f"with {n_values} values: give the grid two or more different values of {over!r}."
            )
        errors = {f"{name}_standard_error" for name in runs[0]}
        foreign = {name for name in runs[0] if name.endswith("_standard_error")} - errors
        taken = [name for name in runs[0] if name == "n_runs" or name in foreign]
        if taken:
            raise ValueError(f"mean takes single runs whose scores have other names than its own, given: {taken}.")
        row: Row = {**first, "n_runs": len(runs)}
        for score in runs[0]:
            skipped = score in self.settings or score in errors or score == "eligible"
            if not skipped and all(score in run for run in runs):
                values, error = [run[score] for run in runs], f"{score}_standard_error"
                own_errors = [run[error] for run in runs if error in run]
                row[score] = float(np.mean(values))
                between = float(np.std(values, ddof=1) / np.sqrt(len(values)))
                row[error] = max(between, float(np.mean(own_errors))) if own_errors else between
        if self.max_accuracy_drop is None and all("eligible" in run for run in runs):
            row["eligible"] = all(run["eligible"] for run in runs)
        return row

    def front(self, x: str = "accuracy", y: str = "insertion") -> list[Row]:
        """Return the eligible rows that no other one beats, by descending x; none whose score is NaN.

        One row beats another that is higher in neither score, and lower in one or both.
        """
        return pareto_front(self, x, y)

    def table(self, x: str = "accuracy", y: str = "insertion") -> str:
        """Return a Markdown table in which the rows of the front are marked."""
        front = self.front(x, y)
        names = list(dict.fromkeys(name for row in self for name in row))
        lines = ["| " + " | ".join([*names, "front"]) + " |", "| " + " | ".join(["---"] * (len(names) + 1)) + " |"]
        for row in self:
            cells = [_cell(row.get(name, "")) for name in names]
            mark = "yes" if any(row is other for other in front) else ""
            lines.append("| " + " | ".join([*cells, mark]) + " |")
        return "\n".join(lines)

    def plot(self, x: str = "accuracy", y: str = "insertion") -> Any:
        """Return a matplotlib figure of all settings, with the standard errors of `mean`, and the front.

        The points of the front are labelled with the settings that vary. Raises ImportError without matplotlib.
        """
        from captum_idexpo.visualization import plot_front

        front = self.front(x, y)
        varied = [name for name in self.settings if any(row[name] != self[0][name] for row in self)]
        labels = [", ".join(f"{name} {row[name]}" for name in varied) for row in front] if varied else []
        errors = (f"{name}_standard_error" for name in (x, y))
        x_error, y_error = (name if all(name in row for row in self) else None for name in errors)
        return plot_front(self, front, x, y, x_error=x_error, y_error=y_error, labels=labels)

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
    *,
    max_accuracy_drop: float | None = None,
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
        max_accuracy_drop: how much accuracy a setting may cost, see `Sweep`. The scores then have "accuracy_change",
            which `ExplanationRegularizedTrainer(max_accuracy_drop=...)` measures.

    Returns:
        A `Sweep`, in the order of the grid.

    Raises:
        ValueError: an empty grid, one with a value twice, or a setting named like a score; a limit of accuracy without
            "accuracy_change" among the scores.
        TypeError: a value of another type; a score that is no number.

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
    check_max_drop(max_accuracy_drop)
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError("The grid is empty: give each setting at least one value.")
    grid = {name: [_plain(name, value) for value in values] for name, values in grid.items()}
    for name, values in grid.items():
        if len({_key({name: value}) for value in values}) < len(values):
            raise ValueError(f"The grid's {name} holds a value twice: {values}. Each setting is run once.")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    done = _read(path)
    missing = [settings for settings in combinations if _key(settings) not in done]
    old = [row for row in map(done.get, map(_key, combinations)) if row and CHANGE not in row["scores"]]
    if max_accuracy_drop is not None and old:
        raise ValueError(
            f"{path} holds rows without the score {CHANGE!r}, which max_accuracy_drop needs, such as that of "
            f"{old[0]['settings']}: take another file, or leave max_accuracy_drop out."
        )
    for settings in missing:
        scores = run(**settings)
        if set(scores) & set(settings):
            raise ValueError(f"Scores and settings share names: {sorted(set(scores) & set(settings))}.")
        if max_accuracy_drop is not None:
            _require_change(scores)
        row = {"settings": settings, "scores": {name: _number(name, value) for name, value in scores.items()}}
        _append(path, row)
        done[_key(settings)] = row
    rows = [done[_key(settings)] for settings in combinations]
    return Sweep(({**row["settings"], **row["scores"]} for row in rows), grid, max_accuracy_drop)


def _require_change(scores: Mapping[str, Any]) -> None:
    if CHANGE not in scores:
        raise ValueError(
            f"max_accuracy_drop needs the score {CHANGE!r}, and {ERROR!r} if it is known, as the evaluation of "
            f"ExplanationRegularizedTrainer(max_accuracy_drop=...) returns them; given: {sorted(scores)}."
        )


def _number(name: str, value: object) -> float:
    try:
        return float(cast("float", value))
    except (TypeError, ValueError):
        raise TypeError(f"run() must return numbers by name; {name!r} is {value!r}. Leave it out.") from None


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


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
