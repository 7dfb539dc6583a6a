"""LIME, trainable: Captum's numbers for a batch in one computation, with a graph into the model's weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum._utils.common import _is_tuple
from captum._utils.models.model import Model
from captum._utils.progress import NullProgress, progress
from captum._utils.typing import BaselineType, TargetType, TensorOrTupleOfTensorsGeneric
from captum.attr import Lime as CaptumLime
from captum.attr._core.lime import construct_feature_mask, default_perturb_func
from captum.attr._utils.common import _format_input_baseline
from captum.log import log_usage
from torch import Generator, Tensor, nn

from captum_idexpo._errors import NonFiniteError
from captum_idexpo._evaluation import (
    BatchForward,
    align_baselines,
    default_rows_per_forward,
    evaluate_copies,
    masked_copies,
)
from captum_idexpo._features import FeatureLayout
from captum_idexpo.attr import sampling as streams
from captum_idexpo.attr._graph import no_graph_error, require_gradients_enabled
from captum_idexpo.attr.similarity import InputKernel, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge, Surrogate, as_surrogate


class Lime(CaptumLime):
    """LIME (Ribeiro et al. 2016, arXiv 1602.04938), `captum.attr.Lime` with a graph into the model's weights.

    Same arguments and, for the same seed, same numbers as Captum's class; a batch is one computation. Captum's
    scikit-learn surrogates and default similarity are recognised and solved in closed form; any other similarity or
    perturbation function is called sample by sample as Captum calls it, and any other interpretable model takes
    Captum's own path, which has no graph.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``, of which the target
            is explained, or one value for the whole batch.
        interpretable_model: the surrogate, one of `captum_idexpo.attr.surrogates` or a Captum model. None: Captum's
            default, a Lasso with alpha 0.01, which needs scikit-learn.
        similarity_func: weight of a perturbed copy. None: Captum's default, an exponential kernel of width 1 on the
            cosine distance of the inputs.
        perturb_func: draws a mask. None: each feature is kept with probability 1/2.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Lime
        >>> from captum_idexpo.attr.surrogates import Ridge
        >>> model = torch.nn.Linear(3, 2)
        >>> lime = Lime(model, interpretable_model=Ridge(alpha=0.01))
        >>> attribution = lime.attribute(torch.randn(4, 3), target=1, n_samples=100, create_graph=True)
        >>> attribution.shape
        torch.Size([4, 3])
        >>> attribution.square().sum().backward()
        >>> bool(model.weight.grad[1].ne(0).all())
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Model | Surrogate | None = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(forward_func, interpretable_model, similarity_func, perturb_func)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        return_input_shape: bool = True,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
        sampling: str = "captum",
        share_masks: bool = False,
        generator: Generator | None = None,
    ) -> TensorOrTupleOfTensorsGeneric:
        """The coefficients of the surrogate fitted to the outputs on masked copies.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them, of any dtype.
            baselines: what stands in place of a masked feature: None (zero), a number, a tensor that broadcasts to
                the inputs, or a tuple of these.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: integers numbering the features from 0, of the inputs' shape or broadcasting to it; None:
                every element is a feature.
            n_samples: M, masked copies an example.
            perturbations_per_eval: masked copies of each example in one forward pass, so that it has this many times
                B rows. None: as many as fit 2^18 input values on a CPU, 2^24 on an accelerator.
            return_input_shape: spread the coefficients over the inputs; else return them, ``(B, D)``.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the graph of the forward function; else it is detached.
            sampling: "captum" draws Captum's masks from torch's global generator; "independent" draws masks of the
                same distribution at once, on the inputs' device.
            share_masks: use the same masks for all examples of the batch.
            generator: source of the "independent" masks.

        Returns:
            Attributions of the inputs' shape (the first one's where the forward function returns one value a batch),
            tuple in, tuple out; dtype that of the outputs, at least float32.

        Raises:
            RuntimeError: create_graph where no graph can exist; baselines that do not broadcast to the inputs.
            ValueError: an unknown sampling; a generator with Captum's stream; outputs that are not finite.
            AssertionError, IndexError: as Captum, on a target or feature mask that does not fit.
        """
        name = type(self).__name__
        _check_arguments(name, n_samples, perturbations_per_eval, create_graph, sampling, generator)
        surrogate = self._surrogate()
        if surrogate is None:
            if create_graph or share_masks or sampling != "captum":
                raise RuntimeError(
                    f"The interpretable model {self.interpretable_model!r} is fitted by code that has no gradient and "
                    "no batch form: use one of captum_idexpo.attr.surrogates, or leave create_graph, share_masks and "
                    "sampling at their defaults."
                )
            return super().attribute.__wrapped__(
                self,
                inputs,
                baselines,
                target,
                additional_forward_args,
                feature_mask,
                n_samples,
                perturbations_per_eval or 1,
                return_input_shape,
                show_progress,
            )

        problem = _Problem.of(inputs, baselines, feature_mask)
        forward = BatchForward(self.forward_func, additional_forward_args, problem.batch_size, target)
        rows_per_forward = problem.settle_rows_per_forward(forward, perturbations_per_eval)
        with torch.no_grad():
            samples = self._draw(problem, n_samples, sampling, 1 if share_masks else problem.n_examples, generator)
        with torch.set_grad_enabled(create_graph):
            n_forwards = math.ceil(n_samples / max(1, rows_per_forward // problem.n_examples))
            bar_class = progress if show_progress else NullProgress
            with bar_class(total=n_forwards, desc=f"{self.get_name()} attribution") as bar:
                outputs = problem.evaluate(forward, samples.masks, rows_per_forward, name, bar.update)
            coefficients = samples.fit(surrogate, outputs)
            if not return_input_shape:
                return coefficients
            return problem.attribution(coefficients)

    def _surrogate(self) -> Surrogate | None:
        return as_surrogate(self.interpretable_model)

    def _draw(
        self, problem: _Problem, n_samples: int, sampling: str, n_sets: int, generator: Generator | None
    ) -> _Samples:
        """Draws masks, one set an example or one for all, and weighs them."""
        kernel = InputKernel.of(self.similarity_func)
        batched_similarity = kernel is not None or isinstance(self.similarity_func, MaskSimilarity)
        if self.perturb_func is not default_perturb_func or not batched_similarity:
            if sampling != "captum" or n_sets != problem.n_examples:
                raise ValueError(
                    "A custom perturb_func or similarity_func is called sample by sample: it goes with "
                    "sampling='captum' and share_masks=False only."
                )
            return self._draw_one_by_one(problem, n_samples)
        n_features = problem.layout.n_features
        if sampling == "captum":
            masks = streams.captum_lime_masks(n_sets, n_samples, n_features).to(problem.device)
        else:
            masks = streams.independent_lime_masks(n_sets, n_samples, n_features, problem.device, generator)
        if kernel is not None:
            weights = kernel.weights(masks, problem.layout, problem.inputs, problem.baselines, problem.joint)
        else:
            weights = self.similarity_func.weights(masks)
        return _Samples(masks, weights)

    def _draw_one_by_one(self, problem: _Problem, n_samples: int) -> _Samples:
        """Calls the user's functions in Captum's order: for each example, for each sample, a mask and its weight."""
        all_masks, all_weights = [], []
        for index in range(problem.n_examples):
            inputs, keywords = problem.example(index)
            draw = self._get_perturb_generator_func(inputs, **keywords)
            masks, weights = [], []
            for _ in range(n_samples):
                try:
                    mask, perturbed = draw()
                except StopIteration:
                    warnings.warn("Generator completed prior to given n_samples iterations!", stacklevel=3)
                    break
                masks.append(mask)
                weights.append(torch.as_tensor(self.similarity_func(inputs, perturbed, mask, **keywords)).reshape(1))
            streams.replay_captum_fit(problem.layout.n_features)
            all_masks.append(torch.cat(masks))
            all_weights.append(torch.cat(weights).to(problem.device))
        pad = nn.utils.rnn.pad_sequence
        lengths = [len(masks) for masks in all_masks]
        return _Samples(pad(all_masks, batch_first=True), pad(all_weights, batch_first=True), lengths)


class Probabilities(nn.Module):
    """A classifier's probabilities, from its logits ``(B, C)``; one column gives those of class 0 and class 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        """Probabilities ``(B, C)``, or ``(B, 2)`` of a single column."""
        logits: Tensor = self.model(*inputs)
        if logits.shape[-1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        return logits.softmax(dim=-1)


def id_expo_lime(model: nn.Module, *, alpha: float = 0.01, kernel_width: float = 0.25) -> Lime:
    """The LIME of ID-ExpO's eq. (12) (arXiv 2310.12553): ridge without intercept on the probability of the target.

    Args:
        model: returns logits ``(B, C)``.
        alpha: the equation's epsilon.
        kernel_width: width of the kernel on the masks, see `MaskSimilarity`.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import id_expo_lime
        >>> lime = id_expo_lime(torch.nn.Linear(3, 2))
        >>> lime.attribute(torch.randn(4, 3), target=1, n_samples=50).shape
        torch.Size([4, 3])
    """
    return Lime(Probabilities(model), Ridge(alpha, fit_intercept=False), MaskSimilarity(kernel_width))


@dataclass
class _Samples:
    """Masks ``(B or 1, M, D)`` and their weights ``(B or 1, M)``; of example b the first ``lengths[b]``, or all."""

    masks: Tensor
    weights: Tensor
    lengths: list[int] | None = None

    def fit(self, surrogate: Surrogate, outputs: Tensor) -> Tensor:
        """The surrogate's coefficients ``(B, D)`` for outputs ``(B, M)``."""
        if not bool(self.weights.isfinite().all()):
            raise NonFiniteError("The similarity function returned a value that is not finite.")
        if self.lengths is None or min(self.lengths) == max(self.lengths):
            return surrogate.solve(self.masks, outputs, self.weights)
        parts = [(slice(index, index + 1), slice(length)) for index, length in enumerate(self.lengths)]
        return torch.cat([surrogate.solve(self.masks[at], outputs[at], self.weights[at]) for at in parts])


@dataclass
class _Problem:
    """What one call explains: inputs, the baselines that mask them, and the features in terms of which it is explained.

    `joint`: the forward function returns one value for the whole batch, which then counts as a single example.
    """

    inputs: tuple[Tensor, ...]
    baselines: tuple[Any, ...]
    feature_mask: tuple[Tensor, ...]
    layout: FeatureLayout
    is_tuple: bool
    joint: bool = False

    @classmethod
    def of(cls, inputs: Any, baselines: Any, feature_mask: Any) -> _Problem:
        is_tuple = _is_tuple(inputs)
        tensors, formatted_baselines = _format_input_baseline(inputs, baselines)
        if not len(tensors[0]):
            raise IndexError("The batch is empty: there is nothing to explain.")
        try:
            if feature_mask is None:
                layout = FeatureLayout.of_positions([tensor.shape[1:] for tensor in tensors])
            masks, n_features = construct_feature_mask(feature_mask, tensors)
            if feature_mask is not None:
                layout = FeatureLayout.of_mask(masks, tensors)
            aligned = align_baselines(formatted_baselines, tensors)
        except TypeError as error:  # Captum's exception types, this package's texts
            raise IndexError(str(error)) from None
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        if n_features > 10_000:
            warnings.warn(
                f"{n_features} features make a large surrogate that is slow to fit: group them with a feature_mask.",
                stacklevel=4,
            )
        return cls(tensors, aligned, masks, layout, is_tuple)

    @property
    def batch_size(self) -> int:
        return len(self.inputs[0])

    @property
    def n_examples(self) -> int:
        return 1 if self.joint else self.batch_size

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def settle_rows_per_forward(self, forward: BatchForward, perturbations_per_eval: int | None) -> int:
        """Sees whether the forward function has a value for each example, and how many rows it is given at a time."""
        if self.batch_size == 1 and perturbations_per_eval is not None:
            return perturbations_per_eval
        n_copies = 2 if self.batch_size == 1 else 1  # only two rows tell one value a row from one value a batch
        with torch.no_grad():
            output = forward(tuple(torch.cat([tensor] * n_copies) for tensor in self.inputs), n_copies=n_copies)
        n_values = output.numel() if isinstance(output, Tensor) else 1
        if n_values == 1:
            self.joint = self.batch_size > 1
            assert perturbations_per_eval in (None, 1), (
                f"perturbations_per_eval={perturbations_per_eval}, but the forward function returns one value for the "
                "whole batch: leave it out, or set it to 1."
            )
            return 1
        assert n_values == self.batch_size * n_copies, (
            f"The forward function returned {n_values} values for {self.batch_size * n_copies} examples (after "
            "choosing the target): it must return one for each example or one for the batch. Is the target missing?"
        )
        if perturbations_per_eval is not None:
            return perturbations_per_eval * self.batch_size
        return max(default_rows_per_forward(self.inputs), self.batch_size)

    def evaluate(
        self,
        forward: BatchForward,
        masks: Tensor,
        rows_per_forward: int,
        name: str,
        on_forward: Callable[[], object],
    ) -> Tensor:
        """The outputs ``(B, M)`` on copies masked by ``(B or 1, M, D)``; under enabled gradients they need a graph."""
        keep = (masks != 0).transpose(0, 1)  # copy by copy, as the rows of a forward pass
        everyone = slice(None)

        def perturb(examples: slice, copies: slice) -> tuple[Tensor, ...]:
            chosen = keep[copies] if keep.shape[1] == 1 else keep[copies, examples]
            examples = everyone if self.joint else examples
            return masked_copies(self.inputs, self.baselines, self.layout.spread(chosen, examples), examples)

        def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            output = forward(rows, everyone if self.joint else examples, n_copies)
            values = output.flatten() if isinstance(output, Tensor) else torch.tensor([output], device=self.device)
            n_expected = n_copies * (examples.stop - examples.start)
            assert values.numel() == n_expected, (
                f"The forward function returned {values.numel()} values for {n_expected} perturbed inputs (after "
                "choosing the target): it must return one for each. Is the target missing, or does it return one value "
                "for the whole batch (then perturbations_per_eval must be 1)?"
            )
            if torch.is_grad_enabled() and not values.requires_grad:
                raise no_graph_error(name)
            return values if values.dtype in (torch.float32, torch.float64) else values.float()

        outputs = evaluate_copies(evaluate, perturb, self.n_examples, len(keep), rows_per_forward, on_forward)
        if not bool(outputs.isfinite().all()):
            raise NonFiniteError(f"{name}: the forward function returned NaN or infinity on a perturbed input.")
        return outputs

    def attribution(self, coefficients: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Each feature's coefficient at each of its positions."""
        first = slice(0, 1) if self.joint else slice(None)
        spread = self.layout.spread(coefficients[None], first)
        attributions = tuple(
            values[0].expand(len(coefficients), *tensor.shape[1:]).contiguous()
            for values, tensor in zip(spread, self.inputs, strict=True)
        )
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

        return select(self.inputs), {
            "baselines": select(self.baselines),
            "feature_mask": select(self.feature_mask),
            "num_interp_features": self.layout.n_features,
        }


def _check_arguments(
    name: str,
    n_samples: int,
    perturbations_per_eval: int | None,
    create_graph: bool,
    sampling: str,
    generator: Generator | None,
) -> None:
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, given: {n_samples}.")
    if perturbations_per_eval is not None and perturbations_per_eval < 1:
        raise ValueError(f"perturbations_per_eval must be at least 1, or None; given: {perturbations_per_eval}.")
    if sampling not in ("captum", "independent"):
        raise ValueError(f"sampling must be 'captum' or 'independent', given: {sampling!r}.")
    if sampling == "captum" and generator is not None:
        raise ValueError(
            "Captum's stream comes from torch's global generator (torch.manual_seed): pass sampling='independent' to "
            "draw from a generator."
        )
    if create_graph:
        require_gradients_enabled(name)
