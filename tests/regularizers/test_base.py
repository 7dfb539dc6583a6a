"""Weights that set themselves, the model's mode, and targets that belong to another task."""

from __future__ import annotations

import copy
import math
import warnings

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
def test_regularizer_term_is_weighted_and_named(term, make):
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
def test_regularizer_under_no_grad_has_the_same_value_and_no_graph(term, make):
    regularizer = make(smooth_net())
    torch.manual_seed(0)
    attached = regularizer(X, Y, A)[term]
    with torch.no_grad():
        torch.manual_seed(0)
        detached = regularizer(X, Y, A)[term]
    assert not detached.requires_grad
    torch.testing.assert_close(attached.detach(), detached)


@each
def test_regularizer_does_not_register_the_model_as_a_submodule(term, make):
    model = smooth_net()
    regularizer = make(model)
    assert not list(regularizer.parameters())
    assert not regularizer.state_dict()
    assert not any(module is model for module in regularizer.modules())


@each
def test_regularizer_holds_eval_mode_and_restores_the_training_mode(term, make):
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
def test_automatic_weight_is_a_ratio_to_the_task_loss(term, make):
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


def test_automatic_weight_stays_unset_after_a_batch_without_penalty():
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


def test_one_column_detection_evaluates_no_single_row_in_training_mode():
    """Whether one column is explained is seen from one row, which BatchNorm in training mode cannot take."""
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    for forward_func in (None, lambda x: net(x)):
        explainer = InputXGradient(net)
        terms = InsertionDeletion(explainer, baselines=0.0, forward_func=forward_func, eval_mode=False)(X, Y)
        assert all(value.isfinite() for value in terms.values())
    assert Sparsity(InputXGradient(net), eval_mode=False)(X, Y)["sparsity"].isfinite()


def test_one_column_detection_counts_the_columns_of_the_explained_function():
    """The LIME of a one-column model explains two probabilities."""
    model, y = smooth_net(n_classes=1), Y % 2
    lime = id_expo_lime(model)
    torch.manual_seed(0)
    ours = RightForTheRightReasons(model, explainer=lime)(X, y, A)["right_reasons"]
    torch.manual_seed(0)
    attribution = lime.attribute(X, target=y, n_samples=3 * X.shape[1], sampling="independent")
    torch.testing.assert_close(ours.detach(), (attribution * A).square().sum(dim=1).mean())


@pytest.mark.parametrize("make", [SaliencyGuided, lambda model: Sparsity(InputXGradient(model))])
def test_soft_labels_are_explained_by_their_largest_class(make):
    soft = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    values = []
    for target in (soft, soft.argmax(1)):
        torch.manual_seed(0)
        values.append(make(smooth_net())(X, target))
    assert values[0] == values[1]


@pytest.mark.parametrize("target", [torch.eye(3, dtype=torch.long).repeat(3, 1)[:8], torch.full((8, 3), 0.7)])
@pytest.mark.parametrize("make", [SaliencyGuided, lambda model: Sparsity(InputXGradient(model))])
def test_target_of_several_columns_is_refused_with_the_ways_out(make, target):
    with pytest.raises(TypeError, match=r"shape \(8, 3\).*target\.argmax\(dim=1\).*outputs='multilabel'"):
        make(smooth_net())(X, target)


def test_automatic_weight_is_set_by_the_loss_and_saved_in_its_state_dict():
    model = smooth_net()
    loss = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto", ratio=0.5)])
    _, parts = loss((X, Y, A))
    torch.testing.assert_close(parts["right_reasons"], 0.5 * parts["task"], rtol=1e-6, atol=0)
    other = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto")])
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert other.regularizers[0].weight == loss.regularizers[0].weight


def test_automatic_weight_is_set_by_the_first_batch_with_annotations():
    model = smooth_net()
    loss = ExplanationRegularizedLoss(model, [RightForTheRightReasons(model, weight="auto")])
    _, parts = loss((X, Y, torch.zeros_like(A)))
    assert parts["right_reasons"] == 0
    assert math.isnan(loss.regularizers[0].weight)
    loss((X, Y, A))
    assert loss.regularizers[0].weight > 0


def test_training_history_reports_the_automatic_weight():
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
def test_regression_targets_are_refused_for_class_outputs(term, make):
    with pytest.raises(ValueError, match=r"real numbers.*outputs='logits'.*outputs='raw'"):
        make(smooth_net())(X, torch.linspace(-3, 3, 8), A)


@pytest.mark.parametrize("term", ["fidelity", "stability", "right_reasons", "smoothness", "sparsity"])
def test_regression_with_raw_outputs_has_a_finite_gradient(term):
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
def test_regularizer_refuses_bad_settings(term, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(smooth_net(), **arguments)


@each
def test_regularizer_refuses_bad_inputs(term, make):
    regularizer = make(smooth_net())
    with pytest.raises(ValueError, match="batch is empty"):
        regularizer(X[:0], Y[:0], A[:0])
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        regularizer({"x": X}, Y, A)


def test_eval_mode_warns_of_a_function_whose_model_is_unknown():
    model = smooth_net()
    with pytest.warns(UserWarning, match="cannot be held in eval mode"):
        Stability(lambda x: model(x))
    Stability(lambda x: model(x), eval_mode=False)
    with pytest.raises(TypeError, match="must be a module or a forward function"):
        Stability("model")


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_automatic_weight_is_not_set_by_an_evaluation(how):
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


def test_automatic_weight_refuses_non_finite_terms_and_negative_losses():
    model = smooth_net()
    with pytest.raises(NonFiniteError, match="no ratio"):
        Stability(model, weight="auto").calibrate(torch.tensor(1.0), X * math.nan, Y)
    with pytest.raises(ValueError, match="not negative"):
        Stability(model, weight="auto").calibrate(torch.tensor(-2.0), X, Y)


def test_automatic_weight_ignores_terms_of_rounding_error_size():
    linear = nn.Linear(6, 1).double()
    regularizer = Fidelity(linear, weight="auto", outputs="raw")
    regularizer.calibrate(torch.tensor(1.0), X, torch.zeros(8, 1))
    assert math.isnan(regularizer.weight)
    assert regularizer(X, torch.zeros(8, 1))["fidelity"].item() == 0


@pytest.mark.parametrize("term", ["right_reasons", "smoothness", "sparsity", "saliency_guided"])
def test_regularizer_of_a_single_logit_handles_two_classes(term):
    model = smooth_net(n_classes=1)
    arguments = {"explainer": InputXGradient(model)} if term == "right_reasons" else {}
    for target in (torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]), torch.tensor([[0.0], [1.0]] * 4)):
        assert ALL[term](model, **arguments)(X, target, A)[term].item() > 0


@pytest.mark.parametrize("term", ["right_reasons", "saliency_guided", "fidelity", "stability"])
def test_token_ids_are_refused_where_gradients_or_neighbors_are_needed(term):
    with pytest.raises(TypeError, match=r"torch\.int64.*embedding"):
        ALL[term](smooth_net())(X.long(), Y, A)


@pytest.mark.parametrize("term", ["fidelity", "stability", "saliency_guided", "right_reasons"])
def test_regularizer_squares_in_single_precision_under_autocast(term):
    """Squares of halves would vanish."""
    model = smooth_net().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ALL[term](model)(X.float(), Y, A)[term].dtype == torch.float32


def test_saliency_guided_without_eval_mode_accepts_batch_norm():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    assert SaliencyGuided(model, eval_mode=False)(X, Y)["saliency_guided"].isfinite()


def test_regularizer_accepts_numpy_numbers_as_weight():
    for weight in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert Stability(smooth_net(), weight=weight).weight == weight


def test_automatic_weight_warns_of_a_task_loss_that_is_nearly_zero():
    first, second = (Stability(smooth_net(), weight="auto") for _ in range(2))
    regression = Stability(smooth_net(), weight="auto", outputs="raw")  # which may have small units
    with pytest.warns(UserWarning, match=r"The task loss is 2.0e-04, .*already trained.*Pass a number"):
        first.calibrate(torch.tensor(2e-4), X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.calibrate(torch.tensor(0.2), X, Y)
        regression.calibrate(torch.tensor(2e-4), X, torch.zeros(8, 3).double())


def test_automatic_weight_stays_unset_after_a_task_loss_of_zero():
    model = smooth_net()
    regularizer = Stability(model, weight="auto")
    regularizer.calibrate(torch.tensor(0.0), X, Y)
    assert regularizer.needs_calibration
    assert regularizer(X, Y)["stability"] == 0
    regularizer.calibrate(torch.tensor(1.0), X, Y)
    assert regularizer.weight > 0


def test_labels_of_any_integer_type_give_the_same_terms():
    model = smooth_net()
    for regularizer in (
        InsertionDeletion(Saliency(model), baselines=0.0, step_size=1),
        Sparsity(InputXGradient(model)),
    ):
        expected = regularizer(X, Y)
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert regularizer(X, Y.to(dtype)) == expected


def test_regularizer_warns_once_of_maps_that_are_zero_everywhere():
    net = smooth_net()
    torch.nn.init.zeros_(net[2].weight)
    regularizer = Sparsity(InputXGradient(net))
    inputs, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning, match=r"of 4 of 4 examples is 0 everywhere"):
        regularizer(inputs, labels)
    regularizer(inputs, labels)
