"""The loss module: its parts, the forms of a batch, gradients, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import InputXGradient, LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion, RightForTheRightReasons, Sparsity, mean_inputs
from tests.helpers import smooth_conv_net

X = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 2, 1])


class Term(nn.Module):
    """A regularizer of fixed terms that keeps what it was called with."""

    def __init__(self, **terms):
        super().__init__()
        self.terms, self.calls = terms, []

    def forward(self, inputs, target, annotations=None):
        self.calls.append((inputs, target, annotations))
        return {name: torch.tensor(value) for name, value in self.terms.items()}


def test_loss_is_the_sum_of_its_named_parts():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, l2_weight=0.1)
    loss, parts = ExplanationRegularizedLoss(net, [regularizer])((X, Y))
    assert list(parts) == ["task", "insertion", "deletion", "l2"]
    torch.testing.assert_close(parts["task"], cross_entropy(net(X), Y).detach())
    torch.testing.assert_close(sum(parts.values()), loss.detach())
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_loss_gradient_equals_that_of_a_plain_loop():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, steps_per_update=None)
    ExplanationRegularizedLoss(net, [regularizer])((X, Y))[0].backward()
    module = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    (cross_entropy(net(X), Y) + sum(regularizer(X, Y).values())).backward()
    for ours, theirs in zip(module, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_loss_part_names_that_repeat_get_a_number():
    loss = ExplanationRegularizedLoss(smooth_conv_net(), [Term(a=1.0, task=5.0), Term(a=2.0), Term(a=3.0)])
    total, parts = loss((X, Y))
    assert list(parts) == ["task", "a", "task_2", "a_2", "a_3"]
    assert float((total - parts["task"]).detach()) == pytest.approx(11.0)


def test_loss_part_names_that_are_reserved_get_a_number():
    _, parts = ExplanationRegularizedLoss(smooth_conv_net(), [Term(loss=1.0, epoch=2.0, valscore=3.0)])((X, Y))
    assert list(parts) == ["task", "loss_2", "epoch_2", "valscore_2"]


def test_loss_takes_tuple_or_mapping_inputs_and_passes_annotations_on():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return self.weight * (a + b)

    a, b, y, annotations = (torch.randn(4) for _ in range(4))
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        term = Term(zero=0.0)
        loss, parts = ExplanationRegularizedLoss(Add(), [term], mse_loss)((inputs, y, annotations))
        torch.testing.assert_close(parts["task"], mse_loss(a + b, y))
        assert isinstance(term.calls[0][0], (tuple, dict))
        assert term.calls[0][2] is annotations
        assert ExplanationRegularizedLoss(Add(), [term], mse_loss)((inputs, y))[0].equal(loss)
        assert term.calls[1][2] is None


def test_loss_holds_the_model_once():
    net = smooth_conv_net()
    loss = ExplanationRegularizedLoss(net, [InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, model=net)])
    assert set(loss.state_dict()) == {f"model.{name}" for name in net.state_dict()}


@pytest.mark.parametrize("batch", [X, (X,), (X, Y, None, None), {"x": X, "y": Y}, 3])
def test_loss_refuses_batches_of_other_forms(batch):
    with pytest.raises(TypeError, match=r"must yield \(inputs, target\)"):
        ExplanationRegularizedLoss(smooth_conv_net())(batch)


def test_loss_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="empty"):
        ExplanationRegularizedLoss(smooth_conv_net())((X[:0], Y[:0]))


def test_loss_accepts_regularizers_from_a_generator():
    assert len(ExplanationRegularizedLoss(smooth_conv_net(), (Term(a=1.0) for _ in range(2))).regularizers) == 2


def test_loss_refuses_regularizers_that_are_not_a_list_of_modules():
    net = smooth_conv_net()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        ExplanationRegularizedLoss(net, [lambda x, y, a: {}])
    with pytest.raises(TypeError, match=r"write \[Term"):
        ExplanationRegularizedLoss(net, Term())


def test_loss_refuses_a_regularizer_of_another_model():
    """Its terms would train the other one, or nothing. A part or a wrapper of the model is the model's own."""
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0)
    with pytest.raises(ValueError, match=r"explains another Sequential.*from the model that you train"):
        ExplanationRegularizedLoss(copy.deepcopy(net), [Term(a=1.0), regularizer])
    foreign = nn.Sequential(net[2], smooth_conv_net(seed=1))  # it shares a layer that has no parameters
    with pytest.raises(ValueError, match="share no parameter"):
        ExplanationRegularizedLoss(foreign, [regularizer])
    tied = copy.deepcopy(net)
    tied[0].weight = net[0].weight
    for model in (net, nn.Sequential(net), nn.Sequential(*net), tied):
        _, parts = ExplanationRegularizedLoss(model, [regularizer])((X, Y))
        assert "insertion" in parts
    bare = InsertionDeletion(InputXGradient(lambda x: net(x)), baselines=0.0, model=net)
    ExplanationRegularizedLoss(net, [bare])


def test_loss_refuses_a_loss_fn_that_returns_many_values():
    with pytest.raises(ValueError, match="scalar"):
        ExplanationRegularizedLoss(smooth_conv_net(), loss_fn=nn.CrossEntropyLoss(reduction="none"))((X, Y))


@pytest.mark.parametrize("loss_fn", [cross_entropy, nn.CrossEntropyLoss()])
def test_loss_refuses_cross_entropy_of_a_single_column(loss_fn):
    loss = ExplanationRegularizedLoss(nn.Linear(5, 1), (), loss_fn)
    batch = torch.randn(4, 5), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"always 0 for outputs of one column, given: \(4, 1\).*BCEWithLogitsLoss"):
        loss(batch)
    optimizer = torch.optim.SGD(loss.model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(loss.model, optimizer, (), loss_fn, show_progress=False)
    with pytest.raises(ValueError, match="always 0 for outputs of one column"):
        trainer.evaluate([batch])


def test_loss_names_the_term_that_is_nan():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0)
    with torch.no_grad():
        net[8].bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="'task' is not finite"):
        ExplanationRegularizedLoss(net, [regularizer])((X, Y))
    with pytest.raises(NonFiniteError, match="'InsertionDeletion' is not finite"):
        ExplanationRegularizedLoss(net, [regularizer], lambda output, y: output.nan_to_num().sum())((X, Y))


class OfPixels(nn.Module):
    """A model of keyword arguments that returns a mapping, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.net = smooth_conv_net()

    def forward(self, pixel_values=None):
        return {"logits": self.net(pixel_values)}


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values)["logits"]


@pytest.mark.parametrize("regularizer_of", [RightForTheRightReasons, lambda net: Sparsity(InputXGradient(net))])
def test_regularizers_refuse_a_mapping_and_suggest_a_forward_method(regularizer_of):
    model = Wrapped(OfPixels())
    explained = InsertionDeletion(LayerGradCam(model, model.model.net[4]), baselines=0.0)
    for regularizer in (explained, regularizer_of(model)):
        with pytest.raises(TypeError, match=r"a mapping of a, b(?s:.*)def forward\(self, a, b\):\n.*\(a=a, b=b\)"):
            regularizer({"a": X, "b": X}, Y, X)
    with pytest.raises(TypeError, match="given: a mapping of pixel_values"):
        mean_inputs([({"pixel_values": X}, Y)])


def test_regularizer_explains_a_wrapped_model_of_keyword_arguments():
    model, twin = Wrapped(OfPixels()), smooth_conv_net()
    losses = []
    for net, layer in ((model, model.model.net[4]), (twin, twin[4])):
        regularizer = InsertionDeletion(LayerGradCam(net, layer), baselines=0.0, steps_per_update=None)
        losses.append(ExplanationRegularizedLoss(net, [regularizer])((X, Y))[0])
    torch.testing.assert_close(*losses)


class Returning(nn.Module):
    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def forward(self, inputs, target, annotations=None):
        return self.terms


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (torch.tensor(1.0), r"Returning must return a mapping of terms by name.*it returned: Tensor"),
        ({"own": 1.0}, r"Returning must return scalar tensors.*float as 'own'"),
        ({"own": torch.ones(3)}, r"Returning must return scalar tensors.*shape \(3,\) as 'own'"),
    ],
)
def test_loss_names_a_regularizer_that_returns_no_scalar_terms(terms, message):
    net = smooth_conv_net()
    with pytest.raises(TypeError, match=message):
        ExplanationRegularizedLoss(net, [Returning(terms)])((X, Y))


def test_loss_warns_of_cross_entropy_for_several_labels():
    net = nn.Linear(6, 3)
    regularizer = Sparsity(InputXGradient(net), outputs="multilabel")
    with pytest.warns(UserWarning, match=r"loss_fn=torch\.nn\.BCEWithLogitsLoss\(\)"):
        ExplanationRegularizedLoss(net, [regularizer])
    ExplanationRegularizedLoss(net, [regularizer], nn.BCEWithLogitsLoss())
