"""What makes a model faster goes with this package: channels-last, folded BatchNorm, bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.optimization import fuse
from torch.nn.functional import cosine_similarity

from captum_idexpo.attr import (
    FeatureAblation,
    InputXGradient,
    LayerGradCam,
    LayerIntegratedGradients,
    Lime,
    id_expo_lime,
)
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import Insertion, LocalLinearModels, insertion_deletion, point_fidelity
from captum_idexpo.regularizers import InsertionDeletion, RightForTheRightReasons, SaliencyGuided, Smoothness
from tests.helpers import smooth_conv_net


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(3, 2, 6, 6, dtype=dtype), torch.tensor([0, 2, 1])


def gradient(model, explainer, x, y):
    torch.manual_seed(2)
    settings = {"baselines": 0.3, "forward_func": model, "deletion_form": "ratio", "deletion_floor": None}
    if explainer == "lime":
        sampled = {"n_samples": 40, "sampling": "independent"}
        regularizer = InsertionDeletion(
            id_expo_lime(model), feature_mask=lambda x: grid(x, 2), attribute_kwargs=sampled, **settings
        )
    else:
        regularizer = InsertionDeletion(LayerGradCam(model, model[4]), **settings)
    loss = sum(regularizer(x, y).values())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.double().flatten() for g in gradients if g is not None])


def test_channels_last_has_the_same_gradient():
    x, y = batch()
    for explainer in ("lime", "gradcam"):
        expected = gradient(smooth_conv_net(), explainer, x, y)
        model = smooth_conv_net().to(memory_format=torch.channels_last)
        torch.testing.assert_close(gradient(model, explainer, x, y), expected, rtol=1e-10, atol=1e-12)
        x_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(gradient(model, explainer, x_last, y), expected, rtol=1e-10, atol=1e-12)


def test_folded_batch_norm_has_the_same_scores():
    x, y = batch()
    model = smooth_conv_net()
    folded = fuse(copy.deepcopy(model))
    maps = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    for expected, score in zip(*(insertion_deletion(m, x, maps, target=y) for m in (model, folded)), strict=True):
        torch.testing.assert_close(score, expected)
    torch.manual_seed(0)
    expected = Lime(model, Ridge()).attribute(x, target=y, feature_mask=grid(x, 2))
    torch.manual_seed(0)
    torch.testing.assert_close(Lime(folded, Ridge()).attribute(x, target=y, feature_mask=grid(x, 2)), expected)


def test_bfloat16_autocast_affects_the_model_alone():
    """The systems are solved in double precision and attributions come out in float32; the gradient nearly agrees."""
    x, y = batch(torch.float32)
    model = smooth_conv_net().float()
    for explainer in ("lime", "gradcam"):
        expected = gradient(model, explainer, x, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = gradient(model, explainer, x, y)
            attribution = Lime(model, Ridge()).attribute(x, target=y, feature_mask=grid(x, 2), sampling="independent")
        assert attribution.dtype == torch.float32
        assert cosine_similarity(rough, expected, dim=0) > 0.98


def test_autocast_keeps_gradients_after_a_forward_pass_without_a_graph():
    """Autocast keeps the weights that it has cast; older versions of PyTorch those without a graph, too."""
    x, y = batch(torch.float32)
    model = smooth_conv_net().float()
    regularizer = InsertionDeletion(LayerGradCam(model, model[4]), baselines=0.3)

    def flat(rows):
        return model(rows.reshape(-1, *x.shape[1:])).float()

    before = [
        lambda: Lime(model, Ridge()).attribute(x, target=y, n_samples=5),
        lambda: LayerGradCam(model, model[4]).attribute(x, target=y),
        lambda: FeatureAblation(model).attribute(x, target=y),
        lambda: LayerIntegratedGradients(model, model[4]).attribute(x, target=y),
        lambda: insertion_deletion(model, x, torch.randn_like(x), target=y),
        lambda: Insertion(model).update(x, torch.randn_like(x), target=y),
        lambda: point_fidelity(LocalLinearModels(flat), flat, x.flatten(1)),
        lambda: regularizer.scores(x),
    ]

    def plain_gradients():
        return torch.autograd.grad(model(x).float().square().sum(), list(model.parameters()), allow_unused=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain_gradients()
    for call in before:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call()
            for gradient_after, alone in zip(plain_gradients(), expected, strict=True):
                assert gradient_after is not None
                assert torch.equal(gradient_after, alone)


@pytest.mark.parametrize("name", ["right reasons", "smoothness", "saliency-guided"])
def test_autocast_keeps_gradients_after_the_output_check_of_a_regularizer(name):
    x, y = batch(torch.float32)
    model = smooth_conv_net().float()
    explainer = InputXGradient(model)
    annotations = torch.ones_like(x)
    annotations[..., 0] = 0
    make = {
        "right reasons": lambda: RightForTheRightReasons(model, explainer=explainer),
        "smoothness": lambda: Smoothness(explainer),
        "saliency-guided": lambda: SaliencyGuided(model, value_range=(-3, 3)),
    }[name]

    def trained():
        """Which parameters the regularizer moves."""
        torch.manual_seed(3)
        loss = sum(make()(x, y, annotations).values())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [gradient is not None for gradient in gradients]

    expected = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trained() == expected
