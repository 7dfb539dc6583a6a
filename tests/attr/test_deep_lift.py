"""DeepLIFT where its quotients have no value, and where Captum's own answer depends on the batch."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from captum_idexpo.attr import DeepLift, DeepLiftShap
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import IMAGES, pool_net, relu_net

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


@pytest.mark.parametrize("make", [pool_net, relu_net])
def test_an_input_that_equals_its_baseline_gives_no_nan(make):
    model, baselines = make(), IMAGES.clone()
    baselines[1:] += 0.5
    attribution = DeepLift(model).attribute(IMAGES, baselines, target=1, create_graph=True)
    gradients = torch.autograd.grad(attribution.square().sum(), list(model.parameters()), allow_unused=True)
    assert attribution[0].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    theirs = captum.attr.DeepLift(model).attribute(IMAGES, baselines, target=1)
    torch.testing.assert_close(attribution, theirs)


def test_all_inputs_equal_their_baselines():
    """The multipliers are the gradient there, and its gradient is that of the gradient."""
    model = pool_net()
    model.pool = nn.AvgPool2d(2)
    explainer = DeepLift(model, multiply_by_inputs=False)
    assert_trainable(lambda: explainer.attribute(IMAGES, IMAGES.clone(), target=1, create_graph=True), model)


def test_no_example_depends_on_its_batch_mates():
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


def test_a_module_that_is_used_twice_is_an_error():
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match=r"Tanh\(\) is used more than once.*of its own"):
        DeepLift(model).attribute(torch.randn(5, 3), target=1)
    assert not act._forward_hooks
    assert not hasattr(act, "input")


def test_deltas_are_returned_and_detached():
    model = pool_net()
    attribution, delta = DeepLift(model).attribute(IMAGES, target=1, return_convergence_delta=True, create_graph=True)
    assert attribution.requires_grad
    assert not delta.requires_grad
    torch.testing.assert_close(delta, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_custom_attribution_functions_and_callable_baselines():
    model = pool_net()

    def squared(multipliers, inputs, baselines):
        return tuple(m * (x - b).square() for m, x, b in zip(multipliers, inputs, baselines, strict=True))

    arguments = {"target": 1, "custom_attribution_func": squared}
    theirs = captum.attr.DeepLiftShap(model).attribute(IMAGES, lambda: IMAGES[:3] + 1, **arguments)
    ours = DeepLiftShap(model).attribute(IMAGES, lambda: IMAGES[:3] + 1, create_graph=True, **arguments)
    torch.testing.assert_close(ours, theirs)
