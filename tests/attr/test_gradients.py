"""NoiseTunnel and the path integrals: chunks, deltas, and attribution methods that cannot be trained."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from captum_idexpo.attr import (
    FeatureAblation,
    GradientShap,
    IntegratedGradients,
    KernelShap,
    LayerConductance,
    LayerGradientShap,
    Lime,
    NoiseTunnel,
    Saliency,
)
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_net

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(call):
    torch.manual_seed(0)
    np.random.seed(0)
    return call()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, None])
def test_noise_tunnel_in_chunks_equals_captum(size):
    net = smooth_net()
    arguments = {"target": 1, "nt_samples": 5, "nt_samples_batch_size": size, "stdevs": 0.3}
    theirs = seeded(lambda: captum.attr.NoiseTunnel(captum.attr.Saliency(net)).attribute(X, **arguments))
    torch.testing.assert_close(seeded(lambda: NoiseTunnel(Saliency(net)).attribute(X, **arguments)), theirs)


def test_noise_tunnel_drawn_baselines_and_deltas_equal_captum():
    net = smooth_net()
    arguments = {"target": 1, "nt_samples": 5, "nt_samples_batch_size": 2, "draw_baseline_from_distrib": True}
    arguments |= {"baselines": X + 1, "return_convergence_delta": True, "n_steps": 5}
    tunnel = captum.attr.NoiseTunnel(captum.attr.IntegratedGradients(net))
    theirs = seeded(lambda: tunnel.attribute(X, **arguments))
    ours = seeded(lambda: NoiseTunnel(IntegratedGradients(net)).attribute(X, create_graph=True, **arguments))
    torch.testing.assert_close(ours, theirs)
    assert ours[0].requires_grad
    assert not ours[1].requires_grad


@pytest.mark.parametrize("explain", [Lime, KernelShap, FeatureAblation, Saliency])
def test_noise_tunnel_gradient_equals_finite_differences_for_any_method(explain):
    net = smooth_net()
    explainer = explain(net, Ridge(0.1)) if explain is Lime else explain(net)

    def attribution(**more):
        return NoiseTunnel(explainer).attribute(X, target=1, nt_samples=2, nt_samples_batch_size=1, **more)

    torch.testing.assert_close(seeded(lambda: attribution(create_graph=True)).detach(), seeded(lambda: attribution()))
    assert_trainable(lambda: attribution(create_graph=True), net)


def test_noise_tunnel_names_a_method_without_create_graph():
    net = smooth_net()
    with pytest.raises(TypeError, match=r"Saliency has no create_graph.*from captum_idexpo.attr import Saliency"):
        NoiseTunnel(captum.attr.Saliency(net)).attribute(X, target=1, create_graph=True)
    assert not NoiseTunnel(captum.attr.Saliency(net)).attribute(X, target=1).requires_grad


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_left", "riemann_right", "riemann_middle"])
@pytest.mark.parametrize("size", [None, 4, 8, 11, 100])
def test_integrated_gradients_and_conductance_in_chunks_equal_captum(size, method):
    net = smooth_net()
    arguments = {"target": 1, "n_steps": 7, "method": method, "internal_batch_size": size}
    theirs = captum.attr.IntegratedGradients(net).attribute(X, **arguments)
    torch.testing.assert_close(IntegratedGradients(net).attribute(X, **arguments), theirs)
    arguments["internal_batch_size"] = size and max(size, 8)  # the end of one step is the start of the next
    theirs = captum.attr.LayerConductance(net, net[0]).attribute(X, **arguments)
    torch.testing.assert_close(LayerConductance(net, net[0]).attribute(X, **arguments), theirs)


def test_internal_batch_size_too_small_for_the_batch_is_warned_of():
    net = smooth_net()
    whole = IntegratedGradients(net).attribute(X, target=1)
    with pytest.warns(UserWarning, match="internal_batch_size=3 is less than 1 steps of 4 examples"):
        torch.testing.assert_close(IntegratedGradients(net).attribute(X, target=1, internal_batch_size=3), whole)


def test_integrated_gradients_of_a_tuple_with_deltas_equals_captum():
    def forward(a, b, scale):
        return torch.stack([(a * b).sum(1) * scale, a.square().sum(1)], dim=1)

    arguments = {"target": 0, "additional_forward_args": (2.0,), "return_convergence_delta": True}
    theirs = captum.attr.IntegratedGradients(forward).attribute((X, X + 1), **arguments)
    ours = IntegratedGradients(forward).attribute((X, X + 1), **arguments)
    assert isinstance(ours[0], tuple)
    torch.testing.assert_close(ours, theirs)


def test_saliency_of_a_linear_model_has_a_zero_gradient_in_the_bias():
    """Only the bias is trainable, and moves the output but not its slope."""
    model = nn.Linear(6, 3).double()
    model.weight.requires_grad_(False)
    attribution = Saliency(model).attribute(X, target=1, create_graph=True)
    assert torch.equal(torch.autograd.grad(attribution.sum(), model.bias)[0], torch.zeros(3, dtype=torch.float64))


def test_saliency_of_a_frozen_model_has_a_gradient_in_the_inputs():
    """A frozen model is no error where the inputs require gradient."""
    net, x = smooth_net().requires_grad_(False), X.clone().requires_grad_()
    attribution = Saliency(net).attribute(x, target=1, abs=False, create_graph=True)
    (gradient,) = torch.autograd.grad(attribution.square().sum(), x)
    moved = Saliency(net).attribute(X - 1e-4 * gradient, target=1, abs=False)
    assert moved.square().sum() < attribution.square().sum()


def test_gradient_shap_refuses_a_number_as_baselines():
    with pytest.raises(AssertionError, match="baselines must be a distribution"):
        GradientShap(smooth_net()).attribute(X, baselines=0.0, target=1)


def test_saliency_keeps_the_graph_of_a_custom_gradient_func():
    """Captum lets one set it; a graph that it keeps is as good as ours."""
    net = smooth_net()
    explainer = Saliency(net)

    def gradients(forward_func, inputs, target_ind=None, additional_forward_args=None):
        return torch.autograd.grad(forward_func(*inputs)[:, target_ind].sum(), inputs, create_graph=True)

    explainer.gradient_func = gradients
    assert_trainable(lambda: explainer.attribute(X, target=1, create_graph=True), net)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_gradient_shap_internal_batch_size_does_not_change_the_result(rows, layer):
    """Noise and baselines are drawn at once, so that no number of rows changes them."""
    net = smooth_net()
    explainer = LayerGradientShap(net, net[1]) if layer else GradientShap(net)
    arguments = {"baselines": X + 1, "n_samples": 5, "stdevs": 0.1, "target": [0, 1, 2, 0]}
    seen = []
    net[0].register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    whole, deltas = seeded(lambda: explainer.attribute(X, **arguments, return_convergence_delta=True))
    seen.clear()
    parts, deltas_of_parts = seeded(
        lambda: explainer.attribute(X, **arguments, return_convergence_delta=True, internal_batch_size=rows)
    )
    assert max(seen) == min(rows, 20)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(deltas_of_parts, deltas)
    assert_trainable(
        lambda: seeded(lambda: explainer.attribute(X, **arguments, internal_batch_size=rows, create_graph=True)), net
    )


def test_gradient_shap_refuses_an_internal_batch_size_below_one():
    with pytest.raises(ValueError, match="internal_batch_size must be at least 1, given: 0"):
        GradientShap(smooth_net()).attribute(X, X, target=1, internal_batch_size=0)
