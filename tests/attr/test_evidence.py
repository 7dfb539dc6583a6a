"""Ridge averaged over its strength: against an integral written out, its limits, and its gradient."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo.attr import KernelShap, Lime, MaskSimilarity
from captum_idexpo.attr.coalitions import kernel_shap_masks
from captum_idexpo.attr.sampling import lime_masks
from captum_idexpo.attr.surrogates import (
    BayesianRidge,
    BayesianShapleyRegression,
    LinearRegression,
    Ridge,
    ShapleyRegression,
    averaged_ridge,
)
from tests.helpers import gradient_error, smooth_net

CPU = torch.device("cpu")


def literal_average(x, y, w):
    """One example: a loop over strengths, each with the log density of its Gaussian, the variance profiled out."""
    n, n_features = x.shape
    gram = x.T @ torch.diag(w) @ x
    eigenvalues = torch.linalg.eigvalsh(gram)
    middle = eigenvalues.sum() / (eigenvalues > 1e-9 * eigenvalues.max()).sum()
    logs, fits = [], []
    for exponent in torch.linspace(-6, 3, 37, dtype=torch.float64):
        strength = middle * 10**exponent
        covariance = x @ x.T / strength + torch.diag(1 / w)  # of the outputs, in units of the noise's variance
        variance = y @ torch.linalg.solve(covariance, y) / n
        normal = torch.distributions.MultivariateNormal(torch.zeros(n).double(), variance * covariance)
        logs.append(normal.log_prob(y))
        fits.append(torch.linalg.solve(gram + strength * torch.eye(n_features).double(), x.T @ (w * y)))
    return (torch.stack(logs).softmax(0)[:, None] * torch.stack(fits)).sum(0)


def test_averaged_ridge_weighs_strengths_by_their_likelihood():
    torch.manual_seed(0)
    x, w = torch.randn(3, 20, 4).double(), torch.rand(3, 20).double() + 0.1
    for noise in (0.1, 1.0, 10.0):
        y = x @ torch.randn(4).double() + noise * torch.randn(3, 20).double()
        expected = torch.stack([literal_average(*example) for example in zip(x, y, w, strict=True)])
        torch.testing.assert_close(averaged_ridge(x, y, w), expected, rtol=1e-8, atol=1e-10)
        shared = averaged_ridge(x[:1], y, w[:1])
        expected = torch.stack([literal_average(x[0], example, w[0]) for example in y])
        torch.testing.assert_close(shared, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sampling", ["independent", "paired", "orthogonal"])
@pytest.mark.parametrize("share_masks", [False, True])
def test_bayesian_ridge_gradient_includes_the_choice_of_strength(sampling, share_masks):
    generator = torch.Generator().manual_seed(0)
    masks = lime_masks(sampling, 1 if share_masks else 2, 12, 4, CPU, generator)
    weights = MaskSimilarity().weights(masks.double())
    outputs = torch.randn(2, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: BayesianRidge().solve(masks, v, weights), outputs)
    coalitions, weights = kernel_shap_masks("leverage", 2, 12, 4, CPU, generator)
    assert torch.autograd.gradcheck(lambda v: BayesianShapleyRegression().solve(coalitions, v, weights), outputs)


@pytest.mark.parametrize("sampling", ["captum", "independent", "paired", "orthogonal"])
def test_bayesian_ridge_recovers_the_coefficients_of_a_linear_function(sampling):
    torch.manual_seed(0)
    masks = lime_masks(sampling, 2, 60, 6, CPU, None)
    coefficients = torch.randn(2, 6).double()
    outputs = 3.0 + (masks.double() @ coefficients[..., None]).squeeze(-1)
    weights = torch.rand(2, 60) + 0.5
    # The smallest of the strengths is a millionth of the mean eigenvalue.
    torch.testing.assert_close(BayesianRidge().solve(masks, outputs, weights), coefficients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["captum", "independent", "paired", "orthogonal", "leverage"])
def test_bayesian_surrogates_stop_shrinking_with_many_samples(sampling):
    """As M grows both regressions end where theirs without shrinkage does."""
    net = smooth_net(5)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    distances = []
    for n_samples in (50, 8000):
        torch.manual_seed(2)
        arguments = {"target": 0, "n_samples": n_samples, "sampling": sampling}
        bayesian = KernelShap(net, interpretable_model=BayesianShapleyRegression()).attribute(x, **arguments)
        exact = KernelShap(net).attribute(x, target=0, n_samples=20_000, sampling="leverage")
        torch.testing.assert_close(bayesian.sum(1), exact.sum(1), atol=1e-10, rtol=0)
        distances.append(float((bayesian - exact).norm() / exact.norm()))
        if sampling != "leverage":
            torch.manual_seed(2)
            bayesian = Lime(net, BayesianRidge(), MaskSimilarity()).attribute(x, **arguments)
            torch.manual_seed(2)
            plain = Lime(net, LinearRegression(), MaskSimilarity()).attribute(x, **arguments)
            if n_samples == 8000:
                assert float((bayesian - plain).norm() / plain.norm()) < 0.01
    assert distances[1] < 0.02


@pytest.mark.parametrize("n_features", [1, 2, 3, 7])
@pytest.mark.parametrize("n_samples", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("sampling", ["independent", "orthogonal"])
def test_bayesian_surrogates_give_no_nan_for_any_shape_or_constant_output(n_features, n_samples, sampling):
    masks = lime_masks(sampling, 2, n_samples, n_features, CPU, torch.Generator().manual_seed(0))
    for outputs in (torch.zeros(2, n_samples), torch.full((2, n_samples), 3.0), torch.randn(2, n_samples)):
        outputs = outputs.double().requires_grad_()
        phi = BayesianRidge().solve(masks, outputs, torch.ones(2, n_samples))
        assert phi.shape == (2, n_features)
        assert phi.isfinite().all()
        (gradient,) = torch.autograd.grad(phi.square().sum(), outputs)
        assert gradient.isfinite().all()
        if n_features > 1 and n_samples < 2**n_features:
            coalitions, weights = kernel_shap_masks(sampling, 2, n_samples, n_features, CPU, None)
            weights = torch.ones(2, n_samples) if weights is None else weights
            phi = BayesianShapleyRegression().solve(coalitions, outputs, weights)
            assert phi.isfinite().all()
            (gradient,) = torch.autograd.grad(phi.square().sum(), outputs)
            assert gradient.isfinite().all()


def random_games(n_features, n_games, seed):
    """Functions of the mask: linear, plus interactions of pairs and triples; with their exact Shapley values."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(n_games, n_features, generator=generator).double()
    sets = [torch.randperm(n_features, generator=generator)[: 2 + k % 2] for k in range(40)]
    strengths = 2 * torch.randn(n_games, len(sets), generator=generator).double()
    shapley = linear.clone()
    for k, members in enumerate(sets):
        shapley[:, members] += strengths[:, k, None] / len(members)

    def play(masks):
        products = torch.stack([masks[..., members].double().prod(-1) for members in sets], dim=-1)
        return (masks.double() @ linear[:, :, None]).squeeze(-1) + (products @ strengths[:, :, None]).squeeze(-1)

    return play, shapley


def test_kernel_shap_designs_and_shrinkage_have_less_error_than_captum():
    """The purpose: mean squared error to the Shapley values, at the same number of evaluations."""
    play, shapley = random_games(16, 40, seed=0)
    errors = {}
    for sampling, regression, n_samples in [
        ("captum", ShapleyRegression(), 64),
        ("captum", ShapleyRegression(), 256),
        ("independent", ShapleyRegression(), 64),
        ("paired", ShapleyRegression(), 64),
        ("leverage", ShapleyRegression(), 64),
        ("leverage", BayesianShapleyRegression(), 64),
    ]:
        torch.manual_seed(0)
        generator = None if sampling == "captum" else torch.Generator().manual_seed(0)
        masks, weights = kernel_shap_masks(sampling, 40, n_samples, 16, CPU, generator)
        weights = torch.ones(40, n_samples) if weights is None else weights
        estimate = regression.solve(masks, play(masks), weights)
        errors[sampling, type(regression).__name__, n_samples] = float((estimate - shapley).square().mean())
    plain = errors["captum", "ShapleyRegression", 64]
    four_times_as_many = errors["captum", "ShapleyRegression", 256]
    assert errors["independent", "ShapleyRegression", 64] < plain
    assert errors["paired", "ShapleyRegression", 64] < plain / 2
    assert errors["leverage", "ShapleyRegression", 64] < plain / 2
    assert errors["leverage", "BayesianShapleyRegression", 64] < four_times_as_many


def test_lime_designs_and_shrinkage_reduce_the_error_of_few_samples():
    play, _ = random_games(16, 40, seed=1)

    def attribute(sampling, surrogate, n_samples, seed):
        generator = torch.Generator().manual_seed(seed)
        masks = lime_masks(sampling, 40, n_samples, 16, CPU, generator)
        return surrogate.solve(masks, play(masks), MaskSimilarity().weights(masks))

    limit = attribute("orthogonal", Ridge(1e-6), 40_000, 0)

    def error(*arguments):
        return float((attribute(*arguments, 1) - limit).square().mean())

    plain = error("independent", Ridge(0.01), 40)
    assert error("orthogonal", Ridge(0.01), 40) < plain
    assert error("independent", BayesianRidge(), 40) < plain
    assert error("orthogonal", BayesianRidge(), 40) < plain / 2


@pytest.mark.parametrize("explainer", ["lime", "kernel_shap"])
def test_bayesian_surrogates_gradient_equals_finite_differences(explainer):
    net = smooth_net(5)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = "orthogonal" if explainer == "lime" else "leverage"
    attribution = (
        Lime(net, BayesianRidge(), MaskSimilarity())
        if explainer == "lime"
        else KernelShap(net, interpretable_model=BayesianShapleyRegression())
    )

    def loss():
        torch.manual_seed(0)
        return attribution.attribute(x, target=1, n_samples=14, sampling=sampling, create_graph=True).square().sum()

    assert gradient_error(loss, net) < 1e-5


def test_bayesian_ridge_refuses_a_similarity_with_a_gradient():
    x = torch.randn(1, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient in the similarity's weights"):
        Lime(smooth_net(5).float(), BayesianRidge()).attribute(x, target=0, n_samples=20, create_graph=True)


def test_kernel_shap_refuses_surrogates_without_shapley_values():
    with pytest.raises(TypeError, match="use Lime"):
        KernelShap(smooth_net(), interpretable_model=Ridge())


def test_lime_refuses_leverage_sampling():
    with pytest.raises(ValueError, match=r"one of \('captum', 'independent', 'paired', 'orthogonal'\)"):
        Lime(smooth_net(), Ridge()).attribute(torch.randn(1, 6).double(), target=0, sampling="leverage")


@pytest.mark.parametrize("surrogate", [Ridge(), LinearRegression(), BayesianRidge()])
def test_lime_refuses_a_negative_similarity(surrogate):
    signs = iter([1.0, -0.1] * 50)
    lime = Lime(smooth_net(), surrogate, lambda *_, **__: next(signs))
    with pytest.raises(ValueError, match="negative"):
        lime.attribute(torch.randn(1, 6).double(), target=0, n_samples=20)


def test_bayesian_shapley_regression_shrinks_half_differences_of_pairs():
    """Written out: a pair's half difference, less what equal shares explain of it, with the pair's weight."""
    masks, weights = kernel_shap_masks("leverage", 1, 22, 6, CPU, torch.Generator().manual_seed(0))
    outputs = torch.randn(1, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, v, w = masks[0].double(), outputs[0], weights[0].double()
    total = v[0] - v[1]
    rows, targets = [], []
    for j in range(2, 22, 2):
        difference = (z[j] - z[j + 1]) / 2
        rows.append(difference - difference.mean())
        targets.append((v[j] - v[j + 1]) / 2 - difference.mean() * total)
    expected = total / 6 + literal_average(torch.stack(rows), torch.stack(targets), w[2::2])
    ours = BayesianShapleyRegression().solve(masks, outputs, weights)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    assert w[2::2].unique().numel() > 1
