"""ExpO's terms against ordinary least squares done one example at a time, in value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from captum_idexpo.attr.similarity import MaskSimilarity
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import Fidelity, GaussianNeighbors, MaskedNeighbors, Stability, UniformNeighbors
from captum_idexpo.regularizers.expo import residuals
from captum_idexpo.regularizers.neighbors import Neighbors
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(4, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0])
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
LABELS = torch.tensor([0, 2, 1])
CELLS = grid(IMAGES, 3)  # four features
MASKED = MaskedNeighbors(baselines=0.2, feature_mask=CELLS, similarity=MaskSimilarity(0.5))


def seeded(regularizer, x=X, y=Y):
    torch.manual_seed(3)
    return next(iter(regularizer(x, y).values()))


def drawn(neighborhood, n, x=X):
    torch.manual_seed(3)
    return neighborhood.draw((x,), n, None)


def left_by_numpy(coordinates, values, weights=None):
    """Residuals of weighted least squares with an intercept, by NumPy's own solver."""
    design = np.concatenate([np.ones((len(coordinates), 1)), coordinates], axis=1)
    root = np.ones(len(coordinates)) if weights is None else np.sqrt(weights)
    solution, *_ = np.linalg.lstsq(root[:, None] * design, root[:, None] * values, rcond=None)
    return values - design @ solution


@pytest.mark.parametrize("neighborhood", [GaussianNeighbors(0.3), UniformNeighbors(0.2)])
def test_fidelity_is_the_residual_of_least_squares(neighborhood):
    net = smooth_net()
    neighbors = drawn(neighborhood, 30)
    squares = []
    for i in range(4):
        points = neighbors.tensors[0][:, i]
        left = left_by_numpy((points - X[i]).numpy(), net(points).detach().numpy())
        squares.append((left**2).mean())
    value = seeded(Fidelity(net, neighborhood, n_neighbors=30))
    assert value.item() == pytest.approx(np.mean(squares), rel=1e-9)


@pytest.mark.parametrize("make", [Fidelity, Stability])
def test_expo_terms_of_token_ids_equal_those_of_masked_embeddings(make):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(9, 4).double(), nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double()
    ids = torch.randint(1, 9, (4, 5))
    tokens = torch.arange(5)[None, :, None].expand(1, 5, 4)
    of_embeddings = MaskedNeighbors(embedding.weight[0].detach().expand(1, 5, 4), tokens)
    value = seeded(make(nn.Sequential(embedding, head), MaskedNeighbors(0), n_neighbors=30), ids)
    expected = seeded(make(head, of_embeddings, n_neighbors=30), embedding(ids).detach())
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert value.item() > 0


@pytest.mark.parametrize("neighborhood", [GaussianNeighbors(0.3), MaskedNeighbors()])
@pytest.mark.parametrize("make", [Fidelity, Stability])
@pytest.mark.parametrize("max_examples_per_batch", [1, 3, 4, 9])
def test_expo_terms_bound_the_rows_even_below_the_batch_size(make, neighborhood, max_examples_per_batch):
    net, rows = smooth_net(), []
    net.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    bounded = seeded(make(net, neighborhood, n_neighbors=30, max_examples_per_batch=max_examples_per_batch))
    assert max(rows) <= max_examples_per_batch
    torch.testing.assert_close(bounded, seeded(make(net, neighborhood, n_neighbors=30)))


def test_fidelity_along_one_coordinate_is_a_line_in_closed_form():
    net = smooth_net()
    neighborhood = GaussianNeighbors(0.3, one_dimensional=True)
    neighbors = drawn(neighborhood, 20)
    steps = neighbors.tensors[0] - X
    assert all(int((steps[:, i].abs().sum(dim=0) > 0).sum()) == 1 for i in range(4))
    squares = []
    for i in range(4):
        z, f = steps[:, i].sum(dim=1), net(neighbors.tensors[0][:, i]).detach()
        slope = ((z - z.mean())[:, None] * (f - f.mean(0))).sum(0) / (z - z.mean()).square().sum()
        squares.append((f - f.mean(0) - slope * (z - z.mean())[:, None]).square().mean())
    value = seeded(Fidelity(net, neighborhood))
    assert value.item() == pytest.approx(torch.stack(squares).mean().item(), rel=1e-9)


def test_fidelity_on_masked_copies_is_the_weighted_residual():
    net = smooth_conv_net()
    neighbors = drawn(MASKED, 40, IMAGES)
    squares = []
    for i in range(3):
        p = net(neighbors.tensors[0][:, i]).softmax(dim=1)[:, LABELS[i]].detach().numpy()
        weights = MaskSimilarity(0.5).weights(neighbors.coordinates[i : i + 1])[0].numpy()
        left = left_by_numpy(neighbors.coordinates[i].numpy(), p[:, None], weights)[:, 0]
        squares.append((weights * left**2).sum() / weights.sum())
        for mask, copy in zip(neighbors.coordinates[i], neighbors.tensors[0][:, i], strict=True):
            kept = mask[CELLS[0].expand(2, 6, 6)]
            torch.testing.assert_close(copy, kept * IMAGES[i] + (1 - kept) * 0.2)
    value = seeded(Fidelity(net, MASKED, n_neighbors=40), IMAGES, LABELS)
    assert value.item() == pytest.approx(np.mean(squares), rel=1e-9)


def test_weights_of_masked_copies_count_the_features_that_the_example_has():
    neighbors = MaskedNeighbors(feature_mask=torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]]))
    found = neighbors.draw((torch.randn(2, 6).double(),), 20, torch.Generator().manual_seed(0))
    for i, n_features in enumerate((2, 6)):
        own = found.coordinates[i, :, :n_features]
        assert not found.coordinates[i, :, n_features:].any()
        torch.testing.assert_close(found.weights[i], MaskSimilarity().weights(own), rtol=1e-12, atol=0)


def test_stability_is_the_mean_squared_change_at_the_neighbors():
    net = smooth_net()
    neighbors = drawn(UniformNeighbors(0.05), 3)
    assert float((neighbors.tensors[0] - X).abs().max()) <= 0.05
    expected = (net(neighbors.tensors[0]) - net(X)).square().mean()
    torch.testing.assert_close(seeded(Stability(net, n_neighbors=3)), expected)


def test_stability_on_masked_copies_is_the_weighted_squared_change():
    net = smooth_conv_net()
    neighbors = drawn(MASKED, 9, IMAGES)
    probabilities = net(neighbors.tensors[0].flatten(0, 1)).softmax(dim=1).reshape(9, 3, 3)
    p = probabilities.gather(2, LABELS.expand(9, 3)[..., None])[..., 0].T
    here = net(IMAGES).softmax(dim=1).gather(1, LABELS[:, None])
    weights = neighbors.weights
    expected = ((weights * (p - here).square()).sum(dim=1) / weights.sum(dim=1)).mean()
    value = seeded(Stability(net, MASKED, n_neighbors=9), IMAGES, LABELS)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("make", "images"),
    [
        (lambda net: Fidelity(net), False),
        (lambda net: Fidelity(net, GaussianNeighbors(one_dimensional=True)), False),
        (lambda net: Stability(net), False),
        (lambda net: Fidelity(net, MASKED), True),
        (lambda net: Stability(net, MASKED, n_neighbors=5), True),
    ],
)
def test_expo_terms_have_the_true_gradient(make, images):
    net = smooth_conv_net() if images else smooth_net()
    regularizer = make(net)
    assert_trainable(lambda: regularizer(IMAGES if images else X, LABELS if images else Y), net)


def test_residuals_of_dependent_coordinates_are_fitted_in_their_span():
    coordinates = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    values = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]], dtype=torch.float64)
    left = residuals(Neighbors((), coordinates), values)
    torch.testing.assert_close(left[0, :, 0], torch.tensor([-1.0, -1.5, 1.0, 1.5], dtype=torch.float64))


def test_fidelity_of_constant_features_and_outputs_is_finite():
    constant = X.clone()
    constant[:, 2] = 1.0
    assert seeded(Fidelity(smooth_net()), constant).item() > 0
    flat = nn.Linear(6, 3).double()
    nn.init.zeros_(flat.weight)
    value = seeded(Fidelity(flat), constant)
    value.backward()
    assert value.item() < 1e-20
    assert flat.weight.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_fidelity_does_not_depend_on_the_rows_of_a_forward_pass(rows):
    net, seen = smooth_net(), []
    net.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    whole = seeded(Fidelity(net, n_neighbors=20))
    seen.clear()
    torch.testing.assert_close(seeded(Fidelity(net, n_neighbors=20, max_examples_per_batch=rows)), whole)
    assert max(seen) <= max(rows, 4)  # a copy of the batch at least


def test_fidelity_of_a_tuple_of_inputs_equals_that_of_joined_inputs():
    net = smooth_net()
    joined = lambda a, b: net(torch.cat([a, b], dim=1))  # noqa: E731
    both = seeded(Fidelity(joined, n_neighbors=20, eval_mode=False), (X[:, :2], X[:, 2:]))
    torch.testing.assert_close(both, seeded(Fidelity(net, n_neighbors=20)))


def test_fidelity_repeats_with_a_seeded_generator():
    net = smooth_net()
    values = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(9)
        values.append(Fidelity(net, generator=generator)(X, Y)["fidelity"].item())
    assert values[0] == values[1]


def test_fidelity_with_too_few_neighbors_names_the_number_needed():
    with pytest.raises(ValueError, match=r"n_neighbors=7 leaves nothing.*7 unknowns: give at least 8"):
        Fidelity(smooth_net(), n_neighbors=7)(X, Y)
    assert Fidelity(smooth_net(), n_neighbors=8)(X, Y)["fidelity"].item() > 0


def test_fidelity_of_a_regression_on_masked_copies_is_positive():
    net = smooth_net(n_classes=1)
    regularizer = Fidelity(net, MaskedNeighbors(0.0), outputs="raw")
    assert regularizer(X, torch.randn(4, 1, dtype=torch.float64))["fidelity"].item() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianNeighbors(0.0),
        lambda: UniformNeighbors(-1.0),
        lambda: Fidelity(smooth_net(), n_neighbors=0),
        lambda: Stability(smooth_net(), max_examples_per_batch=0),
    ],
)
def test_expo_terms_refuse_bad_settings(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("make", [Fidelity, Stability])
def test_expo_terms_of_half_precision_inputs_use_single_precision(make):
    torch.manual_seed(0)
    first, rest = nn.Linear(10, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(4, 10), torch.tensor([0, 1, 2, 0])
    generator = torch.Generator()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = first(x)
        regularizer = make(rest, generator=generator.manual_seed(0))
        (value,) = regularizer(half, y).values()
    regularizer = make(rest, generator=generator.manual_seed(0))
    (expected,) = regularizer(half.float(), y).values()
    torch.testing.assert_close(value, expected)
    value.backward()
    assert first.weight.grad is not None


def test_residuals_ignore_features_of_other_examples():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    groups = torch.stack([(torch.arange(64) * k // 64).view(1, 8, 8) for k in (4, 48)])
    neighbors = MaskedNeighbors(0.0, groups).draw((x,), 96, torch.Generator().manual_seed(0))
    values = torch.randn(2, 96, 1, dtype=torch.float64)
    left = residuals(neighbors, values)
    own = [
        Neighbors(neighbors.tensors, neighbors.coordinates[k : k + 1, :, :n], neighbors.weights[k : k + 1])
        for k, n in enumerate((4, 48))
    ]
    for k in range(2):
        torch.testing.assert_close(left[k : k + 1], residuals(own[k], values[k : k + 1]))
