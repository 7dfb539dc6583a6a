"""What every attribution has to do: Captum's numbers, the true gradient, no trace left behind."""

from __future__ import annotations

import gc
import weakref

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr import Attribution

import captum_idexpo.attr as ours
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import CASES, ONE_EACH

# Captum's own warnings (hooks, gradients it switches on), which a user of Captum sees, too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_class = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.class_name)


def attribute(package, case, model, **more):
    torch.manual_seed(0)
    np.random.seed(0)
    return case.explainer(package, model).attribute(case.inputs, **case.arguments, **more)


def tensors_of(attribution):
    return list(attribution) if isinstance(attribution, (tuple, list)) else [attribution]


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def test_cases_cover_every_attribution_class():
    classes = {name for name in ours.__all__ if isinstance(getattr(ours, name), type)}
    attributions = {name for name in classes if issubclass(getattr(ours, name), Attribution)}
    assert attributions == {case.class_name for case in CASES}


@each
@pytest.mark.parametrize("create_graph", [False, True])
def test_explainer_equals_captum(case, create_graph):
    model = case.model()
    theirs = attribute(captum.attr, case, model)
    mine = attribute(ours, case, model, create_graph=create_graph)
    assert type(mine) is type(theirs)
    tolerance = 2e-4 if case.class_name == "KernelShap" else 2e-6  # Captum's solve and its sums are in float32
    for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), atol=tolerance, rtol=0, check_dtype=False)
        assert a.requires_grad == create_graph


@each
def test_explainer_gradient_equals_finite_differences(case):
    model = case.model()
    explainer = case.explainer(ours, model)
    # ReLU nets: the seed's inputs and directions are away from kinks.
    assert_trainable(
        lambda: explainer.attribute(case.inputs, **case.arguments, create_graph=True), model, n_directions=1
    )


@each_class
def test_explainer_is_a_subclass_of_captums_class(case):
    mine, theirs = getattr(ours, case.class_name), getattr(captum.attr, case.class_name)
    assert issubclass(mine, theirs)
    assert hasattr(mine.attribute, "__wrapped__")
    assert mine.__doc__ != theirs.__doc__


@each_class
@pytest.mark.parametrize("create_graph", [False, True])
def test_explainer_leaves_model_and_inputs_unchanged(case, create_graph):
    model, inputs = case.model(), case.inputs
    modes = [module.training for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    case.explainer(ours, model).attribute(inputs, **case.arguments, create_graph=create_graph)
    assert not hooks_of(model)
    assert not inputs.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


@each_class
def test_explainer_leaves_no_hooks_after_an_exception(case):
    model = case.model()
    explainer = case.explainer(ours, model)
    inputs = case.inputs[:, :1] if case.class_name != "LimeBase" else case.inputs[:1, :1].expand(1, 5)
    with pytest.raises((RuntimeError, AssertionError, IndexError, ValueError)):
        explainer.attribute(inputs, **case.arguments, create_graph=True)
    assert not hooks_of(model)
    assert torch.is_grad_enabled()


@each_class
def test_explainer_gives_the_same_numbers_in_a_second_call(case):
    model = case.model()
    explainer = case.explainer(ours, model)

    def call(create_graph):
        torch.manual_seed(0)
        np.random.seed(0)
        return tensors_of(explainer.attribute(case.inputs, **case.arguments, create_graph=create_graph))

    for first, second in zip(call(True), call(False), strict=True):
        torch.testing.assert_close(first.detach(), second, atol=1e-12, rtol=1e-9)


@each_class
def test_explainer_sets_the_grad_of_inputs_only_in_the_backward_pass(case):
    """Inputs that require gradient get theirs from the loss, those that do not get none."""
    model, inputs = case.model(), case.inputs.requires_grad_()
    torch.manual_seed(0)
    np.random.seed(0)
    attribution = case.explainer(ours, model).attribute(inputs, **case.arguments, create_graph=True)
    assert inputs.grad is None
    assert inputs.requires_grad
    sum(tensor.square().sum() for tensor in tensors_of(attribution)).backward()
    assert inputs.grad is not None


@each_class
@pytest.mark.parametrize("create_graph", [False, True])
def test_explainer_frees_activations_without_the_garbage_collector(case, create_graph):
    """Without waiting for the collector of reference cycles, which hold on to whole graphs."""
    model, seen = case.model(), []
    explainer = case.explainer(ours, model)
    for module in model.modules():
        module.register_forward_hook(lambda _module, _inputs, output: seen.append(weakref.ref(output)))
    gc.disable()
    try:
        explainer.attribute(case.inputs, **case.arguments, create_graph=create_graph)
        assert seen
        assert not any(tensor() is not None for tensor in seen)
    finally:
        gc.enable()


@each_class
def test_explainer_with_create_graph_under_no_grad_is_an_error(case):
    model = case.model()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"no_grad.*enable_grad"):
        case.explainer(ours, model).attribute(case.inputs, **case.arguments, create_graph=True)


@each_class
def test_explainer_with_create_graph_of_a_frozen_model_is_an_error(case):
    model = case.model().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"depends on nothing that requires gradient.*requires_grad_"):
        case.explainer(ours, model).attribute(case.inputs, **case.arguments, create_graph=True)


@each_class
def test_explainer_without_create_graph_works_under_no_grad(case):
    model = case.model()
    with torch.no_grad():
        silent = attribute(ours, case, model)
    for a, b in zip(tensors_of(silent), tensors_of(attribute(ours, case, model)), strict=True):
        torch.testing.assert_close(a, b)


TAKES_MODULES_ONLY = ("LRP", "DeepLift", "Guided", "Deconvolution")


@pytest.mark.parametrize(
    "case",
    [case for case in ONE_EACH if not any(word in case.class_name for word in TAKES_MODULES_ONLY)],
    ids=lambda case: case.class_name,
)
def test_explainer_gives_a_function_the_same_result_as_its_model(case):
    model = case.model()

    class Function:
        """No module, though the case can pick its layer."""

        def __call__(self, *args):
            return model(*args)

        def __getitem__(self, index):
            return model[index]

    plain = attribute(ours, case, model, create_graph=True)
    wrapped = attribute(ours, case, Function(), create_graph=True)
    for a, b in zip(tensors_of(plain), tensors_of(wrapped), strict=True):
        torch.testing.assert_close(a, b)
        assert b.requires_grad
