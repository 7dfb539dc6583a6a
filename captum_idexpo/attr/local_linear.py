"""Local linear models: LIME with continuous neighbours, the explainer of ExpO's experiments on tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from captum_idexpo._core.chunks import default_rows_per_forward, look, slices
from captum_idexpo._core.forward import evaluate_given
from captum_idexpo._core.inputs import check_count
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.rng import source
from captum_idexpo.attr.surrogates import LinearRegression, Ridge


class LinearExplanation(NamedTuple):
    """A linear model per example, ``g_x(z) = intercept + coefficients z``, with K outputs.

    ``coefficients`` is ``(B, D, K)`` and ``intercept`` is ``(B, K)``. The last axis may be missing for one output.
    """

    coefficients: Tensor
    intercept: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the models' values ``(B, K)`` on inputs ``(B, D)``, or ``(B, n, K)`` on points ``(B, n, D)``."""
        coefficients = self.coefficients if self.coefficients.dim() == 3 else self.coefficients[..., None]
        intercept = self.intercept if self.intercept.dim() == 2 else self.intercept[..., None]
        points = inputs if inputs.dim() == 3 else inputs[:, None]
        values = points @ coefficients + intercept[:, None]
        return values if inputs.dim() == 3 else values[:, 0]


Explainer = Callable[[Tensor], LinearExplanation]
"""inputs ``(B, D)`` -> a linear model per example."""


class LocalLinearModels:
    """LIME with continuous neighbours: ridge regression of the outputs, weighted by distance (Ribeiro et al. 2016).

    This is the explainer of ExpO's experiments on tables. Neighbours are ``x + sigma z`` with ``z`` from ``N(0, I)``.
    Their weights are ``exp(-|z|^2 / kernel_width^2)``.

    Args:
        forward_func: rows ``(n, D)`` -> outputs ``(n, K)`` or ``(n,)``.
        sigma: standard deviation of the neighbours, in the inputs' units (standardised features: 1).
        n_samples: neighbours per example.
        kernel_width: width of the kernel; None: LIME's 0.75 sqrt(D).
        alpha: strength of the ridge penalty; 0 fits a linear regression.
        generator: source of the neighbours; None: torch's global generator.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr.local_linear import LocalLinearModels
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
        check_count("n_samples", n_samples)
        for name, value in (("sigma", sigma), ("kernel_width", kernel_width)):
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
        """Fit a linear model per example of the inputs ``(B, D)``."""
        check_rows(inputs)
        per_chunk = max(1, default_rows_per_forward((inputs,)) // self.n_samples)
        parts = [self._explain(inputs[chunk]) for chunk in slices(len(inputs), per_chunk)]
        return LinearExplanation(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _explain(self, inputs: Tensor) -> LinearExplanation:
        # Steps are drawn example by example, so that they do not depend on the chunk size.
        steps = torch.cat([normal_steps(example, self.n_samples, self.generator) for example in inputs.split(1)])
        values = outputs_at(self.forward_func, inputs[:, None] + self.sigma * steps)
        width = self.kernel_width or 0.75 * math.sqrt(inputs.shape[1])
        weights = torch.exp(-steps.square().sum(dim=2) / width**2)
        surrogate = Ridge(self.alpha) if self.alpha else LinearRegression()
        slopes = torch.stack([surrogate.solve(steps, column, weights) for column in values.unbind(2)], dim=2)
        shares = weights / weights.sum(dim=1, keepdim=True)
        # The intercept follows from the weighted means, which lie on the fitted plane.
        level = (shares[:, :, None] * (values - steps @ slopes)).sum(dim=1)
        coefficients = slopes / self.sigma
        return LinearExplanation(coefficients, level - (inputs[:, None] @ coefficients)[:, 0])


def normal_steps(inputs: Tensor, n: int, generator: Generator | None) -> Tensor:
    """Return n steps per example from N(0, I), as ``(B, n, ...)``."""
    shape = (len(inputs), n, *inputs.shape[1:])
    at = source(inputs.device, generator)
    return torch.randn(shape, generator=generator, device=at, dtype=inputs.dtype).to(inputs.device)


def outputs_at(forward_func: Callable[..., Any], points: Tensor) -> Tensor:
    """Return the outputs ``(B, n, K)`` at points ``(B, n, D)``."""

    def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
        return as_columns(forward_func(*rows))

    max_rows = look(forward_func, evaluate, (points.flatten(0, 1),)).max_rows
    return evaluate_given(evaluate, (points.transpose(0, 1),), max_rows)


def as_columns(output: object) -> Tensor:
    """Return a forward function's output as ``(n, K)``; raise ValueError for an output without rows."""
    if not isinstance(output, Tensor) or not output.dim():
        raise ValueError(f"The forward function must return one row per input, given: {output!r}.")
    return output.flatten(1) if output.dim() > 1 else output[:, None]


def check_rows(inputs: Tensor) -> None:
    """Raise ValueError unless the inputs are rows ``(B, D)`` of floating point numbers."""
    if inputs.dim() != 2 or not inputs.is_floating_point():
        raise ValueError(
            f"A linear model explains rows of real numbers (B, D), given: {inputs.dtype} of shape "
            f"{tuple(inputs.shape)}; flatten images and let the forward function put them back in shape."
        )
