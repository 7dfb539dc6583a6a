"""Compiled models: the same loss and gradient, few compilations, and refusals where a second derivative is needed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from captum.attr import Attribution
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer
from captum_idexpo._core.chunks import ROWS_TO_LOOK_AT
from captum_idexpo._core.compiled import can_run_eagerly
from captum_idexpo.attr import (
    FeatureAblation,
    InputXGradient,
    KernelShap,
    LayerFeatureAblation,
    LayerGradCam,
    Lime,
    NeuronFeatureAblation,
    NoiseTunnel,
    Occlusion,
    Saliency,
    ShapleyValues,
)
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import (
    AttributionSupervision,
    Fidelity,
    InsertionDeletion,
    MaskedNeighbors,
    RandomMasking,
    Regularizer,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # hidden by PyTorch, but not where warnings are errors
]
needs_eager_runs = pytest.mark.skipif(not can_run_eagerly(), reason="torch.compiler.set_stance needs PyTorch 2.6")
N, BATCH = 96, 32
X = torch.randn(N, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(0))


def cells(x):
    return grid(x, 2)


def network():
    """With layers that differ between training and eval mode."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    net = nn.Sequential(*features, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3)).double()
    net(X)  # for BatchNorm's statistics
    return net


def insertion_deletion(explainer, **arguments):
    def make(model):
        generator = torch.Generator().manual_seed(0)
        return InsertionDeletion(
            explainer(model),
            baselines=0.0,
            feature_mask=cells,
            steps_per_update=3,
            attribute_kwargs=arguments,
            generator=generator,
        )

    return make


OF_OUTPUTS = {
    "LIME": insertion_deletion(lambda model: Lime(model, Ridge(0.1)), n_samples=20),
    "KernelSHAP": insertion_deletion(KernelShap, n_samples=20),
    "LIME in bounded memory": lambda model: InsertionDeletion(
        Lime(model, Ridge(0.1)),
        baselines=0.0,
        feature_mask=cells,
        memory_budget=2e5,
        attribute_kwargs={"n_samples": 20},
    ),
    "ablation": insertion_deletion(FeatureAblation),
    "Sparsity": lambda model: Sparsity(FeatureAblation(model), attribute_kwargs={"feature_mask": grid(X[:1], 4)}),
    "Fidelity": lambda model: Fidelity(model, MaskedNeighbors(baselines=0.0, feature_mask=cells), n_neighbors=20),
    "Stability": Stability,
    "RandomMasking": lambda model: RandomMasking(model, baselines=0.0),
    "SaliencyGuided": SaliencyGuided,
}


class Compilations:
    """A backend that counts its graphs, and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _inputs):
        self.count += 1
        return graph.forward


@contextmanager
def failing_instead_of_running_eagerly():
    """Raise an error where PyTorch would give up compiling, which it does in silence."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def gradient_of(model, net, make):
    torch.manual_seed(0)
    loss, parts = ExplanationRegularizedLoss(model, [make(model)])((X[:BATCH], Y[:BATCH]))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    return parts, gradients


@needs_eager_runs
@pytest.mark.parametrize("make", OF_OUTPUTS.values(), ids=OF_OUTPUTS.keys())
def test_compiled_model_has_the_loss_and_gradient_of_the_eager_one(make):
    net = network().eval()
    parts, gradients = gradient_of(net, net, make)
    torch._dynamo.reset()
    with failing_instead_of_running_eagerly():
        of_compiled, with_compiled = gradient_of(torch.compile(net, backend=aot_eager), net, make)
    assert any(name != "task" and value != 0 for name, value in parts.items())
    for name, value in parts.items():
        torch.testing.assert_close(of_compiled[name], value)
    for name, gradient in gradients.items():
        torch.testing.assert_close(with_compiled[name], gradient)


@needs_eager_runs
@pytest.mark.parametrize(
    ("name", "dynamic", "most"),
    [("LIME", None, 3), ("LIME", True, 3), ("KernelSHAP", None, 3), ("Fidelity", None, 3), ("ablation", None, 4)],
)
def test_compiled_model_is_compiled_few_times(name, dynamic, most):
    """Once for the task, once for masked copies, once for those that require gradient, and once in validation."""
    torch._dynamo.reset()
    net, compilations, after_updates = network(), Compilations(), []
    model = torch.compile(net, backend=compilations, dynamic=dynamic)
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.SGD(net.parameters(), lr=0.01),
        [OF_OUTPUTS[name](model)],
        update_callbacks=[lambda *_: after_updates.append(compilations.count)],
        show_progress=False,
    )
    loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH)
    with failing_instead_of_running_eagerly():
        trainer.fit(loader, val_loader=loader, epochs=2)
    assert 0 < after_updates[0] <= most
    assert after_updates[0] == after_updates[2]
    assert after_updates[3] == after_updates[-1] == compilations.count <= after_updates[2] + 1


@needs_eager_runs
def test_gradient_norms_of_a_compiled_model_are_those_of_the_eager_one():
    """They keep a graph for several backward passes, which compiled graphs do not allow."""
    torch._dynamo.reset()
    histories = []
    for backend in (None, aot_eager):
        net = network()
        model = net if backend is None else torch.compile(net, backend=backend)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        regularizer = OF_OUTPUTS["KernelSHAP"](model)
        trainer = ExplanationRegularizedTrainer(
            model, optimizer, [regularizer], gradient_norms_every=1, show_progress=False
        )
        histories.append(trainer.fit(DataLoader(TensorDataset(X, Y), batch_size=BATCH))[0])
    names = [name for name in histories[0] if name.endswith("gradient_norm")]
    assert len(names) == 3
    for name in names:
        assert histories[1][name] == pytest.approx(histories[0][name])


@needs_eager_runs
def test_chunks_of_a_compiled_model_have_one_size():
    """Also where neither the examples nor their copies divide by what a pass takes."""
    torch._dynamo.reset()
    net, sizes = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).double(), set()

    class Sized(nn.Module):
        def forward(self, x):
            sizes.add(len(x))
            return net(x)

    def attribution(model, n, at_a_time):
        torch.manual_seed(0)
        return Lime(model).attribute(
            X[:n], target=Y[:n], feature_mask=grid(X[:1], 4), n_samples=10, perturbations_per_eval=at_a_time
        )

    model = torch.nn.Sequential(Sized())
    model.compile(backend="eager")
    for n, at_a_time in ((9, 4), (10, 3)):
        seen = attribution(model, n, at_a_time)
        torch.testing.assert_close(seen, attribution(net, n, at_a_time))
    assert {size for size in sizes if size > ROWS_TO_LOOK_AT} == {36, 30}


REFUSED = {
    "InsertionDeletion": insertion_deletion(Saliency),
    "a layer": lambda model: InsertionDeletion(LayerGradCam(model, model[0]), baselines=0.0),
    "a layer's ablation": lambda model: Sparsity(LayerFeatureAblation(model, model[0])),
    "a neuron's ablation": lambda model: Sparsity(
        NeuronFeatureAblation(model, model[0]), attribute_kwargs={"neuron_selector": 0}
    ),
    "a gradient in noise": lambda model: Smoothness(NoiseTunnel(Saliency(model))),
    "RightForTheRightReasons": RightForTheRightReasons,
}


def trainer_of(model, regularizer):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ExplanationRegularizedTrainer(model, optimizer, [regularizer], show_progress=False)


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_regularizer_that_needs_a_second_derivative_is_refused(make):
    net = network()
    regularizer = make(net)
    assert regularizer.needs_second_derivative
    trainer_of(net, regularizer)
    net.compile(backend="eager")
    with pytest.raises(ValueError, match=f"no second derivative, which {type(regularizer).__name__} needs"):
        trainer_of(net, regularizer)


@pytest.mark.parametrize("explainer", [FeatureAblation, Lime, NoiseTunnel, ShapleyValues])
def test_explainer_that_takes_no_gradients_needs_no_second_derivative(explainer):
    net = network()
    made = NoiseTunnel(Occlusion(net)) if explainer is NoiseTunnel else explainer(net)
    assert isinstance(made, Attribution)
    arguments = {"sliding_window_shapes": (2, 2, 2)} if explainer is NoiseTunnel else {}
    assert not AttributionSupervision(made, attribute_kwargs=arguments).needs_second_derivative
    assert not RightForTheRightReasons(net, explainer=made, attribute_kwargs=arguments).needs_second_derivative


class Own(Regularizer):
    """Made of outputs alone."""

    def terms(self, batch):
        return {"own": self.forward_func(batch.inputs).square().mean()}


@needs_eager_runs
def test_own_regularizer_is_refused_unless_it_says_otherwise():
    compiled = torch.compile(network(), backend="eager")
    with pytest.raises(ValueError, match=r"Own needs.*needs_second_derivative = False"):
        trainer_of(compiled, Own(compiled))

    class OfOutputs(Own):
        needs_second_derivative = False

    class Unknown(nn.Module):
        def forward(self, inputs, target, annotations):
            return {}

    trainer_of(compiled, OfOutputs(compiled))
    with pytest.raises(ValueError, match="Unknown needs"):
        trainer_of(compiled, Unknown())


def test_regularizer_may_explain_the_module_that_was_compiled():
    """The task's part is compiled, the second derivative is taken through the module itself."""
    torch._dynamo.reset()
    net = network().eval()
    x, y, annotations = X[:8], Y[:8], (X[:8] > 0).double()

    def gradient(model):
        loss, _ = ExplanationRegularizedLoss(model, [RightForTheRightReasons(net)])((x, y, annotations))
        return torch.autograd.grad(loss, list(net.parameters()))

    compiled = torch.compile(net, backend=aot_eager)
    trainer_of(compiled, RightForTheRightReasons(net))
    for ours, expected in zip(gradient(compiled), gradient(net), strict=True):
        torch.testing.assert_close(ours, expected)


@needs_eager_runs
def test_explanation_of_the_module_may_be_scored_by_the_compiled_model():
    """The explainer's second derivative is the module's, the score needs a first one only."""
    torch._dynamo.reset()
    net = network().eval()

    def gradient(model):
        regularizer = InsertionDeletion(
            LayerGradCam(net, net[2]), baselines=0.0, forward_func=model, generator=torch.Generator().manual_seed(0)
        )
        if model is not net:
            trainer_of(model, regularizer)
        loss, _ = ExplanationRegularizedLoss(model, [regularizer])((X[:8], Y[:8]))
        return torch.autograd.grad(loss, list(net.parameters()))

    for ours, expected in zip(gradient(torch.compile(net, backend=aot_eager)), gradient(net), strict=True):
        torch.testing.assert_close(ours, expected)


def test_older_torch_cannot_train_compiled_models(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    net = network()
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(ValueError, match=r"torch\.compiler\.set_stance.*install PyTorch 2\.6"):
        trainer_of(compiled, Stability(compiled))
    trainer_of(compiled, InsertionDeletion(InputXGradient(net), baselines=0.0))
