"""The package's own exception and how what it speaks of is found; warnings that point at the user's line."""

from __future__ import annotations

import math
import sys
import warnings
from types import FrameType

from torch import Tensor

_NOT_THE_USERS = ("captum_idexpo", "captum", "torch", "accelerate", "contextlib")


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity where a number is needed: in inputs, in attributions, in a model's outputs or in a loss."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its sum tells, many times faster, unless that overflows."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def warn(message: str) -> None:
    """Warns at the line that calls into this package: by default Python shows a warning once for each line."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
