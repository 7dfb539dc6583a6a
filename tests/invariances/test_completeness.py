"""Attributions add up to the output's difference from the baseline; of a linear model they are known exactly."""

from __future__ import annotations

import pytest
import torch

import captum_idexpo.attr as attr
from captum_idexpo.testing import assert_complete
from tests.invariances.calls import CALLS, feature_mask, tensors_of
from tests.invariances.zoo import CONV_NETS, ONE_EACH, ZOO

# Modules that DeepLIFT has rules for, each used once, and nothing else that is not linear.
RULED = {**CONV_NETS, **{name: ONE_EACH[name] for name in ("BatchNorm", "one column", "many columns", "linear")}}
FEW_FEATURES = [name for name, specimen in ZOO.items() if specimen.shapes[0] in ((6,), (4, 3))]


def problem(specimen, n_examples=3):
    model, inputs = specimen.model(), specimen.inputs(n_examples)
    target = torch.arange(n_examples) % specimen.n_columns

    def explained(*tensors):
        return model(*tensors).gather(1, target[: len(tensors[0]), None])

    return model, inputs, target, explained


def check(name, specimen, rtol=1e-9, **more):
    model, inputs, target, explained = problem(specimen)
    call = CALLS[name]
    assert_complete(
        lambda: call(specimen, inputs, target, model, **more), explained, inputs, specimen.baselines(), rtol=rtol
    )


@pytest.mark.parametrize("name", ["IntegratedGradients", "LayerIntegratedGradients", "LayerConductance"])
@pytest.mark.parametrize("specimen", ZOO)
def test_path_integrals_are_complete(name, specimen):
    check(name, ZOO[specimen], rtol=0.03, n_steps=300)  # ReLU and MaxPool have kinks on the path


@pytest.mark.parametrize("specimen", ZOO)
def test_shapley_value_sampling_is_complete(specimen):
    check("ShapleyValueSampling", ZOO[specimen], feature_mask=None, n_samples=2)


@pytest.mark.parametrize("specimen", FEW_FEATURES)
def test_shapley_values_are_complete(specimen):
    check("ShapleyValues", ZOO[specimen], feature_mask=None)


@pytest.mark.parametrize("specimen", ZOO)
@pytest.mark.parametrize("sampling", ["captum", "independent", "paired", "orthogonal", "leverage"])
def test_kernel_shap_is_complete(specimen, sampling):
    chance = {"generator": None, "share_masks": False} if sampling == "captum" else {}
    check("KernelShap", ZOO[specimen], sampling=sampling, return_input_shape=False, n_samples=9, **chance)


@pytest.mark.parametrize("specimen", ONE_EACH)
def test_kernel_shap_with_enough_samples_equals_shapley_values(specimen):
    specimen = ZOO[specimen]
    model, inputs, target, _ = problem(specimen)
    arguments = {"baselines": specimen.baselines(), "target": target, "feature_mask": feature_mask(specimen)}
    exact = attr.ShapleyValues(model).attribute(inputs, **arguments)
    ours = attr.KernelShap(model).attribute(inputs, **arguments, sampling="independent", n_samples=16)
    for a, b in zip(tensors_of(ours), tensors_of(exact), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("specimen", RULED.values(), ids=RULED)
def test_deep_lift_is_complete(specimen):
    check("DeepLift", specimen)


@pytest.mark.parametrize("specimen", RULED)
def test_layer_deep_lift_is_complete(specimen):
    check("LayerDeepLift", RULED[specimen])


def check_average(name, specimen):
    model, inputs, target, explained = problem(specimen)
    baselines = specimen.inputs(4, seed=3)
    sums = CALLS[name](specimen, inputs, target, model).detach().flatten(1).sum(dim=1)
    references = model(baselines)[:, target].mean(dim=0)
    torch.testing.assert_close(sums, (explained(inputs)[:, 0] - references).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("specimen", RULED.values(), ids=RULED)
def test_deep_lift_shap_is_complete_on_average(specimen):
    check_average("DeepLiftShap", specimen)


@pytest.mark.parametrize("specimen", RULED)
def test_layer_deep_lift_shap_is_complete_on_average(specimen):
    check_average("LayerDeepLiftShap", RULED[specimen])


def test_linear_models_are_explained_exactly():
    specimen = ONE_EACH["linear"]
    model, inputs, target, _ = problem(specimen)
    slopes = (model[1].weight @ model[0].weight)[target].detach()
    baselines = specimen.baselines()
    contributions = slopes * (inputs - baselines)
    groups = feature_mask(specimen)
    grouped = torch.zeros(3, 4, dtype=torch.float64).index_add(1, groups[0], contributions)[:, groups[0]]
    alone = {"feature_mask": None}
    expected = {
        "Saliency": (slopes.abs(), {}),
        "InputXGradient": (slopes * inputs, {}),
        "IntegratedGradients": (contributions, {}),
        "GradientShap": (contributions, {"baselines": baselines, "n_samples": 3}),
        "NoiseTunnel": (slopes.abs(), {"nt_samples": 3}),
        "DeepLift": (contributions, {}),
        "DeepLiftShap": (slopes * (inputs - specimen.inputs(4, seed=3).mean(0)), {}),
        "GuidedBackprop": (slopes, {}),
        "Deconvolution": (slopes, {}),
        "FeatureAblation": (grouped, {}),
        "FeatureAblation of elements": (contributions, alone),
        "Occlusion": (contributions, {"sliding_window_shapes": (1,)}),
        "ShapleyValueSampling": (grouped, {}),
        "ShapleyValues": (grouped, {}),
        "ShapleyValues of elements": (contributions, alone),
        "KernelShap": (grouped, {"n_samples": 8}),
        "KernelShap of elements": (contributions, {**alone, "n_samples": 20}),
    }
    for name, (values, more) in expected.items():
        result = CALLS[name.split(" of ")[0]](specimen, inputs, target, model, **more)
        atol = 1e-8 if name == "IntegratedGradients" else 1e-10  # whose step sizes Captum holds in float32
        torch.testing.assert_close(result, values, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    lime = attr.Lime(model, attr.surrogates.LinearRegression()).attribute(
        inputs, baselines, target=target, n_samples=60, sampling="independent"
    )
    torch.testing.assert_close(lime, contributions, rtol=0, atol=1e-9)
