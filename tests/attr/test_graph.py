"""Seeing whether a graph reaches anything but the tensors that were made its leaves."""

from __future__ import annotations

import collections
import weakref

import captum.attr
import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import captum_idexpo.attr
from captum_idexpo.attr import (
    FeatureAblation,
    KernelShap,
    LayerConductance,
    LayerIntegratedGradients,
    Lime,
    Saliency,
    ShapleyValueSampling,
)
from captum_idexpo.attr._graph import depends_on_leaf
from captum_idexpo.attr.surrogates import Ridge
from tests.helpers import smooth_net


def test_depends_on_leaf_finds_a_leaf_behind_any_number_of_steps():
    made, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    only_made = (made * 2).exp()
    both = (only_made * weight).sum()
    assert not depends_on_leaf(only_made, except_for=[made])
    assert depends_on_leaf(both, except_for=[made])
    assert depends_on_leaf(only_made, except_for=[])


def test_depends_on_leaf_of_leaves_and_constants():
    weight = torch.ones(2, requires_grad=True)
    assert depends_on_leaf(weight, except_for=[])
    assert not depends_on_leaf(weight, except_for=[weight])
    assert not depends_on_leaf(torch.ones(2), except_for=[])


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inner", ["attribution", "ablation", "gradient"])
def test_create_graph_keeps_constants_of_the_forward_function_constant(inner):
    """An explanation, or a gradient without graph, inside the model: its values are the same in both modes."""
    net = smooth_net()

    def forward(x):
        if inner == "gradient":
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                factor = torch.autograd.grad(net(leaf).sum(), leaf)[0]
        elif inner == "ablation":
            with torch.no_grad():
                factor = FeatureAblation(net).attribute(x, target=0)
        else:
            factor = Saliency(net).attribute(x, target=0)
        return net(x * factor)

    constant = Saliency(forward).attribute(X, target=1)
    torch.testing.assert_close(Saliency(forward).attribute(X, target=1, create_graph=True).detach(), constant)


def test_named_tuples_of_inputs_are_explained_like_tuples():
    pair = collections.namedtuple("pair", "a b")(X[:, :2], X[:, 2:])
    net = smooth_net()
    attribution = Saliency(lambda a, b: net(torch.cat([a, b], dim=1))).attribute(pair, target=1)
    torch.testing.assert_close(torch.cat(attribution, dim=1), Saliency(net).attribute(X, target=1))


def test_layer_conductance_frees_each_chunk_when_no_graph_is_kept():
    net, graphs = smooth_net(), []

    class Tracked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            graphs.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            graphs_alive.append(sum(graph() is not None for graph in graphs))
            return gradient

    graphs_alive = []
    model = torch.nn.Sequential(net[0], net[1], net[2])
    explainer = LayerConductance(lambda x: Tracked.apply(model(x)), model[1])
    explainer.attribute(X, target=1, n_steps=20, internal_batch_size=8)
    assert max(graphs_alive) <= 2


@pytest.mark.filterwarnings("ignore:Input Tensor")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_saliency_of_a_tensor_given_twice_equals_captum(create_graph, requires_grad):
    net = smooth_net()
    x = X.clone().requires_grad_(requires_grad)
    pair = (x, x)

    def forward(a, b):
        return net(a * b.tanh())

    theirs = captum.attr.Saliency(forward).attribute(pair, target=1)
    ours = Saliency(forward).attribute(pair, target=1, create_graph=create_graph)
    torch.testing.assert_close([part.detach() for part in ours], list(theirs))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["Saliency", "InputXGradient", "DeepLift", "IntegratedGradients", "FeatureAblation"])
def test_inference_tensors_are_explained(name, create_graph):
    net = smooth_net()
    with torch.inference_mode():
        x = X.clone()
    explain = getattr(captum_idexpo.attr, name)(net).attribute
    attribution = explain(x, target=1, create_graph=create_graph)
    torch.testing.assert_close(attribution.detach(), explain(X, target=1))
    if create_graph:
        attribution.sum().backward()


@pytest.mark.parametrize(
    "explainer", [Lime, KernelShap, FeatureAblation, ShapleyValueSampling, Saliency, LayerIntegratedGradients]
)
@pytest.mark.parametrize("memory_budget", [None, 1])
def test_cached_parametrized_weights_keep_their_gradient(explainer, memory_budget):
    """`parametrize.cached` keeps what it computed first, also under no_grad."""
    torch.manual_seed(0)
    first = weight_norm(torch.nn.Linear(6, 4))
    net = torch.nn.Sequential(first, torch.nn.Tanh(), weight_norm(torch.nn.Linear(4, 3))).double()
    surrogate = [Ridge(0.1)] if explainer is Lime else [first] if explainer is LayerIntegratedGradients else []
    of_copies = explainer in (Lime, KernelShap)
    if memory_budget and not of_copies:
        pytest.skip("takes no memory_budget")
    more = {"memory_budget": memory_budget} if of_copies else {}

    def gradients():
        torch.manual_seed(0)
        attribution = explainer(net, *surrogate).attribute(X, target=1, create_graph=True, **more)
        return torch.autograd.grad(attribution.square().sum(), list(net.parameters()), allow_unused=True)

    expected = gradients()
    with parametrize.cached():
        torch.testing.assert_close(gradients(), expected)
    with parametrize.cached():
        used = first.weight
        torch.testing.assert_close(gradients(), expected)
        assert first.weight is used
