"""Order and ranks against Python's own sort, with ties, both zeros and infinities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_idexpo._core.order import ascending, descending_ranks

VALUES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf])
NAN = math.nan


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=12), st.sampled_from([torch.float32, torch.float64]))
def test_ranks_count_what_comes_before(numbers, dtype):
    ranks = descending_ranks(torch.tensor([numbers], dtype=dtype))
    order = sorted(range(len(numbers)), key=lambda d: (-numbers[d], d))
    assert ranks.dtype == torch.int32
    assert ranks.tolist() == [[order.index(d) for d in range(len(numbers))]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_comes_first(dtype, sign):
    nan = torch.tensor(NAN).copysign(torch.tensor(sign)).to(dtype)
    values = torch.stack([torch.tensor(value, dtype=dtype) for value in (1.0, -math.inf, 2.0)] + [nan, nan])
    assert descending_ranks(values[None]).tolist() == [[3, 4, 2, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "lay_out",
    [lambda v: v.T.contiguous().T, lambda v: v[:1].expand(3, -1), lambda v: v[:, ::2], lambda v: v[:0], lambda v: v[0]],
)
def test_whatever_the_layout(dtype, lay_out):
    values = lay_out(torch.randn(3, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(ascending(values), values.sort(dim=-1).values)
    assert torch.equal(descending_ranks(values), values.argsort(dim=-1, descending=True).argsort(dim=-1).int())


def test_what_numpy_cannot_read():
    values = torch.tensor([[3.0, -1.0, 2.0]])
    assert ascending(values.bfloat16()).tolist() == [[-1, 2, 3]]
    assert torch.func.vmap(ascending)(values).tolist() == [[-1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
def test_rows_are_sorted_each_by_itself(dtype):
    values = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert ascending(values).tolist() == [[-1, 2, 3], [-5, 0, 0]]
