"""Weights that set themselves, the model's mode, and targets that belong to another task."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import InputXGradient, Saliency, id_expo_lime
from captum_idexpo.regularizers import (
    Fidelity,
    InsertionDeletion,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)
from tests.helpers import smooth_conv_net, smooth_net

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
A = torch.zeros(8, 6, dtype=torch.float64)
A[:, :2] = 1
ALL = {
    "fidelity": lambda model, **more: Fidelity(model, **more),
    "stability": lambda model, **more: Stability(model, **more),
    "right_reasons": lambda model, **more: RightForTheRightReasons(model, **more),
    "saliency_guided": lambda model, **more: SaliencyGuided(model, **more),
    "smoothness": lambda model, **more: Smoothness(InputXGradient(model), **more),
    "sparsity": lambda model, **more: Sparsity(InputXGradient(model), **more),
}
each = pytest.mark.parametrize(("term", "make"), ALL.items(), ids=list(ALL))


@each
def test_the_term_is_weighted_and_has_a_name(term, make):
    model = smooth_net()
    torch.manual_seed(0)
    single = make(model, weight=1.0)(X, Y, A)
    torch.manual_seed(0)
    double = make(model, weight=2.0)(X, Y, A)
    assert list(single) == [term]
    assert single[term].dim() == 0
    assert single[term].requires_grad
    torch.testing.assert_close(double[term], 2 * single[term])


@each
def test_under_no_grad_the_value_is_the_same_without_a_graph(term, make):
    regularizer = make(smooth_net())
    torch.manual_seed(0)
    attached = regularizer(X, Y, A)[term]
    with torch.no_grad():
        torch.manual_seed(0)
        detached = regularizer(X, Y, A)[term]
    assert not detached.requires_grad
    torch.testing.assert_close(attached.detach(), detached)


@each
def test_the_model_belongs_to_the_user(term, make):
    model = smooth_net()
    regularizer = make(model)
    assert not list(regularizer.parameters())
    assert not regularizer.state_dict()
    assert not any(module is model for module in regularizer.modules())


@each
def test_the_mode_is_held_and_given_back(term, make):
    net = smooth_conv_net().train()
    flat = nn.Sequential(nn.Unflatten(1, (2, 6, 6)), net)
    x, y = torch.randn(4, 72, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    a = torch.ones(4, 72, dtype=torch.float64)
    a[:, 0] = 0
    statistics = net[1].running_mean.clone()
    regularizer = make(flat)
    values = []
    for _ in range(2):  # dropout would give other values
        torch.manual_seed(0)
        values.append(regularizer(x, y, a)[term].item())
        assert net.training
        assert net[3].training
    assert values[0] == values[1]
    assert torch.equal(net[1].running_mean, statistics)


@each
def test_an_automatic_weight_is_a_ratio_to_the_task_loss(term, make):
    model = smooth_net()
    regularizer = make(model, weight="auto", ratio=0.25)
    assert math.isnan(regularizer.weight)
    with pytest.raises(RuntimeError, match=r"'auto' and not set.*calibrate\(task_loss, inputs, target\)"):
        regularizer(X, Y, A)
    task = nn.functional.cross_entropy(model(X), Y)
    torch.manual_seed(0)
    regularizer.calibrate(task, X, Y, A)
    torch.manual_seed(0)
    torch.testing.assert_close(regularizer(X, Y, A)[term], 0.25 * task, rtol=1e-6, atol=0)
    weight = regularizer.weight
    regularizer.calibrate(100 * task, X, Y, A)  # only once
    assert regularizer.weight == weight


def test_a_batch_that_sets_no_weight_asks_for_another_try():
    model = smooth_net()
    regularizer, task = RightForTheRightReasons(model, weight="auto"), torch.tensor(1.0)
    regularizer.calibrate(task, X, Y, torch.zeros_like(A))  # no annotation, no penalty to be a share of
    assert float(regularizer(X, Y, A)["right_reasons"].detach()) == 0
    with pytest.raises(RuntimeError, match="not set yet: before each step call"):
        regularizer(X, Y, A)
    regularizer.calibrate(task, X, Y, A)
    assert float(regularizer(X, Y, A)["right_reasons"].detach()) == pytest.approx(1.0)


class Scaled(nn.Module):
    """Takes a factor an example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smooth_net()

    def forward(self, x, factor):
        return self.net(x) * factor[:, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda model, explainer, **more: Smoothness(explainer, **more),
        lambda model, explainer, **more: Sparsity(explainer, **more),
        lambda model, explainer, **more: RightForTheRightReasons(model, explainer=explainer, **more),
    ],
)
def test_additional_forward_args_reach_the_explained_function(make):
    model, factor = Scaled(), torch.rand(8, dtype=torch.float64)
    regularizer = make(model, InputXGradient(model), attribute_kwargs={"additional_forward_args": factor})

    def scaled(x):
        return model.net(x) * factor[:, None]

    twin = make(scaled, InputXGradient(scaled), eval_mode=False)
    twin._explains_one_column = False  # which it would ask of a single row
    for name, value in twin(X, Y, A).items():
        torch.testing.assert_close(regularizer(X, Y, A)[name], value)


def test_a_single_row_without_statistics_is_never_asked_for():
    """Whether one column is explained is seen from one row, which BatchNorm in training mode cannot take."""
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    for forward_func in (None, lambda x: net(x)):
        explainer = InputXGradient(net)
        terms = InsertionDeletion(explainer, baselines=0.0, forward_func=forward_func, eval_mode=False)(X, Y)
        assert all(value.isfinite() for value in terms.values())
    assert Sparsity(InputXGradient(net), eval_mode=False)(X, Y)["sparsity"].isfinite()


def test_the_columns_that_count_are_those_of_what_is_explained():
    """The LIME of a one-column model explains two probabilities."""
    model, y = smooth_net(n_classes=1), Y % 2
    lime = id_expo_lime(model)
    torch.manual_seed(0)
    ours = RightForTheRightReasons(model, explainer=lime)(X, y, A)["right_reasons"]
    torch.manual_seed(0)
    attribution = lime.attribute(X, target=y)
    torch.testing.assert_close(ours.detach(), (attribution * A).square().sum(dim=1).mean())


@pytest.mark.parametrize("make", [SaliencyGuided, lambda model: Sparsity(InputXGradient(model))])
def test_soft_labels_are_an_error_that_says_what_to_do(make):
    with pytest.raises(TypeError, match=r"float64 of shape \(8, 3\)\. Pass target\.argmax\(dim=1\)"):
        make(smooth_net())(X, torch.full((8, 3), 1 / 3).double())


def test_the_loss_module_calibrates_and_a_state_dict_carries_the_weight():
    model = smooth_net()
    loss = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto", ratio=0.5)])
    _, parts = loss((X, Y, A))
    torch.testing.assert_close(parts["right_reasons"], 0.5 * parts["task"], rtol=1e-6, atol=0)
    other = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto")])
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert other.regularizers[0].weight == loss.regularizers[0].weight


def test_a_first_batch_without_annotations_leaves_the_weight_to_the_next():
    model = smooth_net()
    loss = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto")])
    _, parts = loss((X, Y, torch.zeros_like(A)))
    assert parts["right_reasons"] == 0
    assert math.isnan(loss.regularizers[0].weight)
    loss((X, Y, A))
    assert loss.regularizers[0].weight > 0


def test_the_history_reports_the_weight():
    model = smooth_net().float()
    data = torch.utils.data.TensorDataset(X.float(), Y, A.float())
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        [RightForTheRightReasons(model, weight="auto", ratio=0.1), SaliencyGuided(model, weight=0.3)],
        show_progress=False,
    )
    history = trainer.fit(torch.utils.data.DataLoader(data, batch_size=4), epochs=2)
    assert history[0]["right_reasons_weight"] == history[1]["right_reasons_weight"] > 0
    assert "saliency_guided_weight" not in history[0]


@each
def test_a_regressions_targets_are_refused_where_classes_are_said(term, make):
    with pytest.raises(ValueError, match=r"real numbers.*outputs='logits'.*outputs='raw'"):
        make(smooth_net())(X, torch.linspace(-3, 3, 8), A)


@pytest.mark.parametrize("term", ["fidelity", "stability", "right_reasons", "smoothness", "sparsity"])
def test_a_regression(term):
    model = smooth_net(n_classes=1)
    terms = ALL[term](model, outputs="raw")(X, torch.linspace(-3, 3, 8), A)
    terms[term].backward()
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number"),
        ({"weight": math.nan}, "weight must be a finite number"),
        ({"weight": "heavy"}, "a number or 'auto'"),
        ({"ratio": -0.1}, "ratio must be a finite number"),
        ({"outputs": "softmax"}, "outputs must be one of"),
    ],
)
@each
def test_bad_settings(term, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(smooth_net(), **arguments)


@each
def test_bad_inputs(term, make):
    regularizer = make(smooth_net())
    with pytest.raises(ValueError, match="batch is empty"):
        regularizer(X[:0], Y[:0], A[:0])
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        regularizer({"x": X}, Y, A)


def test_a_function_whose_mode_cannot_be_held_is_warned_of():
    model = smooth_net()
    with pytest.warns(UserWarning, match="cannot be held in eval mode"):
        Stability(lambda x: model(x))
    Stability(lambda x: model(x), eval_mode=False)
    with pytest.raises(TypeError, match="must be a module or a forward function"):
        Stability("model")


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_an_evaluation_sets_no_automatic_weight(how):
    """Lightning evaluates before it trains."""
    model = smooth_net()
    regularizer = RightForTheRightReasons(model, weight="auto", ratio=0.5)
    loss = ExplanationRegularizedLoss(model, [regularizer])
    if how == "eval":
        total, _ = loss.eval()((X, Y, A))
    else:
        with torch.no_grad():
            total, _ = loss((X, Y, A))
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(model(X), Y).detach(), check_dtype=False)
    assert regularizer.needs_calibration
    loss.train()((X, Y, A))
    assert not regularizer.needs_calibration


def test_an_automatic_weight_of_what_is_not_finite_or_has_no_share_is_an_error():
    model = smooth_net()
    with pytest.raises(NonFiniteError, match="no ratio"):
        Stability(model, weight="auto").calibrate(torch.tensor(1.0), X * math.nan, Y)
    with pytest.raises(ValueError, match="not negative"):
        Stability(model, weight="auto").calibrate(torch.tensor(-2.0), X, Y)


def test_rounding_errors_get_no_weight():
    linear = nn.Linear(6, 1).double()
    regularizer = Fidelity(linear, weight="auto", outputs="raw")
    regularizer.calibrate(torch.tensor(1.0), X, torch.zeros(8, 1))
    assert math.isnan(regularizer.weight)
    assert regularizer(X, torch.zeros(8, 1))["fidelity"].item() == 0


@pytest.mark.parametrize("term", ["right_reasons", "smoothness", "sparsity", "saliency_guided"])
def test_a_single_logit_of_two_classes(term):
    model = smooth_net(n_classes=1)
    arguments = {"explainer": InputXGradient(model)} if term == "right_reasons" else {}
    for target in (torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]), torch.tensor([[0.0], [1.0]] * 4)):
        assert ALL[term](model, **arguments)(X, target, A)[term].item() > 0


@pytest.mark.parametrize("term", ["right_reasons", "saliency_guided", "fidelity", "stability"])
def test_token_ids_have_neither_gradient_nor_neighbours(term):
    with pytest.raises(TypeError, match=r"torch\.int64.*embedding"):
        ALL[term](smooth_net())(X.long(), Y, A)


@pytest.mark.parametrize("term", ["fidelity", "stability", "saliency_guided", "right_reasons"])
def test_squares_are_taken_in_single_precision_at_least(term):
    """Squares of halves would vanish."""
    model = smooth_net().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ALL[term](model)(X.float(), Y, A)[term].dtype == torch.float32


def test_one_row_is_looked_at_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    assert SaliencyGuided(model, eval_mode=False)(X, Y)["saliency_guided"].isfinite()


def test_numbers_of_numpy_are_weights():
    for weight in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert Stability(smooth_net(), weight=weight).weight == weight


def test_a_task_loss_of_zero_leaves_the_weight_to_the_next_batch():
    model = smooth_net()
    regularizer = Stability(model, weight="auto")
    regularizer.calibrate(torch.tensor(0.0), X, Y)
    assert regularizer.needs_calibration
    assert regularizer(X, Y)["stability"] == 0
    regularizer.calibrate(torch.tensor(1.0), X, Y)
    assert regularizer.weight > 0


def test_labels_of_any_integers_are_labels():
    model = smooth_net()
    for regularizer in (
        InsertionDeletion(Saliency(model), baselines=0.0, step_size=1),
        Sparsity(InputXGradient(model)),
    ):
        expected = regularizer(X, Y)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert regularizer(X, Y.to(dtype)) == expected
