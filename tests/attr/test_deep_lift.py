"""DeepLIFT where its quotients have no value, and where Captum's own answer depends on the batch."""

from __future__ import annotations

import warnings

import captum.attr
import pytest
import torch
from torch import nn

from captum_idexpo.attr import (
    Deconvolution,
    DeepLift,
    DeepLiftShap,
    GuidedBackprop,
    LayerDeepLift,
    LayerDeepLiftShap,
    NeuronDeepLift,
)
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import IMAGES, pool_net, relu_net

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


@pytest.mark.parametrize("make", [pool_net, relu_net])
def test_deep_lift_of_an_input_equal_to_its_baseline_has_no_nan(make):
    model, baselines = make(), IMAGES.clone()
    baselines[1:] += 0.5
    attribution = DeepLift(model).attribute(IMAGES, baselines, target=1, create_graph=True)
    gradients = torch.autograd.grad(attribution.square().sum(), list(model.parameters()), allow_unused=True)
    assert attribution[0].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    theirs = captum.attr.DeepLift(model).attribute(IMAGES, baselines, target=1)
    torch.testing.assert_close(attribution, theirs)


def test_deep_lift_gradient_is_correct_where_all_inputs_equal_baselines():
    """The multipliers are the gradient there, and its gradient is that of the gradient."""
    model = pool_net()
    model.pool = nn.AvgPool2d(2)
    explainer = DeepLift(model, multiply_by_inputs=False)
    assert_trainable(lambda: explainer.attribute(IMAGES, IMAGES.clone(), target=1, create_graph=True), model)


def test_deep_lift_of_an_example_does_not_depend_on_the_batch():
    """Captum takes the first example's gradient for all where a pool's input equals its baseline."""
    model, baselines = pool_net(), torch.zeros_like(IMAGES)
    x = IMAGES.clone()
    x[:, :, :, :3] = 0
    together = DeepLift(model, multiply_by_inputs=False).attribute(x, baselines, target=1)
    alone = [
        DeepLift(model, multiply_by_inputs=False).attribute(x[i : i + 1], baselines[i : i + 1], target=1)
        for i in range(len(x))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    theirs = captum.attr.DeepLift(model, multiply_by_inputs=False).attribute(x, baselines, target=1)
    torch.testing.assert_close(together[0], theirs[0])
    assert not torch.allclose(together[1:], theirs[1:])


def test_deep_lift_refuses_a_module_used_twice():
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"Tanh\(\) is used more than once.*of its own"):
        DeepLift(model).attribute(torch.randn(5, 3), target=1)
    assert not act._forward_hooks
    assert not hasattr(act, "input")


def test_deep_lift_convergence_delta_is_detached():
    model = pool_net()
    attribution, delta = DeepLift(model).attribute(IMAGES, target=1, return_convergence_delta=True, create_graph=True)
    assert attribution.requires_grad
    assert not delta.requires_grad
    torch.testing.assert_close(delta, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_deep_lift_shap_accepts_custom_functions_and_callable_baselines():
    model = pool_net()

    def squared(multipliers, inputs, baselines):
        return tuple(m * (x - b).square() for m, x, b in zip(multipliers, inputs, baselines, strict=True))

    arguments = {"target": 1, "custom_attribution_func": squared}
    theirs = captum.attr.DeepLiftShap(model).attribute(IMAGES, lambda: IMAGES[:3] + 1, **arguments)
    ours = DeepLiftShap(model).attribute(IMAGES, lambda: IMAGES[:3] + 1, create_graph=True, **arguments)
    torch.testing.assert_close(ours, theirs)


SERIES = torch.randn(3, 2, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
PAIRS = {
    "ReLU, MaxPool": lambda: [nn.ReLU(), nn.MaxPool1d(2)],
    "MaxPool, ReLU": lambda: [nn.MaxPool1d(2), nn.ReLU(inplace=True)],
    "Tanh, Sigmoid": lambda: [nn.Tanh(), nn.Sigmoid()],
    "MaxPool, MaxPool": lambda: [nn.MaxPool1d(2), nn.MaxPool1d(2)],
    "ReLU, Identity, MaxPool": lambda: [nn.ReLU(), nn.Identity(), nn.MaxPool1d(2)],
    "ELU, Dropout, Tanh": lambda: [nn.ELU(), nn.Dropout(), nn.Tanh()],
    "overlapping": lambda: [nn.Tanh(), nn.MaxPool1d(3, stride=1, padding=1)],
    "dilated": lambda: [nn.MaxPool1d(2, dilation=2, ceil_mode=True)],
}


def pair_net(pair):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 3), *PAIRS[pair](), nn.Flatten(), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))
    net(torch.randn(1, 2, 17))
    return net.double().eval()


def sums(attribution):
    return attribution.flatten(1).sum(dim=1)


@pytest.mark.parametrize("pair", PAIRS)
def test_deep_lift_adds_up_through_consecutive_modules(pair):
    net, baselines = pair_net(pair), torch.zeros(1, 2, 17, dtype=torch.float64)
    gap = (net(SERIES) - net(baselines))[:, 1].detach()
    for attribution in (
        DeepLift(net).attribute(SERIES, target=1),
        LayerDeepLift(net, net[0]).attribute(SERIES, target=1),
        LayerDeepLift(net, net[1]).attribute(SERIES, target=1, attribute_to_layer_input=True),
    ):
        torch.testing.assert_close(sums(attribution), gap, rtol=0, atol=1e-14)
    neuron = NeuronDeepLift(net, net[-3]).attribute(SERIES, neuron_selector=2)
    gap_of_neuron = (net[:-2](SERIES) - net[:-2](baselines))[:, 2].detach()
    torch.testing.assert_close(sums(neuron), gap_of_neuron, rtol=0, atol=1e-14)
    several = torch.randn(4, 2, 17, dtype=torch.float64)
    mean_gap = (net(SERIES)[:, 1] - net(several)[:, 1].mean()).detach()
    for attribution in (
        DeepLiftShap(net).attribute(SERIES, several, target=1),
        LayerDeepLiftShap(net, net[0]).attribute(SERIES, several, target=1),
    ):
        torch.testing.assert_close(sums(attribution), mean_gap, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pair", PAIRS)
def test_deep_lift_gradient_through_consecutive_modules_is_correct(pair):
    net = pair_net(pair)
    assert_trainable(lambda: DeepLift(net).attribute(SERIES, target=1, create_graph=True), net, n_directions=2)
    layer = LayerDeepLift(net, net[0])
    assert_trainable(lambda: layer.attribute(SERIES, target=1, create_graph=True), net, n_directions=1)


def test_deep_lift_treats_the_rows_of_a_softmax_separately():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=1), nn.Linear(4, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [5.0], [20.0]])
    with pytest.warns(UserWarning, match="no rule that adds up for Softmax"):
        together = DeepLift(net).attribute(x, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = torch.cat([DeepLift(net).attribute(row[None], target=1) for row in x])
    torch.testing.assert_close(together, alone)


def test_deep_lift_warns_of_a_gap_and_names_modules_without_a_rule():
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"DeepLift miss .* no rule that adds up for GELU, LayerNorm"):
        DeepLift(net).attribute(x, target=1)
    linear, head = nn.Linear(3, 8), nn.Linear(8, 2)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.head = linear, head

        def forward(self, x):
            return self.head(torch.sigmoid(3 * self.linear(x)))

    with pytest.warns(UserWarning, match="no rule that adds up for functions that are no modules"):
        DeepLift(Functional()).attribute(x, target=1)
    ruled = nn.Sequential(linear, nn.BatchNorm1d(8), nn.ReLU(), head).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepLift(ruled).attribute(x, target=1)
        DeepLift(net, multiply_by_inputs=False).attribute(x, target=1)


@pytest.mark.parametrize("explainer", [DeepLiftShap, LayerDeepLiftShap])
@pytest.mark.parametrize("rows", [12, 18, 24, 1000])
def test_deep_lift_shap_internal_batch_size_does_not_change_the_result(explainer, rows):
    net, several = pair_net("ReLU, MaxPool"), torch.randn(7, 2, 17, dtype=torch.float64)
    explainer = explainer(net, net[0]) if explainer is LayerDeepLiftShap else explainer(net)
    arguments = {"target": 1, "baselines": several, "return_convergence_delta": True}
    whole, deltas = explainer.attribute(SERIES, **arguments)
    parts, deltas_of_parts = explainer.attribute(SERIES, **arguments, internal_batch_size=rows)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(deltas_of_parts, deltas, atol=1e-12, rtol=0)
    seen = []
    handle = net[0].register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    assert_trainable(
        lambda: explainer.attribute(SERIES, several, target=1, internal_batch_size=rows, create_graph=True),
        net,
        n_directions=1,
    )
    handle.remove()
    assert max(seen) <= max(rows, 18)  # two or three baselines of three examples
    with pytest.warns(UserWarning, match="12 rows are evaluated at a time"):
        explainer.attribute(SERIES, several, target=1, internal_batch_size=4)


class WritesBack(nn.Module):
    """Operations in place whose effect on the caller's tensor counts."""

    def __init__(self, way, inplace=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second, self.last = (
            nn.Linear(3, 8),
            nn.ReLU(inplace),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
        )
        self.way, self.inplace = way, inplace
        self.double()

    def forward(self, x):
        h = self.first(x)
        if self.way == "residual":  # the input of the activation is used again
            y = self.act(h)
            h = self.second(y) + (h if self.inplace else y)
        if self.way == "ignored":  # what the activation returns is not
            y = self.act(h)
            h = h if self.inplace else y
        if self.way == "part":
            y = self.act(h[:, :4])
            h = h if self.inplace else torch.cat([y, h[:, 4:]], dim=1)
        return self.last(h)


@pytest.mark.parametrize("explainer", [DeepLift, GuidedBackprop, Deconvolution])
@pytest.mark.parametrize("way", ["residual", "ignored", "part"])
def test_in_place_activations_are_explained_like_out_of_place_activations(way, explainer):
    x = torch.randn(4, 3, dtype=torch.float64)
    explained = [explainer(WritesBack(way, inplace)).attribute(x, target=1) for inplace in (True, False)]
    torch.testing.assert_close(*explained)
    model = WritesBack(way)
    assert_trainable(lambda: explainer(model).attribute(x, target=1, create_graph=True), model, n_directions=2)


def test_deep_lift_adds_up_with_an_in_place_operation_behind_a_pool():
    torch.manual_seed(0)
    pool = nn.MaxPool1d(2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.last = nn.Conv1d(2, 3, 3), pool, nn.Linear(3 * 7, 2)

        def forward(self, x):
            h = self.pool(self.conv(x))
            h += 1
            return self.last(h.flatten(1))

    net = Net().double()
    baselines = SERIES.flip(0)
    gap = (net(SERIES) - net(baselines))[:, 1].detach()
    torch.testing.assert_close(sums(DeepLift(net).attribute(SERIES, baselines, target=1)), gap, rtol=0, atol=1e-14)


def test_deep_lift_gap_warning_names_dropout_in_training_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 2)).train()
    with pytest.warns(UserWarning, match="no rule that adds up for Dropout in training mode"):
        DeepLift(net).attribute(torch.randn(4, 3), target=1)


def test_deep_lift_does_not_warn_of_rounding_under_autocast():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepLift(in_single_precision(net)).attribute(torch.randn(8, 3), torch.full((1, 3), 0.1), target=1)


def in_single_precision(net):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).float()

    return Single()
