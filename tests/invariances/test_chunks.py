"""How many rows a forward pass has changes a result by rounding only."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import captum_idexpo.attr as attr
from captum_idexpo import InputError
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, MaskedNeighbors, Stability
from tests.invariances.calls import CALLS, assert_same, feature_mask
from tests.invariances.zoo import ONE_EACH, ZOO

pytestmark = [
    pytest.mark.filterwarnings("ignore:internal_batch_size"),  # less than LayerConductance's two steps
    pytest.mark.filterwarnings("ignore:The attributions of DeepLift"),  # modules without a rule
    pytest.mark.filterwarnings("ignore:Couldn't appropriately interpolate"),  # Captum's GuidedGradCam of no images
]
CHUNKED = [name for name, call in CALLS.items() if call.chunk]


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("specimen", ONE_EACH)
def test_chunk_size_does_not_change_the_attribution(specimen, name):
    if (specimen, name) == ("siamese", "DeepLiftShap"):
        pytest.skip("a module that is used twice is refused")
    specimen, call = ZOO[specimen], CALLS[name]
    inputs, target = specimen.inputs(5), torch.arange(5) % specimen.n_columns
    whole = call(specimen, inputs, target)
    argument, values = call.chunk
    for value in values:
        assert_same(call(specimen, inputs, target, **{argument: value}), whole)


def bounded(specimen, name, budget):
    """An attribution of five examples and its gradient in the model's weights, with a memory_budget."""
    specimen, call = ZOO[specimen], CALLS[name]
    inputs, target, model = specimen.inputs(5), torch.arange(5) % specimen.n_columns, specimen.model()
    values = call(specimen, inputs, target, model, create_graph=True, memory_budget=budget)
    flat = torch.cat([value.flatten() for value in tree_leaves(values)])
    flat.square().sum().backward()
    return [flat, *(parameter.grad for parameter in model.parameters())]


TAKES_BUDGET = [
    name
    for name in CALLS
    if "memory_budget" in inspect.signature(getattr(attr, name).attribute).parameters and not CALLS[name].random
]


@pytest.mark.parametrize("name", TAKES_BUDGET)
@pytest.mark.parametrize("specimen", ONE_EACH)
def test_memory_budget_changes_neither_attribution_nor_gradient_of_any_class(specimen, name):
    """One byte: every example for itself, and twice; and a budget that holds the whole graph."""
    if specimen == "siamese" and "DeepLift" in name:
        pytest.skip("a module that is used twice is refused")
    whole = bounded(specimen, name, None)
    if not len(whole[0]):
        with pytest.raises(InputError, match="one row for each example"):
            bounded(specimen, name, 1.0)
        return
    for budget in (1.0, 1e9):
        for ours, expected in zip(bounded(specimen, name, budget), whole, strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                assert_same(ours, expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["Lime", "KernelShap"]), st.integers(1, 6), st.floats(1.0, 1e6))
def test_memory_budget_does_not_change_attribution_or_gradient(name, n_examples, budget):
    specimen, call = ZOO["Tanh, AvgPool"], CALLS[name]
    inputs, target = specimen.inputs(n_examples), torch.arange(n_examples) % 3
    results = []
    for bound in (None, budget):
        model = specimen.model()
        values = call(specimen, inputs, target, model, create_graph=True, memory_budget=bound)
        values.square().sum().backward()
        results.append([values, *(parameter.grad for parameter in model.parameters())])
    assert_same(*results)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from([None, "auto"]), st.booleans())
def test_max_examples_per_batch_does_not_change_scores(n_examples, max_rows, temperature, grouped):
    specimen = ZOO["Tanh, MaxPool"]
    model, x, phi = specimen.model(), specimen.inputs(n_examples), specimen.inputs(n_examples, seed=5)
    arguments = {
        "target": torch.arange(n_examples) % 3,
        "feature_mask": feature_mask(specimen) if grouped else None,
    }

    def scores(rows):
        torch.manual_seed(0)
        both = insertion_deletion(
            model, x, phi, baselines=0.3, temperature=temperature, max_examples_per_batch=rows, **arguments
        )
        return [*both[:2], sensitivity_n(model, x, phi, 2, baselines=0.3, max_examples_per_batch=rows, **arguments)]

    assert_same(scores(max_rows), scores(None))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40))
def test_max_examples_per_batch_does_not_change_a_loss(n_examples, max_rows):
    specimen = ZOO["Tanh, AvgPool"]
    model, x, y = specimen.model(), specimen.inputs(n_examples), torch.arange(n_examples) % 3
    lime = attr.Lime(model, Ridge(0.1))
    masked = MaskedNeighbors(0.3, feature_mask(specimen))

    def losses(rows):
        regularizers = [
            InsertionDeletion(lime, baselines=0.3, feature_mask=feature_mask(specimen), max_examples_per_batch=rows),
            InsertionDeletion(attr.LayerGradCam(model, model[3]), baselines=0.3, max_examples_per_batch=rows),
            Fidelity(model, masked, max_examples_per_batch=rows),
            Stability(model, max_examples_per_batch=rows),
        ]
        torch.manual_seed(0)
        return [term for regularizer in regularizers for term in regularizer(x, y).values()]

    assert_same(losses(max_rows), losses(None))
