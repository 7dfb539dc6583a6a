"""Captum's usage log as a decorator that keeps a method's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from captum.log import log_usage

Method = TypeVar("Method", bound=Callable[..., Any])


def logged(method: Method) -> Method:
    """Logs calls as Captum's own attributions do; NoiseTunnel and others look for the ``__wrapped__`` it leaves."""
    return cast(Method, log_usage(part_of_slo=True)(method))
