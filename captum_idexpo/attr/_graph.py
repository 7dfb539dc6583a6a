"""Compute an attribution of Captum with a graph, or detached.

Captum's classes lose the graph in these ways. Each has one remedy:

* They take gradients without ``create_graph``. `InnerGradients` adds it to every inner `torch.autograd.grad`.
* Their methods run under `torch.no_grad`. The classes of this package have their own methods, which call `keeps_graph`.
* They evaluate layers without gradients. `_trainable.ForwardFunction` enables gradients.
* They detach the chunks of a path integral. `gradients.InSteps` keeps the graph of each chunk.
* Their hooks fire again in the backward pass of a loss. `_hooks.change_gradient` sets hooks that can be removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from captum_idexpo._core.errors import calling_modules
from captum_idexpo._core.inputs import Tensors
from captum_idexpo._core.memory import leaves_of
from captum_idexpo._core.modes import module_of, no_graph, no_weights_left

Computation = Callable[[Any], Any]
"""inputs -> attribution: a tensor, or tuples and lists of tensors."""

_outer: ContextVar[InnerGradients | None] = ContextVar("_outer", default=None)


class InnerGradients(TorchFunctionMode):
    """A mode in which gradients that Captum takes keep their graph.

    Gradients that the model or the forward function takes are not changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.made_leaves: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; add ``create_graph=True`` if Captum calls `torch.autograd.grad`."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad and _called_by_captum():
            self.outputs.extend(_tensors(args[0]))
            return func(*args, **{**kwargs, "create_graph": True})
        if func is Tensor.requires_grad_ and not args[0].requires_grad:
            self.made_leaves.append(args[0])
        return func(*args, **kwargs)

    def anchor(self, attribution: Any) -> Tensor | None:
        """Return an output, or a tensor of the attribution, that depends on a trainable leaf; None if there is none."""
        candidates = [*self.outputs, *_tensors(attribution)]
        return next((tensor for tensor in candidates if depends_on_leaf(tensor, except_for=self.made_leaves)), None)


@contextmanager
def on_its_own() -> Iterator[None]:
    """Treat attributions inside as independent calls, not as parts of another attribution.

    Example: a model's forward function that computes an attribution itself.
    """
    token = _outer.set(None)
    try:
        yield
    finally:
        _outer.reset(token)


def keeps_graph() -> bool:
    """Return True if the attribution being computed, or the one that it is a part of, must have a graph."""
    return _outer.get() is not None


def note_output(output: Tensor) -> None:
    """Record an output as a candidate for the anchor of the graph.

    The attribution may not depend on this output.
    """
    outer = _outer.get()
    if outer is not None:
        outer.outputs.append(output)


def by_gradients(
    explainer: Attribution,
    compute: Computation,
    inputs: Tensors,
    create_graph: bool,
    *,
    of_inputs: bool = False,
    with_delta: bool = False,
    made_leaves: list[Tensor] | None = None,
) -> Any:
    """Return an attribution that takes gradients, attached to the graph of the model's parameters or detached.

    Args:
        explainer: the attribution. Its name and its forward function are used.
        compute: computes the attribution of inputs.
        inputs: the user's inputs. Their ``requires_grad`` and ``grad`` are not changed.
        create_graph: attach the attribution to the graph; else detach it.
        of_inputs: gradients are taken with respect to the inputs themselves.
        with_delta: `compute` returns a pair of the attribution and the convergence delta. The delta is detached.
        made_leaves: a list to put the leaves into that the attribution makes itself, to take gradients with respect to
            them.

    Raises:
        RuntimeError: create_graph where no graph can exist; under `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{type(explainer).__name__} takes gradients inside, which torch.inference_mode() forbids: use "
            "torch.no_grad() instead. Lightning's Trainer(inference_mode=False) validates and tests under no_grad."
        )
    if keeps_graph():  # this is a part of another attribution, which attaches the result to the graph
        return compute(_copies(inputs, of_inputs))
    if not create_graph:
        with no_weights_left():  # parts of the attribution may be computed under torch.no_grad
            return _map(compute(_copies(inputs, of_inputs, detached=True)), Tensor.detach)
    computed = _with_graph(
        explainer, lambda given: compute(_copies(given, of_inputs)), inputs, gradients=True, made_leaves=made_leaves
    )
    if with_delta:
        attribution, delta = computed
        return attribution, delta.detach()
    return computed


def by_outputs(explainer: Attribution, compute: Computation, inputs: Tensors, create_graph: bool) -> Any:
    """Return an attribution made of outputs alone, attached to the graph of the model's parameters or detached.

    `compute` runs with gradients enabled if a graph is needed, else disabled. For the arguments see `by_gradients`.

    Raises:
        RuntimeError: create_graph where no graph can exist.
    """

    def of_copies(inputs: Tensors) -> Any:
        return compute(_copies(inputs, require_gradient=False))

    if keeps_graph():
        with torch.enable_grad():
            return of_copies(inputs)
    if not create_graph:
        with no_graph():
            return of_copies(inputs)
    return _with_graph(explainer, of_copies, inputs, gradients=False)


def _with_graph(
    explainer: Attribution,
    compute: Computation,
    inputs: Tensors,
    *,
    gradients: bool,
    made_leaves: list[Tensor] | None = None,
) -> Any:
    """Return the result of `compute` with its graph; raise RuntimeError if there is no graph."""
    name = type(explainer).__name__
    require_gradients_enabled(name)
    with _keeping(gradients) as inner, twice_differentiable(explainer):
        computed = compute(inputs)
    if made_leaves is not None:
        made_leaves[:] = inner.made_leaves
    anchor = inner.anchor(computed)
    if anchor is None:
        raise no_graph_error(name)
    return _attached(computed, anchor)


@contextmanager
def twice_differentiable(explainer: Attribution) -> Iterator[None]:
    """Choose kernels that have a double backward: math attention, and recurrent layers without cuDNN."""
    modules = (module_of(explainer.forward_func), getattr(explainer, "layer", None))
    recurrent = any(
        isinstance(part, nn.RNNBase) for module in modules if isinstance(module, nn.Module) for part in module.modules()
    )
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), without_cudnn:
        yield


def asks_for_graph(create_graph: bool, grad_kwargs: dict[str, Any] | None) -> bool:
    """Return True if ``create_graph`` or Captum's ``grad_kwargs={"create_graph": True}`` asks for a graph."""
    return create_graph or bool((grad_kwargs or {}).get("create_graph"))


def require_gradients_enabled(name: str) -> None:
    """Raise RuntimeError under `torch.inference_mode` or `torch.no_grad`, where no graph is kept."""
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
    """Return the error for an output that depends on nothing that requires gradient."""
    return RuntimeError(
        f"{name}.attribute(create_graph=True): the forward function's output depends on nothing that requires "
        "gradient, so the attribution can have no graph. Unfreeze a parameter (`model.requires_grad_(True)`), pass "
        "inputs that require gradient, and check that the forward function neither detaches nor runs under no_grad."
    )


def depends_on_leaf(tensor: Tensor, *, except_for: list[Tensor]) -> bool:
    """Return True if a tensor's graph reaches a leaf that is not in ``except_for``."""
    return any(all(leaf is not other for other in except_for) for leaf in leaves_of(tensor))


@contextmanager
def _keeping(gradients: bool) -> Iterator[InnerGradients]:
    """Have the attributions inside keep their graph, and the gradients that are taken inside, if there are any."""
    inner = InnerGradients()
    token = _outer.set(inner)
    try:
        with inner if gradients else nullcontext():
            yield inner
    finally:
        _outer.reset(token)


def _copies(inputs: Tensors, require_gradient: bool, detached: bool = False) -> Any:
    """Return the inputs' values as new tensors.

    Captum changes ``requires_grad`` of its inputs, and a forward function may write into them.
    """
    # A tensor that is passed twice gets one copy, so that its gradient is the sum over both uses.
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) in copies:
            return copies[id(tensor)]
        if tensor.requires_grad and not detached:
            new = tensor.clone()
        else:
            new = tensor.detach().clone()  # a copy of an inference tensor is a normal tensor, which can have gradients
            can_require = new.is_floating_point() or new.is_complex()
            new = new.requires_grad_() if require_gradient and can_require else new
        copies[id(tensor)] = new
        return new

    return _map(inputs, copy)


def _attached(attribution: Any, anchor: Tensor) -> Any:
    """Return the same values; attach tensors without a graph to the anchor, with gradient zero.

    Example: the slope of a linear model does not depend on the inputs.
    """

    def attach(tensor: Tensor) -> Tensor:
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        nowhere = torch.zeros((), dtype=torch.bool, device=tensor.device)
        return torch.where(nowhere, anchor.sum().to(tensor), tensor)

    return _map(attribution, attach)


def _map(values: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, tuple):  # a named tuple becomes a plain one, as in Captum
        return tuple(_map(value, function) for value in values)
    return [_map(value, function) for value in values] if isinstance(values, list) else values


def _called_by_captum() -> bool:
    """Return True if Captum called torch directly, not through a model."""
    packages = (name.partition(".")[0] for name in calling_modules()[1:])  # the first is this mode's own function
    return next((package for package in packages if package != "torch"), None) == "captum"


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(values, found.append)
    return found
