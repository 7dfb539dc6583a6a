"""ExpO's metrics against scikit-learn's ridge regression and the definitions, one example at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from captum_idexpo.attr import Saliency
from captum_idexpo.metrics import (
    LinearExplanation,
    LocalLinearModels,
    neighborhood_fidelity,
    point_fidelity,
    stability,
)
from tests.helpers import smooth_net

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(call):
    torch.manual_seed(3)
    return call()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_local_linear_models_are_ridge_regressions(alpha):
    net = smooth_net()
    explanation = seeded(lambda: LocalLinearModels(net, sigma=0.5, n_samples=50, alpha=alpha)(X))
    steps = seeded(lambda: torch.cat([torch.randn(1, 50, 6, dtype=torch.float64) for _ in range(5)]))
    for i in range(5):
        weights = torch.exp(-steps[i].square().sum(1) / (0.75**2 * 6)).numpy()
        ridge = Ridge(alpha=alpha).fit(steps[i].numpy(), net(X[i] + 0.5 * steps[i]).detach().numpy(), weights)
        slopes = explanation.coefficients[i].numpy() * 0.5
        np.testing.assert_allclose(slopes.T, ridge.coef_, atol=1e-9)
        np.testing.assert_allclose(explanation(X)[i].numpy(), ridge.intercept_, atol=1e-9)


def test_point_and_neighborhood_fidelity_equal_their_definitions():
    net = smooth_net()
    saliency = [Saliency(net).attribute(X, target=k, abs=False) for k in range(3)]
    slopes = torch.stack(saliency, dim=2)

    def tangent(x):
        return LinearExplanation(slopes, net(X).detach() + 0.1 - (X[:, None] @ slopes)[:, 0])

    torch.testing.assert_close(point_fidelity(tangent, net, X), torch.full((5,), 0.01, dtype=torch.float64))
    value = seeded(lambda: neighborhood_fidelity(tangent, net, X, sigma=0.2, n_neighbors=4))
    steps = 0.2 * seeded(lambda: torch.randn(5, 4, 6, dtype=torch.float64))
    expected = torch.zeros(5, dtype=torch.float64)
    for i in range(5):
        for step in steps[i]:
            linear = net(X[i : i + 1])[0] + 0.1 + slopes[i].T @ step
            expected[i] += (linear - net((X[i] + step)[None])[0]).square().mean().detach() / 4
    torch.testing.assert_close(value, expected)


def test_point_fidelity_accepts_a_single_output_without_a_last_axis():
    model = torch.nn.Sequential(torch.nn.Linear(6, 1), torch.nn.Flatten(0)).double()
    line = LinearExplanation(model[0].weight.detach().expand(5, 6), model[0].bias.detach().expand(5))
    torch.testing.assert_close(point_fidelity(lambda x: line, model, X), torch.zeros(5, dtype=torch.float64))


def test_stability_explains_each_neighbor_separately():
    net = smooth_net()
    calls = []

    def explain(x):
        calls.append(x)
        return Saliency(net).attribute(x, target=1, abs=False)

    value = seeded(lambda: stability(explain, X, sigma=0.3, n_neighbors=2))
    assert len(calls) == 3
    expected = torch.stack([(explain(x) - explain(X)).square().sum(1) for x in calls[1:3]]).mean(0)
    torch.testing.assert_close(value, expected)
    lines = stability(LocalLinearModels(net, n_samples=20), X)
    assert lines.shape == (5,)


@pytest.mark.parametrize("n_samples", [51, 1300, 5000])  # all five in one chunk, some, one
def test_local_linear_models_do_not_depend_on_batches_or_chunks(n_samples):
    net = smooth_net()
    whole = LocalLinearModels(net, n_samples=n_samples, generator=torch.Generator().manual_seed(0))(X)
    generator = torch.Generator().manual_seed(0)
    alone = [LocalLinearModels(net, n_samples=n_samples, generator=generator)(x) for x in X.split(1)]
    torch.testing.assert_close(whole.coefficients, torch.cat([explanation.coefficients for explanation in alone]))


@pytest.mark.parametrize(
    "call",
    [
        lambda net: point_fidelity(LocalLinearModels(net), net, X[None]),
        lambda net: neighborhood_fidelity(LocalLinearModels(net), net, X, sigma=0.0),
        lambda net: stability(LocalLinearModels(net), X, n_neighbors=0),
        lambda net: LocalLinearModels(net, sigma=-1.0),
        lambda net: LocalLinearModels(net, alpha=-1.0),
        lambda net: LocalLinearModels(net)(X.long()),
        lambda net: point_fidelity(LocalLinearModels(net), lambda x: 1.0, X),
    ],
)
def test_local_fidelity_metrics_refuse_bad_arguments(call):
    with pytest.raises(ValueError, match=r"must|explains rows"):
        call(smooth_net())
