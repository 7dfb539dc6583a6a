"""The layout of features over tensors: spreading values, adding up positions, refusing masks that do not fit."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo._core.features import FeatureLayout


def literal_spread(values, mask, shape):
    """values (k, b, D) to (k, b, *shape), by indexing one example at a time."""
    return torch.stack([values[:, b][:, mask[b % len(mask)].expand(shape)] for b in range(values.shape[1])], dim=1)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_spread_and_sums_are_indexing(per_example, channels):
    torch.manual_seed(0)
    inputs = (torch.randn(3, 2, 4, 5),)
    mask = torch.randint(7, (3 if per_example else 1, channels, 4, 5))
    layout = FeatureLayout.of_mask((mask,), inputs)
    values = torch.randn(6, 3, layout.n_features)
    (spread,) = layout.spread(values)
    expected = literal_spread(values, mask, (2, 4, 5))
    assert torch.equal(spread.expand(6, 3, 2, 4, 5), expected)
    (part,) = layout.spread(values[:, 1:], slice(1, 3))
    assert torch.equal(part.expand(6, 2, 2, 4, 5), expected[:, 1:])
    sums = layout.sums(inputs)
    for b in range(3):
        for feature in range(layout.n_features):
            where = (mask[b % len(mask)] == feature).expand(2, 4, 5)
            torch.testing.assert_close(sums[b, feature], inputs[0][b][where].sum())


def test_positions_are_features_in_order_across_tensors():
    inputs = (torch.arange(6.0).view(1, 2, 3), torch.zeros(1, 0), torch.tensor([[6.0, 7.0]]))
    layout = FeatureLayout.of_positions([tensor.shape[1:] for tensor in inputs])
    assert layout.n_features == 8
    assert torch.equal(layout.sums(inputs), torch.arange(8.0)[None])
    spread = layout.spread(torch.arange(8.0).view(1, 1, 8))
    assert all(torch.equal(values[0], tensor) for values, tensor in zip(spread, inputs, strict=True))
    assert layout.present() is None


def test_a_batch_sized_mask_without_batch_axis_is_one_row_an_example_as_in_captum():
    layout = FeatureLayout.of_mask((torch.tensor([0, 1, 0]),), (torch.zeros(3, 4),))
    (spread,) = layout.spread(torch.tensor([[[5.0, 7.0]]]).expand(1, 3, 2))
    assert torch.equal(spread.expand(1, 3, 4)[0], torch.tensor([5.0, 7.0, 5.0])[:, None].expand(3, 4))


def test_present_tells_gaps_apart():
    shared = FeatureLayout.of_mask((torch.tensor([[0, 2, 2]]),), (torch.zeros(2, 3),))
    assert shared.present().tolist() == [[True, False, True]]
    each = FeatureLayout.of_mask((torch.tensor([[0, 0, 0], [0, 1, 1]]),), (torch.zeros(2, 3),))
    assert each.present().tolist() == [[True, False], [True, True]]
    assert FeatureLayout.of_mask((torch.tensor([[0, 1, 1]]),), (torch.zeros(2, 3),)).present() is None


@pytest.mark.parametrize(
    ("error", "mask"),
    [
        (TypeError, torch.zeros(1, 4)),
        (TypeError, torch.zeros(1, 4, dtype=torch.bool)),
        (TypeError, [0, 0, 1, 1]),
        (ValueError, torch.zeros(1, 5, dtype=torch.long)),
        (ValueError, torch.zeros(2, 4, dtype=torch.long)),
        (ValueError, torch.zeros(1, 1, 4, dtype=torch.long)),
        (ValueError, torch.tensor([[-1, 0, 0, 0]])),
    ],
)
def test_masks_that_do_not_fit_are_an_error(error, mask):
    with pytest.raises(error, match="feature_mask"):
        FeatureLayout.of_mask((mask,), (torch.zeros(3, 4),))


def test_there_is_one_mask_a_tensor():
    with pytest.raises(ValueError, match="1 tensors for 2 input tensors"):
        FeatureLayout.of_mask((torch.zeros(1, 4, dtype=torch.long),), (torch.zeros(3, 4), torch.zeros(3, 4)))
