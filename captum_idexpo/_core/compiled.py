"""Models that torch.compile made: where they are, and how to call them without compiling them again.

A compiled model is compiled once more for each new kind of call: without gradients, with rows that require gradient,
with rows that are views, with another number of rows. After eight times PyTorch runs it eagerly, and
says so only in its log.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ONE_THREAD = threading.RLock()


def is_compiled(module: nn.Module) -> bool:
    """Return True if torch.compile made the module, or if its own `compile` method has been called."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def has_compiled_parts(*models: nn.Module | None) -> bool:
    """Return True if a model, or a module inside it, is compiled."""
    return any(is_compiled(module) for model in models if model is not None for module in model.modules())


def original(module: nn.Module) -> nn.Module:
    """Return the module that was given to torch.compile; the module itself if none was."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def can_run_eagerly() -> bool:
    """Return True if this PyTorch (2.6 or later) can run a compiled model without its compiled code."""
    return hasattr(torch.compiler, "set_stance")


@contextmanager
def eagerly(*models: nn.Module | None) -> Iterator[None]:
    """Run compiled models inside without their compiled code, for a few rows that are only looked at.

    Nothing is compiled, and hooks see all layers. With an older PyTorch nothing changes. The stance is that of all
    threads, so that one thread has to be done before the next.
    """
    if not (can_run_eagerly() and has_compiled_parts(*models)):
        yield
        return
    stance: Any = torch.compiler.set_stance  # its types are those of a decorator
    with _ONE_THREAD, warnings.catch_warnings(), stance("force_eager"):
        # PyTorch warns of hooks for all modules, which `look` sets. They do no harm to code that runs eagerly.
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        yield
