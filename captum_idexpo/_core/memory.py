"""Graphs in bounded memory: first outputs without a graph, then, in the backward pass, chunk by chunk with one.

The second pass takes the loss's gradient with respect to the outputs back through each chunk and throws the chunk's
activations away. Both passes run under the same conditions, so that the gradient is that of a graph kept whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_idexpo._core.modes import copied_buffers, is_compiled, no_graph, precision, put_back
from captum_idexpo._core.rng import accelerators, kept_streams, set_streams, streams

Chunk = tuple[slice, slice]
"""(examples, copies)"""
Evaluate = Callable[[Chunk, Sequence[Tensor]], Tensor]
"""(chunk, the tensors its copies are made of) -> one value a row."""


class MemoryBudget:
    """Bytes of activations that the graphs of one training step may hold until its backward pass.

    Several evaluations (an explainer's, insertion's, deletion's) share one. An evaluation whose graph fits what is left
    keeps it; a larger one keeps nothing, in chunks small enough for the second pass.

    Args:
        n_bytes: the budget; the activations of one row are needed at least.
        models: modules that the forward function may look at; those that it calls are found without.

    Raises:
        ValueError: the budget is not positive.
    """

    def __init__(self, n_bytes: float, *models: nn.Module | None) -> None:
        if not n_bytes > 0:
            raise ValueError(f"memory_budget must be a positive number of bytes, or None; given: {n_bytes}.")
        self._left = n_bytes
        self._bytes_per_row = 0.0
        self._modules = [module for model in models if model is not None for module in model.modules()]
        parameters = [p for model in models if model is not None for p in model.parameters() if p.requires_grad]
        self._leaves: dict[int, Tensor] = {id(parameter): parameter for parameter in parameters}

    @classmethod
    def of(cls, budget: float | MemoryBudget | None, graph: bool, *models: nn.Module | None) -> MemoryBudget | None:
        """The budget that an argument asks for; None: no bound, or no graph to be bounded."""
        if budget is None:
            return None
        formed = budget if isinstance(budget, MemoryBudget) else cls(budget, *models)
        return formed if graph else None

    def look(self, evaluate: Evaluate, chunk: Chunk, through: Sequence[Tensor]) -> None:
        """Evaluates a small chunk to see how many bytes a row its graph keeps, and to which leaves it leads."""
        storages: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        stand_ins = _cut_off(through)
        before = _Conditions(self._modules, through[0].device)
        with before.noted(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            values = evaluate(chunk, stand_ins)
        before.restore()
        leaves = [leaf for leaf in leaves_of(values) if all(leaf is not tensor for tensor in stand_ins)]
        self._leaves.update({id(leaf): leaf for leaf in leaves})
        for leaf in self._leaves.values():  # of which graphs keep views
            storages.pop(leaf.untyped_storage().data_ptr(), None)
        self._bytes_per_row = sum(storages.values()) / max(1, values.numel())

    def admit(self, n_rows: int) -> int | None:
        """None where a graph over so many rows fits, which is then counted as kept; else how many fit at a time."""
        needed = n_rows * self._bytes_per_row
        if needed <= self._left / 2:  # the other half is for what does not fit
            self._left -= needed
            return None
        # Beside a chunk's activations the backward pass holds gradients of their size, and allocators waste some.
        return max(1, int(self._left / (3 * self._bytes_per_row)))

    def evaluate(
        self,
        evaluate: Evaluate,
        chunks: Sequence[Chunk],
        through: Sequence[Tensor],
        on_forward: Callable[[], object],
    ) -> list[Tensor]:
        """Every chunk's values ``(n_rows,)``, on a graph that keeps no activations.

        Args:
            evaluate: evaluates one chunk.
            chunks: what is evaluated.
            through: tensors on a graph of their own, to which `evaluate` leads.
            on_forward: called after each chunk of the first pass.
        """
        conditions = [_Conditions(self._modules, through[0].device) for _ in chunks]
        arguments = (evaluate, chunks, conditions, on_forward, len(through))
        return list(_TwoPasses.apply(*arguments, *through, *self._leaves.values()))


class _TwoPasses(torch.autograd.Function):
    """Values of chunks without a graph; their gradient by evaluating each chunk again with one."""

    @staticmethod
    def forward(
        ctx: Any,
        evaluate: Evaluate,
        chunks: Sequence[Chunk],
        conditions: Sequence[_Conditions],
        on_forward: Callable[[], object],
        n_through: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)  # so that autograd refuses weights that were changed in between
        ctx.evaluate, ctx.chunks, ctx.conditions, ctx.n_through = evaluate, chunks, conditions, n_through
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
        if torch.is_grad_enabled():  # autograd's own refusal is met only where all of the gradient comes from here
            raise RuntimeError(
                "With a memory_budget there is no second derivative of the loss (create_graph=True in its backward "
                "pass): leave memory_budget out."
            )
        tensors = ctx.saved_tensors
        totals: list[Tensor | None] = [None] * len(tensors)
        for index, gradient in enumerate(gradients):
            parts = _TwoPasses._second_pass(ctx, index, gradient, tensors)
            totals = [_sum(total, part) for total, part in zip(totals, parts, strict=True)]
        return (None, None, None, None, None, *totals)

    @staticmethod
    def _second_pass(ctx: Any, index: int, gradient: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """One chunk's share of the gradient; its graph ends with this call."""
        through = _cut_off(tensors[: ctx.n_through])
        condition = ctx.conditions[index]
        parts: list[Tensor | None] = [None] * len(tensors)
        with condition:  # also while a checkpointed part of the model is computed a third time
            with torch.enable_grad():
                values = ctx.evaluate(ctx.chunks[index], through).flatten()
            _check_repeated(values.detach(), ctx.values[index], condition.is_rough(through))
            if not values.requires_grad:
                return parts
            wanted = {i: t for i, t in enumerate([*through, *tensors[ctx.n_through :]]) if t.requires_grad}
            _check_leaves(values, list(wanted.values()))
            # Retained, for what the forward function closes over may stand in the next chunk's graph, too.
            found = torch.autograd.grad(values, list(wanted.values()), gradient, retain_graph=True, allow_unused=True)
        for index, part in zip(wanted, found, strict=True):
            parts[index] = part
        return parts


def _cut_off(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as leaves: a chunk's gradient ends there, and only the sum over all chunks goes back beyond."""
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part


class _Conditions:
    """What an evaluation depends on beside its arguments: modes, statistics, random numbers, autocast, cuDNN.

    Noted while the forward pass runs; entered again, any number of times, by the backward pass.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._device = device
        self._devices = [own for own in accelerators(device) if own == device]
        self._known = modules

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes all that there is, and every module that is called inside, as it is before its first call."""
        self._modes: dict[nn.Module, bool] = {}
        self._buffers: dict[nn.Module, dict[str, Tensor | None]] = {}
        self._streams = streams(self._devices)
        self._precision = precision(self._device)
        self._cudnn = torch.backends.cudnn.enabled
        for module in self._known:
            self._note(module)
        if any(map(is_compiled, self._known)):  # a hook would be compiled with the model, anew each time
            yield
            return
        handle = register_module_forward_pre_hook(lambda module, _: self._note(module))
        try:
            yield
        finally:
            handle.remove()

    def is_rough(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the forward function may have computed in half precision."""
        half = any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors)
        return half or self._precision != torch.float32

    def restore(self) -> None:
        """Undoes what an evaluation did to random numbers and statistics."""
        set_streams(self._streams, self._devices)
        for module, copies in self._buffers.items():
            if self._modes[module]:  # only in training mode does a module move its buffers
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
            autocast = self._precision if self._precision != torch.float32 else None
            stack.enter_context(torch.autocast(self._device.type, dtype=autocast, enabled=autocast is not None))
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = self._cudnn
            for module, mode in self._modes.items():
                stack.callback(setattr, module, "training", module.training)
                module.training = mode
            for module, buffers in self._buffers.items():
                stack.callback(setattr, module, "_buffers", module._buffers)
                # In training copies of the copies, since BatchNorm moves these statistics once more.
                module._buffers = buffers
                if self._modes[module]:
                    module._buffers = copied_buffers(module)
            self._leave = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self._leave.close()


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor's graph leads to."""
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


def _check_repeated(values: Tensor, first: Tensor, rough: bool) -> None:
    """Refuses a second pass that is not the first one again, whatever the reason: its gradient would be another's."""
    tolerance = 0.1 if rough else 1e-3 if first.dtype == torch.float32 else 1e-6
    if bool(((values - first).abs() > tolerance * first.abs().amax()).any()):
        raise RuntimeError(
            "With a memory_budget the forward function is evaluated again in the backward pass, where it returned "
            "other values: it draws random numbers that are not torch's, or something it uses was changed in between "
            "(BatchNorm's statistics by a forward pass in training mode, an argument, a mode). Call backward() before "
            "such a change, or leave memory_budget out."
        )


def _check_leaves(values: Tensor, known: list[Tensor]) -> None:
    """Refuses a graph that leads elsewhere: its gradient would silently be left out."""
    if any(all(leaf is not other for other in known) for leaf in leaves_of(values)):
        raise RuntimeError(
            "With a memory_budget, the forward function used a parameter or tensor on masked copies that it does not "
            "use on the inputs themselves (a router, baselines that require gradient), so its gradient would be "
            "missing: make the model a torch.nn.Module that owns it and pass that as forward_func, or leave "
            "memory_budget out."
        )
