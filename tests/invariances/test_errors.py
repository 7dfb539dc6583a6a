"""What cannot be explained is refused alike by all classes, with Captum's types of exception."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import captum_idexpo.attr as attr
from tests.invariances.calls import CALLS, tensors_of
from tests.invariances.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore:A batch of one example")
SPECIMEN = ZOO["ReLU, AvgPool"]
WITH_TARGET = [name for name, call in CALLS.items() if "target" in call.arguments(SPECIMEN, 0)]
OF_LAYERS = [name for name in CALLS if name.startswith(("Layer", "Neuron", "Internal"))]
ENDS_IN_LAYER = "GuidedGradCam"
OF_GRADIENTS = ["Saliency", "InputXGradient", "IntegratedGradients", "GradientShap", "NoiseTunnel", "DeepLift"]


def call(name, target=1, model=None, inputs=None, **more):
    inputs = SPECIMEN.inputs(3) if inputs is None else inputs
    return CALLS[name](SPECIMEN, inputs, target, SPECIMEN.model() if model is None else model, **more)


class ReturnsDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = SPECIMEN.model()

    def forward(self, x):
        return {"logits": self.net(x), "hidden": x}

    def get_submodule(self, name):
        return self.net.get_submodule(name)


@pytest.mark.parametrize("name", WITH_TARGET)
def test_outputs_that_are_no_tensors_are_refused(name):
    with pytest.raises(TypeError, match=r"return a tensor, given: a dict of logits, hidden.*\['logits'\]"):
        call(name, model=ReturnsDict())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_targets_of_any_integer_dtype_and_in_a_column_are_accepted(name, dtype):
    expected = call(name, target=[0, 2, 1])
    target = torch.tensor([[0], [2], [1]], dtype=dtype)
    for a, b in zip(tensors_of(call(name, target)), tensors_of(expected), strict=True):
        torch.testing.assert_close(a, b)
    call(name, np.int64(1))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([True, False, True]), r"must hold integers.*torch\.bool.*target\.long\(\)"),
        (torch.tensor([0.0, 1.0, 2.0]), r"must hold integers.*float32.*target\.long\(\)"),
        (np.array([0, 1, 2]), r"given: ndarray\. Pass torch\.as_tensor\(target\)"),
        ("dog", "given: str. Pass an integer"),
        (torch.tensor([0, 1]), r"does not fit 3 examples|is not valid"),  # Captum's words, or ours
        ([0, 1], "a list of 2 for 3 examples|does not match"),
    ],
    ids=["bool", "float", "NumPy", "string", "too short", "a list too short"],
)
@pytest.mark.parametrize("name", WITH_TARGET)
def test_targets_of_wrong_type_or_length_are_refused(name, target, message):
    with pytest.raises(AssertionError, match=message):
        call(name, target)


@pytest.mark.parametrize("name", [name for name in WITH_TARGET if name not in ("FeatureAblation", "Occlusion")])
def test_target_that_is_missing_is_refused(name):
    if "Permutation" in name or "Ablation" in name or "ShapleyValue" in name:
        pytest.skip("it explains every output")
    with pytest.raises(AssertionError, match=r"(?i)target.*missing"):
        call(name, None)


@pytest.mark.parametrize("name", ["Lime", "KernelShap", *OF_GRADIENTS])
def test_empty_batch_is_refused(name):
    with pytest.raises(ValueError, match="batch is empty: there is nothing to explain"):
        call(name, inputs=SPECIMEN.inputs(3)[:0])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("inputs", "given"), [(lambda x: (x, None), "NoneType"), (lambda x: x.numpy(), "ndarray")])
def test_inputs_that_are_no_tensors_are_refused(name, inputs, given):
    with pytest.raises(AssertionError, match=f"tensor or a tuple of tensors, given: {given}"):
        call(name, inputs=inputs(SPECIMEN.inputs(3)))


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_token_ids_are_refused_by_gradient_methods(name):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    explainer = CALLS[name].build(model, None)
    more = {"baselines": torch.zeros_like(tokens)} if name == "GradientShap" else {}
    with pytest.raises(RuntimeError, match=r"integers do not have; given: torch\.int64.*LayerIntegratedGradients"):
        explainer.attribute(tokens, target=1, **more)


def test_integrated_gradients_accepts_integer_inputs():
    model, x = nn.Linear(3, 2), torch.tensor([[1, 2, 3]])
    for explainer in (attr.IntegratedGradients(model), attr.NoiseTunnel(attr.IntegratedGradients(model))):
        assert explainer.attribute(x, target=1).shape == (1, 3)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.modules_only])
def test_functions_are_refused_where_modules_are_needed(name):
    model = SPECIMEN.model()
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, given: function\. Put a function into"):
        CALLS[name].build(lambda x: model(x), model.get_submodule(SPECIMEN.layer))


@pytest.mark.parametrize("name", [*OF_LAYERS, ENDS_IN_LAYER])
def test_layers_that_are_no_modules_are_refused(name):
    model = SPECIMEN.model()
    with pytest.raises(TypeError, match=r"given: the name '0'; model\.get_submodule"):
        CALLS[name].build(model, "0")


class Bypass(nn.Module):
    """A layer that is not used, one that is used twice, one whose output is nested."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unused, self.twice = nn.Linear(2, 2), nn.Linear(36, 36)
        self.nested, self.head = nn.LSTM(36, 36, batch_first=True), nn.Linear(36, 3)
        self.double().eval()

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x.flatten(1)[:, :36]))))
        return self.head(self.nested(x[:, None])[0][:, 0])


@pytest.mark.filterwarnings("ignore:The attributions of DeepLift")
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("unused", "The layer Linear is never called"),
        ("twice", r"The layer Linear has 2 calls in one forward pass.*nn\.Identity"),
        ("nested", "output of the layer LSTM is no tensor and no flat tuple.*given: Tensor, tuple"),
    ],
)
@pytest.mark.parametrize("name", [*OF_LAYERS, ENDS_IN_LAYER])
def test_layers_without_exactly_one_activation_are_refused(name, layer, message):
    model = Bypass()
    explainer = CALLS[name].build(model, model.get_submodule(layer))
    with pytest.raises(ValueError, match=message):
        explainer.attribute(SPECIMEN.inputs(3), **CALLS[name].arguments(SPECIMEN, 1))


class Attention(nn.Module):
    """Its layer's output is a tuple with None in it."""

    def __init__(self, apart):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.apart, self.head = nn.MultiheadAttention(6, 2, batch_first=True), apart, nn.Linear(6, 3)
        self.double().eval()

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(torch.tanh(self.apart(y)).mean(dim=1))


@pytest.mark.filterwarnings("ignore:The attributions of DeepLift")
@pytest.mark.parametrize("name", [name for name in OF_LAYERS if name not in ("NeuronGuidedBackprop",)])
def test_layer_output_of_a_flat_tuple_with_none_is_explained_as_its_tensor(name):
    """As an nn.Identity through which the tensor goes."""
    model, x = Attention(nn.Identity()), torch.randn(3, 4, 6, dtype=torch.float64)
    arguments = CALLS[name].arguments(SPECIMEN, 1)
    if "neuron_selector" in arguments:
        arguments["neuron_selector"] = (1, 2)
    if "baselines" in arguments:
        arguments["baselines"] = torch.zeros_like(x)
    found = []
    for layer in (model.attention, model.apart):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append(CALLS[name].build(model, layer).attribute(x, **arguments, create_graph=True))
    for a, b in zip(*map(tensors_of, found), strict=True):
        torch.testing.assert_close(a, b)
