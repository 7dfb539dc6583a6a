"""The masks alone: order, ties, thresholds, absent locations, written out in lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_idexpo.metrics.masks import HardMasks, SoftMasks

NUMBERS = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


def after(masks, steps, **options):
    return masks(masks.thresholds(steps), **options)


def literal_soft(values, s, temperature):
    ranked = sorted(values, reverse=True)
    gaps = len(set(values)) - 1
    if not gaps:
        return [0.5] * len(values)
    t = gaps / (ranked[0] - ranked[-1])
    threshold = (ranked[s - 1] + ranked[s]) / 2 if s < len(values) else ranked[-1] - 1 / (2 * t)
    return [1 / (1 + math.exp(-temperature * t * (value - threshold))) for value in values]


@settings(max_examples=80, deadline=None)
@given(NUMBERS, st.integers(0, 3), st.sampled_from([1.0, 2.5]))
def test_masks_equal_the_equations_with_ties_and_absent_locations(numbers, n_absent, temperature):
    values = torch.tensor([[*map(float, numbers), *[9.0] * n_absent]], dtype=torch.float64)
    present = torch.tensor([[True] * len(numbers) + [False] * n_absent]) if n_absent else None
    steps = torch.arange(1, len(numbers) + 1)[:, None]
    hard, soft = after(HardMasks(values, present), steps), after(SoftMasks(values, present, temperature), steps)
    assert torch.equal(after(HardMasks(values, present), steps, complement=True), 1 - hard)
    assert torch.equal(after(HardMasks(values, present, torch.float32), steps), hard.float())
    torch.testing.assert_close(after(SoftMasks(values, present, temperature), steps, complement=True), 1 - soft)
    for s in range(1, len(numbers) + 1):
        order = sorted(range(len(numbers)), key=lambda d: (-numbers[d], d))
        assert hard[s - 1, 0, : len(numbers)].tolist() == [d in order[:s] for d in range(len(numbers))]
        expected = literal_soft(list(map(float, numbers)), s, temperature)
        assert soft[s - 1, 0, : len(numbers)].tolist() == pytest.approx(expected, abs=1e-12)


def test_soft_masks_after_all_locations_keep_to_the_bound_of_the_paper():
    soft = after(SoftMasks(torch.randn(5, 7, dtype=torch.float64)), torch.full((1, 5), 7))
    assert float(soft.min()) == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_hard_masks_take_only_types_that_hold_every_rank():
    values, steps = torch.randn(1, 5000), torch.tensor([[4001]])
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        masks = after(HardMasks(values, dtype=dtype), steps)
        assert masks.dtype == torch.int32
        assert int(masks.sum()) == 4001
    assert after(HardMasks(values, dtype=torch.float64), steps).dtype == torch.float64


@pytest.mark.parametrize("kind", [HardMasks, SoftMasks])
def test_masks_refuse_numbers_of_locations_as_thresholds(kind):
    with pytest.raises(ValueError, match=r"masks\.thresholds\(steps\)"):
        kind(torch.randn(2, 4))(torch.tensor([[2, 2]]))


def test_soft_masks_rank_half_precision_values_in_single_precision():
    assert after(SoftMasks(torch.randn(1, 4).half()), torch.tensor([[2]])).dtype == torch.float32


def test_soft_masks_treat_values_that_differ_by_rounding_as_equal():
    """Else the temperature, which counts distinct values, would depend on the size of a forward pass."""
    values = torch.tensor([[0.3, 0.1, 0.3, 0.7, 0.1]], dtype=torch.float64)
    rounded = values * (1 + 2e-16 * torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    assert not torch.equal(values, rounded)
    steps = torch.tensor([[1], [3], [5]])
    exact, near = (SoftMasks(given) for given in (values, rounded))
    torch.testing.assert_close(near(near.thresholds(steps)), exact(exact.thresholds(steps)), rtol=1e-12, atol=0)
    constant = SoftMasks(0.3 + 1e-17 * torch.arange(5, dtype=torch.float64)[None])
    assert constant(constant.thresholds(steps)).eq(0.5).all()
