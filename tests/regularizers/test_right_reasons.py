"""RRR against the literal equation; other explainers; annotations in every form; the search for other explanations."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from captum_idexpo import InputError
from captum_idexpo.attr import InputXGradient, LayerGradCam, Saliency
from captum_idexpo.regularizers import RightForTheRightReasons, find_another_explanation
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1])
A = (torch.rand(5, 6, generator=G) < 0.4).double()
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
LABELS = torch.tensor([0, 2, 1])
HALF = torch.zeros(3, 1, 6, 6, dtype=torch.float64)
HALF[..., :3] = 1


def literal(net, x, a):
    total = 0.0
    for example, mask in zip(x, a, strict=True):
        example = example.clone().requires_grad_()
        log_p = net(example[None]).log_softmax(dim=1)[0]
        gradient = sum(torch.autograd.grad(value, example, retain_graph=True)[0] for value in log_p)
        total += float((mask * gradient).square().sum())
    return total / len(x)


def test_right_reasons_equals_the_equation():
    net = smooth_net()
    assert RightForTheRightReasons(net)(X, Y, A)["right_reasons"].item() == pytest.approx(literal(net, X, A), rel=1e-12)


@pytest.mark.parametrize("outputs", ["logits", "log_probabilities", "probabilities"])
def test_right_reasons_agrees_for_all_kinds_of_outputs(outputs):
    net = smooth_net()
    forward = {
        "logits": net,
        "log_probabilities": nn.Sequential(net, nn.LogSoftmax(dim=1)),
        "probabilities": nn.Sequential(net, nn.Softmax(dim=1)),
    }[outputs]
    value = RightForTheRightReasons(forward, outputs=outputs)(X, Y, A)["right_reasons"]
    assert value.item() == pytest.approx(literal(net, X, A), rel=1e-9)


def test_right_reasons_treats_a_single_logit_as_two_classes():
    net = smooth_net(n_classes=1)
    pair = lambda x: torch.cat([torch.zeros(len(x), 1), net(x)], dim=1)  # noqa: E731
    value = RightForTheRightReasons(net)(X, Y.clamp(max=1), A)["right_reasons"]
    assert value.item() == pytest.approx(literal(pair, X, A), rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: RightForTheRightReasons(net),
        lambda net: RightForTheRightReasons(net, annotates="right"),
        lambda net: RightForTheRightReasons(net, explainer=InputXGradient(net)),
        lambda net: RightForTheRightReasons(net, explainer=Saliency(net), attribute_kwargs={"abs": False}),
    ],
)
def test_right_reasons_has_the_true_gradient(make):
    net = smooth_net()
    regularizer = make(net)
    assert_trainable(lambda: regularizer(X, Y, A), net)


def test_right_reasons_of_a_layer_map_has_the_true_gradient():
    net = smooth_conv_net()
    regularizer = RightForTheRightReasons(net, explainer=LayerGradCam(net, net[6]))
    assert_trainable(lambda: regularizer(IMAGES, LABELS, HALF), net)


def test_right_reasons_of_right_places_equals_that_of_the_inverse_mask():
    net = smooth_net()
    wrong = RightForTheRightReasons(net)(X, Y, 1 - A)
    right = RightForTheRightReasons(net, annotates="right")(X, Y, A)
    torch.testing.assert_close(wrong, right)


@pytest.mark.parametrize(
    "annotations",
    [HALF, HALF.expand(3, 2, 6, 6), HALF.bool(), HALF[:, 0], HALF[:1], HALF.float(), HALF[:1, :, :1]],
)
def test_right_reasons_annotations_broadcast(annotations):
    net = smooth_conv_net()
    regularizer = RightForTheRightReasons(net)
    torch.testing.assert_close(regularizer(IMAGES, LABELS, annotations), regularizer(IMAGES, LABELS, HALF))


def test_right_reasons_accepts_a_tuple_of_inputs():
    net = smooth_net()
    joined = lambda a, b: net(torch.cat([a, b], dim=1))  # noqa: E731
    regularizer = RightForTheRightReasons(joined, eval_mode=False)
    both = regularizer((X[:, :2], X[:, 2:]), Y, (A[:, :2], A[:, 2:]))
    torch.testing.assert_close(both, RightForTheRightReasons(net)(X, Y, A))


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (None, "annotations are missing"),
        (A[:, :3], r"annotations of shape \(5, 3\) do not fit inputs of shape \(5, 6\)"),
        (A[0], r"annotations of shape \(6,\) do not fit"),
        (2 * A, r"must lie between 0 and 1.*0 to 2"),
        (A * torch.nan, "must lie between 0 and 1"),
        ((A, A), "2 annotations for 1 input"),
        ([[0.0] * 6] * 5, "5 annotations for 1 input"),
    ],
)
def test_right_reasons_refuses_bad_annotations(annotations, message):
    with pytest.raises(ValueError, match=message):
        RightForTheRightReasons(smooth_net())(X, Y, annotations)


def test_right_reasons_warns_once_of_annotations_that_forbid_every_place():
    net = smooth_net()
    regularizer = RightForTheRightReasons(net)
    with pytest.warns(UserWarning, match="no place where evidence may be"):
        regularizer(X, Y, torch.ones_like(X))
    regularizer(X, Y, torch.ones_like(X))
    with pytest.warns(UserWarning, match="of right evidence"):
        RightForTheRightReasons(net, annotates="right")(X, Y, torch.zeros_like(X))


def test_right_reasons_refuses_outputs_without_a_single_axis_of_classes():
    segmenter, images = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 5)
    with pytest.raises(InputError, match=r"\(2, 4, 5, 5\) have no single axis of classes.*outputs='raw'"):
        RightForTheRightReasons(segmenter)(images, None, torch.ones(2, 5, 5).tril())
    RightForTheRightReasons(segmenter, outputs="raw")(images, None, torch.ones(2, 5, 5).tril())


def test_right_reasons_refuses_bad_settings():
    with pytest.raises(ValueError, match="annotates must be"):
        RightForTheRightReasons(smooth_net(), annotates="both")
    with pytest.raises(ValueError, match="pass explainer="):
        RightForTheRightReasons(smooth_net(), attribute_kwargs={"abs": False})
    with pytest.raises(TypeError, match="has no create_graph"):
        RightForTheRightReasons(smooth_net(), explainer=captum.attr.Saliency(smooth_net()))


class Columns:
    """Three columns: the first tells the class, the second tells it less well, the third not at all."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(2, (400,), generator=generator)
        self.x = torch.randn(400, 3, generator=generator)
        self.x[:, 0] += 5.0 * (self.y - 0.5)
        self.x[:, 1] += 2.5 * (self.y - 0.5)

    def train(self, annotations):
        """The nearest class mean, in the columns that are allowed: what an ideal penalty would lead to."""
        allowed = annotations.mean(dim=0) < 0.5
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.copy_(torch.stack([self.x[self.y == k].mean(dim=0) for k in (0, 1)]) * allowed)
            model.bias.zero_()
        return model

    def accuracy(self, model):
        return float((model(self.x).argmax(dim=1) == self.y).float().mean())


def test_find_another_explanation_finds_both_rules_then_loses_accuracy():
    data = Columns()
    found = find_another_explanation(data.train, data.accuracy, data.x, threshold=0.67, max_drop=0.25)
    assert len(found) == 3
    assert not found[0].annotations.any()
    assert found[1].annotations.mean(dim=0).tolist() == pytest.approx([1, 0, 0], abs=0.1)
    assert found[0].accuracy > 0.98
    assert found[1].accuracy > 0.85
    assert found[2].accuracy < 0.65
    assert isinstance(found[0].model, nn.Module)


def test_find_another_explanation_ends_where_nothing_new_is_found():
    data = Columns()
    model = data.train(torch.zeros_like(data.x))
    found = find_another_explanation(lambda annotations: model, lambda model: 1.0, data.x)
    assert len(found) <= 3
    assert len(find_another_explanation(lambda a: model, lambda m: 1.0, data.x, max_explanations=1)) == 1
    chunked = find_another_explanation(lambda a: model, lambda m: 1.0, data.x, max_examples_per_batch=7)
    torch.testing.assert_close(found[1].annotations, chunked[1].annotations)


@pytest.mark.parametrize("arguments", [{"threshold": 0.0}, {"threshold": 1.0}, {"max_explanations": 0}])
def test_find_another_explanation_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        find_another_explanation(lambda a: smooth_net(), lambda m: 1.0, X, **arguments)


def test_find_another_explanation_of_a_confident_model_in_single_precision():
    """Of p_0 (10, -3, 0), the true gradient up to a factor, column 0 is the largest, however near to 1 p_0 is."""
    x = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 0.0], [20.0, 0.0, 0.0]])  # margins up to 200
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 3.0, 0.0], [10.0, 0.0, 0.0]]))
        model.bias.zero_()
    found = find_another_explanation(lambda _: model, lambda _: 1.0, x, max_explanations=2)
    assert found[1].annotations.tolist() == [[1.0, 0.0, 0.0]] * 4


def test_right_reasons_squares_half_precision_gradients_without_underflow():
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 3).half(), torch.rand(4, 6).half(), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        net.weight.mul_(1e-4)
    wrong = torch.tensor([1.0, 1, 1, 1, 1, 0]).expand(4, 6)
    value = RightForTheRightReasons(net)(x, y, wrong)["right_reasons"]
    expected = RightForTheRightReasons(net.float())(x.float(), y, wrong)["right_reasons"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.0)
