"""Choice of the chunk size (rows per forward pass), and the check that the rows of a pass are independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from captum_idexpo._core.compiled import can_run_eagerly, eagerly, has_compiled_parts, original
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.modes import depends_on_batch, module_of, no_graph, precision

# On a CPU a layer output of about 2 MB stays in the caches and is large enough to occupy the cores. This size is mostly
# within a few percent of the fastest one, measured on networks from 64 to 65,000 values. Larger passes are slower: 400
# rows of a ResNet-20 take half as long again. A GPU needs larger passes; its numbers are not measured.
_VALUES_ON_CPU, _MAX_ROWS_ON_CPU = 2**19, 2**12
_VALUES_ON_ACCELERATORS, _MAX_ROWS_ON_ACCELERATORS = 2**26, 2**13
# Reading a network's weights takes as long for a few rows as for one row. So even a pass through wide layers gets 32
# rows, and a pass of large images 8 rows, as long as these have at most _VALUES_OF_FEW_ROWS values.
_ROWS_OF_WIDE_LAYERS = 32
_ROWS_OF_LARGE_INPUTS = 8
_VALUES_OF_FEW_ROWS = 2**21
_LARGEST_OVER_INPUTS = 4  # assumed for a forward function that is not a module
ROWS_TO_LOOK_AT = 8
"""Rows that are evaluated first, to find the shape of the output or the size of the graph."""
# Rounding differences between forward passes of different sizes, as a share of the largest output.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
_ROUNDING_OF_HALVES = 0.03
# Differences below this share of the outputs' spread count as rounding, since convolutions may change their algorithm.
_NEGLIGIBLE = 3e-3

Evaluate = Callable[[tuple[Tensor, ...], slice, int], Any]
"""(rows, examples, number of copies) -> the output on these rows, which are copies of the examples."""


def default_rows_per_forward(inputs: tuple[Tensor, ...], largest_output: int | None = None) -> int:
    """Return the default chunk size (rows per forward pass). It depends only on sizes, so it is the same in every run.

    The largest layer output gets at most 2^19 values on a CPU (and 4096 rows), 2^26 values on an accelerator (and 8192
    rows). A smaller result is raised to up to 32 rows while their largest output has at most 2^21 values, and to up to
    8 rows while their inputs have at most 2^21 values. The result is at least 1.

    Args:
        inputs: tensors ``(B, ...)``.
        largest_output: values per row of the largest layer output; None: unknown, four times the inputs' values.
    """
    on_cpu = inputs[0].device.type == "cpu"
    budget = _VALUES_ON_CPU if on_cpu else _VALUES_ON_ACCELERATORS
    most = _MAX_ROWS_ON_CPU if on_cpu else _MAX_ROWS_ON_ACCELERATORS
    of_inputs = max(1, sum(math.prod(tensor.shape[1:]) for tensor in inputs))
    largest = _LARGEST_OVER_INPUTS * of_inputs if largest_output is None else max(of_inputs, largest_output)
    few = min(_ROWS_OF_WIDE_LAYERS, _VALUES_OF_FEW_ROWS // largest)
    fewer = min(_ROWS_OF_LARGE_INPUTS, _VALUES_OF_FEW_ROWS // of_inputs)
    return max(1, fewer, few, min(most, budget // largest))


class Look(NamedTuple):
    """The output of a forward function on a few rows, and the chunk size."""

    output: Any
    """Output on `n_rows` rows."""
    n_rows: int
    max_rows: int
    """Chunk size, given by the user or chosen from the largest layer output."""


@no_graph()
def look(
    forward_func: Callable[..., Any],
    evaluate: Evaluate,
    inputs: tuple[Tensor, ...],
    max_rows: int | None = None,
    *,
    together: bool = False,
) -> Look:
    """Evaluate a few rows, check that rows do not influence each other, and choose the chunk size.

    The chunk size of a module is chosen from its largest layer output, that of another forward function from the
    inputs' size. A compiled model is looked at without its compiled code.

    Args:
        forward_func: the function that `evaluate` calls.
        evaluate: evaluates rows.
        inputs: tensors ``(B, ...)``.
        max_rows: the user's chunk size; None: chosen here. It is 1 for a single example whose copies influence each
            other.
        together: True if every forward pass has each row of the batch once, so rows may influence each other.

    Raises:
        InputError: the rows of a forward pass influence each other.
    """
    with eagerly(module_of(forward_func)):
        return _looked(forward_func, evaluate, inputs, max_rows, together)


def _looked(
    forward_func: Callable[..., Any],
    evaluate: Evaluate,
    inputs: tuple[Tensor, ...],
    max_rows: int | None,
    together: bool,
) -> Look:
    n_examples = len(inputs[0])
    if together:
        return Look(evaluate(repeated_rows(inputs), slice(0, n_examples), 1), n_examples, n_examples)
    limit = min(max_rows or default_rows_per_forward(inputs), ROWS_TO_LOOK_AT)
    n_seen = min(n_examples, limit)
    # Two rows are needed to distinguish one value per row from one value per batch.
    n_copies = 2 if n_examples == 1 and max_rows != 1 else 1
    failure = None
    try:
        output, chosen = _measured(forward_func, evaluate, inputs, n_seen, n_copies)
        if _independent(forward_func, evaluate, inputs, output, n_seen, n_copies):
            return Look(output, n_seen * n_copies, max_rows or chosen)
    except Exception as error:
        failure = error
    output = evaluate(repeated_rows(inputs), slice(0, n_examples), 1)  # an error of the call itself is raised again
    if n_examples == 1 and max_rows is None:
        return Look(output, 1, 1)
    raise InputError(
        "The rows of a forward pass influence each other: the forward function gives an example another output, or "
        "none, when other rows are in the pass (a graph network with a fixed list of edges, a normalisation over the "
        "batch, an operation for one number of rows). Then a mask per example has no meaning. Explain one example "
        "(one graph) per call. Or mask all rows alike, in passes of the whole batch: share_masks=True with "
        f"perturbations_per_eval=1 for LIME and KernelSHAP, max_examples_per_batch={n_examples} for metrics and "
        "regularizers."
    ) from failure


def repeated_rows(inputs: tuple[Tensor, ...], n_examples: int | None = None, n_copies: int = 1) -> tuple[Tensor, ...]:
    """Return copies of the first examples (None: of all) in new tensors: a forward function may write into them."""
    return tuple(torch.cat([tensor[:n_examples]] * n_copies) for tensor in inputs)


def _measured(
    forward_func: Callable[..., Any], evaluate: Evaluate, inputs: tuple[Tensor, ...], n_examples: int, n_copies: int
) -> tuple[Any, int]:
    """Return the output on copies of the first examples, and the chunk size for the largest layer output."""
    layers = _layers(module_of(forward_func))
    sizes: list[int] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        if module in layers:
            outputs = [output] if isinstance(output, Tensor) else tree_leaves(output)
            n_rows = n_examples * n_copies
            sizes.extend(tensor.numel() // n_rows for tensor in outputs if isinstance(tensor, Tensor))

    with register_module_forward_hook(note) if layers else nullcontext():
        output = evaluate(repeated_rows(inputs, n_examples, n_copies), slice(0, n_examples), n_copies)
    return output, default_rows_per_forward(inputs, max(sizes, default=None))


def _layers(module: nn.Module | None) -> set[nn.Module]:
    """Return the modules whose outputs are measured; none for a compiled model that hooks would compile again.

    Parametrizations are left out, since they return weights. The model itself is left out unless its class is
    PyTorch's own: it may call functions, so the size of its output does not tell how large its layer outputs are.
    """
    if module is None or (has_compiled_parts(module) and not can_run_eagerly()):
        return set()
    module = original(module)
    layers = set(module.modules())
    for part in module.modules():
        if isinstance(part, ParametrizationList):
            layers -= set(part.modules())
    return layers if type(module).__module__.startswith("torch.nn.") else layers - {module}


def _independent(
    forward_func: Callable[..., Any],
    evaluate: Evaluate,
    inputs: tuple[Tensor, ...],
    output: object,
    n_seen: int,
    n_copies: int,
) -> bool:
    """Return False if the rows of a forward pass are found to influence each other.

    The first half of the rows is evaluated again, as two copies in one pass without the second half, and compared with
    the first output. The two copies of a single example are compared with each other.
    """
    n_rows = n_seen * n_copies
    if n_rows == 1 or not isinstance(output, Tensor) or output.shape[:1] != (n_rows,):
        return True  # there is nothing to compare
    module = module_of(forward_func)
    if module is not None and any(map(depends_on_batch, module.modules())):
        return True  # outputs in training mode are random or depend on other rows, so they cannot be compared
    n_half = n_rows // 2
    both = output
    if n_copies == 1:
        both = evaluate(repeated_rows(inputs, n_half, 2), slice(0, n_half), 2)
    known = output[:n_half].repeat(2, *[1] * (output.dim() - 1))
    if _agree(both, known, output):
        return True
    # The comparison proves nothing if the forward function draws random numbers or calls a module in training mode.
    in_training: list[nn.Module] = []
    tensors = [*inputs, output]

    def note(module: nn.Module, arguments: tuple[object, ...]) -> None:
        if depends_on_batch(module):
            in_training.append(module)
        tensors.extend(argument for argument in arguments if isinstance(argument, Tensor))

    with register_module_forward_pre_hook(note):
        again = evaluate(repeated_rows(inputs, n_seen, n_copies), slice(0, n_seen), n_copies)
    if in_training or not _agree(again, output, output):
        return True
    in_halves = precision(output.device) != torch.float32 or any(map(_is_half, tensors))
    return in_halves and _agree(both, known, output, _ROUNDING_OF_HALVES)


def _agree(some: Tensor, known: Tensor, output: Tensor, rounding: float = 1e-5) -> bool:
    """Return True if two outputs are equal up to rounding, relative to the largest of all outputs. NaN counts as equal.

    The tolerance for float64 is that of float32, since a float64 output may come from a float32 model.
    """
    if some.shape != known.shape:
        return False
    wide = torch.promote_types(output.dtype, torch.float32)
    off, output = (some.to(wide) - known.to(wide)).abs(), output.to(wide)
    rounding_off = rounding * output.abs().amax()
    if not bool((off > rounding_off).any()):
        return True
    spread = (output.amax(dim=0) - output.amin(dim=0)).amax()
    return not bool((off > _NEGLIGIBLE * spread + rounding_off).any())


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def slices(total: int, size: int) -> Iterator[slice]:
    """Return slices of the given size that cover ``range(total)``; the last one may be shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def even_slices(total: int, at_most: int) -> Iterator[slice]:
    """Return the smallest number of slices, of nearly equal size.

    A short last slice would take almost as long as a full one.
    """
    n_slices = -(-total // max(1, at_most))
    return slices(total, -(-total // max(1, n_slices)))


def of_one_size(parts: Iterable[slice]) -> list[slice]:
    """Return slices of which the last one, if it is shorter, begins earlier, so that it overlaps the one before it."""
    parts = list(parts)
    size = parts[0].stop - parts[0].start
    return [*parts[:-1], slice(max(0, parts[-1].stop - size), parts[-1].stop)]


def overlaps(parts: Sequence[slice]) -> list[int]:
    """Return how many entries at the start of each slice are those of the one before it."""
    ends = [parts[0].start, *(part.stop for part in parts)]
    return [end - part.start for end, part in zip(ends, parts, strict=False)]


def copies_per_forward(plain: Tensor, together: Callable[[list[int]], Any], tensors: tuple[Tensor, ...]) -> int:
    """Return the number of copies of a batch per forward pass; 1 if the copies influence each other.

    Args:
        plain: the outputs of the batch alone, ``(B, ...)``.
        together: evaluates plain (1) and perturbed (0) copies in one pass, in the given order.
        tensors: the batch.
    """
    n_examples = len(tensors[0])
    if not plain.dim() or len(plain) != n_examples or not n_examples:
        return 1
    if any(len(tensor) != n_examples for tensor in tensors):
        return 1
    at_most = default_rows_per_forward(tensors) // n_examples
    if at_most < 2:
        return 1
    # The plain copies stand between perturbed ones, since a copy may be influenced by the copies before or after it.
    order = [0, 1, 1, 0][:at_most]
    try:
        with no_graph():
            mixed = together(order)
    except Exception:
        return 1  # the forward function may accept batches of one size only
    if not isinstance(mixed, Tensor) or mixed.shape != (len(order) * n_examples, *plain.shape[1:]):
        return 1
    copies = mixed.detach().double().unflatten(0, (len(order), n_examples))
    alone = plain.detach().double()
    # The tolerance is relative to the effect of the perturbation, plus rounding: outputs may have a large offset.
    rounding = _ROUNDING.get(mixed.dtype, _ROUNDING_OF_HALVES) * torch.maximum(copies[0].abs(), alone.abs()).amax()
    off = (copies[1:3] - alone).abs()
    if not bool((off <= _NEGLIGIBLE * (copies[0] - alone).abs().amax() + rounding).all()):
        return 1  # copies influence each other, or an argument of the whole batch was expanded per example
    return at_most
