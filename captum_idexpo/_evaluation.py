"""A forward function over many perturbed copies of a batch, in chunks; without a graph, in bounded memory.

Whatever evaluates masked copies (LIME, KernelSHAP, insertion, deletion, sensitivity-n) does it here.
Rows are ordered copy by copy: all examples of the first copy, then all of the second, as Captum expands its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from captum._utils.common import _run_forward
from torch import Tensor

# A forward pass of about a megabyte of float32 inputs keeps a CPU's cache warm (a batch of 400 CIFAR rows takes half
# as long again as chunks of 50) and is large enough to occupy its cores; a GPU wants more rows.
_VALUES_PER_FORWARD_ON_CPU = 2**18
_VALUES_PER_FORWARD_ON_ACCELERATORS = 2**24
_MAX_ROWS_PER_FORWARD = 2**13

Perturbation = Callable[[slice, slice], tuple[Tensor, ...]]
"""(examples, copies) -> for each input tensor, the perturbed copies ``(n_copies, n_examples, ...)``."""


def default_rows_per_forward(inputs: tuple[Tensor, ...]) -> int:
    """Rows of one forward pass when the user names none: 2^18 input values on a CPU, 2^24 on an accelerator."""
    on_cpu = inputs[0].device.type == "cpu"
    budget = _VALUES_PER_FORWARD_ON_CPU if on_cpu else _VALUES_PER_FORWARD_ON_ACCELERATORS
    values_per_row = sum(tensor[0].numel() for tensor in inputs)
    return max(1, min(_MAX_ROWS_PER_FORWARD, budget // max(1, values_per_row)))


class BatchForward:
    """A forward function bound to the extra arguments of one batch, callable on copies of a part of that batch.

    Args:
        forward_func: takes the input tensors, then the additional arguments.
        additional_forward_args: a tensor or list as long as the batch goes with the examples; anything else is passed
            on as it is.
        n_examples: the batch's size.
        target: Captum's target; None returns the forward function's whole output.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        additional_forward_args: Any,
        n_examples: int,
        target: Any = None,
    ) -> None:
        if additional_forward_args is not None and not isinstance(additional_forward_args, tuple):
            additional_forward_args = (additional_forward_args,)
        self.forward_func = forward_func
        self.additional_forward_args = additional_forward_args
        self.n_examples = n_examples
        self.target = target

    def __call__(self, rows: tuple[Tensor, ...], examples: slice = slice(None), n_copies: int = 1) -> Any:
        """The output for ``n_copies`` copies of the given examples, one row each, copy by copy."""
        additional = self.additional_forward_args
        if additional is not None:
            additional = tuple(self._repeat(argument, examples, n_copies) for argument in additional)
        target = self.target
        if not isinstance(target, Tensor) or target.numel() > 1:  # Captum reads a tensor of one element as a number
            target = self._repeat(target, examples, n_copies)
        return _run_forward(self.forward_func, rows, target, additional)

    def _repeat(self, argument: Any, examples: slice, n_copies: int) -> Any:
        if isinstance(argument, Tensor) and argument.dim() and len(argument) == self.n_examples:
            return torch.cat([argument[examples]] * n_copies)
        if isinstance(argument, list) and len(argument) == self.n_examples:
            return argument[examples] * n_copies
        return argument


def evaluate_copies(
    evaluate: Callable[[tuple[Tensor, ...], slice, int], Tensor],
    perturb: Perturbation,
    n_examples: int,
    n_copies: int,
    max_rows: int,
    on_forward: Callable[[], object] = lambda: None,
) -> Tensor:
    """Evaluates ``n_copies`` perturbed copies of each example, at most ``max_rows`` rows at a time.

    Args:
        evaluate: (rows, examples, copies) -> one value a row; rows are ``n_copies * n_examples`` of the slices given.
        perturb: makes the copies asked for.
        on_forward: called after each forward pass (progress bars).

    Returns:
        ``(n_examples, n_copies)``. Follows the ambient gradient mode.
    """
    blocks = []
    for examples in slices(n_examples, max_rows):
        block_size = examples.stop - examples.start
        values = []
        for copies in slices(n_copies, max(1, max_rows // block_size)):
            rows = tuple(tensor.flatten(0, 1) for tensor in perturb(examples, copies))
            chunk = evaluate(rows, examples, copies.stop - copies.start)
            values.append(chunk.reshape(-1, block_size))
            on_forward()
        blocks.append(torch.cat(values))
    return torch.cat(blocks, dim=1).T


def slices(total: int, size: int) -> Iterator[slice]:
    """``range(total)`` in slices of the given size; the last one may be shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def masked_copies(
    inputs: tuple[Tensor, ...], baselines: tuple[Any, ...], keep: tuple[Tensor, ...], examples: slice
) -> tuple[Tensor, ...]:
    """Copies of the inputs, the baseline standing where a boolean or soft mask says so.

    Args:
        inputs: each ``(B, ...)``.
        baselines: each a number or a tensor that broadcasts against its input, aligned by `align_baselines`.
        keep: for each input ``(k, b, ...)``: True (or 1.0) keeps the input, False (or 0.0) puts the baseline.
        examples: which b examples.
    """
    copies = []
    for tensor, baseline, mask in zip(inputs, baselines, keep, strict=True):
        tensor = tensor[examples]
        if isinstance(baseline, Tensor) and baseline.dim() == tensor.dim() and len(baseline) > 1:
            baseline = baseline[examples]
        dtype = torch.result_type(tensor, baseline)
        if mask.dtype == torch.bool:
            if not isinstance(baseline, Tensor):
                baseline = torch.full((), baseline, dtype=dtype, device=tensor.device)
            copies.append(torch.where(mask, tensor.to(dtype), baseline.to(dtype)))
        else:
            dtype = dtype if dtype.is_floating_point else mask.dtype
            copies.append(baseline + mask.to(dtype) * (tensor.to(dtype) - baseline))
    return tuple(copies)


def align_baselines(baselines: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Baselines that broadcast against their inputs in slices of the batch.

    As in Captum, a tensor whose leading size is the batch's holds one baseline an example; any other broadcasts.

    Raises:
        ValueError: the number of baselines or the shape of one does not fit.
    """
    if len(baselines) != len(inputs):
        raise ValueError(
            f"baselines holds {len(baselines)} values for {len(inputs)} input tensors: give one baseline a tensor."
        )
    return tuple(_align_baseline(baseline, tensor) for baseline, tensor in zip(baselines, inputs, strict=True))


def with_batch_axis(value: Any, tensor: Tensor) -> Any:
    """A mask or baseline that lacks the input's leading axes, with axes of size 1 in their place.

    It then broadcasts whatever the batch's size is; Captum would take ``(n, ...)`` for one row an example where n
    happens to be that size.
    """
    if not isinstance(value, Tensor) or not value.dim() or value.dim() >= tensor.dim():
        return value
    return value.reshape(*[1] * (tensor.dim() - value.dim()), *value.shape)


def _align_baseline(baseline: Any, tensor: Tensor) -> Any:
    if not isinstance(baseline, Tensor):
        return baseline
    aligned = baseline.to(tensor.device)
    if aligned.is_floating_point() and tensor.is_floating_point():
        aligned = aligned.to(tensor.dtype)
    if tensor.dim() and aligned.dim() and len(aligned) == len(tensor) > 1:
        missing = tensor.dim() - aligned.dim()
        aligned = aligned.reshape(len(aligned), *[1] * max(missing, 0), *aligned.shape[1:])
    try:
        fits = torch.broadcast_shapes(aligned.shape, tensor.shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"A baseline of shape {tuple(baseline.shape)} does not fit the input of shape {tuple(tensor.shape)}: "
            "give a number, a tensor of the input's shape, or one with a batch axis of size 1."
        )
    return aligned
