"""How many rows a forward pass has, and whether they influence each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from captum_idexpo._core.modes import is_compiled, module_of, no_graph

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


def slices(total: int, size: int) -> Iterator[slice]:
    """``range(total)`` in slices of the given size; the last one may be shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def even_slices(total: int, at_most: int) -> Iterator[slice]:
    """As few slices as can be, of nearly one size: a short last one would cost most of a long one's time."""
    n_slices = -(-total // max(1, at_most))
    return slices(total, -(-total // max(1, n_slices)))


_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}  # of outputs in passes of different sizes, by their largest


def copies_per_forward(
    plain: Tensor, perturbed: Tensor | None, together: Callable[[list[int]], Any], tensors: tuple[Tensor, ...]
) -> int:
    """How many copies of a batch one forward pass is given: as many as suit the device, or 1 where they do not mix.

    Args:
        plain: the outputs of the batch alone, ``(B, ...)``.
        perturbed: those of a perturbed copy alone, if they are known.
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
    alone = torch.stack([copies[0] if perturbed is None else perturbed.detach().double(), plain.detach().double()])
    # What counts is the size of what is measured, beyond rounding: outputs may have a large offset.
    rounding = _ROUNDING.get(mixed.dtype, 0.03) * alone.abs().amax()
    known = slice(1, 3) if perturbed is None else slice(None)
    off = (copies - alone[order])[known].abs()
    if not bool((off <= 3e-3 * alone.diff(dim=0).abs().amax() + rounding).all()):
        return 1  # copies move each other, or an argument was taken for one of each example
    return at_most
