"""Parts of a model that `torch.utils.checkpoint` runs: the backward pass computes them again, under its own conditions.

What held for the forward pass alone (a mode, another tensor in place of a layer's) is gone by then, and the gradient
would be another's, in silence.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

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
    callers = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_stack(sys._getframe(2))]
    if output_only:
        callers = list(dropwhile(lambda name: name == "torch.nn.modules.module", callers))
        callers = list(dropwhile(lambda name: name == _CHECKPOINT, callers))
    return _CHECKPOINT in callers


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a module itself, without its submodules, computes something else in training mode."""
    if type(module).__module__.startswith("torch.nn.modules"):
        chance = getattr(module, "p", getattr(module, "dropout", 0))
        return isinstance(module, (_NormBase, nn.RReLU)) or (isinstance(chance, (int, float)) and chance > 0)
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names
