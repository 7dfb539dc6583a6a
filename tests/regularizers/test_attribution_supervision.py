"""Both distances against their definitions, true gradients, annotations of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo.attr import InputXGradient, LayerGradCam, LayerIntegratedGradients, Saliency, ShapleyValues
from captum_idexpo.regularizers import AttributionSupervision, RightForTheRightReasons
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1])
COLUMNS = (torch.rand(5, 6, generator=G) < 0.5).double()
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
LABELS = torch.tensor([0, 2, 1])
BOXES = torch.zeros(3, 6, 6, dtype=torch.float64)
BOXES[:, 1:4, 2:5] = 1


def energy_outside(map, mask):
    inside = total = 0.0
    for value, mark in zip(map.flatten().tolist(), mask.flatten().tolist(), strict=True):
        inside += max(value, 0.0) * mark
        total += max(value, 0.0)
    return 1 - inside / total


def squared_difference(map, mask):
    peak = max(map.flatten().tolist())
    pairs = list(zip(map.flatten().tolist(), mask.flatten().tolist(), strict=True))
    return sum((max(value, 0.0) / peak - mark) ** 2 for value, mark in pairs) / len(pairs)


DEFINITIONS = {"energy": energy_outside, "squared": squared_difference}


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_of_columns_is_its_definition(distance):
    explainer = InputXGradient(smooth_net())
    maps = explainer.attribute(X, target=Y)
    expected = sum(DEFINITIONS[distance](*pair) for pair in zip(maps, COLUMNS, strict=True)) / 5
    term = AttributionSupervision(explainer, distance=distance)(X, Y, COLUMNS)["attribution_supervision"]
    assert term.item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_of_pixels_sums_the_map_over_the_channels(distance):
    explainer = InputXGradient(smooth_conv_net())
    maps = explainer.attribute(IMAGES, target=LABELS).sum(dim=1)
    expected = sum(DEFINITIONS[distance](*pair) for pair in zip(maps, BOXES, strict=True)) / 3
    for masks in (BOXES, BOXES[:, None]):
        term = AttributionSupervision(explainer, distance=distance)(IMAGES, LABELS, masks)["attribution_supervision"]
        assert term.item() == pytest.approx(expected)


def test_supervision_of_a_full_mask_tells_the_channels_apart():
    explainer = InputXGradient(smooth_conv_net())
    maps = explainer.attribute(IMAGES, target=LABELS)
    masks = BOXES[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    expected = sum(energy_outside(*pair) for pair in zip(maps, masks, strict=True)) / 3
    term = AttributionSupervision(explainer)(IMAGES, LABELS, masks)["attribution_supervision"]
    assert term.item() == pytest.approx(expected)


def test_supervision_of_tokens_sums_the_map_over_the_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)).double()
    explainer = LayerIntegratedGradients(model, model[0])
    tokens, masks = torch.randint(9, (3, 5), generator=G), BOXES[:, 1, :5]
    maps = explainer.attribute(tokens, target=LABELS, baselines=0).sum(dim=2)
    expected = sum(energy_outside(*pair) for pair in zip(maps, masks, strict=True)) / 3
    regularizer = AttributionSupervision(explainer, attribute_kwargs={"baselines": 0})
    assert regularizer(tokens, LABELS, masks)["attribution_supervision"].item() == pytest.approx(expected)


def test_supervision_of_two_inputs_reads_their_evidence_together():
    explainer = InputXGradient(two_inputs := TwoInputs())
    maps = torch.cat(explainer.attribute((X, X + 1), target=Y), dim=1)
    expected = sum(energy_outside(m, torch.cat([a, 1 - a])) for m, a in zip(maps, COLUMNS, strict=True)) / 5
    term = AttributionSupervision(explainer, model=two_inputs)((X, X + 1), Y, (COLUMNS, 1 - COLUMNS))
    assert term["attribution_supervision"].item() == pytest.approx(expected)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = smooth_net()

    def forward(self, a, b):
        return self.net(a * b.tanh())


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_has_the_true_gradient(distance):
    net = smooth_net()
    regularizer = AttributionSupervision(InputXGradient(net), distance=distance)
    assert_trainable(lambda: regularizer(X, Y, COLUMNS), net)


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_of_a_layer_map_has_the_true_gradient(distance):
    net = smooth_conv_net()
    regularizer = AttributionSupervision(LayerGradCam(net, net[2]), distance=distance)
    assert_trainable(lambda: regularizer(IMAGES, LABELS, BOXES), net)


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_does_not_depend_on_the_scale_of_the_map(distance):
    net = smooth_net()
    small = AttributionSupervision(Saliency(lambda x: 1e-9 * net(x)), distance=distance, model=net)
    large = AttributionSupervision(Saliency(net), distance=distance)
    torch.testing.assert_close(small(X, Y, COLUMNS), large(X, Y, COLUMNS))


def test_supervision_counts_zero_for_examples_without_a_mark():
    regularizer = AttributionSupervision(InputXGradient(smooth_net()))
    masks = COLUMNS.clone()
    masks[2:] = 0
    expected = regularizer(X[:2], Y[:2], masks[:2])["attribution_supervision"] * 2 / 5
    torch.testing.assert_close(regularizer(X, Y, masks)["attribution_supervision"], expected)


def test_supervision_of_multilabel_counts_zero_without_a_true_label():
    net = smooth_net()
    regularizer = AttributionSupervision(InputXGradient(net), outputs="multilabel")
    labels = torch.zeros(5, 3)
    labels[0, 1] = labels[1, 2] = 1
    expected = regularizer(X[:2], torch.tensor([1, 2]), COLUMNS[:2])["attribution_supervision"] * 2 / 5
    torch.testing.assert_close(regularizer(X, labels, COLUMNS)["attribution_supervision"], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_of_an_empty_map_is_finite_and_has_no_gradient(distance):
    net = smooth_net()
    nn.init.zeros_(net[0].weight)
    term = AttributionSupervision(InputXGradient(net), distance=distance)(X, Y, COLUMNS)["attribution_supervision"]
    term.backward()
    assert term.isfinite()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_supervision_warns_once_of_annotations_that_mark_everything():
    regularizer = AttributionSupervision(InputXGradient(smooth_net()))
    with pytest.warns(UserWarning, match="mark every place"):
        regularizer(X, Y, torch.ones(5, 6))
    regularizer(X, Y, torch.ones(5, 6))


def test_supervision_refuses_an_unknown_distance_and_missing_annotations():
    with pytest.raises(ValueError, match=r"distance must be one of .*, given: 'kl'"):
        AttributionSupervision(InputXGradient(smooth_net()), distance="kl")
    with pytest.raises(ValueError, match="annotations are missing"):
        AttributionSupervision(InputXGradient(smooth_net()))(X, Y)


def test_supervision_moves_the_evidence_into_the_marks():
    torch.manual_seed(0)
    net = smooth_net()
    regularizer = AttributionSupervision(InputXGradient(net))
    masks = torch.zeros(5, 6)
    masks[:, :2] = 1
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    before = regularizer(X, Y, masks)["attribution_supervision"].item()
    for _ in range(60):
        optimizer.zero_grad()
        term = regularizer(X, Y, masks)["attribution_supervision"]
        term.backward()
        optimizer.step()
    assert before > 0.3
    assert term.item() < 0.1


@pytest.mark.parametrize("distance", DEFINITIONS)
def test_supervision_of_one_logit_reads_the_evidence_for_either_class(distance):
    one = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    class Two(nn.Module):
        def forward(self, x):
            return torch.cat([-one(x), one(x)], dim=1) / 2

    labels = torch.tensor([0, 1, 0, 0, 1])
    single = AttributionSupervision(InputXGradient(one), distance=distance)
    double = AttributionSupervision(InputXGradient(Two()), distance=distance)
    torch.testing.assert_close(single(X, labels, COLUMNS), double(X, labels, COLUMNS))
    for target in (0, [0, 0, 0, 0, 0]):
        torch.testing.assert_close(single(X, target, COLUMNS), double(X, torch.zeros(5).long(), COLUMNS))
    magnitudes = AttributionSupervision(Saliency(one), distance=distance)
    torch.testing.assert_close(magnitudes(X, labels, COLUMNS), magnitudes(X, 1 - labels, COLUMNS))


def test_supervision_of_soft_marks_and_of_a_mask_of_channels_for_a_layer():
    explainer = InputXGradient(smooth_net())
    soft = COLUMNS * 0.5
    expected = sum(energy_outside(*pair) for pair in zip(explainer.attribute(X, target=Y), soft, strict=True)) / 5
    assert AttributionSupervision(explainer)(X, Y, soft)["attribution_supervision"].item() == pytest.approx(expected)
    net = smooth_conv_net()
    grad_cam = LayerGradCam(net, net[2])
    channels = torch.stack([BOXES, 0 * BOXES], dim=1)
    halves = AttributionSupervision(grad_cam)(IMAGES, LABELS, BOXES / 2)
    torch.testing.assert_close(AttributionSupervision(grad_cam)(IMAGES, LABELS, channels), halves)


def test_supervision_takes_one_mask_for_all_examples():
    shared = COLUMNS[:1]
    regularizer = AttributionSupervision(InputXGradient(smooth_net()))
    torch.testing.assert_close(regularizer(X, Y, shared), regularizer(X, Y, shared.expand(5, -1)))
    two = TwoInputs()
    both = AttributionSupervision(InputXGradient(two), model=two)
    together = both((X, X + 1), Y, (shared, COLUMNS))
    torch.testing.assert_close(together, both((X, X + 1), Y, (shared.expand(5, -1), COLUMNS)))


@pytest.mark.parametrize("masks", [COLUMNS[:1], COLUMNS])
def test_supervision_warns_once_of_examples_without_positive_evidence(masks):
    net, inputs = smooth_net(), X.abs()
    AttributionSupervision(Saliency(net))(inputs, Y, masks)  # magnitudes are positive
    negative = AttributionSupervision(InputXGradient(Negative(net)))
    with pytest.warns(UserWarning, match="5 of 5 annotated examples have no positive evidence"):
        negative(inputs, Y, masks)
    negative(inputs, Y, masks)


class Negative(nn.Module):
    """A network whose input times gradient is negative everywhere for positive inputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return -(self.net[0].weight.square().sum(0) * x).sum(1, keepdim=True).expand(-1, 3)


@pytest.mark.parametrize("distance", DEFINITIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-42])
@pytest.mark.filterwarnings("ignore")
def test_supervision_of_very_small_maps_has_finite_gradients(distance, scale):
    net = smooth_net().float()
    small = InputXGradient(lambda x: scale * net(x))
    regularizer = AttributionSupervision(small, distance=distance, model=net)
    term = regularizer(X.float(), Y, COLUMNS.float())["attribution_supervision"]
    term.backward()
    assert term.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_shapley_values_of_a_single_column_fit_regularizers():
    one = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    explainer = ShapleyValues(one)
    maps = explainer.attribute(X, baselines=0.0).reshape(5, 6)
    labels = torch.ones(5).long()
    supervised = AttributionSupervision(explainer, attribute_kwargs={"baselines": 0.0})
    expected = sum(energy_outside(*pair) for pair in zip(maps, COLUMNS, strict=True)) / 5
    assert supervised(X, labels, COLUMNS)["attribution_supervision"].item() == pytest.approx(expected)
    right = RightForTheRightReasons(one, explainer=explainer, attribute_kwargs={"baselines": 0.0})
    expected = (maps * COLUMNS).square().sum(1).mean().item()
    assert right(X, labels, COLUMNS)["right_reasons"].item() == pytest.approx(expected)
