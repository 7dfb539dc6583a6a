"""Random numbers on any device: where they are drawn; torch's global streams, noted, seeded and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


def source(device: torch.device, generator: Generator | None) -> torch.device:
    """Where to draw what is needed on a device: where the generator is, be it on the CPU; else there."""
    return device if generator is None else generator.device


def accelerators(device: torch.device) -> list[torch.device]:
    """All devices of a device's kind; none of the CPU's, nor of a kind whose streams torch does not tell (XLA)."""
    module = _module(device)
    if device.type == "cpu" or not hasattr(module, "get_rng_state"):
        return []
    if device.type == "mps":
        return [device]  # there is one
    return [torch.device(device.type, index) for index in range(module.device_count())]


def streams(devices: Sequence[torch.device]) -> list[Tensor]:
    """The states of torch's global streams: the CPU's, then those of accelerators."""
    return [torch.get_rng_state(), *(_module(device).get_rng_state(*_which(device)) for device in devices)]


def set_streams(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    """Puts back what `streams` returned for the same devices."""
    torch.set_rng_state(states[0])
    for state, device in zip(states[1:], devices, strict=True):
        _module(device).set_rng_state(state, *_which(device))


@contextmanager
def kept_streams(devices: Sequence[torch.device]) -> Iterator[None]:
    """Whatever is drawn inside, afterwards the streams are where they were."""
    states = streams(devices)
    try:
        yield
    finally:
        set_streams(states, devices)


@contextmanager
def seeded(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """Inside, the streams of the CPU and of all `accelerators` of a kind, NumPy's and Python's start from a seed."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with kept_streams(devices):
        torch.default_generator.manual_seed(seed)
        for kind in {device.type for device in devices}:
            if kind == "mps":
                torch.mps.manual_seed(seed)
            else:
                getattr(torch, kind).manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What a module's functions want to be told of the device."""
    return () if device.type == "mps" else (device,)
