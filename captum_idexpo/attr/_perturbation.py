"""What a perturbation method explains: a batch, masked in terms of its features, and the samples drawn of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.chunks import look, repeated_rows, slices
from captum_idexpo._core.errors import InputError, NonFiniteError, all_finite, warn
from captum_idexpo._core.features import FeatureLayout, MaskedInputs, as_numbers
from captum_idexpo._core.forward import BatchForward, evaluate_copies
from captum_idexpo._core.inputs import Baseline, as_baselines, as_tuple
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo.attr._graph import no_graph_error
from captum_idexpo.attr.surrogates import Lasso, Surrogate

_VALUES_AT_ONCE = 2**22  # of masks as numbers, or of Gram matrices


@dataclass(frozen=True)
class Problem:
    """What one call of LIME or KernelSHAP explains: a batch, in terms of the features that baselines mask.

    Attributes:
        masked: inputs, baselines and the layout of the features.
        is_tuple: the user passed a tuple of tensors.
        ragged: which tensors have another leading size than the batch (the token ids of a single example, or an empty
            tensor). They are kept as one example ``(1, n, ...)`` and reach the forward function as ``(n, ...)``.
        joint: the forward function returns one value for the whole batch, which then counts as a single example.
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
            TypeError: feature masks that do not hold whole numbers.
            InputTypeError: inputs that are no tensors.
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
        # A batch's rows have the same positions. So have those of a ragged tensor, which is a single example.
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
        """Return the problem, joint or not, and the rows of one forward pass.

        Raises:
            InputError: the rows of a forward pass influence each other, and are masked differently.
            AssertionError: as Captum, where the output has neither one value per example nor one for the batch, or has
                one for the batch and several copies are asked for at a time.
        """
        if self.batch_size == 1 and perturbations_per_eval is not None:
            return self, perturbations_per_eval
        if any(odd and tensor.numel() for odd, tensor in zip(self.ragged, self.inputs, strict=True)):
            return self, 1  # copies of token ids, put one after the other, may need offsets that only the user knows
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
        """Return the examples by the number of features that they have: their numbers in the batch, and a problem each.

        Empty if all examples have the same features.
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
        """Return the parts' coefficients as ``(B, D)``, 0 for features that an example does not have."""
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
        """Return the outputs ``(B, M)`` on copies masked by ``(B or 1, M, D)``, in the ambient gradient mode."""
        # Copy by copy, as the rows of a forward pass.
        keep = (masks if masks.dtype == torch.bool else masks != 0).transpose(0, 1)
        dtypes, few = {tensor.dtype for tensor in self.inputs}, keep.numel() <= _VALUES_AT_ONCE
        if keep.shape[1] == 1 and few and len(dtypes) == 1:
            keep = as_numbers(keep, *dtypes)  # masks for all examples once, not once a chunk
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
        )
        if torch.is_grad_enabled() and not outputs.requires_grad:
            raise no_graph_error(name)
        if not all_finite(outputs):
            raise NonFiniteError(f"{name}: the forward function returned NaN or infinity on a perturbed input.")
        return outputs

    def plain_inputs(self) -> tuple[Tensor, ...]:
        """Return the batch's tensors as copies, into which a forward function may write."""
        return self._rows(repeated_rows(self.inputs))

    def for_user(self, values: tuple[Any, ...]) -> Any:
        """Return values, one per tensor, in the form of the user's inputs: a tuple, or a single value."""
        return values if self.is_tuple else values[0]

    def _rows(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return rows as the forward function knows them."""
        return tuple(row.flatten(0, 1) if odd else row for row, odd in zip(rows, self.ragged, strict=True))

    def _number(self, output: object) -> Tensor:
        dtype = torch.float64 if self.inputs[0].dtype == torch.float64 else torch.float32
        return torch.tensor([output], dtype=dtype, device=self.device)

    def attribution(self, coefficients: Tensor) -> Any:
        """Return each feature's coefficient at each of its positions."""
        first = slice(0, 1) if self.joint else slice(None)
        spread = self.layout.spread(coefficients[None], first)
        attributions = tuple(
            values[0, : 1 if odd else None].expand(-1, *tensor.shape[1:])
            for values, tensor, odd in zip(spread, self.inputs, self.ragged, strict=True)
        )
        return self.for_user(self._rows(tuple(values.contiguous() for values in attributions)))

    def example(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Return one example's inputs and keyword arguments, as Captum hands them to a user's function."""

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
    """Masks and what is fitted to the outputs on them.

    Attributes:
        masks: ``(B or 1, M, D)``.
        weights: ``(B or 1, M)``; None: all 1.
        lengths: how many masks of each example count, the first ones; None: all.
        surrogate: what is fitted in place of the surrogate that the user chose; None: that one.
    """

    masks: Tensor
    weights: Tensor | None = None
    lengths: list[int] | None = None
    surrogate: Surrogate | None = None

    @property
    def n(self) -> int:
        """Samples of an example, at most."""
        return self.masks.shape[1]

    def weighted(self, weights: Tensor) -> Samples:
        """The same masks with other weights."""
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
