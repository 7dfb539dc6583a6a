"""The independent streams have Captum's distributions (that the captum streams are Captum's, test_lime.py shows)."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo.attr.sampling import (
    captum_kernel_shap_masks,
    captum_lime_masks,
    independent_kernel_shap_masks,
    independent_lime_masks,
)

CPU = torch.device("cpu")


def test_lime_keeps_each_feature_with_probability_one_half():
    masks = independent_lime_masks(3, 20_000, 4, CPU, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(masks.mean(1), torch.full((3, 4), 0.5).double(), atol=0.015, rtol=0)
    centred = masks - 0.5
    covariance = centred.mT @ centred / masks.shape[1]
    torch.testing.assert_close(covariance, torch.eye(4).double().expand(3, 4, 4) / 4, atol=0.01, rtol=0)


@pytest.mark.parametrize("n_features", [2, 5, 8])
def test_kernel_shap_draws_shapley_sizes_and_uniform_subsets(n_features):
    masks = independent_kernel_shap_masks(2, 20_002, n_features, CPU, torch.Generator().manual_seed(0))
    assert masks[:, 0].all()
    assert not masks[:, 1].any()
    sizes = masks[:, 2:].sum(-1)
    k = torch.arange(1, n_features).double()
    expected = 1 / (k * (n_features - k))
    observed = torch.stack([(sizes == size).double().mean() for size in range(1, n_features)])
    torch.testing.assert_close(observed, expected / expected.sum(), atol=0.015, rtol=0)
    share = masks[:, 2:].double().mean((0, 1))
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.015, rtol=0)


@pytest.mark.parametrize("n_samples", [1, 2, 3])
def test_few_samples(n_samples):
    for masks in (captum_kernel_shap_masks(2, n_samples, 3), independent_kernel_shap_masks(2, n_samples, 3, CPU)):
        assert masks.shape == (2, n_samples, 3)
        assert masks.dtype == torch.bool
    assert captum_lime_masks(2, n_samples, 3).shape == (2, n_samples, 3)


def test_a_generator_leaves_the_global_stream_alone():
    state = torch.get_rng_state()
    independent_lime_masks(2, 5, 3, CPU, torch.Generator().manual_seed(0))
    independent_kernel_shap_masks(2, 5, 3, CPU, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
