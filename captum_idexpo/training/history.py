"""What a training run reports, epoch by epoch."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any


class History(list[dict[str, float]]):
    """One row per epoch: the mean loss and its parts, and validation scores.

    Example:
        >>> from captum_idexpo.training import History
        >>> history = History([{"epoch": 1, "valscore": 2.5}, {"epoch": 2, "valscore": 2.9}])
        >>> history.to_pandas()["valscore"].tolist()
        [2.5, 2.9]
        >>> history.best["epoch"]
        2
    """

    @property
    def best(self) -> dict[str, float] | None:
        """The row of the epoch whose weights were kept; None without validation, or if no epoch was eligible."""
        rows = (row for row in self if "valscore" in row and row.get("eligible", True))
        return max(rows, key=lambda row: row["valscore"], default=None)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame; ImportError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas: `pip install 'captum-idexpo[plot]'`.") from error
        return pd.DataFrame(list(self))

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as a table of comma-separated values, a column for each name that occurs."""
        names = list(dict.fromkeys(name for row in self for name in row))
        table = io.StringIO(newline="")  # written at once, so that no error leaves half a file
        writer = csv.DictWriter(table, names)
        writer.writeheader()
        writer.writerows(self)
        Path(path).write_text(table.getvalue(), newline="")

    def plot(self) -> Any:
        """Return a figure: losses on the left, validation scores on the right; ImportError without matplotlib."""
        from captum_idexpo.visualization import plot_history

        return plot_history(self)
