"""The layout of features over tensors, masks that do not fit, and the copies that masks make."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.inputs import as_baselines


def literal_spread(values, mask, shape):
    """values (k, b, D) to (k, b, *shape), by indexing one example at a time."""
    return torch.stack([values[:, b][:, mask[b % len(mask)].expand(shape)] for b in range(values.shape[1])], dim=1)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_feature_layout_spread_and_sums_equal_indexing(per_example, channels):
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


def test_feature_layout_numbers_positions_in_order_across_tensors():
    inputs = (torch.arange(6.0).view(1, 2, 3), torch.zeros(1, 0), torch.tensor([[6.0, 7.0]]))
    layout = FeatureLayout.of_positions([tensor.shape[1:] for tensor in inputs])
    assert layout.n_features == 8
    assert torch.equal(layout.sums(inputs), torch.arange(8.0)[None])
    spread = layout.spread(torch.arange(8.0).view(1, 1, 8))
    assert all(torch.equal(values[0], tensor) for values, tensor in zip(spread, inputs, strict=True))
    assert layout.present() is None


def test_feature_layout_reads_a_mask_with_fewer_axes_as_unbatched():
    square = torch.tensor([[0, 1, 0], [2, 2, 2], [1, 1, 0]])
    layout = FeatureLayout.of_mask(square, (torch.zeros(3, 3, 3),))  # as many rows as examples
    assert layout.shapes == (torch.Size([3, 3]),)
    assert torch.equal(layout.masks()[0], square[None])
    with pytest.raises(ValueError, match=r"\(3,\) does not fit the input of shape \(3, 4\)"):
        FeatureLayout.of_mask(torch.tensor([0, 1, 0]), (torch.zeros(3, 4),))


def test_feature_layout_depends_only_on_which_mask_numbers_are_equal():
    x = (torch.zeros(2, 4),)
    plain = FeatureLayout.of_mask(torch.tensor([[0, 1, 1, 2]]), x)
    for mask in ([[-7, 3, 3, 999]], [[5, 6, 6, 7]], [[-2.0, 0.0, 0.0, 1e6]]):
        layout = FeatureLayout.of_mask(torch.tensor(mask), x)
        assert layout.n_features == 3
        assert torch.equal(layout.masks()[0], plain.masks()[0])


def test_feature_layout_present_tells_which_features_an_example_has():
    shared = FeatureLayout.of_mask((torch.tensor([[0, 2, 2]]),), (torch.zeros(2, 3),))
    assert shared.present() is None
    each = FeatureLayout.of_mask((torch.tensor([[0, 0, 0], [0, 1, 1]]),), (torch.zeros(2, 3),))
    assert each.present().tolist() == [[True, False], [True, True]]
    assert FeatureLayout.of_mask((torch.tensor([[0, 1, 1]]),), (torch.zeros(2, 3),)).present() is None


@pytest.mark.parametrize(
    ("error", "mask"),
    [
        (TypeError, torch.full((1, 4), 0.5)),
        (TypeError, torch.full((1, 4), torch.nan)),
        (TypeError, torch.zeros(1, 4, dtype=torch.bool)),
        (TypeError, [0, 0, 1, 1]),
        (ValueError, torch.zeros(1, 5, dtype=torch.long)),
        (ValueError, torch.zeros(2, 4, dtype=torch.long)),
        (ValueError, torch.zeros(1, 1, 4, dtype=torch.long)),
    ],
)
def test_feature_layout_refuses_masks_that_do_not_fit(error, mask):
    with pytest.raises(error, match="feature_mask"):
        FeatureLayout.of_mask((mask,), (torch.zeros(3, 4),))


def test_feature_layout_needs_one_mask_for_each_tensor():
    with pytest.raises(ValueError, match="1 tensors for 2 input tensors"):
        FeatureLayout.of_mask((torch.zeros(1, 4, dtype=torch.long),), (torch.zeros(3, 4), torch.zeros(3, 4)))


def literal_copies(x, baseline, keep):
    """(k, b, D) masks over inputs (b, D), entry by entry."""
    baseline = torch.as_tensor(baseline).expand(x.shape)
    return [
        [[float(x[b, d] if kept[b, d] else baseline[b, d]) for d in range(x.shape[1])] for b in range(len(x))]
        for kept in keep
    ]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(
    "baseline", [0, 0.0, 9.1, torch.tensor([[10.3, 20.7]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])]
)
def test_masked_inputs_keep_the_input_or_put_the_baseline(baseline, finite):
    x, keep = torch.tensor([[1.1, -2.2], [3.3, 1e-9]]), torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]]).bool()
    layout = FeatureLayout.of_positions([x.shape[1:]])
    (copies,) = MaskedInputs((x,), (baseline,), layout, finite).copies(keep)
    assert copies.tolist() == literal_copies(x, baseline, keep)  # to the last digit
    (copies,) = MaskedInputs((x,), (baseline,), layout, finite).copies(keep[:, 1:], slice(1, 2))
    assert copies.tolist() == [[rows[1]] for rows in literal_copies(x, baseline, keep)]
    (copies,) = MaskedInputs((x,), (1.0,), layout, finite).copies(torch.full((1, 2, 2), 0.25))
    torch.testing.assert_close(copies[0], 1 + 0.25 * (x - 1))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize(
    ("dtype", "baseline", "expected"),
    [
        (torch.int64, 0, torch.int64),
        (torch.int64, 7, torch.int64),
        (torch.int64, 7.0, torch.int64),
        (torch.int64, torch.full((1, 2), 7.0), torch.int64),
        (torch.int64, 0.5, torch.float32),
        (torch.bool, torch.tensor([[True, False]]), torch.bool),
        (torch.float16, 0.5, torch.float16),
        (torch.float64, torch.zeros(1, 2), torch.float64),
        (torch.float32, torch.zeros(1, 2, dtype=torch.float64), torch.float32),
    ],
)
def test_masked_inputs_copies_have_the_type_that_the_model_takes(dtype, baseline, expected, finite):
    x = torch.ones(1, 2, dtype=dtype)
    layout = FeatureLayout.of_positions([x.shape[1:]])
    masked = MaskedInputs((x,), as_baselines((baseline,), (x,)), layout, finite)
    (copy,) = masked.copies(torch.tensor([[[True, False]]]))
    assert copy.dtype == expected
    last = baseline[0, 1] if isinstance(baseline, torch.Tensor) else baseline
    assert copy.tolist() == [[[1, last]]]


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("baseline", [0, 3, torch.zeros(1, 2, dtype=torch.int64)])
def test_masked_inputs_soft_masks_mix_integers_as_real_numbers(baseline, finite):
    layout = FeatureLayout.of_positions([torch.Size([2])])
    masked = MaskedInputs((torch.ones(1, 2, dtype=torch.int64),), (baseline,), layout, finite)
    (copy,) = masked.copies(torch.full((1, 1, 2), 0.25))
    assert copy.tolist() == [[[0.25 + 0.75 * int(torch.as_tensor(baseline).max())] * 2]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "keep", [torch.tensor([[[True, False]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.9, 0.1]]])]
)
def test_masked_inputs_remove_masked_values_that_are_not_finite(value, keep):
    masks = keep.clone().requires_grad_() if keep.is_floating_point() else keep
    layout = FeatureLayout.of_positions([torch.Size([2])])
    (copy,) = MaskedInputs((torch.tensor([[1.0, value]]),), (0.5,), layout).copies(masks)
    assert copy[0, 0, 1] == 0.5
    (kept,) = MaskedInputs((torch.tensor([[1.0, 2.0]]),), (torch.tensor([[value, value]]),), layout).copies(masks)
    assert kept[0, 0, 0] == 1.0
    if masks.requires_grad:
        (copy.sum() + kept[0, 0, 0]).backward()
        assert masks.grad.isfinite().all()


def test_masked_inputs_replace_windows_and_leave_other_tensors_unchanged():
    inputs = (torch.arange(4.0)[None], torch.ones(1, 2))
    masked = MaskedInputs(inputs, (9, 0), FeatureLayout.of_positions([torch.Size([4]), torch.Size([2])]))
    window = torch.tensor([[[True, True, False, False]], [[False, True, True, False]]])
    covered, other = masked.without((window, None))
    assert covered.tolist() == [[[9, 9, 2, 3]], [[0, 9, 9, 3]]]
    assert other.tolist() == [[[1, 1]], [[1, 1]]]
    other.zero_()
    assert inputs[1].tolist() == [[1, 1]]
