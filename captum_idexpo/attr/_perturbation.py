"""The batch that LIME or KernelSHAP explains, with its features and baselines, and the masks drawn for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.chunks import look, repeated_rows, slices
from captum_idexpo._core.errors import NAN_OF_MASKED_ROWS, InputError, NonFiniteError, all_finite, warn
from captum_idexpo._core.features import FeatureLayout, MaskedInputs, as_numbers
from captum_idexpo._core.forward import BatchForward, evaluate_copies
from captum_idexpo._core.inputs import Baseline, as_baselines, as_tuple
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo.attr._graph import no_graph_error
from captum_idexpo.attr.surrogates import Lasso, Surrogate

_VALUES_AT_ONCE = 2**22  # upper bound on the values of masks as numbers, or of Gram matrices, held at once


@dataclass(frozen=True)
class Problem:
    """The batch that one call of LIME or KernelSHAP explains, with its features and baselines.

    Attributes:
        masked: inputs, baselines and the layout of the features.
        is_tuple: True if the user passed a tuple of tensors.
        ragged: per tensor, True if its leading size differs from the batch size (the token ids of a single example, or
            an empty tensor). Such a tensor is stored as one example ``(1, n, ...)``; the forward function gets
            ``(n, ...)``.
        joint: True if the forward function returns one value for the whole batch. The batch then counts as one example.
    """

    masked: MaskedInputs
    is_tuple: bool
    ragged: tuple[bool, ...]
    joint: bool = False

    @classmethod
    def of(cls, inputs: object, baselines: object, feature_mask: object) -> Problem:
        """Read a call's arguments.

        Raises:
            InputError: inputs, baselines and masks do not fit each other.
            TypeError: a feature mask does not hold whole numbers.
            InputTypeError: an input is not a tensor.
        """
        tensors = as_tuple(inputs, "inputs")
        batch_size = len(tensors[0])
        if not batch_size:
            raise InputError("The batch is empty: there is nothing to explain.")
        if feature_mask is None and not all(map(len, tensors)):
            raise InputError("An input tensor has no rows, and so no features of its own: leave it out.")
        ragged = tuple(len(tensor) != batch_size for tensor in tensors)
        if batch_size > 1 and any(tensor.numel() for tensor, odd in zip(tensors, ragged, strict=True) if odd):
            raise InputError(f"The input tensors have different batch sizes: {[tuple(t.shape) for t in tensors]}.")
        # All rows of a batch have the same features. The rows of a ragged tensor, a single example, share them too.
        shapes = [torch.Size((1, *t.shape[1:])) if odd else t.shape[1:] for t, odd in zip(tensors, ragged, strict=True)]
        tensors = tuple(t[None] if odd else t for t, odd in zip(tensors, ragged, strict=True))
        by_position = feature_mask is None
        layout = FeatureLayout.of_positions(shapes) if by_position else FeatureLayout.of_mask(feature_mask, tensors)
        if layout.n_features > 10_000:
            warn(
                f"{layout.n_features} features make a large surrogate that is slow to fit: group them with a "
                "feature_mask.",
            )
        aligned = as_baselines(baselines, tensors)
        return cls(MaskedInputs(tensors, aligned, layout), isinstance(inputs, tuple), ragged)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.masked.inputs

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        return self.masked.baselines

    @property
    def layout(self) -> FeatureLayout:
        return self.masked.layout

    @property
    def batch_size(self) -> int:
        return len(self.inputs[0])

    @property
    def n_examples(self) -> int:
        return 1 if self.joint else self.batch_size

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def sized_for(
        self, forward: BatchForward, perturbations_per_eval: int | None, share_masks: bool
    ) -> tuple[Problem, int]:
        """Return the problem, with `joint` set, and the number of rows of one forward pass.

        Raises:
            InputError: the rows of a forward pass influence each other, and they have different masks.
            AssertionError: the output has neither one value per example nor one value for the batch. Or it has one
                value for the batch, and perturbations_per_eval is greater than 1. Captum raises the same error.
        """
        if self.batch_size == 1 and perturbations_per_eval is not None:
            return self, perturbations_per_eval
        if any(odd and tensor.numel() for odd, tensor in zip(self.ragged, self.inputs, strict=True)):
            return self, 1  # concatenated copies of token ids may need offsets, which only the user can compute
        max_rows = None if perturbations_per_eval is None else perturbations_per_eval * self.batch_size
        seen = look(
            forward.forward_func,
            lambda rows, examples, n_copies: forward(self._rows(rows), examples, n_copies),
            self.inputs,
            max_rows,
            together=share_masks and perturbations_per_eval == 1,
        )
        n_values = seen.output.numel() if isinstance(seen.output, Tensor) else 1
        if n_values == 1 < max(seen.n_rows, self.batch_size):
            assert perturbations_per_eval in (None, 1), (
                f"perturbations_per_eval={perturbations_per_eval}, but the forward function returns one value for the "
                "whole batch: leave it out, or set it to 1."
            )
            return dataclasses.replace(self, joint=self.batch_size > 1), 1
        assert n_values == seen.n_rows, (
            f"The forward function returned {n_values} values for {seen.n_rows} examples (after choosing the target): "
            "it must return one for each example or one for the batch. Is the target missing?"
        )
        return self, seen.max_rows

    def parts(self) -> list[tuple[Tensor, Problem]]:
        """Group the examples by their number of features; return the row indices and the problem of each group.

        The list is empty if all examples have the same features.
        """
        present = None if self.joint else self.layout.present()
        if present is None:
            return []
        counts = present.sum(dim=1)
        return [
            (rows, self._of_rows(rows, present[rows]))
            for rows in ((counts == count).nonzero().flatten() for count in counts.unique())
        ]

    def joined(self, parts: list[tuple[Tensor, Problem]], coefficients: list[Tensor]) -> Tensor:
        """Return the coefficients of the groups as ``(B, D)``, with 0 for features that an example does not have."""
        present = self.layout.present()
        if not parts or present is None:
            return coefficients[0]
        rows = torch.cat([rows for rows, _ in parts])
        wide = [
            values.new_zeros(len(values), self.layout.n_features).masked_scatter(present[rows], values)
            for (rows, _), values in zip(parts, coefficients, strict=True)
        ]
        return torch.cat(wide)[rows.argsort()]

    def _of_rows(self, rows: Tensor, present: Tensor) -> Problem:
        inputs = tuple(tensor[rows] for tensor in self.inputs)
        baselines = tuple(
            baseline[rows] if isinstance(baseline, Tensor) and baseline.dim() and len(baseline) > 1 else baseline
            for baseline in self.baselines
        )
        masked = MaskedInputs(inputs, baselines, self.layout.of_rows(rows, present))
        return Problem(masked, self.is_tuple, (False,) * len(inputs))

    def evaluate(
        self,
        forward: BatchForward,
        masks: Tensor,
        rows_per_forward: int,
        name: str,
        on_forward: Callable[[], object],
        memory: MemoryBudget | None,
    ) -> Tensor:
        """Return the outputs ``(B, M)`` on copies masked by ``(B or 1, M, D)``, in the current gradient mode."""
        # The copies become the first axis, because the rows of a forward pass are ordered copy by copy.
        keep = (masks if masks.dtype == torch.bool else masks != 0).transpose(0, 1)
        dtypes, few = {tensor.dtype for tensor in self.inputs}, keep.numel() <= _VALUES_AT_ONCE
        if keep.shape[1] == 1 and few and len(dtypes) == 1:
            keep = as_numbers(keep, *dtypes)  # convert shared masks once instead of once per chunk
        everyone = slice(None)

        def perturb(examples: slice, copies: slice, *inputs: Tensor) -> tuple[Tensor, ...]:
            chosen = keep[copies] if keep.shape[1] == 1 else keep[copies, examples]
            return self.masked.copies(chosen, everyone if self.joint else examples, inputs)

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
            one_size=forward.is_compiled,
        )
        if torch.is_grad_enabled() and not outputs.requires_grad:
            raise no_graph_error(name)
        if not all_finite(outputs):
            raise NonFiniteError(
                f"{name}: the forward function returned NaN or infinity on a perturbed input.{NAN_OF_MASKED_ROWS}"
            )
        return outputs

    def plain_inputs(self) -> tuple[Tensor, ...]:
        """Return copies of the batch's tensors, because a forward function may write into its inputs."""
        return self._rows(repeated_rows(self.inputs))

    def for_user(self, values: tuple[Any, ...]) -> Any:
        """Return the values, one per tensor, as a tuple if the user passed a tuple, else as a single value."""
        return values if self.is_tuple else values[0]

    def _rows(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return rows in the shapes that the forward function expects: ragged tensors without the batch axis."""
        return tuple(row.flatten(0, 1) if odd else row for row, odd in zip(rows, self.ragged, strict=True))

    def _number(self, output: object) -> Tensor:
        dtype = torch.float64 if self.inputs[0].dtype == torch.float64 else torch.float32
        return torch.tensor([output], dtype=dtype, device=self.device)

    def attribution(self, coefficients: Tensor) -> Any:
        """Return tensors of the inputs' shape that hold the coefficient of each location's feature."""
        first = slice(0, 1) if self.joint else slice(None)
        spread = self.layout.spread(coefficients[None], first)
        attributions = tuple(
            values[0, : 1 if odd else None].expand(-1, *tensor.shape[1:])
            for values, tensor, odd in zip(spread, self.inputs, self.ragged, strict=True)
        )
        return self.for_user(self._rows(tuple(values.contiguous() for values in attributions)))

    def example(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Return one example's inputs and keyword arguments, in the form that Captum passes to a user's function."""

        def select(values: tuple[Any, ...]) -> Any:
            chosen = tuple(
                value[index : index + 1]
                if not self.joint and isinstance(value, Tensor) and value.dim() and len(value) == self.batch_size
                else value
                for value in values
            )
            return self.for_user(chosen)

        return select(self.plain_inputs()), {
            "baselines": select(self.baselines),
            "feature_mask": select(self.layout.masks()),
            "num_interp_features": self.layout.n_features,
        }


@dataclass(frozen=True)
class Samples:
    """Masks with their weights, to which a surrogate is fitted.

    Attributes:
        masks: ``(B or 1, M, D)``.
        weights: ``(B or 1, M)``; None: all weights are 1.
        lengths: per example, only this many leading masks are used; None: all masks are used.
        surrogate: replaces the surrogate that the user chose; None: the user's surrogate is fitted.
    """

    masks: Tensor
    weights: Tensor | None = None
    lengths: list[int] | None = None
    surrogate: Surrogate | None = None

    @property
    def n(self) -> int:
        """The largest number of samples of an example."""
        return self.masks.shape[1]

    def weighted(self, weights: Tensor) -> Samples:
        """Return the same masks with other weights."""
        return dataclasses.replace(self, weights=weights)

    def fit(self, surrogate: Surrogate, outputs: Tensor) -> Tensor:
        """Return the surrogate's coefficients ``(B, D)`` for outputs ``(B, M)``."""
        surrogate = surrogate if self.surrogate is None else self.surrogate
        weights = self.masks.new_ones(1, self.n, dtype=outputs.dtype) if self.weights is None else self.weights
        if self.weights is not None:
            _check_weights(self.weights)
        if self.lengths is not None and min(self.lengths) < max(self.lengths):
            parts = [(slice(index, index + 1), slice(length)) for index, length in enumerate(self.lengths)]
            return torch.cat([surrogate.solve(self.masks[at], outputs[at], weights[at]) for at in parts])
        # A solve copies the masks to double precision and builds Gram matrices. Large systems are solved in blocks.
        n_features = self.masks.shape[2]
        at_once = max(1, _VALUES_AT_ONCE // max(1, max(self.n, n_features) * n_features))
        # A Lasso has an active set, and so a system, per example, even if the masks and weights are shared.
        one_system = len(self.masks) == len(weights) == 1 and not isinstance(surrogate, Lasso)
        if one_system or len(outputs) <= at_once:
            return surrogate.solve(self.masks, outputs, weights)

        def part(tensor: Tensor, at: slice) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[at]

        blocks = slices(len(outputs), at_once)
        return torch.cat([surrogate.solve(part(self.masks, at), outputs[at], part(weights, at)) for at in blocks])


def _check_weights(weights: Tensor) -> None:
    totals = weights.sum(dim=1).tolist()
    if not (all(map(math.isfinite, totals)) or all_finite(weights)):  # a sum of finite weights may overflow
        raise NonFiniteError("The similarity function returned a value that is not finite.")
    if weights.amin().item() < 0:
        raise ValueError("The similarity function returned a negative value: weights must be zero or positive.")
    if not min(totals) > 0:
        raise ValueError("The similarity of every perturbed copy is 0: raise the kernel_width.")
