"""The forms in which a baseline can be given agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import captum_idexpo.attr as attr
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, MaskedNeighbors, Stability
from tests.invariances.calls import CALLS, assert_same
from tests.invariances.zoo import ONE_EACH, ZOO

# Masks replace features by the baseline; gradients are taken on the way from it.
MASKING = ["FeatureAblation", "Occlusion", "ShapleyValueSampling", "ShapleyValues", "Lime", "KernelShap"]
ON_THE_WAY = ["IntegratedGradients", "DeepLift", "LayerConductance", "InternalInfluence", "LayerIntegratedGradients"]
ON_THE_WAY += ["LayerDeepLift", "NeuronIntegratedGradients", "NeuronConductance", "NeuronDeepLift"]


pytestmark = pytest.mark.filterwarnings("ignore:The attributions of DeepLift")  # modules without a rule


def forms(value, tensor, without_batch_axis):
    """One baseline for all examples and elements, in every form."""
    given = [value, torch.full_like(tensor[:1], value), torch.full_like(tensor, value)]
    if without_batch_axis:
        given += [torch.tensor(value, dtype=tensor.dtype), torch.full_like(tensor[0], value)]
        given += [torch.full(tensor.shape[2:], value, dtype=tensor.dtype)] if tensor.dim() > 2 else []
    return given


@pytest.mark.parametrize("name", MASKING + ON_THE_WAY)
@pytest.mark.parametrize("specimen", ["Tanh, AvgPool", "many columns", "recurrent", "two inputs"])
def test_baseline_forms_agree(specimen, name):
    specimen, call = ONE_EACH.get(specimen, ZOO[specimen]), CALLS[name]
    inputs, target = specimen.inputs(3), torch.arange(3) % specimen.n_columns
    masking = name in MASKING
    several = isinstance(inputs, tuple)
    given = [forms(0.5, tensor, masking) for tensor in (inputs if several else (inputs,))]
    results = []
    for index in range(min(map(len, given))):
        baselines = tuple(values[index] for values in given) if several else given[0][index]
        results.append(call(specimen, inputs, target, baselines=baselines))
    for result in results[1:]:
        assert_same(result, results[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from([1, 0]), min_size=4, max_size=4), st.integers(0, 3))
@pytest.mark.parametrize("name", [*MASKING, "scores", "regularizers"])
def test_baseline_broadcasts_along_any_axes(name, n_examples, kept, n_missing):
    """Whether an axis has size 1 or is missing, the result is that of the baseline in the input's shape."""
    specimen = ZOO["Tanh, AvgPool"]
    x, y = specimen.inputs(n_examples), torch.arange(n_examples) % 3
    shape = [full if keep else 1 for keep, full in zip(kept, x.shape, strict=True)]
    baseline = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n_missing))
    while n_missing and baseline.dim() and baseline.shape[0] == 1:
        baseline, n_missing = baseline[0], n_missing - 1
    full = baseline.expand_as(x).clone()

    def result(baseline):
        torch.manual_seed(0)
        model = specimen.model()
        if name == "scores":
            scores = insertion_deletion(model, x, x.flip(0), baselines=baseline, target=y)
            return [*scores[:2], sensitivity_n(model, x, x.flip(0), 3, baselines=baseline, target=y)]
        if name == "regularizers":
            gradient = InsertionDeletion(attr.Saliency(model), baselines=baseline)
            neighbors = Stability(model, MaskedNeighbors(baseline))
            return [*gradient(x, y).values(), *neighbors(x, y).values()]
        return CALLS[name](specimen, x, y, model, baselines=baseline)

    assert_same(result(baseline), result(full))


@pytest.mark.parametrize("name", ["ShapleyValues", "ShapleyValueSampling", "KernelShap", "FeatureAblation"])
def test_baseline_may_be_fractional_for_integer_inputs(name):
    x = torch.tensor([[1, 3]])
    values = getattr(attr, name)(lambda x: x.sum(1)).attribute(x, 0.5)
    torch.testing.assert_close(values.double(), torch.tensor([[0.5, 2.5]], dtype=torch.float64))


@pytest.mark.parametrize("name", MASKING)
def test_baseline_that_does_not_fit_is_refused_by_every_class(name):
    specimen = ZOO["Tanh, AvgPool"]
    x, y = specimen.inputs(3), torch.arange(3)
    for baselines, text in (
        (torch.zeros(1, 2, 5, 6), r"\(1, 2, 5, 6\) does not fit"),
        (torch.zeros(2, 2, 6, 6), r"\(2, 2, 6, 6\) does not fit"),
        (torch.zeros(3), r"\(3,\) does not fit"),
        ((0.0, 0.0), "2 values for 1 input"),
    ):
        with pytest.raises(ValueError, match=text):
            CALLS[name](specimen, x, y, baselines=baselines)


def test_fidelity_refuses_masked_neighbors_with_baselines_that_do_not_fit():
    specimen = ZOO["Tanh, AvgPool"]
    with pytest.raises(ValueError, match=r"\(3,\) does not fit"):
        Fidelity(specimen.model(), MaskedNeighbors(torch.zeros(3)))(specimen.inputs(3), torch.arange(3))
