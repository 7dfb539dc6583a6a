"""The measured times as ratios: lines to print, a Markdown table, a chart."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from models import SUBJECTS
from timing import Ratio

from captum_idexpo.visualization import COLORS


def machine(device: torch.device) -> str:
    """What was measured on, without its name."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__.split('+')[0]}"
    threads = torch.get_num_threads()
    return (
        f"shared {platform.machine()} cores, {threads} thread{'s' * (threads > 1)}, "
        f"PyTorch {torch.__version__.split('+')[0]}"
    )


def ratios(result: dict[str, Any]) -> dict[str, Ratio]:
    """Each contender's time over the first's."""
    seconds = result["seconds"]
    reference, *others = seconds
    return {name: Ratio.of(seconds[name], seconds[reference]) for name in others}


def lines(subject: str, job: str, result: dict[str, Any]) -> list[str]:
    """A job's ratios, one a line."""
    reference = next(iter(result["seconds"]))
    head = f"{subject}: {job} (times over {reference})"
    peaks = result.get("peak megabytes", {})
    return [head] + [
        f"  {name:20} {ratio.median:7.2f}   [{ratio.low:.2f} to {ratio.high:.2f}]"
        + (f"   {peaks[name]:.0f} MB" if name in peaks else "")
        for name, ratio in ratios(result).items()
    ]


def write(path: Path) -> None:
    """speed.md and speed.png beside speed.json."""
    results = json.loads(path.read_text())
    text = []
    for device, subjects in results.items():
        subjects = {name: subjects[name] for name in SUBJECTS if name in subjects}  # an older file may have others
        timed = {name: {job: r for job, r in jobs.items() if "seconds" in r} for name, jobs in subjects.items()}
        text += [f"### {_heading(device, subjects)}", "", *_table(timed), "", *_others(subjects), ""]
        _chart(timed, path.with_name("speed.png" if device == "cpu" else f"speed_{device}.png"))
    path.with_suffix(".md").write_text("\n".join(text))


def _heading(device: str, subjects: dict[str, Any]) -> str:
    stamps = {(r["machine"], r["date"]) for jobs in subjects.values() for r in jobs.values()}
    machines = sorted({machine for machine, _ in stamps})
    dates = sorted({date for _, date in stamps})
    return f"{'GPU' if device == 'cuda' else device.upper()}: {'; '.join(machines)}; {' and '.join(dates)}"


def _table(subjects: dict[str, dict[str, Any]]) -> list[str]:
    head = "| model | job | contender | time over the bare model | lowest to highest |"
    rows = [head, "| --- | --- | --- | --- | --- |"]
    for name, jobs in subjects.items():
        for job, result in jobs.items():
            reference = next(iter(result["seconds"]))
            of_other = "" if reference == "bare model" else f" (over {reference})"
            for contender, ratio in ratios(result).items():
                spread = f"{ratio.low:.2f} to {ratio.high:.2f}"
                title = SUBJECTS[name].title
                rows.append(f"| {title} | {job} | {contender} | **{ratio.median:.2f}**{of_other} | {spread} |")
    return rows


def _others(subjects: dict[str, dict[str, Any]]) -> list[str]:
    """Bounded memory, and how far the gradients of faster models agree."""
    text = []
    for job, result in subjects.get("resnet20", {}).items():
        for contender, rounds in result.get("bounded memory", {}).items():
            seconds = sorted(second for second, _ in rounds)[len(rounds) // 2]
            peak = max(peak for _, peak in rounds)
            text.append(f"* ResNet-20, {job}, {contender}: {seconds:.1f} s, {peak:.0f} MB over the model.")
        for name, cosine in result.get("gradient's cosine to float64", {}).items():
            text.append(f"* ResNet-20, gradient of ID-ExpO with Grad-CAM, {name}: cosine to float64's {cosine:.7f}.")
    return text


def _chart(subjects: dict[str, dict[str, Any]], path: Path) -> None:
    """Horizontal bars on a logarithmic axis, a panel a model."""
    panels = {name: jobs for name, jobs in subjects.items() if jobs}
    heights = [sum(len(ratios(result)) + 1 for result in jobs.values()) for jobs in panels.values()]
    figure = Figure(figsize=(9, 0.22 * sum(heights) + 1.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, jobs) in zip(axes, panels.items(), strict=True):
        labels, position = [], 0
        for job, result in jobs.items():
            for contender, ratio in ratios(result).items():
                foreign = contender in ("Captum", "Quantus", "loop over examples")
                axis.barh(position, ratio.median, color=COLORS[0 if foreign else 1])
                axis.plot([ratio.low, ratio.high], [position, position], color="black", linewidth=1)
                axis.text(ratio.high * 1.04, position, f"{ratio.median:.2f}", va="center", fontsize=7)
                labels.append((position, f"{job}: {contender}"))
                position += 1
            position += 1
        axis.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=7)
        axis.set(title=SUBJECTS[name].title, xscale="log")
        axis.axvline(1.0, color="grey", linewidth=1, linestyle="--")
        axis.margins(x=0.12)
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.invert_yaxis()
    axes[-1].set_xlabel("time over the bare model on as many rows")
    figure.savefig(path, dpi=110)
