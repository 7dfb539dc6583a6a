"""How numbers that are not finite are found."""

import pytest
import torch

from captum_idexpo._errors import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found(dtype):
    largest = torch.finfo(dtype).max
    fine = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=dtype)
    assert all_finite(fine)
    assert all_finite(fine[:0])
    assert all_finite(torch.full((3, 3), largest, dtype=dtype))  # whose sum is infinite
    assert all_finite(torch.tensor([largest, largest, -largest], dtype=dtype))
    inf = float("inf")
    for bad in ([inf], [-inf], [float("nan")], [inf, -inf], [largest, largest, inf], [largest, -inf, largest]):
        assert not all_finite(torch.tensor([1.0, *bad], dtype=dtype))


@pytest.mark.filterwarnings("error")
def test_asking_a_tensor_on_a_graph_warns_of_nothing():
    assert all_finite(torch.ones(3, requires_grad=True) * 2)
