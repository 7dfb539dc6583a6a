"""Numbers of a feature mask are names: which ones they are, and whether some are missing, changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import captum_idexpo.attr as attr
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, MaskedNeighbors
from tests.helpers import smooth_net
from tests.invariances.calls import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:You are providing multiple inputs")  # Captum's LIME
NET = smooth_net()
MASKED = {
    "FeatureAblation": lambda x, y, mask: attr.FeatureAblation(NET).attribute(x, 0.3, target=y, feature_mask=mask),
    "FeaturePermutation": lambda x, y, mask: attr.FeaturePermutation(
        NET, perm_func=lambda tensor, region: torch.where(region, tensor.flip(0), tensor)
    ).attribute(x, target=y, feature_mask=mask),
    "ShapleyValues": lambda x, y, mask: attr.ShapleyValues(NET).attribute(x, 0.3, target=y, feature_mask=mask),
    "KernelShap": lambda x, y, mask: attr.KernelShap(NET).attribute(
        x, 0.3, target=y, feature_mask=mask, n_samples=64, sampling="independent"
    ),
    "insertion, deletion": lambda x, y, mask: insertion_deletion(
        NET, x, x.flip(1), baselines=0.3, target=y, feature_mask=mask, step_size=1
    )[:2],
    "NeuronFeatureAblation": lambda x, y, mask: attr.NeuronFeatureAblation(NET, NET[0]).attribute(
        x, neuron_selector=1, feature_mask=mask
    ),
}
# The random numbers go with a feature's place among the names, so these keep the order of the names.
ORDERED = {
    "ShapleyValueSampling": lambda x, y, mask: attr.ShapleyValueSampling(NET).attribute(
        x, 0.3, target=y, feature_mask=mask, n_samples=3
    ),
    "FeaturePermutation": lambda x, y, mask: attr.FeaturePermutation(NET).attribute(x, target=y, feature_mask=mask),
    "Lime": lambda x, y, mask: attr.Lime(NET, Ridge(0.1)).attribute(x, 0.3, target=y, feature_mask=mask),
    "Lime, own model": lambda x, y, mask: attr.Lime(NET, _model()).attribute(x, 0.3, target=y, feature_mask=mask),
    "Lime, own functions": lambda x, y, mask: attr.Lime(
        NET, Ridge(0.1), lambda x, perturbed, mask, **_: 1.0 + float(mask.float().mean())
    ).attribute(x, 0.3, target=y, feature_mask=mask),
    "KernelShap, Captum's": lambda x, y, mask: attr.KernelShap(NET).attribute(x, 0.3, target=y, feature_mask=mask),
    "KernelShap, leverage": lambda x, y, mask: attr.KernelShap(NET).attribute(
        x, 0.3, target=y, feature_mask=mask, sampling="leverage", n_samples=7
    ),
    "sensitivity-n": lambda x, y, mask: sensitivity_n(NET, x, x.flip(1), 1, baselines=0.3, target=y, feature_mask=mask),
    "Fidelity": lambda x, y, mask: Fidelity(NET, MaskedNeighbors(0.3, mask))(x, y)["fidelity"],
    "InsertionDeletion": lambda x, y, mask: list(
        InsertionDeletion(attr.Saliency(NET), baselines=0.3, feature_mask=mask)(x, y).values()
    ),
    "layer": lambda x, y, mask: attr.LayerFeatureAblation(NET, NET[2]).attribute(x, target=y, layer_mask=mask[..., :3]),
}


def _model():
    from captum._utils.models.linear_model import SkLearnRidge

    return type("OwnModel", (SkLearnRidge,), {})(alpha=0.1)


def call(function, x, y, mask):
    torch.manual_seed(0)
    return function(x, y, mask)


masks = st.lists(st.integers(0, 3), min_size=6, max_size=6)
names = st.lists(st.integers(-(2**40), 2**40), min_size=4, max_size=4, unique=True)


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", MASKED)
@given(mask=st.lists(masks, min_size=1, max_size=3), names=names, data=st.data())
def test_feature_mask_may_use_any_numbers(name, mask, names, data):
    n_examples = 3 if len(mask) < 3 else len(mask)
    mask = torch.tensor(mask[:1] if len(mask) < 3 else mask)
    if name == "FeaturePermutation":
        mask = mask[:1]
    x = torch.randn(n_examples, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(n_examples) % 3
    renamed = torch.tensor(names)[mask]
    if data.draw(st.booleans()):
        renamed = renamed.double()
    assert_same(call(MASKED[name], x, y, renamed), call(MASKED[name], x, y, mask))


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", ORDERED)
@given(mask=masks.filter(lambda mask: len(set(mask)) > 1), names=names)
def test_feature_mask_gaps_and_offsets_change_nothing(name, mask, names):
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(4) % 3
    mask = torch.tensor([mask])
    renamed = torch.tensor(sorted(names))[mask]
    compact = mask.unique(return_inverse=True)[1]
    assert_same(call(ORDERED[name], x, y, renamed), call(ORDERED[name], x, y, compact))


def test_feature_mask_evaluates_only_features_that_exist():
    rows = []

    def forward(x):
        rows.append(len(x))
        return x.sum(1)

    x, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 999]])
    for explainer in (attr.ShapleyValues(forward), attr.KernelShap(forward), attr.FeatureAblation(forward)):
        rows.clear()
        torch.testing.assert_close(explainer.attribute(x, feature_mask=mask), x)
        assert sum(rows) <= 30


TWO = (torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
ONE_MASK = torch.tensor([[0, 0, 1, 1, 2, 2]])
OF_MASKS = {
    "FeatureAblation": lambda f, x, mask: attr.FeatureAblation(f).attribute(x, feature_mask=mask),
    "FeaturePermutation": lambda f, x, mask: attr.FeaturePermutation(f).attribute(x, feature_mask=mask),
    "ShapleyValueSampling": lambda f, x, mask: attr.ShapleyValueSampling(f).attribute(x, feature_mask=mask),
    "ShapleyValues": lambda f, x, mask: attr.ShapleyValues(f).attribute(x, feature_mask=mask),
    "Lime": lambda f, x, mask: attr.Lime(f, Ridge()).attribute(x, feature_mask=mask),
    "KernelShap": lambda f, x, mask: attr.KernelShap(f).attribute(x, feature_mask=mask),
    "insertion": lambda f, x, mask: insertion_deletion(f, x, x, feature_mask=mask, outputs="raw"),
    "sensitivity-n": lambda f, x, mask: sensitivity_n(f, x, x, 1, feature_mask=mask, outputs="raw"),
    "InsertionDeletion": lambda f, x, mask: InsertionDeletion(
        attr.FeatureAblation(f), baselines=0.0, feature_mask=mask, outputs="raw", eval_mode=False
    ).scores(x),
    "Fidelity": lambda f, x, mask: Fidelity(f, MaskedNeighbors(0.0, mask), outputs="raw", eval_mode=False)(x, None),
}


@pytest.mark.parametrize("name", OF_MASKS)
@pytest.mark.parametrize(
    ("error", "text", "mask"),
    [
        (ValueError, "2 tensors for 1 input", (ONE_MASK, ONE_MASK)),
        (ValueError, r"\(1, 5\) does not fit", ONE_MASK[:, :5]),
        (ValueError, r"\(3, 6\) does not fit", ONE_MASK.repeat(3, 1)),
        (ValueError, r"\(4,\) does not fit", ONE_MASK[0, :4]),
        (TypeError, "whole numbers, one per feature, given: torch.float32", ONE_MASK + 0.5),
        (TypeError, "whole numbers, one per feature, given: torch.bool", ONE_MASK > 0),
        (TypeError, "tensor of whole numbers, given: list", [[0, 0, 1, 1, 2, 2]]),
    ],
)
def test_feature_mask_that_does_not_fit_is_refused_everywhere(name, error, text, mask):
    with pytest.raises(error, match=text):
        OF_MASKS[name](lambda x: x.sum(1), TWO[0], mask)


@pytest.mark.parametrize("name", [name for name in OF_MASKS if name not in ("InsertionDeletion", "Fidelity")])
@pytest.mark.parametrize("n_masks", [1, 3])
def test_feature_mask_needs_one_mask_for_each_input_tensor(name, n_masks):
    masks = (ONE_MASK, torch.tensor([[3, 3, 4]]), ONE_MASK)[:n_masks]
    with pytest.raises(ValueError, match=f"{n_masks} tensors for 2 input tensors"):
        OF_MASKS[name](lambda a, b: a.sum(1) + b.sum(1), TWO, masks)


@pytest.mark.parametrize("name", ["FeatureAblation", "FeaturePermutation", "Occlusion"])
@pytest.mark.parametrize("keyword", ["feature_masks", "targets", "n_sample"])
def test_unknown_keywords_are_refused(name, keyword):
    arguments = {"sliding_window_shapes": (1,)} if name == "Occlusion" else {}
    with pytest.raises(TypeError, match=keyword):
        getattr(attr, name)(NET).attribute(TWO[0], target=1, **arguments, **{keyword: 1})


def test_feature_permutation_is_the_mean_over_n_samples():
    torch.manual_seed(0)
    single = torch.stack([attr.FeaturePermutation(NET).attribute(TWO[0], target=1) for _ in range(5)])
    torch.manual_seed(0)
    for size in (None, 1, 4):
        torch.manual_seed(0)
        mean = attr.FeaturePermutation(NET).attribute(TWO[0], target=1, n_samples=5, perturbations_per_eval=size)
        torch.testing.assert_close(mean, single.mean(0))
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        attr.FeaturePermutation(NET).attribute(TWO[0], target=1, n_samples=0)
