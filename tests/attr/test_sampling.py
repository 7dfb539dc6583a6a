"""Every design of LIME has the distribution it claims (that the captum stream is Captum's, test_lime.py shows)."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo.attr.sampling import LIME_SAMPLINGS, captum_lime_masks, hadamard, lime_masks

CPU = torch.device("cpu")
OWN_LIME = LIME_SAMPLINGS[1:]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shares_of_patterns(masks, weights=None):
    """How much of the weight falls on each of the 2^D masks."""
    patterns = (masks * 2 ** torch.arange(masks.shape[-1])).sum(-1).flatten()
    weights = torch.ones(len(patterns)) if weights is None else weights.flatten()
    return torch.zeros(2 ** masks.shape[-1]).index_add(0, patterns, weights) / weights.sum()


@pytest.mark.parametrize("sampling", OWN_LIME)
@pytest.mark.parametrize("n_features", [1, 2, 5])
@pytest.mark.parametrize("n_samples", [5, 24])
def test_lime_masks_are_all_equally_likely(sampling, n_features, n_samples):
    masks = lime_masks(sampling, 60_000 // n_samples, n_samples, n_features, CPU, generator())
    assert masks.shape == (60_000 // n_samples, n_samples, n_features)
    expected = torch.full((2**n_features,), 0.5**n_features)
    torch.testing.assert_close(shares_of_patterns(masks), expected, atol=0.012, rtol=0)
    # Each place in a set by itself, too.
    torch.testing.assert_close(
        masks.float().mean(0), torch.full((n_samples, n_features), 0.5), atol=4 * 0.5 / len(masks) ** 0.5, rtol=0
    )


@pytest.mark.parametrize("sampling", ["paired", "orthogonal"])
def test_lime_masks_in_pairs_are_complements(sampling):
    masks = lime_masks(sampling, 3, 20, 7, CPU, generator())
    assert torch.equal(masks[:, ::2], ~masks[:, 1::2])
    assert lime_masks(sampling, 3, 21, 7, CPU, generator()).shape == (3, 21, 7)


@pytest.mark.parametrize("n_features", [3, 8, 41])
def test_lime_masks_of_orthogonal_sampling_have_orthogonal_columns(n_features):
    order = len(hadamard(n_features))
    masks = 2.0 * lime_masks("orthogonal", 2, 4 * order, n_features, CPU, generator())[:, ::2] - 1  # two whole blocks
    for block in (masks[:, :order], masks[:, order:]):
        torch.testing.assert_close(block.mT @ block, order * torch.eye(n_features).expand(2, -1, -1))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 11, 41, 64, 65, 76, 100, 300])
def test_hadamard_matrices_are_orthogonal(n):
    matrix = hadamard(n).float()
    order = len(matrix)
    assert n <= order <= max(2 * n - 1, 1)
    torch.testing.assert_close(matrix @ matrix.T, order * torch.eye(order))
    assert (matrix.abs() == 1).all()


@pytest.mark.parametrize("n_samples", [1, 2, 3])
def test_lime_masks_of_few_samples_have_the_right_shape(n_samples):
    for sampling in LIME_SAMPLINGS:
        assert lime_masks(sampling, 2, n_samples, 3, CPU, None).shape == (2, n_samples, 3)


def test_lime_masks_of_captum_sampling_equal_captums_masks():
    torch.manual_seed(0)
    expected = captum_lime_masks(2, 9, 4)
    torch.manual_seed(0)
    assert torch.equal(lime_masks("captum", 2, 9, 4, CPU, None), expected)


def test_lime_masks_with_a_generator_repeat_and_leave_the_global_rng_alone():
    state = torch.get_rng_state()
    for sampling in OWN_LIME:
        first, second = (lime_masks(sampling, 2, 50, 9, CPU, generator(3)) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_lime_masks_of_one_orthogonal_block_are_drawn_in_two_halves():
    """So that not all columns are orthogonal, which would leave nothing to judge the noise by."""
    order = len(hadamard(8))
    masks = 2.0 * lime_masks("orthogonal", 1, 2 * order, 8, CPU, generator())[:, ::2] - 1
    assert not torch.equal(masks.mT @ masks, order * torch.eye(8)[None])


def test_lime_masks_refuse_a_generator_on_mps():
    class OnMps:
        device = torch.device("mps")

    with pytest.raises(ValueError, match="give one on the CPU"):
        lime_masks("independent", 1, 2, 3, CPU, OnMps())
