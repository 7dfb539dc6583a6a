r"""Right for the right reasons: gradients where the evidence must not be (Ross, Hughes, Doshi-Velez 2017).

.. math::

    \Omega = \operatorname{mean}_x \sum_d \Big(A_d \, \frac{\partial}{\partial x_d} \sum_k \log p_k(x)\Big)^2

with annotations :math:`A_d = 1` where feature d must not matter (arXiv 1703.03717, eq. 2), and the authors' search for
other explanations when no annotations are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.chunks import default_rows_per_forward, slices
from captum_idexpo._core.errors import InputError, warn
from captum_idexpo._core.inputs import as_batch, check_count, require_real
from captum_idexpo._core.modes import eval_mode as held_in_eval_mode
from captum_idexpo._core.targets import Outputs
from captum_idexpo.attr import Saliency
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.metrics._scoring import log_probabilities
from captum_idexpo.regularizers._annotations import averaged_like, check_annotations
from captum_idexpo.regularizers._explaining import takes_gradients, widened
from captum_idexpo.regularizers.base import Penalty, Weight


class RightForTheRightReasons(Penalty):
    r"""Penalises evidence where annotations say that it must not be (Ross et al. 2017, eq. 2).

    The input gradient is that of the sum of the log probabilities of *all* classes. With an `explainer` its attribution
    is penalised instead. The term is named "right_reasons".

    Args:
        forward_func: the function that is explained: a module, or a callable of the input tensors.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start. The authors' 1000 is for inputs from
            0 to 255; for inputs in [0, 1] it becomes about 0.0154.
        explainer: an attribution of `captum_idexpo.attr` to penalise in place of the input gradient; that of a layer is
            brought to the size of the inputs.
        attribute_kwargs: further arguments of ``explainer.attribute``.
        annotates: what an annotation of 1 marks: "wrong" evidence, which must not matter, or "right" evidence, outside
            of which nothing may matter.
        ratio: of the term to the task loss, for an automatic weight.
        reshape_transform: where the channels of an explained layer are, see `Regularizer`.
        target_transform: a function of the loader's target that returns the target of the explainer, see `Regularizer`.
        outputs: what the model returns: "logits", "log_probabilities", "probabilities", "multilabel" (the gradient is
            that of the log probabilities of both outcomes of every label) or, for regression, "raw" (the gradient is
            that of the outputs' sum).
        eval_mode: explain in eval mode (BatchNorm, dropout).
        generator: source of the labels that are drawn for an explainer with ``outputs="multilabel"``; None: torch's
            global generator.

    Raises:
        TypeError, ValueError: an argument out of range, an explainer that cannot be trained through.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import RightForTheRightReasons
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> regularizer = RightForTheRightReasons(model, weight=0.1)
        >>> x, y, annotations = torch.randn(5, 4), torch.randint(3, (5,)), torch.zeros(5, 4)
        >>> annotations[:, 0] = 1  # the first column must not matter
        >>> terms = regularizer(x, y, annotations)
        >>> list(terms)
        ['right_reasons']
        >>> terms["right_reasons"].backward()
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        explainer: Attribution | None = None,
        attribute_kwargs: Mapping[str, Any] | None = None,
        annotates: Literal["wrong", "right"] = "wrong",
        ratio: float = 1.0,
        reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            "right_reasons",
            forward_func,
            model=model,
            weight=weight,
            ratio=ratio,
            outputs=outputs,
            eval_mode=eval_mode,
            explainer=explainer,
            attribute_kwargs=attribute_kwargs,
            reshape_transform=reshape_transform,
            target_transform=target_transform,
            generator=generator,
        )
        if callable(outputs) and explainer is None:
            raise ValueError(
                "A function as outputs has no log probabilities whose gradient can be penalised: pass explainer=, or "
                "outputs='raw' for the gradient of the sum of the outputs."
            )
        if annotates not in ("wrong", "right"):
            raise ValueError(f"annotates must be 'wrong' or 'right', given: {annotates!r}.")
        self.annotates = annotates
        self._warned = False

    @property
    def needs_second_derivative(self) -> bool:
        """True for the input gradient, and for an explainer that takes gradients of the model."""
        return takes_gradients(self.explainer)

    def penalty(self, batch: Batch) -> Tensor:
        """Return the squared evidence in forbidden places, summed over features, averaged over the batch.

        Args:
            batch: its annotations hold for each input tensor a mask of its shape, or one that broadcasts to it
                (``(B, H, W)`` marks all channels of a pixel), in [0, 1]. Its target is used by an explainer only.

        Raises:
            ValueError: annotations that are missing, do not fit, or lie outside [0, 1].
        """
        tensors = as_batch(batch.inputs)
        masks = check_annotations(batch.annotations, tensors, "zeros" if self.annotates == "wrong" else "ones")
        self._warn_of_full_masks(masks)
        maps = self._input_gradients(tensors, batch) if self.explainer is None else self.explain(batch)
        forbidden = masks if self.annotates == "wrong" else tuple(1 - mask for mask in masks)
        weighted = [map * averaged_like(mask, map) for map, mask in zip(maps, forbidden, strict=True)]
        squares = [map.square().flatten(1).sum(1) for map in weighted]
        return torch.stack(squares).sum(dim=0).mean()

    def _input_gradients(self, tensors: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, ...]:
        require_real(tensors)
        arguments = {"abs": False, "additional_forward_args": batch.additional_forward_args}
        saliency = Saliency(self._explained_sum)
        return widened(saliency.attribute(tensors, create_graph=torch.is_grad_enabled(), **arguments))

    def _explained_sum(self, *inputs: Any) -> Tensor:
        """Return the sum of the log probabilities of all classes, or of raw outputs, ``(B,)``."""
        output: Tensor = self.forward_func(*inputs)
        if self.outputs == "raw":
            return output.flatten(1).sum(1) if output.dim() > 1 else output
        if output.dim() > 2:
            raise InputError(
                f"Outputs of shape {tuple(output.shape)} have no single axis of classes, whose log probabilities the "
                "input gradient is of: pass outputs='raw' for the sum of all outputs, or explainer=."
            )
        return log_probabilities(output, self.outputs).sum(dim=1)

    def _warn_of_full_masks(self, masks: tuple[Tensor, ...]) -> None:
        if not self._warned and all(bool((mask == (self.annotates == "wrong")).all()) for mask in masks):
            self._warned = True
            warn(
                f"The annotations, of {self.annotates} evidence, leave no place where evidence may be: every gradient "
                "is penalised. Are zeros and ones exchanged?",
            )


class Explanation(NamedTuple):
    """One model of a search: what it was forbidden to use, and how good it is all the same."""

    model: nn.Module
    annotations: Tensor
    """The mask it was trained with, of the inputs' shape ``(N, ...)``, zeros and ones."""
    accuracy: float


def find_another_explanation(
    train: Callable[[Tensor], nn.Module],
    accuracy: Callable[[nn.Module], float],
    inputs: Tensor,
    *,
    threshold: float = 0.67,
    max_drop: float = 0.1,
    max_explanations: int = 10,
    outputs: str = "logits",
    max_examples_per_batch: int | None = None,
) -> list[Explanation]:
    """Train models one after the other; each must not use what those before it used (Ross et al. 2017, sec. 2.2).

    The first is trained without annotations. Each next one may not use the features whose input gradient, of the
    largest class probability's logarithm, exceeded `threshold` times the example's largest in any model before. The
    search ends when accuracy falls, nothing new is found, or everything is forbidden.

    Args:
        train: annotations ``(N, ...)`` -> a trained model; the caller's own loop, with `RightForTheRightReasons`.
        accuracy: model -> its accuracy, on data where the rules that were found hold.
        inputs: the training inputs, ``(N, ...)``.
        threshold: share of the example's largest gradient that counts as used.
        max_drop: how far accuracy may fall below the first model's before the search ends.
        max_explanations: models at most.
        outputs: what the models return, as for `RightForTheRightReasons`.
        max_examples_per_batch: rows of a forward pass over the training inputs.

    Returns:
        The sequence of models; the last one may be the one whose accuracy fell, which shows that the search is over.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import RightForTheRightReasons, find_another_explanation
        >>> x = torch.randn(200, 1).expand(-1, 2) + 0.1 * torch.randn(200, 2)  # two columns that say the same
        >>> y = (x[:, 0] > 0).long()
        >>> def train(annotations):
        ...     model = torch.nn.Linear(2, 2)
        ...     regularizer = RightForTheRightReasons(model, weight=1.0)
        ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        ...     for _ in range(50):
        ...         optimizer.zero_grad()
        ...         loss = torch.nn.functional.cross_entropy(model(x), y)
        ...         (loss + sum(regularizer(x, y, annotations).values())).backward()
        ...         optimizer.step()
        ...     return model
        >>> accuracy = lambda model: float((model(x).argmax(1) == y).float().mean())
        >>> found = find_another_explanation(train, accuracy, x, max_explanations=2)
        >>> found[0].annotations.sum() == 0
        tensor(True)
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, given: {threshold}.")
    check_count("max_explanations", max_explanations)
    if outputs not in ("logits", "log_probabilities", "probabilities"):
        raise ValueError(f"outputs={outputs!r} have no most probable class, whose evidence is searched for.")
    annotations = torch.zeros_like(inputs)
    found: list[Explanation] = []
    while len(found) < max_explanations:
        model = train(annotations)
        found.append(Explanation(model, annotations, float(accuracy(model))))
        used = _used(model, inputs, threshold, outputs, max_examples_per_batch)
        everything = torch.maximum(annotations, used.to(annotations.dtype))
        finished = found[-1].accuracy < found[0].accuracy - max_drop
        if finished or torch.equal(everything, annotations) or bool(everything.all()):
            break
        annotations = everything
    return found


def _used(model: nn.Module, inputs: Tensor, threshold: float, outputs: str, max_rows: int | None) -> Tensor:
    """Return where an example's input gradient exceeds so much of its largest, booleans of the inputs' shape.

    The largest probability's logarithm has a gradient that goes to 0 as the probability goes to 1, and with it its
    digits; against that of all others together it points the same way and keeps them.
    """

    def largest(x: Tensor) -> Tensor:
        each = log_probabilities(model(x), outputs)
        index = each.detach().argmax(dim=1, keepdim=True)
        others = each.scatter(1, index, -torch.inf).logsumexp(dim=1)
        return each.gather(1, index).squeeze(1) - others

    size = max_rows or default_rows_per_forward((inputs,))
    with held_in_eval_mode(model):
        chunks = [Saliency(largest).attribute(inputs[chunk]) for chunk in slices(len(inputs), size)]
    gradients = torch.cat(chunks)
    peak = gradients.flatten(1).amax(dim=1).reshape(-1, *[1] * (inputs.dim() - 1))
    return gradients > threshold * peak
