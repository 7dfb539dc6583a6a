"""Random numbers on any device: where they are drawn, and torch's global streams, noted and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor


def source(device: torch.device, generator: Generator | None) -> torch.device:
    """Where to draw what is needed on a device: where the generator is, be it on the CPU; else there."""
    return device if generator is None else generator.device


def accelerators(device: torch.device) -> list[torch.device]:
    """All devices of a device's kind, which `torch.manual_seed` seeds together; none of the CPU's."""
    if device.type == "cpu":
        return []
    return [torch.device(device.type, index) for index in range(torch.get_device_module(device).device_count())]


def streams(devices: Sequence[torch.device]) -> list[Tensor]:
    """The states of torch's global streams: the CPU's, then those of accelerators."""
    return [torch.get_rng_state(), *(module.get_rng_state(*which) for module, which in map(_module, devices))]


def set_streams(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    """Puts back what `streams` returned for the same devices."""
    torch.set_rng_state(states[0])
    for state, (module, which) in zip(states[1:], map(_module, devices), strict=True):
        module.set_rng_state(state, *which)


@contextmanager
def kept_streams(devices: Sequence[torch.device]) -> Iterator[None]:
    """Whatever is drawn or seeded inside, afterwards the streams are where they were."""
    states = streams(devices)
    try:
        yield
    finally:
        set_streams(states, devices)


def _module(device: torch.device) -> tuple[Any, tuple[torch.device, ...]]:
    """A device's module in torch, and what its functions want to be told of the device; MPS knows only one."""
    return torch.get_device_module(device), () if device.type == "mps" else (device,)
