"""Side inputs go with their examples: each row equals the row of a model that has its side input built in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from tests.invariances.calls import CALLS, assert_same, feature_mask, rows_of, tensors_of
from tests.invariances.zoo import ZOO

SCALES = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.25], dtype=torch.float64)
SPECIMENS = ("ReLU, MaxPool", "linear", "recurrent")

pytestmark = pytest.mark.filterwarnings("ignore:The attributions of DeepLift")  # modules without a rule


class Scaled(nn.Module):
    """A model whose outputs are scaled by a number per example, a side input or a constant."""

    def __init__(self, model, scale=None):
        super().__init__()
        self.model, self.scale = model, scale

    def get_submodule(self, target):
        return self.model.get_submodule(target)

    def forward(self, x, scale=None):
        return self.model(x) * (self.scale if scale is None else scale[:, None])


def cases():
    for specimen in SPECIMENS:
        for name, call in CALLS.items():
            if call.random or (name == "GuidedGradCam" and specimen != "ReLU, MaxPool"):
                continue
            yield specimen, name


@pytest.mark.parametrize(("specimen", "name"), cases())
def test_side_inputs_of_attributions_go_with_their_examples(specimen, name):
    specimen, call = ZOO[specimen], CALLS[name]
    inputs, target, model = specimen.inputs(5), torch.arange(5) % specimen.n_columns, specimen.model()
    whole = call(specimen, inputs, target, Scaled(model), additional_forward_args=SCALES)
    for row in range(5):
        bound = Scaled(model, SCALES[row])
        alone = call(specimen, rows_of(inputs, [row]), target[[row]], bound)
        assert_same(alone, [tensor[[row]] for tensor in tensors_of(whole)])


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("outputs", ["logits", "multilabel"])
@pytest.mark.parametrize("specimen", ["ReLU, MaxPool", "linear"])
def test_side_inputs_of_metrics_go_with_their_examples(specimen, outputs, chunk):
    specimen = ZOO[specimen]
    inputs, target, model = specimen.inputs(5), torch.arange(5) % specimen.n_columns, specimen.model()
    maps = specimen.inputs(5, seed=4)
    settings = {"outputs": outputs, "feature_mask": feature_mask(specimen), "max_examples_per_batch": chunk}
    side = {"additional_forward_args": SCALES}
    whole = insertion_deletion(Scaled(model), inputs, maps, target=target, **side, **settings)
    drawn = {"n_samples": 8, "generator": torch.Generator().manual_seed(0)}
    assert sensitivity_n(Scaled(model), inputs, maps, 2, target=target, **side, **settings, **drawn).shape == (5,)
    for row in range(5):
        bound = Scaled(model, SCALES[row])
        alone = insertion_deletion(bound, inputs[[row]], maps[[row]], target=target[[row]], **settings)
        torch.testing.assert_close(alone.insertion[0], whole.insertion[row])
        torch.testing.assert_close(alone.deletion[0], whole.deletion[row])
