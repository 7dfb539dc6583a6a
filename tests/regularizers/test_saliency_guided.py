"""Saliency-guided training against the definition: which features are replaced, by what, and the divergence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo.regularizers import SaliencyGuided
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1])


def captured(regularizer, model, x, y):
    """The plain inputs and the replaced ones that the two predictions were made of."""
    seen = []
    handle = model.register_forward_hook(lambda _module, args, _output: seen.append(args[0].detach().clone()))
    regularizer(x, y)
    handle.remove()
    return seen[-2:]


def test_saliency_guided_replaces_the_features_of_least_gradient():
    net = smooth_net()
    plain, replaced = captured(SaliencyGuided(net, fraction=0.5), net, X, Y)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[range(5), Y].sum(), x)
    least = gradient.abs().argsort(dim=1)[:, :3]
    changed = plain != replaced
    assert torch.equal(plain, X)
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, least, True))


def test_saliency_guided_draws_values_from_the_range_of_each_feature():
    net = smooth_net()
    for _ in range(20):
        _, replaced = captured(SaliencyGuided(net, fraction=0.9), net, X, Y)
        assert bool(((replaced >= X.amin(0)) & (replaced <= X.amax(0))).all())
    _, replaced = captured(SaliencyGuided(net, fraction=0.9, value_range=(7.0, 8.0)), net, X, Y)
    assert bool(((replaced >= 7) | (replaced == X)).all())
    images, labels = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    images[:, 1] += 100
    net = smooth_conv_net()
    _, replaced = captured(SaliencyGuided(net), net, images, labels)
    assert float(replaced[:, 0].max()) < 50 < float(replaced[:, 1].min())  # each channel's own range


def test_saliency_guided_term_is_the_divergence_of_both_predictions():
    net = smooth_net()
    regularizer = SaliencyGuided(net, generator=torch.Generator().manual_seed(2))
    plain, replaced = captured(regularizer, net, X, Y)
    regularizer.generator.manual_seed(2)
    p, q = net(plain).softmax(1), net(replaced).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(regularizer(X, Y)["saliency_guided"], expected)


def test_saliency_guided_has_the_true_gradient_through_both_predictions():
    net = smooth_net()
    regularizer = SaliencyGuided(net)
    assert_trainable(lambda: regularizer(X, Y), net)


def test_saliency_guided_accepts_a_single_logit():
    net = smooth_net(n_classes=1)
    labels = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]])
    assert SaliencyGuided(net)(X, labels)["saliency_guided"].item() > 0


def test_saliency_guided_leaves_a_constant_feature_unchanged():
    net, x = smooth_net(), X.clone()
    x[:, 3] = 0.5
    _, replaced = captured(SaliencyGuided(net, fraction=0.9), net, x, Y)
    assert replaced[:, 3].eq(0.5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"fraction": 0.0}, "fraction"), ({"fraction": 1.0}, "fraction"), ({"outputs": "raw"}, "distributions")],
)
def test_saliency_guided_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SaliencyGuided(nn.Linear(2, 2), **arguments)
