r"""Random masking: the model learns to read inputs of which any share of the features is masked.

.. math::

    \Omega = -\operatorname{mean}_x \log p_y(z x + (1 - z) b), \qquad
    z_d \sim \text{Bernoulli}(1 - u), \quad u \sim U(0, 1)

LIME, KernelSHAP, insertion and deletion ask the model about masked copies. A model that was never trained with masks
answers them with anything (missingness bias; Jain et al. 2022, arXiv 2204.08945).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import Baselines, Tensors, check_inputs
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo._core.targets import Outputs, explained_class, positive_labels, soft_classes, target_indices
from captum_idexpo.baselines import generators_of
from captum_idexpo.metrics._scoring import log_probabilities
from captum_idexpo.metrics.masked_accuracy import masked_features
from captum_idexpo.regularizers.base import Penalty, Weight


class RandomMasking(Penalty):
    r"""Adds the task loss on masked copies: cross-entropy, with a random share of each example's features masked.

    Use it to warm a model up before LIME or KernelSHAP explain it, or beside `InsertionDeletion`. It is also the
    control for `InsertionDeletion`: a gain that masks alone bring is no gain of the explanation. The share is uniform
    in [0, 1]; one copy per example and update is masked. The term is named "random_masking".

    Args:
        forward_func: the function that is trained: a module, or a callable of the input tensors.
        baselines: what masked features are set to: a number, a tensor, a tuple of these, or a callable of the inputs
            that returns them, such as those of `captum_idexpo.baselines`. Take those that the explainer has.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start.
        ratio: of the term to the task loss, for an automatic weight.
        feature_mask: a Captum feature mask, or a callable of the inputs that returns one (superpixels): features are
            masked by groups. None: a feature is an element, of images ``(B, C, H, W)`` a pixel with all its channels.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        target_transform: a function of the loader's target that returns the label, see `Regularizer`.
        outputs: what the model returns: "logits", "log_probabilities", "probabilities" (cross-entropy, also of soft
            labels), "multilabel" (binary cross-entropy, the mean over the labels) or, for regression, "raw" (squared
            error, the mean over the columns).
        eval_mode: evaluate the copies in eval mode, so that masked copies do not change BatchNorm's statistics.
        generator: source of the masks; None: torch's global generator.

    Raises:
        ValueError: a function as outputs, which has no loss; another argument out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import RandomMasking
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> masking = RandomMasking(model, baselines=0.0)
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> loss = torch.nn.functional.cross_entropy(model(x), y) + sum(masking(x, y).values())
        >>> loss.backward()
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        baselines: Baselines,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        feature_mask: Tensors | Callable[[Any], Tensors] | None = None,
        model: nn.Module | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            "random_masking",
            forward_func,
            model=model,
            weight=weight,
            ratio=ratio,
            outputs=outputs,
            eval_mode=eval_mode,
            target_transform=target_transform,
            generator=generator,
        )
        if callable(outputs):
            raise InputError(
                "A function as outputs is a score, not a loss. Pass outputs='raw' for squared errors, or write the "
                "term as a captum_idexpo.regularizers.Penalty."
            )
        self.baselines = baselines
        self.feature_mask = feature_mask

    @property
    def needs_second_derivative(self) -> bool:
        """False: the term is made of outputs alone."""
        return False

    @property
    def generators(self) -> list[Generator]:
        """The random generators that masks and baselines are drawn from, beside the global ones."""
        return list(dict.fromkeys([*super().generators, *generators_of(self.baselines)]))

    def penalty(self, batch: Batch) -> Tensor:
        """Return the task loss on one masked copy of each example, averaged over the batch."""
        tensors, aligned = check_inputs(batch.inputs, self.baselines, check_finite=True)
        mask = self.feature_mask(batch.inputs) if callable(self.feature_mask) else self.feature_mask
        layout = masked_features(mask, tensors)
        masked = MaskedInputs(tensors, aligned, layout, finite=True)
        rows = tuple(copies[0] for copies in masked.copies(self._kept(layout, tensors[0])[None]))
        output = BatchForward(self.forward_func, batch.additional_forward_args, len(tensors[0]))(rows)
        return self._losses(output, self.transformed(batch.target)).mean()

    def _kept(self, layout: FeatureLayout, tensor: Tensor) -> Tensor:
        """Draw which features are kept, booleans ``(B, D)``: with a share of its own in each example."""
        shape, at = layout.n_features + 1, source(tensor.device, self.generator)
        uniform = drawn_for(len(tensor), lambda n: torch.rand(n, shape, generator=self.generator, device=at))
        return (uniform[:, 1:] >= uniform[:, :1]).to(tensor.device)

    def _losses(self, output: Tensor, target: Any) -> Tensor:
        """Return the loss of each example, ``(B,)``."""
        if self.outputs == "raw":
            return _squared_errors(output, target)
        if output.dim() > 2:
            raise InputError(
                f"RandomMasking needs outputs (B, C) or (B,), given: {tuple(output.shape)}. For several classes per "
                "example write the term as a captum_idexpo.regularizers.Penalty."
            )
        if self.outputs == "multilabel":
            return _label_losses(output, target)
        return -_expected(log_probabilities(output, self.outputs), target, self.outputs)


def _expected(log_p: Tensor, target: Any, outputs: Outputs) -> Tensor:
    """Return the mean of log probabilities ``(B, C)`` under labels, hard or soft."""
    if isinstance(target, Tensor) and target.is_floating_point():
        soft = target if soft_classes(target) is not None else _two_classes(target, log_p)
        if soft is not None:
            if soft.shape != log_p.shape:
                raise InputError(f"Soft labels {tuple(target.shape)} do not fit {log_p.shape[1]} classes.")
            soft = soft.to(log_p)
            return (soft * log_p.masked_fill(soft == 0, 0.0)).sum(dim=1)  # 0 times the logarithm of 0 is 0
    return _picked(log_p, explained_class(target, outputs))


def _two_classes(target: Tensor, log_p: Tensor) -> Tensor | None:
    """Return fractions of class 1, ``(B,)`` or ``(B, 1)``, as soft labels ``(B, 2)``."""
    if log_p.shape[1] != 2 or target.numel() != len(log_p):
        return None
    of_class_1 = target.reshape(-1, 1)
    return torch.cat([1 - of_class_1, of_class_1], dim=1)


def _picked(values: Tensor, labels: Any) -> Tensor:
    """Return the value of each row's label, ``(B,)``, of values ``(B, C)``."""
    index = target_indices(labels, len(values), values.device)
    if index is None or index.shape[1] != 1:
        raise InputError(f"RandomMasking needs the labels, one class per example; given: {labels!r}.")
    if not bool(((index >= 0) & (index < values.shape[1])).all()):
        raise IndexError(
            f"The labels lie between {int(index.min())} and {int(index.max())}, out of range for {values.shape[1]} "
            "classes."
        )
    return values.gather(1, index)[:, 0]


def _label_losses(output: Tensor, target: Any) -> Tensor:
    positive = positive_labels(target)
    if positive is None:  # indices of labels
        return -F.logsigmoid(_picked(output, target))
    if positive.shape != output.shape:
        raise InputError(f"The multi-hot target {tuple(positive.shape)} does not fit outputs {tuple(output.shape)}.")
    return F.binary_cross_entropy_with_logits(output, positive.to(output), reduction="none").mean(dim=1)


def _squared_errors(output: Tensor, target: Any) -> Tensor:
    if not isinstance(target, Tensor):
        raise InputTypeError(f"A regression needs a tensor of targets, given: {type(target).__name__}.")
    predicted, wanted = output.flatten(1) if output.dim() > 1 else output[:, None], target.reshape(len(target), -1)
    if predicted.shape != wanted.shape:
        raise InputError(f"Targets {tuple(target.shape)} do not fit the outputs {tuple(output.shape)}.")
    return (predicted - wanted.to(predicted)).square().mean(dim=1)
