"""LayerGradCam against Captum's; its second-order gradient, which Captum's default lacks; its errors and traces."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from captum_idexpo.attr import LayerFeatureAblation, LayerFeaturePermutation, LayerGradCam
from tests.helpers import gradient_error, smooth_conv_net, smooth_net

X = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def maps_of(attribution):
    return attribution if isinstance(attribution, tuple) else (attribution,)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("attribute_to_layer_input", [False, True])
@pytest.mark.parametrize("relu_attributions", [False, True])
@pytest.mark.parametrize("attr_dim_summation", [False, True])
@pytest.mark.parametrize("target", [1, [0, 1, 2, 0], torch.tensor([0, 1, 2, 0]), (2,)])
def test_layer_grad_cam_equals_captum(
    create_graph, target, attribute_to_layer_input, relu_attributions, attr_dim_summation
):
    net = smooth_conv_net()
    arguments = {
        "attribute_to_layer_input": attribute_to_layer_input,
        "relu_attributions": relu_attributions,
        "attr_dim_summation": attr_dim_summation,
    }
    theirs = captum.attr.LayerGradCam(net, net[4]).attribute(X, target=target, **arguments)
    ours = LayerGradCam(net, net[4]).attribute(X, target=target, create_graph=create_graph, **arguments)
    assert ours.requires_grad == create_graph
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


class TwoOutputs(nn.Module):
    def forward(self, x):
        return torch.tanh(x), torch.sin(x)


class WithTuple(nn.Module):
    """A layer with two outputs, two inputs and an argument beside them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.split = nn.Conv2d(2, 3, 3), TwoOutputs()
        self.head = nn.Linear(3, 2)

    def forward(self, x, y, scale):
        a, b = self.split(self.conv(x + y))
        return self.head((a * b * scale).mean(dim=(2, 3))).square()


@pytest.mark.parametrize("create_graph", [False, True])
def test_layer_grad_cam_equals_captum_for_tuples(create_graph):
    net = WithTuple().double()
    arguments = {"target": 1, "additional_forward_args": 2.0}
    theirs = captum.attr.LayerGradCam(net, net.split).attribute((X, X + 1), **arguments)
    ours = LayerGradCam(net, net.split).attribute((X, X + 1), create_graph=create_graph, **arguments)
    assert isinstance(ours, tuple)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_layer_grad_cam_equals_captum_for_a_vector_layer():
    net, x = smooth_net(), torch.randn(4, 6, dtype=torch.float64)
    theirs = captum.attr.LayerGradCam(net, net[0]).attribute(x, target=1)
    torch.testing.assert_close(LayerGradCam(net, net[0]).attribute(x, target=1), theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{}, {"relu_attributions": True}, {"attribute_to_layer_input": True}, {"attr_dim_summation": False}]
)
def test_layer_grad_cam_gradient_equals_finite_differences(arguments):
    net = smooth_conv_net()
    weights = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss():
        attribution = LayerGradCam(net, net[4]).attribute(X, target=[0, 1, 2, 0], create_graph=True, **arguments)
        return (attribution * weights).sum() + attribution.square().sum() + net(X).square().mean()

    assert gradient_error(loss, net) < 1e-5


class Attention(nn.Module):
    """Its fused kernel has no double backward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=torch.tanh)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1)).tanh()


def test_layer_grad_cam_gradient_through_attention_is_correct():
    net, x = Attention().double(), torch.randn(2, 5, 4, dtype=torch.float64)

    def loss():
        return LayerGradCam(net, net.embed).attribute(x, target=1, create_graph=True).square().sum()

    assert gradient_error(loss, net) < 1e-5


def test_layer_grad_cam_of_captum_has_a_wrong_gradient():
    """The trap: Captum's map requires grad, but its channel weights are constants. The check above must see that."""
    net = smooth_conv_net()

    def loss():
        return captum.attr.LayerGradCam(net, net[4]).attribute(X, target=1).square().sum()

    assert loss().requires_grad
    assert gradient_error(loss, net) > 0.1


def test_layer_grad_cam_accepts_create_graph_in_grad_kwargs():
    net = smooth_conv_net()
    ours = LayerGradCam(net, net[4]).attribute(X, target=1, grad_kwargs={"create_graph": True})
    assert ours.requires_grad


def test_layer_grad_cam_is_a_subclass_of_captums_class():
    net = smooth_conv_net()
    assert isinstance(LayerGradCam(net, net[4]), captum.attr.LayerGradCam)
    assert hasattr(LayerGradCam.attribute, "__wrapped__")


def hooks_of(net):
    return [hook for m in net.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)]


@pytest.mark.parametrize("attribute_to_layer_input", [False, True])
def test_layer_grad_cam_leaves_no_hooks_and_no_grad(attribute_to_layer_input):
    net = smooth_conv_net()
    explainer = LayerGradCam(net, net[4])
    explainer.attribute(X, target=1, create_graph=True, attribute_to_layer_input=attribute_to_layer_input)
    with pytest.raises(IndexError):
        explainer.attribute(X, target=9, create_graph=True, attribute_to_layer_input=attribute_to_layer_input)
    with pytest.raises(RuntimeError):
        explainer.attribute(X[:, :1], target=1, create_graph=True)
    assert not hooks_of(net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_layer_grad_cam_with_create_graph_but_grad_disabled_is_an_error():
    net = smooth_conv_net()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"no_grad.*enable_grad"):
        LayerGradCam(net, net[4]).attribute(X, target=1, create_graph=True)
    for create_graph in (False, True):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*no_grad"):
            LayerGradCam(net, net[4]).attribute(X, target=1, create_graph=create_graph)


def test_layer_grad_cam_without_create_graph_works_under_no_grad():
    net = smooth_conv_net()
    with torch.no_grad():
        silent = LayerGradCam(net, net[4]).attribute(X, target=1)
    torch.testing.assert_close(silent, LayerGradCam(net, net[4]).attribute(X, target=1))


def test_layer_grad_cam_with_create_graph_of_a_frozen_model_is_an_error():
    net = smooth_conv_net().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"depends on nothing that requires gradient.*requires_grad_"):
        LayerGradCam(net, net[4]).attribute(X, target=1, create_graph=True)


@pytest.mark.parametrize("trainable", [0, 8])
def test_layer_grad_cam_of_a_partly_frozen_model_trains_the_rest(trainable):
    """Before the layer the activations depend on the weights, behind it the channel weights do."""
    net = smooth_conv_net().requires_grad_(False)
    net[trainable].requires_grad_(True)
    LayerGradCam(net, net[4]).attribute(X, target=1, create_graph=True).square().sum().backward()
    assert net[trainable].weight.grad.abs().max() > 0


def test_layer_grad_cam_of_a_frozen_model_has_a_gradient_in_the_inputs():
    net, x = smooth_conv_net().requires_grad_(False), X.clone().requires_grad_()
    attribution = LayerGradCam(net, net[4]).attribute(x, target=1, create_graph=True)
    assert torch.autograd.grad(attribution.square().sum(), x)[0].abs().max() > 0


def test_layer_grad_cam_without_a_target_is_an_error():
    net = smooth_conv_net()
    with pytest.raises(AssertionError, match="target is missing"):
        LayerGradCam(net, net[4]).attribute(X)


@pytest.mark.parametrize("explainer", [LayerFeatureAblation, LayerFeaturePermutation])
def test_layer_ablation_without_a_target_explains_every_output(explainer):
    net = smooth_conv_net()
    rows = [explainer(lambda x, i=i: net(x)[:, i], net[4]) for i in range(3)]
    torch.manual_seed(0)
    every = explainer(net, net[4]).attribute(X)
    for number, single in enumerate(rows):
        torch.manual_seed(0)
        torch.testing.assert_close(every[number::3], single.attribute(X))
