"""What all attributions share: their types, Captum's usage log, and what can be trained through."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from captum.log import log_usage
from torch import Tensor

from captum_idexpo.attr._graph import on_its_own

TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, ...])
"""Tensor in, tensor out; tuple in, tuple out."""

Method = TypeVar("Method", bound=Callable[..., Any])


def logged(method: Method) -> Method:
    """A public ``attribute``: logs calls as Captum's own do, and computes on its own whatever is being computed.

    What is part of another attribution is called through the ``__wrapped__`` that this leaves, as Captum does.
    """
    log: Any = log_usage(part_of_slo=True)(method)

    @functools.wraps(method)
    def attribute(*args: Any, **kwargs: Any) -> Any:
        with on_its_own():
            return log(*args, **kwargs)

    return cast(Method, attribute)


def part(explainer: type) -> Callable[..., Any]:
    """The ``attribute`` of a class as a part of another attribution: (explainer, inputs, ...) -> attribution."""
    attribute: Callable[..., Any] = explainer.attribute.__wrapped__  # type: ignore[attr-defined]
    return attribute


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
