"""Lime against Captum's, call by call; its gradient against finite differences; its errors."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression, SkLearnRidge
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import nn

from captum_idexpo import NonFiniteError
from captum_idexpo.attr import Lime, MaskSimilarity, id_expo_lime
from captum_idexpo.attr.surrogates import Lasso, LinearRegression, Ridge
from tests.helpers import gradient_error, smooth_net

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are providing multiple inputs", "ignore:Minimum element in feature mask"
)


def both(forward, inputs, make=lambda cls, forward: cls(forward), **arguments):
    """Captum's attribution and ours after the same seed, and what each leaves in torch's stream."""
    results = []
    for cls in (captum.attr.Lime, Lime):
        torch.manual_seed(7)
        results.append((make(cls, forward).attribute(inputs, **arguments), torch.rand(1)))
    (theirs, their_stream), (ours, our_stream) = results
    assert torch.equal(their_stream, our_stream), "the random streams have parted"
    return theirs, ours


def assert_same(theirs, ours, tolerance=1e-5):
    assert type(theirs) is type(ours)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (theirs, ours)), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b.to(a.dtype), a, atol=tolerance, rtol=tolerance)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
FEATURE_MASKS = {
    "none": None,
    "shared": torch.tensor([[0, 0, 1, 1, 2, 2]]),
    "per example": torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 2, 3, 3, 3], [0, 2, 1, 0, 3, 1], [3, 2, 1, 0, 0, 0]]),
    "no batch axis": torch.tensor([0, 0, 1, 1, 2, 2]),
    "offset": torch.tensor([[2, 2, 3, 3, 4, 4]]),
    "int32": torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32),
}
BASELINES = {
    "none": None,
    "int": 1,
    "float": 0.5,
    "one": torch.full((1, 6), 0.3),
    "each": torch.randn(4, 6, generator=torch.Generator().manual_seed(2)),
    "no batch axis": torch.arange(6.0),
}
TARGETS = {
    "int": 1,
    "tensor(1)": torch.tensor([1]),
    "0-d": torch.tensor(1),
    "tensor(B)": torch.tensor([0, 1, 2, 0]),
    "list": [0, 1, 2, 0],
    "tuple": (1,),
    "list of tuples": [(0,), (1,), (2,), (0,)],
}


@pytest.mark.parametrize("feature_mask", FEATURE_MASKS.values(), ids=FEATURE_MASKS)
@pytest.mark.parametrize("baselines", BASELINES.values(), ids=BASELINES)
def test_lime_equals_captum_for_feature_masks_and_baselines(feature_mask, baselines):
    net = smooth_net().float()
    assert_same(*both(net, X, target=1, feature_mask=feature_mask, baselines=baselines, n_samples=40))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("batch", [1, 4])
def test_lime_equals_captum_for_targets(target, batch):
    if batch == 1 and isinstance(target, (list, torch.Tensor)):
        target = target[:1] if not isinstance(target, torch.Tensor) or target.dim() else target
    if batch == 4 and isinstance(target, torch.Tensor) and not target.dim():
        pytest.skip("Captum rejects a 0-d target for more than one example")
    assert_same(*both(smooth_net().float(), X[:batch], target=target))


@pytest.mark.filterwarnings("ignore:Objective did not converge")  # older versions of scikit-learn, of a gap of 0
@pytest.mark.parametrize("n_samples", [1, 2, 3, 25])
@pytest.mark.parametrize("perturbations_per_eval", [1, 2, 7, 100])
def test_lime_equals_captum_for_sample_counts(n_samples, perturbations_per_eval):
    arguments = {"target": 0, "n_samples": n_samples, "perturbations_per_eval": perturbations_per_eval}
    assert_same(*both(smooth_net().float(), X, **arguments))
    assert_same(*both(smooth_net().float(), X[:1], **arguments))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_lime_coefficients_without_input_shape_equal_captum(batch, masked):
    arguments = {"feature_mask": FEATURE_MASKS["shared"]} if masked else {}
    theirs, ours = both(smooth_net().float(), X[:batch], target=1, return_input_shape=False, **arguments)
    assert ours.shape == (batch, 3 if masked else 6)
    assert_same(theirs, ours)


SURROGATES = {
    "ridge": lambda: SkLearnRidge(alpha=0.3),
    "ridge without intercept": lambda: SkLearnRidge(alpha=0.3, fit_intercept=False),
    "ridge, sklearn's alpha": lambda: SkLearnRidge(),
    "lasso": lambda: SkLearnLasso(alpha=0.05),
    "lasso, sklearn's alpha": lambda: SkLearnLasso(),
    "lasso with options": lambda: SkLearnLasso(alpha=0.01, tol=1e-10, max_iter=5000),
    "regression": lambda: SkLearnLinearRegression(),
    "positive lasso (Captum's own path)": lambda: SkLearnLasso(alpha=0.01, positive=True),
}


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize("n_samples", [5, 40])
@pytest.mark.filterwarnings("ignore:Objective did not converge")  # float32 does not reach a tolerance of 1e-10
def test_lime_equals_captum_for_surrogates(surrogate, n_samples):
    theirs, ours = both(
        smooth_net().float(), X, lambda cls, f: cls(f, interpretable_model=surrogate()), target=1, n_samples=n_samples
    )
    assert_same(theirs, ours)


@pytest.mark.parametrize("mode", ["cosine", "euclidean"])
@pytest.mark.parametrize("width", [0.3, 1.0, 10.0])
def test_lime_equals_captum_for_captums_kernels(mode, width):
    kernel = get_exp_kernel_similarity_function(mode, width)
    arguments = {"baselines": 0.4, "feature_mask": FEATURE_MASKS["per example"], "target": 1}
    assert_same(*both(smooth_net().float(), X, lambda cls, f: cls(f, similarity_func=kernel), **arguments))


def test_lime_equals_captum_for_custom_functions():
    def similarity(original, perturbed, mask, **kwargs):
        assert set(kwargs) == {"baselines", "feature_mask", "num_interp_features"}
        return float((original - perturbed).abs().mean() + 0.1 * mask.sum())

    def perturb(original, num_interp_features, **_):
        return (torch.rand(1, num_interp_features) < 0.7).long()

    def perturb_forever(original, num_interp_features, **_):
        while True:
            yield (torch.rand(1, num_interp_features) < 0.7).long()

    for custom in ({"similarity_func": similarity}, {"perturb_func": perturb}, {"perturb_func": perturb_forever}):
        assert_same(*both(smooth_net().float(), X, lambda cls, f, c=custom: cls(f, **c), target=1))


def test_lime_perturb_func_generator_may_end_early():
    def ends_early(original, num_interp_features, **_):  # after a number of samples that depends on the example
        for _ in range(12 if float(original.sum()) > 0 else 9):
            yield (torch.rand(1, num_interp_features) < 0.5).long()

    assert len({float(x.sum()) > 0 for x in X}) == 2
    with pytest.warns(UserWarning, match="Generator completed prior"):
        theirs, ours = both(smooth_net().float(), X, lambda cls, f: cls(f, perturb_func=ends_early), target=1)
    assert_same(theirs, ours)


def test_mask_similarity_works_in_captums_lime():
    kernel = MaskSimilarity(0.4)
    assert_same(*both(smooth_net().float(), X, lambda cls, f: cls(f, similarity_func=kernel), target=1))


SCALARS = {
    "float": lambda value: value.item(),
    "int": lambda value: int(100 * value.item()),
    "0-d": lambda value: value,
    "1-d": lambda value: value.reshape(1),
}


@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("feature_mask", ["none", "shared", "per example"])
def test_lime_equals_captum_for_one_value_per_batch(scalar, batch, feature_mask):
    net = smooth_net().float()
    mask = FEATURE_MASKS[feature_mask]
    mask = mask[:batch] if mask is not None and len(mask) > 1 else mask
    theirs, ours = both(lambda x: scalar(net(x).sum()), X[:batch], feature_mask=mask)
    assert ours.shape == (1, 6)
    assert_same(theirs, ours)


def test_lime_of_one_value_per_batch_needs_perturbations_per_eval_of_one():
    net = smooth_net().float()
    for batch in (1, 4):
        with pytest.raises(AssertionError):
            Lime(lambda x: net(x).sum()).attribute(X[:batch], perturbations_per_eval=2)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, a, b, scale=1.0, shift=None):
        out = torch.tanh(self.first(a.float())) * scale + self.second(b.float().flatten(1))
        return out if shift is None else out + shift


B = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch", [1, 4])
def test_lime_equals_captum_for_tuples(batch):
    net, inputs = TwoInputs(), (X[:batch], B[:batch])
    masks = (torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[[1, 2], [2, 3]]]))  # shared across the tensors
    shift = torch.randn(batch, 3)
    for arguments in (
        {},
        {"feature_mask": masks},
        {"baselines": (0.5, torch.zeros(1, 2, 2))},
        {"additional_forward_args": (2.0, shift)},
        {"return_input_shape": False},
    ):
        assert_same(*both(net, inputs, target=1, perturbations_per_eval=3, **arguments))


def test_lime_of_a_tuple_of_one_returns_a_tuple():
    theirs, ours = both(smooth_net().float(), (X,), target=0)
    assert isinstance(ours, tuple)
    assert_same(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float64])
def test_lime_equals_captum_for_input_types(dtype):
    x = (X * 3).to(dtype)
    net = smooth_net().float()
    theirs, ours = both(lambda a: net(a.float()), x, target=1)
    assert ours.dtype == torch.float32
    assert_same(theirs, ours, 1e-3 if dtype == torch.float16 else 1e-5)


def test_lime_accepts_an_empty_second_tensor():
    net = smooth_net().float()
    theirs, ours = both(lambda a, b: net(a), (X, torch.zeros(4, 0)), target=1)
    assert_same(theirs, ours)


@pytest.mark.parametrize("shape", [(0,), (1, 0)])
@pytest.mark.parametrize("perturbations_per_eval", [1, 3])
def test_lime_accepts_an_empty_tensor_of_any_leading_size(shape, perturbations_per_eval):
    net = smooth_net().float()
    masks = (FEATURE_MASKS["shared"], torch.zeros(shape, dtype=torch.long))
    for x in (X[:1],) if shape == (1, 0) else (X[:1], X):
        theirs, ours = both(
            lambda a, b: net(a) + b.sum(),
            (x, torch.zeros(shape)),
            target=1,
            feature_mask=masks,
            perturbations_per_eval=perturbations_per_eval,
        )
        assert_same(theirs, ours)


@pytest.mark.parametrize("masked", [False, True])
def test_lime_of_one_example_accepts_a_ragged_tensor(masked):
    """Token ids of one example, as in recommendation models: (4,) beside (1, 6)."""
    net, embedding = smooth_net().float(), torch.randn(9, 3)
    forward = lambda a, ids: net(a) + embedding[ids].view(len(a), -1, 3).sum(1)  # noqa: E731
    masks = {"feature_mask": (FEATURE_MASKS["shared"], torch.tensor([3, 3, 4, 4]))} if masked else {}
    inputs = (X[:1], torch.tensor([1, 4, 2, 8]))
    theirs, ours = both(forward, inputs, target=1, perturbations_per_eval=3, **masks)
    assert ours[1].shape == (4,)
    assert_same(theirs, ours)
    bag = nn.EmbeddingBag(9, 3, mode="sum")  # one example's offsets are not those of many
    theirs, ours = both(
        lambda a, ids, offsets: net(a) + bag(ids, offsets),
        inputs,
        target=1,
        additional_forward_args=(torch.tensor([0]),),
    )
    assert_same(theirs, ours)
    with pytest.raises(AssertionError, match="different batch sizes"):
        Lime(forward).attribute((X, inputs[1][:3]), target=1)


def test_lime_of_a_one_row_forward_function_equals_captum():
    net = smooth_net().float()
    theirs, ours = both(lambda x: net(x.reshape(1, 6)), X[:1], target=1)
    assert_same(theirs, ours)


def test_lime_float64_in_float64_out():
    net = smooth_net()
    exact = Lime(net, Ridge(0.1)).attribute(X.double(), target=1)
    assert exact.dtype == torch.float64
    assert Lime(lambda x: 0.5, Ridge(0.1)).attribute(X.double()).dtype == torch.float64
    assert Lime(net.float(), Ridge(0.1)).attribute(X, target=1).dtype == torch.float32
    assert Lime(lambda x: net(x).half(), Ridge(0.1)).attribute(X, target=1).dtype == torch.float32


@pytest.mark.parametrize("create_graph", [False, True])
def test_lime_equals_captum_with_and_without_create_graph(create_graph):
    torch.manual_seed(0)
    ours = Lime(smooth_net().float()).attribute(X, target=1, create_graph=create_graph)
    torch.manual_seed(0)
    theirs = captum.attr.Lime(smooth_net().float()).attribute(X, target=1)
    assert ours.requires_grad == create_graph
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-5)


def test_lime_is_a_subclass_of_captums_class():
    assert isinstance(Lime(smooth_net()), captum.attr.Lime)
    assert hasattr(Lime.attribute, "__wrapped__")  # NoiseTunnel looks for it


def test_lime_shows_progress(capsys):
    Lime(smooth_net().float()).attribute(X, target=0, n_samples=9, perturbations_per_eval=2, show_progress=True)
    assert "Lime attribution: 100%" in capsys.readouterr().err


# --- one computation a batch ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.model(x)


def test_lime_rows_per_forward_are_perturbations_times_examples():
    net = Counting(smooth_net().float())
    Lime(net, Ridge()).attribute(X, target=0, n_samples=10, perturbations_per_eval=4)
    assert net.rows == [4, 4, 16, 16, 8]  # a look at the outputs, then 10 copies of 4 examples


def test_lime_default_chunk_takes_a_small_batch_at_once():
    net = Counting(smooth_net().float())
    Lime(net, Ridge()).attribute(X, target=0, n_samples=100)
    assert net.rows == [4, 4, 400]


def test_lime_default_chunk_is_bounded():
    net = Counting(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 32 * 32, 2)))
    mask = torch.arange(32 * 32).view(1, 1, 32, 32) // 256
    Lime(net, Ridge()).attribute(torch.randn(2, 3, 32, 32), target=0, n_samples=200, feature_mask=mask)
    assert sum(net.rows) == 2 + 2 + 400
    assert 2**18 < max(net.rows) * 16 * 32 * 32 <= 2**19


# --- sampling for training -----------------------------------------------------------------------------------------


def test_lime_independent_masks_come_from_the_generator():
    lime = Lime(smooth_net(), Ridge(0.1))

    def draw(seed, **arguments):
        generator = torch.Generator().manual_seed(seed)
        return lime.attribute(X.double(), target=1, sampling="independent", generator=generator, **arguments)

    stream = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(stream, torch.get_rng_state())


def test_lime_independent_sampling_converges_to_captums_result():
    lime = Lime(smooth_net(), Ridge(0.1))
    torch.manual_seed(0)
    theirs = lime.attribute(X.double(), target=1, n_samples=20_000)
    ours = lime.attribute(X.double(), target=1, n_samples=20_000, sampling="independent")
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("sampling", ["captum", "independent"])
def test_lime_with_share_masks_equals_single_examples(sampling):
    lime = Lime(smooth_net(), Ridge(0.1), MaskSimilarity())

    def draw(x):
        torch.manual_seed(3)
        return lime.attribute(x.double(), target=1, sampling=sampling, share_masks=True)

    together, alone = draw(X), torch.cat([draw(x[None]) for x in X])
    torch.testing.assert_close(together, alone)


# --- the gradient --------------------------------------------------------------------------------------------------

TRAINABLE = {
    "ridge": Ridge(0.1),
    "ridge without intercept": Ridge(0.1, fit_intercept=False),
    "regression": LinearRegression(),
    "lasso": Lasso(0.01, tol=1e-14, max_iter=100_000),
    "captum's ridge": SkLearnRidge(alpha=0.1),
    "captum's lasso": SkLearnLasso(alpha=0.01, tol=1e-14, max_iter=100_000),
}


@pytest.mark.parametrize("surrogate", TRAINABLE.values(), ids=TRAINABLE)
@pytest.mark.parametrize("n_samples", [4, 12, 30])
def test_lime_gradient_equals_finite_differences(surrogate, n_samples):
    if n_samples == 4 and isinstance(surrogate, (Lasso, SkLearnLasso)):
        pytest.skip("with fewer samples than features the Lasso has no unique minimum")
    net, x = smooth_net(), X.double()
    weights = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss():
        torch.manual_seed(2)
        attribution = Lime(net, surrogate).attribute(
            x, target=[0, 1, 2, 0], baselines=0.2, n_samples=n_samples, perturbations_per_eval=3, create_graph=True
        )
        return (attribution * weights).sum() + attribution.square().sum() + net(x).square().mean()

    assert gradient_error(loss, net) < 1e-5


@pytest.mark.parametrize("surrogate", [TRAINABLE["ridge"], TRAINABLE["regression"], TRAINABLE["lasso"]])
@pytest.mark.parametrize("kernel", [None, get_exp_kernel_similarity_function("euclidean", 2.0), MaskSimilarity()])
@pytest.mark.parametrize(
    "perturb", [None, lambda _, num_interp_features, **__: torch.ones(1, num_interp_features).bernoulli(0.5)]
)
def test_lime_gradient_in_the_inputs_equals_finite_differences(surrogate, kernel, perturb):
    """Through the masked copies and through the kernel, which looks at the inputs; the model may be frozen."""
    net, x = smooth_net().requires_grad_(False), X[:2].double().requires_grad_()
    weights = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(x):
        torch.manual_seed(2)
        return (
            Lime(net, surrogate, kernel, perturb).attribute(x, target=1, n_samples=30, create_graph=True) * weights
        ).sum()

    assert torch.autograd.gradcheck(loss, (x,), rtol=1e-5, atol=1e-7)


def test_lime_lasso_with_an_empty_active_set_has_a_zero_gradient():
    net = smooth_net()
    attribution = Lime(net, Lasso(alpha=100.0)).attribute(X.double(), target=1, create_graph=True)
    assert attribution.requires_grad
    assert not attribution.detach().any()
    attribution.sum().backward()
    assert not net[0].weight.grad.any()


def test_lime_does_not_set_the_grad_of_parameters():
    net = smooth_net()
    Lime(net, Ridge()).attribute(X.double(), target=1, create_graph=True)
    assert all(parameter.grad is None for parameter in net.parameters())


# --- where there can be no graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_lime_with_create_graph_but_grad_disabled_is_an_error(mode):
    with mode(), pytest.raises(RuntimeError, match=f"{mode.__name__}.*enable_grad"):
        Lime(smooth_net(), Ridge()).attribute(X.double(), target=1, create_graph=True)


def test_lime_with_a_surrogate_without_gradient_is_an_error():
    lime = Lime(smooth_net(), SkLearnLasso(alpha=0.01, positive=True))
    with pytest.raises(RuntimeError, match=r"no gradient.*captum_idexpo.attr.surrogates"):
        lime.attribute(X.double(), target=1, create_graph=True)


NO_GRAPH = {
    "frozen": lambda x: smooth_net().requires_grad_(False)(x)[:, 0],
    "detached": lambda x: smooth_net()(x)[:, 0].detach(),
    "no parameters": lambda x: x.sum(1),
    "a number": lambda x: 3.0,
}


@pytest.mark.parametrize("forward", NO_GRAPH.values(), ids=NO_GRAPH)
def test_lime_of_an_output_without_gradient_is_an_error(forward):
    with pytest.raises(RuntimeError, match=r"depends on nothing that requires gradient.*requires_grad_"):
        Lime(forward, Ridge()).attribute(X.double(), create_graph=True)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_lime_names_bad_arguments():
    attribute = Lime(smooth_net().float(), Ridge()).attribute
    cases = [
        (TypeError, "must hold whole numbers", {"feature_mask": torch.full((1, 6), 0.5)}),
        (TypeError, "must hold whole numbers", {"feature_mask": torch.ones(1, 6, dtype=torch.bool)}),
        (RuntimeError, "does not fit the input", {"feature_mask": torch.zeros(1, 5, dtype=torch.long)}),
        (RuntimeError, "does not fit the input", {"feature_mask": torch.zeros(3, 6, dtype=torch.long)}),
        (RuntimeError, "baseline of shape", {"baselines": torch.zeros(1, 5)}),
        (AssertionError, "baseline", {"baselines": "zero"}),
        (IndexError, "2 values for 1 input", {"baselines": (0, 0)}),
        (ValueError, "n_samples", {"n_samples": 0}),
        (ValueError, "perturbations_per_eval", {"perturbations_per_eval": 0}),
        (ValueError, "sampling", {"sampling": "latin"}),
        (ValueError, "sampling='independent'", {"generator": torch.Generator()}),
        (IndexError, "out of bounds", {"target": 9}),
        (RuntimeError, "9 is out of bounds for dimension 1", {"target": torch.tensor([0, 1, 9, 0])}),
        (AssertionError, "target missing", {"target": None}),
    ]
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            attribute(X, **{"target": 1, **arguments})
    with pytest.raises(IndexError, match="empty"):
        attribute(X[:0], target=1)
    with pytest.raises(IndexError, match="no rows"):
        Lime(lambda a, b: a.sum(1), Ridge()).attribute((X, torch.zeros(0, 3)))
    with pytest.raises(AssertionError):
        attribute({"x": X}, target=1)


def test_lime_custom_functions_need_captum_sampling():
    with pytest.raises(ValueError, match="sample by sample"):
        Lime(smooth_net(), Ridge(), lambda *_, **__: 1.0).attribute(X.double(), target=1, sampling="independent")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("target", [torch.zeros(20, dtype=torch.int64), [0] * 20, [(0,)] * 20])
@pytest.mark.parametrize("perturbations_per_eval", [None, 20, 5])
def test_lime_target_for_another_batch_size_is_an_error(batch, target, perturbations_per_eval):
    """Also where it is as long as a forward pass has rows."""
    rows = {} if perturbations_per_eval is None else {"perturbations_per_eval": perturbations_per_eval}
    for lime in (Lime(smooth_net().float(), Ridge()), captum.attr.Lime(smooth_net().float())):
        with pytest.raises(AssertionError):
            lime.attribute(X[:batch], target=target, n_samples=20, **rows)


def test_lime_outputs_that_are_not_finite_are_an_error():
    net = smooth_net().float()
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Lime(lambda x: net(x) / 0, Ridge()).attribute(X, target=1)
    with pytest.raises(NonFiniteError, match="similarity"):
        Lime(net, Ridge(), lambda *_, **__: float("nan")).attribute(X, target=1)


@pytest.mark.parametrize(
    ("weight", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (-1.0, "negative")]
)
def test_lime_similarity_that_is_negative_or_not_finite_is_an_error(weight, message):
    weights = iter([1.0, weight, *[1.0] * 38])
    lime = Lime(smooth_net().float(), Ridge(), lambda *_, **__: next(weights))
    with pytest.raises(ValueError, match=message):
        lime.attribute(X, target=0, n_samples=10)


def test_lime_weights_may_add_up_to_infinity_in_float32():
    net = smooth_net().float()
    attributions = []
    for weight in (1e3, 3e38):
        torch.manual_seed(0)
        lime = Lime(net, LinearRegression(), lambda *_, weight=weight, **__: weight)
        attributions.append(lime.attribute(X, target=0, n_samples=10))
    torch.testing.assert_close(*attributions)


def test_lime_kernel_width_that_leaves_all_weights_zero_is_an_error():
    with pytest.raises(ValueError, match="raise the kernel_width"):
        Lime(smooth_net(), Ridge(), MaskSimilarity(0.001)).attribute(X.double(), target=1, n_samples=5)


def test_lime_kernel_does_not_overflow_for_large_inputs():
    net = smooth_net().float()
    assert_same(*both(lambda x: net(x / 1e10), X * 1e10, target=1))


def test_lime_weights_and_systems_are_not_changed_by_autocast():
    net = smooth_net().float()
    torch.manual_seed(0)
    plain = Lime(lambda x: net(x).float(), Ridge(0.1), get_exp_kernel_similarity_function("cosine", 0.1))
    expected = plain.attribute(X, target=1)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        casted = Lime(lambda x: precise(net, x), Ridge(0.1), plain.similarity_func).attribute(X, target=1)
    torch.testing.assert_close(casted, expected)


def precise(net, x):
    with torch.autocast("cpu", enabled=False):
        return net(x)


def test_lime_warns_of_many_features():
    with pytest.warns(UserWarning, match="group them with a feature_mask"):
        Lime(nn.Linear(10_001, 1), Ridge()).attribute(torch.randn(1, 10_001), target=0, n_samples=2)


# --- eq. (12) ------------------------------------------------------------------------------------------------------


def test_id_expo_lime_is_equation_12():
    net = smooth_net()
    torch.manual_seed(4)
    ours = id_expo_lime(net, alpha=0.05, kernel_width=0.3).attribute(X[:1].double(), target=2, n_samples=50)
    torch.manual_seed(4)
    z = torch.bernoulli(torch.full((50, 6), 0.5)).double()
    v = net(z * X[:1].double()).softmax(1)[:, 2]
    k = torch.exp(-((1 - z.sum(1) / (z.norm(dim=1).clamp_min(1e-12) * 6**0.5)) ** 2) / (2 * 0.3**2))
    phi = torch.linalg.inv(z.T @ k.diag() @ z + 0.05 * torch.eye(6).double()) @ z.T @ k.diag() @ v
    torch.testing.assert_close(ours[0], phi.detach())


def test_id_expo_lime_explains_both_classes_of_one_column():
    net = smooth_net(n_classes=1)
    attributions = []
    for target in (0, 1):
        torch.manual_seed(0)
        attributions.append(id_expo_lime(net, alpha=1e-9).attribute(X.double(), target=target, n_samples=50))
    torch.manual_seed(0)
    constant = Lime(lambda x: torch.ones(len(x), dtype=x.dtype), Ridge(1e-9, False), MaskSimilarity())
    torch.testing.assert_close(attributions[0] + attributions[1], constant.attribute(X.double(), n_samples=50))


@pytest.mark.parametrize("share_masks", [False, True])
@pytest.mark.parametrize("similarity", [None, MaskSimilarity()])
@pytest.mark.parametrize("n_samples", [40, 4])
@pytest.mark.parametrize("surrogate", [Ridge(), Lasso(0.01)])
def test_lime_solves_large_systems_a_few_examples_at_a_time(monkeypatch, share_masks, similarity, n_samples, surrogate):
    """The same coefficients, whatever fits at once: two systems, one. Ridge has but one where all is shared."""
    x = torch.randn(5, 6, dtype=torch.float64)
    solved = []
    kind = type(surrogate)
    solve = kind.solve
    monkeypatch.setattr(kind, "solve", lambda *given: solved.append(solve(*given)) or solved[-1])
    coefficients, n_solved = [], []
    for at_once in (2**22, 2 * max(n_samples, 6) * 6, 1):
        monkeypatch.setattr("captum_idexpo.attr._perturbation._VALUES_AT_ONCE", at_once)
        solved.clear()
        lime = Lime(smooth_net(), surrogate, similarity)
        generator = torch.Generator().manual_seed(0)
        arguments = {"sampling": "independent", "share_masks": share_masks, "generator": generator}
        coefficients.append(lime.attribute(x, target=0, n_samples=n_samples, **arguments))
        n_solved.append(len(solved))
    torch.testing.assert_close(coefficients[0], coefficients[1])
    torch.testing.assert_close(coefficients[0], coefficients[2])
    one_system = share_masks and similarity and kind is Ridge
    assert n_solved == ([1, 1, 1] if one_system else [1, 3, 5])
