"""Every case of Captum's own generated tests for our classes: same numbers, Captum's errors, no hook left behind."""

from __future__ import annotations

import copy

import captum.attr
import pytest
import torch
from captum.testing.attr.helpers.gen_test_utils import get_target_layer, parse_test_config
from captum.testing.attr.helpers.test_config import config

import captum_idexpo.attr
from tests.attr.test_layer import hooks_of
from tests.helpers import LEAST_SQUARES_OF_FULL_RANK_ONLY

pytestmark = pytest.mark.filterwarnings("ignore")

OURS = ("Lime", "KernelShap", "LayerGradCam")
CASES = [
    pytest.param(algorithm.__name__, case, id=f"{algorithm.__name__}-{case['name']}")
    for case in config
    for algorithm in case["algorithms"]
    if algorithm.__name__ in OURS and not case.get("noise_tunnel")
]


def attribution(module, name, case):
    _, model, arguments, layer, _, _ = parse_test_config(case)
    model, arguments = copy.deepcopy(model), copy.deepcopy(arguments)
    layers = () if layer is None else (get_target_layer(model, layer),)
    explainer = getattr(module, name)(model, *layers)
    torch.manual_seed(1234)
    return explainer, model, arguments


@pytest.mark.parametrize(("name", "case"), CASES)
def test_captum_configs_give_captums_numbers(name, case):
    if name == "KernelShap" and LEAST_SQUARES_OF_FULL_RANK_ONLY and "conv" in case["name"]:
        pytest.skip("this scikit-learn is no reference for more features than samples")
    results = []
    for module in (captum.attr, captum_idexpo.attr):
        explainer, model, arguments = attribution(module, name, case)
        results.append(explainer.attribute(**arguments))
        assert not hooks_of(model)
    theirs, ours = results
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=2e-4)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_captum_configs_with_a_wrong_target_fail_and_leave_no_hook(name, case):
    explainer, model, arguments = attribution(captum_idexpo.attr, name, case)
    if "target" not in arguments:
        pytest.skip("this case has no target")
    with pytest.raises(AssertionError):
        explainer.attribute(**{**arguments, "target": (9999,) * 20})
    assert not hooks_of(model)
