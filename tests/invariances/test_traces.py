"""What is the user's stays as it was, and whether the model works in place makes no difference."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import captum_idexpo.attr as attr
from captum_idexpo import ExplanationRegularizedLoss
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import (
    Fidelity,
    InsertionDeletion,
    MaskedNeighbors,
    RightForTheRightReasons,
    SaliencyGuided,
    Stability,
)
from tests.invariances.calls import CALLS, assert_same, feature_mask
from tests.invariances.zoo import CONV_NETS, ZOO, conv_net

SPECIMEN = ZOO["ReLU, AvgPool"]
X, Y = SPECIMEN.inputs(4), torch.arange(4) % 3
# The next issue mends what lies in layers: these take gradients of what a following operation in place rewrites.


def relu_net(inplace, first=False):
    """A ReLU also behind the explained layer and, if asked for, before everything."""
    torch.manual_seed(0)
    net = conv_net("ReLU", "AvgPool", inplace=inplace)
    net = nn.Sequential(*([nn.ReLU(inplace)] if first else [nn.Identity()]), *net)
    return net.double().eval()


class InFront(nn.Sequential):
    """Modules under the names that the specimen's own have."""

    def get_submodule(self, target):
        return super().get_submodule(str(int(target) + 1))


def call(name, net, **more):
    return CALLS[name](SPECIMEN, X.clone(), Y, InFront(*net), **more)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_in_place_operations_behind_a_layer_change_nothing(name, create_graph):
    expected = call(name, relu_net(inplace=False), create_graph=create_graph)
    assert_same(call(name, relu_net(inplace=True), create_graph=create_graph), expected)


WRITES = {
    "multiplies": lambda net: lambda x: net(x.mul_(2)),
    "first layer": lambda net: lambda x: net(nn.ReLU(inplace=True)(x)),
    "sets": lambda net: lambda x: net(x.clamp_(max=0.5)),
}
OUTPUTS_ONLY = ["FeatureAblation", "FeaturePermutation", "Occlusion", "ShapleyValueSampling", "ShapleyValues"]
OUTPUTS_ONLY += ["Lime", "KernelShap"]


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("name", OUTPUTS_ONLY)
def test_forward_function_may_write_into_its_input(name, writes):
    net = SPECIMEN.model()
    clean = {
        "multiplies": lambda x: net(2 * x),
        "first layer": lambda x: net(x.relu()),
        "sets": lambda x: net(x.clamp(max=0.5)),
    }[writes]
    for size in (1, 2, 4):
        x = X[:size].clone()
        result = CALLS[name](SPECIMEN, x, Y[:size], WRITES[writes](net), baselines=_Baselines.of(name))
        assert torch.equal(x, X[:size])
        assert_same(result, CALLS[name](SPECIMEN, X[:size], Y[:size], clean, baselines=_Baselines.of(name)))


class _Baselines:
    @staticmethod
    def of(name):
        return None if name == "FeaturePermutation" else SPECIMEN.baselines()


def test_feature_ablation_of_a_function_that_writes_into_its_input():
    x = torch.tensor([[1.0, 2.0]])
    assert attr.FeatureAblation(lambda x: x.mul_(2).sum(1)).attribute(x).tolist() == [[2.0, 4.0]]
    assert x.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_not_changed_by_a_model_that_works_in_place(name):
    net, x = relu_net(inplace=True, first=True), X.clone()
    with suppress(RuntimeError):  # torch's, of a leaf that requires gradient
        CALLS[name](SPECIMEN, x, Y, InFront(*net))
    assert torch.equal(x, X)


def test_metrics_and_losses_allow_a_model_that_writes_into_its_input():
    net = SPECIMEN.model()
    writing = nn.Sequential(nn.ReLU(inplace=True), net).eval()
    clean = nn.Sequential(nn.ReLU(), net).eval()
    phi, mask = SPECIMEN.inputs(4, seed=5), feature_mask(SPECIMEN)

    def results(model):
        x = X.clone()
        torch.manual_seed(0)
        scores = insertion_deletion(model, x, phi, baselines=0.3, target=Y)
        lime = attr.Lime(model, Ridge(0.1))
        found = [scores.insertion, scores.deletion, sensitivity_n(model, x, phi, 3, baselines=0.3, target=Y)]
        regularizers = [
            InsertionDeletion(lime, baselines=0.3, feature_mask=mask),
            Fidelity(model, MaskedNeighbors(0.3, mask)),
            Stability(model),
            InsertionDeletion(attr.LayerGradCam(model, model[1][3]), baselines=0.3),
        ]
        _, parts = ExplanationRegularizedLoss(model, regularizers)((x, Y))
        assert torch.equal(x, X)
        return [*found, *parts.values()]

    assert_same(results(writing), results(clean))


def snapshot(model, inputs):
    """What a call must not change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "inputs": inputs.detach().clone(),
        "requires_grad": inputs.requires_grad,
        "version": inputs._version,
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in (*model.parameters(), inputs)],
        "grad mode": torch.is_grad_enabled(),
        "global hooks": len(nn.modules.module._global_forward_hooks),
        "python": random.getstate(),
        "numpy": [np.copy(part) for part in np.random.get_state()[1:2]],
        "torch": torch.get_rng_state(),
    }


def assert_unchanged(before, after, streams):
    for name, value in before.items():
        if not streams and name in ("python", "numpy", "torch"):
            continue
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=f"{name} has changed")


# These draw from the global generators, as Captum's do.
DRAWS = {name for name, call in CALLS.items() if call.random} | {"ShapleyValueSampling"}
DRAWS |= {"NeuronGradientShap"}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_attribute_leaves_model_inputs_and_random_state_unchanged(name, create_graph, fails, requires_grad):
    specimen = ZOO["BatchNorm"]
    model = specimen.model()
    model[2].train()  # a mixture of modes
    inputs = specimen.inputs(4).requires_grad_(requires_grad)
    model(specimen.inputs(4)).sum().backward()  # .grad of the user's own
    explainer = CALLS[name].build(model, model.get_submodule(specimen.layer))
    arguments = CALLS[name].arguments(specimen, Y)
    if fails:
        arguments = {**arguments, **({"neuron_selector": (9, 9, 9)} if "Neuron" in name else {"target": 9})}
        if name == "LayerActivation":
            arguments = {"additional_forward_args": "too many"}
    before = snapshot(model, inputs)
    try:
        explainer.attribute(inputs, **arguments, create_graph=create_graph)
        assert not fails
    except (IndexError, AssertionError, RuntimeError, TypeError):
        assert fails
    assert_unchanged(before, snapshot(model, inputs), streams=name not in DRAWS)


@pytest.mark.parametrize("fails", [False, True])
def test_metrics_and_regularizers_leave_model_and_inputs_unchanged(fails):
    specimen = ZOO["BatchNorm"]
    model, x, y = specimen.model().train(), specimen.inputs(4), torch.full((4,), 9) if fails else Y
    generator = torch.Generator()
    settings = {"baselines": 0.3, "generator": generator}
    lime = {"sampling": "independent", "n_samples": 9}
    calls = [
        lambda: insertion_deletion(model.eval(), x, x, target=y),
        lambda: sensitivity_n(model.eval(), x, x, 3, target=y, generator=generator),
    ]
    regularizers = [
        InsertionDeletion(attr.LayerGradCam(model, model[3]), **settings),
        InsertionDeletion(
            attr.Lime(model, Ridge()), feature_mask=feature_mask(specimen), attribute_kwargs=lime, **settings
        ),
        Fidelity(model, MaskedNeighbors(0.3, feature_mask(specimen)), generator=generator),
        SaliencyGuided(model, generator=generator),
        RightForTheRightReasons(model, explainer=attr.IntegratedGradients(model)),
    ]
    calls += [lambda r=regularizer: model.train() and r(x, y, (x > 0).double()) for regularizer in regularizers]
    for function in calls:
        model.train()
        before = snapshot(model, x)
        try:
            function()
            assert not fails
        except (IndexError, RuntimeError):
            assert fails
        model.train()
        assert_unchanged(before, snapshot(model, x), streams=True)


def test_calls_cover_every_attribution_class():
    classes = {name for name in attr.__all__ if isinstance(getattr(attr, name), type)}
    classes = {name for name in classes if issubclass(getattr(attr, name), attr.Saliency.__mro__[2])}
    assert classes - {"LimeBase"} <= set(CALLS)
    assert len(CONV_NETS) == 24
