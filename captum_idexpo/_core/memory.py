"""Gradients in bounded memory: outputs are computed without a graph, and in the backward pass again with one.

The backward pass evaluates one chunk at a time. It takes the loss's gradient with respect to the outputs back through
the chunk and then frees the chunk's activations. Both evaluations run under the same conditions, so the gradient equals
that of a graph kept as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_idexpo._core.compiled import eagerly, is_compiled
from captum_idexpo._core.modes import copied_buffers, no_graph, precision, put_back
from captum_idexpo._core.rng import accelerators, kept_streams, set_streams, streams

Chunk = tuple[slice, slice]
"""(examples, copies)"""
Evaluate = Callable[[Chunk, Sequence[Tensor]], Tensor]
"""(chunk, the tensors that its copies are made of) -> one value per row."""


class MemoryBudget:
    """Bytes of activations that the graphs of one training step may hold until its backward pass.

    Several evaluations (explainer, insertion, deletion) share one budget. An evaluation keeps its graph if this takes
    at most half of what is left. A larger evaluation keeps no graph; its chunks are small enough for the second pass.

    Args:
        n_bytes: the budget. A chunk has at least one row, even if that row's activations exceed the budget.
        models: modules that the forward function may use without calling them. Modules that it calls are found
            automatically.

    Raises:
        ValueError: the budget is not positive.
    """

    def __init__(self, n_bytes: float, *models: nn.Module | None) -> None:
        if not n_bytes > 0:
            raise ValueError(f"memory_budget must be a positive number of bytes, or None; given: {n_bytes}.")
        self._left = n_bytes
        self._bytes_per_row = 0.0
        self._models = models
        self._modules = [module for model in models if model is not None for module in model.modules()]
        parameters = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
        self._leaves: dict[int, Tensor] = {id(parameter): parameter for parameter in parameters}

    @classmethod
    def of(cls, budget: float | MemoryBudget | None, graph: bool, *models: nn.Module | None) -> MemoryBudget | None:
        """Return the budget of a ``memory_budget`` argument; None if there is no bound or no graph."""
        if budget is None:
            return None
        formed = budget if isinstance(budget, MemoryBudget) else cls(budget, *models)
        return formed if graph else None

    def look(
        self, evaluate: Evaluate, chunk: Chunk, through: Sequence[Tensor], made_leaves: Sequence[Tensor] = ()
    ) -> None:
        """Evaluate a small chunk, measure the bytes per row that its graph keeps, and find the graph's leaves.

        For the arguments see `evaluate`.
        """
        storages: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        stand_ins = _cut_off(through)
        before = _Conditions(self._modules, through[0].device)
        saved = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with eagerly(*self._models), before.noted(), saved:
            values = evaluate(chunk, stand_ins)
        before.restore()
        leaves = _others(leaves_of(values), [*stand_ins, *made_leaves])
        self._leaves.update({id(leaf): leaf for leaf in leaves})
        for leaf in self._leaves.values():  # graphs keep views of leaves, which take no additional memory
            storages.pop(leaf.untyped_storage().data_ptr(), None)
        self._bytes_per_row = sum(storages.values()) / max(1, values.numel())

    def admit(self, n_rows: int) -> int | None:
        """Return None if a graph over `n_rows` rows fits, and count it as kept; otherwise the rows per chunk."""
        needed = n_rows * self._bytes_per_row
        if needed <= self._left / 2:  # the other half is for graphs that do not fit
            self._left -= needed
            return None
        # The factor 3: the backward pass also holds gradients of the activations' size, and allocators waste memory.
        return max(1, int(self._left / (3 * self._bytes_per_row)))

    def evaluate(
        self,
        evaluate: Evaluate,
        chunks: Sequence[Chunk],
        through: Sequence[Tensor],
        on_forward: Callable[[], object],
        made_leaves: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return the values ``(n_rows,)`` of each chunk, on a graph that keeps no activations.

        Args:
            evaluate: evaluates one chunk.
            chunks: the chunks to evaluate.
            through: tensors that the copies are made of and that gradients flow to.
            on_forward: called after each chunk of the first pass.
            made_leaves: leaves that `evaluate` makes itself, such as copies of inputs whose gradient it takes. It puts
                those of its last call here.
        """
        conditions = [_Conditions(self._modules, through[0].device) for _ in chunks]
        arguments = (evaluate, chunks, conditions, on_forward, made_leaves, len(through))
        return list(_TwoPasses.apply(*arguments, *through, *self._leaves.values()))


class _TwoPasses(torch.autograd.Function):
    """Autograd function: chunks are evaluated without a graph, and in the backward pass again with one."""

    @staticmethod
    def forward(
        ctx: Any,
        evaluate: Evaluate,
        chunks: Sequence[Chunk],
        conditions: Sequence[_Conditions],
        on_forward: Callable[[], object],
        made_leaves: Sequence[Tensor],
        n_through: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)  # so that autograd refuses weights that were changed in between
        ctx.evaluate, ctx.chunks, ctx.conditions, ctx.n_through = evaluate, chunks, conditions, n_through
        ctx.made_leaves = made_leaves
        values = []
        with no_graph():
            for chunk, condition in zip(chunks, conditions, strict=True):
                with condition.noted():
                    values.append(evaluate(chunk, tensors[:n_through]).flatten())
                on_forward()
        ctx.values = [value.detach() for value in values]
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # autograd raises an error itself only if the whole gradient comes from here
            raise RuntimeError(
                "With a memory_budget there is no second derivative of the loss (create_graph=True in its backward "
                "pass): leave memory_budget out."
            )
        tensors = ctx.saved_tensors
        totals: list[Tensor | None] = [None] * len(tensors)
        for index, gradient in enumerate(gradients):
            parts = _TwoPasses._second_pass(ctx, index, gradient, tensors)
            totals = [_sum(total, part) for total, part in zip(totals, parts, strict=True)]
        return (None, None, None, None, None, None, *totals)

    @staticmethod
    def _second_pass(ctx: Any, index: int, gradient: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return one chunk's share of the gradient. The chunk's graph is freed afterwards."""
        through = _cut_off(tensors[: ctx.n_through])
        condition = ctx.conditions[index]
        parts: list[Tensor | None] = [None] * len(tensors)
        with condition:  # the gradient is taken inside, too: checkpointing then computes parts a third time
            with torch.enable_grad():
                values = ctx.evaluate(ctx.chunks[index], through).flatten()
            _check_repeated(values.detach(), ctx.values[index], condition.is_rough(through))
            if not values.requires_grad:
                return parts
            wanted = {i: t for i, t in enumerate([*through, *tensors[ctx.n_through :]]) if t.requires_grad}
            _check_leaves(values, [*wanted.values(), *ctx.made_leaves])
            # Retained, since tensors that the forward function closes over may be in the next chunk's graph, too. What
            # torch.compile made does not allow it.
            retain = not condition.is_compiled
            found = torch.autograd.grad(values, list(wanted.values()), gradient, retain, allow_unused=True)
        for index, part in zip(wanted, found, strict=True):
            parts[index] = part
        return parts


def _cut_off(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as leaves, where a chunk's gradient ends. Only the sum over all chunks flows further back."""
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part


class _Conditions:
    """Conditions of an evaluation besides its arguments: modes, buffers, torch's and NumPy's random state, autocast.

    They are recorded during the forward pass. The backward pass enters them again, any number of times.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._device = device
        self._devices = [own for own in accelerators(device) if own == device]
        self._known = modules
        self.is_compiled = any(map(is_compiled, modules))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record the conditions at the start, and the mode and buffers of each module before its first call."""
        self._modes: dict[nn.Module, bool] = {}
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}
        self._streams = streams(self._devices)
        self._numpy = np.random.get_state(legacy=False)  # from which Captum draws for GradientShap
        self._precision = precision(self._device)
        self._cudnn = torch.backends.cudnn.enabled
        for module in self._known:
            self._note(module)
        if self.is_compiled:  # a hook would make the model compile again each time
            yield
            return
        handle = register_module_forward_pre_hook(lambda module, _: self._note(module))
        try:
            yield
        finally:
            handle.remove()

    def is_rough(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if the forward function may have computed in half precision."""
        half = any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors)
        return half or self._precision != torch.float32

    def restore(self) -> None:
        """Put back the random state and the buffers that an evaluation changed."""
        set_streams(self._streams, self._devices)
        np.random.set_state(self._numpy)
        for module, copies in self._buffers.items():
            if self._modes[module]:  # a module updates its buffers only in training mode
                put_back(module, copies)

    def _note(self, module: nn.Module) -> None:
        if module in self._modes:
            return
        self._modes[module] = module.training
        if module._buffers:
            self._buffers[module] = copied_buffers(module) if module.training else dict(module._buffers)

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(kept_streams(self._devices))
            set_streams(self._streams, self._devices)
            stack.callback(np.random.set_state, np.random.get_state(legacy=False))
            np.random.set_state(self._numpy)
            autocast = self._precision if self._precision != torch.float32 else None
            stack.enter_context(torch.autocast(self._device.type, dtype=autocast, enabled=autocast is not None))
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = self._cudnn
            for module, mode in self._modes.items():
                stack.callback(setattr, module, "training", module.training)
                module.training = mode
            for module, buffers in self._buffers.items():
                stack.callback(setattr, module, "_buffers", module._buffers)
                # In training mode the copies are copied again, since BatchNorm updates these statistics once more.
                module._buffers = buffers
                if self._modes[module]:
                    module._buffers = copied_buffers(module)
            self._leave = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._leave.close()


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """Return the leaves of a tensor's graph."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    seen, stack, leaves = {tensor.grad_fn}, [tensor.grad_fn], []
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        stack.extend(parents)
    return leaves


def _others(leaves: list[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    return [leaf for leaf in leaves if all(leaf is not other for other in known)]


def _check_repeated(values: Tensor, first: Tensor, rough: bool) -> None:
    """Raise RuntimeError if the second pass does not repeat the first one: its gradient would be wrong."""
    tolerance = 0.1 if rough else 1e-3 if first.dtype == torch.float32 else 1e-6
    if bool(((values - first).abs() > tolerance * first.abs().amax()).any()):
        raise RuntimeError(
            "With a memory_budget the forward function is evaluated again in the backward pass, where it returned "
            "other values: it draws random numbers that are neither torch's nor NumPy's, or something it uses was "
            "changed in between (BatchNorm's statistics by a forward pass in training mode, an argument, a mode). Call "
            "backward() before such a change, or leave memory_budget out."
        )


def _check_leaves(values: Tensor, known: list[Tensor]) -> None:
    """Raise RuntimeError if the graph has unknown leaves: their gradient would be missing without notice."""
    if _others(leaves_of(values), known):
        raise RuntimeError(
            "With a memory_budget, the forward function used a parameter or tensor on masked copies that it does not "
            "use on the inputs themselves (a router, baselines that require gradient), so its gradient would be "
            "missing: make the model a torch.nn.Module that owns it and pass that as forward_func, or leave "
            "memory_budget out."
        )
