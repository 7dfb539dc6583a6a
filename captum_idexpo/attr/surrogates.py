r"""Surrogates: the weighted linear models that LIME and KernelSHAP fit to a model's outputs on masked copies.

They take a whole batch, and the coefficients are differentiable with respect to the outputs. With masks :math:`Z`,
weights :math:`K` and outputs :math:`v` of one example, ``Ridge(alpha, fit_intercept=False)`` is eq. (12) of ID-ExpO
(arXiv 2310.12553), :math:`\phi = (Z^T K Z + \alpha I)^{-1} Z^T K v`.

Systems are solved in float64 (float32 on MPS, which has no float64). The result has the outputs' dtype.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.captum import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum_idexpo._core.features import as_numbers

# Ridge strengths for averaging, four per decade, from 1e-6 to 1e3 times the mean eigenvalue. The smallest one hardly
# changes the fit of exact data.
_STRENGTH_EXPONENTS = (-6.0, 3.0)
_N_STRENGTHS = 37


class Surrogate(ABC):
    """A weighted linear model of outputs on masks."""

    @abstractmethod
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Fit one linear model per example.

        Args:
            masks: ``(B, M, D)``, or ``(1, M, D)`` if all examples share them; bool or float.
            outputs: ``(B, M)``, floating point.
            weights: ``(B, M)`` or ``(1, M)``, not negative.

        Returns:
            The coefficients ``(B, D)`` in the outputs' dtype, attached to the outputs' graph.
        """


Solve = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def _in_float64(solve: Solve) -> Solve:
    """Wrap a `solve` method: compute in the device's widest dtype and return the outputs' dtype."""

    @functools.wraps(solve)
    def wide(self: Any, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        dtype = _widest_dtype(outputs)
        return solve(self, as_numbers(masks, dtype), outputs.to(dtype), weights.to(dtype)).to(outputs.dtype)

    return wide


@dataclass(frozen=True)
class Ridge(Surrogate):
    """Ridge regression: minimises ``sum_m w_m (v_m - z_m . phi - c)^2 + alpha |phi|^2``, as scikit-learn's ``Ridge``.

    Args:
        alpha: strength of the penalty, positive.
        fit_intercept: if True, fit c without a penalty; if False, c is 0, as in eq. (12) of ID-ExpO.

    Raises:
        ValueError: alpha is not positive.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr.surrogates import Ridge
        >>> masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> outputs = torch.tensor([[2.0, 3.0, 5.0]])
        >>> Ridge(alpha=1e-9, fit_intercept=False).solve(masks, outputs, torch.ones(1, 3)).round(decimals=4)
        tensor([[2., 3.]])
    """

    alpha: float = 1.0
    fit_intercept: bool = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"Ridge needs alpha > 0, given: {self.alpha}; for alpha = 0 use LinearRegression().")

    @_in_float64
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        n_samples, n_features = masks.shape[1:]
        if n_features <= n_samples:
            equations = _centred_normal_equations if self.fit_intercept else _normal_equations
            gram, moments = equations(masks, outputs, weights)
            return _solve_gram(gram + self.alpha * _eye(gram), moments)
        masks, outputs = _centred(masks, outputs, weights) if self.fit_intercept else (masks, outputs)
        # With fewer samples than features the dual form has a smaller system and the same minimum:
        # (Z'KZ + aI)^-1 Z'K = Z' R (R Z Z' R + aI)^-1 R, where R is the square root of K.
        roots = weights.sqrt()
        rooted = masks * roots[..., None]
        gram = rooted @ rooted.mT
        return apply_each(rooted.mT, _solve_gram(gram + self.alpha * _eye(gram), roots * outputs))


@dataclass(frozen=True)
class BayesianRidge(Surrogate):
    """Ridge with intercept whose strength is determined from the samples, per example.

    The coefficients are averaged over strengths, weighted by their marginal likelihood. (scikit-learn's
    ``BayesianRidge`` takes the strength of maximum likelihood.) The average is smooth, so the gradient includes the
    effect of the outputs on the strength. The penalty applies to the difference of each coefficient from the mean
    coefficient. With few noisy samples the coefficients are several times closer to those of infinitely many samples
    than with a fixed small strength, and even closer with ``sampling="orthogonal"``. With many samples both agree.

    The designs "paired" and "orthogonal" draw pairs of complementary masks. The two errors of a pair are not
    independent, so the likelihood is computed from the differences of the pairs.

    Raises:
        RuntimeError: the weights require gradient (a similarity that depends on inputs that require gradient).

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Lime
        >>> from captum_idexpo.attr.surrogates import BayesianRidge
        >>> x = torch.randn(2, 5)
        >>> lime = Lime(lambda x: x @ torch.arange(5.0), BayesianRidge())
        >>> phi = lime.attribute(x, n_samples=40, sampling="orthogonal")
        >>> torch.allclose(phi, x * torch.arange(5.0), atol=1e-3)
        True
    """

    @_in_float64
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        if weights.requires_grad:
            raise RuntimeError(
                "BayesianRidge has no gradient in the similarity's weights, which here depend on inputs that require "
                "gradient: detach the inputs, or use MaskSimilarity or Ridge."
            )
        share = masks.mean(dim=-1, keepdim=True)
        constant_and_slope = torch.cat([torch.ones_like(share), share], dim=-1)
        deviations, targets = masks - share, outputs[..., None]
        design = _without(deviations, constant_and_slope, weights)
        rest = _without(targets, constant_and_slope, weights).squeeze(-1)
        evidence = None
        if _in_pairs(masks):
            of_pairs, slope = weights[:, ::2] + weights[:, 1::2], _half_differences(share)
            evidence = (
                _without(_half_differences(deviations), slope, of_pairs),
                _without(_half_differences(targets), slope, of_pairs).squeeze(-1),
                of_pairs,
            )
        shrunk = averaged_ridge(design, rest, weights, evidence=evidence, n_fixed=1 if evidence else 2)
        shrunk = _without_mean(shrunk)
        targets = targets - masks @ shrunk[..., None]
        slope = _fixed_effects(targets, constant_and_slope, weights)[:, 1]
        return shrunk + slope / masks.shape[-1]


@dataclass(frozen=True)
class LinearRegression(Surrogate):
    """Linear regression: minimises ``sum_m w_m (v_m - z_m . phi - c)^2``, as scikit-learn's ``LinearRegression``.

    If there are several minima, the one with the smallest norm is returned.

    Args:
        fit_intercept: if True, fit c; if False, c is 0.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr.surrogates import LinearRegression
        >>> masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
        >>> outputs = torch.tensor([[2.0, 3.0, 5.0]])
        >>> LinearRegression().solve(masks, outputs, torch.ones(1, 3)).round(decimals=4)
        tensor([[2., 3.]])
    """

    fit_intercept: bool = True

    @_in_float64
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        masks, outputs = _centred(masks, outputs, weights) if self.fit_intercept else (masks, outputs)
        roots = weights.sqrt()
        design = masks * roots[..., None]
        if self.fit_intercept:
            # Centred columns are orthogonal to the roots, up to rounding. If one weight dominates, this rounding error
            # is larger than the tolerance of the pseudo-inverse and would count as a feature, so it is projected out.
            direction = (roots / roots.norm(dim=1, keepdim=True))[..., None]
            for _ in range(2):
                design = design - direction @ (direction.mT @ design)
        return apply_each(torch.linalg.pinv(design), roots * outputs)


@dataclass(frozen=True)
class Lasso(Surrogate):
    """Lasso: minimises ``sum_m w_m (v_m - z_m . phi - c)^2 / 2 + alpha |phi|_1`` with weights that sum to 1.

    scikit-learn computes the coefficients, example by example. With the default tolerance its coordinate descent stops
    3e-4 to 3e-2 away from the minimum, so no other solver returns Captum's values. The gradient is that of the exact
    minimum, which solves a linear system if the active set and the signs are fixed. Set ``tol=1e-12`` to get values
    that agree with this gradient.

    Args:
        alpha: strength of the penalty, positive.
        fit_intercept: if True, fit c; if False, c is 0.
        tol: tolerance of scikit-learn's coordinate descent.
        max_iter: its maximum number of iterations.
        selection: the order of its coordinates, "cyclic" or "random".
        random_state: seed of a random order.

    Raises:
        ImportError: scikit-learn is not installed (extra ``lime``).

    Example:
        >>> import torch
        >>> from captum_idexpo.attr.surrogates import Lasso
        >>> masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
        >>> outputs = torch.tensor([[2.0, 3.0, 5.0, 0.0]], dtype=torch.float64)
        >>> Lasso(alpha=0.05, tol=1e-12).solve(masks, outputs, torch.ones(1, 4))
        tensor([[1.8000, 2.8000]], dtype=torch.float64)
    """

    alpha: float = 0.01
    fit_intercept: bool = True
    tol: float = 1e-4
    max_iter: int = 1000
    selection: str = "cyclic"
    random_state: int | None = None

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"Lasso needs alpha > 0, given: {self.alpha}; for alpha = 0 use LinearRegression().")

    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        value = self._coordinate_descent(masks, outputs.detach(), weights)
        dtype = _widest_dtype(outputs)
        design, targets, weights = as_numbers(masks, dtype), outputs.to(dtype), weights.to(dtype)
        if self.fit_intercept:
            design, targets = _centred(design, targets, weights)
        # With a fixed active set and fixed signs, the minimum solves a linear system. Inactive coefficients stay 0.
        design = design * (value != 0)[:, None, :]
        weighted = design.mT * (weights / weights.sum(dim=1, keepdim=True))[:, None, :]
        gram = weighted @ design + torch.diag_embed((value == 0).to(dtype))
        minimum = _solve_gram(gram, apply_each(weighted, targets) - self.alpha * value.sign())
        return value + (minimum - minimum.detach()).to(value.dtype)

    def _coordinate_descent(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return scikit-learn's coefficients, computed in the outputs' dtype; Captum computes them in float32."""
        try:
            from sklearn import linear_model
        except ImportError as error:
            raise ImportError(
                "The Lasso surrogate (LIME's default, as in Captum) needs scikit-learn: "
                "`pip install 'captum-idexpo[lime]'`, "
                "or pass interpretable_model=captum_idexpo.attr.surrogates.Ridge()."
            ) from error
        dtype = outputs.dtype
        x, y, w = (tensor.detach().to(dtype).cpu().numpy() for tensor in (masks, outputs, weights))
        coefficients = []
        for index in range(len(y)):
            model = linear_model.Lasso(**asdict(self))
            model.fit(x[index % len(x)], y[index], sample_weight=w[index % len(w)])
            coefficients.append(torch.as_tensor(model.coef_, dtype=dtype))
        return torch.stack(coefficients).to(outputs.device)


@dataclass(frozen=True)
class ShapleyRegression(Surrogate):
    """KernelSHAP's regression with exact constraints instead of two infinite weights.

    The first mask must be all ones, the second all zeros. Their outputs fix the intercept and the sum of the
    coefficients (efficiency). Their weights are ignored. The rest is least squares on the part of the masks that is
    orthogonal to the vector of ones. Captum uses weights of 1e6 instead, which cost float32 most of its digits.
    """

    @_in_float64
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        n_samples, n_features = masks.shape[1:]
        if n_samples < 2:
            return 0 * outputs.expand(-1, n_features)
        weights = weights[:, 2:]
        total, free, residuals = _beside_equal_shares(masks, outputs)
        if n_samples - 2 < n_features - 1:
            roots = weights.sqrt()
            correction = apply_each(torch.linalg.pinv(free * roots[..., None]), roots * residuals)
        else:
            # The masks are orthogonal to the vector of ones. Adding this direction makes the system regular.
            gram = _weighted_gram(free, weights) + 1 / n_features
            correction = _solve_gram(gram, _weighted_sums(free, weights * residuals))
        return _equal_shares_and(correction, total)


@dataclass(frozen=True)
class BayesianShapleyRegression(Surrogate):
    """KernelSHAP's regression with shrinkage towards equal shares, whose strength is determined from the samples.

    Efficiency is exact. Only the part of the coefficients that adds up to zero is shrunk, as in `BayesianRidge`. With
    few noisy samples the coefficients are many times closer to the Shapley values than with `ShapleyRegression`, and
    even closer with ``sampling="leverage"``. With many samples both agree.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import KernelShap
        >>> from captum_idexpo.attr.surrogates import BayesianShapleyRegression
        >>> x = torch.randn(2, 5)
        >>> shap = KernelShap(lambda x: x.square().sum(1), interpretable_model=BayesianShapleyRegression())
        >>> phi = shap.attribute(x, n_samples=40, sampling="leverage")
        >>> torch.allclose(phi.sum(1), x.square().sum(1), atol=1e-5)
        True
    """

    @_in_float64
    def solve(self, masks: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients ``(B, D)``; see `Surrogate.solve`."""
        n_samples, n_features = masks.shape[1:]
        if n_samples < 2:
            return 0 * outputs.expand(-1, n_features)
        weights = weights[:, 2:]
        total, free, residuals = _beside_equal_shares(masks, outputs)
        if n_samples > 2 and _in_pairs(masks[:, 2:]):
            free, residuals = _half_differences(free), _half_differences(residuals)
            weights = weights[:, ::2]
        if n_samples == 2:
            return total.expand(-1, n_features) / n_features
        return _equal_shares_and(averaged_ridge(free, residuals, weights), total)


def _beside_equal_shares(masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs' total change, and the coalitions and outputs minus a model with equal shares of the change.

    The remaining part of the coalitions is orthogonal to the vector of ones.
    """
    empty, coalitions = outputs[:, 1:2], masks[:, 2:]
    total = outputs[:, :1] - empty
    share = coalitions.mean(dim=-1, keepdim=True)
    return total, coalitions - share, outputs[:, 2:] - empty - share[..., 0] * total


def _without_mean(vectors: Tensor) -> Tensor:
    """Subtract the mean over the last axis."""
    return vectors - vectors.mean(dim=-1, keepdim=True)


def _equal_shares_and(correction: Tensor, total: Tensor) -> Tensor:
    """Return the coefficients ``(B, D)``: equal shares of the total plus a correction.

    The correction has sum 0 up to rounding. Its mean is subtracted, so that the sum is exact.
    """
    return total / correction.shape[-1] + _without_mean(correction)


def _in_pairs(masks: Tensor) -> bool:
    """Return True if the masks are consecutive pairs of a mask and its complement."""
    return masks.shape[1] % 2 == 0 and bool((masks[:, ::2] + masks[:, 1::2] == 1).all())


def _half_differences(samples: Tensor) -> Tensor:
    """Return half the difference of each consecutive pair, ``(B, n, ...)`` to ``(B, n / 2, ...)``."""
    return (samples[:, ::2] - samples[:, 1::2]) / 2


def _fixed_effects(columns: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
    """Regress columns ``(B, n, m)`` on a few fixed columns ``(B, n, k)`` with weights; smallest norm, ``(B, k, m)``."""
    weighted = fixed.mT * weights[:, None]
    inverse: Tensor = torch.linalg.pinv(weighted @ fixed, rtol=1e-10, hermitian=True)
    return inverse @ (weighted @ columns)


def _without(columns: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
    """Return the residuals of the columns after a regression on a few fixed columns."""
    return columns - fixed @ _fixed_effects(columns, fixed, weights)


_LASSO_OPTIONS = {"alpha", "fit_intercept", "tol", "max_iter", "selection", "random_state"}
_CLOSED_FORMS: dict[type, tuple[Callable[..., Surrogate], set[str]]] = {
    SkLearnRidge: (Ridge, {"alpha", "fit_intercept"}),
    SkLearnLasso: (functools.partial(Lasso, alpha=1.0), _LASSO_OPTIONS),  # scikit-learn's default alpha
    SkLearnLinearRegression: (LinearRegression, {"fit_intercept"}),
}


def as_surrogate(interpretable_model: Any) -> Surrogate | None:
    """Return the surrogate for a Captum scikit-learn wrapper, or a surrogate unchanged; None if there is none."""
    if isinstance(interpretable_model, Surrogate):
        return interpretable_model
    closed_form, supported = _CLOSED_FORMS.get(type(interpretable_model), (None, set()))
    options = getattr(interpretable_model, "construct_kwargs", {})
    if closed_form is None or not set(options) <= supported or options.get("alpha", 1.0) <= 0:
        return None
    return closed_form(**options)


def _widest_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _centred(masks: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the weighted means, which is equivalent to fitting an intercept."""
    share = weights / weights.sum(dim=1, keepdim=True)
    return masks - _weighted_sums(masks, share)[:, None], outputs - (share * outputs).sum(dim=1, keepdim=True)


def _normal_equations(masks: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gram matrices ``(B or 1, D, D)`` and moments ``(B, D)`` of weighted least squares."""
    return _weighted_gram(masks, weights), _weighted_sums(masks, weights * outputs)


def _centred_normal_equations(masks: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gram matrices and moments of weighted least squares with an intercept, for masks of zeros and ones."""
    if len(masks) == len(weights) == 1:
        return _normal_equations(*_centred(masks, outputs, weights), weights)
    # With many systems, centring the Gram matrices is cheaper than centring the masks. It loses no precision, because
    # the masks are zeros and ones and the outputs are shifted near zero first.
    outputs, total = outputs - outputs[:, :1], weights.sum(dim=1, keepdim=True)
    mean = (weights * outputs).sum(dim=1, keepdim=True) / total
    gram, moments = _normal_equations(masks, outputs - mean, weights)
    sums = _weighted_sums(masks, weights)
    return gram - sums[:, :, None] * sums[:, None, :] / total[..., None], moments


def _weighted_gram(masks: Tensor, weights: Tensor) -> Tensor:
    """Return ``Z' K Z`` as ``(B or 1, D, D)``."""
    n_features = masks.shape[2]
    if len(masks) == 1 and n_features <= 2 * len(weights):
        # All examples share the products of two features, so one matrix product replaces one per example.
        products = masks[0, :, :, None] * masks[0, :, None, :]
        return (weights @ products.flatten(1)).view(len(weights), n_features, n_features)
    return (masks.mT * weights[:, None, :]) @ masks


def _weighted_sums(masks: Tensor, weights: Tensor) -> Tensor:
    """Return ``Z' k`` per example as ``(B, D)``."""
    if len(masks) == 1:
        return weights @ masks[0]
    return (weights[:, None, :] @ masks).squeeze(1)  # a product from the left is five times faster


def _eye(gram: Tensor) -> Tensor:
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def apply_each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply matrices ``(B, n, m)`` or ``(1, n, m)`` by vectors ``(B, m)``."""
    if len(matrices) == 1:
        return vectors @ matrices[0].mT
    return (matrices @ vectors[..., None]).squeeze(-1)


def _solve_gram(gram: Tensor, vectors: Tensor) -> Tensor:
    """Solve symmetric systems ``(B or 1, D, D)`` for ``(B, D)``; a singular system gets its least-norm solution."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    least, largest = factor.diagonal(dim1=-2, dim2=-1).amin(-1), gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    of_systems = torch.stack([failed.to(gram.dtype), least**2, largest]).T.tolist()  # one transfer from an accelerator
    tolerance = torch.finfo(gram.dtype).eps ** 0.6  # 4e-10 in float64
    regular = [not fails and pivot > tolerance * scale for fails, pivot, scale in of_systems]
    if all(regular):
        return _substitute(factor, vectors)
    least_norm = apply_each(torch.linalg.pinv(gram, rtol=tolerance, hermitian=True), vectors)
    solvable = torch.tensor(regular, device=gram.device)[:, None]
    solution = _substitute(torch.where(solvable[..., None], factor, _eye(gram)), vectors)
    return torch.where(solvable, solution, least_norm)


def _substitute(factor: Tensor, vectors: Tensor) -> Tensor:
    """Solve systems for ``(B, D)``, given their Cholesky factors ``(B or 1, D, D)``."""
    if len(factor) == 1:
        return torch.cholesky_solve(vectors.mT[None], factor)[0].mT
    return torch.cholesky_solve(vectors[..., None], factor).squeeze(-1)


def averaged_ridge(
    design: Tensor,
    outputs: Tensor,
    weights: Tensor,
    *,
    evidence: tuple[Tensor, Tensor, Tensor] | None = None,
    n_fixed: int = 0,
) -> Tensor:
    r"""Return the coefficients of ridge regression, averaged over strengths by their marginal likelihood.

    :math:`\lambda, U` is the eigensystem of :math:`X^T W X`, :math:`r = U^T X^T W y`, and n is the number of samples.
    A strength a has the coefficients :math:`U r / (\lambda + a)`. Its log marginal likelihood, with the noise variance
    profiled out, is

    .. math:: -\tfrac12 \sum_i \log(1 + \lambda_i / a) - \tfrac n2 \log(y^T W y - \sum_i r_i^2 / (\lambda_i + a)).

    The eigensystem depends on the design only, so the average is smooth in the outputs. Its gradient includes the
    effect of the outputs on the likelihoods.

    Args:
        design: X, ``(B or 1, n, D)``.
        outputs: y, ``(B, n)``.
        weights: diagonal of W, ``(B or 1, n)``.
        evidence: design, outputs and weights with the same coefficients and independent errors, from which the
            likelihoods are computed; None: the arguments above.
        n_fixed: number of degrees of freedom that have been projected out.

    Returns:
        ``(B, D)``.
    """
    judged = (design, outputs, weights) if evidence is None else evidence
    eigenvalues, vectors, moments, squares = _eigensystem(*judged)
    n = (judged[2] > 0).sum(dim=1, keepdim=True) - n_fixed
    rank = (eigenvalues > 1e-9 * eigenvalues.amax(dim=1, keepdim=True)).sum(dim=1, keepdim=True).clamp_min(1)
    scale = (eigenvalues.sum(dim=1, keepdim=True) / rank).clamp_min(1e-12)
    grid = torch.logspace(*_STRENGTH_EXPONENTS, _N_STRENGTHS, dtype=scale.dtype, device=scale.device)
    strengths = (scale * grid)[..., None]  # (B or 1, A, 1)
    residuals = squares - (moments[:, None] ** 2 / (eigenvalues[:, None] + strengths)).sum(dim=-1)
    # The residual of an exact fit is only rounding error and may be negative.
    residuals = torch.maximum(residuals, 1e-12 * squares + torch.finfo(squares.dtype).tiny)
    complexity = torch.log1p(eigenvalues[:, None] / strengths).sum(dim=-1)
    probabilities = (-complexity / 2 - n / 2 * residuals.log()).softmax(dim=1)
    if evidence is not None:
        eigenvalues, vectors, moments, _ = _eigensystem(design, outputs, weights)
    shrunk = (probabilities[..., None] * moments[:, None] / (eigenvalues[:, None] + strengths)).sum(dim=1)
    return (vectors @ shrunk[..., None]).squeeze(-1)


def _eigensystem(design: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return eigenvalues ``(B or 1, D)`` and eigenvectors of X'WX, U'X'Wy ``(B, D)`` and y'Wy ``(B, 1)``."""
    eigenvalues, vectors = torch.linalg.eigh(design.mT @ (design * weights[..., None]))
    weighted = weights * outputs
    moments = (vectors.mT @ (design.mT @ weighted[..., None])).squeeze(-1)
    return eigenvalues.clamp_min(0), vectors, moments, (weighted * outputs).sum(dim=1, keepdim=True)
