"""Parts of a model that are computed again in the backward pass: what would be another gradient is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_idexpo import attr
from captum_idexpo._core.modes import depends_on_mode, eval_mode, refused_inside_checkpoints
from captum_idexpo.attr import Lime
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, SaliencyGuided, Sparsity
from captum_idexpo.testing import assert_trainable

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


class Checkpointed(nn.Module):
    """Of three parts the second is computed again, unless ``reentrant`` is None."""

    def __init__(self, middle: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.second = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 6))
        self.again = {} if reentrant is None else {"use_reentrant": reentrant}
        self.double()

    def forward(self, x):
        hidden = self.first(x)
        return self.last(checkpoint(self.second, hidden, **self.again) if self.again else self.second(hidden))


def gradient(model, make, **settings):
    torch.manual_seed(1)
    sum(make(model, **settings)(X, Y).values()).backward()
    return [parameter.grad for parameter in model.parameters()]


MAKE = {
    "fidelity": Fidelity,
    "lime": lambda model, **more: InsertionDeletion(
        Lime(model, Ridge(0.1)), baselines=0.0, attribute_kwargs={"n_samples": 20}, **more
    ),
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=list(MAKE))


@each
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("middle", [nn.Dropout(0.3), nn.BatchNorm1d(8)])
def test_eval_mode_refuses_checkpointed_parts_that_depend_on_the_mode(make, middle, reentrant):
    model = Checkpointed(middle, reentrant)
    with pytest.raises(RuntimeError, match=r"is run by torch\.utils\.checkpoint.*`if self.training`.*eval_mode=False"):
        make(model)(X, Y)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@each
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("middle", "training", "settings"),
    [
        (nn.Dropout(0.3), True, {"eval_mode": False}),
        (nn.Dropout(0.3), False, {}),
        (nn.BatchNorm1d(8), False, {}),
        (nn.Dropout(0.0), True, {}),
        (nn.LayerNorm(8), True, {}),
    ],
)
def test_eval_mode_accepts_checkpointed_parts_that_recompute_the_same(make, reentrant, middle, training, settings):
    plain = gradient(Checkpointed(middle, None).train(training), make, **settings)
    ours = gradient(Checkpointed(middle, reentrant).train(training), make, **settings)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_memory_budget_with_a_checkpointed_part_gives_the_same_gradient():
    gradients = []
    for reentrant in (None, False):
        model = Checkpointed(nn.Dropout(0.3), reentrant).eval()
        torch.manual_seed(1)
        lime = Lime(model, Ridge(0.1))
        attribution = lime.attribute(X, target=1, n_samples=20, create_graph=True, memory_budget=1.0)
        model.train()
        attribution.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("middle", [nn.Dropout(0.3), nn.BatchNorm1d(8)])
@pytest.mark.parametrize(
    "make",
    [
        lambda model, **more: Sparsity(attr.InputXGradient(model), **more),
        SaliencyGuided,
        lambda model, **more: InsertionDeletion(
            attr.Saliency(model), baselines=0.0, forward_func=lambda x: model(x), **more
        ),
    ],
)
def test_eval_mode_false_accepts_checkpointed_parts(make, middle):
    model = Checkpointed(middle, False)
    sum(make(model, eval_mode=False)(X, Y).values()).backward()


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_eval_mode_accepts_scripted_models(make):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    scripted = make(net)
    torch.manual_seed(0)
    ours = sum(Fidelity(scripted)(X, Y).values())
    torch.manual_seed(0)
    torch.testing.assert_close(ours, sum(Fidelity(net)(X, Y).values()))


def test_eval_mode_accepts_checkpointed_parts_without_a_graph():
    model = Checkpointed(nn.Dropout(0.3), False)
    with torch.no_grad(), eval_mode(model):
        first = model(X)
    torch.testing.assert_close(first, model.eval()(X))


def test_refused_inside_checkpoints_may_allow_the_checkpoint_itself():
    model = Checkpointed(nn.Tanh(), False)
    with refused_inside_checkpoints([model.second], "so.", output_only=True):
        model(X)
        with pytest.raises(RuntimeError, match=r"Sequential is run by .* so"):
            checkpoint(model, X, use_reentrant=False)
    with refused_inside_checkpoints([model.second], "so."), pytest.raises(RuntimeError, match="Sequential is run by"):
        model(X)
    with refused_inside_checkpoints([model.first, model.last, model], "so."):
        model(X)


def test_depends_on_mode_of_each_kind_of_layer():
    class NoDropout(nn.Dropout):
        pass

    depending = [nn.Dropout(), nn.BatchNorm2d(2), nn.InstanceNorm1d(2, track_running_stats=True), nn.RReLU()]
    depending += [nn.MultiheadAttention(4, 2, dropout=0.1), nn.AlphaDropout(0.2)]
    depending += [nn.LSTM(2, 2, 2, dropout=0.1), NoDropout(0.1)]
    not_depending = [nn.Dropout(0), nn.Linear(2, 2), nn.LayerNorm(2), nn.GRU(2, 2), nn.MultiheadAttention(4, 2)]
    not_depending += [nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), NoDropout(0)]
    not_depending += [nn.Sequential(nn.Dropout()), nn.TransformerEncoderLayer(4, 2), Checkpointed(nn.Dropout(), None)]
    assert all(map(depends_on_mode, depending))
    assert not any(map(depends_on_mode, not_depending))


@pytest.mark.parametrize(
    ("explainer", "layer", "arguments"),
    [
        (attr.DeepLift, None, {}),
        (attr.DeepLiftShap, None, {"baselines": X[:2] + 1}),
        (attr.LayerDeepLift, "first", {}),
        (attr.LayerDeepLift, "second.1", {}),
        (attr.GuidedBackprop, None, {}),
        (attr.LayerIntegratedGradients, "first", {"n_steps": 4}),
        (attr.LayerIntegratedGradients, "second", {"n_steps": 4}),
        (attr.LayerGradientXActivation, "second.1", {"attribute_to_layer_input": True}),
        (attr.LayerFeatureAblation, "second", {}),
    ],
)
def test_checkpointed_part_does_not_change_attributions_or_gradients(explainer, layer, arguments):
    def attribute(model, **more):
        layers = [model.get_submodule(layer)] if layer else []
        return explainer(model, *layers).attribute(X, target=1, **arguments, **more)

    plain, model = (Checkpointed(nn.Tanh(), reentrant) for reentrant in (None, False))
    torch.testing.assert_close(attribute(model), attribute(plain))
    assert_trainable(lambda: attribute(model, create_graph=True), model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("explainer", [attr.LayerIntegratedGradients, attr.LayerFeatureAblation])
@pytest.mark.parametrize(("layer", "of_input"), [("second", True), ("second.2", True), ("second.2", False)])
def test_checkpointed_layers_are_refused_where_they_would_be_replaced(explainer, layer, of_input, reentrant):
    def attribution(reentrant, **more):
        model = Checkpointed(nn.Tanh(), reentrant)
        explain = explainer(model, model.get_submodule(layer)).attribute
        return explain(X, target=1, attribute_to_layer_input=of_input, **more)

    with pytest.raises(RuntimeError, match="turn checkpointing off while explaining"):
        attribution(reentrant, create_graph=True)
    if explainer is attr.LayerFeatureAblation:  # without a graph nothing is computed again
        torch.testing.assert_close(attribution(reentrant), attribution(None))
