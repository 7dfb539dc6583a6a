"""Random generators that a run draws from beside the global streams: found where they are held, noted, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

_Legacy = np.random.RandomState
_KINDS = (torch.Generator, np.random.Generator, _Legacy, random.Random)
_DRAWING = (
    *("sampler", "batch_sampler", "dataloader", "base_dataloader", "collate_fn"),
    *("dataset", "datasets", "transform", "transforms", "target_transform"),
)
"""Attributes of loaders and data sets that may hold a generator."""


def generators_of(*owners: Any) -> Iterator[Generator]:
    """The generators that loaders, samplers, data sets, modules and regularizers draw from, each once."""
    seen: set[int] = set()
    queue = list(owners)
    while queue:
        owner = queue.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, random.SystemRandom):
            continue  # which has no state
        if isinstance(owner, _KINDS):
            yield owner
        elif isinstance(owner, (list, tuple)):
            queue.extend(owner)
        elif owner is not None:
            queue.extend(value for name, value in getattr(owner, "__dict__", {}).items() if _may_draw(name, value))
            queue.extend(owner.children() if isinstance(owner, nn.Module) else [])
            queue.append(getattr(owner, "__self__", None))  # a bound method's
            explaining = getattr(owner, "_explaining", None)
            queue.append(None if explaining is None else explaining.arguments.get("generator"))


def _may_draw(name: str, value: Any) -> bool:
    return isinstance(value, _KINDS) or (
        name in _DRAWING and not (name == "dataset" and isinstance(value, (list, tuple)))
    )


def kind_of(generator: Generator) -> str:
    """A torch generator's device; of others "numpy" or "python"."""
    if isinstance(generator, torch.Generator):
        return generator.device.type
    return "python" if isinstance(generator, random.Random) else "numpy"


def state_of(generator: Generator) -> Any:
    """Where a generator is, in tensors, numbers and strings alone."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    own = generator.get_state(legacy=False) if isinstance(generator, _Legacy) else generator.bit_generator.state
    return _listed(own)


def set_state(generator: Generator, state: Any) -> None:
    """Puts a generator where `state_of` found it."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, _Legacy)):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _listed(state: Any) -> Any:
    """A state's arrays as lists, which load without running code."""
    if isinstance(state, dict):
        return {name: _listed(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state
