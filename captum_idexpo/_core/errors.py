"""The package's exceptions, the checks for NaN and infinity, and warnings that point at the caller's line."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from types import FrameType

from torch import Tensor

NAN_OF_MASKED_ROWS = (
    " If the model ignores padding: attention over a row of nothing but padding is NaN, so its padding mask has to "
    "leave out one token, such as the first."
)
"""What to do about the commonest NaN on masked inputs."""

_NOT_THE_USERS = ("captum_idexpo", "captum", "torch", "accelerate", "contextlib")


class NonFiniteError(FloatingPointError, ValueError):
    """Error for NaN or infinity in inputs, in attributions, in a model's outputs or in a loss."""


class InputError(ValueError, AssertionError, IndexError, RuntimeError):
    """Error for arguments that do not fit each other: a `ValueError`.

    Captum raises one of the other three types for the same mistake, depending on the class. Code written for Captum
    that catches one of them also catches this error.
    """


class InputTypeError(InputError, TypeError):
    """Error for an argument of a type that is not accepted: a `TypeError`, and the types of `InputError`."""


for _error in (NonFiniteError, InputError, InputTypeError):
    _error.__module__ = "captum_idexpo"  # users import it from there, and tracebacks show it


def all_finite(value: Tensor | float) -> bool:
    """Return True if a number, or a tensor, holds neither NaN nor infinity."""
    if not isinstance(value, Tensor):
        return math.isfinite(value)
    # A finite sum proves it, many times faster than a check of each value. Finite values may have an infinite sum.
    return math.isfinite(value.sum().item()) or bool(value.isfinite().all())


def calling_modules() -> list[str]:
    """Return the names of the modules on the call stack, the nearest first, without this function's caller."""
    frame: FrameType | None = sys._getframe(2)
    names = []
    while frame is not None:
        names.append(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    return names


def warn(message: str) -> None:
    """Warn at the line that calls this package, since Python shows a warning once per line by default."""
    inside = itertools.takewhile(lambda name: name.partition(".")[0] in _NOT_THE_USERS, calling_modules())
    warnings.warn(message, stacklevel=2 + len(list(inside)))
