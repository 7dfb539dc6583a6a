"""Rules for ReLU: the graph of models in which convolutions follow each other."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

import captum_idexpo.attr as attr
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import IMAGES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")


def net():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3)]
    return nn.Sequential(*convolutions, nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("name", ["Deconvolution", "GuidedBackprop", "NeuronDeconvolution", "NeuronGuidedBackprop"])
def test_guided_backprop_and_deconvolution_of_consecutive_convolutions(name):
    model = net()
    layer, arguments = ([model[-1]], {"neuron_selector": 1}) if "Neuron" in name else ([], {"target": 1})
    theirs = getattr(captum.attr, name)(model, *layer).attribute(IMAGES.clone(), **arguments)
    explainer = getattr(attr, name)(model, *layer)
    torch.testing.assert_close(explainer.attribute(IMAGES, **arguments), theirs.detach())
    assert_trainable(lambda: explainer.attribute(IMAGES, **arguments, create_graph=True), model, n_directions=2)
