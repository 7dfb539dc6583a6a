"""Fidelity of linear explanations to the model, at the input and around it, and stability of explanations.

These are the metrics of ExpO (Plumb et al. 2020, arXiv 1902.06787, sec. 2). Fidelity needs an explainer that returns a
linear model. Stability takes any attribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from captum_idexpo._core.inputs import check_count
from captum_idexpo._core.modes import no_graph
from captum_idexpo.attr.local_linear import (
    Explainer,
    LinearExplanation,
    as_columns,
    check_rows,
    normal_steps,
    outputs_at,
)


@no_graph()
def point_fidelity(explainer: Explainer, forward_func: Callable[..., Any], inputs: Tensor) -> Tensor:
    """Return the squared error of linear explanations at the inputs themselves (Plumb et al. 2020, eq. 1).

    Args:
        explainer: inputs ``(B, D)`` -> `LinearExplanation`.
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        inputs: ``(B, D)``.

    Returns:
        ``(B,)``, the mean over the outputs.

    Raises:
        ValueError: the inputs are not rows ``(B, D)`` of real numbers.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import LocalLinearModels, point_fidelity
        >>> model = torch.nn.Linear(3, 1)
        >>> float(point_fidelity(LocalLinearModels(model, alpha=0.0), model, torch.randn(5, 3)).max()) < 1e-8
        True
    """
    check_rows(inputs)
    error: Tensor = (explainer(inputs)(inputs) - as_columns(forward_func(inputs.clone()))).square().mean(dim=1)
    return error


@no_graph()
def neighborhood_fidelity(
    explainer: Explainer,
    forward_func: Callable[..., Any],
    inputs: Tensor,
    *,
    sigma: float = 0.1,
    n_neighbors: int = 10,
    generator: Generator | None = None,
) -> Tensor:
    """Return the squared error of linear explanations around the inputs (Plumb et al. 2020, eq. 2).

    Args:
        explainer: inputs ``(B, D)`` -> `LinearExplanation`.
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        inputs: ``(B, D)``.
        sigma: standard deviation of the neighbours ``x + sigma N(0, I)``, in the inputs' units.
        n_neighbors: neighbours per example.
        generator: source of the neighbours; None: torch's global generator.

    Returns:
        ``(B,)``, the mean over neighbours and outputs.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import LocalLinearModels, neighborhood_fidelity
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> neighborhood_fidelity(LocalLinearModels(model), model, torch.randn(5, 3)).shape
        torch.Size([5])
    """
    check_rows(inputs)
    _check_neighbors(sigma, n_neighbors)
    explanation = explainer(inputs)
    neighbors = inputs[:, None] + sigma * normal_steps(inputs, n_neighbors, generator)
    error: Tensor = (explanation(neighbors) - outputs_at(forward_func, neighbors)).square().mean(dim=(1, 2))
    return error


@no_graph()
def stability(
    explainer: Callable[[Tensor], Tensor | LinearExplanation],
    inputs: Tensor,
    *,
    sigma: float = 0.1,
    n_neighbors: int = 10,
    generator: Generator | None = None,
) -> Tensor:
    r"""Return how much an explanation changes around the inputs (Plumb et al. 2020, eq. 3).

    It is the mean of :math:`\|\phi(x') - \phi(x)\|_2^2`. Each neighbour x' is explained separately.

    Args:
        explainer: inputs ``(B, ...)`` -> an attribution ``(B, ...)``, or a `LinearExplanation` (its
            coefficients are compared).
        inputs: ``(B, ...)``.
        sigma: standard deviation of the neighbours ``x + sigma N(0, I)``, in the inputs' units.
        n_neighbors: neighbours per example.
        generator: source of the neighbours; None: torch's global generator.

    Returns:
        ``(B,)``, the sum over the attribution's elements, averaged over neighbours. 0 is the most stable.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Saliency
        >>> from captum_idexpo.metrics import stability
        >>> saliency, x = Saliency(torch.nn.Linear(3, 2)), torch.randn(5, 3)
        >>> stability(lambda inputs: saliency.attribute(inputs, target=1), x)
        tensor([0., 0., 0., 0., 0.])
    """
    _check_neighbors(sigma, n_neighbors)
    here = _attribution(explainer(inputs))
    changes = [
        (_attribution(explainer(inputs + sigma * normal_steps(inputs, 1, generator)[:, 0])) - here)
        .square()
        .flatten(1)
        .sum(1)
        for _ in range(n_neighbors)
    ]
    return torch.stack(changes).mean(dim=0)


def _attribution(explained: Tensor | LinearExplanation) -> Tensor:
    return explained.coefficients if isinstance(explained, LinearExplanation) else explained


def _check_neighbors(sigma: float, n_neighbors: int) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, given: {sigma}.")
    check_count("n_neighbors", n_neighbors)
