"""Priors on attributions: smooth maps, and few features that matter (Erion et al. 2021, arXiv 1906.10670)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from captum.attr import Attribution
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.targets import Outputs
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.regularizers.base import AttributionPenalty, Weight


class Smoothness(AttributionPenalty):
    r"""Penalises differences of neighbouring attributions: total variation (Erion et al. 2021, sec. 2.2.1).

    :math:`\operatorname{mean}_x \sum |\phi_{i+1,j} - \phi_{i,j}| + |\phi_{i,j+1} - \phi_{i,j}|` along the spatial axes
    of images and volumes ``(B, C, h, w)``, and along the columns of rows ``(B, D)``. The term is named "smoothness".

    Args:
        explainer: an attribution of `captum_idexpo.attr`; expected gradients are `GradientShap`.
        axes: axes of the attribution along which neighbours are compared; None: as above. Of three axes nothing says
            which one has the steps: pass ``(2,)`` for series ``(B, C, T)`` and ``(1,)`` for ``(B, T, F)``.
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
        >>> from captum_idexpo.attr import GradientShap
        >>> from captum_idexpo.regularizers import Smoothness
        >>> layers = [torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        >>> model = torch.nn.Sequential(*layers)
        >>> x, y = torch.rand(5, 1, 8, 8), torch.randint(3, (5,))
        >>> prior = Smoothness(GradientShap(model), weight=0.1, attribute_kwargs={"baselines": torch.rand(10, 1, 8, 8)})
        >>> prior(x, y)["smoothness"].backward()
    """

    def __init__(
        self,
        explainer: Attribution,
        *,
        axes: int | tuple[int, ...] | None = None,
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
            "smoothness",
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
        self.axes = (axes,) if isinstance(axes, int) else axes

    def penalty(self, batch: Batch) -> Tensor:
        """Return the total variation, summed over positions and averaged over the batch."""
        variations = [
            map.diff(dim=axis).abs().flatten(1).sum(1) for map in self.explain(batch) for axis in self._axes_of(map)
        ]
        return torch.stack(variations).sum(dim=0).mean()

    def _axes_of(self, map: Tensor) -> tuple[int, ...]:
        if self.axes is None:
            if map.dim() == 3 and 1 not in map.shape[1:]:
                raise InputError(
                    f"The axes of the attribution {tuple(map.shape)} cannot be told apart. Say along which axes it has "
                    "to be smooth: Smoothness(explainer, axes=(2,)) for series (B, C, T), axes=(1,) for (B, T, F)."
                )
            if map.dim() == 3:  # one value per step
                return (2,) if map.shape[1] == 1 else (1,)
            return tuple(range(min(2, map.dim() - 1), map.dim()))
        if not all(0 < axis < map.dim() for axis in self.axes):
            raise InputError(f"axes={self.axes} are not those of the attribution {tuple(map.shape)}; 0 is the batch.")
        if all(map.shape[axis] == 1 for axis in self.axes):
            raise InputError(f"The attribution {tuple(map.shape)} has no neighbours along axes={self.axes}.")
        return self.axes


class Sparsity(AttributionPenalty):
    r"""Penalises importance that is spread evenly over the features: 1 minus its Gini coefficient (Erion et al. 2021).

    Importance is the mean magnitude of a feature's attributions over the batch. Its Gini coefficient is 0 where all
    features matter alike and approaches 1 where one does. The term is named "sparsity".

    Args:
        explainer: an attribution of `captum_idexpo.attr`; expected gradients are `GradientShap`.
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
        >>> from captum_idexpo.attr import InputXGradient
        >>> from captum_idexpo.regularizers import Sparsity
        >>> model = torch.nn.Linear(4, 3)
        >>> prior = Sparsity(InputXGradient(model), weight="auto", ratio=0.5)
        >>> x, y = torch.randn(5, 4), torch.randint(3, (5,))
        >>> task_loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> prior.calibrate(task_loss, x, y)  # ExplanationRegularizedLoss and the trainer do this on the first batch
        >>> torch.allclose(prior(x, y)["sparsity"], 0.5 * task_loss)
        True
    """

    def __init__(
        self,
        explainer: Attribution,
        *,
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
            "sparsity",
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

    def penalty(self, batch: Batch) -> Tensor:
        """Return 1 minus the Gini coefficient of the features' mean magnitudes."""
        explained = self.explained(batch)
        magnitudes = [map.abs().mean(dim=0).flatten() for map in self.explain(batch, explained)]
        ascending = torch.cat(magnitudes).sort().values
        n = len(ascending)
        ranks = 2 * torch.arange(1, n + 1, device=ascending.device, dtype=ascending.dtype) - n - 1
        # The attribution of a model that uses nothing has no concentration, and no gradient of it.
        total = ascending.sum().clamp_min(torch.finfo(ascending.dtype).tiny)
        penalty = 1 - (ranks * (ascending / total)).sum() / n
        return penalty if explained.contributes is None else penalty * explained.contributes.amax()
