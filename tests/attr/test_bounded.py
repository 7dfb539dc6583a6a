"""Attributions that take gradients in bounded memory: what is drawn, what is split, what is refused."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from captum_idexpo import InputError
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo.attr import (
    DeepLiftShap,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum_idexpo.regularizers import InsertionDeletion, Sparsity
from tests.helpers import gradient_error, smooth_conv_net, smooth_net

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0])
IMAGES = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RANDOM = {
    "GradientShap": lambda net: (GradientShap(net), {"baselines": X[:3], "n_samples": 4, "stdevs": 0.1}),
    "NoiseTunnel": lambda net: (NoiseTunnel(Saliency(net)), {"nt_samples": 4, "stdevs": 0.1}),
    "NoiseTunnel in chunks": lambda net: (
        NoiseTunnel(InputXGradient(net)),
        {"nt_samples": 3, "nt_samples_batch_size": 2},
    ),
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())
def test_random_attribution_in_bounded_memory_agrees_with_finite_differences(make):
    """The second pass repeats the random numbers of torch and of NumPy, of which Captum draws baselines."""
    net = smooth_net()

    def loss():
        torch.manual_seed(0)
        np.random.seed(0)
        explainer, arguments = make(net)
        phi = explainer.attribute(X, target=Y, create_graph=True, memory_budget=1.0, **arguments)
        np.random.random(3)  # between the passes
        torch.rand(3)
        return phi.square().sum()

    assert gradient_error(loss, net) < 1e-6


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


def kept_bytes(compute):
    """Bytes of the tensors that a result's graph keeps."""
    alive = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        result = compute()
    gc.collect()
    assert result.requires_grad
    return sum({kept.tensor.untyped_storage().data_ptr(): kept.tensor.nbytes for kept in alive}.values())


@pytest.mark.parametrize("n_examples", [4, 12])
def test_memory_budget_bounds_what_integrated_gradients_keep(n_examples):
    net = smooth_conv_net()
    x, y = IMAGES.repeat(n_examples // 4, 1, 1, 1), torch.arange(n_examples) % 3

    def attribute(budget):
        return IntegratedGradients(net).attribute(x, target=y, n_steps=20, create_graph=True, memory_budget=budget)

    of_weights = sum(parameter.nbytes for parameter in net.parameters())
    whole = kept_bytes(lambda: attribute(None))
    for budget in (1.0, whole):  # half of which is left to other graphs
        assert kept_bytes(lambda budget=budget: attribute(budget)) < 4 * x.nbytes + of_weights < whole / 10


def test_large_budget_keeps_the_whole_graph():
    calls = []
    net = smooth_net()

    def forward(x):
        calls.append(len(x))
        return net(x)

    Saliency(forward).attribute(X, target=Y, create_graph=True, memory_budget=1e9).sum().backward()
    whole = len(calls)
    calls.clear()
    Saliency(forward).attribute(X, target=Y, create_graph=True, memory_budget=1.0).sum().backward()
    assert whole < len(calls)
    assert calls[-len(X) :] == [1] * len(X)  # the second pass


class WithSide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = smooth_net()

    def forward(self, x, scale, power):
        return self.net(x * scale) ** power


def test_arguments_of_examples_go_with_their_examples():
    model, scale = WithSide(), torch.linspace(1, 2, 5, dtype=torch.float64)[:, None]
    arguments = {"additional_forward_args": (scale, 2), "baselines": 0.1 * X, "n_steps": 8}
    found = []
    for target in (Y, Y.tolist()):
        for budget in (None, 1.0):
            phi = IntegratedGradients(model).attribute(
                X, target=target, create_graph=True, memory_budget=budget, **arguments
            )
            found.append([phi, *torch.autograd.grad(phi.square().sum(), list(model.parameters()))])
    for other in found[1:]:
        for ours, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, expected)


def test_inputs_that_require_gradient_get_it():
    net = smooth_net()
    gradients = []
    for budget in (None, 1.0):
        x = X.clone().requires_grad_()
        phi = InputXGradient(net).attribute(x, target=Y, create_graph=True, memory_budget=budget)
        gradients.append(torch.autograd.grad(phi.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_token_ids_have_an_attribution_in_bounded_memory():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    ids, gradients = torch.randint(9, (5, 3)), []
    for budget in (None, 1.0):
        phi = LayerIntegratedGradients(net, net[0]).attribute(
            ids, baselines=torch.zeros_like(ids), target=Y, n_steps=8, create_graph=True, memory_budget=budget
        )
        gradients.append(torch.autograd.grad(phi.square().sum(), [net[0].weight, net[3].weight]))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_regularizer_shares_its_budget_with_an_explainer_that_takes_gradients():
    net = smooth_conv_net()
    losses = []
    for budget in (None, 1.0):
        regularizer = InsertionDeletion(
            LayerGradCam(net, net[4]),
            baselines=0.0,
            step_size=6,
            memory_budget=budget,
            generator=torch.Generator().manual_seed(0),
        )
        terms = regularizer(IMAGES, Y[:4])
        losses.append(torch.autograd.grad(sum(terms.values()), list(net.parameters())))
    for ours, expected in zip(*losses, strict=True):
        torch.testing.assert_close(ours, expected)
    of_outputs = NoiseTunnel(Occlusion(net))  # takes none
    windows = {"sliding_window_shapes": (2, 3, 3)}
    InsertionDeletion(of_outputs, baselines=0.0, memory_budget=1e9, step_size=6, attribute_kwargs=windows)(
        IMAGES, Y[:4]
    )
    bounded = Sparsity(IntegratedGradients(net), attribute_kwargs={"memory_budget": 1.0, "n_steps": 5})
    bounded(IMAGES, Y[:4])["sparsity"].backward()


def test_without_a_graph_nothing_is_computed_twice():
    calls = []
    net = smooth_net()

    def forward(x):
        calls.append(len(x))
        return net(x)

    Saliency(forward).attribute(X, target=Y, memory_budget=1.0)
    assert calls == [5]


def test_noise_tunnel_hands_the_budget_on_to_a_method_of_outputs():
    net = smooth_net()
    arguments = {"target": Y, "nt_samples": 2, "n_samples": 20, "create_graph": True}
    gradients = []
    for budget in (None, 1.0):
        torch.manual_seed(0)
        phi = NoiseTunnel(KernelShap(net)).attribute(X, memory_budget=budget, **arguments)
        gradients.append(torch.autograd.grad(phi.square().sum(), list(net.parameters())))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(TypeError, match="memory_budget"):
        NoiseTunnel(Occlusion(net)).attribute(X, target=Y, sliding_window_shapes=(2,), memory_budget=1.0)


def test_budget_that_cannot_be_kept_is_refused():
    net = smooth_net()
    budget = {"create_graph": True, "memory_budget": 1.0}
    with pytest.raises(InputError, match="no convergence delta"):
        IntegratedGradients(net).attribute(X, target=Y, return_convergence_delta=True, **budget)
    with pytest.raises(InputError, match="one row of outputs for each example"):
        Saliency(lambda x: net(x).sum()).attribute(X, **budget)
    with pytest.raises(InputError, match=r"influence each other in a forward pass: leave memory_budget out"):
        Saliency(lambda x: net(x - x.mean(0))).attribute(X, target=Y, **budget)
    with pytest.raises(InputError, match=r"BatchNorm in training mode mixes them: call model\.eval\(\)"):
        Saliency(smooth_conv_net().train()).attribute(IMAGES, target=Y[:4], **budget)
    positions = WithPositions()
    with pytest.raises(InputError, match="one row for each example"):
        LayerGradientXActivation(positions, positions.positions).attribute(X, target=Y, **budget)
    with pytest.raises(ValueError, match="memory_budget must be a positive number"):
        Saliency(net).attribute(X, target=Y, memory_budget=0.0)
    phi = NeuronGradient(net, net[0]).attribute(X, neuron_selector=1, **budget)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(phi.sum(), list(net.parameters()), create_graph=True, allow_unused=True)


def test_distribution_as_long_as_the_batch_is_not_taken_apart():
    explainer = DeepLiftShap(smooth_net())
    arguments = {"baselines": 0.5 * X, "target": Y, "create_graph": True}
    whole, bounded = (explainer.attribute(X, memory_budget=budget, **arguments) for budget in (None, 1.0))
    torch.testing.assert_close(bounded, whole)


def test_baselines_that_are_drawn_from_a_distribution_are_not_those_of_the_examples():
    linear = nn.Linear(6, 3).double()
    torch.manual_seed(0)
    phi = NoiseTunnel(IntegratedGradients(linear)).attribute(
        X,
        baselines=10.0 * X,
        draw_baseline_from_distrib=True,
        nt_samples=1,
        stdevs=0.0,
        target=Y,
        create_graph=True,
        memory_budget=1.0,
    )
    drawn = X - phi.detach() / linear.weight[Y].detach()
    assert all(any(torch.allclose(row, baseline) for baseline in 10.0 * X) for row in drawn)
    assert not torch.allclose(drawn, 10.0 * X)


def test_distribution_that_is_made_of_the_inputs_is_made_of_all():
    net = smooth_net()
    for explainer, arguments in ((GradientShap(net), {"n_samples": 1, "stdevs": 0.0}), (DeepLiftShap(net), {})):
        torch.manual_seed(0)
        np.random.seed(0)
        phi = explainer.attribute(
            X, baselines=lambda x: x.clone(), target=Y, create_graph=True, memory_budget=1.0, **arguments
        )
        assert phi.abs().amax() > 1e-3  # an example alone would be its own baseline


def test_tensor_that_is_passed_twice_has_the_gradient_of_both_uses():
    net = smooth_net()
    results = []
    for budget in (None, 1.0):
        phi, _ = InputXGradient(lambda a, b: net(a * b)).attribute(
            (X, X), target=Y, create_graph=True, memory_budget=budget
        )
        results.append([phi, *torch.autograd.grad(phi.square().sum(), [net[0].weight, net[2].weight])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_look_leaves_random_streams_alone():
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    values = []
    for budget in (None, 1e9):
        torch.manual_seed(0)
        values.append(Saliency(net).attribute(X, target=Y, create_graph=True, memory_budget=budget))
    torch.testing.assert_close(*values)


class WithPositions(nn.Module):
    """A layer whose output has no axis of examples."""

    def __init__(self):
        super().__init__()
        self.positions, self.net = nn.Embedding(1, 6), smooth_net()
        self.double()

    def forward(self, x):
        return self.net(x + self.positions(torch.zeros(1, dtype=torch.long)))


def test_one_budget_serves_several_attributions():
    net = smooth_net()
    budget = MemoryBudget(1e9)
    phi = Saliency(net).attribute(X, target=Y, create_graph=True, memory_budget=budget)
    psi = IntegratedGradients(net).attribute(X, target=Y, create_graph=True, memory_budget=budget)
    (phi + psi).sum().backward()
    assert budget._left < 1e9
