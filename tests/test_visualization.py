"""Figures hold what was measured, and Captum's own visualization takes what this package returns."""

from __future__ import annotations

import itertools

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import visualization
from matplotlib import pyplot as plt
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from torch import nn

from captum_idexpo.attr import InputXGradient, IntegratedGradients, KernelShap, LayerGradCam, Lime, Saliency
from captum_idexpo.metrics import InsertionDeletionScores, insertion_deletion
from captum_idexpo.training import Sweep
from captum_idexpo.visualization import (
    COLORS,
    draw_heat_map,
    draw_image,
    plot_attribution_bars,
    plot_curves,
    plot_explanations,
    plot_front,
    plot_fronts,
    plot_history,
    plot_quadrants,
    to_captum,
)
from tests.helpers import smooth_conv_net

X = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAN = torch.tensor(float("nan"))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_scores(n_examples=6, n_steps=4, seed=0):
    curves = random(2, n_examples, n_steps, seed=seed)
    fractions = torch.arange(1, n_steps + 1) / n_steps
    return InsertionDeletionScores(*curves.mean(dim=2), fractions, *curves)


@pytest.fixture(autouse=True)
def _no_figure_of_captums_stays():
    yield
    plt.close("all")


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_plot_curves_shows_means_over_the_examples(masked):
    mask = torch.arange(36).reshape(1, 1, 6, 6) % 5 if masked else None
    scores = insertion_deletion(smooth_conv_net(), X, X[:, :1], feature_mask=mask, target=1)
    figure = plot_curves({"a": scores, "b": scores})
    insertion, deletion = figure.axes
    assert [line.get_label() for line in insertion.lines] == [
        f"{name} ({scores.insertion.detach().mean():.2f})" for name in "ab"
    ]
    np.testing.assert_allclose(insertion.lines[0].get_ydata(), scores.insertion_curve.detach().mean(0))
    np.testing.assert_allclose(deletion.lines[1].get_ydata(), scores.deletion_curve.detach().mean(0))
    assert len(insertion.lines[0].get_xdata()) == scores.insertion_curve.shape[1]


def test_plot_curves_averages_different_numbers_of_locations_by_fraction():
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.long)
    mask[0, ..., 3:] = 1  # two locations: steps at 1/2 and 1
    mask[1] = torch.arange(36).reshape(6, 6) // 9  # four
    scores = insertion_deletion(smooth_conv_net(), X[:2], X[:2, :1], feature_mask=mask, target=1)
    few, many = scores.insertion_curve.detach()
    (line,) = plot_curves({"a": scores}).axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), [0.25, 0.5, 0.75, 1])
    expected = [(few[0] + many[0]) / 2, (few[0] + many[1]) / 2, ((few[0] + few[1]) / 2 + many[2]) / 2]
    np.testing.assert_allclose(line.get_ydata(), [*expected, (few[1] + many[3]) / 2])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_plot_curves_of_an_example_has_the_score_as_area(fraction):
    scores = insertion_deletion(smooth_conv_net(), X, X[:, :1], target=1, fraction=fraction)
    for axis, values in zip(plot_curves({"a": scores}, example=2).axes, scores, strict=False):
        (area,) = [each for each in axis.collections if isinstance(each, PolyCollection)]
        x, y = area.get_paths()[0].vertices.T
        value = float(values[2].detach())
        size = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
        assert size / fraction == pytest.approx(value, rel=1e-6)
        assert axis.lines[0].get_label() == f"a ({value:.2f})"
        assert axis.lines[0].get_drawstyle() == "steps-pre"


def with_gains(scores, insertion=0.2, deletion=0.1):
    ones = torch.ones(len(scores.insertion))
    return scores._replace(insertion_gain=insertion * ones, deletion_gain=deletion * ones)


@pytest.mark.parametrize("example", [None, 1])
def test_plot_curves_shows_the_gains_over_random_orders_that_were_measured(example):
    scores = {"a": with_gains(some_scores()), "b": some_scores()}
    insertion, deletion = plot_curves(scores, example=example).axes
    assert [", gain +0.20)" in line.get_label() for line in insertion.lines] == [True, False]
    assert [", gain +0.10)" in line.get_label() for line in deletion.lines] == [True, False]


def test_plot_quadrants_shows_changes_of_gains():
    before, after = with_gains(some_scores()), with_gains(some_scores(seed=1), 0.5, 0.0)
    (axis,) = plot_quadrants(before, after, gains=True).axes
    (points,) = [line for line in axis.lines if len(line.get_xdata()) == 6]
    np.testing.assert_allclose(points.get_xdata(), 0.3, rtol=1e-6)
    np.testing.assert_allclose(points.get_ydata(), -0.1, rtol=1e-6)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("change of insertion gain", "change of deletion gain")
    assert "only insertion gain rises\n100%" in [text.get_text() for text in axis.texts]
    with pytest.raises(ValueError, match="n_random_orders"):
        plot_quadrants(some_scores(), after, gains=True)


def test_plot_curves_distinguishes_many_models_without_colour():
    figure = plot_curves({str(i): some_scores(seed=i) for i in range(20)})
    for axis in figure.axes:
        assert len(axis.lines) == len(axis.get_legend().get_lines()) == 20
        assert len({(line.get_marker(), line.get_linestyle()) for line in axis.lines}) == 20


def test_plot_curves_shows_values_outside_zero_to_one():
    scores = some_scores()
    large = scores._replace(insertion_curve=3 * scores.insertion_curve - 1)
    insertion, deletion = plot_curves({"a": large}, ylabel="price").axes
    y = insertion.lines[0].get_ydata()
    assert insertion.get_ylim()[0] < y.min()
    assert y.max() < insertion.get_ylim()[1]
    assert insertion.get_ylabel() == "price"
    assert deletion.get_ylim() == (-0.02, 1.02)


def test_plot_curves_draws_on_the_given_axes():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 3)
    assert plot_curves({"a": some_scores()}, axes[1:]) is figure
    assert [len(axis.lines) for axis in axes] == [0, 1, 1]


def test_plot_curves_refuses_invalid_scores_axes_and_examples():
    scores = some_scores()
    with pytest.raises(ValueError, match="scores is empty"):
        plot_curves({})
    with pytest.raises(ValueError, match=r"NaN or infinity in insertion curves of 'a', examples \[1\]"):
        plot_curves({"a": scores._replace(insertion_curve=scores.insertion_curve.index_fill(0, torch.tensor(1), NAN))})
    with pytest.raises(ValueError, match="two axes"):
        plot_curves({"a": scores}, matplotlib.figure.Figure().subplots(1, 3))
    for example in (-1, 6):
        with pytest.raises(IndexError, match=f"Example {example} of 'a': its scores hold 0 to 5"):
            plot_curves({"a": scores}, example=example)


# --- quadrants ------------------------------------------------------------------------------------------------------


def test_plot_quadrants_counts_the_examples():
    insertion = torch.tensor([0.1, 0.2, 0.3, -0.1, 0.1, -0.2, 0.0, -0.1])
    kept = torch.tensor([0.1, 0.2, -0.1, 0.1, 0.3, -0.2, 0.2, 0.2])
    before = some_scores(8)
    after = before._replace(insertion=before.insertion + insertion, deletion=before.deletion - kept)
    after.insertion[6] = before.insertion[6]
    (axis,) = plot_quadrants(before, after).axes
    assert {text.get_text() for text in axis.texts} == {
        "both rise\n38%",
        "only insertion rises\n12%",
        "only 1 - deletion rises\n25%",
        "both fall\n12%",
    }
    corners = {text.get_text().split("\n")[0]: text.get_position() for text in axis.texts}
    assert corners["both rise"] == (0.98, 0.98)
    assert corners["only insertion rises"] == (0.98, 0.02)
    x, y = axis.lines[-1].get_data()
    np.testing.assert_allclose(x, insertion, atol=1e-6)
    np.testing.assert_allclose(y, kept, atol=1e-6)
    assert axis.get_title() == "mean change: insertion +0.038, 1 - deletion +0.100\n12.5% on an axis"
    assert axis.get_xlim() == axis.get_ylim()


def test_plot_quadrants_of_equal_scores_lie_on_the_axes():
    (axis,) = plot_quadrants(some_scores(), some_scores()).axes
    assert {text.get_text().split("\n")[1] for text in axis.texts} == {"0%"}
    assert "100.0% on an axis" in axis.get_title()


def test_plot_quadrants_refuses_invalid_scores():
    scores = some_scores()
    with pytest.raises(ValueError, match="same examples before and after; given: 6 and 5"):
        plot_quadrants(scores, some_scores(5))
    with pytest.raises(ValueError, match="given: 0 and 0"):
        plot_quadrants(some_scores(0), some_scores(0))
    with pytest.raises(ValueError, match="NaN or infinity in deletion of 'after'"):
        plot_quadrants(scores, scores._replace(deletion=scores.deletion * NAN))


# --- bars -----------------------------------------------------------------------------------------------------------


def test_plot_attribution_bars_shows_means_with_errors_sorted_by_size():
    values = {"a": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).requires_grad_(), "b": random(5)}
    (axis,) = plot_attribution_bars(values, list("vwxyz")).axes
    means, errors = values["a"].detach().mean(0), values["a"].detach().std(0) / 7**0.5
    order = torch.maximum(means.abs(), values["b"].abs()).argsort(descending=True)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["vwxyz"[i] for i in order]
    a, b = (each for each in axis.containers if hasattr(each, "patches"))
    np.testing.assert_allclose([bar.get_width() for bar in a], means[order], atol=1e-6)
    np.testing.assert_allclose([bar.get_width() for bar in b], values["b"][order], atol=1e-6)
    (whiskers,) = a.errorbar[2]
    np.testing.assert_allclose(
        [(segment[1, 0] - segment[0, 0]) / 2 for segment in whiskers.get_segments()], errors[order], atol=1e-6
    )
    assert b.errorbar is None
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    assert all(bar.get_y() + bar.get_height() <= other.get_y() + 1e-9 for bar, other in zip(a, b, strict=True))
    assert a[0].get_hatch() != b[0].get_hatch()


def test_plot_attribution_bars_shows_only_the_top_features():
    maps = {"before": torch.tensor([0.1, -0.4, 0.2]), "after": torch.tensor([[0.3, 0.0, 0.1]])}
    (axis,) = plot_attribution_bars(maps, top=2).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["feature 1", "feature 0"]
    assert axis.get_xlabel() == "attribution"
    assert len(axis.patches) == 4


def test_plot_attribution_bars_gives_fifteen_models_distinct_looks():
    (axis,) = plot_attribution_bars({str(i): random(2, seed=i) for i in range(15)}).axes
    looks = [(to_hex(bars[0].get_facecolor()), bars[0].get_hatch()) for bars in axis.containers]
    assert len(set(looks)) == 15


@pytest.mark.parametrize(
    ("attributions", "names", "top", "message"),
    [
        ({}, None, None, "attributions is empty"),
        ({"a": torch.ones(3)}, list("vwxyz"), None, "5 feature names for 3 features"),
        ({"a": torch.ones(3), "b": torch.ones(2, 4)}, None, None, r"different numbers of features: {'a': 3, 'b': 4}"),
        ({"a": torch.tensor([1.0, float("nan")])}, None, None, "NaN or infinity in attributions of 'a'"),
        ({"a": torch.ones(2, 3, 4)}, None, None, r"shape \(2, 3, 4\): give \(D,\) or \(B, D\)"),
        ({"a": torch.ones(0, 4)}, None, None, r"shape \(0, 4\)"),
        ({"a": torch.tensor(1.0)}, None, None, r"shape \(\): give"),
        ({"a": torch.ones(3)}, None, 0, "top=0"),
    ],
)
def test_plot_attribution_bars_refuses_invalid_arguments(attributions, names, top, message):
    with pytest.raises(ValueError, match=message):
        plot_attribution_bars(attributions, names, top=top)


# --- images ---------------------------------------------------------------------------------------------------------


def test_plot_explanations_places_maps_beside_their_images():
    maps = torch.randn(3, 1, 6, 6, requires_grad=True)
    figure = plot_explanations(X[:, :1], {"before": maps, "after": 0 * maps}, {"before": "abc", "after": "def"})
    assert len(figure.axes) == 9 + 1
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "before\na", "after\nd", "b", "e", "c", "f"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array().squeeze(), X[0, 0], atol=1e-6)
    np.testing.assert_allclose(figure.axes[2].images[1].get_array(), 0)


def test_plot_explanations_shares_one_colour_scale_between_maps():
    images, maps = random(2, 3, 6, 6), random(2, 1, 6, 6, seed=1)
    positive = plot_explanations(images, {"a": maps, "b": maps[:, 0]})
    signed = plot_explanations(images, {"a": maps, "b": maps - 0.5})
    for figure, colours, limits in ((positive, "inferno", (0, 1)), (signed, "cividis", (-1, 1))):
        for axis in (figure.axes[i] for i in (1, 2, 4, 5)):
            assert axis.images[1].get_cmap().name == colours
            assert axis.images[1].get_clim() == limits
    assert [label.get_text() for label in signed.axes[-1].get_yticklabels()] == ["against", "0", "for"]


def test_draw_heat_map_unsigned_shows_nothing_for_negative_attributions():
    figure = matplotlib.figure.Figure()
    axis = figure.subplots()
    draw_heat_map(axis, random(3, 6, 6), -random(1, 6, 6) - 0.1, signed=False)
    np.testing.assert_allclose(axis.images[1].get_array(), 0)


@pytest.mark.parametrize(("values", "words"), [(0.0, "empty map"), (0.5, "constant map"), (-0.5, "constant map")])
def test_plot_explanations_names_maps_that_say_nothing_and_draws_them_in_the_colour_of_zero(values, words):
    maps = random(2, 1, 8, 8) - 0.5
    maps[1] = values
    figure = plot_explanations(random(2, 3, 8, 8), {"map": maps})
    labels = [[text.get_text() for text in axis.texts] for axis in figure.axes[1:4:2]]
    assert labels == [[], [words]]
    overlay = figure.axes[3].images[-1]
    assert not overlay.get_array().any()
    assert overlay.get_clim() == (-1, 1)


def test_to_captum_warns_of_maps_that_captum_cannot_draw():
    maps = random(3, 1, 8, 8)
    maps[1] = 0
    with pytest.warns(UserWarning, match=r"1 of 3 maps or images are 0 everywhere.*draw_heat_map"):
        array = to_captum(maps)
    with pytest.raises(AssertionError, match="Cannot normalize"):
        visualization.visualize_image_attr(array[1], use_pyplot=False)
    figure = plot_explanations(maps, {"map": maps})  # does not warn
    assert [text.get_text() for text in figure.axes[3].texts] == ["empty map"]


def test_draw_heat_map_sums_the_channels():
    figure = matplotlib.figure.Figure()
    many, one = figure.subplots(1, 2)
    image, attribution = random(3, 6, 6), torch.randn(3, 6, 6)
    draw_heat_map(many, image, attribution)
    draw_heat_map(one, image, attribution.sum(dim=0))
    np.testing.assert_allclose(many.images[1].get_array(), one.images[1].get_array(), atol=1e-6)


def test_plot_explanations_and_draw_heat_map_refuse_invalid_arguments():
    images, maps = random(2, 1, 6, 6), random(2, 1, 6, 6)
    axis = matplotlib.figure.Figure().subplots()
    with pytest.raises(ValueError, match="attributions is empty"):
        plot_explanations(images, {})
    with pytest.raises(ValueError, match="images is empty"):
        plot_explanations(images[:0], {"a": maps[:0]})
    with pytest.raises(ValueError, match="1 maps of 'a' for 2 images"):
        plot_explanations(images, {"a": maps[:1]})
    with pytest.raises(ValueError, match="0 titles of 'a' for 2 images"):
        plot_explanations(images, {"a": maps}, {"b": ["", ""]})
    with pytest.raises(ValueError, match=r"A map of \(3, 3\) pixels on an image of \(6, 6\): .*interpolate"):
        draw_heat_map(axis, images[0], maps[0, :, :3, :3])
    with pytest.raises(ValueError, match="NaN or infinity"):
        draw_heat_map(axis, images[0], maps[0] * NAN)
    with pytest.raises(ValueError, match=r"A map is \(H, W\) or \(C, H, W\); given: \(2, 1, 6, 6\)"):
        draw_heat_map(axis, images[0], maps)
    with pytest.raises(ValueError, match=r"lie in \[.*, 25\d\], not in \[0, 1\]"):
        draw_image(axis, images[0] / images[0].max() * 255)
    with pytest.raises(ValueError, match=r"given: \(2, 6, 6\)"):
        draw_image(axis, X[0])


# --- runs -----------------------------------------------------------------------------------------------------------


def test_plot_history_without_validation_shows_losses_only():
    losses, scores = plot_history([{"epoch": 1, "loss": 0.7, "task": 0.6}]).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "task"]
    assert not scores.lines
    assert scores.texts[0].get_text() == "not measured"


def test_plot_history_separates_losses_from_scores_and_leaves_gaps():
    rows = [
        {"epoch": 1, "loss": 0.7, "seconds_per_step": 1.0, "insertion_weight": 0.1, "valscore": 2.0},
        {"epoch": 2, "loss": float("nan"), "val_accuracy": 0.5, "valscore": 2.5, "deletion_floor_share": 0.5},
    ]
    losses, scores = plot_history(rows).axes
    assert [line.get_label() for line in losses.lines] == ["loss"]
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [0.7, np.nan])
    assert [line.get_label() for line in scores.lines] == ["valscore", "val_accuracy"]
    np.testing.assert_array_equal(scores.lines[1].get_ydata(), [np.nan, 0.5])


def test_plot_history_refuses_invalid_histories():
    with pytest.raises(ValueError, match="history is empty"):
        plot_history([])
    with pytest.raises(ValueError, match='has no "epoch"'):
        plot_history([{"loss": 1.0}])


POINTS = [(0.9, 0.1), (0.8, 0.5), (0.85, 0.4), (0.8, 0.3), (0.7, 0.5), (0.6, 0.9)]
ROWS = Sweep({"accuracy": a, "insertion": b, "error": a * b / 10} for a, b in POINTS)


def test_plot_front_draws_the_front_over_all_settings():
    (axis,) = plot_front(ROWS, ROWS.front()).axes
    settings, front = (line.get_xydata().tolist() for line in axis.lines)
    assert [tuple(point) for point in settings] == POINTS
    assert [tuple(point) for point in front] == [(0.6, 0.9), (0.8, 0.5), (0.85, 0.4), (0.9, 0.1)]


def test_plot_fronts_compares_several_methods():
    other = [{"accuracy": 0.95, "insertion": 0.2, "error": 0.01}]
    (axis,) = plot_fronts({"ours": ROWS, "other": other}, y_error="error").axes
    front, beaten, single = axis.containers
    assert sorted(map(tuple, front[0].get_xydata())) == [(0.6, 0.9), (0.8, 0.5), (0.85, 0.4), (0.9, 0.1)]
    assert sorted(map(tuple, beaten[0].get_xydata())) == [(0.7, 0.5), (0.8, 0.3)]
    assert (front[0].get_fillstyle(), beaten[0].get_fillstyle()) == ("full", "none")
    assert front[0].get_color() == beaten[0].get_color() != single[0].get_color()
    assert front[0].get_marker() != single[0].get_marker()
    assert beaten[0].get_linestyle() == "None"
    for points in (front, beaten):
        (bars,) = points[2]
        for (_, y), segment in zip(points[0].get_xydata(), bars.get_segments(), strict=True):
            (error,) = {
                row["error"] for row in ROWS if row["insertion"] == y and [segment[0, 0], y] == [*row.values()][:2]
            }
            np.testing.assert_allclose(segment[:, 1], [y - error, y + error])
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["ours", "other", "beaten by the same method"]


def test_plot_fronts_takes_other_scores_and_omits_unused_legend_entries():
    rows = [{"one_minus_deletion": 0.2, "fidelity": 0.3}]
    (axis,) = plot_fronts({"a": rows}, "one_minus_deletion", "fidelity").axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("one minus deletion", "fidelity")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a"]


def test_plot_front_and_plot_fronts_refuse_invalid_rows():
    with pytest.raises(ValueError, match="methods is empty"):
        plot_fronts({})
    with pytest.raises(ValueError, match=r"methods\['a'\] is empty"):
        plot_fronts({"a": []})
    with pytest.raises(ValueError, match="rows is empty"):
        plot_front([], [])
    with pytest.raises(ValueError, match="one text per row of the front, 4, given: 1"):
        plot_front(ROWS, ROWS.front(), labels=["a"])
    with pytest.raises(ValueError, match="A row has no 'insertions'; it has: 'accuracy', 'insertion', 'error'"):
        plot_fronts({"a": ROWS}, y="insertions")
    with pytest.raises(ValueError, match="A row has no 'sem'"):
        plot_fronts({"a": ROWS}, y_error="sem")
    for draw in (lambda rows: plot_fronts({"a": rows}), lambda rows: plot_front(rows, rows)):
        with pytest.raises(ValueError, match="'accuracy' is nan in a row"):
            draw([{"accuracy": float("nan"), "insertion": 0.1}])


# --- Captum's own visualization -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((7,), (7,)),
        ((5, 6), (5, 6)),
        ((1, 5, 6), (5, 6, 1)),
        ((3, 5, 6), (5, 6, 3)),
        ((2, 3, 5, 6), (2, 5, 6, 3)),
        ((2, 1, 5, 6), (2, 5, 6, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_to_captum_moves_channels_last(shape, expected, dtype):
    attributions = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    array = to_captum(attributions.requires_grad_() * 2)
    assert array.shape == expected
    assert array.dtype == np.float32
    for index in itertools.product(*map(range, shape)):
        place = index if len(shape) < 3 else (*index[:-3], *index[-2:], index[-3])
        assert array[place] == np.float32(2 * attributions.detach()[index].item())


def test_to_captum_leaves_the_attribution_unchanged():
    attributions = torch.ones(1, 2, 2, requires_grad=True)
    to_captum(attributions)[:] = 5
    assert attributions.eq(1).all()


def test_to_captum_refuses_what_captum_cannot_draw():
    with pytest.raises(ValueError, match=r"Shape \(\)"):
        to_captum(torch.tensor(1.0))
    with pytest.raises(ValueError, match="of volumes take a slice"):
        to_captum(torch.ones(1, 1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"NaN or infinity in attributions, examples \[1\]"):
        to_captum(torch.tensor([[1.0], [float("inf")]]))
    with pytest.raises(TypeError, match="a tensor is needed, given: tuple"):
        to_captum((torch.ones(2),))


CONV_NET = smooth_conv_net()
MASK = torch.arange(36).reshape(1, 1, 6, 6) // 6


def of_layer(x):
    attribution = LayerGradCam(CONV_NET, CONV_NET[4]).attribute(x, target=1, create_graph=True)
    return LayerGradCam.interpolate(attribution, (6, 6))


IMAGE_EXPLAINERS = {
    "Saliency": lambda x: Saliency(CONV_NET).attribute(x, target=1, create_graph=True),
    "InputXGradient": lambda x: InputXGradient(CONV_NET).attribute(x, target=1, create_graph=True),
    "IntegratedGradients": lambda x: IntegratedGradients(CONV_NET).attribute(x, target=1, create_graph=True, n_steps=5),
    "KernelShap": lambda x: KernelShap(CONV_NET).attribute(x, target=1, feature_mask=MASK, create_graph=True),
    "LayerGradCam": of_layer,
}


@pytest.mark.parametrize("name", IMAGE_EXPLAINERS)
def test_captum_draws_trainable_attributions_of_images(name):
    attribution = IMAGE_EXPLAINERS[name](X)
    assert attribution.requires_grad
    maps, images = to_captum(attribution), np.repeat(to_captum(X[:, :1]), 3, axis=3)
    _, axis = visualization.visualize_image_attr(maps[0], images[0], "heat_map", "all", use_pyplot=False)
    total = attribution[0].detach().sum(dim=0).float()
    drawn = torch.tensor(axis.images[0].get_array())
    inside = drawn.abs() < 1  # Captum clips the largest 2%
    assert inside.sum() > 0
    scale = (total[inside] * drawn[inside]).sum() / (drawn[inside] ** 2).sum()
    torch.testing.assert_close(drawn[inside] * scale, total[inside])
    _, axes = visualization.visualize_image_attr_multiple(
        maps[1],
        images[1],
        ["original_image", "heat_map", "blended_heat_map", "masked_image", "alpha_scaling"],
        ["all", "all", "absolute_value", "positive", "positive"],
        use_pyplot=False,
    )
    assert [len(axis.images) for axis in axes] == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("method", ["overlay_individual", "overlay_combined", "colored_graph"])
def test_captum_draws_trainable_attributions_of_series(method, monkeypatch):
    # Captum 0.9.0 calls it; matplotlib 3.11 has it elsewhere only.
    monkeypatch.setattr(matplotlib.cm, "get_cmap", plt.get_cmap, raising=False)
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 10, 2))
    series = random(1, 2, 12)
    attribution = InputXGradient(net).attribute(series, target=0, create_graph=True)
    figure, _ = visualization.visualize_timeseries_attr(
        to_captum(attribution[0]),
        to_captum(series[0]),
        method=method,
        sign="all",
        channels_last=False,
        channel_labels=["heart rate", "breath"],
        use_pyplot=False,
    )
    if method == "colored_graph":
        assert np.isfinite(figure.axes[0].collections[0].get_array()).all()
    else:
        channel = figure.axes[0].lines[0].get_ydata()
        np.testing.assert_allclose(channel, series[0, 0])


def word_attributions():
    net = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(20, 2))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    attribution = Lime(net).attribute(tokens, target=1, create_graph=True, n_samples=30)
    assert attribution.requires_grad
    return attribution[0] / attribution.detach().abs().max()


def test_captum_colours_words_by_trainable_attributions():
    values = torch.tensor([0.5, -0.5, 1.0], requires_grad=True)
    html = visualization.format_word_importances(["good", "bad", "best"], to_captum(values * 1))
    assert html.index("good") < html.index("bad") < html.index("best")
    assert [html.count(colour) for colour in ("hsl(120, 75%, 75%)", "hsl(0, 75%, 80%)", "hsl(120, 75%, 50%)")] == [
        1
    ] * 3


def test_captum_writes_html_of_texts():
    pytest.importorskip("IPython")
    words = ["a", "film", "of", "great", "beauty"]
    values = to_captum(word_attributions())
    record = visualization.VisualizationDataRecord(values, 0.9, 1, 1, 1, values.sum(), words, 0.0)
    html = visualization.visualize_text([record]).data
    assert all(f"{word} " in html for word in words)
    assert f"{values.sum():.2f}" in html
    assert html.count("<mark") == 5


# --- all pictures ---------------------------------------------------------------------------------------------------


def test_pyplot_state_is_unchanged_by_all_plots():
    mine = plt.figure()
    settings = dict(matplotlib.rcParams)
    x, scores = random(2, 1, 6, 6), some_scores()
    figures = [
        plot_curves({"a": scores}),
        plot_quadrants(scores, some_scores(seed=1)),
        plot_attribution_bars({"a": random(3)}),
        plot_explanations(x, {"a": x - 0.5}),
        plot_history([{"epoch": 1, "loss": 0.7}]),
        plot_front(ROWS, ROWS),
        plot_fronts({"a": ROWS}),
    ]
    assert plt.get_fignums() == [mine.number]
    assert plt.gcf() is mine
    assert not mine.axes
    assert dict(matplotlib.rcParams) == settings
    assert len({id(figure) for figure in figures}) == 7


def test_plots_draw_into_a_given_axis():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 3)
    assert plot_quadrants(some_scores(), some_scores(seed=1), axes[0]) is figure
    assert plot_attribution_bars({"a": random(3)}, axis=axes[1]) is figure
    assert plot_fronts({"a": ROWS}, axis=axes[2]) is figure
    assert all(axis.has_data() for axis in axes)


def test_colors_differ_to_colour_blind_readers():
    """In CIE Lab, as deuteranopes and protanopes see them (Machado et al. 2009); grey comes near the fifth colour."""
    linear = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS]) ** 2.2
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protanopia = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    for simulation in (deuteranopia, protanopia):
        seen = lab((linear @ simulation.T).clip(0, 1))
        for group in (seen[1:], seen[:4]):
            assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(group, 2)) > 10


def lab(linear):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(linear @ to_xyz.T / to_xyz.sum(axis=1)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
