"""How many rows a forward pass has, and whether the rows of a pass influence each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.modes import depends_on_batch, is_compiled, module_of, no_graph, precision

# On a CPU a layer's output of about two megabytes stays in the caches and is large enough to occupy the cores: mostly
# within a few percent of the best size, for networks from 64 to 65,000 values, where 400 rows of a ResNet-20 take half
# as long again. A GPU wants more; its numbers are not measured.
_VALUES_ON_CPU, _MAX_ROWS_ON_CPU = 2**19, 2**12
_VALUES_ON_ACCELERATORS, _MAX_ROWS_ON_ACCELERATORS = 2**26, 2**13
# Fetching a network's weights takes as long for a few rows as for one: 32 rows of wide layers, 8 of large images.
_ROWS_OF_WIDE_LAYERS = 32
_ROWS_OF_LARGE_INPUTS = 8
_VALUES_OF_FEW_ROWS = 2**21
_LARGEST_OVER_INPUTS = 4  # assumed of a forward function that is no module
ROWS_TO_LOOK_AT = 8
"""Rows that show the shape of a forward function's output, or the size of its graph."""
# Rounding of outputs in passes of different sizes, as a share of the largest output.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
_ROUNDING_OF_HALVES = 0.03
# Differences below this share of the outputs' spread count as rounding: convolutions may change their algorithm.
_NEGLIGIBLE = 3e-3

Evaluate = Callable[[tuple[Tensor, ...], slice, int], Any]
"""(rows, examples, number of copies) -> the output on so many copies of these examples."""


def default_rows_per_forward(inputs: tuple[Tensor, ...], largest_output: int | None = None) -> int:
    """Return the rows of one forward pass if the user names none, the same number in every run.

    As many as give the largest of a network's tensors 2^19 values on a CPU (up to 4096 rows), 2^26 (8192) on an
    accelerator. Where that is less, 32 rows of it or eight of the inputs, if they have 2^21 values at most; one row at
    least.

    Args:
        inputs: tensors ``(B, ...)``.
        largest_output: values per row of the largest output of a module; None: unknown, four times the inputs' values.
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
    """What a few rows show of a forward function."""

    output: Any
    """On `n_rows` rows."""
    n_rows: int
    max_rows: int
    """Rows of a forward pass, named by the user or chosen from the largest layer output."""


@no_graph()
def look(
    forward_func: Callable[..., Any],
    evaluate: Evaluate,
    inputs: tuple[Tensor, ...],
    max_rows: int | None = None,
    *,
    together: bool = False,
) -> Look:
    """Evaluate a few rows, check that rows do not influence each other, and choose the rows of a forward pass.

    A module's layers tell how many rows suit it. A forward function that is no module is not looked into, nor a
    compiled one, which under hooks may be compiled anew.

    Args:
        forward_func: what `evaluate` calls.
        evaluate: evaluates rows.
        inputs: tensors ``(B, ...)``.
        max_rows: the rows of a forward pass that the user names; None: chosen here. A single example whose copies
            influence each other gets one row per pass.
        together: every forward pass will have each row of the batch once, so rows may influence each other.

    Raises:
        InputError: the rows of a forward pass influence each other.
    """
    n_examples = len(inputs[0])
    if together:
        return Look(evaluate(repeated_rows(inputs), slice(0, n_examples), 1), n_examples, n_examples)
    limit = min(max_rows or default_rows_per_forward(inputs), ROWS_TO_LOOK_AT)
    n_seen = min(n_examples, limit)
    n_copies = 2 if n_examples == 1 and max_rows != 1 else 1  # only two rows tell one value per row from one per batch
    failure = None
    try:
        output, chosen = _measured(forward_func, evaluate, inputs, n_seen, n_copies)
        if _independent(forward_func, evaluate, inputs, output, n_seen, n_copies):
            return Look(output, n_seen * n_copies, max_rows or chosen)
    except Exception as error:
        failure = error
    output = evaluate(repeated_rows(inputs), slice(0, n_examples), 1)  # a call that is wrong raises again
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
    """Return new rows, copies of the first examples (None: of all): a forward function may write into them."""
    return tuple(torch.cat([tensor[:n_examples]] * n_copies) for tensor in inputs)


def _measured(
    forward_func: Callable[..., Any], evaluate: Evaluate, inputs: tuple[Tensor, ...], n_examples: int, n_copies: int
) -> tuple[Any, int]:
    """Return the output on copies of the first examples, and how many rows suit the largest layer output."""
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


def _independent(
    forward_func: Callable[..., Any],
    evaluate: Evaluate,
    inputs: tuple[Tensor, ...],
    output: object,
    n_seen: int,
    n_copies: int,
) -> bool:
    """Return True unless the rows of a pass are seen to influence each other.

    The first half of the rows that were seen is evaluated twice in one pass, without the second half. Two copies of a
    single example are compared with each other.
    """
    n_rows = n_seen * n_copies
    if n_rows == 1 or not isinstance(output, Tensor) or output.shape[:1] != (n_rows,):
        return True  # there is nothing to compare
    module = module_of(forward_func)
    if module is not None and any(map(depends_on_batch, module.modules())):
        return True  # in training mode
    n_half = n_rows // 2
    both = output
    if n_copies == 1:
        both = evaluate(repeated_rows(inputs, n_half, 2), slice(0, n_half), 2)
    known = output[:n_half].repeat(2, *[1] * (output.dim() - 1))
    if _agree(both, known, output):
        return True
    # A forward function that draws random numbers, or calls a module in training mode, tells nothing.
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
    """Return True if outputs are the same but for rounding, on the scale of all outputs seen. NaN is like anything.

    A float64 output, too, may come from a float32 model.
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
    """``range(total)`` in slices of the given size; the last one may be shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def even_slices(total: int, at_most: int) -> Iterator[slice]:
    """As few slices as can be, of nearly one size: a short last one would cost most of a long one's time."""
    n_slices = -(-total // max(1, at_most))
    return slices(total, -(-total // max(1, n_slices)))


def copies_per_forward(plain: Tensor, together: Callable[[list[int]], Any], tensors: tuple[Tensor, ...]) -> int:
    """Return how many copies of a batch one forward pass is given: as many as suit the device, or 1 if they mix.

    Args:
        plain: the outputs of the batch alone, ``(B, ...)``.
        together: evaluates plain (1) and perturbed (0) copies in one pass, in the order given.
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
    # A copy may be moved by those before it or behind it, by the first one's rows or the last one's.
    order = [0, 1, 1, 0][:at_most]
    try:
        with no_graph():
            mixed = together(order)
    except Exception:
        return 1  # it may know batches of one size only
    if not isinstance(mixed, Tensor) or mixed.shape != (len(order) * n_examples, *plain.shape[1:]):
        return 1
    copies = mixed.detach().double().unflatten(0, (len(order), n_examples))
    alone = plain.detach().double()
    # What counts is the size of what is measured, beyond rounding: outputs may have a large offset.
    rounding = _ROUNDING.get(mixed.dtype, _ROUNDING_OF_HALVES) * torch.maximum(copies[0].abs(), alone.abs()).amax()
    off = (copies[1:3] - alone).abs()
    if not bool((off <= _NEGLIGIBLE * (copies[0] - alone).abs().amax() + rounding).all()):
        return 1  # copies move each other, or an argument was taken for one of each example
    return at_most
