"""Random numbers on any device, for any number of processes; all saving, seeding and restoring of random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Generator, Tensor

from captum_idexpo._core.errors import warn

AnyGenerator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
Drawn = TypeVar("Drawn")

# --- where numbers are drawn -----------------------------------------------------------------------------------------

_is_share: ContextVar[bool] = ContextVar("_is_share", default=False)


def source(device: torch.device, generator: Generator | None) -> torch.device:
    """Return where to draw what is needed on a device: at the generator, which may be on the CPU."""
    return device if generator is None else generator.device


@contextmanager
def share_of_batch() -> Iterator[None]:
    """Inside, the batch at hand is this process's share of a larger one."""
    token = _is_share.set(True)
    try:
        yield
    finally:
        _is_share.reset(token)


def drawn_for(n_examples: int, draw: Callable[[int], Drawn]) -> Drawn:
    """Return what ``draw(n)`` draws for the examples of this process.

    Each process draws the numbers of the whole batch and keeps those of its own examples. So what is drawn for an
    example does not depend on the number of processes, as long as their generators are in the same state. Shares are
    equal parts of the batch, in the order of ranks.

    Args:
        n_examples: examples of this process.
        draw: draws tensors (or a tuple of tensors and None) with one entry per example.
    """
    parallel = _is_share.get() and torch.distributed.is_available() and torch.distributed.is_initialized()
    if not parallel:
        return draw(n_examples)
    rank, n_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    drawn: Any = draw(n_examples * n_processes)
    own = slice(rank * n_examples, (rank + 1) * n_examples)
    if isinstance(drawn, tuple):
        return cast(Drawn, tuple(None if part is None else part[own] for part in drawn))
    return cast(Drawn, drawn[own])


# --- torch's global streams ------------------------------------------------------------------------------------------


def accelerators(device: torch.device) -> list[torch.device]:
    """Return all devices of a device's kind; none for the CPU, or for a kind whose random state torch hides (XLA)."""
    module = _module(device)
    if device.type == "cpu" or not hasattr(module, "get_rng_state"):
        return []
    if device.type == "mps":
        return [device]  # there is one
    return [torch.device(device.type, index) for index in range(module.device_count())]


def streams(devices: Sequence[torch.device]) -> list[Tensor]:
    """Return the states of torch's global streams: that of the CPU, then those of accelerators."""
    return [torch.get_rng_state(), *(_module(device).get_rng_state(*_which(device)) for device in devices)]


def set_streams(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    """Put back what `streams` returned for the same devices."""
    torch.set_rng_state(states[0])
    for state, device in zip(states[1:], devices, strict=True):
        _module(device).set_rng_state(state, *_which(device))


@contextmanager
def kept_streams(devices: Sequence[torch.device]) -> Iterator[None]:
    """Put torch's global streams back afterwards."""
    states = streams(devices)
    try:
        yield
    finally:
        set_streams(states, devices)


def _module(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Return the device argument of torch.*.get_rng_state: none on MPS."""
    return () if device.type == "mps" else (device,)


# --- all streams of a process ----------------------------------------------------------------------------------------


def random_state(device: torch.device, generators: Iterable[AnyGenerator] = ()) -> dict[str, Any]:
    """Return the random state of this process: of Python, NumPy, torch on the CPU and its devices, and generators.

    It consists of tensors, numbers, strings and lists, which load without running code.
    """
    return {
        "python": _state_of(cast(random.Random, random)),
        "numpy": _listed(np.random.get_state(legacy=False)),
        "torch": [device.type, streams(accelerators(device))],
        "generators": [[_kind_of(generator), _state_of(generator)] for generator in generators],
    }


def set_random_state(state: dict[str, Any], device: torch.device, generators: Iterable[AnyGenerator] = ()) -> None:
    """Put back what `random_state` returned, and warn about streams that cannot be put back."""
    _set_state(cast(random.Random, random), state["python"])
    np.random.set_state(state["numpy"])
    kind, states = state["torch"]
    devices = accelerators(device)[: len(states) - 1] if device.type == kind else []
    set_streams(states[: 1 + len(devices)], devices)
    generators = list(generators)
    if len(generators) != len(state["generators"]):
        warn(
            f"The checkpoint's run drew from {len(state['generators'])} generators, this one knows {len(generators)}: "
            "some continue from another state, and the run does not end as it would have.",
        )
    kinds = {(kind, device.type)}
    for generator, (kind, own) in zip(generators, state["generators"], strict=False):
        kinds.add((kind, _kind_of(generator)))
        if _kind_of(generator) == kind:
            _set_state(generator, own)
    for kind, here in kinds:
        if kind != here:
            warn(
                f"The checkpoint's run drew random numbers on {kind}, this one draws them on {here}: they continue "
                "from another state, and the run does not end as it would have.",
            )


@contextmanager
def seeded(seed: int, device: torch.device, generators: Iterable[Generator] = ()) -> Iterator[None]:
    """Inside, all global streams start from a seed and generators from their own; afterwards all are put back."""
    generators = list(generators)
    state = random_state(device, generators)
    torch.default_generator.manual_seed(seed)
    if accelerators(device):
        module = _module(device)
        seed_all = module.manual_seed if device.type == "mps" else module.manual_seed_all
        seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in generators:
        generator.manual_seed(generator.initial_seed())
    try:
        yield
    finally:
        set_random_state(state, device, generators)


def _kind_of(generator: AnyGenerator) -> str:
    """Return the device of a torch generator; of others "numpy" or "python"."""
    if isinstance(generator, torch.Generator):
        return generator.device.type
    return "python" if isinstance(generator, random.Random) else "numpy"


def _state_of(generator: AnyGenerator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _listed(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _listed(generator.get_state(legacy=False))
    version, internal, gauss_next = generator.getstate()
    return [version, list(internal), gauss_next]


def _set_state(generator: AnyGenerator, state: Any) -> None:
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        version, internal, gauss_next = state
        generator.setstate((version, tuple(internal), gauss_next))


def _listed(state: Any) -> Any:
    """Return a state with lists in place of arrays."""
    if isinstance(state, dict):
        return {name: _listed(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state
