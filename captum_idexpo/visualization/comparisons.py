"""The picture and the page of a comparison of models by a jury."""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captum_idexpo._version import __version__
from captum_idexpo.visualization._figures import line_look, new_figure, require_some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from captum_idexpo.jury import Comparison

Rows = Sequence[Mapping[str, Any]]
LOWER_IS_BETTER = ("deletion", "infidelity", "sensitivity")
"""Metrics of which a lower value is better."""
_N_COLUMNS = 3
_CLEAR = 2  # standard errors from which on a difference is called clear


def plot_comparison(rows: Rows, reference: str) -> Figure:
    """Plot the differences of each model to a reference, one axis for each metric, with two standard errors.

    An arrow says whether higher or lower values of the metric are better. Full markers are judges of which at least one
    part took no part in the training, or is not known to. Hollow markers are the other judges. With the reference alone
    the values are plotted.

    Args:
        rows: those of `captum_idexpo.jury.Comparison`.
        reference: the model that the others are compared with.

    Returns:
        The figure.

    Raises:
        ValueError: there are no rows.

    Example:
        >>> from captum_idexpo.visualization import plot_comparison
        >>> row = {"metric": "accuracy", "explainer": None, "baseline": None, "held_out": True}
        >>> row |= {"model": "after", "difference": -0.01, "difference_standard_error": 0.004}
        >>> figure = plot_comparison([row], reference="before")
    """
    require_some(rows, "rows", "compare(...).rows")
    models = list(dict.fromkeys(row["model"] for row in rows))
    shown = [model for model in models if model != reference] or models
    column, error = ("difference", "difference_standard_error") if shown != [reference] else ("value", "standard_error")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    judges = {metric: _judges(rows, metric) for metric in metrics}
    metrics.sort(key=lambda metric: len(judges[metric]))  # panels of about the same height in one line
    n_columns = min(_N_COLUMNS, len(metrics))
    lines = [metrics[start : start + n_columns] for start in range(0, len(metrics), n_columns)]
    heights = [0.8 + 0.17 * (1 + len(shown)) * max(len(judges[metric]) for metric in line) for line in lines]
    figure = new_figure(len(lines), n_columns, (3.7 * n_columns, sum(heights) + 0.6), heights)
    for axis, metric in zip(figure.axes, metrics, strict=False):
        of_metric = [row for row in rows if row["metric"] == metric and row["model"] in shown]
        _draw_metric(axis, of_metric, shown, judges[metric], column, error)
        axis.set_title(f"{metric.replace('_', ' ')} {better_arrow(metric)}", fontsize=9)
    for axis in figure.axes[len(metrics) :]:
        axis.set_axis_off()
    first = figure.axes[0]
    handles = [first.plot([], [], **_look(number, True), label=model)[0] for number, model in enumerate(shown)]
    if any(row["held_out"] is False for row in rows):
        took_part = _look(0, False) | {"color": "black"}
        handles += first.plot([], [], **took_part, label="took part in the training")
    title = f"difference to {reference!r}" if column == "difference" else "mean"
    figure.legend(
        handles=handles,
        title=f"{title}, ± 2 standard errors; ↑ higher is better, ↓ lower is better",
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    return figure


def better_arrow(metric: str) -> str:
    """Return an arrow in the direction of better values."""
    return "↓" if metric in LOWER_IS_BETTER else "↑"


def change_text(row: Mapping[str, Any]) -> str:
    """Return a row's difference to the reference with its standard error."""
    return with_error(row["difference"], row["difference_standard_error"], sign="+")


def with_error(value: float, error: float, sign: str = "") -> str:
    """Return a number and its standard error, of which two digits are shown."""
    n_decimals = min(max(3, 1 - math.floor(math.log10(error))), 6) if 0 < error < math.inf else 3
    return f"{value:{sign}.{n_decimals}f} ± {error:.{n_decimals}f}"


def _draw_metric(axis: Axes, rows: Rows, models: Sequence[str], judges: Sequence[str], column: str, error: str) -> None:
    """Draw a line for each judge of a metric, with a marker for each model."""
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        number = models.index(row["model"])
        place = judges.index(_judge(row)) + (number - (len(models) - 1) / 2) * 0.7 / len(models)
        reach = 2 * row[error] if math.isfinite(row[error]) else 0.0
        axis.errorbar(
            row[column], place, xerr=reach, capsize=2, elinewidth=1, **_look(number, row["held_out"] is not False)
        )
    if column == "difference":
        axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(judges)), labels=judges, fontsize=7)
    axis.set_ylim(len(judges) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _look(number: int, is_full: bool) -> dict[str, Any]:
    look = line_look(number + 1) | {"linestyle": "none"}  # the first colour is grey
    return look if is_full else look | {"fillstyle": "none"}


def _judge(row: Mapping[str, Any]) -> str:
    return ", ".join(row[part] for part in ("explainer", "baseline") if row[part] is not None) or "all inputs"


def _judges(rows: Rows, metric: str) -> list[str]:
    return list(dict.fromkeys(_judge(row) for row in rows if row["metric"] == metric))


# --- the page ------------------------------------------------------------------------------------------------------


def comparison_page(comparison: Comparison) -> str:
    """Return one HTML page without any other file: verdicts, picture, table, settings."""
    picture = io.BytesIO()
    comparison.plot().savefig(picture, format="png", dpi=150)
    encoded = base64.b64encode(picture.getvalue()).decode()
    row, reference = comparison.rows[0], html.escape(comparison.reference)
    examples = f"{row['n_examples']} examples"
    clusters = ""
    if comparison.clusters is not None:
        examples += f" in {row['n_clusters']} clusters"
        clusters = " that takes the clusters as independent, not the examples"
    settings = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in comparison.settings.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Models compared by a jury</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(", ".join(comparison.models))}</h1>
<p>Every model was judged on the same {examples}, with the same random masks. Differences are to
<strong>{reference}</strong> and paired by example; ± is one standard error{clusters}.</p>
{_verdicts(comparison)}
<div class="wide"><img alt="Differences of each model to {reference}, one panel for each metric"
src="data:image/png;base64,{encoded}"></div>
{_table(comparison)}
<h2>Settings</h2>
<dl>{settings}</dl>
<footer>captum-idexpo {__version__}</footer>
</body>
</html>
"""


def _verdicts(comparison: Comparison) -> str:
    """Return a sentence for each model and kind of judge: how many find it clearly better or worse, by metric."""
    items = []
    for model in comparison.models:
        for kind in _KINDS:
            rows = [row for row in comparison.rows if row["model"] == model and _kind(row, comparison) == kind]
            if model == comparison.reference or not rows:
                continue
            better, worse = (_counted([row for row in rows if sign * row["better"] > _CLEAR]) for sign in (1, -1))
            counts = f"{better} find it better and {worse} worse by more than {_CLEAR} standard errors"
            undecided = [row for row in rows if math.isnan(row["better"])]
            counts += f", and {_counted(undecided)} have no error to compare with" if undecided else ""
            name = html.escape(model)
            items.append(f"<li><strong>{name}</strong>: of {len(rows)} judges{_KINDS[kind]}, {counts}.</li>")
    if not items:
        return ""
    return (
        f"<h2>Verdicts</h2><ul>{''.join(items)}</ul><p>By chance alone about one judge in twenty would find such a "
        "difference. Judges that share an explainer, a baseline or a metric are not independent of each other.</p>"
    )


def _counted(rows: Rows) -> str:
    """Return the number of rows, and how many there are of each metric."""
    metrics = Counter(row["metric"].replace("_", " ") for row in rows)
    listed = ", ".join(f"{metric}: {count}" for metric, count in metrics.items())
    return f"{len(rows)} ({listed})" if rows else "0"


_KINDS = {
    "explainer": " with an explainer that took no part in the training",
    "other": " with another baseline or metric than the training",
    "trained": " of the training",
    "unknown": "",
}


def _kind(row: Mapping[str, Any], comparison: Comparison) -> str:
    """Return the kind of a judge. One whose baseline or metric alone is new still sees the trained explainer."""
    if row["held_out"] is None:
        return "unknown"
    if not row["held_out"]:
        return "trained"
    trained_on = comparison.trained_on or frozenset()
    return "explainer" if row["explainer"] is not None and row["explainer"] not in trained_on else "other"


def _table(comparison: Comparison) -> str:
    heads = "".join(f"<th scope='col'>{html.escape(model)}</th>" for model in comparison.models)
    lines = []
    for judge in comparison.judges:
        mark = {True: "held out", False: "in the training", None: ""}[comparison.held_out(judge)]
        name = html.escape(str(judge._replace(metric=judge.metric.replace("_", " "))))
        cells = "".join(_cell(comparison.row(model, judge), comparison.reference) for model in comparison.models)
        lines.append(
            f"<tr><th scope='row'>{name} {better_arrow(judge.metric)}</th><td class='mark'>{mark}</td>{cells}</tr>"
        )
    return (
        "<h2>All judges</h2><p>↑ higher is better, ↓ lower is better. A coloured cell is a difference of more than "
        f"{_CLEAR} standard errors: blue is better, orange is worse.</p><div class='wide'><table><thead><tr>"
        f"<th scope='col'>judge</th><th></th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(row: Mapping[str, Any], reference: str) -> str:
    if row["model"] == reference:
        return f"<td>{with_error(row['value'], row['standard_error'])}</td>"
    kind = "better" if row["better"] > _CLEAR else "worse" if row["better"] < -_CLEAR else ""
    return f"<td class='{kind}'>{row['value']:.3f} <small>{change_text(row)}</small></td>"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; min-width: 40rem; background: white; padding: 0.5rem; box-sizing: border-box; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
tbody th { white-space: normal; min-width: 9rem; }
small { opacity: 0.75; }
.mark { font-size: 0.8rem; opacity: 0.75; }
.better { background: #56b4e955; }
.worse { background: #e69f0055; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0.25rem 1rem; }
dd { margin: 0; }
footer { margin-top: 2rem; opacity: 0.6; font-size: 0.85rem; }
"""
