"""Rules that change the gradients of modules during one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, gradient with respect to its input, that with respect to its output) -> the input's changed gradient."""


def change_gradient(module: nn.Module, rule: Rule, handles: list[Any]) -> None:
    """Let a rule change the gradient of a module, until the handles are removed.

    The module's input is copied, so that the rule changes the gradient on the way through the module alone. Another
    module that has this one's output as its input gets a copy, too, so rules of modules that follow each other do not
    meet in one tensor. Removed handles leave nothing in the graph: the backward pass of a loss is not changed.

    Args:
        module: takes one tensor and returns one.
        rule: changes its gradient.
        handles: gets the hooks' handles, those of tensors among them, when the module is called.
    """
    calls: list[list[Tensor]] = []  # of the module that have begun, with the gradient of each one's output

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        of_output: list[Tensor] = []
        calls.append(of_output)
        if not arguments or not isinstance(arguments[0], Tensor) or not arguments[0].requires_grad:
            return None
        entered = arguments[0].clone()

        def changed(gradient: Tensor) -> Tensor | None:
            return rule(module, gradient, of_output.pop()) if of_output else None

        handles.append(entered.register_hook(changed))
        return (entered, *arguments[1:])

    def leave(_module: nn.Module, _arguments: Any, output: Any) -> None:
        of_output = calls.pop()
        if isinstance(output, Tensor) and output.requires_grad:
            handles.append(output.register_hook(of_output.append))

    handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
