"""Evaluation of a forward function on many perturbed copies of a batch, in chunks.

LIME, KernelSHAP, insertion, deletion and sensitivity-n evaluate their masked copies here. Rows are ordered copy by
copy, as Captum expands its arguments: all examples of the first copy, then all examples of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from captum_idexpo._core.captum import TargetType, select_targets
from captum_idexpo._core.chunks import ROWS_TO_LOOK_AT, even_slices, of_one_size, overlaps, slices
from captum_idexpo._core.compiled import has_compiled_parts
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.memory import Chunk, MemoryBudget
from captum_idexpo._core.modes import module_of
from captum_idexpo._core.targets import captum_target, require_tensor

Perturbation = Callable[..., tuple[Tensor, ...]]
"""(examples, copies, *through) -> for each input tensor, the perturbed copies ``(n_copies, n_examples, ...)``."""


class BatchForward:
    """A forward function bound to the additional arguments of one batch, callable on copies of its examples.

    Args:
        forward_func: takes the input tensors, then the additional arguments.
        additional_forward_args: tensors of B rows are split by example; anything else is passed unchanged.
        n_examples: B.
        target: Captum's target; None returns the forward function's whole output.

    Raises:
        InputError: the target has neither one entry per example nor one for all.
        InputTypeError: the target does not hold integers; the output is not a tensor.

    Attributes:
        is_compiled: True if the forward function is a model with compiled parts.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        additional_forward_args: object,
        n_examples: int,
        target: TargetType = None,
    ) -> None:
        if additional_forward_args is None:
            additional_forward_args = ()
        elif not isinstance(additional_forward_args, tuple):
            additional_forward_args = (additional_forward_args,)
        self.forward_func = forward_func
        self.target = target = captum_target(target, n_examples)
        self.additional_forward_args = additional_forward_args
        self.n_examples = n_examples
        self.is_compiled = has_compiled_parts(module_of(forward_func))
        if isinstance(target, Tensor) and target.numel() == 1:
            target = target.reshape(())  # Captum treats it as a number
        self._target = repeated_for_chunks(target, n_examples)
        self._classes: KeptForChunk | None = None
        if isinstance(target, Tensor) and target.shape == (n_examples,) and target.dtype == torch.int64:
            classes = target[:, None]
            self._classes = KeptForChunk(lambda examples, n_copies: classes[examples].expand(n_copies, -1, -1))

    def __call__(self, rows: tuple[Tensor, ...], examples: slice = slice(None), n_copies: int = 1) -> Any:
        """Return the output on ``n_copies`` copies of the given examples, ordered copy by copy."""
        if self.is_compiled:  # which would be compiled again for rows that are views
            rows = tuple(row.clone() for row in rows)
        additional = [
            _repeated(argument, self.n_examples, examples, n_copies) if isinstance(argument, Tensor) else argument
            for argument in self.additional_forward_args
        ]
        return self._select(self.forward_func(*rows, *additional), examples, n_copies)

    def of_rows(self, rows: Tensor) -> BatchForward:
        """Return the same forward function bound to the arguments of the examples with the given indices."""
        additional = tuple(
            _of_rows(argument, self.n_examples, rows) if isinstance(argument, Tensor) else argument
            for argument in self.additional_forward_args
        )
        return BatchForward(self.forward_func, additional, len(rows), _of_rows(self.target, self.n_examples, rows))

    def _select(self, output: object, examples: slice, n_copies: int) -> Any:
        require_tensor(output, numbers=True)
        if self._classes is not None and isinstance(output, Tensor) and output.dim() == 2:
            # The same selection as Captum's, but without repeating the target for each copy.
            classes = self._classes(examples, n_copies)
            if len(output) == len(classes) * classes.shape[1]:
                with suppress(RuntimeError):  # a class out of range: select_targets raises a clearer error below
                    return output.reshape(*classes.shape[:2], -1).gather(2, classes).flatten()
        return select_targets(output, self._target(examples, n_copies))


class KeptForChunk:
    """A function of a chunk that keeps its last result, since the next chunk often holds the same examples.

    Args:
        make: (examples, number of copies) -> the result.
    """

    def __init__(self, make: Callable[[slice, int], Any]) -> None:
        self._make = make
        self._chunk: tuple[Any, ...] | None = None

    def __call__(self, examples: slice, n_copies: int) -> Any:
        """Return the result for these copies."""
        chunk = (examples.start, examples.stop, n_copies)
        if chunk != self._chunk:
            self._made, self._chunk = self._make(examples, n_copies), chunk
        return self._made


def repeated_for_chunks(target: object, n_examples: int) -> KeptForChunk:
    """Return a function (examples, number of copies) -> the target of these copies, ordered copy by copy.

    A tensor or list as long as the batch is split by example; anything else holds for all examples.
    """

    def repeated(examples: slice, n_copies: int) -> Any:
        return tree_map(
            lambda leaf: _repeated(leaf, n_examples, examples, n_copies),
            target,
            is_leaf=lambda value: isinstance(value, list),
        )

    return KeptForChunk(repeated)


def _repeated(argument: object, n_examples: int, examples: slice, n_copies: int) -> Any:
    if isinstance(argument, Tensor) and argument.dim() and len(argument) == n_examples:
        some = argument[examples]
        if argument.dim() > 3:
            return torch.cat([some] * n_copies)  # cat keeps the channels-last format
        return some.repeat(n_copies, *[1] * (argument.dim() - 1))
    if isinstance(argument, list) and len(argument) == n_examples:
        return argument[examples] * n_copies
    return argument


def _of_rows(argument: object, n_examples: int, rows: Tensor) -> Any:
    if isinstance(argument, Tensor) and argument.dim() and len(argument) == n_examples:
        return argument[rows.to(argument.device)]
    if isinstance(argument, list) and len(argument) == n_examples:
        return [argument[row] for row in rows.tolist()]
    return argument


def evaluate_copies(
    evaluate: Callable[[tuple[Tensor, ...], slice, int], Tensor],
    perturb: Perturbation,
    n_examples: int,
    n_copies: int,
    max_rows: int,
    *,
    through: Sequence[Tensor] = (),
    memory: MemoryBudget | None = None,
    on_forward: Callable[[], object] = lambda: None,
    one_size: bool = False,
) -> Tensor:
    """Evaluate ``n_copies`` perturbed copies of each example, at most ``max_rows`` rows at a time.

    Args:
        evaluate: (rows, examples, number of copies) -> values ``(n_rows, ...)`` of the ``n_copies * n_examples`` rows
            of a chunk.
        perturb: makes perturbed copies, see `Perturbation`.
        n_examples: B.
        n_copies: copies per example.
        max_rows: chunk size.
        through: tensors that the copies are made of and that gradients flow to. They are passed to `perturb`.
        memory: bounds the activations that the graph keeps; `evaluate` must then return one value per row. None: no
            bound.
        on_forward: called after each forward pass (progress bars).
        one_size: all chunks have as many rows, which a compiled model needs; a last chunk that would be smaller repeats
            rows of the one before it.

    Returns:
        ``(n_examples, n_copies, ...)``, with a graph if gradients are enabled.
    """

    def evaluate_chunk(chunk: Chunk, through: Sequence[Tensor]) -> Tensor:
        examples, copies = chunk
        rows = tuple(tensor.flatten(0, 1) for tensor in perturb(examples, copies, *through))
        return evaluate(rows, examples, copies.stop - copies.start)

    fitting = None
    if memory is not None:
        few = min(n_examples, max_rows, ROWS_TO_LOOK_AT)
        n_copies_of_few = min(n_copies, max(1, min(max_rows, ROWS_TO_LOOK_AT) // few))
        memory.look(evaluate_chunk, (slice(0, few), slice(0, n_copies_of_few)), through)
        fitting = memory.admit(n_examples * n_copies)
        max_rows = max_rows if fitting is None else min(max_rows, fitting)
    tiles = of_one_size if one_size else list
    blocks = [
        (examples, tiles(even_slices(n_copies, max_rows // (examples.stop - examples.start))))
        for examples in tiles(slices(n_examples, max_rows))
    ]
    chunks = [(examples, part) for examples, copies in blocks for part in copies]
    values = []
    if memory is None or fitting is None:
        for chunk in chunks:
            values.append(evaluate_chunk(chunk, through))
            on_forward()
    else:
        values = memory.evaluate(evaluate_chunk, chunks, through, on_forward)
    in_order = iter(values)
    columns = [
        _joined([next(in_order) for _ in copies], copies, examples.stop - examples.start).unflatten(0, (n_copies, -1))
        for examples, copies in blocks  # the chunks of a block share their examples
    ]
    whole = [column.transpose(0, 1) for column in columns]
    return _joined(whole, [examples for examples, _ in blocks])


def _joined(values: list[Tensor], parts: list[slice], n_rows: int = 1) -> Tensor:
    """Concatenate the values of slices, ``n_rows`` for each entry, and drop what a slice repeats of the one before."""
    repeated = zip(values, overlaps(parts), strict=True)
    new = [value[n * n_rows :] if n else value for value, n in repeated]
    return new[0] if len(new) == 1 else torch.cat(new)


def evaluate_given(
    evaluate: Callable[[tuple[Tensor, ...], slice, int], Tensor],
    copies: tuple[Tensor, ...],
    max_rows: int,
    *,
    one_size: bool = False,
) -> Tensor:
    """Return the values ``(B, n, ...)`` of given copies, tensors ``(n, B, ...)``; see `evaluate_copies`."""

    def chosen(examples: slice, some: slice) -> tuple[Tensor, ...]:
        return tuple(tensor[some, examples] for tensor in copies)

    n_copies, n_examples = copies[0].shape[:2]
    return evaluate_copies(evaluate, chosen, n_examples, n_copies, max_rows, one_size=one_size)


def evaluate_batches(
    evaluate: Callable[[tuple[Tensor, ...], int], Tensor],
    perturb: Callable[[slice], tuple[Tensor, ...]],
    n_copies: int,
    at_a_time: int,
    plain: Tensor,
    on_forward: Callable[[], object] = lambda: None,
) -> Tensor:
    """Evaluate perturbed copies of a whole batch, for methods that perturb all rows alike.

    Args:
        evaluate: (rows, number of copies) -> their outputs, ordered copy by copy.
        perturb: makes a slice of the copies, tensors ``(k, B, ...)``.
        n_copies: number of copies to evaluate.
        at_a_time: copies per forward pass.
        plain: the output on the batch itself, of any shape.
        on_forward: called after each forward pass.

    Returns:
        ``(n_copies, *plain.shape)``, with a graph if gradients are enabled.

    Raises:
        InputError: the output does not grow with the number of copies.
    """
    outputs = [plain.new_zeros(0, *plain.shape)]
    for chunk in slices(n_copies, at_a_time):
        size = chunk.stop - chunk.start
        output = evaluate(tuple(copies.flatten(0, 1) for copies in perturb(chunk)), size)
        if output.numel() != size * plain.numel():
            raise InputError(
                f"The forward function returned an output of shape {tuple(output.shape)} for {size} copies of a batch "
                f"on which it returns {tuple(plain.shape)}: pass perturbations_per_eval=1 if it returns one value for "
                "the whole batch."
            )
        outputs.append(output.reshape(size, *plain.shape))
        on_forward()
    return torch.cat(outputs)
