"""The package's own exception, and how what it speaks of is found."""

import math

from torch import Tensor


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity where a number is needed: in inputs, in attributions, in a model's outputs or in a loss."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its sum tells, many times faster, unless that overflows."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())
