"""Ablation: the literal definition, how many rows a forward pass has, and what Captum accepts."""

from __future__ import annotations

import captum.attr
import pytest
import torch

import captum_idexpo.attr
from captum_idexpo.attr import FeatureAblation, FeaturePermutation, LayerFeatureAblation, Occlusion
from tests.helpers import smooth_conv_net, smooth_net

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def counting(net, rows):
    def forward(*args):
        rows.append(len(args[0]))
        return net(*args)

    return forward


def test_feature_ablation_equals_its_definition():
    net = smooth_net()
    expected = torch.stack([(net(X) - net(X.index_fill(1, torch.tensor([i]), 0.7)))[:, 2] for i in range(6)], dim=1)
    torch.testing.assert_close(FeatureAblation(net).attribute(X, 0.7, target=2), expected.detach())


def test_occlusion_equals_its_definition_in_double_precision():
    net = smooth_conv_net()
    sums, covers = torch.zeros_like(IMAGES), torch.zeros(6, 6)
    for top in (0, 2, 4):  # the last window reaches over the border
        for left in (0, 2, 4):
            covered = IMAGES.clone()
            covered[:, :, top : top + 3, left : left + 3] = 0
            lost = (net(IMAGES) - net(covered))[:, 1].detach()
            sums[:, :, top : top + 3, left : left + 3] += lost[:, None, None, None]
            covers[top : top + 3, left : left + 3] += 1
    occlusion = Occlusion(net).attribute(IMAGES, (2, 3, 3), (1, 2, 2), target=1)
    torch.testing.assert_close(occlusion, sums / covers, atol=1e-12, rtol=0)
    assert occlusion.dtype == torch.float64


def test_feature_ablation_of_a_batch_is_one_forward_pass_by_default():
    net, rows = smooth_net(), []
    explainer = FeatureAblation(counting(net, rows))
    whole = explainer.attribute(X, target=1)
    assert rows == [4, 16, 24]  # four copies are tried to see whether they can share a forward pass
    rows.clear()
    torch.testing.assert_close(explainer.attribute(X, target=1, perturbations_per_eval=2), whole)
    assert rows == [4, 8, 8, 8]
    rows.clear()
    single = explainer.attribute(X[:1], target=1)
    assert rows == [1, 4, 6]
    torch.testing.assert_close(single, whole[:1])


@pytest.mark.parametrize("forward", [lambda x: x.square().sum(), lambda x: x.square().sum()[None], lambda x: 2.0])
@pytest.mark.parametrize("n_examples", [1, 4])
def test_feature_ablation_of_one_value_per_batch_equals_captum(forward, n_examples):
    theirs = captum.attr.FeatureAblation(forward).attribute(X[:n_examples])
    torch.testing.assert_close(FeatureAblation(forward).attribute(X[:n_examples]), theirs)


def test_feature_ablation_of_a_one_row_forward_function_equals_captum():
    def forward(x):
        assert len(x) == 1
        return x.prod(dim=1)

    ours = FeatureAblation(forward).attribute(X[:1])
    torch.testing.assert_close(ours, captum.attr.FeatureAblation(forward).attribute(X[:1]))


def test_feature_ablation_of_groups_across_tensors_equals_captum():
    def forward(a, b):
        return a.sum(1) * b.square().sum(1)

    masks = (torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2, 2]]))
    inputs = (X[:, :3], X[:, 3:])
    theirs = captum.attr.FeatureAblation(forward).attribute(inputs, feature_mask=masks, baselines=(0.5, X[:, 3:] + 1))
    ours = FeatureAblation(forward).attribute(inputs, feature_mask=masks, baselines=(0.5, X[:, 3:] + 1))
    torch.testing.assert_close(ours, theirs)


def test_feature_permutation_in_chunks_equals_captum_after_the_same_seed():
    net = smooth_net()
    for size in (1, 2, 6):
        torch.manual_seed(3)
        theirs = captum.attr.FeaturePermutation(net).attribute(X, target=1, perturbations_per_eval=size)
        torch.manual_seed(3)
        ours = FeaturePermutation(net).attribute(X, target=1, perturbations_per_eval=size)
        torch.testing.assert_close(ours, theirs)
    assert FeaturePermutation(net).attribute(X[:1], target=1).eq(0).all()  # nothing to exchange with, as in Captum


def test_feature_permutation_accepts_a_custom_perm_func():
    net = smooth_net()
    flipped = FeaturePermutation(net, perm_func=lambda x, mask: torch.where(mask, x.flip(0), x))
    expected = torch.stack(
        [(net(X) - net(torch.where(torch.arange(6) == i, X.flip(0), X)))[:, 1] for i in range(6)], dim=1
    )
    torch.testing.assert_close(flipped.attribute(X, target=1), expected.detach())


def test_layer_feature_ablation_repeats_the_target_of_each_example():
    """Captum hands the same four targets to a forward pass of any number of rows."""
    net, target = smooth_conv_net(), torch.tensor([0, 2])
    explainer = LayerFeatureAblation(net, net[8])
    whole = explainer.attribute(IMAGES, target=target)
    one_by_one = torch.cat([explainer.attribute(IMAGES[i : i + 1], target=int(target[i])) for i in range(2)])
    torch.testing.assert_close(whole, one_by_one)


def test_layer_feature_ablation_of_layer_input_and_baselines_equals_captum():
    net = smooth_conv_net()
    arguments = {"target": 1, "layer_baselines": 0.3, "attribute_to_layer_input": True, "perturbations_per_eval": 7}
    theirs = captum.attr.LayerFeatureAblation(net, net[8]).attribute(IMAGES, **arguments)
    torch.testing.assert_close(LayerFeatureAblation(net, net[8]).attribute(IMAGES, **arguments), theirs)


def test_ablation_refuses_bad_arguments():
    net = smooth_net()
    with pytest.raises(AssertionError, match="perturbations_per_eval must be None or"):
        FeatureAblation(net).attribute(X, target=1, perturbations_per_eval=0)
    with pytest.raises(AssertionError, match="cannot exceed input dimensions"):
        Occlusion(net).attribute(X, (7,), target=1)


def test_feature_ablation_shows_progress(capsys):
    FeatureAblation(smooth_net()).attribute(X, target=1, show_progress=True)
    assert "Feature Ablation attribution: 100%" in capsys.readouterr().err


BANK = torch.eye(4, 6, dtype=torch.float64)
FIXED = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["FeatureAblation", "FeaturePermutation", "Occlusion", "ShapleyValueSampling"])
@pytest.mark.parametrize(
    ("forward", "arguments"),
    [
        # As long as the batch, yet no example's.
        (lambda x, bank: (x @ bank.T).sum(1), {"additional_forward_args": BANK}),
        (lambda x, w: x @ w, {"additional_forward_args": torch.ones(6, dtype=torch.float64)}),
        (lambda x: (x * FIXED).sum(1), {}),
        (lambda x: x.mean(0)[:4], {}),  # as many outputs as examples, yet of the whole batch
        (lambda x, s: x[:, 0] * x[:, 1] * sum(s), {"additional_forward_args": ([1.0, 2.0, 3.0, 4.0],)}),
        (lambda x: x.square().sum(1), {"feature_mask": torch.tensor([0, 0, 1, 1, 2, 2])}),
    ],
)
def test_ablation_equals_captum_for_arguments_and_outputs_not_per_example(name, forward, arguments):
    if name == "Occlusion":
        arguments = {key: value for key, value in arguments.items() if key != "feature_mask"}
        arguments["sliding_window_shapes"] = (2,)
    torch.manual_seed(0)
    theirs = getattr(captum.attr, name)(forward).attribute(X, **arguments)
    torch.manual_seed(0)
    ours = getattr(captum_idexpo.attr, name)(forward).attribute(X, **arguments)
    torch.testing.assert_close(ours, theirs, check_dtype=False, atol=1e-5, rtol=0)


def test_feature_permutation_of_several_tensors_equals_captum():
    def forward(a, b):
        return a.sum(1) * b.square().sum(1)

    torch.manual_seed(0)
    theirs = captum.attr.FeaturePermutation(forward).attribute((X[:, :3], X[:, 3:]))
    torch.manual_seed(0)
    torch.testing.assert_close(FeaturePermutation(forward).attribute((X[:, :3], X[:, 3:])), theirs)


def test_feature_ablation_of_dropout_in_training_mode_is_finite():
    net = torch.nn.Sequential(smooth_net(), torch.nn.Dropout()).train()
    torch.manual_seed(0)
    assert FeatureAblation(net).attribute(X, target=1).isfinite().all()


@pytest.mark.parametrize("whole", ["batch norm", "large offset", "centred", "first", "last", "before", "behind"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("FeatureAblation", {}),
        ("FeaturePermutation", {}),
        ("Occlusion", {"sliding_window_shapes": (2,)}),
        ("ShapleyValueSampling", {}),
        ("LayerFeatureAblation", {"layer": 0}),
    ],
)
def test_ablation_of_a_model_that_mixes_examples_equals_captum(name, more, whole):
    torch.manual_seed(0)
    first, last = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)
    middle = [torch.nn.BatchNorm1d(4)] if whole in ("batch norm", "large offset") else []
    net = torch.nn.Sequential(first, *middle, torch.nn.Tanh(), last).double().train()

    def centred(x):
        return x - x.mean(dim=0)

    mixing = {
        "large offset": lambda x: net(x) + 1e4,
        "centred": lambda x: net[1:](centred(net[0](x))),
        "first": lambda x: (lambda y: y - y[:1])(net(x)),
        "last": lambda x: (lambda y: y - y[-1:])(net(x)),
        "before": lambda x: net(x.cumsum(dim=0)),
        "behind": lambda x: net(x.flip(0).cumsum(dim=0).flip(0)),
    }
    forward = mixing.get(whole, net)
    arguments = {"target": 1, **more}
    layers = [first] if "layer" in arguments else []
    arguments.pop("layer", None)
    attributions = []
    for package in (captum.attr, captum_idexpo.attr):
        torch.manual_seed(1)
        attributions.append(getattr(package, name)(forward, *layers).attribute(X, **arguments))
    torch.testing.assert_close(attributions[1], attributions[0].double(), rtol=1e-5, atol=1e-6)


def test_ablation_of_an_empty_batch_is_empty():
    assert FeatureAblation(smooth_net()).attribute(X[:0], target=1).shape == (0, 6)
    assert Occlusion(smooth_net()).attribute(X[:0], (2,), target=1).shape == (0, 6)


@pytest.mark.filterwarnings("ignore:Skipping feature group")
@pytest.mark.parametrize(
    ("explainer", "rows"), [(FeaturePermutation, 1), (FeatureAblation, 0)], ids=["one row", "no rows"]
)
def test_ablation_without_effect_on_the_output_has_a_zero_gradient(explainer, rows):
    net = smooth_net()
    attribution = explainer(net).attribute(X[:rows], target=1, create_graph=True)
    assert attribution.shape == (rows, 6)
    attribution.sum().backward()
    assert not any(parameter.grad.any() for parameter in net.parameters() if parameter.grad is not None)
