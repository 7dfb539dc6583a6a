"""What a perturbation method explains: a batch, masked in terms of its features, and the samples drawn of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum._utils.common import _is_tuple
from captum.attr._core.lime import construct_feature_mask
from captum.attr._utils.common import _format_input_baseline
from torch import Tensor

from captum_idexpo._core.chunks import look, slices
from captum_idexpo._core.errors import NonFiniteError, all_finite, warn
from captum_idexpo._core.features import FeatureLayout, as_numbers, masked_copies
from captum_idexpo._core.forward import BatchForward, evaluate_copies
from captum_idexpo._core.inputs import align_baselines
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.modes import no_graph
from captum_idexpo.attr._graph import no_graph_error
from captum_idexpo.attr.surrogates import Lasso, Surrogate

_VALUES_AT_ONCE = 2**22  # of masks as numbers, or of Gram matrices


@dataclass(frozen=True)
class Problem:
    """What one call explains: inputs, the baselines that mask them, and the features in terms of which it is explained.

    `joint`: the forward function returns one value for the whole batch, which then counts as a single example.
    `ragged`: which tensors have another leading size than the batch (the token ids of a single example, or an empty
    tensor); they are kept as one example ``(1, n, ...)`` and reach the forward function as ``(n, ...)``.
    """

    inputs: tuple[Tensor, ...]
    baselines: tuple[Any, ...]
    feature_mask: tuple[Tensor, ...] | None
    layout: FeatureLayout
    is_tuple: bool
    ragged: tuple[bool, ...]
    joint: bool = False

    @classmethod
    def of(cls, inputs: Any, baselines: Any, feature_mask: Any) -> Problem:
        """A call's arguments, formatted and checked.

        Raises:
            AssertionError, IndexError, RuntimeError: as Captum, on inputs, baselines and masks that do not fit.
        """
        is_tuple = _is_tuple(inputs)
        tensors, formatted_baselines = _format_input_baseline(inputs, baselines)
        batch_size = len(tensors[0])
        if not batch_size:
            raise IndexError("The batch is empty: there is nothing to explain.")
        if feature_mask is None and not all(map(len, tensors)):
            raise IndexError("An input tensor has no rows, and so no features of its own: leave it out.")
        ragged = tuple(len(tensor) != batch_size for tensor in tensors)
        if batch_size > 1 and any(tensor.numel() for tensor, odd in zip(tensors, ragged, strict=True) if odd):
            raise AssertionError(f"The input tensors have different batch sizes: {[tuple(t.shape) for t in tensors]}.")
        if len(formatted_baselines) != len(tensors):
            raise IndexError(f"There are {len(formatted_baselines)} baselines for {len(tensors)} input tensors.")
        try:
            masks = None if feature_mask is None else construct_feature_mask(feature_mask, tensors)[0]
            # A batch's rows have the same positions; so have those of a ragged tensor, which is a single example.
            shapes = [
                torch.Size((1, *t.shape[1:])) if odd else t.shape[1:] for t, odd in zip(tensors, ragged, strict=True)
            ]
            tensors = tuple(t[None] if odd else t for t, odd in zip(tensors, ragged, strict=True))
            layout = FeatureLayout.of_positions(shapes) if masks is None else FeatureLayout.of_mask(masks, tensors)
            aligned = align_baselines(formatted_baselines, tensors)
        except TypeError as error:  # Captum's exception types, this package's texts
            raise IndexError(str(error)) from None
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        if layout.n_features > 10_000:
            warn(
                f"{layout.n_features} features make a large surrogate that is slow to fit: group them with a "
                "feature_mask.",
            )
        return cls(tensors, aligned, masks, layout, is_tuple, ragged)

    @property
    def batch_size(self) -> int:
        return len(self.inputs[0])

    @property
    def n_examples(self) -> int:
        return 1 if self.joint else self.batch_size

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def sized_for(self, forward: BatchForward, perturbations_per_eval: int | None) -> tuple[Problem, int]:
        """The problem, joint or not as the forward function has it, and the rows that one forward pass is given.

        Raises:
            AssertionError: as Captum, where the output has neither one value an example nor one for the batch, or has
                one for the batch and several copies are asked for at a time.
        """
        if self.batch_size == 1 and perturbations_per_eval is not None:
            return self, perturbations_per_eval
        if any(odd and tensor.numel() for odd, tensor in zip(self.ragged, self.inputs, strict=True)):
            return self, 1  # copies of token ids, put one after the other, may need offsets that only the user knows
        n_copies = 2 if self.batch_size == 1 else 1  # only two rows tell one value a row from one value a batch
        rows = self._rows(self.inputs if n_copies == 1 else tuple(torch.cat([t] * n_copies) for t in self.inputs))
        try:
            with no_graph():
                output, rows_per_forward = look(
                    forward.forward_func, lambda: forward(rows, n_copies=n_copies), self.inputs, len(rows[0])
                )
        except Exception:
            if n_copies == 1:
                raise
            return self, 1  # it may know one row only; if something else is wrong, that row will tell
        n_values = output.numel() if isinstance(output, Tensor) else 1
        if n_values == 1:
            assert perturbations_per_eval in (None, 1), (
                f"perturbations_per_eval={perturbations_per_eval}, but the forward function returns one value for the "
                "whole batch: leave it out, or set it to 1."
            )
            return dataclasses.replace(self, joint=self.batch_size > 1), 1
        assert n_values == self.batch_size * n_copies, (
            f"The forward function returned {n_values} values for {self.batch_size * n_copies} examples (after "
            "choosing the target): it must return one for each example or one for the batch. Is the target missing?"
        )
        if perturbations_per_eval is not None:
            return self, perturbations_per_eval * self.batch_size
        return self, rows_per_forward

    def evaluate(
        self,
        forward: BatchForward,
        masks: Tensor,
        rows_per_forward: int,
        name: str,
        on_forward: Callable[[], object],
        memory: MemoryBudget | None,
    ) -> Tensor:
        """The outputs ``(B, M)`` on copies masked by ``(B or 1, M, D)``; under enabled gradients they need a graph."""
        # Copy by copy, as the rows of a forward pass.
        keep = (masks if masks.dtype == torch.bool else masks != 0).transpose(0, 1)
        dtypes, few = {tensor.dtype for tensor in self.inputs}, keep.numel() <= _VALUES_AT_ONCE
        if keep.shape[1] == 1 and few and len(dtypes) == 1:
            keep = as_numbers(keep, *dtypes)  # masks for all examples once, not once a chunk
        everyone = slice(None)

        def perturb(examples: slice, copies: slice, *inputs: Tensor) -> tuple[Tensor, ...]:
            chosen = keep[copies] if keep.shape[1] == 1 else keep[copies, examples]
            examples = everyone if self.joint else examples
            return masked_copies(inputs, self.baselines, self.layout, chosen, examples)

        def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            output = forward(self._rows(rows), everyone if self.joint else examples, n_copies)
            values = output.flatten() if isinstance(output, Tensor) else self._number(output)
            n_expected = n_copies * (examples.stop - examples.start)
            assert values.numel() == n_expected, (
                f"The forward function returned {values.numel()} values for {n_expected} perturbed inputs (after "
                "choosing the target): it must return one for each. Is the target missing, or does it return one value "
                "for the whole batch (then perturbations_per_eval must be 1)?"
            )
            return values if values.dtype in (torch.float32, torch.float64) else values.float()

        outputs = evaluate_copies(
            evaluate,
            perturb,
            self.n_examples,
            len(keep),
            rows_per_forward,
            through=self.inputs,
            memory=memory,
            on_forward=on_forward,
        )
        if torch.is_grad_enabled() and not outputs.requires_grad:
            raise no_graph_error(name)
        if not all_finite(outputs):
            raise NonFiniteError(f"{name}: the forward function returned NaN or infinity on a perturbed input.")
        return outputs

    def _rows(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rows as the forward function knows them."""
        return tuple(row.flatten(0, 1) if odd else row for row, odd in zip(rows, self.ragged, strict=True))

    def _number(self, output: Any) -> Tensor:
        dtype = torch.float64 if self.inputs[0].dtype == torch.float64 else torch.float32
        return torch.tensor([output], dtype=dtype, device=self.device)

    def attribution(self, coefficients: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Each feature's coefficient at each of its positions."""
        first = slice(0, 1) if self.joint else slice(None)
        spread = self.layout.spread(coefficients[None], first)
        attributions = tuple(
            values[0, : 1 if odd else None].expand(-1, *tensor.shape[1:])
            for values, tensor, odd in zip(spread, self.inputs, self.ragged, strict=True)
        )
        attributions = self._rows(tuple(values.contiguous() for values in attributions))
        return attributions if self.is_tuple else attributions[0]

    def example(self, index: int) -> tuple[Any, dict[str, Any]]:
        """One example's inputs and keyword arguments as Captum hands them to a user's function."""

        def select(values: tuple[Any, ...]) -> Any:
            chosen = tuple(
                value[index : index + 1]
                if not self.joint and isinstance(value, Tensor) and value.dim() and len(value) == self.batch_size
                else value
                for value in values
            )
            return chosen if self.is_tuple else chosen[0]

        inputs = self._rows(self.inputs)
        masks = self.feature_mask or construct_feature_mask(None, inputs)[0]
        return select(inputs), {
            "baselines": select(self.baselines),
            "feature_mask": select(masks),
            "num_interp_features": self.layout.n_features,
        }


@dataclass(frozen=True)
class Samples:
    """Masks ``(B or 1, M, D)`` and their weights ``(B or 1, M)``, 1 if None; of example b the first ``lengths[b]``."""

    masks: Tensor
    weights: Tensor | None = None
    lengths: list[int] | None = None

    @property
    def n(self) -> int:
        """Samples of an example, at most."""
        return self.masks.shape[1]

    def weighted(self, weights: Tensor) -> Samples:
        """The same masks with other weights."""
        return dataclasses.replace(self, weights=weights)

    def fit(self, surrogate: Surrogate, outputs: Tensor) -> Tensor:
        """The surrogate's coefficients ``(B, D)`` for outputs ``(B, M)``."""
        weights = self.masks.new_ones(1, self.n, dtype=outputs.dtype) if self.weights is None else self.weights
        if self.weights is not None:
            _check_weights(self.weights)
        if self.lengths is not None and min(self.lengths) < max(self.lengths):
            parts = [(slice(index, index + 1), slice(length)) for index, length in enumerate(self.lengths)]
            return torch.cat([surrogate.solve(self.masks[at], outputs[at], weights[at]) for at in parts])
        # Systems are copies of the masks in double precision, and their Gram matrices: of large ones a few at a time.
        n_features = self.masks.shape[2]
        at_once = max(1, _VALUES_AT_ONCE // max(1, max(self.n, n_features) * n_features))
        # A Lasso's active set makes a system of each example's, whatever they share.
        one_system = len(self.masks) == len(weights) == 1 and not isinstance(surrogate, Lasso)
        if one_system or len(outputs) <= at_once:
            return surrogate.solve(self.masks, outputs, weights)

        def part(tensor: Tensor, at: slice) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[at]

        blocks = slices(len(outputs), at_once)
        return torch.cat([surrogate.solve(part(self.masks, at), outputs[at], part(weights, at)) for at in blocks])


def _check_weights(weights: Tensor) -> None:
    totals = weights.sum(dim=1).tolist()
    if not (all(map(math.isfinite, totals)) or all_finite(weights)):  # a sum may overflow
        raise NonFiniteError("The similarity function returned a value that is not finite.")
    if weights.amin().item() < 0:
        raise ValueError("The similarity function returned a negative value: weights must be zero or positive.")
    if not min(totals) > 0:
        raise ValueError("The similarity of every perturbed copy is 0: raise the kernel_width.")
