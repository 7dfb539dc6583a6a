"""Attributions that change the backward pass by hooks: once, for the inner gradient, never again for the loss's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Explainer = TypeVar("Explainer", bound="HookedOnce")


class HookedOnce:
    """An explainer whose backward hooks act during its own call only.

    Captum removes its hooks from the modules; those on tensors stay in the graph, where they would fire again in the
    backward pass of a loss and change its gradient, too. Here they belong to a copy of the explainer that lives for
    one call, and rest when that is over.
    """

    _active = False

    @contextmanager
    def for_one_call(self: Explainer) -> Iterator[Explainer]:
        """A copy of this explainer, active inside; Captum's note that it sets hooks, and removes them, is left out."""
        explainer = copy.copy(self)
        explainer._active = True
        explainer._forget()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"\s*Setting (forward, )?backward hooks")
                yield explainer
        finally:
            explainer._active = False
            explainer._forget()

    def _forget(self) -> None:
        """Starts without handles and values of another call."""
        raise NotImplementedError

    def _backward_hook(self, module: Any, grad_input: Any, grad_output: Any) -> Any:
        """Captum's change of a gradient, while active."""
        return super()._backward_hook(module, grad_input, grad_output) if self._active else None  # type: ignore[misc]
