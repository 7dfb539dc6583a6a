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
        assert ours == pytest.approx(float(maps.sum(2)[:, step].square().mean()), rel=1e-9)


@pytest.mark.parametrize("steps_come_first", [True, False])
def test_insertion_deletion_ranks_the_steps_of_a_layer(steps_come_first):
    series = SERIES if steps_come_first else SERIES.mT
    model = Steps() if steps_come_first else transposed(Steps())
    layer = model.layer if steps_come_first else model[1].layer
    explainer = LayerGradCam(model, layer, reshape_transform=steps_first)
    regularizer = InsertionDeletion(explainer, step_size=1, **SETTINGS)
    map = explainer.attribute(series, target=Y)  # (B, 1, 7): one value per step
    map = map.mT if steps_come_first else map
    expected = insertion(model, series, map, baselines=0.1, target=Y, step_size=1, fraction=0.5)
    torch.testing.assert_close(regularizer.scores(series, Y).insertion, expected.detach())
    assert regularizer.scores(series, Y).fractions.shape == (3,)  # of 7 steps the half, not of 28 values


class Wide(nn.Module):
    """A convolution of five steps over series of any size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv1d(1, 2, 1).double()

    def forward(self, x):
        return self.layer(x.mean(1, keepdim=True)[:, :, :5]).square().flatten(1)[:, :3]


def test_a_series_of_which_both_axes_have_as_many_steps_is_refused_until_one_is_named():
    model, x = Wide(), torch.randn(3, 5, 5).double()
    explainer = LayerGradCam(model, model.layer, reshape_transform=lambda tensor: tensor)
    with pytest.raises(ValueError, match=r"axes of the input.*cannot be told apart: both have 5 entries.*\.mT"):
        Sparsity(explainer)(x, Y)
    last = RightForTheRightReasons(model, explainer=explainer, reshape_transform=lambda m: m.sum(1, keepdim=True))
    first = RightForTheRightReasons(model, explainer=explainer, reshape_transform=lambda m: m.sum(1, keepdim=True).mT)
    (map,) = last.explain(last._read(x, Y, None, None))
    assert map.shape == (3, 1, 5)
    (map,) = first.explain(first._read(x, Y, None, None))
    assert map.shape == (3, 5, 1)


def test_a_layer_with_other_steps_than_the_series_is_brought_to_them_by_the_transform():
    model, x = Wide(), torch.randn(3, 4, 10).double()
    explainer = LayerGradientXActivation(model, model.layer)
    with pytest.raises(ValueError, match=r"none has as many entries as the layer has steps, 5.*interpolate"):
        Sparsity(explainer, reshape_transform=lambda map: map)(x, Y)
    longer = Sparsity(explainer, reshape_transform=lambda map: nn.functional.interpolate(map, 10))
    assert longer(x, Y)["sparsity"].isfinite()


@pytest.mark.parametrize("n_channels", [2, 16])
def test_a_strided_convolution_over_series_is_enlarged_along_the_steps(n_channels):
    """Also if it happens to have as many steps as the series has channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(n_channels, 5, 5, stride=4, padding=2), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3))
    x, layer = torch.randn(3, n_channels, 64).double(), model.double()[0]
    map = LayerGradCam(model, layer).attribute(x, target=Y)
    (ranked,) = InsertionDeletion(LayerGradCam(model, layer), **SETTINGS).attribution(x, Y)
    torch.testing.assert_close(ranked, map.repeat_interleave(4, dim=2))


def test_a_convolution_over_rows_is_summed_over_its_channels():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv1d(1, 16, 3, padding=1).double(), nn.Linear(16, 3).double()

        def forward(self, x):
            return self.head(self.conv(x[:, None]).square().mean(2))

    model = Rows()
    for n_columns in (10, 16):
        x = torch.randn(3, n_columns).double()
        explainer = LayerGradientXActivation(model, model.conv)
        (ranked,) = InsertionDeletion(explainer, **SETTINGS).attribution(x, Y)
        torch.testing.assert_close(ranked, explainer.attribute(x, target=Y).sum(1))


def test_grad_cam_of_token_steps_has_a_place_in_token_ids():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()

        def forward(self, tokens):
            return self.head(self.embedding(tokens).tanh().mean(1))

    model, tokens = Reader(), torch.randint(9, (3, 7))
    explainer = LayerGradCam(model, model.embedding, reshape_transform=steps_first)
    (map,) = Sparsity(explainer).explain(Sparsity(explainer)._read(tokens, Y, None, None))
    torch.testing.assert_close(map, explainer.attribute(tokens, target=Y, create_graph=True)[:, 0])


def test_reshape_transform_of_images_is_given_once():
    model = ChannelsLast()
    explainer = LayerGradCam(model, model.block, reshape_transform=channels_first)
    with pytest.raises(ValueError, match="leave it out of the regularizer"):
        Sparsity(explainer, reshape_transform=channels_first)(IMAGES, Y)


def test_reshape_transform_of_a_regularizer_is_refused_if_the_inputs_are_explained():
    with pytest.raises(ValueError, match="this explainer explains the inputs"):
        Sparsity(InputXGradient(Steps()), reshape_transform=channels_first)


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
    with pytest.raises(ValueError, match=r"axes of the layer \(B, 7, 5\) cannot be told apart.*steps_first"):
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
    with pytest.raises(
        ValueError, match=r"LayerGradCam averages.*LayerGradCam\(forward_func, layer, reshape_transform"
    ):
        InsertionDeletion(LayerGradCam(model, model[1]), reshape_transform=lambda map: map, **SETTINGS)
    said = InsertionDeletion(LayerGradCam(model, model[1], reshape_transform=lambda map: map), **SETTINGS)
    assert said(SERIES.mT, Y)["insertion"].isfinite()


@pytest.mark.parametrize("explainer", [LayerGradientXActivation, LayerIntegratedGradients])
def test_a_channels_last_map_is_refused_unless_its_axes_are_named(explainer):
    model = ChannelsLast()
    with pytest.raises(ValueError, match=r"\(B, 8, 8, 5\) cannot be told apart.*channels_first"):
        Sparsity(explainer(model, model.block))(IMAGES, Y)
    regularizer = Sparsity(explainer(model, model.block), reshape_transform=channels_first)
    (map,) = regularizer.explain(regularizer._read(IMAGES, Y, None, None))
    expected = explainer(model, model.block).attribute(IMAGES, target=Y).sum(3)
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


class Pool(nn.Module):
    """An unknown layer of any size."""

    def __init__(self, size, dimensions):
        super().__init__()
        pool = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 2]
        self.scale = nn.Parameter(torch.ones(size[0], *[1] * dimensions, dtype=torch.float64))
        self.pool, self.same = pool(size[1:]), nn.Identity()

    def forward(self, x):
        return self.same(self.scale * self.pool(x)).flatten(1)[:, :3].square()


@pytest.mark.filterwarnings("ignore:The attribution of")
@pytest.mark.parametrize("explainer", [LayerGradientXActivation, LayerGradCam])
@pytest.mark.parametrize(
    ("image", "layer", "known"),
    [
        ((224, 224), (512, 7, 7), True),
        ((32, 32), (16, 32, 32), True),
        ((32, 32), (512, 1, 1), True),
        ((32, 100), (64, 1, 25), True),
        ((16, 112, 112), (64, 16, 56, 56), True),
        ((8, 8), (8, 8, 8), "by definition"),
        ((64, 128), (16, 32, 64), "by definition"),
        ((32, 32), (8, 8, 16), False),
        ((224, 224), (7, 7, 768), False),
    ],
)
def test_a_layer_of_an_image_is_refused_if_its_channels_could_be_last(image, layer, known, explainer):
    model, images = Pool(layer, len(image)), torch.randn(3, 1, *image).double()
    regularizer = Sparsity(explainer(model, model.same))
    if layer == (7, 7, 768):  # larger than the image: made by hand
        model.forward = lambda x: model.same(model.scale.expand(3, 7, 7, 768) * x.mean()).flatten(1)[:, :3]
        model.scale = nn.Parameter(torch.ones(7, 1, 1, dtype=torch.float64))
    if known is True or (known and explainer is LayerGradCam):
        assert regularizer(images, Y)["sparsity"].isfinite()
    else:
        with pytest.raises(ValueError, match=r"cannot be told apart.*channels_first"):
            regularizer(images, Y)


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
    several = [((torch.zeros(2, 5, 3), torch.tensor([[1.0, 100.0], [3.0, 300.0]])), 0)]
    assert mean_inputs(several, axes=((0, 1), None))[1].tolist() == [[2.0, 200.0]]
    with pytest.raises(ValueError, match="one tuple of axes, or None, for each"):
        mean_inputs(several, axes=(0, 1))
    with pytest.raises(ValueError, match=r"must be a tuple, given: 1"):
        mean_inputs(loader, axes=1)
    assert mean_inputs([(torch.ones(2, 1, 4), 0)]).shape == (1, 1, 1)
    by_name = mean_inputs([{"x": torch.ones(2, 4)}], unpack=lambda batch: (batch["x"], None))
    assert by_name.shape == (1, 4)
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
    maps = x * torch.tensor([1.0, 1.0, 1.0, 2.0, 0.9])
    settings = {"feature_mask": mask, "outputs": "raw", "step_size": 1, "fraction": 0.5}
    assert insertion(forward, x, maps, **settings).item() == 2.0
    assert insertion(forward, x, maps, group_reduction="sum", **settings).item() == 3.0
    exact = forward(x.diag_embed()[0])[None]
    together = {"feature_mask": mask, "outputs": "raw", "n_samples": 40}
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
