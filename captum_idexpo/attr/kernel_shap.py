"""Trainable KernelSHAP: LIME with Shapley's coalitions and a regression that is exactly efficient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum.attr import KernelShap as CaptumKernelShap
from torch import Generator, Tensor

from captum_idexpo._core.rng import drawn_for
from captum_idexpo.attr import coalitions
from captum_idexpo.attr._perturbation import Problem, Samples
from captum_idexpo.attr.lime import Lime
from captum_idexpo.attr.surrogates import BayesianShapleyRegression, ShapleyRegression, Surrogate


class KernelShap(Lime, CaptumKernelShap):
    """KernelSHAP (Lundberg, Lee 2017, arXiv 1705.07874), as `captum.attr.KernelShap`, with a graph to the weights.

    The arguments and, for the same seed, the coalitions are those of Captum's class. Captum gives a weight of 1e6 to
    two conditions: the empty coalition has the baseline's output, and the full coalition has the input's output. Here
    both hold exactly, so the attributions add up to the difference of these outputs. For the arguments of `attribute`
    see `Lime`.

    With any ``sampling`` except "captum", no coalition is evaluated twice, and the Shapley values are exact if
    n_samples is at least 2^D, the number of coalitions. A single feature gets the whole difference.

    Args:
        forward_func: takes the inputs and the additional arguments. It returns outputs ``(B, ...)``, from which the
            target is chosen, or one value for the whole batch.
        interpretable_model: the regression on the coalitions; None: `surrogates.ShapleyRegression`, as in Captum.
            `surrogates.BayesianShapleyRegression` has several times less noise with few samples.

    Raises:
        TypeError: any other interpretable model, because its coefficients would not be Shapley values.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import KernelShap
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> attribution = KernelShap(model).attribute(x, target=1, n_samples=50, create_graph=True)
        >>> gap = (model(x) - model(torch.zeros_like(x)))[:, 1]
        >>> torch.allclose(attribution.sum(dim=1), gap, atol=1e-5)
        True
    """

    _samplings = coalitions.KERNEL_SHAP_SAMPLINGS
    _draws_at_once = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        interpretable_model: ShapleyRegression | BayesianShapleyRegression | None = None,
    ) -> None:
        CaptumKernelShap.__init__(self, forward_func)
        self._regression = ShapleyRegression() if interpretable_model is None else interpretable_model
        if not isinstance(self._regression, (ShapleyRegression, BayesianShapleyRegression)):
            raise TypeError(
                "KernelShap's interpretable_model must be surrogates.ShapleyRegression() or "
                f"surrogates.BayesianShapleyRegression(), given: {interpretable_model!r}; for others use Lime."
            )

    def _surrogate(self) -> Surrogate:
        return self._regression

    def _draw(
        self, problem: Problem, n_samples: int, sampling: str, share_masks: bool, generator: Generator | None
    ) -> Samples:
        n_features = problem.layout.n_features
        if n_features == 1 or (sampling != "captum" and 2**n_features <= n_samples):
            masks, weights = coalitions.all_coalitions(n_features, problem.device)
            return Samples(masks[:, :n_samples], weights[:, :n_samples], surrogate=ShapleyRegression())

        def draw(n_sets: int) -> tuple[Tensor, Tensor | None]:
            return coalitions.kernel_shap_masks(sampling, n_sets, n_samples, n_features, problem.device, generator)

        return Samples(*(draw(1) if share_masks else drawn_for(problem.n_examples, draw)))
