"""Bounded memory: the same gradient as a graph kept whole, whatever the model's mode, and less kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo._core.compiled import can_run_eagerly
from captum_idexpo.attr import KernelShap, LayerGradCam, Lime, id_expo_lime
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import InsertionDeletion
from tests.helpers import gradient_error, smooth_conv_net

TINY = 1.0  # bytes: every evaluation goes twice, one row at a time


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def largest_difference(ours, theirs):
    assert [a is None for a in ours] == [b is None for b in theirs]
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(ours, theirs, strict=True) if a is not None
    )


def regularizer(model, explainer, memory_budget, **settings):
    explainers = {
        "lime": lambda: id_expo_lime(model),
        "kernel_shap": lambda: KernelShap(model),
        "gradcam": lambda: LayerGradCam(model, model[4]),
    }
    sampled = {"attribute_kwargs": {"n_samples": 12, "sampling": "independent"}, "feature_mask": lambda x: grid(x, 2)}
    return InsertionDeletion(
        explainers[explainer](),
        baselines=0.3,
        forward_func=model,
        memory_budget=memory_budget,
        insertion_weight=1.0,
        deletion_weight=0.5,
        l2_weight=0.1,
        **({} if explainer == "gradcam" else sampled),
        **settings,
    )


def batch():
    torch.manual_seed(1)
    return torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1])


@pytest.mark.parametrize("explainer", ["lime", "kernel_shap", "gradcam"])
@pytest.mark.parametrize("budget", [TINY, 2e4, 1e9])
def test_memory_budget_gives_the_loss_and_gradient_of_the_whole_graph(explainer, budget):
    results = []
    for memory_budget in (None, budget):
        model = smooth_conv_net()
        x, y = batch()
        x.requires_grad_()
        torch.manual_seed(2)
        terms = regularizer(model, explainer, memory_budget)(x, y)
        sum(terms.values()).backward()
        results.append((terms, [*gradients(model), x.grad]))
    (terms, whole), (bounded_terms, bounded) = results
    for name in terms:
        assert bounded_terms[name].item() == pytest.approx(terms[name].item(), rel=1e-12)
    assert largest_difference(bounded, whole) < 1e-10


@pytest.mark.parametrize("explainer", ["lime", "gradcam"])
def test_memory_budget_gradient_agrees_with_finite_differences(explainer):
    model = smooth_conv_net()
    x, y = batch()
    # A hard mask has no gradient of its own and the thresholds of a soft one carry none (they are held in a test of
    # the regularizer): of the deletion ratio by hard masks all that is differentiated is the model on the copies.
    settings = {"temperature": None, "deletion_form": "log"}

    def loss():
        torch.manual_seed(2)
        return sum(regularizer(model, explainer, TINY, **settings)(x, y).values())

    assert gradient_error(loss, model) < 1e-5


def lime_of(forward_func, **kwargs):
    x, _ = batch()
    torch.manual_seed(3)
    lime = Lime(forward_func, interpretable_model=Ridge())
    arguments = {"target": 1, "feature_mask": grid(x, 2), "n_samples": 20, "sampling": "independent"}
    return lime.attribute(x, create_graph=True, perturbations_per_eval=2, **arguments, **kwargs)


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("later_mode", [True, False])
def test_memory_budget_second_pass_repeats_dropout_and_batch_statistics(as_function, later_mode):
    """In training mode, where each chunk draws its own dropout and has its own statistics."""
    results = []
    for memory_budget in (None, 4e5):  # the chunks fit, the whole does not
        model = smooth_conv_net().train()
        attribution = lime_of((lambda x, model=model: model(x)) if as_function else model, memory_budget=memory_budget)
        model.train(later_mode)  # what happens between the passes does not matter
        torch.rand(5)
        attribution.square().sum().backward()
        assert all(module.training is later_mode for module in model.modules())
        results.append((attribution, gradients(model), model[1].running_mean))
    (attribution, whole, statistics), (bounded_attribution, bounded, bounded_statistics) = results
    assert torch.equal(attribution, bounded_attribution)
    assert largest_difference(bounded, whole) < 1e-10
    assert torch.equal(statistics, bounded_statistics)


def test_memory_budget_leaves_the_random_stream_unchanged():
    after = []
    for memory_budget in (None, TINY):
        model = smooth_conv_net()
        lime_of(model, memory_budget=memory_budget).sum().backward()
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_memory_budget_second_pass_repeats_autocast():
    model, seen = smooth_conv_net().float(), []
    model.register_forward_hook(lambda _module, _args, output: seen.append((torch.is_grad_enabled(), output.dtype)))
    x = batch()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lime = Lime(model, interpretable_model=Ridge())
        arguments = {"target": 1, "feature_mask": grid(x, 2), "n_samples": 20, "perturbations_per_eval": 1}
        attribution = lime.attribute(x[:1], create_graph=True, memory_budget=TINY, **arguments)
    first_pass = len(seen)
    attribution.square().sum().backward()
    assert seen[first_pass:] == 20 * [(True, torch.bfloat16)]
    seen.clear()
    torch.set_default_dtype(torch.float64)  # of which autocast leaves products alone
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attribution = lime.attribute(x[:1], create_graph=True, memory_budget=TINY, **arguments)
        first_pass = len(seen)
        attribution.square().sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[first_pass:] == 20 * [(True, torch.bfloat16)]


@pytest.mark.parametrize("training", [False, True])
def test_memory_budget_graph_can_be_used_twice(training):
    model = smooth_conv_net().train(training)
    loss = lime_of(model, memory_budget=4e5 if training else TINY).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    for twice, single in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(twice, 2 * single)


class Router(nn.Module):
    """Uses one of two layers, depending on whether the input has zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.masked = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        has_zeros = (x == 0).any(dim=1, keepdim=True)
        return self.masked(x) if has_zeros.all() else self.dense(x) * ~has_zeros + 0 * x[:, :2]


def test_memory_budget_finds_or_names_parameters_that_some_copies_use():
    x = torch.ones(1, 4, dtype=torch.float64)
    results = []
    arguments = {"target": 0, "n_samples": 40, "perturbations_per_eval": 1, "create_graph": True}
    for memory_budget in (None, TINY):
        model = Router()
        torch.manual_seed(5)
        Lime(model, Ridge()).attribute(x, memory_budget=memory_budget, **arguments).square().sum().backward()
        results.append(gradients(model))
    assert largest_difference(results[1], results[0]) < 1e-10
    model = Router()
    torch.manual_seed(5)
    attribution = Lime(lambda x: model(x), Ridge()).attribute(x, memory_budget=TINY, **arguments)
    with pytest.raises(RuntimeError, match="its gradient would be missing"):
        attribution.square().sum().backward()


def test_memory_budget_gives_gradients_to_tensors_in_a_closure():
    results = []
    for memory_budget in (None, TINY):
        model = smooth_conv_net()
        root = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        factor = root.exp()  # one graph, which every chunk's graph leads to
        attribution = lime_of(lambda x, m=model, f=factor: f * m(x), memory_budget=memory_budget)
        attribution.square().sum().backward()
        results.append([*gradients(model), root.grad])
    assert largest_difference(results[1], results[0]) < 1e-10


def test_memory_budget_refuses_weights_changed_before_the_backward_pass():
    model = smooth_conv_net()
    loss = lime_of(model, memory_budget=TINY).sum()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_budget_with_a_frozen_model_is_an_error():
    model = smooth_conv_net().requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing that requires"):
        lime_of(model, memory_budget=TINY)


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_memory_budget_must_be_a_positive_number_of_bytes(budget):
    model = smooth_conv_net()
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes"):
        lime_of(model, memory_budget=budget)
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes"):
        regularizer(model, "gradcam", budget)


def test_memory_budget_bounds_the_rows_and_keeps_a_graph_that_fits():
    rows, passes = {}, {}
    for budget in (None, 1e9, 1e6, 1e5, TINY):
        model = smooth_conv_net()
        seen = []
        model.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(len(args[0])))
        x, _ = batch()
        torch.manual_seed(0)
        arguments = {"target": 1, "feature_mask": grid(x, 2), "n_samples": 200, "sampling": "independent"}
        attribution = Lime(model, Ridge()).attribute(x, create_graph=True, memory_budget=budget, **arguments)
        forward_rows = sum(seen)
        attribution.sum().backward()
        rows[budget], passes[budget] = max(seen), sum(seen) / forward_rows
    assert rows[None] == rows[1e9] == 600
    assert 3 < rows[1e5] < rows[1e6] < 600
    assert rows[TINY] <= 8  # what is looked at
    assert passes[None] == passes[1e9] == 1.0
    assert all(passes[budget] == pytest.approx(2.0, rel=0.03) for budget in (1e6, 1e5, TINY))


@pytest.mark.parametrize("memory_budget", [None, TINY])
@pytest.mark.parametrize("explainer", ["lime", "gradcam"])
def test_memory_budget_gradient_ignores_a_later_training_forward_pass(memory_budget, explainer):
    """The regularizer first, then the task's pass, which moves BatchNorm's statistics, then backward."""
    results = []
    for forward_between in (False, True):
        model = smooth_conv_net().train()
        x, y = batch()
        torch.manual_seed(2)
        terms = regularizer(model, explainer, memory_budget)(x, y)
        if forward_between:
            model(x)
        sum(terms.values()).backward()
        results.append(gradients(model))
    assert largest_difference(results[1], results[0]) < 1e-10


@pytest.mark.parametrize("memory_budget", [1e9, 4e5])
def test_memory_budget_looks_do_not_spoil_a_kept_graph(memory_budget):
    """In training mode every look moves BatchNorm's statistics and puts them back."""
    results = []
    for budget in (None, memory_budget):
        model = smooth_conv_net().train()
        model[3].p = 0.0
        x, y = batch()
        terms = regularizer(model, "lime", budget, eval_mode=False, max_examples_per_batch=20)(x, y)
        (model(x).sum() + sum(terms.values())).backward()
        results.append(gradients(model))
    assert largest_difference(*results) < 1e-9


def test_memory_budget_refuses_a_second_pass_with_other_values():
    numbers = iter(range(10**6))

    def counting(model, x):
        return model(x) * next(numbers)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth_conv_net()

        def encode(self, x):  # a method that is not called through the module
            return nn.functional.dropout(self.net(x), 0.5, self.training)

    model = smooth_conv_net()
    with pytest.raises(RuntimeError, match="returned other values"):
        lime_of(lambda x: counting(model, x), memory_budget=TINY).sum().backward()
    encoder = Encoder().eval().requires_grad_()
    encoder.training = True
    attribution = lime_of(lambda x: encoder.encode(x), memory_budget=TINY)
    encoder.eval()
    with pytest.raises(RuntimeError, match="returned other values"):
        attribution.sum().backward()
    encoder.training = True
    attribution = lime_of(encoder.encode, memory_budget=TINY)  # whose module is known
    encoder.eval()
    attribution.sum().backward()
    scale = torch.ones(3, dtype=torch.float64)
    arguments = {"additional_forward_args": (scale,)}
    attribution = lime_of(lambda x, s: model(x) * s[:, None], memory_budget=TINY, **arguments)
    scale.mul_(3)
    with pytest.raises(RuntimeError, match="returned other values"):
        attribution.sum().backward()


def test_memory_budget_does_not_count_weights_as_activations():
    """A linear layer's graph keeps a view of its weight, once, however many rows there are."""
    model, seen = nn.Sequential(nn.Linear(6, 3000), nn.Tanh(), nn.Linear(3000, 2)), []
    model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    arguments = {"target": 0, "n_samples": 100, "sampling": "independent", "create_graph": True}
    Lime(model, Ridge()).attribute(torch.randn(4, 6), memory_budget=3e6, **arguments).sum().backward()
    row = 4 * (2 * 3000 + 6)  # the second layer's input, which is the hyperbolic tangent's output, and the mask
    assert 0.4 * 3e6 / 3 / row < max(seen) < 2.5 * 3e6 / 3 / row


class MovingScale(nn.Module):
    """Multiplies by a buffer that each forward pass in training mode moves."""

    def __init__(self):
        super().__init__()
        self.net = smooth_conv_net()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.scale.mul_(1.1)
        return self.net(x) * self.scale.clone()


def test_memory_budget_second_pass_starts_from_the_buffers_of_the_first():
    model = MovingScale().train()
    model.net.eval()
    loss = lime_of(model, memory_budget=4e5).square().sum()
    scale = model.scale.clone()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert torch.equal(model.scale, scale)
    for twice, single in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(twice, 2 * single)


def test_memory_budget_refuses_a_second_derivative_of_the_loss():
    """Rather than left out, where another term has one."""
    model = smooth_conv_net()
    x, y = batch()

    def norm_of_gradient(memory_budget):
        torch.manual_seed(0)
        phi = Lime(model, Ridge(0.1)).attribute(
            x, target=y, feature_mask=grid(x, 2), n_samples=12, create_graph=True, memory_budget=memory_budget
        )
        loss = nn.functional.cross_entropy(model(x), y) + phi.square().sum()
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return sum(part.square().sum() for part in gradient)

    torch.testing.assert_close(norm_of_gradient(1e9), norm_of_gradient(None))
    with pytest.raises(RuntimeError, match=r"no second derivative.*leave memory_budget out"):
        norm_of_gradient(TINY)


@pytest.mark.skipif(not can_run_eagerly(), reason="torch.compiler.set_stance needs PyTorch 2.6")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("budget", [TINY, 1e9])
def test_memory_budget_does_not_recompile_a_compiled_model(budget, in_place):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 2, 1])
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    def gradient(model, memory_budget):
        torch.manual_seed(0)
        phi = Lime(model, Ridge(0.1)).attribute(
            x, target=y, n_samples=30, perturbations_per_eval=10, create_graph=True, memory_budget=memory_budget
        )
        return torch.autograd.grad(phi.square().sum(), list(net.parameters()))

    expected = gradient(net, None)
    torch._dynamo.reset()
    compiled = net if in_place else torch.compile(net, backend=backend, dynamic=True)
    if in_place:
        net.compile(backend=backend, dynamic=True)
    first = gradient(compiled, budget)
    n_compilations = len(compilations)
    second = gradient(compiled, budget)
    for ours, again, theirs in zip(first, second, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(again, theirs)
    assert len(compilations) == n_compilations
