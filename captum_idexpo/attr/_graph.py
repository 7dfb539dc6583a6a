"""Where an attribution with a graph can be seen to be impossible, and the errors that say so."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_idexpo._recomputation import leaves_of


def require_gradients_enabled(name: str) -> None:
    """Raises where the ambient mode would cut the graph of everything computed."""
    mode = None
    if torch.is_inference_mode_enabled():
        mode = "torch.inference_mode()"
    elif not torch.is_grad_enabled():
        mode = "torch.no_grad()"
    if mode:
        raise RuntimeError(
            f"{name}.attribute(create_graph=True) was called under {mode}, where no graph is kept: call it outside, "
            "under torch.enable_grad(), or with create_graph=False."
        )


def no_graph_error(name: str) -> RuntimeError:
    """The error for an output that depends on nothing which requires gradient."""
    return RuntimeError(
        f"{name}.attribute(create_graph=True): the forward function's output depends on nothing that requires "
        "gradient, so the attribution can have no graph. Unfreeze a parameter (`model.requires_grad_(True)`), pass "
        "inputs that require gradient, and check that the forward function neither detaches nor runs under no_grad."
    )


def depends_on_leaf(tensor: Tensor, *, except_for: list[Tensor]) -> bool:
    """Whether a tensor's graph reaches a leaf other than those given."""
    return any(all(leaf is not other for other in except_for) for leaf in leaves_of(tensor))
