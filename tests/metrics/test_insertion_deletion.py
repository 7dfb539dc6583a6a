"""Insertion and deletion against the slow, literal reading of the equations."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_idexpo import NonFiniteError
from captum_idexpo.metrics import deletion, insertion, insertion_deletion
from captum_idexpo.metrics._masking import StepSchedule
from tests.helpers import gradient_error, smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
IMAGES = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=G)
PIXELS = torch.randn(4, 6, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0])


def literal(probability, x, phi, baseline, s_values, direction, temperature=None):
    """Eq. (1)-(8) for one example: loops over steps and locations, one forward pass a copy.

    x, baseline and phi are lists of locations' values; probability takes such a list.
    """
    order = sorted(range(len(phi)), key=lambda d: (-phi[d], d))
    ranked = sorted(phi, reverse=True)
    n_distinct = len(set(phi))
    scores = []
    for s in s_values:
        if temperature is None:
            alpha = [1.0 if d in order[:s] else 0.0 for d in range(len(phi))]
        elif n_distinct == 1:
            alpha = [0.5] * len(phi)
        else:
            t_unit = (n_distinct - 1) / (ranked[0] - ranked[-1])
            threshold = (ranked[s - 1] + ranked[s]) / 2 if s < len(phi) else ranked[-1] - 1 / (2 * t_unit)
            alpha = [1 / (1 + math.exp(-temperature * t_unit * (value - threshold))) for value in phi]
        if direction == "deletion":
            alpha = [1 - a for a in alpha]
        scores.append(probability([a * x[d] + (1 - a) * baseline[d] for d, a in enumerate(alpha)]))
    return sum(scores) / len(scores)


def literal_images(net, phi, baseline, s_values, direction, temperature=None, features=None):
    """The literal score of each image, a location being a pixel or a group of pixels."""
    results = []
    for b in range(len(phi)):
        groups = torch.arange(36) if features is None else features[b].flatten()
        present = sorted(set(groups.tolist()))
        cells = [(groups == group).nonzero().flatten() for group in present]
        pixels = IMAGES[b].flatten(1)
        blank = torch.full_like(pixels, baseline)

        def probability(locations, cells=cells, b=b):
            image = torch.zeros(2, 36, dtype=torch.float64)
            for cell, value in zip(cells, locations, strict=True):
                image[:, cell] = value
            return net(image.view(1, 2, 6, 6)).softmax(1)[0, Y[b]].item()

        values = [phi[b].flatten()[cell].mean().item() for cell in cells]
        x, base = [pixels[:, cell] for cell in cells], [blank[:, cell] for cell in cells]
        results.append(literal(probability, x, values, base, s_values(len(cells)), direction, temperature))
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, "auto", 3.0])
@pytest.mark.parametrize(("fraction", "step_size"), [(1.0, 1), (0.5, 4), (0.34, 5), (1.0, None)])
def test_insertion_deletion_equals_the_equations(temperature, fraction, step_size):
    net = smooth_conv_net()
    step = step_size or 2  # the smallest that gives at most 32 steps of 36

    def s_values(n):
        return range(step, int(fraction * n + 1e-9) + 1, step)

    arguments = {"target": Y, "fraction": fraction, "step_size": step_size, "temperature": temperature}
    scores = insertion_deletion(net, IMAGES, PIXELS, baselines=0.3, **arguments)
    t = 1.0 if temperature == "auto" else temperature
    for direction, ours in (("insertion", scores.insertion), ("deletion", scores.deletion)):
        torch.testing.assert_close(ours.detach(), literal_images(net, PIXELS, 0.3, s_values, direction, t))
    expected = torch.tensor([s / 36 for s in s_values(36)], dtype=torch.float64)
    torch.testing.assert_close(scores.fractions, expected)
    assert scores.insertion_curve.shape == scores.deletion_curve.shape == (4, len(expected))
    torch.testing.assert_close(scores.insertion_curve.mean(1), scores.insertion)
    assert torch.equal(insertion(net, IMAGES, PIXELS, baselines=0.3, **arguments), scores.insertion)
    assert torch.equal(deletion(net, IMAGES, PIXELS, baselines=0.3, **arguments), scores.deletion)


@pytest.mark.parametrize("temperature", [None, "auto"])
def test_feature_mask_groups_are_ranked_and_masked_as_locations(temperature):
    """Groups of different number an example, with gaps: each example has its own D, S and steps."""
    net = smooth_conv_net()
    features = torch.randint(9, (4, 1, 6, 6), generator=torch.Generator().manual_seed(3)) * 2
    features[1] %= 6
    features[2] = 4
    scores = insertion_deletion(
        net,
        IMAGES,
        PIXELS,
        baselines=0.3,
        feature_mask=features,
        target=Y,
        fraction=1.0,
        step_size=1,
        temperature=temperature,
    )
    t = 1.0 if temperature == "auto" else None
    for direction, ours in (("insertion", scores.insertion), ("deletion", scores.deletion)):
        expected = literal_images(net, PIXELS, 0.3, lambda n: range(1, n + 1), direction, t, features)
        torch.testing.assert_close(ours.detach(), expected)
    assert scores.fractions.shape == scores.insertion_curve.shape
    assert (scores.fractions[:, -1] == 1).all()


@pytest.mark.parametrize("n_locations", [1, 31, 32, 33, 64, 65, 97, 98, 129, 1000, 1024])
def test_step_schedule_default_step_is_the_smallest_with_at_most_32_steps(n_locations):
    size = next(size for size in range(1, n_locations + 1) if n_locations // size <= 32)
    schedule = StepSchedule.of(torch.tensor([n_locations]), 1.0, None)
    assert schedule.steps[0].tolist() == list(range(size, n_locations + 1, size))


@pytest.mark.parametrize(
    ("n_locations", "fraction"),
    [(100, 0.53), (75, 0.84), (200, 0.59), (375, 0.072), (1000, 0.251), (500, 0.502), (10, 0.3), (10, 0.29)],
)
def test_step_schedule_rounds_the_number_of_steps_in_double_precision(n_locations, fraction):
    schedule = StepSchedule.of(torch.tensor([n_locations]), fraction, 1)
    assert schedule.steps.shape[1] == math.floor(fraction * n_locations + 1e-9)


def test_insertion_deletion_of_one_superpixel_takes_one_step():
    net, features = smooth_conv_net(), torch.arange(36).view(1, 1, 6, 6).repeat(4, 1, 1, 1) // 6
    features[1] = 0
    scores = insertion_deletion(net, IMAGES, PIXELS, feature_mask=features, target=Y, fraction=0.5, step_size=3)
    whole = net(IMAGES).softmax(1)[1, Y[1]]
    torch.testing.assert_close(scores.insertion[1], whole)
    assert float(scores.fractions[1, 0]) == 1.0
    assert scores.fractions[0].tolist() == [0.5]


@pytest.mark.parametrize("mask", ["(1, 1, H, W)", "(1, C, H, W)", "(H, W)"])
@pytest.mark.parametrize("attribution", ["pixels", "elements"])
def test_insertion_accepts_masks_and_maps_with_one_channel_or_all(mask, attribution):
    net, cells = smooth_conv_net(), torch.arange(36).view(6, 6) // 12
    shapes = {"(1, 1, H, W)": cells[None, None], "(1, C, H, W)": cells.expand(1, 2, 6, 6), "(H, W)": cells}
    phi = PIXELS if attribution == "pixels" else PIXELS[:, None].expand(4, 2, 6, 6)
    ours = insertion(net, IMAGES, phi, feature_mask=shapes[mask], target=Y)
    expected = insertion(net, IMAGES, PIXELS, feature_mask=cells[None, None], target=Y)
    torch.testing.assert_close(ours, expected)


def test_insertion_broadcasts_masks_and_baselines_without_a_batch_axis():
    """Captum would read a first size equal to the batch's as one row an example."""
    net = smooth_conv_net()
    images, maps = IMAGES.repeat(2, 1, 1, 1)[:6], PIXELS.repeat(2, 1, 1)[:6]
    mask = torch.arange(36).view(6, 6) // 12
    baseline = torch.randn(2, 6, 6, dtype=torch.float64)
    whole = insertion(net, images, maps, baselines=baseline, feature_mask=mask, target=1)
    for b in range(6):
        alone = insertion(net, images[b : b + 1], maps[b : b + 1], baselines=baseline, feature_mask=mask, target=1)
        torch.testing.assert_close(whole[b : b + 1], alone)
    columns, x = torch.randn(6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    whole = insertion(smooth_net(), x, x, baselines=columns, target=1)
    torch.testing.assert_close(whole[:1], insertion(smooth_net(), x[:1], x[:1], baselines=columns, target=1))


def test_insertion_of_raw_outputs_of_one_value_needs_no_target():
    net = smooth_conv_net(n_classes=1)
    expected = insertion(net, IMAGES, PIXELS, outputs="raw")
    for shape in ((-1,), (-1, 1, 1)):
        ours = insertion(lambda x, s=shape: net(x).reshape(s), IMAGES, PIXELS, outputs="raw")
        torch.testing.assert_close(ours, expected)


def test_insertion_accepts_pixel_maps_with_a_channel_axis():
    net = smooth_conv_net()
    ours = insertion(net, IMAGES, PIXELS[:, None], target=Y)
    assert torch.equal(ours, insertion(net, IMAGES, PIXELS, target=Y))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()

    def forward(self, a, b, scale=1.0):
        return torch.tanh(self.first(a) + self.second(b.flatten(1))) * scale


@pytest.mark.parametrize("temperature", [None, "auto"])
def test_insertion_ranks_a_tuple_of_inputs_together(temperature):
    net = TwoInputs()
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64)
    phi_a, phi_b = torch.randn_like(a), torch.randn_like(b)
    scale = torch.rand(4, 1, dtype=torch.float64)
    arguments = {"additional_forward_args": scale, "target": Y, "temperature": temperature, "step_size": 2}
    ours = insertion(net, (a, b), (phi_a, phi_b), baselines=(0.1, torch.full((1, 2, 2), 0.2).double()), **arguments)
    for i in range(4):

        def probability(values, i=i):
            first, second = torch.stack(values[:3])[None], torch.stack(values[3:]).view(1, 2, 2)
            return net(first, second, scale[i]).softmax(1)[0, Y[i]].item()

        x = [*a[i], *b[i].flatten()]
        base = [torch.tensor(0.1).double()] * 3 + [torch.tensor(0.2).double()] * 4
        phi = [*phi_a[i].tolist(), *phi_b[i].flatten().tolist()]
        expected = literal(probability, x, phi, base, [2, 4, 6], "insertion", 1.0 if temperature else None)
        assert float(ours[i].detach()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ids_first", [False, True])
def test_insertion_keeps_integer_inputs_integer_under_hard_masks(ids_first):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(9, 4).double(), nn.Linear(3 + 20, 3).double()
    x, ids = torch.randn(4, 3, dtype=torch.float64), torch.randint(1, 9, (4, 5))
    phi = torch.randn(4, 3), torch.randn(4, 5)

    def floats_first(x, ids):
        return head(torch.cat([x, embedding(ids).flatten(1)], dim=1))

    def order(pair):
        return pair[::-1] if ids_first else pair

    forward = (lambda ids, x: floats_first(x, ids)) if ids_first else floats_first
    ours = insertion(forward, order((x, ids)), order(phi), baselines=order((0.0, 0)), target=Y)
    # One group for each token's embedding, the rows of which are masked by that of token 0.
    groups = torch.arange(3)[None], torch.arange(3, 8)[None, :, None].expand(1, 5, 4)
    embedded = (x, embedding(ids).detach())
    spread = (phi[0], phi[1][..., None].expand(-1, -1, 4))
    baselines = (0.0, embedding.weight[0].detach().expand(1, 5, 4))
    theirs = insertion(
        lambda x, e: head(torch.cat([x, e.flatten(1)], dim=1)),
        embedded,
        spread,
        baselines=baselines,
        feature_mask=groups,
        target=Y,
    )
    torch.testing.assert_close(ours, theirs)


def test_insertion_deletion_soft_scores_tend_to_the_hard_scores():
    net = smooth_conv_net()
    hard = insertion_deletion(net, IMAGES, PIXELS, target=Y)
    distances = []
    for temperature in (1.0, 10.0, 1e6):
        soft = insertion_deletion(net, IMAGES, PIXELS, target=Y, temperature=temperature)
        distances.append(float((soft.insertion - hard.insertion).detach().abs().max()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-9


def test_insertion_breaks_ties_by_position():
    phi = torch.tensor([[1.0, 2.0, 1.0, 2.0]])
    values = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    curve = insertion_deletion(lambda x: x.sum(1), values, phi, outputs="raw").insertion_curve
    assert curve.tolist() == [[10.0, 1010.0, 1011.0, 1111.0]]


@pytest.mark.filterwarnings("ignore:The attribution of")
@pytest.mark.parametrize("temperature", [None, "auto"])
def test_insertion_of_a_constant_map_is_finite_and_affects_no_other_map(temperature):
    net, phi = smooth_conv_net(), PIXELS.clone()
    phi[2] = 0.7
    phi.requires_grad_()
    scores = insertion(net, IMAGES, phi, baselines=0.3, target=Y, temperature=temperature)
    others = insertion(
        net, IMAGES[[0, 1, 3]], PIXELS[[0, 1, 3]], baselines=0.3, target=Y[[0, 1, 3]], temperature=temperature
    )
    torch.testing.assert_close(scores[[0, 1, 3]], others)
    if temperature:
        blend = net(0.5 * IMAGES[2:3] + 0.5 * 0.3).softmax(1)[0, Y[2]]
        torch.testing.assert_close(scores[2], blend)
        (gradient,) = torch.autograd.grad(scores.sum(), phi)
        assert gradient.isfinite().all()
        assert not gradient[2].any()
        assert gradient[[0, 1, 3]].abs().amax((1, 2)).min() > 0


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_insertion_deletion_of_an_equal_valued_map_ignores_group_sizes():
    """The mean over a group of equal float32 values is that value, so ties between groups stay ties."""
    net, x = smooth_net(40).float(), torch.randn(1, 40)
    mask = torch.tensor([[0] * 3 + [1] * 7 + [2] * 11 + [3] * 19])
    soft = insertion_deletion(net, x, torch.full((1, 40), 0.1), feature_mask=mask, target=1, temperature="auto")
    torch.testing.assert_close(soft.insertion, net(0.5 * x).softmax(1)[:, 1])


def test_insertion_of_a_nearly_constant_map_has_a_finite_gradient():
    phi = torch.full((1, 4), 0.0)
    phi[0, 0] = 1e-45
    phi.requires_grad_()
    score = insertion(nn.Linear(4, 2), torch.randn(1, 4), phi, target=1, temperature="auto")
    assert torch.autograd.grad(score.sum(), phi)[0].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, "auto", 2.5]), st.floats(0.2, 1.0), st.integers(1, 3))
def test_insertion_deletion_of_an_example_does_not_depend_on_its_batch(seed, temperature, fraction, step_size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 18, dtype=torch.float64, generator=generator)
    phi = torch.randint(-3, 4, (5, 18), generator=generator).double()
    net = smooth_net(18)
    arguments = {"fraction": fraction, "step_size": step_size, "temperature": temperature}
    together = insertion_deletion(net, x, phi, target=1, **arguments)
    assert ((together.insertion >= 0) & (together.insertion <= 1)).all()
    for b in range(5):
        alone = insertion_deletion(net, x[b : b + 1], phi[b : b + 1], target=1, **arguments)
        torch.testing.assert_close(together.insertion[b], alone.insertion[0])
        torch.testing.assert_close(together.deletion[b], alone.deletion[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.floats(-5.0, 5.0), st.sampled_from([None, "auto"]))
def test_insertion_does_not_depend_on_the_scale_and_offset_of_the_map(seed, scale, offset, temperature):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 10, dtype=torch.float64, generator=generator)
    phi = torch.randn(2, 10, dtype=torch.float64, generator=generator)
    net = smooth_net(10)
    a = insertion(net, x, phi, target=0, temperature=temperature)
    b = insertion(net, x, scale * phi + offset, target=0, temperature=temperature)
    torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_deletion_in_one_order_equals_insertion_in_the_reverse_order():
    """Deleting the top s leaves what inserting the lowest D - s puts in."""
    net = smooth_conv_net()
    forward = insertion_deletion(net, IMAGES, PIXELS, target=Y, step_size=1)
    backward = insertion_deletion(net, IMAGES, -PIXELS, target=Y, step_size=1)
    torch.testing.assert_close(forward.deletion_curve[:, :-1].flip(1), backward.insertion_curve[:, :-1])


@pytest.mark.parametrize("max_examples_per_batch", [1, 3, 4, 7, 1000])
def test_insertion_deletion_does_not_depend_on_the_chunk_size(max_examples_per_batch):
    rows = []
    net = smooth_conv_net()

    def forward(x):
        rows.append(len(x))
        return net(x)

    whole = insertion_deletion(net, IMAGES, PIXELS, target=Y)
    chunked = insertion_deletion(forward, IMAGES, PIXELS, target=Y, max_examples_per_batch=max_examples_per_batch)
    torch.testing.assert_close(chunked.insertion, whole.insertion, atol=1e-12, rtol=0)
    torch.testing.assert_close(chunked.deletion, whole.deletion, atol=1e-12, rtol=0)
    assert max(rows) <= max_examples_per_batch


def test_insertion_accepts_numpy_integers_as_step_size():
    net = smooth_conv_net()
    ours = insertion(net, IMAGES, PIXELS, target=Y, step_size=np.int64(4))
    assert torch.equal(ours, insertion(net, IMAGES, PIXELS, target=Y, step_size=4))


def test_insertion_deletion_hard_scores_repeat_bit_for_bit():
    net = smooth_conv_net().float()
    scores = [insertion_deletion(net, IMAGES.float(), PIXELS.float(), target=Y) for _ in range(3)]
    for other in scores[1:]:
        assert all(torch.equal(a, b) for a, b in zip(scores[0][:5], other[:5], strict=True))


# --- what the forward function returns -----------------------------------------------------------------------------


def test_insertion_deletion_agrees_for_all_kinds_of_outputs():
    net = smooth_conv_net()
    kinds = {
        "logits": net,
        "log_probabilities": lambda x: net(x).log_softmax(1),
        "probabilities": lambda x: net(x).softmax(1),
    }
    scores = [insertion_deletion(f, IMAGES, PIXELS, target=Y, outputs=kind) for kind, f in kinds.items()]
    raw = insertion_deletion(lambda x: net(x).softmax(1), IMAGES, PIXELS, target=Y, outputs="raw")
    for other in (*scores[1:], raw):
        torch.testing.assert_close(other.insertion, scores[0].insertion)
        torch.testing.assert_close(other.deletion, scores[0].deletion)


@pytest.mark.parametrize("shape", ["(B, 1)", "(B,)"])
def test_insertion_deletion_of_one_column_treats_it_as_class_1(shape):
    net, y = smooth_conv_net(n_classes=1), torch.tensor([0, 1, 1, 0])
    column = net if shape == "(B, 1)" else lambda x: net(x)[:, 0]
    two = lambda x: torch.cat([torch.zeros_like(net(x)), net(x)], 1)  # noqa: E731
    sign = (2 * y - 1).view(4, 1, 1)
    expected = insertion_deletion(two, IMAGES, PIXELS * sign, target=y)
    kinds = {
        "logits": column,
        "log_probabilities": lambda x: nn.functional.logsigmoid(column(x)),
        "probabilities": lambda x: column(x).sigmoid(),
    }
    for kind, forward in kinds.items():
        ours = insertion_deletion(forward, IMAGES, PIXELS, target=y, outputs=kind)
        torch.testing.assert_close(ours.insertion, expected.insertion)
        torch.testing.assert_close(ours.deletion, expected.deletion)
    missing = insertion(column, IMAGES, PIXELS)  # class 1, the column
    torch.testing.assert_close(missing, insertion(two, IMAGES, PIXELS, target=1))


def test_insertion_accepts_targets_in_all_of_captums_forms():
    net = smooth_conv_net()
    expected = insertion(net, IMAGES, PIXELS, target=Y)
    for target in ([0, 1, 2, 0], [(0,), (1,), (2,), (0,)], Y.int(), list(Y.numpy())):
        assert torch.equal(insertion(net, IMAGES, PIXELS, target=target), expected)
    one = insertion(net, IMAGES, PIXELS, target=2)
    for target in (torch.tensor(2), torch.tensor([2]), (2,)):
        assert torch.equal(insertion(net, IMAGES, PIXELS, target=target), one)

    def sequence(x):  # (B, 2, 3): the last axis holds the classes
        return torch.stack([net(x), -net(x)], 1)

    expected = insertion(lambda x: -net(x), IMAGES, PIXELS, target=2)
    assert torch.equal(insertion(sequence, IMAGES, PIXELS, target=(1, 2)), expected)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, "auto"])
def test_insertion_deletion_has_the_true_gradient_in_the_weights(temperature):
    """With a fixed attribution the scores are functions of the model alone."""
    net = smooth_conv_net()

    def loss():
        scores = insertion_deletion(net, IMAGES, PIXELS, target=Y, temperature=temperature, max_examples_per_batch=5)
        return (scores.insertion - 2 * scores.deletion).sum()

    assert gradient_error(loss, net) < 1e-5


def test_insertion_gradient_in_the_attribution_is_that_of_the_masks():
    """T and t_s are constants of the equations: the literal masks, differentiated with both held, give the gradient."""
    net, phi = smooth_net(), torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, 6, dtype=torch.float64)
    (ours,) = torch.autograd.grad(insertion(net, x, phi, target=1, temperature="auto", fraction=0.5).sum(), phi)
    ranked = phi.detach().sort(1, descending=True).values
    t = 5 / (ranked[:, :1] - ranked[:, -1:])
    total = 0
    for s in (1, 2, 3):
        threshold = (ranked[:, s - 1] + ranked[:, s])[:, None] / 2
        total = total + net(torch.sigmoid(t * (phi - threshold)) * x).softmax(1)[:, 1] / 3
    (expected,) = torch.autograd.grad(total.sum(), phi)
    torch.testing.assert_close(ours, expected)


def test_insertion_follows_the_ambient_gradient_mode():
    net = smooth_conv_net()
    assert insertion(net, IMAGES, PIXELS, target=Y).requires_grad
    with torch.no_grad():
        assert not insertion(net, IMAGES, PIXELS, target=Y, temperature="auto").requires_grad
    with torch.inference_mode():
        insertion(net, IMAGES, PIXELS, target=Y)


# --- gains over random orders --------------------------------------------------------------------------------------

ROWS = torch.randn(5, 4, dtype=torch.float64, generator=G)
ROWS_Y = torch.tensor([0, 2, 1, 1, 0])


def mean_over_all_orders(net, x, y, values, temperature):
    """Insertion and deletion of one row, averaged over all orders of its 4 columns, each equally likely."""

    def probability(locations):
        return net(torch.stack(locations)[None]).softmax(1)[0, y].item()

    means = []
    for direction in ("insertion", "deletion"):
        scores = []
        for order in itertools.permutations(range(4)):
            phi = [float(-order[d]) if temperature is None else values[order[d]] for d in range(4)]
            scores.append(literal(probability, x, phi, torch.full((4,), 0.1), range(1, 5), direction, temperature))
        means.append(sum(scores) / len(scores))
    return means


@pytest.mark.parametrize("phi", [torch.randn(5, 4, generator=G).double(), torch.tensor([2.0, 0, 0, 1]).expand(5, 4)])
@pytest.mark.parametrize("temperature", [None, "auto"])
def test_gains_are_differences_to_the_mean_over_random_orders(temperature, phi):
    net = smooth_net(n_features=4).requires_grad_(False)
    arguments = {"baselines": 0.1, "target": ROWS_Y, "temperature": temperature, "n_random_orders": 1}
    generator = torch.Generator().manual_seed(0)
    draws = [insertion_deletion(net, ROWS, phi, **arguments, generator=generator) for _ in range(300)]
    slope = None if temperature is None else 1.0
    for b, (x, y) in enumerate(zip(ROWS, ROWS_Y, strict=True)):
        by_chance = mean_over_all_orders(net, x, y, phi[b].tolist(), slope)
        for gain, expected in (
            ("insertion_gain", float(draws[0].insertion[b]) - by_chance[0]),
            ("deletion_gain", by_chance[1] - float(draws[0].deletion[b])),
        ):
            values = torch.stack([getattr(draw, gain)[b] for draw in draws])
            error = float(values.std()) / len(values) ** 0.5
            assert float(values.mean()) == pytest.approx(expected, abs=4 * error + 1e-9)


def test_gains_average_over_the_orders_and_repeat_with_the_generator():
    net, phi = smooth_net(n_features=4), torch.randn(5, 4, generator=G).double()

    def gains(n, generator):
        return insertion_deletion(net, ROWS, phi, target=ROWS_Y, n_random_orders=n, generator=generator)

    generator = torch.Generator().manual_seed(0)
    single = [gains(1, generator) for _ in range(3)]
    together = gains(3, torch.Generator().manual_seed(0))
    for name in ("insertion_gain", "deletion_gain"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(g, name) for g in single) / 3)
    before = torch.random.get_rng_state()
    scores = gains(0, None)
    assert scores[5:] == (None, None)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gains_draw_an_order_for_each_example():
    net = smooth_net(n_features=4)
    same = ROWS[:1].expand(30, 4)
    for temperature in (None, "auto"):
        scores = insertion_deletion(net, same, same, target=0, temperature=temperature, n_random_orders=1)
        assert len({round(float(gain), 9) for gain in scores.insertion_gain.detach()}) > 5


def test_gains_of_groups_shuffle_the_groups_that_an_example_has():
    """A group that an example lacks takes no place in its order: two groups have two orders, three have six."""
    net, x = smooth_net(n_features=4).requires_grad_(False), ROWS[:2]
    mask = torch.tensor([[0, 0, 1, 1], [5, 7, 9, 9]])
    phi = torch.tensor([[1.0, 1, 2, 2], [3, 2, 1, 1]]).double()
    for temperature in (None, "auto"):
        seen = set()
        for seed in range(60):
            generator = torch.Generator().manual_seed(seed)
            scores = insertion_deletion(
                net, x, phi, target=ROWS_Y[:2], feature_mask=mask, temperature=temperature, n_random_orders=1,
                generator=generator,
            )  # fmt: skip
            seen.add((0, round(float(scores.insertion_gain[0]), 9)))
            seen.add((1, round(float(scores.insertion_gain[1]), 9)))
        assert [len([1 for row, _ in seen if row == b]) for b in (0, 1)] == [2, 6]
        assert {(0, 0.0), (1, 0.0)} <= seen  # the attribution's own order is one of them


def test_gains_have_the_gradient_of_the_scores_in_the_attribution():
    net, phi = smooth_net(n_features=4), torch.randn(5, 4, generator=G).double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    scores = insertion_deletion(
        net, ROWS, phi, target=ROWS_Y, temperature="auto", n_random_orders=2, generator=generator
    )
    for gain, score in ((scores.insertion_gain, scores.insertion), (scores.deletion_gain, -scores.deletion)):
        (of_gain,) = torch.autograd.grad(gain.sum(), phi, retain_graph=True)
        (of_score,) = torch.autograd.grad(score.sum(), phi, retain_graph=True)
        torch.testing.assert_close(of_gain, of_score)


@pytest.mark.parametrize("n_random_orders", [-1, 1.5, True, "3"])
def test_gains_need_a_number_of_orders(n_random_orders):
    with pytest.raises(ValueError, match="n_random_orders must be 0 or a positive integer"):
        insertion_deletion(smooth_net(n_features=4), ROWS, ROWS, target=0, n_random_orders=n_random_orders)


# --- bad input -----------------------------------------------------------------------------------------------------


def broken(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[40] = value
    return tensor


NET = smooth_conv_net()
BAD = {
    "NaN attribution": (
        NonFiniteError,
        r"NaN or infinity in attributions, examples \[1\]",
        {"attributions": broken(PIXELS, math.nan)},
    ),
    "infinite attribution": (NonFiniteError, "attributions", {"attributions": broken(PIXELS, math.inf)}),
    "NaN input": (NonFiniteError, "infinity in inputs", {"inputs": broken(IMAGES, math.nan)}),
    "infinite input": (NonFiniteError, "inputs", {"inputs": broken(IMAGES, -math.inf)}),
    "coarse map": (ValueError, "interpolate", {"attributions": torch.randn(4, 1, 3, 3)}),
    "another batch": (ValueError, "fit neither", {"attributions": PIXELS[:2]}),
    "two maps": (ValueError, "2 attributions for 1 input", {"attributions": (PIXELS, PIXELS)}),
    "integer map": (TypeError, "floating point", {"attributions": PIXELS.long()}),
    "no tensor": (TypeError, "attributions must be", {"attributions": [1.0]}),
    "target out of range": (IndexError, "out of range", {"target": 3}),
    "one target in a list": (
        ValueError,
        r"list of 1 for \d examples: give one for each, or one number",
        {"target": [1]},
    ),
    "negative target": (IndexError, "out of range", {"target": torch.tensor([0, 1, -1, 0])}),
    "missing target": (ValueError, "target is missing", {"target": None}),
    "float target": (TypeError, "long", {"target": Y.double()}),
    "boolean target": (TypeError, "integer", {"target": True}),
    "too few targets": (ValueError, "4 examples", {"target": [0, 1]}),
    "too long a target": (ValueError, "1 numbers", {"target": (0, 1)}),
    "targets of another batch": (ValueError, "does not fit 4", {"target": Y[:3]}),
    "fraction 0": (ValueError, "fraction", {"fraction": 0.0}),
    "fraction above 1": (ValueError, "fraction", {"fraction": 1.5}),
    "step 0": (ValueError, "step_size", {"step_size": 0}),
    "boolean step": (ValueError, "step_size", {"step_size": True}),
    "negative step": (ValueError, "step_size", {"step_size": -1}),
    "step beyond S": (ValueError, "less than one step of 19", {"step_size": 19, "fraction": 0.5}),
    "no location in S": (ValueError, "raise fraction", {"fraction": 0.01}),
    "unknown outputs": (ValueError, "outputs must be one of", {"outputs": "scores"}),
    "negative temperature": (ValueError, "temperature", {"temperature": -1.0}),
    "soft masks of integers": (
        TypeError,
        "temperature=None",
        {"inputs": IMAGES.long(), "forward_func": lambda x: NET(x.to(IMAGES.dtype)), "temperature": "auto"},
    ),
    "unknown temperature": (ValueError, "temperature", {"temperature": "hot"}),
    "fractions": (TypeError, "feature_mask must hold whole", {"feature_mask": torch.full((1, 1, 6, 6), 0.5)}),
    "mask of another size": (ValueError, "feature_mask of shape", {"feature_mask": torch.zeros(1, 1, 5, 6).long()}),
    "empty batch": (ValueError, "empty", {"inputs": IMAGES[:0], "attributions": PIXELS[:0], "target": 0}),
    "baseline of another size": (ValueError, "baseline of shape", {"baselines": torch.zeros(1, 2, 5, 6)}),
    "baseline of another batch": (ValueError, "baseline of shape", {"baselines": torch.zeros(3, 2, 6, 6)}),
    "two baselines": (ValueError, "2 values for 1 input", {"baselines": (0, 0)}),
    "no baseline": (TypeError, "baselines must be", {"baselines": "zero"}),
    "zero rows": (ValueError, "max_examples_per_batch", {"max_examples_per_batch": 0}),
    "not probabilities": (ValueError, r"outside \[0, 1\]", {"outputs": "probabilities"}),
    "not logarithms": (ValueError, "positive", {"outputs": "log_probabilities"}),
    "NaN on masked copies": (
        NonFiniteError,
        "output during (insertion|deletion)",
        {"forward_func": lambda x: NET(x) / (x != 0).all(dim=(1, 2, 3))[:, None]},
    ),
    "NaN outputs": (NonFiniteError, "NaN", {"forward_func": lambda x: NET(x) * math.nan}),
    "one value a batch": (ValueError, "one row for each", {"forward_func": lambda x: NET(x).sum()}),
    "no output": (ValueError, "NoneType", {"forward_func": lambda x: None}),
}


@pytest.mark.parametrize("metric", [insertion, deletion, insertion_deletion])
@pytest.mark.parametrize(("error", "text", "arguments"), BAD.values(), ids=BAD)
def test_insertion_deletion_errors_name_bad_arguments(metric, error, text, arguments):
    good = {"forward_func": NET, "inputs": IMAGES, "attributions": PIXELS, "target": Y}
    with pytest.raises(error, match=text):
        metric(**{**good, **arguments})


def test_insertion_warns_of_probabilities_given_as_logits():
    with pytest.warns(UserWarning, match="already sums to one"):
        insertion(lambda x: NET(x).softmax(1), IMAGES, PIXELS, target=Y)


def test_insertion_finite_checks_can_be_switched_off():
    insertion(NET, IMAGES, broken(PIXELS, math.inf), target=Y, check_finite=False)


def test_insertion_and_deletion_functions_have_the_same_signature():
    signatures = [dict(inspect.signature(metric).parameters) for metric in (insertion, deletion, insertion_deletion)]
    for name in ("n_random_orders", "generator"):  # gains are differences of both scores' curves
        signatures[2].pop(name)
    assert signatures[0] == signatures[1] == signatures[2]


@pytest.mark.parametrize(("n_constant", "warns"), [(0, False), (1, False), (2, True), (30, True)])
def test_insertion_deletion_warns_of_constant_maps_from_a_share_of_five_percent(n_constant, warns):
    maps = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    maps[:n_constant] = 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        insertion_deletion(nn.Linear(6, 2), torch.randn(30, 6), maps, target=1)
    expected = ["The attribution of some examples is one value everywhere"] if warns else []
    assert [str(w.message)[: len(e)] for w, e in zip(caught, expected, strict=True)] == expected


def test_insertion_deletion_reads_constant_maps_at_the_groups_that_an_example_has():
    groups = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3]])
    maps = torch.tensor([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])  # both groups of the first have the mean 2
    with pytest.warns(UserWarning, match="of some examples is one value everywhere"):
        insertion_deletion(nn.Linear(4, 2), torch.randn(2, 4), maps, feature_mask=groups, target=1)
    one_group = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])  # nothing to rank
    insertion_deletion(nn.Linear(4, 2), torch.randn(2, 4), maps, feature_mask=one_group, target=1)


def test_metrics_name_the_padding_mask_where_a_masked_row_turns_nan():
    def attends(x):  # to the words, which are not 0
        weights = torch.where(x == 0, -torch.inf, x).softmax(dim=1)
        return torch.stack([(weights * x).sum(1), x.sum(1)], dim=1)

    with pytest.raises(NonFiniteError, match=r"output during deletion, examples .*nothing but padding.*the first"):
        insertion_deletion(attends, torch.rand(3, 4) + 1, torch.rand(3, 4), target=0)
