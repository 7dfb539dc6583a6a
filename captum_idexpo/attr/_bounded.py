"""Attributions that take gradients, in bounded memory: a few examples at a time, and twice.

The first pass returns attributions without a graph. The backward pass computes those of a few examples again, this time
with the graph that the second derivative needs, and frees it before the next examples; see `_core.memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from captum_idexpo._core.captum import format_callable_baseline
from captum_idexpo._core.chunks import even_slices, look
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import Tensors, as_tuple
from captum_idexpo._core.memory import Chunk, MemoryBudget
from captum_idexpo._core.modes import is_batch_norm, module_of
from captum_idexpo._core.rng import accelerators, kept_streams

Explain = Callable[[Any, bool, dict[str, Any], list[Tensor]], Any]
"""(inputs, create_graph, further arguments, a list for the leaves it makes) -> tensors, in tuples and lists."""


def in_bounded_memory(
    explain: Explain,
    forward_func: Callable[..., Any],
    inputs: Tensors,
    arguments: dict[str, Any],
    of_examples: Collection[str],
    memory: MemoryBudget,
) -> Any:
    """Return an attribution whose graph keeps at most so many bytes until its backward pass.

    Args:
        explain: computes the attribution of some examples.
        forward_func: the function that is explained.
        inputs: a tensor ``(B, ...)`` or a tuple of them.
        arguments: further arguments of `explain`.
        of_examples: names of the arguments that may have an entry for each example.
        memory: the budget.

    Raises:
        InputError: the examples influence each other, or the output or the attribution has not one row for each; a
            convergence delta is asked for.
    """
    tensors = as_tuple(inputs, "inputs")
    n_examples, form, made = len(tensors[0]), _Form(), list[Tensor]()
    if arguments.get("return_convergence_delta"):
        raise InputError("With a memory_budget there is no convergence delta: leave one of the two out.")
    if callable(arguments.get("baselines")):  # a distribution that may depend on all inputs
        arguments = {**arguments, "baselines": format_callable_baseline(arguments["baselines"], inputs)}
    _require_independent_rows(forward_func, tensors, arguments.get("additional_forward_args"))
    # A tensor that is passed twice stays one tensor, so that its gradient is the sum over both uses.
    through = list({id(tensor): tensor for tensor in tensors}.values())
    places = [next(place for place, one in enumerate(through) if one is tensor) for tensor in tensors]

    def evaluate(chunk: Chunk, through: Sequence[Tensor]) -> Tensor:
        examples, _ = chunk
        parts = [tensor[examples] for tensor in through]
        some = tuple(parts[place] for place in places)
        given = {
            name: _of_examples(name, value, examples, n_examples) if name in of_examples else value
            for name, value in arguments.items()
        }
        graph = torch.is_grad_enabled()
        return form.flattened(explain(some if isinstance(inputs, tuple) else some[0], graph, given, made), len(some[0]))

    one_copy, few = slice(0, 1), slice(0, min(2, n_examples))  # two, to see whether there is a row for each
    memory.look(evaluate, (few, one_copy), through, made)
    fitting = memory.admit(n_examples * form.size)
    if fitting is None:
        return explain(inputs, True, arguments, made)
    chunks = [(examples, one_copy) for examples in even_slices(n_examples, fitting // form.size)]
    return form.joined(memory.evaluate(evaluate, chunks, through, lambda: None, made))


class _Form:
    """The form of an attribution, which is stretched out into one row of numbers and put together again."""

    _shapes: list[torch.Size]
    _dtypes: list[torch.dtype]
    _structure: TreeSpec

    @property
    def size(self) -> int:
        """Numbers of one example."""
        return max(1, sum(shape.numel() for shape in self._shapes))

    def flattened(self, attribution: Any, n_examples: int) -> Tensor:
        """Return all numbers ``(n,)`` of an attribution, tensor by tensor, and note its form."""
        tensors, self._structure = tree_flatten(attribution)
        if any(len(tensor) != n_examples for tensor in tensors):
            raise InputError(
                f"With a memory_budget an attribution needs one row for each example, given: "
                f"{[tuple(tensor.shape) for tensor in tensors]} for {n_examples}. Leave memory_budget out."
            )
        self._shapes, self._dtypes = [tensor.shape[1:] for tensor in tensors], [tensor.dtype for tensor in tensors]
        return torch.cat([tensor.flatten() for tensor in tensors])

    def joined(self, chunks: Sequence[Tensor]) -> Any:
        """Return the attribution of all examples from the numbers of chunks of them."""
        parts = []
        for values in chunks:
            n_examples = len(values) // self.size
            sizes = [n_examples * shape.numel() for shape in self._shapes]
            pairs = zip(values.split(sizes), self._shapes, strict=True)
            parts.append([part.view(n_examples, *shape) for part, shape in pairs])
        columns = zip(*parts, strict=True)
        whole = [torch.cat(column).to(dtype) for column, dtype in zip(columns, self._dtypes, strict=True)]
        return tree_unflatten(whole, self._structure)


def _of_examples(name: str, value: Any, examples: slice, n_examples: int) -> Any:
    """Return an argument's entries for some examples; what is meant for all of them as it is."""
    if isinstance(value, tuple):
        return tuple(_of_examples(name, entry, examples, n_examples) for entry in value)
    if isinstance(value, list) and name == "target":
        return value[examples]
    if isinstance(value, Tensor) and value.dim() and len(value) == n_examples > 1:
        return value[examples]
    return value


def _require_independent_rows(
    forward_func: Callable[..., Any], tensors: tuple[Tensor, ...], additional_forward_args: Any
) -> None:
    """Refuse what would be another function of a few examples than of the batch. It leaves no trace."""
    model = module_of(forward_func)
    if model is not None and any(is_batch_norm(module) and module.training for module in model.modules()):
        raise InputError(
            "A memory_budget takes the examples of a batch apart, and BatchNorm in training mode mixes them: call "
            "model.eval() first (regularizers do), or leave memory_budget out."
        )
    forward = BatchForward(forward_func, additional_forward_args, len(tensors[0]))
    with kept_streams(accelerators(tensors[0].device)):
        try:
            seen = look(forward_func, forward, tensors)
        except InputError as error:
            raise InputError(
                "A memory_budget takes the examples of a batch apart, but they influence each other in a forward pass: "
                "leave memory_budget out."
            ) from error
    if not isinstance(seen.output, Tensor) or seen.output.shape[:1] != (seen.n_rows,):
        raise InputError(
            "A memory_budget takes the examples of a batch apart, so the forward function has to return one row of "
            "outputs for each example: leave memory_budget out."
        )
