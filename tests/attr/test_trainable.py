"""Classes whose ``attribute`` is written: what users build on them."""

from __future__ import annotations

import inspect

import captum.attr
import pytest
import torch
from torch import nn

import captum_idexpo.attr as attr
from tests.helpers import smooth_net

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Twice(attr.Saliency):
    def attribute(self, *args, **kwargs):
        return 2 * super().attribute(*args, **kwargs)


class Doubling:
    def attribute(self, *args, **kwargs):
        return 2 * super().attribute(*args, **kwargs)


class Inherits(Twice):
    pass


class Mixed(Doubling, attr.Saliency):
    pass


class ByName(attr.LayerGradientXActivation):
    def __init__(self, model, layer="0"):
        super().__init__(model, model.get_submodule(layer))


class Anything(attr.DeepLift):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Nothing(attr.DeepLift):
    def __init__(self):
        super().__init__(smooth_net())


@pytest.mark.parametrize("kind", [Twice, Inherits, Mixed])
def test_trainable_subclasses_keep_an_overridden_attribute_method(kind):
    net = smooth_net()
    expected = 2 * attr.Saliency(net).attribute(X, target=1)
    torch.testing.assert_close(kind(net).attribute(X, target=1), expected)
    assert kind(net).attribute(X, target=1, create_graph=True).requires_grad


def test_trainable_subclasses_may_have_other_constructors():
    net = smooth_net()
    ByName(net, "1").attribute(X, target=1)
    for explainer in (Anything(net), Anything(model=net), Nothing()):
        assert explainer.attribute(X, target=1).shape == X.shape
    with pytest.raises(TypeError, match="Anything changes the gradients"):
        Anything(lambda x: net(x))


def test_trainable_signatures_are_captums_plus_create_graph_and_a_budget():
    theirs = list(inspect.signature(captum.attr.LayerGradCam.attribute).parameters)
    assert list(inspect.signature(attr.LayerGradCam.attribute).parameters) == [*theirs, "create_graph", "memory_budget"]
    assert inspect.signature(attr.LayerConductance) == inspect.signature(captum.attr.LayerConductance)
    own = list(inspect.signature(attr.LayerGradCam).parameters)
    assert own == [*inspect.signature(captum.attr.LayerGradCam).parameters, "reshape_transform"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'targt'"):
        attr.Saliency(smooth_net()).attribute(X, targt=1)


def test_saliency_accepts_a_target_for_each_row_of_the_output():
    """Which need not be the inputs' rows."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.reader(x)[0][-1])

    steps = torch.randn(7, 5, 3)
    attribution = attr.Saliency(Sequence()).attribute(steps, target=torch.tensor([0, 1, 0, 1, 0]))
    assert attribution.shape == steps.shape


def test_gradient_shap_accepts_a_scalar_tensor_as_additional_argument():
    net, number = smooth_net(), torch.tensor(2.0, dtype=torch.float64)
    explainer = attr.GradientShap(lambda x, k: net(x) * k)
    arguments = {"baselines": X, "target": 1, "additional_forward_args": (number,), "internal_batch_size": 2}
    assert explainer.attribute(X, **arguments).shape == X.shape
