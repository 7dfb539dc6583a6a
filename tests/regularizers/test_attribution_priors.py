"""Total variation and the Gini coefficient against their definitions."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo.attr import GradientShap, InputXGradient, LayerGradCam, Saliency
from captum_idexpo.regularizers import Smoothness, Sparsity
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1])
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
LABELS = torch.tensor([0, 2, 1])


def test_smoothness_of_an_image_is_its_total_variation():
    net = smooth_conv_net()
    explainer = Saliency(net)
    map = explainer.attribute(IMAGES, target=LABELS, abs=False)
    expected = 0.0
    for b in range(3):
        for c in range(2):
            for i in range(6):
                for j in range(6):
                    expected += abs(float(map[b, c, i, j] - map[b, c, i - 1, j])) if i else 0.0
                    expected += abs(float(map[b, c, i, j] - map[b, c, i, j - 1])) if j else 0.0
    prior = Smoothness(explainer, attribute_kwargs={"abs": False})
    assert prior(IMAGES, LABELS)["smoothness"].item() == pytest.approx(expected / 3)


def test_smoothness_of_rows_is_the_total_variation_along_the_columns():
    explainer = InputXGradient(smooth_net())
    expected = explainer.attribute(X, target=Y).diff(dim=1).abs().sum(dim=1).mean()
    torch.testing.assert_close(Smoothness(explainer)(X, Y)["smoothness"].detach(), expected)


def test_sparsity_is_one_minus_the_gini_coefficient():
    explainer = InputXGradient(smooth_net())
    importance = explainer.attribute(X, target=Y).abs().mean(dim=0)
    gini = (importance[:, None] - importance).abs().sum() / (2 * 6 * importance.sum())
    torch.testing.assert_close(Sparsity(explainer)(X, Y)["sparsity"].detach(), 1 - gini)


@pytest.mark.parametrize("prior", [Smoothness, Sparsity])
@pytest.mark.parametrize(
    "explainer",
    [
        lambda net: (InputXGradient(net), {}),
        lambda net: (GradientShap(net), {"baselines": X + 1}),
    ],
)
def test_attribution_priors_have_the_true_gradient(prior, explainer):
    net = smooth_net()
    explained, arguments = explainer(net)
    regularizer = prior(explained, attribute_kwargs=arguments)
    assert_trainable(lambda: regularizer(X, Y), net)


@pytest.mark.parametrize("prior", [Smoothness, Sparsity])
def test_attribution_priors_of_a_layer_map_are_trainable(prior):
    net = smooth_conv_net()
    regularizer = prior(LayerGradCam(net, net[6]))
    assert_trainable(lambda: regularizer(IMAGES, LABELS), net)


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_sparsity_of_a_model_that_uses_no_feature_is_one_without_nan():
    net = smooth_net()
    with torch.no_grad():
        net[0].weight.zero_()
    value = Sparsity(InputXGradient(net))(X, Y)["sparsity"]
    value.backward()
    assert value.item() == 1
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())
