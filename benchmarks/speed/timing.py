"""Interleaved timing: contenders take turns, so that a slow spell of the machine hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Contender = Callable[[], object]
_SECONDS = 0.1  # of a contender in a round, at least


@dataclass(frozen=True)
class Ratio:
    """A contender's time over the reference's, round by round: median, smallest, largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float], reference: list[float]) -> Ratio:
        """The paired ratios' median and range."""
        ratios = [a / b for a, b in zip(times, reference, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def interleaved(contenders: dict[str, Contender], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes in each round, after one round that is not counted.

    A short call is repeated: by itself it would be measured in caches that the collection of garbage, or the contender
    before, has filled with other things.
    """
    n_calls = {name: math.ceil(_SECONDS / _seconds(contender, 1, device)) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(_seconds(contender, n_calls[name], device))
    return times


def _seconds(contender: Contender, n_calls: int, device: torch.device) -> float:
    gc.collect()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(n_calls):
            contender()
        return (time.perf_counter() - start) / n_calls
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    for _ in range(n_calls):
        contender()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event)) / 1000 / n_calls


def peak_megabytes(contender: Contender, device: torch.device) -> float | None:
    """Memory that one call needs at most, beyond what was held before; None where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        contender()
        return float(torch.cuda.max_memory_allocated(device) - held) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew at what is resident now
    except OSError:
        return None
    held = _status_megabytes("VmRSS")
    contender()
    return _status_megabytes("VmHWM") - held


def _status_megabytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6
