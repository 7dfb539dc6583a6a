"""Parts of a model that `torch.utils.checkpoint` runs: the backward pass computes them again, under its own conditions.

What held for the forward pass alone (a mode, another tensor in place of a layer's) is gone by then, and the gradient
would be another's, in silence.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import dropwhile, takewhile
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

_CHECKPOINT = "torch.utils.checkpoint"


@contextmanager
def refused_inside(modules: Iterable[nn.Module], why: str, *, output_only: bool = False) -> Iterator[None]:
    """Refuses modules inside a checkpointed part of a model.

    Args:
        modules: the modules.
        why: what is wrong with it and what to do, after the words that say that it is computed again.
        output_only: a module's output matters, not its input: the module may be the whole checkpointed part.

    Raises:
        RuntimeError: inside, one of the modules is called by `torch.utils.checkpoint`.
    """

    def refuse(module: nn.Module, _args: Any) -> None:
        if _is_inside(output_only):
            raise RuntimeError(
                f"{type(module).__name__} is run by {_CHECKPOINT}, which computes it again in the backward pass, {why}"
            )

    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_inside(output_only: bool) -> bool:
    """Whether the module whose hook asks is run by a checkpoint."""
    callers = _callers()
    if output_only:
        callers = dropwhile(lambda name: name == "torch.nn.modules.module", callers)
        callers = dropwhile(lambda name: name == _CHECKPOINT, callers)
    return _CHECKPOINT in callers


def _callers() -> Iterator[str]:
    """The names of the modules whose code has called a module with a hook, the nearest first."""
    frame: FrameType | None = sys._getframe(3)  # behind `_is_inside` and the hook
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module itself, without its submodules, computes something else in training mode."""
    if isinstance(module, torch.jit.ScriptModule):
        return False  # there is no Python in it that could be checkpointed
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if type(module).__module__.startswith("torch.nn.modules"):
        chance = getattr(module, "dropout", 0)
        return isinstance(module, nn.RReLU) or (isinstance(chance, (int, float)) and chance > 0)
    kind: Any = type(module)
    return _has_code_that_reads_mode(kind)


@functools.lru_cache(maxsize=1024)
def _has_code_that_reads_mode(kind: Any) -> bool:
    own = takewhile(lambda part: part is not nn.Module, kind.__mro__)
    functions = [inspect.unwrap(value) for part in own for value in vars(part).values() if callable(value)]
    return any(_reads_mode(function.__code__) for function in functions if inspect.isfunction(function))


def _reads_mode(code: CodeType) -> bool:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return "training" in code.co_names or any(map(_reads_mode, nested))
