"""Order and ranks against Python's own sort, with ties, both zeros and infinities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_idexpo._order import ascending, descending_ranks

VALUES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=12), st.sampled_from([torch.float32, torch.float64]))
def test_ranks_count_what_comes_before(numbers, dtype):
    ranks = descending_ranks(torch.tensor([numbers], dtype=dtype))
    order = sorted(range(len(numbers)), key=lambda d: (-numbers[d], d))
    assert ranks.dtype == torch.int32
    assert ranks.tolist() == [[order.index(d) for d in range(len(numbers))]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_rows_are_sorted_each_by_itself(dtype):
    values = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert ascending(values).tolist() == [[-1, 2, 3], [-5, 0, 0]]
