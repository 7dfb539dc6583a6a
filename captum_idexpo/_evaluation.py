"""A forward function over many perturbed copies of a batch, in chunks; without a graph, in bounded memory.

Whatever evaluates masked copies (LIME, KernelSHAP, insertion, deletion, sensitivity-n) does it here.
Rows are ordered copy by copy: all examples of the first copy, then all of the second, as Captum expands its arguments.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from captum._utils.common import _select_targets
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from captum_idexpo._features import FeatureLayout, as_numbers
from captum_idexpo._modes import is_compiled, module_of
from captum_idexpo._recomputation import Chunk, MemoryBudget

# On a CPU a layer's output of about two megabytes stays in the caches and is large enough to occupy the cores: mostly
# within a few percent of the best size, for networks from 64 to 65,000 values, where 400 rows of a ResNet-20 take half
# as long again. A GPU wants more; its numbers are not measured.
_VALUES_ON_CPU, _MAX_ROWS_ON_CPU = 2**19, 2**12
_VALUES_ON_ACCELERATORS, _MAX_ROWS_ON_ACCELERATORS = 2**26, 2**13
# A network's weights are fetched for a few rows as for many: of wide layers 32, of large images 8, if they fit.
_ROWS_OF_WIDE_LAYERS = 32
_ROWS_OF_LARGE_INPUTS = 8
_VALUES_OF_FEW_ROWS = 2**21
_LARGEST_OVER_INPUTS = 4  # where nothing is known of a forward function
ROWS_TO_LOOK_AT = 8
"""Where a forward function is only looked at, be it for the shape of its output or the size of its graph."""

Perturbation = Callable[..., tuple[Tensor, ...]]
"""(examples, copies, *through) -> for each input tensor, the perturbed copies ``(n_copies, n_examples, ...)``."""


def default_rows_per_forward(inputs: tuple[Tensor, ...], largest_output: int | None = None) -> int:
    """Rows of one forward pass when the user names none, the same in every run.

    As many as give the largest of a network's tensors 2^19 values on a CPU (up to 4096 rows), 2^26 (8192) on an
    accelerator. Where that is less, 32 rows of it or eight of the inputs, if they have 2^21 values at most; one row at
    least.

    Args:
        inputs: tensors ``(B, ...)``.
        largest_output: values a row of the largest output of a module; None: unknown, taken for four times the inputs.
    """
    on_cpu = inputs[0].device.type == "cpu"
    budget = _VALUES_ON_CPU if on_cpu else _VALUES_ON_ACCELERATORS
    most = _MAX_ROWS_ON_CPU if on_cpu else _MAX_ROWS_ON_ACCELERATORS
    of_inputs = max(1, sum(math.prod(tensor.shape[1:]) for tensor in inputs))
    largest = _LARGEST_OVER_INPUTS * of_inputs if largest_output is None else max(of_inputs, largest_output)
    few = min(_ROWS_OF_WIDE_LAYERS, _VALUES_OF_FEW_ROWS // largest)
    fewer = min(_ROWS_OF_LARGE_INPUTS, _VALUES_OF_FEW_ROWS // of_inputs)
    return max(1, fewer, few, min(most, budget // largest))


def look(
    forward_func: Callable[..., Any], evaluate: Callable[[], Any], inputs: tuple[Tensor, ...], n_rows: int
) -> tuple[Any, int]:
    """Evaluates a few rows: what they return, and how many rows a forward pass had best have.

    A module's layers tell. A forward function that is no module is not looked into, nor a compiled one, which under
    hooks may be compiled anew.

    Args:
        forward_func: what `evaluate` calls.
        evaluate: calls it with ``n_rows`` rows.
        inputs: tensors ``(B, ...)``.
    """
    layers = _layers(module_of(forward_func))
    sizes: list[int] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module in layers:
            outputs = [output] if isinstance(output, Tensor) else tree_leaves(output)
            sizes.extend(tensor.numel() // n_rows for tensor in outputs if isinstance(tensor, Tensor))

    with register_module_forward_hook(note) if layers else nullcontext():
        output = evaluate()
    return output, default_rows_per_forward(inputs, max(sizes, default=None))


def _layers(module: nn.Module | None) -> set[nn.Module]:
    """The modules whose outputs are rows: not those that make a weight; none of a compiled model.

    Of a model's own output only PyTorch's say how large it gets inside; others may call functions.
    """
    parts = [] if module is None else list(module.modules())
    if module is None or any(map(is_compiled, parts)):
        return set()
    layers = set(parts)
    for part in parts:
        if isinstance(part, ParametrizationList):
            layers -= set(part.modules())
    return layers if type(module).__module__.startswith("torch.nn.") else layers - {module}


class BatchForward:
    """A forward function bound to the extra arguments of one batch, callable on copies of a part of that batch.

    Args:
        forward_func: takes the input tensors, then the additional arguments.
        additional_forward_args: a tensor as long as the batch goes with the examples; anything else is passed on as it
            is. A tensor of a single number may be a single example's or for whatever comes: where copies of it do not
            suit the forward function, it is passed on as it is, too.
        n_examples: the batch's size.
        target: Captum's target; None returns the forward function's whole output.
        lists_of_examples: lists as long as a batch of several examples go with these, as in Captum's LIME.

    Raises:
        AssertionError: as Captum, where there is not one target for each example or one for all.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        additional_forward_args: Any,
        n_examples: int,
        target: Any = None,
        *,
        lists_of_examples: bool = False,
    ) -> None:
        if additional_forward_args is None:
            additional_forward_args = ()
        elif not isinstance(additional_forward_args, tuple):
            additional_forward_args = (additional_forward_args,)
        self.forward_func = forward_func
        # Captum calls such a function, too; it asks at every call, which costs a tenth of a small model's time. A
        # module's call takes whatever there is.
        is_module = isinstance(forward_func, nn.Module)
        self._takes_nothing = not is_module and not inspect.signature(forward_func).parameters
        self.additional_forward_args = additional_forward_args
        self.n_examples = n_examples
        self._repeats_lists = lists_of_examples and n_examples > 1
        numbers = (a for a in additional_forward_args if isinstance(a, Tensor) and a.dim() == 1)
        self._may_be_shared = n_examples == 1 and any(len(number) == 1 for number in numbers)
        n_targets = target.numel() if isinstance(target, Tensor) else len(target) if isinstance(target, list) else 1
        # As many as a chunk has rows would pass for one a row.
        assert n_targets in (1, n_examples), (
            f"target holds {n_targets} numbers for a batch of {n_examples}: give one for each example, or one for all."
        )
        if isinstance(target, Tensor) and n_targets == 1 and not target.is_floating_point():
            target = target.reshape(())  # which Captum reads as a number
        self._target = repeated_for_chunks(target, n_examples)
        self._classes: KeptForChunk | None = None
        if isinstance(target, Tensor) and target.shape == (n_examples,) and target.dtype == torch.int64:
            classes = target[:, None]
            self._classes = KeptForChunk(lambda examples, n_copies: classes[examples].expand(n_copies, -1, -1))

    def __call__(self, rows: tuple[Tensor, ...], examples: slice = slice(None), n_copies: int = 1) -> Any:
        """The output for ``n_copies`` copies of the given examples, one row each, copy by copy."""
        additional = [
            argument
            if isinstance(argument, list) and not self._repeats_lists
            else _repeated(argument, self.n_examples, examples, n_copies)
            for argument in self.additional_forward_args
        ]
        if self._takes_nothing:
            output = self.forward_func()
        elif not self._may_be_shared or n_copies == 1:
            output = self.forward_func(*rows, *additional)
        else:
            try:
                output = self.forward_func(*rows, *additional)
            except Exception:
                output = self.forward_func(*rows, *self.additional_forward_args)
        return self._select(output, examples, n_copies)

    def _select(self, output: Any, examples: slice, n_copies: int) -> Any:
        if self._classes is not None and isinstance(output, Tensor) and output.dim() == 2:
            # Captum's choice, but without a target for each copy.
            classes = self._classes(examples, n_copies)
            if len(output) == len(classes) * classes.shape[1]:
                with suppress(RuntimeError):  # a class out of range: below, by Captum, in terms of the user's tensors
                    return output.reshape(*classes.shape[:2], -1).gather(2, classes).flatten()
        return _select_targets(output, self._target(examples, n_copies))


class KeptForChunk:
    """Makes what a chunk needs, and keeps that of the last one, since most chunks have one shape.

    Args:
        make: (examples, number of copies) -> what is needed for them.
    """

    def __init__(self, make: Callable[[slice, int], Any]) -> None:
        self._make = make
        self._chunk: tuple[Any, ...] | None = None

    def __call__(self, examples: slice, n_copies: int) -> Any:
        """What these copies need."""
        chunk = (examples.start, examples.stop, n_copies)
        if chunk != self._chunk:
            self._made, self._chunk = self._make(examples, n_copies), chunk
        return self._made


def repeated_for_chunks(argument: Any, n_examples: int) -> KeptForChunk:
    """A batch's argument for copies of its examples, copy by copy.

    A tensor or list as long as the batch goes with the examples; anything else is for all of them.
    """
    return KeptForChunk(functools.partial(_repeated, argument, n_examples))


def _repeated(argument: Any, n_examples: int, examples: slice, n_copies: int) -> Any:
    if isinstance(argument, Tensor) and argument.dim() and len(argument) == n_examples:
        some = argument[examples]
        if argument.dim() > 3:
            return torch.cat([some] * n_copies)  # which keeps channels-last
        return some.repeat(n_copies, *[1] * (argument.dim() - 1))
    if isinstance(argument, list) and len(argument) == n_examples:
        return argument[examples] * n_copies
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
) -> Tensor:
    """Evaluates ``n_copies`` perturbed copies of each example, at most ``max_rows`` rows at a time.

    Args:
        evaluate: (rows, examples, copies) -> one value a row; rows are ``n_copies * n_examples`` of the slices given.
        perturb: makes the copies asked for.
        through: what the copies are made of and gradients flow to; `perturb` is handed them.
        memory: bounds what the graph keeps; None: it keeps everything.
        on_forward: called after each forward pass (progress bars).

    Returns:
        ``(n_examples, n_copies)``. Follows the ambient gradient mode.
    """
    _keep_freed_memory()

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
    blocks = [
        [(examples, copies) for copies in _even_slices(n_copies, max_rows // (examples.stop - examples.start))]
        for examples in slices(n_examples, max_rows)
    ]
    chunks = [chunk for block in blocks for chunk in block]
    values = []
    if memory is None or fitting is None:
        for chunk in chunks:
            values.append(evaluate_chunk(chunk, through))
            on_forward()
    else:
        values = memory.evaluate(evaluate_chunk, chunks, through, on_forward)
    in_order = iter(values)
    columns = [
        torch.cat([next(in_order) for _ in block]).reshape(n_copies, -1)  # a block's chunks are of the same examples
        for block in blocks
    ]
    return (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)).T


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of one forward pass for the next.

    It returns to the system, to fetch it again page by page, what exceeds twice the largest block of up to 32 megabytes
    that was freed so far. Of a network whose blocks are small that cost up to a fifth of the time, by luck of the heap.
    This block is never touched, so it costs nothing itself.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def slices(total: int, size: int) -> Iterator[slice]:
    """``range(total)`` in slices of the given size; the last one may be shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _even_slices(total: int, at_most: int) -> Iterator[slice]:
    """As few slices as can be, of nearly one size: a short last one would cost most of a long one's time."""
    n_slices = -(-total // max(1, at_most))
    return slices(total, -(-total // max(1, n_slices)))


def masked_copies(
    inputs: tuple[Tensor, ...],
    baselines: tuple[Any, ...],
    layout: FeatureLayout,
    keep: Tensor,
    examples: slice = slice(None),
) -> tuple[Tensor, ...]:
    """Copies of the inputs, the baseline standing where a boolean or soft mask says so.

    Args:
        inputs: each ``(B, ...)``.
        baselines: each a number or a tensor that broadcasts against its input, aligned by `align_baselines`.
        layout: where the D features lie in the inputs.
        keep: ``(k, b, D)``: True (or 1) keeps the feature, False (or 0) puts the baseline.
        examples: which b examples.
    """
    chosen = [
        baseline[examples]
        if isinstance(baseline, Tensor) and baseline.dim() == tensor.dim() and len(baseline) > 1
        else baseline
        for baseline, tensor in zip(baselines, inputs, strict=True)
    ]
    dtypes = [_copies_dtype(tensor, baseline, keep) for tensor, baseline in zip(inputs, chosen, strict=True)]
    # A mask of the inputs' type multiplies several times faster than a boolean one chooses; it is smallest before it
    # is laid out over the inputs.
    if len(set(dtypes)) == 1:
        masks = layout.spread(as_numbers(keep, dtypes[0]), examples)
    else:
        masks = tuple(map(as_numbers, layout.spread(keep, examples), dtypes))
    return tuple(
        _mix(tensor[examples].to(dtype), baseline, mask)
        for tensor, baseline, mask, dtype in zip(inputs, chosen, masks, dtypes, strict=True)
    )


def _copies_dtype(tensor: Tensor, baseline: Any, keep: Tensor) -> torch.dtype:
    if tensor.is_floating_point() and not isinstance(baseline, Tensor):
        return tensor.dtype
    dtype = torch.result_type(tensor, baseline)
    return dtype if dtype.is_floating_point or not keep.is_floating_point() else keep.dtype


def _mix(tensor: Tensor, baseline: Any, mask: Tensor) -> Tensor:
    """The tensor where the mask is 1, the baseline where it is 0, both to the last digit; mixtures between."""
    copies: Tensor = mask * tensor
    if not isinstance(baseline, Tensor) and baseline == 0:
        return copies
    if mask.dtype == torch.bool:
        return torch.where(mask, tensor, baseline)
    baseline = baseline.to(mask.dtype) if isinstance(baseline, Tensor) else baseline
    copies = mask * tensor + (baseline - mask * baseline)
    return copies


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
