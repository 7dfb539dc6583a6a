"""Shapley values: efficiency, exactness, how few evaluations they take, and what Captum accepts."""

from __future__ import annotations

import itertools
import math

import captum.attr
import pytest
import torch

import captum_idexpo.attr.shapley
from captum_idexpo.attr import ShapleyValues, ShapleyValueSampling
from tests.helpers import smooth_net

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def value(net, x, coalition, target=1):
    kept = torch.tensor([feature in coalition for feature in range(6)])
    return net(torch.where(kept, x, 0.3))[:, target]


def test_shapley_values_equal_the_formula():
    net = smooth_net()
    expected = torch.zeros_like(X)
    for feature in range(6):
        others = [other for other in range(6) if other != feature]
        for size in range(6):
            weight = math.factorial(size) * math.factorial(5 - size) / math.factorial(6)
            for coalition in itertools.combinations(others, size):
                gain = value(net, X, {*coalition, feature}) - value(net, X, set(coalition))
                expected[:, feature] += weight * gain.detach()
    torch.testing.assert_close(ShapleyValues(net).attribute(X, 0.3, target=1), expected, atol=1e-12, rtol=0)


def test_shapley_value_sampling_is_the_mean_over_captums_orders():
    net = smooth_net()
    torch.manual_seed(4)
    orders = [torch.randperm(6).tolist() for _ in range(7)]
    expected = torch.zeros_like(X)
    for order in orders:
        for position, feature in enumerate(order):
            before = set(order[:position])
            expected[:, feature] += (value(net, X, {*before, feature}) - value(net, X, before)).detach() / 7
    torch.manual_seed(4)
    sampled = ShapleyValueSampling(net).attribute(X, 0.3, target=1, n_samples=7)
    torch.testing.assert_close(sampled, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("explainer", [ShapleyValues, ShapleyValueSampling])
@pytest.mark.parametrize("perturbations_per_eval", [None, 1, 5])
def test_shapley_values_add_up_for_any_perturbations_per_eval(explainer, perturbations_per_eval):
    net = smooth_net()
    values = explainer(net).attribute(X, target=1, perturbations_per_eval=perturbations_per_eval)
    gap = (net(X) - net(torch.zeros_like(X)))[:, 1]
    torch.testing.assert_close(values.sum(dim=1), gap.detach(), atol=1e-12, rtol=0)


def test_shapley_values_evaluate_each_coalition_once():
    net, rows = smooth_net(), []

    def counted(x):
        rows.append(len(x))
        return net(x)

    ShapleyValues(counted).attribute(X, target=1)
    assert sum(rows) == 3 * (2**6 + 4)  # and four to see whether copies can share a forward pass
    rows.clear()
    ShapleyValueSampling(counted).attribute(X, target=1, n_samples=200)
    assert sum(rows) == 3 * (2**6 + 4)  # 200 orders of 6 features meet every coalition


@pytest.mark.parametrize("forward", [lambda x: x.square().sum(), lambda x: x.square().sum()[None], lambda x: 2.0])
def test_shapley_values_of_one_value_per_batch_equal_captum(forward):
    theirs = captum.attr.ShapleyValues(forward).attribute(X[:, :4])
    ours = ShapleyValues(forward).attribute(X[:, :4])
    torch.testing.assert_close(ours, theirs, check_dtype=False, atol=1e-5, rtol=0)


def test_shapley_values_of_a_single_row_and_tuples_equal_captum():
    def forward(a, b, scale):
        return (a.sum(1) * b.square().sum(1) * scale)[:, None]

    arguments = {"target": 0, "additional_forward_args": (2.0,), "baselines": (0.5, torch.ones(1, 3))}
    inputs = (X[:1, :2].float(), X[:1, 2:5].float())
    theirs = captum.attr.ShapleyValues(forward).attribute(inputs, **arguments)
    ours = ShapleyValues(forward).attribute(inputs, **arguments)
    assert isinstance(ours, tuple)
    torch.testing.assert_close(ours, theirs)


def test_shapley_values_of_a_one_row_forward_function_equal_captum():
    def forward(x):
        assert len(x) == 1
        return x.prod(dim=1)

    ours = ShapleyValues(forward).attribute(X[:1, :4])
    torch.testing.assert_close(ours, captum.attr.ShapleyValues(forward).attribute(X[:1, :4]), check_dtype=False)


def test_shapley_values_accept_a_feature_mask_for_each_example():
    net = smooth_net()
    masks = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])
    together = ShapleyValues(net).attribute(X, target=1, feature_mask=masks)
    alone = [ShapleyValues(net).attribute(X[i : i + 1], target=1, feature_mask=masks[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_shapley_values_and_sampling_report_bad_arguments():
    net = smooth_net()
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        ShapleyValueSampling(net).attribute(X, target=1, n_samples=0)
    with pytest.raises(AssertionError, match="perturbations_per_eval must be None or"):
        ShapleyValueSampling(net).attribute(X, target=1, perturbations_per_eval=0)
    with pytest.raises(AssertionError):
        ShapleyValueSampling(lambda x: x.sum()).attribute(X, perturbations_per_eval=2)
    with pytest.warns(UserWarning, match=r"2\^17 evaluations"):
        ShapleyValues(lambda x: x.sum(dim=1)).attribute(torch.ones(1, 17))


def test_shapley_value_sampling_shows_progress(capsys):
    ShapleyValueSampling(smooth_net()).attribute(X, target=1, n_samples=2, show_progress=True)
    assert "Shapley Value Sampling attribution: 100%" in capsys.readouterr().err


def test_shapley_value_sampling_takes_many_features_one_by_one(monkeypatch):
    net = smooth_net()
    torch.manual_seed(0)
    compared = ShapleyValueSampling(net).attribute(X, target=1, n_samples=7)
    monkeypatch.setattr(captum_idexpo.attr.shapley, "_VALUES_TO_COMPARE", 0)
    for perturbations_per_eval in (None, 1, 4):
        torch.manual_seed(0)
        explainer, arguments = ShapleyValueSampling(net), {"perturbations_per_eval": perturbations_per_eval}
        one_by_one = explainer.attribute(X, target=1, n_samples=7, **arguments)
        torch.testing.assert_close(one_by_one, compared)
    single = ShapleyValueSampling(lambda x: x[:, 0] ** 2).attribute(X[:, :1])
    torch.testing.assert_close(single[:, 0], X[:, 0] ** 2)


def test_shapley_values_are_precise_with_a_large_offset_under_autocast():
    net = smooth_net().float()

    def forward(x):
        return net(x).float()[:, 1] + 1000

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        exact = ShapleyValues(net.double()).attribute(X, target=1)
    net.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = ShapleyValues(forward).attribute(X.float())
    assert values.dtype == torch.float32
    assert float((values - exact).abs().max()) < 0.02


def test_shapley_values_of_token_ids_accept_a_float_baseline():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
    tokens = torch.randint(5, (3, 4))
    theirs = captum.attr.ShapleyValues(model).attribute(tokens, baselines=1.0, target=1)
    ours = ShapleyValues(model).attribute(tokens, baselines=1.0, target=1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_shapley_values_lose_no_digits_to_a_large_constant():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    values = ShapleyValues(lambda x: 2.0**20 + x.sum(dim=1)).attribute(x)
    torch.testing.assert_close(values, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_examples", [3, 4, 5])
@pytest.mark.parametrize("method", [ShapleyValues, ShapleyValueSampling])
def test_shapley_baseline_without_batch_axis_applies_to_every_example(method, n_examples):
    """Also where there are as many examples as features."""
    torch.manual_seed(0)
    model, mean = torch.nn.Linear(4, 2), torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = torch.randn(n_examples, 4)
    attribution = method(model).attribute(x, baselines=mean, target=1)
    torch.testing.assert_close(attribution, (x - mean) * model.weight[1], rtol=1e-4, atol=1e-5)
