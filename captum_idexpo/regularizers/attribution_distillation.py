r"""Attribution distillation: a student that explains its predictions as its teacher does.

.. math::

    \Omega = \operatorname{mean}_x \Big[1 - \frac{\langle E_S(x), E_T(x) \rangle}{\|E_S(x)\|\,\|E_T(x)\|}\Big],

the explanation term of e2KD (Parchami-Araghi et al. 2024, arXiv 2402.03119). It is half the squared distance of the
normalised maps, which attention transfer takes of activations (Zagoruyko, Komodakis 2017, arXiv 1612.03928).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import as_batch
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.targets import Outputs
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.metrics._scoring import is_raw, predicted_class
from captum_idexpo.regularizers._explaining import require_attribution, scaled_by_peak
from captum_idexpo.regularizers.base import AttributionPenalty, Explained, Regularizer, Weight


class AttributionDistillation(AttributionPenalty):
    """Pulls a student's attributions towards the direction of its teacher's: e2KD (Parchami-Araghi et al. 2024).

    The penalty is 1 minus the cosine similarity of the two maps, so their scales do not matter. Both models explain the
    same class. Layer attributions are brought to the size of the inputs, so the two layers may have different sizes;
    where one of the maps has a single channel, the other one is summed over its channels. An example for which one of
    the maps is 0 counts 1. The term is named "attribution_distillation".

    The term adds to a distillation of the outputs, it does not replace it: train a classifier on its teacher's
    probabilities, soft labels ``(B, n_classes)``, as the loader's target.

    Args:
        explainer: the student's attribution, of `captum_idexpo.attr`.
        teacher: the teacher's attribution, of `captum_idexpo.attr`. The teacher is not trained, and is held in eval
            mode.
        explain_class: "predicted" is the class that the teacher predicts (the paper's), "label" the loader's target.
            For ``outputs="raw"`` and a function as ``outputs`` both explain the same.
        model: the student, if its attribution's forward function is neither a module nor a module's method.
        teacher_model: the teacher, likewise.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start.
        ratio: of the term to the task loss, for an automatic weight.
        attribute_kwargs: further arguments of ``explainer.attribute``.
        teacher_kwargs: further arguments of ``teacher.attribute``; None: as `attribute_kwargs`.
        reshape_transform: where the channels of the student's explained layer are, see `Regularizer`.
        teacher_reshape_transform: the same of the teacher's.
        target_transform: a function of the loader's target that returns the explained one, see `Regularizer`; for
            ``explain_class="label"``.
        outputs: what both models return, as for `captum_idexpo.metrics.insertion_deletion`; "raw" for regression.
        eval_mode: explain the student in eval mode (BatchNorm, dropout).
        generator: source of the drawn labels of ``outputs="multilabel"``; None: torch's global generator.

    Raises:
        TypeError, ValueError: an argument out of range, an explainer that cannot be trained through.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import InputXGradient
        >>> from captum_idexpo.regularizers import AttributionDistillation
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
        >>> student = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> regularizer = AttributionDistillation(InputXGradient(student), InputXGradient(teacher), weight=0.1)
        >>> x = torch.randn(5, 4)
        >>> soft_labels = teacher(x).softmax(dim=1).detach()
        >>> loss = torch.nn.functional.cross_entropy(student(x), soft_labels)
        >>> (loss + sum(regularizer(x, soft_labels).values())).backward()
    """

    _teacher: Regularizer

    def __init__(
        self,
        explainer: Attribution,
        teacher: Attribution,
        *,
        explain_class: Literal["predicted", "label"] = "predicted",
        model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        attribute_kwargs: Mapping[str, Any] | None = None,
        teacher_kwargs: Mapping[str, Any] | None = None,
        reshape_transform: ReshapeTransform | None = None,
        teacher_reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            "attribution_distillation",
            explainer,
            model=model,
            weight=weight,
            ratio=ratio,
            attribute_kwargs=attribute_kwargs,
            reshape_transform=reshape_transform,
            target_transform=target_transform,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
        )
        if explain_class not in ("predicted", "label"):
            raise ValueError(f"explain_class must be 'predicted' or 'label', given: {explain_class!r}.")
        self.explain_class = explain_class
        # Not a submodule: the teacher's part has nothing to train and no state of its own.
        self.__dict__["_teacher"] = Regularizer(
            require_attribution(teacher).forward_func,
            model=teacher_model,
            explainer=teacher,
            attribute_kwargs=attribute_kwargs if teacher_kwargs is None else teacher_kwargs,
            reshape_transform=teacher_reshape_transform,
            outputs=outputs,
        )

    @property
    def generators(self) -> list[Generator]:
        """The random generators that both attributions draw from, beside the global ones."""
        return list(dict.fromkeys([*super().generators, *self._teacher.generators]))

    def penalty(self, batch: Batch) -> Tensor:
        """Return 1 minus the cosine similarity of the two attributions, averaged over the batch.

        Raises:
            ValueError: student and teacher have different numbers of classes.
        """
        constant = self._teacher.attribute_kwargs.get("additional_forward_args")
        of_teacher = batch if constant is None else batch._replace(additional_forward_args=constant)
        with no_graph(), self._teacher.held_in_eval_mode():
            self._check_classes(batch, of_teacher)
            explained = self._explained_by_both(of_teacher)
            teacher = self._teacher.explain(of_teacher, explained)
        pairs = [_same_channels(*pair) for pair in zip(self.explain(batch, explained), teacher, strict=True)]
        student = _unit(torch.cat([pair[0].flatten(1) for pair in pairs], dim=1))
        target = _unit(torch.cat([pair[1].flatten(1) for pair in pairs], dim=1))
        distances = 1 - (student * target.to(student.dtype)).sum(dim=1)
        return (distances if explained.contributes is None else distances * explained.contributes).mean()

    def _check_classes(self, batch: Batch, of_teacher: Batch) -> None:
        if is_raw(self.outputs):
            return
        tensors = as_batch(batch.inputs)
        own, others = self._n_explained_columns(batch, tensors), self._teacher._n_explained_columns(of_teacher, tensors)
        if own != others:
            raise InputError(
                f"The student's explained output has {own} columns, the teacher's {others}: both must have the same "
                "classes in the same order."
            )

    def _explained_by_both(self, batch: Batch) -> Explained:
        if self.explain_class == "label" or is_raw(self.outputs):
            return self.explained(batch)
        tensors = as_batch(batch.inputs)
        forward = BatchForward(self._teacher.forward_func, batch.additional_forward_args, len(tensors[0]))
        return Explained(predicted_class(forward(tuple(tensor.clone() for tensor in tensors)), self.outputs))


def _same_channels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps of an input, summed over the axes along which one of them has a single value."""
    for axis in range(1, a.dim()):
        if a.shape[axis] != b.shape[axis]:
            a, b = a.sum(axis, keepdim=True), b.sum(axis, keepdim=True)
    return a, b


def _unit(rows: Tensor) -> Tensor:
    """Return rows of length 1, and rows of zeros as they are."""
    scaled = scaled_by_peak(rows)
    squares = scaled.square().sum(dim=1, keepdim=True)
    return scaled / torch.where(squares > 0, squares, 1.0).sqrt()
