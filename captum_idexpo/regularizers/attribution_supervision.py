r"""Attribution supervision: evidence where annotations say that it must be.

Two distances between a map and an annotation :math:`m` with values in [0, 1]. Both read the positive evidence
:math:`e^+ = \max(e, 0)` and do not depend on its scale:

.. math::

    \text{energy} = 1 - \frac{\sum_d m_d\, e^+_d}{\sum_d e^+_d}, \qquad
    \text{squared} = \operatorname{mean}_d \Big(\frac{e^+_d}{\max_j e^+_j} - m_d\Big)^2,

the energy loss of Rao et al. 2023 (arXiv 2303.11932) and the external supervision of GAIN (Li et al. 2018, arXiv
1802.10171, eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.errors import warn
from captum_idexpo._core.inputs import as_batch
from captum_idexpo._core.targets import Outputs, target_indices
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.metrics._locations import NOTICEABLE
from captum_idexpo.metrics._scoring import is_raw
from captum_idexpo.regularizers._annotations import check_annotations, summed_like
from captum_idexpo.regularizers._explaining import scaled_by_peak
from captum_idexpo.regularizers.base import AttributionPenalty, Explained, Weight


class AttributionSupervision(AttributionPenalty):
    """Pulls the evidence to where annotations say that it is: attention supervision, GAIN, model guidance.

    Annotations are what a loader yields third: for each input tensor a mask in [0, 1] of its shape, or with axes of
    size 1, that marks the right evidence, such as a bounding box, a segmentation, or the words of a rationale. Along an
    axis of size 1 the attribution is summed: a mask ``(B, H, W)`` compares pixels, a mask ``(B, T, 1)`` compares tokens
    of embeddings ``(B, T, E)``. An example without any mark is not annotated and counts 0. A map without
    positive evidence has no gradient. An explainer of groups gives each position the value of its group, so a group
    counts by its size. The term is named "attribution_supervision".

    `RightForTheRightReasons` forbids evidence in places, whatever the rest of the map does. This class compares shares
    of the evidence, so a model cannot satisfy it by a smaller attribution.

    Args:
        explainer: an attribution of `captum_idexpo.attr`; that of a layer is brought to the size of the inputs.
        distance: "energy" is the share of the positive evidence outside the marks (Rao et al. 2023). It leaves open how
            evidence is spread inside them, so boxes serve as annotations. "squared" is the mean squared difference of
            the map, divided by its maximum, and the annotation (GAIN, Li et al. 2018, eq. 7): for exact masks, which
            the map has to fill.
        model: the module held in eval mode; None: the explainer's forward function, if it is a module or its method.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start.
        ratio: of the term to the task loss, for an automatic weight.
        attribute_kwargs: further arguments of ``explainer.attribute``.
        reshape_transform: where the channels of an explained layer are, see `Regularizer`.
        target_transform: a function of the loader's target that returns the target of the explainer, see `Regularizer`.
        outputs: what the model returns, as for `captum_idexpo.metrics.insertion_deletion`; "raw" for regression.
        eval_mode: explain in eval mode (BatchNorm, dropout).
        generator: source of the drawn labels of ``outputs="multilabel"``; None: torch's global generator.

    Raises:
        TypeError, ValueError: an argument out of range, an explainer that cannot be trained through.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradCam
        >>> from captum_idexpo.regularizers import AttributionSupervision
        >>> conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 64, 3))
        >>> regularizer = AttributionSupervision(LayerGradCam(model, conv), weight=0.1)
        >>> x, y, boxes = torch.randn(5, 3, 8, 8), torch.randint(3, (5,)), torch.zeros(5, 8, 8)
        >>> boxes[:, 2:6, 2:6] = 1  # the object is in the middle
        >>> terms = regularizer(x, y, boxes)
        >>> list(terms)
        ['attribution_supervision']
        >>> terms["attribution_supervision"].backward()
    """

    def __init__(
        self,
        explainer: Attribution,
        *,
        distance: Literal["energy", "squared"] = "energy",
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        attribute_kwargs: Mapping[str, Any] | None = None,
        reshape_transform: ReshapeTransform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            "attribution_supervision",
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
        if distance not in _DISTANCES:
            raise ValueError(f"distance must be one of {tuple(_DISTANCES)}, given: {distance!r}.")
        self.distance = distance
        self._warned = self._warned_of_no_evidence = False

    def penalty(self, batch: Batch) -> Tensor:
        """Return the distance of the positive evidence from the annotations, averaged over the batch.

        Raises:
            ValueError: annotations that are missing, do not fit, or lie outside [0, 1].
        """
        masks = check_annotations(batch.annotations, as_batch(batch.inputs), "zeros")
        self._warn_of_full_masks(masks)
        explained = self.explained(batch)
        pairs = [summed_like(map, mask) for map, mask in zip(self.explain(batch, explained), masks, strict=True)]
        evidence = torch.cat([map.flatten(1) for map, _ in pairs], dim=1)
        sign = self._sign_of_one_column(batch, explained)
        evidence = scaled_by_peak((evidence if sign is None else evidence * sign[:, None]).relu())
        marks = torch.cat([mask.flatten(1) for _, mask in pairs], dim=1).to(evidence.dtype)
        distances = _DISTANCES[self.distance](evidence, marks)
        counts = (marks > 0).any(dim=1).to(distances.dtype)
        if explained.contributes is not None:
            counts = counts * explained.contributes
        self._warn_of_no_evidence(evidence.detach(), counts)
        return (distances * counts).mean()

    def _sign_of_one_column(self, batch: Batch, explained: Explained) -> Tensor | None:
        """Return -1 for class 0 of a single column, whose attribution is evidence for class 1; None elsewhere."""
        assert self._explaining is not None
        tensors = as_batch(batch.inputs)
        if is_raw(self.outputs) or self.outputs == "multilabel" or explained.target is None:
            return None
        if self._n_explained_columns(batch, tensors) != 1:
            return None
        target = target_indices(explained.target, len(tensors[0]), tensors[0].device)
        return None if target is None else self._explaining.sign_of_map(2.0 * target[:, -1] - 1)

    def _warn_of_no_evidence(self, evidence: Tensor, counts: Tensor) -> None:
        """Warn once if a noticeable share of the annotated examples has nothing that could be moved."""
        without = int(((evidence.amax(dim=1) <= 0) & (counts > 0)).sum())
        if without and without >= NOTICEABLE * int((counts > 0).sum()) and not self._warned_of_no_evidence:
            self._warned_of_no_evidence = True
            warn(
                f"{without} of {int((counts > 0).sum())} annotated examples have no positive evidence, so the term has "
                "no gradient for them. Train the task first. If it is trained, and its evidence is elsewhere, start "
                "from an earlier epoch, explain an earlier layer, or pass magnitudes (attribute_kwargs={'abs': True} "
                "of Saliency).",
            )

    def _warn_of_full_masks(self, masks: tuple[Tensor, ...]) -> None:
        if not self._warned and all(bool((mask == 1).all()) for mask in masks):
            self._warned = True
            warn(
                "The annotations mark every place of every example as right evidence, so they say nothing: give ones "
                "where the evidence must be, and zeros elsewhere.",
            )


def _energy(evidence: Tensor, marks: Tensor) -> Tensor:
    """Return the share of the evidence outside the marks, ``(B,)``; 1 for a map without positive evidence."""
    total = evidence.sum(dim=1)
    return 1 - (evidence * marks).sum(dim=1) / torch.where(total > 0, total, 1.0)


def _squared(evidence: Tensor, marks: Tensor) -> Tensor:
    """Return the mean squared difference of the map, divided by its maximum, and the marks, ``(B,)``."""
    peak = evidence.amax(dim=1, keepdim=True)
    return (evidence / torch.where(peak > 0, peak, 1.0) - marks).square().mean(dim=1)


_DISTANCES = {"energy": _energy, "squared": _squared}
