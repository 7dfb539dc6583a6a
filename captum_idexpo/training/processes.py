"""Failing together: where one process meets NaN, all of them stop, instead of waiting for it in the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from captum_idexpo._core.errors import NonFiniteError

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Raises a process's `NonFiniteError` in every process, after all of them have come this far."""
    error: NonFiniteError | None = None
    try:
        yield
    except NonFiniteError as own:
        error = own
    if accelerator.num_processes > 1:
        failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device))
        if float(failed) and error is None:
            error = NonFiniteError("Another process met NaN or infinity; its message says where.")
    if error is not None:
        raise error
