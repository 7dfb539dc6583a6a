"""Types of numbers, and numbers that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import captum_idexpo.attr as attr
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from tests.invariances.calls import CALLS, assert_same, feature_mask, tensors_of
from tests.invariances.zoo import ZOO

SPECIMEN = ZOO["ReLU, AvgPool"]
HALVES = [torch.float16, torch.bfloat16]
# The next issue mends precision.


def in_dtype(call, dtype, **more):
    arguments = call.arguments(SPECIMEN, torch.arange(3))
    cast = {"baselines": arguments["baselines"].to(dtype)} if "baselines" in arguments else {}
    return call(SPECIMEN, SPECIMEN.inputs(3).to(dtype), torch.arange(3), SPECIMEN.model().to(dtype), **cast, **more)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_float64_inputs_give_float64_attributions(name, create_graph):
    for tensor in tensors_of(in_dtype(CALLS[name], torch.float64, create_graph=create_graph)):
        assert tensor.dtype == torch.float64


@pytest.mark.parametrize("name", CALLS)
def test_float32_attributions_are_close_to_float64(name):
    single, double = in_dtype(CALLS[name], torch.float32), in_dtype(CALLS[name], torch.float64)
    for a, b in zip(tensors_of(single), tensors_of(double), strict=True):
        assert a.dtype == torch.float32
        if not CALLS[name].random:  # of another type, noise is drawn anew
            assert float((a - b).detach().abs().max()) < 1e-4 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_neither_fails_nor_gives_nan(name, create_graph, dtype):
    halves, double = in_dtype(CALLS[name], dtype, create_graph=create_graph), in_dtype(CALLS[name], torch.float64)
    for a, b in zip(tensors_of(halves), tensors_of(double), strict=True):
        assert a.isfinite().all()
        if not CALLS[name].random and name != "FeaturePermutation":
            assert float((a.double() - b).detach().abs().max()) < 0.15 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("name", ["DeepLift", "LayerDeepLift", "NeuronDeepLift"])
def test_deep_lift_in_half_precision_is_finite_where_input_is_baseline(name):
    x = SPECIMEN.inputs(3).half()
    values = CALLS[name](SPECIMEN, x, torch.arange(3), SPECIMEN.model().half(), baselines=x.clone())
    assert all(tensor.isfinite().all() for tensor in tensors_of(values))


OF_INTEGERS = {
    "FeatureAblation": lambda f: attr.FeatureAblation(f),
    "FeaturePermutation": lambda f: attr.FeaturePermutation(f),
    "ShapleyValueSampling": lambda f: attr.ShapleyValueSampling(f),
    "ShapleyValues": lambda f: attr.ShapleyValues(f),
    "Lime": lambda f: attr.Lime(f, Ridge()),
    "KernelShap": lambda f: attr.KernelShap(f),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integer_inputs_give_float_attributions(name, dtype):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(12, 3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 1]]).to(dtype)
    explainer = OF_INTEGERS[name](lambda ids: head(embedding(ids.long()).flatten(1)))
    values = explainer.attribute(ids, target=1)
    assert values.dtype == torch.float32
    assert values.shape == (3, 3)
    assert values.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["ShapleyValues", "KernelShap", "FeatureAblation", "Lime", "FeaturePermutation"])
def test_masked_nan_or_infinity_does_not_change_attributions(name, value):
    """A value that no output depends on while it is there, and that spreads if it is multiplied by 0."""
    x = torch.tensor([[1.0, 2.0, value], [3.0, 1.0, value]], dtype=torch.float64)

    def forward(x):
        return x[:, 0] * x[:, 1] + x[:, 0]

    def attribute(x):
        torch.manual_seed(0)
        similarity = attr.MaskSimilarity()
        explainer = attr.Lime(forward, Ridge(), similarity) if name == "Lime" else getattr(attr, name)(forward)
        return explainer.attribute(x)

    assert_same(attribute(x), attribute(x.nan_to_num(5.0, 5.0, 5.0)))


@pytest.mark.parametrize("name", ["FeatureAblation", "Occlusion", "FeaturePermutation", "ShapleyValueSampling"])
def test_attention_masks_of_minus_infinity_give_finite_attributions(name):
    """Also with many copies in a forward pass, in which features of both tensors are ablated."""
    scores = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0.0, 0.0, -torch.inf, 0.0], [0.0, -torch.inf, 0.0, 0.0]], dtype=torch.float64)

    def forward(scores, mask):
        return (scores + mask).softmax(dim=1)[:, 0]

    windows = {"sliding_window_shapes": ((1,), (1,))} if name == "Occlusion" else {}
    results = []
    for size in (None, 1, 3):
        torch.manual_seed(0)
        results.append(getattr(attr, name)(forward).attribute((scores, mask), perturbations_per_eval=size, **windows))
    assert all(tensor.isfinite().all() for tensor in results[0])
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("temperature", [None, "auto"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_finite_false_allows_nan_and_infinity_in_scores(temperature, value):
    model, x, phi = SPECIMEN.model(), SPECIMEN.inputs(3), SPECIMEN.inputs(3, seed=5)
    phi[:, 1] -= 100  # the second channel is inserted last and deleted last
    broken = x.clone()
    broken[:, 1, 0, 0] = value
    arguments = {"target": torch.arange(3), "fraction": 0.4, "temperature": temperature, "check_finite": False}
    expected, scores = (insertion_deletion(model, inputs, phi, baselines=0.0, **arguments) for inputs in (x, broken))
    assert_same(scores.insertion, expected.insertion, rtol=1e-3)
    mask = feature_mask(SPECIMEN)
    assert sensitivity_n(
        model, broken, phi, 1, baselines=0.0, feature_mask=mask, target=0, check_finite=False
    ).shape == (3,)
