"""The one answer to "keep the graph": how an attribution of Captum is computed with a graph, or detached.

Captum's classes lose the graph in few ways, each of which is met once:

* gradients are taken inside without ``create_graph``: `InnerGradients` adds it to every inner `torch.autograd.grad`;
* bodies run under `torch.no_grad`: the classes here have bodies of their own that ask `keeps_graph`;
* layers are evaluated without gradients: `_trainable.ForwardFunction` enables them all the same;
* chunks of a path integral are detached (`gradients.InSteps`);
* hooks fire again in the backward pass: `_hooks.change_gradient` sets hooks that leave nothing behind.
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
"""inputs -> attribution: a tensor, or tuples and lists of them."""

_outer: ContextVar[InnerGradients | None] = ContextVar("_outer", default=None)


class InnerGradients(TorchFunctionMode):
    """While active, gradients that attributions take keep their graph; those a forward function takes are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.made_leaves: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes everything on, gradients with ``create_graph=True``."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad and _called_by_captum():
            self.outputs.extend(_tensors(args[0]))
            return func(*args, **{**kwargs, "create_graph": True})
        if func is Tensor.requires_grad_ and not args[0].requires_grad:
            self.made_leaves.append(args[0])
        return func(*args, **kwargs)

    def anchor(self, attribution: Any) -> Tensor | None:
        """An output, or a part of the attribution, that something trainable reaches; None if there is none."""
        candidates = [*self.outputs, *_tensors(attribution)]
        return next((tensor for tensor in candidates if depends_on_leaf(tensor, except_for=self.made_leaves)), None)


@contextmanager
def on_its_own() -> Iterator[None]:
    """Inside, attributions are nobody's part: those that a model's forward function asks for, for example."""
    token = _outer.set(None)
    try:
        yield
    finally:
        _outer.reset(token)


def keeps_graph() -> bool:
    """Whether the attribution that is being computed, or the one that it is a part of, is to have a graph."""
    return _outer.get() is not None


def note_output(output: Tensor) -> None:
    """Tells what is being computed of an output, which may turn out to have no part in the attribution."""
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
) -> Any:
    """An attribution that takes gradients inside, attached to the graph of the model's parameters or detached.

    Args:
        explainer: the attribution, for its name and its forward function.
        compute: what computes it.
        inputs: the user's; neither their ``requires_grad`` nor their ``grad`` is touched.
        create_graph: attach or detach.
        of_inputs: gradients are taken with respect to these very inputs.
        with_delta: the attribution is followed by its convergence delta, a figure to look at, always detached.

    Raises:
        RuntimeError: create_graph where no graph can exist; under `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{type(explainer).__name__} takes gradients inside, which torch.inference_mode() forbids: use "
            "torch.no_grad() instead."
        )
    if keeps_graph():  # a part of another attribution, which sees to the graph of all
        return compute(_copies(inputs, of_inputs))
    if not create_graph:
        with no_weights_left():  # parts of it may be computed under torch.no_grad
            return _map(compute(_copies(inputs, of_inputs, detached=True)), Tensor.detach)
    computed = _with_graph(explainer, lambda given: compute(_copies(given, of_inputs)), inputs)
    if with_delta:
        attribution, delta = computed
        return attribution, delta.detach()
    return computed


def by_outputs(explainer: Attribution, compute: Computation, inputs: Tensors, create_graph: bool) -> Any:
    """An attribution made of outputs alone, attached to the graph of the model's parameters or detached.

    `compute` runs with gradients enabled or disabled accordingly. Arguments and errors as for `by_gradients`.
    """

    def of_copies(inputs: Tensors) -> Any:
        return compute(_copies(inputs, require_gradient=False))

    if keeps_graph():
        with torch.enable_grad():
            return of_copies(inputs)
    if not create_graph:
        with no_graph():
            return of_copies(inputs)
    return _with_graph(explainer, of_copies, inputs)


def _with_graph(explainer: Attribution, compute: Computation, inputs: Tensors) -> Any:
    """What `compute` gives with everything it takes on the way keeping its graph; RuntimeError where there is none."""
    name = type(explainer).__name__
    require_gradients_enabled(name)
    with _keeping() as inner, twice_differentiable(explainer):
        computed = compute(inputs)
    anchor = inner.anchor(computed)
    if anchor is None:
        raise no_graph_error(name)
    return _attached(computed, anchor)


@contextmanager
def twice_differentiable(explainer: Attribution) -> Iterator[None]:
    """Chooses kernels with a double backward: the mathematical one of attention; not cuDNN's of recurrent layers."""
    modules = (module_of(explainer.forward_func), getattr(explainer, "layer", None))
    recurrent = any(
        isinstance(part, nn.RNNBase) for module in modules if isinstance(module, nn.Module) for part in module.modules()
    )
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), without_cudnn:
        yield


def asks_for_graph(create_graph: bool, grad_kwargs: dict[str, Any] | None) -> bool:
    """Whether a graph is asked for in our spelling or in Captum's, ``grad_kwargs={"create_graph": True}``."""
    return create_graph or bool((grad_kwargs or {}).get("create_graph"))


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


@contextmanager
def _keeping() -> Iterator[InnerGradients]:
    inner = InnerGradients()
    token = _outer.set(inner)
    try:
        with inner:
            yield inner
    finally:
        _outer.reset(token)


def _copies(inputs: Tensors, require_gradient: bool, detached: bool = False) -> Any:
    """Return the same values as new tensors.

    Captum switches ``requires_grad`` of the tensors that it is given, and a forward function may write into them.
    """
    copies: dict[int, Tensor] = {}  # a tensor given twice is one tensor, whose gradient is the sum

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) in copies:
            return copies[id(tensor)]
        if tensor.requires_grad and not detached:
            new = tensor.clone()
        else:
            new = tensor.detach().clone()  # no inference tensor any more, in which there are no gradients
            can_require = new.is_floating_point() or new.is_complex()
            new = new.requires_grad_() if require_gradient and can_require else new
        copies[id(tensor)] = new
        return new

    return _map(inputs, copy)


def _attached(attribution: Any, anchor: Tensor) -> Any:
    """The same values, attached with a zero gradient where nothing trainable moves them (a linear model's slope)."""

    def attach(tensor: Tensor) -> Tensor:
        if tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        nowhere = torch.zeros((), dtype=torch.bool, device=tensor.device)
        return torch.where(nowhere, anchor.sum().to(tensor), tensor)

    return _map(attribution, attach)


def _map(values: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, tuple):  # named or not, as in Captum
        return tuple(_map(value, function) for value in values)
    return [_map(value, function) for value in values] if isinstance(values, list) else values


def _called_by_captum() -> bool:
    """Return True if torch was called by Captum itself, not by a model in between."""
    packages = (name.partition(".")[0] for name in calling_modules()[1:])  # behind the mode's own function
    return next((package for package in packages if package != "torch"), None) == "captum"


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(values, found.append)
    return found
