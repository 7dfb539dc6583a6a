"""The closed forms against scikit-learn in float64, alone and in a batch; what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from captum._utils.models.linear_model import SGDLasso, SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import linear_model

from captum_idexpo.attr.surrogates import (
    BayesianRidge,
    BayesianShapleyRegression,
    Lasso,
    LinearRegression,
    Ridge,
    ShapleyRegression,
    as_surrogate,
)
from tests.helpers import LEAST_SQUARES_OF_FULL_RANK_ONLY

PAIRS = {
    "ridge": (Ridge(0.3), linear_model.Ridge(0.3), 1e-10),
    "ridge without intercept": (Ridge(0.3, False), linear_model.Ridge(0.3, fit_intercept=False), 1e-10),
    "regression": (LinearRegression(), linear_model.LinearRegression(), 1e-9),
    "regression without intercept": (LinearRegression(False), linear_model.LinearRegression(fit_intercept=False), 1e-9),
    "lasso": (Lasso(0.02), linear_model.Lasso(0.02), 1e-12),
    "lasso without intercept": (Lasso(0.02, False), linear_model.Lasso(0.02, fit_intercept=False), 1e-12),
}


def problem(n_samples, n_features, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(2, (batch, n_samples, n_features), generator=generator).double()
    outputs = torch.randn(batch, n_samples, generator=generator, dtype=torch.float64)
    weights = torch.rand(batch, n_samples, generator=generator, dtype=torch.float64) + 0.05
    return masks, outputs, weights


def sklearn_coefficients(model, masks, outputs, weights):
    rows = zip(masks, outputs, weights, strict=True)
    fitted = [model.fit(z.numpy(), v.numpy(), sample_weight=w.numpy()).coef_.copy() for z, v, w in rows]
    return torch.stack([torch.as_tensor(coefficients) for coefficients in fitted])


@pytest.mark.filterwarnings("ignore:Objective did not converge")  # older versions, of a gap of 0
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("n_samples", "n_features"), [(40, 6), (6, 6), (4, 9), (1, 3)])
def test_surrogates_equal_scikit_learn(name, n_samples, n_features):
    ours, theirs, tolerance = PAIRS[name]
    arguments = problem(n_samples, n_features)
    expected = sklearn_coefficients(theirs, *arguments)
    torch.testing.assert_close(ours.solve(*arguments), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(LEAST_SQUARES_OF_FULL_RANK_ONLY, reason="this scikit-learn is no reference")
@pytest.mark.parametrize(("n_samples", "n_features"), [(25, 64), (12, 16), (5, 6), (70, 64)])
@pytest.mark.parametrize("kind", ["one dominates", "two dominate", "eight decades"])
def test_linear_regression_is_accurate_with_weights_of_many_sizes(n_samples, n_features, kind):
    masks, outputs, weights = problem(n_samples, n_features, batch=10)
    if kind == "eight decades":
        weights = 10 ** (-8 * weights)
    else:
        weights = torch.ones_like(weights)
        weights[:, : 1 + kind.startswith("two")] = 1e6
    expected = sklearn_coefficients(linear_model.LinearRegression(), masks, outputs, weights)
    error = (LinearRegression().solve(masks, outputs, weights) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_ridge_equals_its_normal_equations(n_samples, n_features, seed):
    masks, outputs, weights = problem(n_samples, n_features, batch=2, seed=seed)
    z, v, w = masks[1], outputs[1], weights[1].diag()
    expected = torch.linalg.solve(z.T @ w @ z + 0.1 * torch.eye(n_features, dtype=z.dtype), z.T @ w @ v)
    torch.testing.assert_close(Ridge(0.1, fit_intercept=False).solve(masks, outputs, weights)[1], expected)


@pytest.mark.parametrize(
    "surrogate",
    [
        Ridge(0.1),
        Ridge(0.1, False),
        LinearRegression(),
        Lasso(0.01),
        BayesianRidge(),
        ShapleyRegression(),
        BayesianShapleyRegression(),
    ],
)
@pytest.mark.parametrize("n_samples", [5, 30])
def test_shared_masks_equal_repeated_masks(surrogate, n_samples):
    masks, outputs, weights = problem(n_samples, 6)
    masks[:, 0], masks[:, 1] = 1, 0  # the end points of KernelSHAP
    shared = surrogate.solve(masks[:1], outputs, weights[:1])
    repeated = surrogate.solve(masks[:1].expand(3, -1, -1), outputs, weights[:1].expand(3, -1))
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("surrogate", [Ridge(0.1), Ridge(0.1, False), ShapleyRegression()])
@pytest.mark.parametrize("n_features", [3, 6, 7])  # from 7 on more than twice the examples
def test_shared_masks_with_weights_per_example_equal_repeated_masks(surrogate, n_features):
    masks, outputs, weights = problem(30, n_features)
    masks[:, 0], masks[:, 1] = 1, 0
    shared = surrogate.solve(masks[:1], outputs, weights)
    repeated = surrogate.solve(masks[:1].expand(3, -1, -1), outputs, weights)
    torch.testing.assert_close(shared, repeated, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda v, w: surrogate.solve(masks[:1], v, w), on_a_graph(outputs, weights))


def on_a_graph(*tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("telling_weight", [0.0, 1e-14])
def test_shapley_regression_of_a_singular_example_has_the_least_norm(telling_weight):
    masks, outputs, weights = problem(20, 5)
    masks[1, 2:, 4] = masks[1, 2:, 3]  # two features that always go together
    masks[:, 0], masks[:, 1] = 1, 0
    masks[1, 2, 3:] = torch.tensor([1.0, 0.0], dtype=torch.float64)  # but once, which does not count
    weights[1, 2] = telling_weight
    together = ShapleyRegression().solve(masks, outputs, weights)
    alone = [ShapleyRegression().solve(*(t[b : b + 1] for t in (masks, outputs, weights))) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=0)
    weights[:, :2] = 1e9
    weights[1, 2] = 0
    expected = sklearn_coefficients(linear_model.LinearRegression(), masks, outputs, weights)
    torch.testing.assert_close(together, expected, atol=1e-6, rtol=0)
    assert together[1, 3] == pytest.approx(float(together[1, 4]))  # least norm shares equally


def test_shapley_regression_is_regression_with_infinite_end_point_weights():
    masks, outputs, _ = problem(30, 6)
    masks[:, 0], masks[:, 1] = 1, 0
    weights = torch.ones(3, 30, dtype=torch.float64)
    weights[:, :2] = 1e9
    expected = sklearn_coefficients(linear_model.LinearRegression(), masks, outputs, weights)
    torch.testing.assert_close(ShapleyRegression().solve(masks, outputs, weights), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("surrogate", [Ridge(0.1), LinearRegression(), Lasso(0.02, tol=1e-14, max_iter=10**6)])
def test_surrogate_gradient_in_outputs_and_weights_is_correct(surrogate):
    masks, outputs, weights = problem(30, 6)
    outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: surrogate.solve(masks, v, weights), (outputs,), atol=1e-6)
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: surrogate.solve(masks, outputs.detach(), w), (weights,), atol=1e-6)


@pytest.mark.parametrize("surrogate", [Ridge(0.1), LinearRegression(), Lasso(0.02), ShapleyRegression()])
def test_surrogates_return_the_dtype_of_the_outputs(surrogate):
    masks, outputs, weights = problem(10, 3)
    assert surrogate.solve(masks.bool(), outputs.float(), weights.float()).dtype == torch.float32


def test_as_surrogate_recognises_captums_wrappers():
    assert as_surrogate(SkLearnRidge(alpha=0.2)) == Ridge(0.2)
    assert as_surrogate(SkLearnRidge()) == Ridge(1.0)
    assert as_surrogate(SkLearnLasso(alpha=0.2, tol=1e-9)) == Lasso(0.2, tol=1e-9)
    assert as_surrogate(SkLearnLasso()) == Lasso(1.0)
    assert as_surrogate(SkLearnLinearRegression(fit_intercept=False)) == LinearRegression(False)
    assert as_surrogate(SkLearnLasso(alpha=0.1, positive=True)) is None
    assert as_surrogate(SkLearnRidge(alpha=0.0)) is None
    assert as_surrogate(SGDLasso()) is None


def test_ridge_and_lasso_refuse_a_strength_of_zero():
    for surrogate in (Ridge, Lasso):
        with pytest.raises(ValueError, match=r"alpha > 0.*LinearRegression"):
            surrogate(alpha=0.0)


def test_lasso_without_scikit_learn_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"captum-idexpo\[lime\]"):
        Lasso().solve(*problem(5, 2))
    Ridge().solve(*problem(5, 2))


def test_shapley_regression_ignores_only_the_weights_of_the_end_points():
    masks, outputs, _ = problem(20, 5)
    masks[:, 0], masks[:, 1] = 1, 0
    counts = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0))
    counts[:2] = 1
    repeated = torch.arange(20).repeat_interleave(counts)
    expected = ShapleyRegression().solve(masks[:, repeated], outputs[:, repeated], torch.ones(1, len(repeated)))
    weighted = counts.double().expand(3, -1).clone()
    weighted[:, :2] = 77.0
    torch.testing.assert_close(ShapleyRegression().solve(masks, outputs, weighted), expected)
    few = ShapleyRegression().solve(masks[:, :5], outputs[:, :5], weighted[:, :5])  # fewer samples than features
    assert few.isfinite().all()
    torch.testing.assert_close(few.sum(1), outputs[:, 0] - outputs[:, 1])


@pytest.mark.parametrize("n_sets", [1, 3])
@pytest.mark.parametrize("n_weights", [1, 3])
@pytest.mark.parametrize("n_samples", [6, 40])
def test_ridge_loses_no_digits_to_a_large_mean(n_sets, n_weights, n_samples):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(n_sets, n_samples, 8, generator=generator) < 0.5
    weights = torch.rand(n_weights, n_samples, generator=generator, dtype=torch.float64)
    outputs = torch.randint(-1000, 1000, (3, n_samples), generator=generator).double() / 1024
    expected = Ridge(1.0).solve(masks, outputs, weights)
    torch.testing.assert_close(Ridge(1.0).solve(masks, outputs + 2**30, weights), expected, rtol=1e-11, atol=1e-12)
