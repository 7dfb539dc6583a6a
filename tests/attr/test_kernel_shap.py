"""KernelShap against Captum's and against exact Shapley values; efficiency; its gradient; its errors."""

from __future__ import annotations

import itertools
import math

import captum.attr
import pytest
import torch
from sklearn.linear_model import LinearRegression

from captum_idexpo.attr import KernelShap, Lime, ShapleyValues
from captum_idexpo.attr.coalitions import KERNEL_SHAP_SAMPLINGS, captum_kernel_shap_masks
from captum_idexpo.attr.surrogates import BayesianShapleyRegression
from tests.attr.test_lime import BASELINES, FEATURE_MASKS, SCALARS, TARGETS, B, TwoInputs, X, assert_same
from tests.helpers import gradient_error, smooth_net

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are providing multiple inputs", "ignore:Minimum element in feature mask"
)


def both(forward, inputs, **arguments):
    results = []
    for cls in (captum.attr.KernelShap, KernelShap):
        torch.manual_seed(7)
        results.append((cls(forward).attribute(inputs, **arguments), torch.rand(1)))
    (theirs, their_stream), (ours, our_stream) = results
    assert torch.equal(their_stream, our_stream), "the random streams have parted"
    return theirs, ours


@pytest.mark.parametrize("feature_mask", FEATURE_MASKS.values(), ids=FEATURE_MASKS)
@pytest.mark.parametrize("baselines", BASELINES.values(), ids=BASELINES)
def test_kernel_shap_equals_captum_for_feature_masks_and_baselines(feature_mask, baselines):
    net = smooth_net().float()
    assert_same(*both(net, X, target=1, feature_mask=feature_mask, baselines=baselines, n_samples=60), 5e-5)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_kernel_shap_equals_captum_for_targets(target):
    if isinstance(target, torch.Tensor) and not target.dim():
        pytest.skip("Captum rejects a 0-d target for more than one example")
    assert_same(*both(smooth_net().float(), X, target=target, n_samples=40), 5e-5)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("n_samples", [1, 2, 3, 5, 8, 25])
@pytest.mark.parametrize("perturbations_per_eval", [1, 7])
def test_kernel_shap_equals_captum_for_sample_counts(batch, n_samples, perturbations_per_eval):
    theirs, ours = both(
        smooth_net().float(), X[:batch], target=0, n_samples=n_samples, perturbations_per_eval=perturbations_per_eval
    )
    assert_same(theirs, ours, 2e-4)


def test_kernel_shap_equals_captum_at_many_features():
    """At D = 64 and M = 200 Captum's float32 solve is the less exact side: ours is the float64 solution."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    x = torch.randn(3, 64)
    theirs, ours = both(net, x, target=1, n_samples=200)
    torch.manual_seed(7)
    masks = captum_kernel_shap_masks(3, 200, 64).double()
    weights = torch.cat([torch.full((2,), 1e6), torch.ones(198)]).numpy()
    for b in range(3):
        outputs = net(x[b] * masks[b].float())[:, 1].detach().double()
        exact = LinearRegression().fit(masks[b].numpy(), outputs.numpy(), sample_weight=weights).coef_
        torch.testing.assert_close(ours[b].double(), torch.as_tensor(exact), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


def test_kernel_shap_equals_captum_for_tuples():
    net, inputs = TwoInputs(), (X, B)
    masks = (torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[[1, 2], [2, 3]]]))
    for arguments in ({}, {"feature_mask": masks}, {"return_input_shape": False}):
        assert_same(*both(net, inputs, target=1, n_samples=60, **arguments), 2e-4)


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("batch", [1, 4])
def test_kernel_shap_equals_captum_for_one_value_per_batch(scalar, batch):
    net = smooth_net().float()
    theirs, ours = both(lambda x: scalar(net(x).sum()), X[:batch], n_samples=40)
    assert ours.shape == (1, 6)
    assert_same(theirs, ours, 2e-2 if scalar is SCALARS["int"] else 2e-4)  # an int's hundreds cost float32 digits


def exact_shapley(value, n_features):
    """Shapley's definition: the mean marginal contribution over all orders, written out."""
    shapley = torch.zeros(n_features, dtype=torch.float64)
    for feature in range(n_features):
        others = [other for other in range(n_features) if other != feature]
        for size in range(n_features):
            weight = math.factorial(size) * math.factorial(n_features - size - 1) / math.factorial(n_features)
            for coalition in itertools.combinations(others, size):
                shapley[feature] += weight * (value({*coalition, feature}) - value(set(coalition)))
    return shapley


@pytest.mark.parametrize("sampling", ["captum", "independent"])
def test_kernel_shap_converges_to_the_shapley_values(sampling):
    net, x = smooth_net(), X[:1].double()

    def value(coalition):
        kept = torch.tensor([[feature in coalition for feature in range(6)]])
        return net(x * kept)[0, 2].detach()

    torch.manual_seed(0)
    estimate = KernelShap(net).attribute(x, target=2, n_samples=50_000, sampling=sampling)
    torch.testing.assert_close(estimate[0], exact_shapley(value, 6), atol=5e-3, rtol=0)


@pytest.mark.parametrize("n_samples", [2, 4, 30])
def test_kernel_shap_sums_to_the_difference(n_samples):
    net, x = smooth_net(), X.double()
    attribution = KernelShap(net).attribute(x, baselines=0.3, target=1, n_samples=n_samples)
    gap = (net(x) - net(torch.full_like(x, 0.3)))[:, 1].detach()
    torch.testing.assert_close(attribution.sum(1), gap, atol=1e-12, rtol=0)


def test_kernel_shap_in_float32_is_close_to_float64():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    x = torch.randn(3, 64)
    torch.manual_seed(1)
    single = KernelShap(net).attribute(x, target=1, n_samples=80)
    torch.manual_seed(1)
    exact = KernelShap(net.double()).attribute(x.double(), target=1, n_samples=80)
    assert float((single - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize(
    "arguments", [{}, {"sampling": "independent"}, {"sampling": "independent", "share_masks": True}]
)
@pytest.mark.parametrize("n_samples", [1, 2, 5, 40])
def test_kernel_shap_gradient_equals_finite_differences(arguments, n_samples):
    net, x = smooth_net(), X.double()
    weights = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss():
        torch.manual_seed(2)
        attribution = KernelShap(net).attribute(
            x, baselines=0.2, target=[0, 1, 2, 0], n_samples=n_samples, create_graph=True, **arguments
        )
        return (attribution * weights).sum() + attribution.square().sum() + net(x).square().mean()

    assert gradient_error(loss, net) < 1e-5


def test_kernel_shap_with_share_masks_equals_single_examples():
    def draw(x):
        generator = torch.Generator().manual_seed(0)
        return KernelShap(smooth_net()).attribute(
            x.double(), target=1, sampling="independent", share_masks=True, generator=generator, n_samples=50
        )

    torch.testing.assert_close(draw(X), torch.cat([draw(x[None]) for x in X]))


def test_kernel_shap_is_a_subclass_of_captums_and_of_lime():
    explainer = KernelShap(smooth_net())
    assert isinstance(explainer, captum.attr.KernelShap)
    assert isinstance(explainer, Lime)


def test_kernel_shap_shows_progress(capsys):
    KernelShap(smooth_net().float()).attribute(X, target=0, n_samples=9, perturbations_per_eval=2, show_progress=True)
    assert "Kernel Shap attribution: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", KERNEL_SHAP_SAMPLINGS)
def test_kernel_shap_gives_a_single_feature_the_whole_difference(sampling):
    net, x = smooth_net(1), X[:, :1].double()
    expected = (net(x) - net(torch.full_like(x, 0.3)))[:, 1:2].detach()
    torch.testing.assert_close(KernelShap(net).attribute(x, 0.3, target=1, sampling=sampling), expected)


@pytest.mark.parametrize("sampling", KERNEL_SHAP_SAMPLINGS[1:])
@pytest.mark.parametrize("share_masks", [False, True])
@pytest.mark.parametrize("bayesian", [False, True])
def test_kernel_shap_is_exact_when_samples_cover_all_coalitions(sampling, share_masks, bayesian):
    net, x, rows = smooth_net(), X[:3].double(), []

    def forward(x):
        rows.append(x)
        return net(x)

    regression = BayesianShapleyRegression() if bayesian else None
    explainer = KernelShap(forward, interpretable_model=regression)
    mask = torch.tensor([[7, 7, 2, 2, -1, -1]])
    arguments = {"target": 1, "feature_mask": mask, "sampling": sampling, "share_masks": share_masks}
    values = explainer.attribute(x, 0.3, n_samples=8, **arguments)
    torch.testing.assert_close(values, ShapleyValues(net).attribute(x, 0.3, target=1, feature_mask=mask))
    assert len(torch.cat(rows[2:])) == 3 * 8
    torch.testing.assert_close(values, explainer.attribute(x, 0.3, n_samples=1000, **arguments))


def test_kernel_shap_accepts_a_different_feature_mask_for_each_example():
    """Each has its own number of features; those that it does not have get 0, alone and in any batch."""
    net, x = smooth_net(), X.double()
    mask = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 5, 5, 5], [-3, 2, 2, 2, 2, -3], [4, 4, 4, 4, 4, 4]])
    arguments = {"target": [0, 1, 2, 1], "n_samples": 8, "sampling": "independent"}
    explainer = KernelShap(net)
    values = explainer.attribute(x, 0.3, feature_mask=mask, **arguments)
    columns = explainer.attribute(x, 0.3, feature_mask=mask, return_input_shape=False, **arguments)
    assert columns.shape == (4, 6)  # -3, 0, 1, 2, 4, 5
    assert (columns != 0).tolist() == [
        [False, True, True, True, False, False],
        [False, True, False, False, False, True],
        [True, False, False, True, False, False],
        [False, False, False, False, True, False],
    ]
    for b, target in enumerate(arguments["target"]):
        alone = ShapleyValues(net).attribute(x[b : b + 1], 0.3, target=target, feature_mask=mask[b : b + 1])
        torch.testing.assert_close(values[b : b + 1], alone)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kernel_shap_with_create_graph_but_grad_disabled_is_an_error(mode):
    with mode(), pytest.raises(RuntimeError, match=r"KernelShap.*enable_grad"):
        KernelShap(smooth_net()).attribute(X.double(), target=1, create_graph=True)
