"""Hooks that change the gradients of modules during one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, gradient with respect to its input, gradient with respect to its output) -> new gradient of its input."""


def change_gradient(module: nn.Module, rule: Rule, handles: list[Any]) -> None:
    """Apply a rule to the gradient of a module, until the handles are removed.

    The module's input and output are copied, so that two consecutive modules do not hook the same tensor. A module
    that works in place still writes into its caller's tensor. After the handles are removed, the backward pass of a
    loss is not changed.

    Args:
        module: a module that takes one tensor and returns one.
        rule: computes the new gradient.
        handles: the hooks' handles are appended here. Each call of the module appends the handles of tensor hooks.
    """
    calls: list[_Call] = []  # calls that have begun and not ended

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = _Call(arguments[0] if arguments else None)
        calls.append(call)
        if not isinstance(call.given, Tensor) or not call.given.requires_grad:
            return None
        call.entered = call.given.clone()

        def changed(gradient: Tensor) -> Tensor | None:
            return rule(module, gradient, call.of_output.pop()) if call.of_output else None

        handles.append(call.entered.register_hook(changed))
        return (call.entered, *arguments[1:])

    def leave(_module: nn.Module, _arguments: object, output: Any) -> Any:
        call = calls.pop()
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        handles.append(output.register_hook(call.of_output.append))
        if isinstance(call.given, Tensor) and output is call.entered:
            return call.given.copy_(output)
        return output.clone()

    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


class _Call:
    """A call of a module: its input, the copy of its input, and the gradient with respect to its output."""

    def __init__(self, given: object) -> None:
        self.given = given
        self.entered: Tensor | None = None
        self.of_output: list[Tensor] = []
