"""Axes of layers and series: named, known, or refused; never guessed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo import InsertionDeletion
from captum_idexpo.attr import (
    InputXGradient,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    channels_first,
    steps_first,
    tokens_to_map,
)
from captum_idexpo.baselines import mean_inputs
from captum_idexpo.metrics import insertion, sensitivity_n
from captum_idexpo.regularizers import RightForTheRightReasons, Smoothness, Sparsity
from captum_idexpo.testing import assert_trainable
from tests.attr.test_layouts import IMAGES, SERIES, ChannelsLast, Steps, Tokens, Y

SETTINGS = {"baselines": 0.1, "insertion_weight": 1.0, "deletion_weight": 1.0, "temperature": None}


def transposed(model):
    """A model of series (B, C, T), whose layer has steps first."""
    return nn.Sequential(Transpose(), model)


class Transpose(nn.Module):
    def forward(self, x):
        return x.mT


@pytest.mark.parametrize("steps_come_first", [True, False])
def test_right_reasons_of_a_layer_of_steps_penalises_each_step_by_itself(steps_come_first):
    series = SERIES if steps_come_first else SERIES.mT  # (B, T, F) or (B, C, T)
    model = Steps() if steps_come_first else transposed(Steps())
    layer = model.layer if steps_come_first else model[1].layer
    explainer = LayerGradientXActivation(model, layer)
    maps = explainer.attribute(series, target=Y)  # (B, T, D)
    regularizer = RightForTheRightReasons(model, explainer=explainer, reshape_transform=steps_first)
    for step in range(7):
        annotations = torch.zeros_like(series)
        annotations.movedim(1 if steps_come_first else 2, 0)[step] = 1
        ours = regularizer(series, Y, annotations)["right_reasons"].item()
        assert ours == pytest.approx(float(maps.mean(2)[:, step].square().mean()), rel=1e-9)


@pytest.mark.parametrize("steps_come_first", [True, False])
def test_insertion_deletion_ranks_the_steps_of_a_layer(steps_come_first):
    series = SERIES if steps_come_first else SERIES.mT
    model = Steps() if steps_come_first else transposed(Steps())
    layer = model.layer if steps_come_first else model[1].layer
    steps = torch.arange(7)[:, None] if steps_come_first else torch.arange(7)[None]
    explainer = LayerGradCam(model, layer, reshape_transform=steps_first)
    regularizer = InsertionDeletion(explainer, feature_mask=steps, step_size=1, fraction=1.0, **SETTINGS)
    map = explainer.attribute(series, target=Y).flatten(1)  # one value per step
    maps = map[:, :, None].expand_as(series) if steps_come_first else map[:, None].expand_as(series)
    expected = insertion(model, series, maps, baselines=0.1, feature_mask=steps, target=Y, step_size=1)
    torch.testing.assert_close(regularizer.scores(series, Y).insertion, expected.detach())


@pytest.mark.parametrize("shape", [(3, 5, 5), (3, 4, 6)])
def test_series_whose_axes_do_not_tell_where_the_steps_are_is_refused(shape):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(1, 2, 1)

        def forward(self, x):
            return self.layer(x.mean(1, keepdim=True)[:, :, :5]).flatten(1)[:, :3]

    model, x = Wide().double(), torch.randn(*shape).double()
    with pytest.raises(ValueError, match=r"axes of the input.*cannot be told apart.*5 steps.*interpolate"):
        Sparsity(LayerGradCam(model, model.layer))(x, Y)
    if shape[1] != shape[2]:
        longer = Sparsity(
            LayerGradientXActivation(model, model.layer),
            reshape_transform=lambda map: nn.functional.interpolate(map, 6),
        )
        assert longer(x, Y)["sparsity"].isfinite()


@pytest.mark.parametrize("explainer", [LayerGradientXActivation, LayerGradCam, LayerActivation])
@pytest.mark.parametrize(
    "make",
    [
        lambda explainer, **more: InsertionDeletion(explainer, **SETTINGS, **more),
        Smoothness,
        Sparsity,
        lambda explainer, **more: RightForTheRightReasons(explainer.forward_func, explainer=explainer, **more),
    ],
)
def test_a_layer_of_steps_is_refused_unless_its_axes_are_named(make, explainer):
    model = transposed(Steps())
    layer = explainer(model, model[1].layer)
    annotations = torch.ones(3, 4, 7).double()
    annotations[:, :, 0] = 0
    with pytest.raises(ValueError, match=r"axes of the layer's attribution.*cannot be told apart.*steps_first"):
        make(layer)(SERIES.mT, Y, annotations)
    if explainer is LayerGradCam:
        named = make(LayerGradCam(model, model[1].layer, reshape_transform=steps_first))
    else:
        named = make(layer, reshape_transform=steps_first)
    terms = named(SERIES.mT, Y, annotations)
    assert all(bool(term.isfinite()) for term in terms.values())


def test_a_convolution_over_series_needs_no_transform():
    model = nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(35, 3)).double()
    terms = InsertionDeletion(LayerGradCam(model, model[0]), **SETTINGS)(SERIES.mT, Y)
    assert terms["insertion"].isfinite()
    with pytest.raises(ValueError, match="cannot be told apart"):
        InsertionDeletion(LayerGradCam(model, model[1]), **SETTINGS)(SERIES.mT, Y)
    said = InsertionDeletion(LayerGradCam(model, model[1]), reshape_transform=lambda map: map, **SETTINGS)
    assert said(SERIES.mT, Y)["insertion"].isfinite()


@pytest.mark.parametrize("explainer", [LayerGradientXActivation, LayerIntegratedGradients])
def test_a_channels_last_map_is_refused_unless_its_axes_are_named(explainer):
    model = ChannelsLast()
    with pytest.raises(ValueError, match=r"\(3, 8, 8, 5\) cannot be told apart.*channels_first"):
        Sparsity(explainer(model, model.block))(IMAGES, Y)
    regularizer = Sparsity(explainer(model, model.block), reshape_transform=channels_first)
    (map,) = regularizer.explain(regularizer._read(IMAGES, Y, None, None))
    expected = explainer(model, model.block).attribute(IMAGES, target=Y).mean(3)
    torch.testing.assert_close(map[:, 0].detach(), expected)


def test_tokens_of_a_vision_transformer_are_trained_at_their_patches():
    model = Tokens()
    explainer = LayerGradCam(model, model.norm, reshape_transform=tokens_to_map(4, 4))
    regularizer = InsertionDeletion(explainer, l2_weight=1.0, **SETTINGS)
    map = explainer.attribute(IMAGES, target=Y)
    (ranked,) = regularizer.attribution(IMAGES, Y)
    torch.testing.assert_close(ranked, map.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert_trainable(lambda: tuple(regularizer(IMAGES, Y).values()), model, n_directions=1)
    with pytest.raises(ValueError, match=r"\(3, 17, 6\) has no place in the input.*tokens_to_map\(height, width\)"):
        InsertionDeletion(LayerActivation(model, model.norm), **SETTINGS)(IMAGES, Y)


@pytest.mark.parametrize(("size", "known"), [((7, 7), True), ((4, 4), True), ((3, 7), False), ((14, 7), False)])
def test_maps_of_images_have_the_proportions_of_the_image(size, known):
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.pool, self.same = nn.AdaptiveAvgPool2d(size), nn.Identity()

        def forward(self, x):
            return self.scale * self.same(self.pool(x)).flatten(1)[:, :3] ** 2

    model, images = Pool(), torch.randn(3, 2, 15, 14).double()
    regularizer = Sparsity(LayerGradientXActivation(model, model.same), eval_mode=False)
    if known:
        assert regularizer(images, Y)["sparsity"].isfinite()
    else:
        with pytest.raises(ValueError, match="cannot be told apart"):
            regularizer(images, Y)
    assert Sparsity(LayerGradientXActivation(model, model.pool))(images, Y)["sparsity"].isfinite()


def test_mean_inputs_of_three_axes_are_refused_unless_the_axes_are_named():
    series = torch.stack([torch.full((5, 3), 50.0), torch.full((5, 3), 120.0)]) * torch.tensor([1.0, 2.0, 0.01])
    loader = [(series, torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"axes=\(0, 1\)\) for \(B, T, F\)"):
        mean_inputs(loader)
    torch.testing.assert_close(mean_inputs(loader, axes=(0, 1)), torch.tensor([[[85.0, 170.0, 0.85]]]))
    assert mean_inputs(loader, axes=(0, 2)).shape == (1, 5, 1)
    assert mean_inputs(loader, axes=(0,)).shape == (1, 5, 3)
    assert mean_inputs([(torch.ones(2, 3, 4, 4, 4), 0)]).shape == (1, 3, 1, 1, 1)
    regularizer = InsertionDeletion(InputXGradient(nn.Flatten()), baselines="mean")
    with pytest.raises(ValueError, match="cannot be told apart"):
        regularizer.prepare(loader)
    for axes in ((1,), (0, 3), (0, -1)):
        with pytest.raises(ValueError, match="0 among them"):
            mean_inputs(loader, axes=axes)


def test_smoothness_runs_along_the_axes_that_are_named():
    model = Steps()
    explainer = InputXGradient(model)
    maps = explainer.attribute(SERIES, target=Y)
    for axes in ((1,), (2,), (1, 2)):
        ours = Smoothness(explainer, axes=axes)(SERIES, Y)["smoothness"].item()
        expected = sum(maps.diff(dim=axis).abs().flatten(1).sum(1) for axis in axes).mean()
        assert ours == pytest.approx(float(expected))
    with pytest.raises(ValueError, match=r"cannot be told apart.*axes=\(2,\)"):
        Smoothness(explainer)(SERIES, Y)
    for axes in ((0,), (3,)):
        with pytest.raises(ValueError, match="0 is the batch"):
            Smoothness(explainer, axes=axes)(SERIES, Y)


def test_groups_may_be_ranked_by_their_sum():
    def forward(x):  # the sum of the first group is larger, the mean of the second
        return x @ torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0])

    x, mask = torch.ones(1, 5), torch.tensor([[0, 0, 0, 1, 1]])
    maps = x * torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0])
    settings = {"feature_mask": mask, "outputs": "raw", "step_size": 1, "fraction": 0.5}
    assert insertion(forward, x, maps, **settings).item() == 2.0
    assert insertion(forward, x, maps, group_reduction="sum", **settings).item() == 3.0
    exact = forward(x.diag_embed()[0])[None]
    together = {"feature_mask": mask, "outputs": "raw", "n_samples": 10}
    torch.testing.assert_close(sensitivity_n(forward, x, exact, 1, group_reduction="sum", **together), torch.ones(1))
    with pytest.raises(ValueError, match="'mean' or 'sum', given: 'max'"):
        insertion(forward, x, maps, group_reduction="max", **settings)


def test_insertion_deletion_ranks_groups_by_their_sum():
    model = nn.Linear(5, 2).double()
    x, mask = torch.randn(4, 5).double(), torch.tensor([[0, 0, 0, 1, 1]])
    explainer, y = InputXGradient(model), torch.tensor([0, 1, 0, 1])
    ours = InsertionDeletion(explainer, baselines=0.0, feature_mask=mask, group_reduction="sum").scores(x, y)
    expected = insertion(
        model, x, explainer.attribute(x, target=y), target=y, feature_mask=mask, group_reduction="sum", fraction=0.5
    )
    torch.testing.assert_close(ours.insertion, expected.detach())
