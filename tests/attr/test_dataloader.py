"""Attributions of a metric over a loader's batches."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo.attr import DataLoaderAttribution, FeatureAblation, FeaturePermutation
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import ROWS, smooth_net


def mean_square(outputs):
    return outputs.square().mean(dim=0)


def test_data_loader_attribution_accepts_batches_that_are_tensors():
    """Captum takes the first row of a batch that is a tensor for the batch."""
    net, explainer = smooth_net(), captum.attr.DataLoaderAttribution(captum.attr.FeatureAblation(smooth_net()))
    (expected,) = explainer.attribute(DataLoader(TensorDataset(ROWS), batch_size=3), to_metric=mean_square)
    loader = DataLoader(ROWS, batch_size=3)
    attribution = DataLoaderAttribution(FeatureAblation(net)).attribute(loader, to_metric=mean_square)
    torch.testing.assert_close(attribution, expected, check_dtype=False)


@pytest.mark.parametrize("per_pass", [1, 4])
def test_data_loader_attribution_gradient_equals_finite_differences(per_pass):
    net, loader = smooth_net(), DataLoader(ROWS, batch_size=3)
    explainer = DataLoaderAttribution(FeatureAblation(net))
    arguments = {"to_metric": mean_square, "baselines": 0.5, "feature_mask": torch.tensor([[0, 0, 1, 1, 2, 2]])}
    assert_trainable(
        lambda: explainer.attribute(loader, **arguments, perturbations_per_pass=per_pass, create_graph=True), net
    )


def test_data_loader_attribution_of_captums_ablation_has_no_create_graph():
    loader = DataLoader(ROWS, batch_size=3)
    explainer = DataLoaderAttribution(captum.attr.FeatureAblation(smooth_net()))
    assert not explainer.attribute(loader).requires_grad
    with pytest.raises(TypeError, match="FeatureAblation has no create_graph"):
        explainer.attribute(loader, create_graph=True)


def test_data_loader_attribution_refuses_feature_permutation():
    from captum.attr._core.dataloader_attr import SUPPORTED_METHODS

    assert {captum.attr.FeatureAblation} == SUPPORTED_METHODS
    with pytest.raises(TypeError, match="takes a FeatureAblation, given: FeaturePermutation"):
        DataLoaderAttribution(FeaturePermutation(smooth_net()))
