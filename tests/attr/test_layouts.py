"""Layers whose channels are not second: a transformed map is that of a Grad-CAM written by hand."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from captum_idexpo.attr import (
    GuidedBackprop,
    GuidedGradCam,
    LayerGradCam,
    NoiseTunnel,
    channels_first,
    steps_first,
    tokens_to_map,
)
from captum_idexpo.testing import assert_trainable

IMAGES = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1])


class Tokens(nn.Module):
    """A small vision transformer: a class token, then 4 x 4 patches, of which attention mixes all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(2, 6, 2, stride=2), nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.relu, self.head = nn.ReLU(), nn.Linear(6, 3)
        self.double().eval()

    def forward(self, x):
        patches = self.relu(self.patches(x)).flatten(2).mT
        tokens = self.norm(torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head((tokens + mixed)[:, 0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 5)

    def forward(self, x):  # channels last
        return self.linear(x.movedim(1, -1)).tanh()


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = Block(), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.block(x).square().mean(dim=(1, 2)))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.layer(x).tanh().cumsum(1).tanh().mean(1))


CASES = {
    "tokens": (Tokens, "norm", IMAGES, tokens_to_map(4, 4), lambda t: t[:, 1:].mT.reshape(len(t), 6, 4, 4)),
    "channels last": (ChannelsLast, "block", IMAGES, channels_first, lambda t: t.permute(0, 3, 1, 2)),
    "steps": (Steps, "layer", SERIES, steps_first, lambda t: t.mT),
}


def grad_cam_by_hand(model, layer, x, transform):
    """Grad-CAM of one example after the other, from a hook and autograd."""
    maps = []
    for row, target in zip(x.split(1), Y.tolist(), strict=True):
        seen = []
        handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        output = model(row)[0, target]
        handle.remove()
        (gradient,) = torch.autograd.grad(output, seen[0])
        activation, gradient = transform(seen[0]), transform(gradient)
        weights = gradient.flatten(2).mean(2)
        maps.append(torch.einsum("bc,bc...->b...", weights, activation)[:, None].detach())
    return torch.cat(maps)


@pytest.mark.parametrize("name", CASES)
def test_layer_grad_cam_with_a_reshape_transform_equals_one_written_by_hand(name):
    make, layer, x, transform, by_hand = CASES[name]
    model = make()
    ours = LayerGradCam(model, model.get_submodule(layer), reshape_transform=transform).attribute(x, target=Y)
    expected = grad_cam_by_hand(model, layer, x, by_hand)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert bool((ours != 0).any())


@pytest.mark.parametrize("name", CASES)
def test_layer_grad_cam_with_a_reshape_transform_is_trainable(name):
    make, layer, x, transform, _ = CASES[name]
    model = make()
    explainer = LayerGradCam(model, model.get_submodule(layer), reshape_transform=transform)
    assert_trainable(lambda: explainer.attribute(x, target=Y, create_graph=True), model, n_directions=1)
    several = NoiseTunnel(explainer)
    arguments = {"target": Y, "nt_samples": 2, "stdevs": 0.1}
    assert_trainable(lambda: several.attribute(x, create_graph=True, **arguments), model, n_directions=1)


@pytest.mark.parametrize("options", [{"relu_attributions": True}, {"attr_dim_summation": False}])
def test_layer_grad_cam_options_hold_with_a_reshape_transform(options):
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)).double()
    theirs = captum.attr.LayerGradCam(conv, conv[0]).attribute(IMAGES, target=Y, **options)
    ours = LayerGradCam(conv, conv[0], reshape_transform=lambda tensor: tensor).attribute(IMAGES, target=Y, **options)
    torch.testing.assert_close(ours, theirs)


def test_guided_grad_cam_passes_its_reshape_transform_on():
    model = Tokens()
    ours = GuidedGradCam(model, model.norm, reshape_transform=tokens_to_map(4, 4)).attribute(IMAGES, target=Y)
    map = LayerGradCam(model, model.norm, reshape_transform=tokens_to_map(4, 4)).attribute(
        IMAGES, target=Y, relu_attributions=True
    )
    guided = GuidedBackprop(model).attribute(IMAGES, target=Y)
    torch.testing.assert_close(ours, guided * map.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (tokens_to_map(4, 5), r"tokens_to_map\(4, 5, n_prefix=1\) needs tokens \(B, 21, D\), given: \(3, 17, 6\)"),
        (channels_first, r"channels_first needs a tensor \(B, h, w, C\), given: \(3, 17, 6\)"),
        (lambda tokens: tokens.mean(0), r"must return a tensor \(B, C, h, w\).*3 rows.*\(3, 17, 6\).*\(17, 6\)"),
        (lambda tokens: tokens.flatten(1), r"it returned: \(3, 102\)"),
        (lambda tokens: [tokens], "it returned: list"),
    ],
)
def test_reshape_transform_of_another_size_is_refused(transform, message):
    model = Tokens()
    with pytest.raises(ValueError, match=message):
        LayerGradCam(model, model.norm, reshape_transform=transform).attribute(IMAGES, target=Y)


def test_steps_first_needs_three_axes():
    with pytest.raises(ValueError, match=r"steps_first needs a tensor \(B, T, D\), given: \(3, 2, 8, 8\)"):
        steps_first(IMAGES)


def test_guided_grad_cam_refuses_series_with_a_reshape_transform():
    model = Steps()
    with pytest.raises(ValueError, match=r"last axis of the input.*multiply GuidedBackprop and LayerGradCam"):
        GuidedGradCam(model, model.layer, reshape_transform=steps_first).attribute(SERIES, target=Y)
