"""How well a linear explanation agrees with the model, at the input and around it, and how much it changes there.

The metrics of ExpO (Plumb et al. 2020, arXiv 1902.06787, sec. 2), for any explainer that yields a linear model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from captum_idexpo._core.chunks import default_rows_per_forward, look, slices
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.rng import source
from captum_idexpo.attr.surrogates import LinearRegression, Ridge


class LinearExplanation(NamedTuple):
    """A linear model of each example, ``g_x(z) = intercept + coefficients z``, of K outputs.

    ``coefficients`` are ``(B, D, K)`` and ``intercept`` is ``(B, K)``, or without the last axis for a single output.
    """

    coefficients: Tensor
    intercept: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """The linear models' values on inputs ``(B, D)``, or ``(B, n, D)`` for n points each: ``(B, [n,] K)``."""
        coefficients = self.coefficients if self.coefficients.dim() == 3 else self.coefficients[..., None]
        intercept = self.intercept if self.intercept.dim() == 2 else self.intercept[..., None]
        points = inputs if inputs.dim() == 3 else inputs[:, None]
        values = points @ coefficients + intercept[:, None]
        return values if inputs.dim() == 3 else values[:, 0]


Explainer = Callable[[Tensor], LinearExplanation]
"""inputs ``(B, D)`` -> a linear model of each."""


class LocalLinearModels:
    """LIME on continuous neighbours: ridge regression of the outputs, weighted by distance (Ribeiro et al. 2016).

    The explainer of ExpO's experiments for tables. Neighbours are ``x + sigma N(0, I)``, weights
    ``exp(-|z|^2 / kernel_width^2)`` of the steps ``z`` in units of sigma.

    Args:
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        sigma: standard deviation of the neighbours, in the inputs' units (standardised features: 1).
        n_samples: neighbours of each example.
        kernel_width: None: LIME's 0.75 sqrt(D).
        alpha: strength of the ridge.
        generator: source of the neighbours; None: torch's global generator.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import LocalLinearModels
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        >>> explanation = LocalLinearModels(model, alpha=1e-6)(x)
        >>> torch.allclose(explanation.coefficients[..., 0], model.weight.expand(5, 3), atol=1e-3)
        True
        >>> torch.allclose(explanation(x), model(x), atol=1e-3)
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        sigma: float = 1.0,
        n_samples: int = 1000,
        kernel_width: float | None = None,
        alpha: float = 1.0,
        generator: Generator | None = None,
    ) -> None:
        for name, value in (("sigma", sigma), ("n_samples", n_samples), ("kernel_width", kernel_width)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, given: {value}.")
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, given: {alpha}.")
        self.forward_func = forward_func
        self.sigma = sigma
        self.n_samples = n_samples
        self.kernel_width = kernel_width
        self.alpha = alpha
        self.generator = generator

    @no_graph()
    def __call__(self, inputs: Tensor) -> LinearExplanation:
        """A linear model of each example ``(B, D)``."""
        _check_rows(inputs)
        per_chunk = max(1, default_rows_per_forward((inputs,)) // self.n_samples)
        parts = [self._explain(inputs[chunk]) for chunk in slices(len(inputs), per_chunk)]
        return LinearExplanation(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _explain(self, inputs: Tensor) -> LinearExplanation:
        # Drawn one by one, so that an example's do not depend on how many fit a chunk.
        steps = torch.cat([_normal(example, self.n_samples, self.generator) for example in inputs.split(1)])
        values = _evaluate(self.forward_func, inputs[:, None] + self.sigma * steps)
        width = self.kernel_width or 0.75 * math.sqrt(inputs.shape[1])
        weights = torch.exp(-steps.square().sum(dim=2) / width**2)
        surrogate = Ridge(self.alpha) if self.alpha else LinearRegression()
        slopes = torch.stack([surrogate.solve(steps, column, weights) for column in values.unbind(2)], dim=2)
        shares = weights / weights.sum(dim=1, keepdim=True)
        # The fit's intercept: the weighted means lie on the fit.
        level = (shares[:, :, None] * (values - steps @ slopes)).sum(dim=1)
        coefficients = slopes / self.sigma
        return LinearExplanation(coefficients, level - (inputs[:, None] @ coefficients)[:, 0])


@no_graph()
def point_fidelity(explainer: Explainer, forward_func: Callable[..., Any], inputs: Tensor) -> Tensor:
    """The squared error of linear explanations at the inputs themselves (Plumb et al. 2020, eq. 1).

    Args:
        explainer: inputs ``(B, D)`` -> `LinearExplanation`.
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        inputs: ``(B, D)``.

    Returns:
        ``(B,)``, means over the outputs.

    Raises:
        ValueError: inputs that are no rows.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import LocalLinearModels, point_fidelity
        >>> model = torch.nn.Linear(3, 1)
        >>> float(point_fidelity(LocalLinearModels(model, alpha=0.0), model, torch.randn(5, 3)).max()) < 1e-8
        True
    """
    _check_rows(inputs)
    error: Tensor = (explainer(inputs)(inputs) - _columns(forward_func(inputs.clone()))).square().mean(dim=1)
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
    """The squared error of linear explanations around the inputs (Plumb et al. 2020, eq. 2).

    Args:
        explainer: inputs ``(B, D)`` -> `LinearExplanation`.
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        inputs: ``(B, D)``.
        sigma: standard deviation of the neighbours ``x + sigma N(0, I)``, in the inputs' units.
        n_neighbors: of each example.
        generator: source of the neighbours; None: torch's global generator.

    Returns:
        ``(B,)``, means over neighbours and outputs.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import LocalLinearModels, neighborhood_fidelity
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> neighborhood_fidelity(LocalLinearModels(model), model, torch.randn(5, 3)).shape
        torch.Size([5])
    """
    _check_rows(inputs)
    _check_neighbors(sigma, n_neighbors)
    explanation = explainer(inputs)
    neighbors = inputs[:, None] + sigma * _normal(inputs, n_neighbors, generator)
    error: Tensor = (explanation(neighbors) - _evaluate(forward_func, neighbors)).square().mean(dim=(1, 2))
    return error


@no_graph()
def stability(
    explainer: Callable[[Tensor], Any],
    inputs: Tensor,
    *,
    sigma: float = 0.1,
    n_neighbors: int = 10,
    generator: Generator | None = None,
) -> Tensor:
    r"""How much an explanation changes around the inputs (Plumb et al. 2020, eq. 3).

    The mean of :math:`\|\phi(x') - \phi(x)\|_2^2`, each neighbour explained anew.

    Args:
        explainer: inputs ``(B, ...)`` -> an attribution ``(B, ...)``, or a `LinearExplanation` (its coefficients).
        inputs: ``(B, ...)``.
        sigma: standard deviation of the neighbours ``x + sigma N(0, I)``, in the inputs' units.
        n_neighbors: of each example.
        generator: source of the neighbours; None: torch's global generator.

    Returns:
        ``(B,)``, sums over the attribution's elements, means over neighbours. 0 is most stable.

    Raises:
        ValueError: an argument out of range.

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
        (_attribution(explainer(inputs + sigma * _normal(inputs, 1, generator)[:, 0])) - here)
        .square()
        .flatten(1)
        .sum(1)
        for _ in range(n_neighbors)
    ]
    return torch.stack(changes).mean(dim=0)


def _attribution(explained: Any) -> Tensor:
    attribution: Tensor = explained.coefficients if isinstance(explained, LinearExplanation) else explained
    return attribution


def _normal(inputs: Tensor, n: int, generator: Generator | None) -> Tensor:
    shape = (len(inputs), n, *inputs.shape[1:])
    at = source(inputs.device, generator)
    return torch.randn(shape, generator=generator, device=at, dtype=inputs.dtype).to(inputs.device)


def _evaluate(forward_func: Callable[..., Any], points: Tensor) -> Tensor:
    """Return the outputs on points ``(B, n, D)``, as ``(B, n, K)``."""
    rows = points.flatten(0, 1)
    max_rows = look(forward_func, lambda some, examples, n_copies: _columns(forward_func(*some)), (rows,)).max_rows
    chunks = [_columns(forward_func(rows[chunk])) for chunk in slices(len(rows), max_rows)]
    return torch.cat(chunks).reshape(*points.shape[:2], -1)


def _columns(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or not output.dim():
        raise ValueError(f"The forward function must return one row an input, given: {output!r}.")
    return output.flatten(1) if output.dim() > 1 else output[:, None]


def _check_rows(inputs: Tensor) -> None:
    if inputs.dim() != 2 or not inputs.is_floating_point():
        raise ValueError(
            f"A linear model explains rows of real numbers (B, D), given: {inputs.dtype} of shape "
            f"{tuple(inputs.shape)}; flatten images and let the forward function put them back in shape."
        )


def _check_neighbors(sigma: float, n_neighbors: int) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, given: {sigma}.")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, given: {n_neighbors}.")
