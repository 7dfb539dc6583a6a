"""Path integrals a few steps at a time."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from captum.attr._utils.approximation_methods import approximation_parameters
from torch import Tensor

from captum_idexpo._core.errors import warn
from captum_idexpo.attr._graph import keeps_graph

Explainer = TypeVar("Explainer", bound="InSteps")


class InSteps:
    """A path integral whose steps are evaluated ``internal_batch_size`` rows at a time.

    As in Captum, but each chunk keeps its graph, where Captum detaches all but the first.
    """

    _steps_shared_by_chunks = 0
    """1 where consecutive steps are compared, so that each chunk starts with the last step of the one before."""
    _internal_batch_size: int | None = None

    def in_steps_of(self: Explainer, internal_batch_size: int | None) -> Explainer:
        """This explainer for one call with so many rows."""
        explainer = copy.copy(self)
        explainer._internal_batch_size = internal_batch_size
        return explainer

    def _attribute(self, *, inputs: tuple[Tensor, ...], n_steps: int, method: str, **arguments: Any) -> Any:
        """Captum's computation over all steps at once, or summed over chunks of them."""
        attribute: Any = super()._attribute  # type: ignore[misc]
        if self._internal_batch_size is None or "step_sizes_and_alphas" in arguments:
            return attribute(inputs=inputs, n_steps=n_steps, method=method, **arguments)
        shared = self._steps_shared_by_chunks
        size = _steps_at_a_time(self._internal_batch_size, len(inputs[0]), 1 + shared)
        step_sizes, alphas = (function(n_steps + shared) for function in approximation_parameters(method))
        total: Any = None
        for start in range(0, n_steps, size - shared):
            chunk = attribute(
                inputs=inputs,
                n_steps=len(alphas[start : start + size]) - shared,
                method=method,
                step_sizes_and_alphas=(step_sizes[start : start + size], alphas[start : start + size]),
                **arguments,
            )
            total = _added(total, chunk if isinstance(chunk, tuple) else (chunk,))
        return total if isinstance(chunk, tuple) else total[0]


def _added(total: tuple[Tensor, ...] | None, chunk: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sum so far, which holds on to the chunks' graphs only where they are wanted."""
    chunk = chunk if keeps_graph() else tuple(tensor.detach() for tensor in chunk)
    return chunk if total is None else tuple(map(torch.add, total, chunk))


def _steps_at_a_time(internal_batch_size: int, n_examples: int, at_least: int) -> int:
    if internal_batch_size < at_least * n_examples:
        warn(
            f"internal_batch_size={internal_batch_size} is less than {at_least} steps of {n_examples} examples: "
            f"{at_least * n_examples} rows are evaluated at a time.",
        )
    return max(at_least, internal_batch_size // n_examples)
