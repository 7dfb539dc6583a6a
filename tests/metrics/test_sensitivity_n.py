"""Sensitivity-n against Pearson's correlation over all subsets, one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_idexpo.metrics import sensitivity_n
from tests.helpers import gradient_error, smooth_conv_net, smooth_net

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PHI = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 2, 0])


def literal(net, x, phi, y, subsets, baseline):
    sums, drops = [], []
    whole = net(x[None]).softmax(1)[0, y].item()
    for subset in subsets:
        masked = x.clone()
        masked[list(subset)] = baseline
        sums.append(sum(phi[d].item() for d in subset))
        drops.append(whole - net(masked[None]).softmax(1)[0, y].item())
    return np.corrcoef(sums, drops)[0, 1]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_sensitivity_n_tends_to_the_correlation_over_all_subsets(n):
    net = smooth_net()
    ours = sensitivity_n(
        net, X, PHI, n, baselines=0.4, target=Y, n_samples=20_000, generator=torch.Generator().manual_seed(0)
    ).detach()
    for b in range(4):
        expected = literal(net, X[b], PHI[b], Y[b], itertools.combinations(range(6), n), 0.4)
        assert float(ours[b]) == pytest.approx(expected, abs=0.03)


def test_sensitivity_n_equals_numpys_correlation_on_the_drawn_subsets():
    net, seen = smooth_net(), []

    def forward(x):
        seen.append(x.detach())
        return net(x)

    ours = sensitivity_n(forward, X[:1], PHI[:1], 3, baselines=math.pi, target=1, n_samples=30).detach()
    subsets = [(row == math.pi).nonzero().flatten().tolist() for row in torch.cat(seen[2:])]
    assert {len(subset) for subset in subsets} == {3}
    assert float(ours) == pytest.approx(literal(net, X[0], PHI[0], 1, subsets, math.pi), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_sensitivity_n_is_between_minus_one_and_one_and_odd_in_the_map(seed, n):
    x, net = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), smooth_net()

    def score(phi):
        return sensitivity_n(net, x, phi, n, target=1, n_samples=8, generator=torch.Generator().manual_seed(seed))

    assert (score(PHI[:2]).abs() <= 1).all()
    torch.testing.assert_close(score(PHI[:2]), -score(-PHI[:2]))


def test_sensitivity_n_of_exact_linear_attributions_is_one():
    phi = X * torch.arange(1.0, 7.0).double()
    scores = sensitivity_n(lambda x: x @ torch.arange(1.0, 7.0).double(), X, phi, 2, outputs="raw")
    torch.testing.assert_close(scores, torch.ones(4).double())


@torch.no_grad()
def test_sensitivity_n_of_a_constant_map_or_model_is_zero():
    net = smooth_net()
    constant = PHI.clone()
    constant[1] = 0.3
    scores = sensitivity_n(net, X, constant, 2, target=Y)
    assert float(scores[1]) == 0
    assert scores[[0, 2, 3]].abs().min() > 0
    assert not sensitivity_n(lambda x: x[:, :1] * 0 + 2, X, PHI, 2).any()
    assert not sensitivity_n(net.float(), X.float(), PHI.float(), 6, target=Y).any()  # a single subset of all


def test_sensitivity_n_masks_groups_of_a_feature_mask_together():
    net, images = smooth_conv_net(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    seen = []

    def forward(x):
        seen.append(x.detach())
        return net(x)

    cells = torch.arange(36).view(1, 1, 6, 6) // 9
    sensitivity_n(
        forward, images, torch.randn(2, 6, 6).double(), 2, baselines=7.0, feature_mask=cells, target=0, n_samples=5
    )
    for row in torch.cat(seen[3:]):
        masked = (row == 7.0).all(0).flatten().view(4, 9)
        assert masked.all(1).sum() == 2
        assert masked.any(1).sum() == 2


def test_sensitivity_n_never_draws_groups_absent_from_the_example():
    """A gap in the numbers, and fewer groups in one example: the subsets hold n groups that are there."""
    net, images, seen = smooth_conv_net(), torch.randn(2, 2, 6, 6, dtype=torch.float64), []

    def forward(x):
        seen.append(x.detach())
        return net(x)

    cells = (torch.arange(36).view(1, 1, 6, 6) // 9 * 2).repeat(2, 1, 1, 1)
    cells[1] %= 4
    sensitivity_n(
        forward, images, torch.randn(2, 6, 6).double(), 2, baselines=7.0, feature_mask=cells, target=0, n_samples=40
    )
    for index, row in enumerate(torch.cat(seen[3:])):
        masked = (row == 7.0).all(0)
        groups = cells[index % 2, 0]
        assert sum(bool(masked[groups == group].all()) for group in groups.unique()) == 2


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
def test_sensitivity_n_in_float32_neither_underflows_nor_overflows(scale):
    x, phi = X.float(), PHI.float()
    generator = torch.Generator()
    expected = sensitivity_n(lambda x: x.sum(1), X, PHI, 2, outputs="raw", generator=generator.manual_seed(0))
    for factors in ((scale, 1.0), (1.0, scale)):
        scores = sensitivity_n(
            lambda x, f=factors[1]: x.sum(1) * f,
            x,
            phi * factors[0],
            2,
            outputs="raw",
            generator=generator.manual_seed(0),
        )
        torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_sensitivity_n_of_half_precision_maps_does_not_overflow():
    x, w = torch.randn(2, 3000), torch.randn(3000)
    maps = (16 * x * w).half()
    assert (1500 * maps.abs().amax(1)).isinf().all()
    found = sensitivity_n(lambda x: (x * w).sum(1), x, maps, n=1500, outputs="raw")
    torch.testing.assert_close(found, torch.ones(2), atol=1e-4, rtol=0)


def test_sensitivity_n_depends_on_the_generator_alone():
    net, state = smooth_net(), torch.get_rng_state()

    def score(seed):
        return sensitivity_n(net, X, PHI, 2, target=Y, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(score(0), score(0))
    assert not torch.equal(score(0), score(1))
    assert torch.equal(state, torch.get_rng_state())


def test_sensitivity_n_does_not_depend_on_the_chunk_size():
    net = smooth_net()
    scores = [
        sensitivity_n(net, X, PHI, 2, target=Y, generator=torch.Generator().manual_seed(0), max_examples_per_batch=rows)
        for rows in (None, 1, 3, 17)
    ]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-9, rtol=0)


def test_sensitivity_n_of_one_column_flips_the_sign_for_class_0():
    net = smooth_net(n_classes=1)

    def score(target, phi):
        return sensitivity_n(net, X, phi, 2, target=target, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(score(0, PHI), score(1, PHI))  # both p_y and the attribution change sign


def test_sensitivity_n_has_the_true_gradient():
    net = smooth_net()

    def loss():
        return sensitivity_n(net, X, PHI, 2, target=Y, generator=torch.Generator().manual_seed(0)).sum()

    assert gradient_error(loss, net) < 1e-5


def test_sensitivity_n_errors_name_bad_arguments():
    net = smooth_net()
    for text, n, arguments in (
        ("n must lie between 1 and the number of locations, 6", 7, {}),
        ("n must be a positive integer", 0, {}),
        ("n must be a positive integer", 1.5, {}),
        ("n_samples", 2, {"n_samples": 1}),
        ("target is missing", 2, {"target": None}),
        ("NaN", 2, {"attributions": PHI * math.nan}),
    ):
        with pytest.raises(ValueError, match=text):
            sensitivity_n(**{"forward_func": net, "inputs": X, "attributions": PHI, "target": Y, **arguments}, n=n)
