"""Ridge regression whose strength the data choose: averaged over strengths by their marginal likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

# Four a decade, from a millionth of the mean eigenvalue, which leaves exact data alone, to a thousand times it.
_EXPONENTS = (-6.0, 3.0)
_N_STRENGTHS = 37


def averaged_ridge(
    design: Tensor,
    outputs: Tensor,
    weights: Tensor,
    *,
    evidence: tuple[Tensor, Tensor, Tensor] | None = None,
    n_fixed: int = 0,
) -> Tensor:
    r"""The coefficients of ridge regression, averaged over its strength by the evidence for each.

    With :math:`\lambda, U` the eigensystem of :math:`X^T W X`, :math:`r = U^T X^T W y` and n samples, a strength a has
    the coefficients :math:`U r / (\lambda + a)` and, the noise's variance profiled out, the log marginal likelihood

    .. math:: -\tfrac12 \sum_i \log(1 + \lambda_i / a) - \tfrac n2 \log(y^T W y - \sum_i r_i^2 / (\lambda_i + a)).

    The eigensystem depends on the design only, so that the average is smooth in the outputs: its gradient includes that
    of the choice.

    Args:
        design: X, ``(B or 1, n, D)``.
        outputs: y, ``(B, n)``.
        weights: W's diagonal, ``(B or 1, n)``.
        evidence: another design, outputs and weights of the same coefficients whose errors are independent, to judge
            the strengths by.
        n_fixed: degrees of freedom that have been projected out.

    Returns:
        ``(B, D)``.
    """
    judged = (design, outputs, weights) if evidence is None else evidence
    eigenvalues, vectors, moments, squares = _eigensystem(*judged)
    n = (judged[2] > 0).sum(dim=1, keepdim=True) - n_fixed
    rank = (eigenvalues > 1e-9 * eigenvalues.amax(dim=1, keepdim=True)).sum(dim=1, keepdim=True).clamp_min(1)
    scale = (eigenvalues.sum(dim=1, keepdim=True) / rank).clamp_min(1e-12)
    grid = torch.logspace(*_EXPONENTS, _N_STRENGTHS, dtype=scale.dtype, device=scale.device)
    strengths = (scale * grid)[..., None]  # (B or 1, A, 1)
    residuals = squares - (moments[:, None] ** 2 / (eigenvalues[:, None] + strengths)).sum(dim=-1)
    # An exact fit leaves rounding, maybe a negative one.
    residuals = torch.maximum(residuals, 1e-12 * squares + torch.finfo(squares.dtype).tiny)
    complexity = torch.log1p(eigenvalues[:, None] / strengths).sum(dim=-1)
    probabilities = (-complexity / 2 - n / 2 * residuals.log()).softmax(dim=1)
    if evidence is not None:
        eigenvalues, vectors, moments, _ = _eigensystem(design, outputs, weights)
    shrunk = (probabilities[..., None] * moments[:, None] / (eigenvalues[:, None] + strengths)).sum(dim=1)
    return (vectors @ shrunk[..., None]).squeeze(-1)


def _eigensystem(design: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues ``(B or 1, D)`` and vectors of X'WX; U'X'Wy ``(B, D)``; y'Wy ``(B, 1)``."""
    eigenvalues, vectors = torch.linalg.eigh(design.mT @ (design * weights[..., None]))
    weighted = weights * outputs
    moments = (vectors.mT @ (design.mT @ weighted[..., None])).squeeze(-1)
    return eigenvalues.clamp_min(0), vectors, moments, (weighted * outputs).sum(dim=1, keepdim=True)
