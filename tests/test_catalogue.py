"""The page of all attributions says what is true: which there are, what they cost, whether they can be trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr import Attribution

import captum_idexpo.attr as ours
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import ONE_EACH, PoolNet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")
PATH = Path(__file__).parent.parent / "docs" / "catalogue.py"
spec = importlib.util.spec_from_file_location("catalogue", PATH)
catalogue = importlib.util.module_from_spec(spec)
sys.modules["catalogue"] = catalogue
spec.loader.exec_module(catalogue)

ENTRIES = {entry.name: entry for entries in catalogue.OFFERED.values() for entry in entries}
OF_LAYERS = {"LayerFeatureAblation": 45, "LayerFeaturePermutation": 180}  # activations of the cases' layers
BASES = {"Attribution", "GradientAttribution", "PerturbationAttribution", "LayerAttribution", "NeuronAttribution"}


def attributions(package):
    classes = {name: getattr(package, name) for name in package.__all__ if isinstance(getattr(package, name), type)}
    return {name for name, value in classes.items() if issubclass(value, Attribution)} - BASES


def test_catalogue_names_every_attribution_of_captum_once():
    assert set(ENTRIES) == attributions(ours)
    assert not set(ENTRIES) & set(catalogue.NOT_OFFERED)
    llm = {"LLMAttribution", "LLMGradientAttribution", "RemoteLLMAttribution"}
    assert set(ENTRIES) | set(catalogue.NOT_OFFERED) == attributions(captum.attr) | llm


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.class_name)
def test_catalogue_cost_equals_the_counted_rows(case):
    model, inputs, arguments = case.model(), case.inputs, case.arguments
    rows = 0

    def count(_module, args):
        nonlocal rows
        rows += len(args[0])

    first = model.conv1 if isinstance(model, PoolNet) else model[0]
    explainer = case.explainer(ours, model)
    first.register_forward_pre_hook(count)
    explainer.attribute(inputs, **arguments)
    n_examples = 1 if case.class_name == "LimeBase" else len(inputs)
    features = arguments.get("feature_mask", torch.arange(inputs[0].numel()))
    known = {
        "D": OF_LAYERS.get(case.class_name, int(features.max()) + 1),
        "W": 9,
        "K": len(arguments.get("baselines", [])),
        "n_samples": arguments.get("n_samples", 5),
        "nt_samples": 5,
        "n_steps": arguments.get("n_steps"),
    }
    cost = ENTRIES[case.class_name].cost
    counted = rows / n_examples
    assert eval(f"{counted} {cost if cost.startswith('<=') else '== ' + cost}", known), (counted, cost)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.class_name)
def test_catalogue_says_which_attributions_take_gradients(case):
    """An inner gradient fails where inputs and parameters cannot require it: then the class does not take any."""
    calls = []
    model = case.model()
    original = torch.autograd.grad

    def spy(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    torch.autograd.grad = spy
    try:
        np.random.seed(0)
        case.explainer(ours, model).attribute(case.inputs, **case.arguments)
    finally:
        torch.autograd.grad = original
    assert bool(calls) == ENTRIES[case.class_name].takes_gradients


@pytest.mark.parametrize(
    "case",
    [case for case in ONE_EACH if ENTRIES[case.class_name].gradient == catalogue.GENTLE],
    ids=lambda case: case.class_name,
)
def test_catalogue_says_which_gradients_are_exact(case):
    model = case.model()
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    explainer = case.explainer(ours, model)
    assert_trainable(
        lambda: explainer.attribute(case.inputs, **case.arguments, create_graph=True), model, rtol=1e-5, n_directions=1
    )


def test_catalogue_page_has_a_row_for_each_attribution():
    page = catalogue.page()
    assert all(f"~captum_idexpo.attr.{name}`" in page for name in ENTRIES)
    assert all(f"``{name}``" in page for name in catalogue.NOT_OFFERED)
