"""How numbers that are not finite are found, and where warnings point."""

import warnings

import pytest
import torch

from captum_idexpo._core.errors import all_finite
from captum_idexpo.attr import IntegratedGradients, Lime, Saliency
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion
from captum_idexpo.regularizers import InsertionDeletion, Stability
from tests.helpers import smooth_net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_finds_a_single_number_that_is_not_finite(dtype):
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
def test_all_finite_of_a_tensor_that_requires_grad_gives_no_warning():
    assert all_finite(torch.ones(3, requires_grad=True) * 2)


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NET = smooth_net()


def ends_early(x, **_):
    yield torch.ones(1, 6)
    yield torch.zeros(1, 6)


WARNED_OF = {
    "probabilities taken for logits": lambda: insertion(lambda x: NET(x).softmax(1), X, X, target=0),
    "a generator that ends": lambda: Lime(NET, Ridge(), perturb_func=ends_early).attribute(X[:1], target=0),
    "small internal batches": lambda: IntegratedGradients(NET).attribute(X, target=0, internal_batch_size=2),
    "nothing to hold in eval mode": lambda: Stability(lambda x: NET(x)),
    "the deletion floor": lambda: InsertionDeletion(
        Saliency(NET), baselines=0.0, deletion_form="log", deletion_floor=0.9
    )(X, torch.tensor([0, 1, 2])),
}


@pytest.mark.parametrize("name", WARNED_OF)
def test_warnings_point_at_the_line_of_the_user(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNED_OF[name]()
    assert {warning.filename for warning in caught} == {__file__}
