"""The models of today: what they are made of does not stand in the way of the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from captum_idexpo import attr
from captum_idexpo.testing import assert_trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")
G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=G)
TOKENS = torch.randint(1, 20, (3, 7), generator=G)
PAD = torch.zeros_like(TOKENS)
PATCHES = torch.arange(16).reshape(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]


def few_parameters(model, *names):
    """Only some are trained, so that differences in all of a large model need not be taken."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(given) for given in names))
    return model


@pytest.fixture(scope="module")
def resnet():
    """BatchNorm in eval mode and in-place ReLU modules that are used twice each."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return few_parameters(model, "conv1", "bn1", "layer2.0.bn1", "layer4.1.conv2", "fc")


@pytest.mark.parametrize(
    "explainer",
    [
        lambda m: attr.Saliency(m),
        lambda m: attr.Saliency(lambda x: m(x).softmax(dim=1)),
        lambda m: attr.LayerGradCam(m, m.layer3),
        lambda m: attr.GuidedBackprop(m),
    ],
    ids=["Saliency", "of a lambda", "Grad-CAM", "GuidedBackprop"],
)
def test_resnet_gradients_equal_finite_differences(resnet, explainer):
    explained = explainer(resnet)
    assert_trainable(lambda: explained.attribute(IMAGES, target=1, create_graph=True), resnet, n_directions=1)


@pytest.mark.parametrize(
    ("explainer", "arguments"),
    [
        (lambda m: attr.Saliency(m), {}),
        (lambda m: attr.IntegratedGradients(m), {"n_steps": 3}),
        (lambda m: attr.LayerGradientXActivation(m, m.encoder.layers[0]), {}),
        (lambda m: attr.FeatureAblation(m), {"feature_mask": PATCHES}),
    ],
)
def test_vision_transformer_gradients_equal_finite_differences(explainer, arguments):
    """Fused attention has no double backward."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    model = few_parameters(model.double().eval(), "conv_proj", "encoder.layers.encoder_layer_1", "heads")
    explained = explainer(model)
    assert_trainable(
        lambda: explained.attribute(IMAGES, target=1, create_graph=True, **arguments), model, n_directions=1
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 6), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0].mean(1)).tanh()


class Attentive(nn.Module):
    """Attention, in-place ReLU, BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(20, 6), nn.MultiheadAttention(6, 2, 0.1, batch_first=True)
        self.rest = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(7), nn.Dropout(0.3))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.rest(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1)).tanh()


@pytest.mark.parametrize("model_class", [Recurrent, Attentive])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LayerIntegratedGradients", {"baselines": PAD, "n_steps": 4}),
        ("LayerGradientXActivation", {}),
        ("LayerFeatureAblation", {"layer_mask": torch.arange(7)[None, :, None]}),
    ],
)
def test_embedding_attributions_of_text_have_correct_gradients(model_class, name, arguments):
    torch.manual_seed(0)
    model = model_class().double().eval()
    explained = getattr(attr, name)(model, model.embedding)
    assert_trainable(
        lambda: explained.attribute(TOKENS, target=1, create_graph=True, **arguments), model, n_directions=1
    )


def test_recurrent_model_behind_a_lambda_has_a_correct_gradient():
    torch.manual_seed(0)
    model = Recurrent().double().eval()
    explained = attr.LayerGradientXActivation(lambda tokens: model(tokens), model.embedding)
    assert_trainable(lambda: explained.attribute(TOKENS, target=1, create_graph=True), model, n_directions=1)


@pytest.mark.filterwarnings("ignore:The attributions of DeepLift miss")  # through the softmax
def test_deep_lift_of_in_place_modules_has_a_correct_gradient():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()]
    model = nn.Sequential(*layers, nn.Linear(4 * 15 * 15, 3), nn.Softmax(dim=1)).double().eval()
    assert_trainable(lambda: attr.DeepLift(model).attribute(IMAGES, target=1, create_graph=True), model)


def test_saliency_of_a_model_that_takes_gradients_has_a_correct_gradient():
    """An energy's force: the gradient inside the forward function keeps its graph, too."""

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model, x = Force().double(), torch.randn(4, 3, dtype=torch.float64)
    assert_trainable(lambda: attr.Saliency(model).attribute(x, target=1, abs=False, create_graph=True), model)
