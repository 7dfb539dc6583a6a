"""What all attributions share: their types, Captum's usage log, and what can be trained through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from captum.log import log_usage
from torch import Tensor

TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, ...])
"""Tensor in, tensor out; tuple in, tuple out."""

Method = TypeVar("Method", bound=Callable[..., Any])


def logged(method: Method) -> Method:
    """Logs calls as Captum's own attributions do; NoiseTunnel and others look for the ``__wrapped__`` it leaves."""
    return cast(Method, log_usage(part_of_slo=True)(method))


def require_trainable(explainer: Any) -> set[str]:
    """The names that ``explainer.attribute`` takes; TypeError where ``create_graph`` is not one of them."""
    names = set(inspect.signature(explainer.attribute).parameters)
    if "create_graph" not in names:
        name = type(explainer).__name__
        raise TypeError(
            f"{type(explainer).__module__}.{name} has no create_graph, so nothing can be trained through it: "
            f"import it with `from captum_idexpo.attr import {name}`."
        )
    return names
