"""What a loader yields, as one named tuple."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from captum_idexpo._core.errors import InputError, InputTypeError


class Batch(NamedTuple):
    """One batch of a training: what is explained, what the loss needs, and what only the model needs.

    Attributes:
        inputs: a tensor ``(B, ...)`` or a tuple of tensors, which are explained and masked.
        target: what the loss compares the output with.
        annotations: masks of wrong or right evidence, see `captum_idexpo.regularizers.RightForTheRightReasons`.
        additional_forward_args: a value or a tuple of values that the model takes after the inputs, such as attention
            masks, lengths or metadata. They are neither explained nor masked.

    Example:
        >>> import torch
        >>> from captum_idexpo import Batch
        >>> batch = Batch(torch.randn(2, 5), torch.tensor([0, 1]), additional_forward_args=torch.tensor([5, 3]))
        >>> batch.annotations is None
        True
    """

    inputs: Any
    target: Any
    annotations: Any = None
    additional_forward_args: Any = None


Batch.__module__ = "captum_idexpo"  # where users import it from
Unpack = Callable[[Any], Batch]


def unpacked(batch: object, unpack: Unpack | None) -> Batch:
    """Return what a loader yields as a `Batch`.

    Args:
        batch: a `Batch`; a tuple or list (inputs, target), with annotations third; or a mapping with the names of
            `Batch`'s fields.
        unpack: the user's function for batches of any other form; None: there is none. A `Batch` is taken as it is.

    Raises:
        InputTypeError: a batch of another form.
    """
    if unpack is not None and not isinstance(batch, Batch):
        batch = unpack(batch)
        if not isinstance(batch, Batch):
            batch = _as_batch(batch, "unpack must return a captum_idexpo.Batch, or (inputs, target[, annotations])")
    if not isinstance(batch, Batch):
        batch = _as_batch(
            batch,
            "The loader must yield (inputs, target), (inputs, target, annotations) or a mapping with the names of "
            "captum_idexpo.Batch's fields",
        )
    # A DataLoader makes lists of tuples.
    if isinstance(batch.inputs, list):
        batch = batch._replace(inputs=tuple(batch.inputs))
    if isinstance(batch.additional_forward_args, list):
        batch = batch._replace(additional_forward_args=tuple(batch.additional_forward_args))
    return batch


def _as_batch(batch: object, needed: str) -> Batch:
    if isinstance(batch, Mapping) and {"inputs", "target"} <= set(batch) <= set(Batch._fields):
        return Batch(**batch)
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return Batch(*batch)
    if isinstance(batch, Mapping):
        given = f"a mapping of {', '.join(map(str, batch))}"
    else:
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise InputTypeError(
        f"{needed}; given: {given}. For any other form pass unpack=, for example\n"
        "    unpack=lambda batch: captum_idexpo.Batch(batch['image'], batch['label'])"
    )


def as_side_inputs(additional_forward_args: object, n_examples: int) -> tuple[object, ...]:
    """Return the additional arguments of a batch as a tuple.

    Raises:
        InputError: a tensor that has not one row per example.
        InputTypeError: tensors inside another object, which cannot follow their examples.
    """
    if additional_forward_args is None:
        return ()
    given = additional_forward_args if isinstance(additional_forward_args, tuple) else (additional_forward_args,)
    for number, argument in enumerate(given):
        if not isinstance(argument, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(argument)):
            raise InputTypeError(
                f"additional_forward_args[{number}] is a {type(argument).__name__} of tensors, which cannot follow "
                "their examples: pass each tensor by itself, additional_forward_args=(first, second)."
            )
        if isinstance(argument, Tensor) and (not argument.dim() or len(argument) != n_examples):
            raise InputError(
                f"additional_forward_args[{number}] of shape {tuple(argument.shape)} must have one row for each of the "
                f"{n_examples} examples. Give what is the same for all examples to the forward function: "
                "functools.partial(forward_func, name=tensor)."
            )
    return given
