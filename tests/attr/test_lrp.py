"""Layer-wise relevance propagation: Captum's numbers, and their true gradient."""

from __future__ import annotations

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from captum.attr._utils.custom_modules import Addition_Module
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, IdentityRule
from torch import nn

import captum_idexpo.attr
from captum_idexpo.attr import LRP, LayerLRP
from captum_idexpo.testing import assert_trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")
X = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = [0, 2, 1]


class Net(nn.Module):
    """Each layer once: convolutions, BatchNorm, pools, activations, and a way around some of them."""

    def __init__(self, way: str = "", inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.act1, self.pool = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(2)
        self.conv2, self.norm, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()
        self.add, self.mean, self.drop = Addition_Module(), nn.AdaptiveAvgPool2d(1), nn.Dropout()
        self.head = nn.Linear(4, 3)
        self.way = way
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x):
        x = self.pool(self.act1(self.conv1(x)))
        y = self.act2(self.norm(self.conv2(x)))
        if self.way == "module":
            y = self.add(x, y)
        if self.way == "functional":
            y = F.relu(x + y)
        return self.head(self.drop(self.mean(y)).flatten(1))


def with_rules(net, rules):
    for name, rule in rules.items():
        net.get_submodule(name).rule = rule()
    return net


RULES = {
    "default": {},
    "gamma": {"conv1": GammaRule, "conv2": GammaRule},
    "alpha beta": {"conv1": Alpha1_Beta0_Rule, "conv2": Alpha1_Beta0_Rule},
    "identity": {"norm": IdentityRule},
    "mixed": {
        "conv1": lambda: GammaRule(0.5, set_bias_to_zero=True),
        "conv2": lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
        "norm": IdentityRule,
        "head": lambda: EpsilonRule(0.1),
    },
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", ["", "module", "functional"])
@pytest.mark.parametrize("rules", RULES)
def test_lrp_equals_captum(rules, way, inplace):
    theirs = captum.attr.LRP(with_rules(Net(way), RULES[rules]))
    expected, expected_delta = theirs.attribute(X.clone(), TARGET, return_convergence_delta=True)
    for create_graph in (False, True):
        net = with_rules(Net(way, inplace), RULES[rules])
        relevance, delta = LRP(net).attribute(X, TARGET, return_convergence_delta=True, create_graph=create_graph)
        torch.testing.assert_close(relevance, expected)
        torch.testing.assert_close(delta, expected_delta)
        assert relevance.requires_grad == create_graph


@pytest.mark.parametrize("of_its_input", [False, True])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("layers", ["conv1", "norm", "head", ["conv2", "mean"]])
def test_layer_lrp_equals_captum(layers, rules, of_its_input):
    if of_its_input and layers == "norm" and rules in ("identity", "mixed"):
        pytest.skip("Captum reads no relevance at the input of a layer with the identity rule")
    results = []
    for package in (captum.attr, captum_idexpo.attr):
        net = with_rules(Net("module"), RULES[rules])
        chosen = [net.get_submodule(name) for name in layers] if isinstance(layers, list) else net.get_submodule(layers)
        explainer = package.LayerLRP(net, chosen)
        if package is captum.attr:
            explainer.device_ids = []
        relevance = explainer.attribute(X.clone(), TARGET, attribute_to_layer_input=of_its_input)
        results.append(relevance if isinstance(relevance, list) else [relevance])
    for mine, theirs in zip(*results[::-1], strict=True):
        theirs = theirs[0] if isinstance(theirs, list) else theirs
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("way", ["", "module", "functional"])
@pytest.mark.parametrize("rules", RULES)
def test_lrp_gradient_equals_finite_differences(rules, way):
    net = with_rules(Net(way, inplace=True), RULES[rules])
    assert_trainable(lambda: LRP(net).attribute(X, TARGET, create_graph=True), net, n_directions=2)
    layer = LayerLRP(net, net.conv2)
    assert_trainable(lambda: layer.attribute(X, TARGET, create_graph=True), net, n_directions=1)


def test_lrp_relevance_adds_up_to_the_output():
    """Without biases nothing is lost on the way from the output to the inputs."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ]
    net, x = nn.Sequential(*layers).double(), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(LRP(net).attribute(x, target=1).sum(dim=1), net(x)[:, 1], atol=1e-6, rtol=0)


def test_lrp_leaves_rules_and_weights_unchanged():
    net = with_rules(Net(), RULES["mixed"])
    rules = {name: net.get_submodule(name).rule for name in RULES["mixed"]}
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    LRP(net).attribute(X, TARGET)
    assert all(net.get_submodule(name).rule is rule for name, rule in rules.items())
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers
    assert not hasattr(net.pool, "rule")
    assert not any(hasattr(module, "activations") for module in net.modules())


class Own(EpsilonRule):
    def _manipulate_weights(self, module, inputs, outputs):
        module.weight.data = module.weight.data.abs()


def test_lrp_accepts_a_custom_rule_without_create_graph():
    net = with_rules(Net(), {"conv1": Own})
    expected = captum.attr.LRP(with_rules(Net(), {"conv1": Own})).attribute(X.clone(), TARGET)
    torch.testing.assert_close(LRP(net).attribute(X, TARGET), expected.detach())
    assert type(net.conv1.rule) is Own
    assert not hasattr(net.pool, "rule")
    with pytest.raises(TypeError, match=r"rule of your own.*Own"):
        LRP(net).attribute(X, TARGET, create_graph=True)


def test_lrp_of_layers_without_a_rule_is_an_error():
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"no rule for GELU.*module\.rule ="):
        LRP(net).attribute(torch.randn(2, 3), target=0)
    with pytest.raises(ValueError, match=r"layer ReLU has no rule.*Linear"):
        LayerLRP(Net(), Net().act1).attribute(X, TARGET)


def test_lrp_refuses_a_layer_used_twice():
    linear = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="used more than once"):
        LRP(nn.Sequential(linear, nn.ReLU(), linear)).attribute(torch.randn(2, 3), target=0)


def test_lrp_leaves_no_hooks():
    net = Net()
    LRP(net).attribute(X, TARGET, create_graph=True).sum().backward()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


STABLE = {name: lambda: EpsilonRule(1.0) for name in ("conv1", "pool", "conv2", "norm", "mean", "head")}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lrp_in_half_precision_is_close_to_double_precision(dtype, create_graph):
    expected = LRP(with_rules(Net(), STABLE)).attribute(X, TARGET)
    net = with_rules(Net(), STABLE).to(dtype)
    found = LRP(net).attribute(X.to(dtype), TARGET, create_graph=create_graph)
    assert found.dtype == dtype
    assert float((found.double() - expected).detach().abs().max()) < 0.15 * float(expected.abs().max())
    layer = Net().to(dtype)
    assert LayerLRP(layer, layer.conv2).attribute(X.to(dtype), TARGET).isfinite().all()


def test_lrp_under_autocast_is_close_to_single_precision():
    net = with_rules(Net(), STABLE).float()
    expected = LRP(net).attribute(X.float(), TARGET)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LRP(net).attribute(X.float(), TARGET, create_graph=True)
    assert float((found - expected).detach().abs().max()) < 0.15 * float(expected.abs().max())


def test_lrp_of_data_parallel_equals_captum():
    net = Net()
    expected = captum.attr.LRP(nn.DataParallel(Net())).attribute(X.clone(), TARGET)
    torch.testing.assert_close(LRP(nn.DataParallel(net)).attribute(X, TARGET), expected.detach())
    with pytest.raises(TypeError, match=r"takes no DataParallel: pass model\.module"):
        LRP(nn.DataParallel(net)).attribute(X, TARGET, create_graph=True)
