"""The checks find what is wrong, with Captum's own attributions among others, and say where."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from captum_idexpo.attr import InputXGradient, LayerIntegratedGradients, Lime, Saliency, ShapleyValues
from captum_idexpo.attr.surrogates import Lasso, Ridge
from captum_idexpo.testing import assert_complete, assert_rows_independent, assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")
X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def create_graph_once(net):
    """Captum's IntegratedGradients as its users mend it: a gradient function that keeps the graph."""
    explainer = captum.attr.IntegratedGradients(net)

    def gradients(forward_fn, inputs, target_ind=None, additional_forward_args=None):
        outputs = forward_fn(*inputs)[range(len(inputs[0])), target_ind]
        return torch.autograd.grad(outputs.sum(), inputs, create_graph=True)

    explainer.gradient_func = gradients
    return explainer


def test_assert_trainable_finds_captum_layer_grad_cam_wrong():
    net = smooth_conv_net()
    with pytest.raises(AssertionError, match=r"wrong in \d+ of \d+ parameters(.|\n)*8\.weight: gets no gradient"):
        assert_trainable(lambda: captum.attr.LayerGradCam(net, net[4]).attribute(IMAGES, target=1), net)


def test_assert_trainable_finds_captum_input_x_gradient_detached():
    net, x = smooth_net(), X.clone().requires_grad_()
    with pytest.raises(AssertionError, match="no graph into the parameters"):
        assert_trainable(lambda: captum.attr.InputXGradient(net).attribute(x, target=1), net)


def test_assert_trainable_finds_captum_layer_conductance_wrong():
    net = smooth_conv_net()
    arguments = {"target": 1, "n_steps": 5, "grad_kwargs": {"create_graph": True}}
    with pytest.raises(AssertionError, match=r"along a random direction, where finite differences give"):
        assert_trainable(lambda: captum.attr.LayerConductance(net, net[4]).attribute(IMAGES, **arguments), net)


def test_assert_trainable_finds_chunked_captum_integrated_gradients_wrong():
    net = smooth_net()
    explainer = create_graph_once(net)
    target = torch.tensor([0, 1, 2, 0])
    assert_trainable(lambda: explainer.attribute(X, target=target, n_steps=6), net)
    with pytest.raises(AssertionError, match=r"wrong in .* parameters"):
        assert_trainable(lambda: explainer.attribute(X, target=target, n_steps=6, internal_batch_size=8), net)


def test_assert_trainable_finds_captum_saliency_without_a_graph():
    net, x = smooth_net(), X.clone().requires_grad_()
    with pytest.raises(AssertionError, match=r"has no graph: .*create_graph=True"):
        assert_trainable(lambda: captum.attr.Saliency(net).attribute(x, target=1), net)


def test_assert_trainable_reports_a_failing_backward_pass():
    net = smooth_net()
    attribution = Saliency(net).attribute(X, target=1, create_graph=True)
    attribution.sum().backward()  # frees the graph, which the next one needs
    with pytest.raises(AssertionError, match="backward pass through the attribution fails"):
        assert_trainable(lambda: attribution, net)


def with_factor(factor):
    """The identity, whose gradient is multiplied."""

    class Multiplied(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    return Multiplied.apply


def test_assert_trainable_finds_a_small_error_in_one_parameter():
    net = smooth_net()

    def tilted():
        bias = net[2].bias
        return torch.tanh(X @ net[0].weight.T) @ net[2].weight.T + with_factor(1.0001)(bias)

    with pytest.raises(AssertionError, match=r"wrong in 1 of 4 parameters(.|\n)*2\.bias.*off by 0\.0001"):
        assert_trainable(lambda: tilted() + 0 * net(X), net)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_assert_trainable_finds_gradients_that_are_not_finite(value):
    net = smooth_net()

    with pytest.raises(AssertionError, match=r"NaN or infinite in \['0\.weight'"):
        assert_trainable(lambda: with_factor(value)(net(X)), net)


def test_assert_trainable_refuses_to_check_nothing():
    net = smooth_net()
    with pytest.raises(AssertionError, match="nothing to check"):
        assert_trainable(lambda: X + 0 * net(X).sum(), net)
    with pytest.raises(AssertionError, match="No parameter of the model requires gradient"):
        assert_trainable(lambda: X, net.requires_grad_(False))
    with pytest.raises(ValueError, match="n_directions must be at least 1"):
        assert_trainable(lambda: X, net.requires_grad_(True), n_directions=0)


def test_assert_trainable_requires_double_precision():
    net = smooth_net().float()
    with pytest.raises(TypeError, match=r"0\.weight is torch\.float32.*model\.double\(\)"):
        assert_trainable(lambda: net(X.float()), net)
    with pytest.raises(TypeError, match=r"the attribution is torch\.float32"):
        assert_trainable(lambda: net(X).float(), net.double())


def test_assert_trainable_seeds_random_attributions_and_restores_all_state():
    net = smooth_net()
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    lime = Lime(net, Ridge(1.0))
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert_trainable(lambda: lime.attribute(X, target=1, n_samples=10, create_graph=True), net)
    assert torch.equal(torch.rand(1), expected[0])
    assert np.random.rand() == expected[1]
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_assert_trainable_accepts_nested_dictionaries_tuples_and_lists():
    net = smooth_net()
    assert_trainable(lambda: {"a": net(X), "b": [(net(X).square(),)]}, net)
    with pytest.raises(TypeError, match="returned no tensor"):
        assert_trainable(lambda: None, net)


def test_assert_trainable_tolerates_a_kink_within_the_larger_step():
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(-1.0)
    x = torch.full((1, 1), 1.0 + 3e-6, dtype=torch.float64)
    assert_trainable(lambda: net(x), net)


def test_assert_trainable_tolerates_the_rounding_of_a_large_loss():
    """A frozen part outweighs what is trained a thousand times."""
    for seed in range(8):
        torch.manual_seed(seed)
        base, adapter = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
        base.requires_grad_(False)

        class Adapted(nn.Module):
            def __init__(self, base, adapter):
                super().__init__()
                self.base, self.adapter = base, adapter

            def forward(self, x):
                return 100 * self.base(x / 100) + 0.01 * self.adapter(x / 100)

        model, x = Adapted(base, adapter), 100 * torch.randn(5, 6, dtype=torch.float64)
        assert_trainable(
            lambda model=model, x=x: InputXGradient(model).attribute(x, target=1, create_graph=True), model
        )


def test_assert_trainable_reports_loose_solvers_and_restores_buffers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = 255 * torch.rand(8, 6, dtype=torch.float64), torch.randint(3, (8,))

    def lime(surrogate):
        return lambda: Lime(net, surrogate).attribute(x, target=y, n_samples=50, create_graph=True)

    with pytest.raises(AssertionError, match=r"pass Lasso\(tol=1e-12\)"):
        assert_trainable(lime(None), net)
    assert_trainable(lime(Lasso(tol=1e-12)), net)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    before = [buffer.clone() for buffer in model.buffers()]
    assert_trainable(lambda: InputXGradient(model).attribute(x, target=1, create_graph=True), model)
    for buffer, kept in zip(model.buffers(), before, strict=True):
        assert torch.equal(buffer, kept)


def test_assert_complete_finds_attributions_that_do_not_add_up():
    net = smooth_net()

    def explained(x):
        return net(x)[:, 1]

    exact = ShapleyValues(net)
    assert_complete(lambda: exact.attribute(X, 0.3, target=1), explained, X, 0.3)
    assert_complete(lambda: exact.attribute(X, X[:1], target=1), explained, X, X[:1])
    with pytest.raises(AssertionError, match=r"4 of 4 examples do not add up.*sum is"):
        assert_complete(lambda: exact.attribute(X, 0.3, target=1), explained, X)
    values = exact.attribute(X, target=1)
    values[2, 0] += 1e-3
    with pytest.raises(AssertionError, match=r"1 of 4 examples.*worst is example 2"):
        assert_complete(lambda: values, explained, X)
    values[2, 0] = torch.nan
    with pytest.raises(AssertionError, match="sum is nan"):
        assert_complete(lambda: values, explained, X)


def test_assert_complete_accepts_layers_and_tuples():
    net = smooth_conv_net()
    layers = LayerIntegratedGradients(net, net[4])
    assert_complete(lambda: layers.attribute(IMAGES, target=1, n_steps=200), lambda x: net(x)[:, 1], IMAGES, rtol=1e-4)

    def forward(a, b):
        return (a.square().sum(1) * b.sum(1))[:, None]

    inputs, baselines = (X[:, :3], X[:, 3:]), (0.5, X[:1, 3:])
    assert_complete(lambda: ShapleyValues(forward).attribute(inputs, baselines, target=0), forward, inputs, baselines)


def test_assert_complete_refuses_outputs_of_the_wrong_shape():
    net = smooth_net()
    with pytest.raises(ValueError, match=r"one number per example.*given: \(4, 3\)"):
        assert_complete(lambda: X, net, X)
    with pytest.raises(ValueError, match="2 rows and the output 4"):
        assert_complete(lambda: X[:2], lambda x: x.sum(1), X)


def test_assert_rows_independent_finds_rows_that_influence_each_other():
    net = smooth_net()
    assert_rows_independent(net, X)
    assert_rows_independent(lambda x: Saliency(net).attribute(x, target=1), X)
    assert_rows_independent(lambda a, b: (a + b, b), (X, X.flip(0)))
    for forward in (
        lambda x: net(x - x.mean(dim=0)),
        lambda x: net(x / x.abs().max()),
        lambda x: net(x) * torch.arange(len(x))[:, None],
        lambda x: net(x.cumsum(dim=0)),
        lambda x: net(x) + (len(x) % 2),
    ):
        with pytest.raises(AssertionError, match=r"row \d depends on the other rows"):
            assert_rows_independent(forward, X)
    with pytest.raises(ValueError, match="at least two examples"):
        assert_rows_independent(net, X[:1])
    with pytest.raises(ValueError, match="one row per example"):
        assert_rows_independent(lambda x: x.sum(), X)
