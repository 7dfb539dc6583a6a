"""The trainer: that it trains what it says, selects by eq. (15), stops, and fails without losing anything."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import Batch, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import GradientShap, LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training import History
from tests.helpers import smooth_conv_net
from tests.training.test_loss import Term

G = torch.Generator().manual_seed(0)
X = torch.randn(22, 2, 6, 6, dtype=torch.float64, generator=G)
Y = torch.randint(3, (22,), generator=G)
DATA = TensorDataset(X, Y)


def batches(size=8):  # the last batch is short
    return DataLoader(DATA, batch_size=size)


def net_without_dropout():
    net = smooth_conv_net()
    net[3].p = 0.0
    return net


def make(net=None, regularized=True, lr=0.05, **arguments):
    net = smooth_conv_net() if net is None else net
    regularizers = [InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)] if regularized else []
    arguments = {"regularizers": regularizers, "show_progress": False, **arguments}
    return ExplanationRegularizedTrainer(net, torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), **arguments)


def test_fit_equals_a_plain_training_loop():
    net, twin = smooth_conv_net().train(), smooth_conv_net().train()
    torch.manual_seed(0)
    history = make(net).fit(batches(), epochs=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    regularizer = InsertionDeletion(LayerGradCam(twin, twin[4]), baselines=0.0, step_size=6)
    torch.manual_seed(0)
    losses = []
    for _ in range(2):
        for x, y in batches():
            twin[1].eval()  # BatchNorm's statistics are frozen by default
            loss = cross_entropy(twin(x), y) + sum(regularizer(x, y).values())
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            twin[1].train()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["loss"] == pytest.approx(sum(losses[:3]) / 3)
    parts = [name for name in history[0] if not name.startswith(("seconds", "deletion_floor"))]
    assert parts == ["epoch", "loss", "task", "insertion", "deletion"]
    for row in history:
        assert row["loss"] == pytest.approx(row["task"] + row["insertion"] + row["deletion"])


def test_fit_improves_insertion_and_the_loss():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, insertion_weight=1.0, deletion_weight=0.1)
    trainer = make(net, regularizers=[regularizer], lr=0.1)
    before = trainer.evaluate(batches(), explain="label")
    trainer.fit(batches(), epochs=15)
    after = trainer.evaluate(batches(), explain="label")
    assert after["insertion"] > before["insertion"] + 0.1
    assert after["loss"] < before["loss"]


def test_evaluate_is_the_mean_over_all_examples():
    net = smooth_conv_net()
    trainer = make(net)
    scores = trainer.evaluate(batches())
    with torch.no_grad():
        output = net(X)
        predicted = output.argmax(1)
        phi = LayerGradCam(net, net[4]).attribute(X, target=predicted)
        expected = insertion_deletion(net, X, phi, target=predicted, fraction=0.5, step_size=6)
    assert scores["accuracy"] == pytest.approx(float((predicted == Y).double().mean()))
    assert scores["insertion"] == pytest.approx(float(expected.insertion.mean()))
    assert scores["deletion"] == pytest.approx(float(expected.deletion.mean()))
    assert scores["one_minus_deletion"] == pytest.approx(1 - scores["deletion"])
    assert scores["loss"] == pytest.approx(float(cross_entropy(output, Y)))
    eq15 = 2 * scores["accuracy"] + scores["insertion"] + 1 - scores["deletion"]
    assert scores["valscore"] == pytest.approx(eq15)
    weighted = make(net, accuracy_weight=0.5).evaluate(batches())
    assert weighted["valscore"] == pytest.approx(eq15 - 1.5 * scores["accuracy"])
    label = trainer.evaluate(batches(), explain="label")
    with torch.no_grad():
        phi = LayerGradCam(net, net[4]).attribute(X, target=Y)
        expected = insertion_deletion(net, X, phi, target=Y, fraction=0.5, step_size=6)
    assert label["insertion"] == pytest.approx(float(expected.insertion.mean()))


def test_evaluate_repeats_exactly_and_changes_no_state():
    net = smooth_conv_net().train()
    generator = torch.Generator().manual_seed(3)
    judges = [
        InsertionDeletion(Lime(net, Ridge(0.1), MaskSimilarity()), baselines=0.0, step_size=6),
        InsertionDeletion(
            Lime(net, Ridge(0.1), MaskSimilarity()),
            baselines=0.0,
            step_size=6,
            generator=generator,
            attribute_kwargs={"sampling": "independent"},
        ),
    ]
    for judge in judges:
        trainer = make(net, regularized=False, evaluation=judge)
        weights = copy.deepcopy(net.state_dict())
        states = torch.get_rng_state(), generator.get_state()
        first = trainer.evaluate(batches())
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], generator.get_state())
        torch.rand(3), torch.rand(3, generator=generator)  # wherever the streams stand, the masks are the same
        states = torch.get_rng_state(), generator.get_state()
        torch.testing.assert_close(trainer.evaluate(batches()), first, atol=0, rtol=0)
        assert torch.equal(states[0], torch.get_rng_state())
        assert torch.equal(states[1], generator.get_state())
        assert net.training
        for name, value in net.state_dict().items():
            assert torch.equal(value, weights[name])


def test_evaluate_without_a_judge_gives_loss_and_accuracy():
    scores = make(regularized=False).evaluate(batches())
    assert set(scores) == {"loss", "accuracy", "valscore"}
    assert scores["valscore"] == pytest.approx(2 * scores["accuracy"])


def test_accuracy_is_absent_for_outputs_that_only_the_loss_can_read():
    class Mapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth_conv_net()

        def forward(self, x):
            return {"logits": self.net(x), "hidden": None}

    net = Mapping()
    trainer = ExplanationRegularizedTrainer(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        loss_fn=lambda output, target: cross_entropy(output["logits"], target),
        show_progress=False,
    )
    trainer.fit(batches(), batches())
    scores = trainer.evaluate(batches())
    assert set(scores) == {"loss", "valscore"}
    assert scores["loss"] == pytest.approx(cross_entropy(net.eval()(X)["logits"], Y).item())


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_evaluate_repeats_exactly_with_random_numbers_of_numpy():
    net = smooth_conv_net()
    explainer = GradientShap(net)
    regularizer = InsertionDeletion(explainer, baselines=0.0, attribute_kwargs={"baselines": X[:4], "n_samples": 2})
    trainer = make(net, regularizers=[regularizer])
    np.random.seed(3)
    first = trainer.evaluate(batches())
    position = np.random.get_state()[2]
    np.random.rand(7)
    assert trainer.evaluate(batches()) == first
    np.random.seed(3)
    assert np.random.get_state()[2] == position


def test_accuracy_is_absent_for_a_regression():
    net = smooth_conv_net(n_classes=1)
    judge = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, outputs="raw", step_size=6)
    data = DataLoader(TensorDataset(X, X.mean(dim=(1, 2, 3))[:, None]), batch_size=8)
    trainer = make(net, regularizers=[judge], loss_fn=mse_loss)
    scores = trainer.evaluate(data)
    assert set(scores) == {"loss", "insertion", "deletion", "valscore"}
    assert scores["valscore"] == pytest.approx(scores["insertion"] - scores["deletion"] - 2 * scores["loss"])
    assert trainer.fit(data, data, epochs=2)[-1]["loss"] < 1


@pytest.mark.parametrize("values", [(5.0, 6.0), (0.0, 1.0)])
def test_accuracy_is_absent_for_a_regression_on_whole_numbers(values):
    """Wine is rated 5 or 6: without a judge of classes there is no accuracy to select by."""
    y = torch.tensor(values * 11).double()[:, None]
    net = smooth_conv_net(n_classes=1)
    scores = make(net, regularized=False, loss_fn=mse_loss).evaluate(DataLoader(TensorDataset(X, y), batch_size=8))
    assert set(scores) == {"loss", "valscore"}
    assert scores["valscore"] == pytest.approx(-2 * scores["loss"])


def test_best_weights_are_restored():
    net = smooth_conv_net()
    trainer = make(net, lr=0.3)
    kept, evaluate = [], trainer._evaluate

    def spy(loader, **arguments):
        scores = evaluate(loader, **arguments)
        kept.append((scores["valscore"], copy.deepcopy(net.state_dict())))
        return scores

    trainer._evaluate = spy
    history = trainer.fit(batches(), batches(), epochs=6)
    assert [row["valscore"] for row in history] == [score for score, _ in kept]
    _, best = max(kept, key=lambda pair: pair[0])
    for name, value in net.state_dict().items():
        assert torch.equal(value, best[name])
    assert {"val_accuracy", "val_insertion", "val_one_minus_deletion", "val_loss"} <= set(history[0])


def test_patience_stops_early():
    net = smooth_conv_net()
    trainer = make(net, lr=0.0, patience=2)  # nothing changes, so nothing gets better
    assert len(trainer.fit(batches(), batches(), epochs=10)) == 3
    assert len(make(net, lr=0.0, patience=2).fit(batches(), epochs=5)) == 5  # nothing to select by


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_batch_norm_decides_whether_running_statistics_change(freeze):
    net = smooth_conv_net()
    mean = net[1].running_mean.clone()
    make(net, regularized=False, lr=0.0, freeze_batch_norm=freeze).fit(batches())
    assert torch.equal(mean, net[1].running_mean) == freeze
    assert not net.training  # as it was


def test_fit_trains_the_model_in_train_mode():
    net, modes = smooth_conv_net(), []
    net[3].register_forward_hook(lambda module, *_: modes.append(module.training))
    make(net, regularized=False).fit(batches())
    assert modes[:3] == [True, True, True]


def test_scheduler_steps_once_per_epoch():
    net = smooth_conv_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    step = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = ExplanationRegularizedTrainer(net, optimizer, scheduler=step, show_progress=False)
    trainer.fit(batches(), epochs=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=10.0)
    ExplanationRegularizedTrainer(net, optimizer, scheduler=plateau, show_progress=False).fit(batches(), epochs=3)
    assert optimizer.param_groups[0]["lr"] < 0.125


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)


def ema(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)


def test_scheduler_of_updates_averaged_weights_and_callbacks_equal_a_plain_loop():
    net, twin, rows = net_without_dropout().train(), net_without_dropout().train(), []
    optimizer, of_twin = (torch.optim.SGD(model.parameters(), lr=0.5) for model in (net, twin))
    averaged, average_of_twin = ema(net), ema(twin)
    trainer = ExplanationRegularizedTrainer(
        net,
        optimizer,
        scheduler=warm_up(optimizer),
        scheduler_interval="update",
        averaged_model=averaged,
        update_callbacks=[lambda _, row: rows.append(row)],
        freeze_batch_norm=False,
        show_progress=False,
    )
    history = trainer.fit(batches(), epochs=2)
    schedule, losses, rates = warm_up(of_twin), [], []
    for _ in range(2):
        for x, y in batches():
            loss = cross_entropy(twin(x), y)
            of_twin.zero_grad()
            loss.backward()
            rates.append(of_twin.param_groups[0]["lr"])
            of_twin.step()
            average_of_twin.update_parameters(twin)
            schedule.step()
            losses.append(float(loss.detach()))
    assert rates[0] == pytest.approx(0.1 * rates[-1])
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert [row["loss"] for row in rows] == pytest.approx(losses)
    assert [(row["epoch"], row["update"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert history[0]["learning_rate"] == pytest.approx(sum(rates[:3]) / 3)
    expected = average_of_twin.module.state_dict()
    for name, ours in net.state_dict().items():  # without validation the model has the last average
        torch.testing.assert_close(ours, expected[name])
        assert torch.equal(averaged.module.state_dict()[name], ours)
    assert not torch.allclose(net[0].weight, twin[0].weight)  # the average is another network than the last


def test_averaged_weights_are_evaluated_and_selected():
    net, plain = net_without_dropout(), net_without_dropout()
    of_epochs = []

    def scores_of_the_average(trainer, row):
        copied = copy.deepcopy(averaged.module)
        of_epochs.append((row, copied.state_dict(), make(copied).evaluate(batches())))

    averaged = ema(net)
    trainer = make(net, averaged_model=averaged, callbacks=[scores_of_the_average], lr=0.3)
    history = trainer.fit(batches(), batches(), epochs=4)
    alone = make(plain, lr=0.3).fit(batches(), epochs=4)
    assert [row["loss"] for row in history] == pytest.approx(
        [row["loss"] for row in alone]
    )  # training goes its own way
    for row, _, scores in of_epochs:
        assert row["val_accuracy"] == pytest.approx(scores["accuracy"])
        assert row["val_insertion"] == pytest.approx(scores["insertion"])
        assert row["val_loss"] == pytest.approx(scores["loss"])
    _, best, _ = max(of_epochs, key=lambda epoch: epoch[0]["valscore"])
    for name, ours in net.state_dict().items():
        assert torch.equal(ours, best[name])


class Counting(nn.Linear):
    """Keeps something beside tensors that training changes."""

    n_passes = 0

    def forward(self, x):
        self.n_passes += self.training
        return super().forward(x)

    def get_extra_state(self):
        return self.n_passes

    def set_extra_state(self, state):
        self.n_passes = state


def test_averaged_weights_leave_what_modules_keep_beside_them():
    net = nn.Sequential(nn.Flatten(), Counting(72, 3)).double()
    counts = []
    trainer = make(
        net,
        regularized=False,
        averaged_model=ema(net),
        callbacks=[lambda *_: counts.append(net[1].n_passes)],
    )
    trainer.fit(batches(), batches(), epochs=1)
    assert net[1].n_passes == counts[0] >= 3
    trainer.fit(batches())
    assert net[1].n_passes == counts[1] >= 6


def test_callbacks_of_updates_may_change_the_weights_that_are_averaged():
    net = net_without_dropout()

    @torch.no_grad()
    def project(*_):
        for parameter in net.parameters():
            parameter.clamp_(-0.01, 0.01)

    make(net, regularized=False, averaged_model=AveragedModel(net), update_callbacks=[project]).fit(batches())
    assert max(float(parameter.detach().abs().max()) for parameter in net.parameters()) <= 0.01


def test_updates_count_once_for_accumulated_batches():
    from accelerate import Accelerator

    net, updates = net_without_dropout(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    trainer = ExplanationRegularizedTrainer(
        net,
        optimizer,
        accelerator=Accelerator(gradient_accumulation_steps=2),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        scheduler_interval="update",
        averaged_model=AveragedModel(net),
        update_callbacks=[lambda _, row: updates.append(row["update"])],
        show_progress=False,
    )
    trainer.fit(batches(), epochs=2)  # of three batches: the last update of an epoch has one
    assert updates == [1, 2, 3, 4]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 16)
    assert int(trainer.averaged_model.n_averaged) == 4


def test_trainer_refuses_averages_of_other_models_and_intervals_that_do_not_fit():
    def net_of(width):
        return nn.Sequential(nn.Linear(3, width, bias=False), nn.ReLU(), nn.Linear(width, 2, bias=False))

    net = smooth_conv_net()
    with pytest.raises(TypeError, match="AveragedModel, given: Sequential"):
        make(net, averaged_model=net)
    with pytest.raises(ValueError, match=r"they differ in \['0.weight', '2.weight'\]"):
        make(net_of(3), regularized=False, averaged_model=AveragedModel(net_of(4)))
    with pytest.raises(ValueError, match="scheduler_interval must be 'epoch' or 'update', given: 'step'"):
        make(net, scheduler_interval="step")
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(net.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="compares the losses of epochs"):
        make(net, scheduler=plateau, scheduler_interval="update")


def test_progress_bar_shows_the_terms(capsys):
    make(show_progress=True).fit(batches(), epochs=2)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown
    assert all(f"{name}=" in shown for name in ("loss", "task", "insertion", "deletion"))


def test_history_converts_to_pandas_and_plots():
    history = make().fit(batches(), batches(), epochs=2)
    frame = history.to_pandas()
    assert list(frame["epoch"]) == [1, 2]
    assert frame["valscore"].tolist() == [row["valscore"] for row in history]
    assert isinstance(history, History)
    assert isinstance(history, list)
    for row in history:
        row["learning_rate"] = 0.1
    figure = history.plot()
    assert "learning_rate" not in [line.get_label() for line in figure.axes[0].lines]
    assert [axis.get_title() for axis in figure.axes] == ["training loss", "validation"]


def test_fit_accepts_any_iterable_of_batches():
    a, b = net_without_dropout(), net_without_dropout()
    make(a).fit(batches(), epochs=2)
    make(b).fit([(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)], epochs=2)
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_trainer_refuses_a_frozen_model():
    net = smooth_conv_net().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*requires_grad_"):
        make(net, regularized=False)


def test_trainer_refuses_an_optimizer_of_another_model():
    with pytest.raises(ValueError, match=r"owns none.*model.parameters"):
        ExplanationRegularizedTrainer(smooth_conv_net(), torch.optim.SGD(smooth_conv_net().parameters(), lr=0.1))


def test_trainer_refuses_an_evaluation_of_another_model():
    """Its scores would be those of the other one, beside the accuracy of the model."""
    net, other = smooth_conv_net(), smooth_conv_net()
    judge = InsertionDeletion(LayerGradCam(other, other[4]), baselines=0.0)
    with pytest.raises(ValueError, match="InsertionDeletion explains another Sequential than the one that is trained"):
        ExplanationRegularizedTrainer(net, torch.optim.SGD(net.parameters(), lr=0.1), evaluation=judge)


def test_trainer_refuses_an_optimizer_that_needs_a_closure():
    net = smooth_conv_net()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        ExplanationRegularizedTrainer(net, torch.optim.LBFGS(net.parameters()))


def test_fit_and_evaluate_refuse_invalid_loaders_and_arguments():
    with pytest.raises(TypeError, match=r"must yield \(inputs, target\)"):
        make().fit(DataLoader(X, batch_size=8))
    with pytest.raises(TypeError, match=r"must yield \(inputs, target\)"):
        make().evaluate([X])
    with pytest.raises(ValueError, match="no batch in epoch 1"):
        make().fit([])
    with pytest.raises(ValueError, match="no batch in epoch 2"):
        make().fit(iter([(X, Y)]), epochs=2)
    with pytest.raises(ValueError, match="no batch"):
        make().evaluate([])
    with pytest.raises(ValueError, match="epochs"):
        make().fit(batches(), epochs=0)
    with pytest.raises(ValueError, match="explain"):
        make().evaluate(batches(), explain="truth")
    with pytest.raises(ValueError, match="patience"):
        make(patience=0)


class TurnsNaN(Term):
    """Gives a finite term until its third call."""

    def forward(self, inputs, target, annotations=None):
        super().forward(inputs, target, annotations)
        return {"odd": torch.tensor(math.nan if len(self.calls) == 3 else 1.0)}


def finite(net):
    return all(tensor.isfinite().all() for tensor in net.state_dict().values())


def test_nan_term_stops_training_by_name_and_keeps_the_weights():
    net, twin = net_without_dropout(), net_without_dropout()
    with pytest.raises(NonFiniteError, match=r"'odd' turned nan in epoch 1, step 3"):
        make(net, regularizers=[TurnsNaN()]).fit(batches(), epochs=2)
    make(twin, regularized=False).fit([(X[:8], Y[:8]), (X[8:16], Y[8:16])])
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)  # the weights after the second step


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("freeze_batch_norm", [False, True])
def test_nan_batch_stops_training_and_changes_no_state(regularized, freeze_batch_norm):
    net, twin = net_without_dropout(), net_without_dropout()
    broken = X[8:16].clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'task'.*epoch 1, step 2"):
        make(net, regularized, freeze_batch_norm=freeze_batch_norm).fit([(X[:8], Y[:8]), (broken, Y[8:16])])
    assert finite(net)
    make(twin, regularized, freeze_batch_norm=freeze_batch_norm).fit([(X[:8], Y[:8])])
    for ours, theirs in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)  # the update of the batch before is kept, nothing of this one


def test_infinity_in_buffers_and_outputs_is_no_failure():
    class Masked(nn.Module):
        """A causal-mask buffer of -inf, and a class that is never predicted."""

        def __init__(self):
            super().__init__()
            self.net = smooth_conv_net()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -math.inf]).double())

        def forward(self, x):
            return torch.cat([self.net(x), torch.zeros_like(x[:, :1, 0, 0])], dim=1) + self.mask

    history = make(Masked(), regularized=False).fit(batches(), batches(), epochs=2)
    assert len(history) == 2


def test_sparse_gradients_are_checked():
    net = nn.Sequential(nn.EmbeddingBag(5, 3, sparse=True))
    tokens = torch.randint(5, (8, 4), generator=torch.Generator().manual_seed(0))
    trainer = ExplanationRegularizedTrainer(net, torch.optim.SGD(net.parameters(), lr=0.1), show_progress=False)
    assert len(trainer.fit([(tokens, torch.arange(8) % 3)])) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_binary_labels_may_be_floats_or_booleans_in_a_column(dtype):
    """BCE wants floats of shape (B, 1); explanations and accuracy read them as labels."""
    net = smooth_conv_net(n_classes=1)
    y = (Y > 0).to(dtype)[:, None]
    bce = nn.functional.binary_cross_entropy_with_logits
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)
    trainer = make(net, regularizers=[regularizer], loss_fn=lambda output, y: bce(output, y.double()))
    scores = trainer.evaluate(DataLoader(TensorDataset(X, y), batch_size=8))
    expected = ((net(X)[:, 0] > 0) == y[:, 0].bool()).double().mean()
    assert scores["accuracy"] == pytest.approx(float(expected))
    assert set(trainer.fit(DataLoader(TensorDataset(X, y), batch_size=8))[0]) >= {"insertion", "deletion"}


@pytest.mark.parametrize(("size", "where"), [(8, "step 2"), (22, "last step of epoch 1")])
def test_diverging_training_keeps_the_last_good_weights(size, where):
    """Weights of 1e300 are finite, but what they give is not: those from before the step are kept."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 3)).double()
    average = AveragedModel(net)
    with pytest.raises(NonFiniteError, match=where):
        make(net, regularized=False, lr=1e300, averaged_model=average).fit(batches(size))
    assert int(average.n_averaged) == 0  # the only update was undone, in the average, too
    assert max(float(parameter.detach().abs().max()) for parameter in average.parameters()) < 10
    assert cross_entropy(net(X), Y).isfinite()
    assert max(float(parameter.detach().abs().max()) for parameter in net.parameters()) < 10


def test_history_keeps_the_epochs_before_a_failure():
    trainer = make(regularizers=[TurnsNaN()])
    with pytest.raises(NonFiniteError, match="epoch 2, step 1"):
        trainer.fit([(X[:8], Y[:8]), (X[8:16], Y[8:16])], epochs=3)
    assert [row["epoch"] for row in trainer.history] == [1]


def test_nan_validation_score_is_refused_by_name():
    trainer = make(
        regularized=False, loss_fn=lambda output, y: (output.sum() - 1e9).sqrt() if len(y) == 22 else output.sum()
    )
    with pytest.raises(NonFiniteError, match="validation score 'loss' turned nan in epoch 1"):
        trainer.fit(batches(), batches(22))


def test_nan_gradient_stops_training_before_the_step():
    net = smooth_conv_net()
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFiniteError, match=r"gradient of the loss in '0.weight' .* epoch 1, step 1"):
        make(net, regularized=False, loss_fn=lambda output, y: (output * 0).abs().sum().sqrt()).fit(batches())
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])


def test_train_mode_is_restored_after_an_exception():
    net = smooth_conv_net().train()
    with pytest.raises(NonFiniteError):
        make(net, regularizers=[TurnsNaN()]).fit(batches())
    assert all(module.training for module in net.modules())
    with pytest.raises(TypeError):
        make(net).evaluate([X])
    assert all(module.training for module in net.modules())


def test_gradient_accumulation_equals_the_whole_batch():
    from accelerate import Accelerator

    whole, parts = net_without_dropout(), net_without_dropout()
    make(whole).fit(DataLoader(TensorDataset(X[:16], Y[:16]), batch_size=8))
    trainer = make(parts, accelerator=Accelerator(gradient_accumulation_steps=2))
    trainer.fit(DataLoader(TensorDataset(X[:16], Y[:16]), batch_size=4))
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trainer_without_regularizers_reports_task_and_validation_scores():
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    history = make(net, regularized=False).fit(batches(), batches(), epochs=2)
    names = {name for name in history[0] if not name.startswith("seconds")}
    assert names == {"epoch", "loss", "task", "val_loss", "val_accuracy", "valscore"}


def test_trainer_warns_of_frozen_statistics_that_are_those_of_a_new_layer():
    net = smooth_conv_net()
    make(net, regularized=False).fit([ALL])
    net[1].running_mean.zero_()
    make(net, regularized=False).fit([ALL])  # the variances have been measured
    net[1].reset_running_stats()
    with pytest.warns(UserWarning, match=r"those of new layers in \['1'\].*pass freeze_batch_norm=False"):
        make(net, regularized=False).fit([ALL])
    make(net, regularized=False, freeze_batch_norm=False).fit([ALL])


# --- a first epoch that undoes what the model knew -------------------------------------------------------------------


ALL = (X.repeat(3, 1, 1, 1), Y.repeat(3))  # a batch that is large enough to tell the loss at the start


def trained_net():
    """A network that fits these images."""
    net = smooth_conv_net()
    make(net, regularized=False, lr=0.1).fit([ALL] * 100)
    return net


class Fixed(nn.Module):
    """A model whose task loss follows a list, one value per batch."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = nn.Parameter(torch.zeros(())), list(losses)

    def forward(self, x):
        return self.losses.pop(0) + 0 * self.weight * x.sum()


def fixed_losses_warn(losses, size, epochs=1):
    model = Fixed([*losses, losses[-1]] * epochs)  # the last batch of an epoch is evaluated again
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(model, optimizer, [], lambda output, _: output, show_progress=False)
    batches = [(torch.zeros(size, 2), torch.zeros(size))] * len(losses)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(batches, epochs=epochs)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("losses", "size", "warns"),
    [
        ([0.1, 1.0, 1.0], 64, True),
        ([0.1, 1.0, 1.0], 32, False),  # the first two batches are the start
        ([0.1, 1.0, 1.0], 63, False),
        ([0.4, 1.0, 1.0], 64, False),  # not three times as much
        ([0.0, 0.1, 0.1], 64, False),  # a hundred times as much, and harmless
        ([-0.5, 3.0, 3.0], 64, False),  # no loss of which there are multiples
    ],
)
def test_first_epoch_is_compared_with_the_loss_of_the_first_batches(losses, size, warns):
    messages = fixed_losses_warn(losses, size)
    assert len(messages) == warns
    assert all("was 0.1 on the first batches, and 0.7 as the mean" in message for message in messages)
    assert not any("regularizers" in message or "freeze_batch_norm" in message for message in messages)


def test_trainer_takes_inputs_without_a_tensor():
    class OfNames(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.ParameterDict({"a": torch.zeros(3), "b": torch.ones(3)})

        def forward(self, name):
            return torch.stack([self.values[each] for each in name])

    model = OfNames()
    trainer = ExplanationRegularizedTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), show_progress=False)
    batch = Batch({"name": ["a", "b", "a"]}, torch.tensor([0, 1, 2]))
    assert trainer.fit([batch])[0]["task"] > 0


def start_warnings(net, lr, epochs=1, n_updates=20, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(net, regularized=False, lr=lr, **settings).fit([ALL] * n_updates, epochs=epochs)
    return [str(w.message) for w in caught if "may have undone what the model knew" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
def test_trainer_warns_once_of_a_first_epoch_that_undoes_training():
    (message,) = start_warnings(trained_net(), lr=30.0, epochs=3)
    assert "Lower the learning rate" in message
    assert "pass freeze_batch_norm=False" in message
    (message,) = start_warnings(trained_net(), lr=30.0, freeze_batch_norm=False)
    assert "freeze_batch_norm" not in message


@pytest.mark.filterwarnings("ignore")
def test_trainer_does_not_warn_of_ordinary_epochs():
    net = trained_net()
    assert start_warnings(net, lr=0.01) == []
    assert start_warnings(smooth_conv_net(), lr=0.1) == []
