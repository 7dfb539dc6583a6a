"""KernelSHAP's coalitions: none comes twice, their weights are Shapley's kernel, few features are exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_idexpo.attr.coalitions import (
    KERNEL_SHAP_SAMPLINGS,
    _in_proportion,
    _orthogonal_rows,
    _quantiles,
    all_coalitions,
    captum_kernel_shap_masks,
    kernel_shap_masks,
)

CPU = torch.device("cpu")
OWN = KERNEL_SHAP_SAMPLINGS[1:]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(n_features):
    """Shapley's kernel of each of the 2^D masks, by the number whose bits it is, with sum 1."""
    sizes = [bin(number).count("1") for number in range(2**n_features)]
    inner = [
        0.0 if size in (0, n_features) else 1 / (size * (n_features - size) * math.comb(n_features, size))
        for size in sizes
    ]
    return torch.tensor(inner) / sum(inner)


def shares_of_patterns(masks, weights):
    patterns = (masks * 2 ** torch.arange(masks.shape[-1])).sum(-1).flatten()
    weights = torch.ones(len(patterns)) if weights is None else weights.flatten()
    return torch.zeros(2 ** masks.shape[-1]).index_add(0, patterns, weights) / weights.sum()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OWN), st.integers(2, 12), st.integers(1, 70), st.integers(0, 2**31))
def test_coalitions_are_all_different(sampling, n_features, n_samples, seed):
    n_samples = min(n_samples, 2**n_features - 1)
    masks, weights = kernel_shap_masks(sampling, 4, n_samples, n_features, CPU, generator(seed))
    assert masks.shape == (4, n_samples, n_features)
    assert all(len(of_set.unique(dim=0)) == n_samples for of_set in masks)
    assert masks[:, 0].all()
    assert not masks[:, 1:2].any()
    assert weights is None or (weights.shape == masks.shape[:2] and bool((weights > 0).all()))


@pytest.mark.parametrize("sampling", OWN)
def test_coalitions_with_half_the_features_are_all_different(sampling):
    masks, _ = kernel_shap_masks(sampling, 500, 102, 10, CPU, generator())
    assert all(len(of_set.unique(dim=0)) == 102 for of_set in masks)


@pytest.mark.parametrize("n_features", [64, 65, 1500])
@pytest.mark.parametrize("sampling", OWN)
def test_coalitions_of_many_features_are_all_different(sampling, n_features):
    masks, _ = kernel_shap_masks(sampling, 3, 202, n_features, CPU, generator())
    assert all(len(of_set.unique(dim=0)) == 202 for of_set in masks)


@pytest.mark.parametrize("sampling", OWN)
@pytest.mark.parametrize(("n_features", "n_samples"), [(3, 4), (3, 6), (5, 7), (5, 8), (5, 24), (6, 50)])
def test_coalitions_with_their_weights_follow_shapleys_kernel(sampling, n_features, n_samples):
    source, shares = generator(), []
    for _ in range(300):  # the sets of one call have the same sizes
        masks, weights = kernel_shap_masks(sampling, 200 // n_samples, n_samples, n_features, CPU, source)
        shares.append(shares_of_patterns(masks[:, 2:], None if weights is None else weights[:, 2:]))
    torch.testing.assert_close(torch.stack(shares).mean(0), kernel(n_features), atol=0.015, rtol=0)


@pytest.mark.parametrize("n_features", [1, 2, 3, 6])
def test_all_coalitions_follow_shapleys_kernel(n_features):
    masks, weights = all_coalitions(n_features, CPU)
    assert masks.shape == (1, 2**n_features, n_features)
    assert len(masks[0].unique(dim=0)) == 2**n_features
    assert masks[0, 0].all()
    assert not masks[0, 1].any()
    if n_features > 1:
        torch.testing.assert_close(shares_of_patterns(masks[:, 2:], weights[:, 2:]), kernel(n_features))


@pytest.mark.parametrize("sampling", ["paired", "orthogonal", "leverage"])
def test_coalition_pairs_are_complements(sampling):
    masks, _ = kernel_shap_masks(sampling, 3, 20, 8, CPU, generator())
    assert torch.equal(masks[:, 2::2], ~masks[:, 3::2])
    assert 0 < int((masks[:, 2::2].sum(-1) > 4).sum()) < 27  # the larger one comes first, too


def test_coalition_sizes_with_few_members_are_taken_whole():
    masks, weights = kernel_shap_masks("paired", 5, 2 + 2 * 30, 8, CPU, generator())
    sizes = masks.sum(-1)
    assert ((sizes == 1).sum(1) == 8).all()
    assert ((sizes == 7).sum(1) == 8).all()
    by_size = {int(size): float(weight) for size, weight in zip(sizes[0], weights[0], strict=True)}
    assert by_size[1] == by_size[7] == 1.0
    # The 8 pairs taken whole have the share of their mass, the 22 drawn ones all of the rest.
    mass = {size: 1 / (size * (8 - size)) for size in range(1, 8)}
    rest = sum(mass.values()) - 2 * mass[1]
    for size in range(2, 7):
        assert by_size[size] == pytest.approx((rest / 44) / (mass[1] / 8), rel=1e-5)


def test_coalition_sizes_of_leverage_sampling_are_equally_frequent():
    masks, weights = kernel_shap_masks("leverage", 4, 2 + 2 * 48, 13, CPU, generator())
    counts = torch.stack([(masks[:, 2:].sum(-1) == size).sum(-1) for size in range(1, 13)])
    assert (counts == 8).all()  # 48 pairs, six sizes
    by_size = {int(size): float(weight) for size, weight in zip(masks[0].sum(-1), weights[0], strict=True)}
    for size in range(1, 7):
        assert by_size[size] == pytest.approx(12 / (size * (13 - size)), rel=1e-5)


@pytest.mark.parametrize("n_samples", [1, 2, 3])
@pytest.mark.parametrize("sampling", KERNEL_SHAP_SAMPLINGS)
def test_coalitions_of_few_samples_have_the_right_shape(sampling, n_samples):
    masks, _ = kernel_shap_masks(sampling, 2, n_samples, 3, CPU, None)
    assert masks.shape == (2, n_samples, 3)
    assert masks.dtype == torch.bool


def test_coalitions_of_captum_sampling_equal_captums_masks():
    torch.manual_seed(0)
    expected = captum_kernel_shap_masks(2, 9, 4)
    torch.manual_seed(0)
    assert torch.equal(kernel_shap_masks("captum", 2, 9, 4, CPU, None)[0], expected)


@pytest.mark.parametrize("sampling", OWN)
def test_coalitions_with_a_generator_repeat_and_leave_the_global_rng_alone(sampling):
    state = torch.get_rng_state()
    first, second = (kernel_shap_masks(sampling, 2, 50, 9, CPU, generator(3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, kernel_shap_masks(sampling, 2, 50, 9, CPU, generator(4))[0])
    assert torch.equal(state, torch.get_rng_state())


def test_orthogonal_rows_are_orthogonal_and_add_up_to_zero():
    for n in (3, 9, 20):
        rows = _orthogonal_rows((2, n, 10), CPU, generator())
        assert rows.shape == (2, n, 10)
        torch.testing.assert_close(rows.sum(-1), torch.zeros(2, n), atol=1e-5, rtol=0)
        block = rows[:, : min(n, 9)]
        torch.testing.assert_close(block @ block.mT, torch.eye(block.shape[1]).expand(2, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masses", [[0.0, 1.0], [0.0, 0.0, 0.3, 0.7], [0.0, 0.2, 0.0, 0.0], [0.0, 0.1, 0.1, 0.1]])
@pytest.mark.parametrize("start", [0.0, 0.3, 0.99999])
@pytest.mark.parametrize("n", [0, 1, 10, 1000])
def test_in_proportion_draws_sizes_in_proportion_to_their_masses(masses, start, n):
    counts = _in_proportion(_quantiles(masses), n, start)
    assert sum(counts) == n
    assert all(abs(count - n * mass / sum(masses)) < 1 for count, mass in zip(counts, masses, strict=True))
    assert all(count == 0 for count, mass in zip(counts, masses, strict=True) if not mass)
