"""Trainable LIME: Captum's values, computed for a whole batch at once, with a graph to the model's weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from captum.attr import Lime as CaptumLime
from torch import Generator, Tensor, nn

from captum_idexpo._core.captum import BaselineType, Model, NullProgress, TargetType, default_perturb_func, progress
from captum_idexpo._core.errors import warn
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.modes import module_of, no_graph
from captum_idexpo._core.rng import drawn_for
from captum_idexpo.attr import sampling as streams
from captum_idexpo.attr._graph import keeps_graph, require_gradients_enabled
from captum_idexpo.attr._perturbation import Problem, Samples
from captum_idexpo.attr._trainable import TensorOrTensors, logged
from captum_idexpo.attr.similarity import InputKernel, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge, Surrogate, as_surrogate


class Lime(CaptumLime):
    """LIME (Ribeiro et al. 2016, arXiv 1602.04938), as `captum.attr.Lime`, with a graph to the model's weights.

    The arguments and, for the same seed, the values are those of Captum's class. A batch is explained at once.
    Captum's scikit-learn surrogates and its default similarity are recognised and computed in batch form. Any other
    similarity or perturbation function is called sample by sample, as in Captum. Any other interpretable model runs
    Captum's code, which has no graph.

    Args:
        forward_func: takes the inputs and the additional arguments. It returns outputs ``(B, ...)``, from which the
            target is chosen, or one value for the whole batch.
        interpretable_model: the surrogate, one of `captum_idexpo.attr.surrogates` or a Captum model. None: Captum's
            default, a Lasso with alpha 0.01, which needs scikit-learn.
        similarity_func: returns the weight of a perturbed copy. None: Captum's default, an exponential kernel of width
            1 on the cosine distance of the inputs.
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

    _samplings = streams.LIME_SAMPLINGS

    def __init__(
        self,
        forward_func: Callable[..., Any],
        interpretable_model: Model | Surrogate | None = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(forward_func, interpretable_model, similarity_func, perturb_func)

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
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
        memory_budget: float | MemoryBudget | None = None,
    ) -> TensorOrTensors:
        """Return the coefficients of the surrogate fitted to the outputs on masked copies.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them, of any dtype.
            baselines: replaces a masked feature: None (zero), a number, a tensor that broadcasts to the inputs, or a
                tuple of these.
            target: int, tensor (B,) or list: the output index to explain; None if there is one output per row.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: whole numbers; the locations of one feature have the same number. The mask has the inputs'
                shape or broadcasts to it. For a tuple of inputs, a tuple of such tensors. None: every element is a
                feature.
            n_samples: M, masked copies per example.
            perturbations_per_eval: masked copies of each example in one forward pass, which then has this many times
                B rows. None: chosen from the model's largest layer and the device.
            return_input_shape: spread the coefficients over the inputs. Else return the coefficients ``(B, D)`` in
                ascending order of the numbers in the feature mask, with 0 for features that an example does not have.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the graph of the forward function; else it is detached.
            sampling: "captum" draws Captum's masks from torch's global generator. "independent" draws masks of the
                same distribution in one call on the inputs' device. "paired", "orthogonal" and KernelShap's "leverage"
                have less noise for the same n_samples (`captum_idexpo.attr.sampling`).
            share_masks: use the same masks for all examples of the batch.
            generator: source of the masks; not allowed with sampling="captum".
            memory_budget: bytes of activations that the graph may keep until the backward pass. If it would keep
                more, the backward pass evaluates masked copies again. The gradient is the same, and a step takes about
                a third longer. None: no bound.

        Returns:
            Attributions of the inputs' shape, or a tuple for a tuple of inputs. If the forward function returns one
            value for the batch, the batch axis has size 1. The dtype is that of the outputs, at least float32.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            ValueError: sampling is unknown; a generator with sampling="captum"; outputs are not finite; baselines or
                feature masks do not fit; the rows of a forward pass influence each other, unless all rows have the
                same mask (share_masks=True, perturbations_per_eval=1).
            TypeError: a feature mask does not hold whole numbers.
            AssertionError, IndexError: as Captum, on a target that does not fit.
        """
        name, create_graph = type(self).__name__, create_graph or keeps_graph()
        _check_arguments(name, n_samples, perturbations_per_eval, create_graph, sampling, self._samplings, generator)
        problem = Problem.of(inputs, baselines, feature_mask)
        surrogate = self._surrogate()
        if surrogate is None:
            if create_graph or share_masks or sampling != "captum":
                raise RuntimeError(
                    f"The interpretable model {self.interpretable_model!r} is fitted by code that has no gradient and "
                    "no batch form: use one of captum_idexpo.attr.surrogates, or leave create_graph, share_masks and "
                    "sampling at their defaults."
                )
            by_captum = super().attribute.__wrapped__(
                self,
                problem.for_user(problem.plain_inputs()),
                problem.for_user(problem.baselines),
                target,
                additional_forward_args,
                None if feature_mask is None else problem.for_user(problem.layout.masks()),
                n_samples,
                perturbations_per_eval or 1,
                return_input_shape,
                show_progress,
            )
            return cast(TensorOrTensors, by_captum)

        forward = BatchForward(self.forward_func, additional_forward_args, problem.batch_size, target)
        memory = MemoryBudget.of(memory_budget, create_graph, module_of(self.forward_func))
        problem, rows_per_forward = problem.sized_for(forward, perturbations_per_eval, share_masks)
        parts = problem.parts()
        problems = [part for _, part in parts] or [problem]
        forwards = [forward.of_rows(rows) for rows, _ in parts] or [forward]
        # Autocast applies to the model only. Weights and linear systems keep their precision.
        precisely = functools.partial(torch.autocast, problem.device.type, enabled=False)
        with torch.enable_grad() if create_graph else no_graph():
            with precisely():
                drawn = [self._draw(part, n_samples, sampling, share_masks, generator) for part in problems]
            n_forwards = sum(
                math.ceil(samples.n / max(1, rows_per_forward // part.n_examples))
                for part, samples in zip(problems, drawn, strict=True)
            )
            bar_class = progress if show_progress else NullProgress
            with bar_class(total=n_forwards, desc=f"{self.get_name()} attribution") as bar:
                outputs = [
                    part.evaluate(of_part, samples.masks, rows_per_forward, name, bar.update, memory)
                    for part, of_part, samples in zip(problems, forwards, drawn, strict=True)
                ]
            with precisely():
                fitted = [samples.fit(surrogate, values) for samples, values in zip(drawn, outputs, strict=True)]
            coefficients = problem.joined(parts, fitted)
            return cast(TensorOrTensors, problem.attribution(coefficients) if return_input_shape else coefficients)

    def _surrogate(self) -> Surrogate | None:
        return as_surrogate(self.interpretable_model)

    @property
    def _draws_at_once(self) -> bool:
        """False if a function of the user's is called sample by sample, which only Captum's sampling allows."""
        known = InputKernel.of(self.similarity_func) or isinstance(self.similarity_func, MaskSimilarity)
        return bool(known) and self.perturb_func is default_perturb_func

    def _draw(
        self, problem: Problem, n_samples: int, sampling: str, share_masks: bool, generator: Generator | None
    ) -> Samples:
        """Draw masks, one set per example or one shared set, and compute their weights."""
        kernel = InputKernel.of(self.similarity_func)
        if not self._draws_at_once:
            if sampling != "captum" or share_masks:
                raise ValueError(
                    "A custom perturb_func or similarity_func is called sample by sample: it goes with "
                    "sampling='captum' and share_masks=False only."
                )
            samples = self._draw_one_by_one(problem, n_samples)
        else:
            n_features = problem.layout.n_features

            def draw(n_sets: int) -> Tensor:
                return streams.lime_masks(sampling, n_sets, n_samples, n_features, problem.device, generator)

            samples = Samples(draw(1) if share_masks else drawn_for(problem.n_examples, draw))
        if kernel is not None:
            return samples.weighted(
                kernel.weights(samples.masks, problem.layout, problem.inputs, problem.baselines, problem.joint)
            )
        if isinstance(self.similarity_func, MaskSimilarity):
            return samples.weighted(self.similarity_func.weights(samples.masks))
        return samples

    def _draw_one_by_one(self, problem: Problem, n_samples: int) -> Samples:
        """Call the user's functions in Captum's order: a mask, then its weight, for each sample of each example."""
        batched = InputKernel.of(self.similarity_func) or isinstance(self.similarity_func, MaskSimilarity)
        all_masks, all_weights = [], []
        for index in range(problem.n_examples):
            inputs, keywords = problem.example(index)
            draw = self._get_perturb_generator_func(inputs, **keywords)
            masks, weights = [], []
            for _ in range(n_samples):
                try:
                    mask, perturbed = draw()
                except StopIteration:
                    warn("Generator completed prior to given n_samples iterations!")
                    break
                masks.append(mask)
                weight = 1.0 if batched else self.similarity_func(inputs, perturbed, mask, **keywords)
                weights.append(torch.as_tensor(weight).reshape(1).to(problem.device))
            streams.replay_captum_fit(problem.layout.n_features)
            all_masks.append(torch.cat(masks))
            all_weights.append(torch.cat(weights))
        pad = nn.utils.rnn.pad_sequence
        lengths = [len(masks) for masks in all_masks]
        return Samples(pad(all_masks, batch_first=True), pad(all_weights, batch_first=True), lengths)


class Probabilities(nn.Module):
    """A module that returns a classifier's probabilities, given a model that returns logits ``(B, C)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        """Return probabilities ``(B, C)``; for a single logit, those of class 0 and class 1 as ``(B, 2)``."""
        logits: Tensor = self.model(*inputs)
        if logits.shape[-1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        return logits.softmax(dim=-1)


def id_expo_lime(model: nn.Module, *, alpha: float = 0.01, kernel_width: float = 0.25) -> Lime:
    """Return the LIME of ID-ExpO's eq. (12) (arXiv 2310.12553): ridge without intercept on the target's probability.

    To score insertion and deletion on the logits, also pass ``forward_func=model`` to
    `captum_idexpo.regularizers.InsertionDeletion`.

    Args:
        model: a module that returns logits ``(B, C)``.
        alpha: strength of the ridge penalty, epsilon in eq. (12).
        kernel_width: width of the kernel on the masks, see `MaskSimilarity`.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import id_expo_lime
        >>> lime = id_expo_lime(torch.nn.Linear(3, 2))
        >>> lime.attribute(torch.randn(4, 3), target=1, n_samples=50).shape
        torch.Size([4, 3])
    """
    return Lime(Probabilities(model), Ridge(alpha, fit_intercept=False), MaskSimilarity(kernel_width))


def _check_arguments(
    name: str,
    n_samples: int,
    perturbations_per_eval: int | None,
    create_graph: bool,
    sampling: str,
    samplings: tuple[str, ...],
    generator: Generator | None,
) -> None:
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, given: {n_samples}.")
    if perturbations_per_eval is not None and perturbations_per_eval < 1:
        raise ValueError(f"perturbations_per_eval must be at least 1, or None; given: {perturbations_per_eval}.")
    if sampling not in samplings:
        raise ValueError(f"sampling must be one of {samplings}, given: {sampling!r}.")
    if sampling == "captum" and generator is not None:
        raise ValueError(
            "Captum's stream comes from torch's global generator (torch.manual_seed): pass sampling='independent' or "
            "another design to draw from a generator."
        )
    if create_graph:
        require_gradients_enabled(name)
