"""The limit of what training may cost in accuracy: paired differences, selection under it, sweeps and plots."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import InputXGradient
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training import CheckpointError, Sweep, sweep
from captum_idexpo.visualization import plot_front, plot_fronts, plot_history

G = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, dtype=torch.float64, generator=G)
Y = (X[:, :3].sum(1) > 0).long()
TRAIN, VAL = TensorDataset(X[:40], Y[:40]), TensorDataset(X[40:], Y[40:])


def network(seed=0):
    """A network that is right on most examples at the start."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(X[:40]), Y[:40]).backward()
        optimizer.step()
    return model


def trainer_of(model, lr=0.05, weight=1.0, **settings):
    regularizer = InsertionDeletion(
        InputXGradient(model),
        baselines=0.0,
        insertion_weight=weight,
        deletion_weight=weight,
        step_size=1,
        deletion_form="complement",
    )
    settings = {"show_progress": False, "patience": 50, **settings}
    return ExplanationRegularizedTrainer(model, torch.optim.SGD(model.parameters(), lr=lr), [regularizer], **settings)


def loaders():
    return DataLoader(TRAIN, 10), DataLoader(VAL, 8)


def right(model):
    with torch.no_grad():
        return (model(VAL.tensors[0]).argmax(1) == VAL.tensors[1]).double()


def test_epochs_are_judged_by_the_paired_change_and_the_best_eligible_one_is_kept():
    model = network()
    start, states = right(model), []

    def keep(trainer, row):
        states.append(copy.deepcopy(model.state_dict()))

    settings = {"lr": 0.6, "weight": 1.0, "accuracy_weight": 0.0}
    trainer = trainer_of(model, max_accuracy_drop=0.0, callbacks=[keep], **settings)
    history = trainer.fit(*loaders(), epochs=12)
    twin = network()
    for row, state in zip(history, states, strict=True):
        twin.load_state_dict(state)
        changes = right(twin) - start
        error = float(changes.std()) / math.sqrt(20)
        assert row["val_accuracy_change"] == pytest.approx(float(changes.mean()))
        assert row["val_accuracy_change_standard_error"] == pytest.approx(error)
        assert row["eligible"] == float(float(changes.mean()) + error >= -1e-9)
    assert {row["eligible"] for row in history} == {0.0, 1.0}  # the limit decides something
    best = max((row for row in history if row["eligible"]), key=lambda row: row["valscore"])
    kept = states[int(best["epoch"]) - 1]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    without = trainer_of(network(), **settings).fit(*loaders(), epochs=12)
    assert max(row["valscore"] for row in without) > best["valscore"]  # what the limit costs


def test_starting_weights_are_kept_with_a_warning_if_no_epoch_is_eligible():
    model = network()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, lr=2.0, weight=3.0, max_accuracy_drop=0.0, patience=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.fit(*loaders(), epochs=10)
    (message,) = [str(each.message) for each in caught if "starting weights" in str(each.message)]
    assert "max_accuracy_drop=0.0 allows; the best changed it by -0.3" in message
    assert not any(row["eligible"] for row in history)
    assert len(history) == 3  # patience counts from the start
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.evaluate(loaders()[1])["accuracy_change"] == 0.0


def test_limit_that_never_binds_changes_nothing():
    states = []
    for limit in (None, 0.99):
        model = network()
        torch.manual_seed(3)
        train = DataLoader(TRAIN, 10, shuffle=True)
        trainer_of(model, max_accuracy_drop=limit).fit(train, DataLoader(VAL, 8, shuffle=True), epochs=2)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_evaluate_compares_any_loader_with_the_start():
    model = network()
    start = copy.deepcopy(model)
    trainer = trainer_of(model, lr=0.3, max_accuracy_drop=0.5)
    assert "accuracy_change" not in trainer.evaluate(DataLoader(TRAIN, 16))
    trainer.fit(*loaders(), epochs=3)
    scores = trainer.evaluate(DataLoader(TRAIN, 16))
    x, y = TRAIN.tensors
    changes = ((model(x).argmax(1) == y).double() - (start(x).argmax(1) == y).double()).detach()
    assert scores["accuracy_change"] == pytest.approx(float(changes.mean()))
    assert scores["accuracy_change_standard_error"] == pytest.approx(float(changes.std()) / math.sqrt(40))
    assert scores["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).double().mean()))


def test_averaged_weights_are_judged_against_the_start():
    model = network()
    start = right(model)
    trainer = trainer_of(model, lr=0.3, max_accuracy_drop=0.9, averaged_model=AveragedModel(model))
    (row,) = trainer.fit(*loaders(), epochs=1)
    assert row["val_accuracy_change"] == pytest.approx(float((right(model) - start).mean()))


def test_killed_run_under_a_limit_resumes_bit_for_bit(tmp_path):
    whole = trainer_of(network(), lr=0.3, max_accuracy_drop=0.05, checkpoint_dir=tmp_path / "whole")
    expected = whole.fit(*loaders(), epochs=6)
    trainer_of(network(), lr=0.3, max_accuracy_drop=0.05, checkpoint_dir=tmp_path / "killed").fit(*loaders(), epochs=3)
    resumed = trainer_of(network(seed=5), lr=0.3, max_accuracy_drop=0.05, checkpoint_dir=tmp_path / "killed")
    resumed.resume()
    history = resumed.fit(*loaders(), epochs=6)
    for row, other in zip(history, expected, strict=True):
        assert all(row[name] == other[name] for name in row if not name.startswith("seconds"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.evaluate(loaders()[1]) == whole.evaluate(loaders()[1])
    other = trainer_of(network(), lr=0.3, checkpoint_dir=tmp_path / "killed")
    with pytest.raises(CheckpointError, match="max_accuracy_drop"):
        other.resume()


@pytest.mark.parametrize("limit", [-0.01, 1.0, 5, True, "0.01", math.nan])
def test_limit_is_a_share_of_the_examples(limit):
    with pytest.raises(ValueError, match=r"max_accuracy_drop must be a share.*0\.01 is one point"):
        trainer_of(network(), max_accuracy_drop=limit)


def test_limit_needs_validation_data_with_accuracy_in_the_same_order():
    with pytest.raises(ValueError, match="val_loader"):
        trainer_of(network(), max_accuracy_drop=0.01).fit(loaders()[0])
    model = nn.Linear(6, 1).double()
    regression = ExplanationRegularizedTrainer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), (), mse_loss, max_accuracy_drop=0.01, show_progress=False
    )
    data = [(X, X[:, :1])]
    with pytest.raises(ValueError, match="accuracy of a classifier"):
        regression.fit(data, data)
    shuffled = DataLoader(VAL, 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="shuffle=False"):
        trainer_of(network(), max_accuracy_drop=0.01).fit(loaders()[0], shuffled)


# --- sweeps and plots ----------------------------------------------------------------------------------------------

ROWS = [
    {"weight": 0.0, "seed": 0, "accuracy": 0.90, "insertion": 0.5, "accuracy_change": 0.0},
    {"weight": 0.1, "seed": 0, "accuracy": 0.89, "insertion": 0.7, "accuracy_change": -0.01},
    {"weight": 0.2, "seed": 0, "accuracy": 0.87, "insertion": 0.8, "accuracy_change": -0.03},
    {"weight": 0.3, "seed": 0, "accuracy": 0.85, "insertion": 0.9, "accuracy_change": -0.05},
]


def test_sweep_front_and_table_leave_out_what_costs_too_much(tmp_path):
    def run(weight, seed):
        row = next(row for row in ROWS if row["weight"] == weight)
        scores = {name: value for name, value in row.items() if name not in ("weight", "seed")}
        return {**scores, "accuracy_change_standard_error": 0.021 if weight == 0.2 else 0.005}

    grid = {"weight": [0.0, 0.1, 0.2, 0.3], "seed": [0]}
    found = sweep(run, grid, tmp_path / "sweep.jsonl", max_accuracy_drop=0.01)
    assert [row["eligible"] for row in found] == [True, True, True, False]
    assert [row["weight"] for row in found.front()] == [0.0, 0.1, 0.2]
    lines = found.table().splitlines()
    assert [name.strip() for name in lines[0].split("|")[-3:-1]] == ["eligible", "front"]
    marks = [[cell.strip() for cell in line.split("|")[-3:-1]] for line in lines[2:]]
    assert marks == [["yes", "yes"]] * 3 + [["no", ""]]
    without = sweep(run, grid, tmp_path / "sweep.jsonl")
    assert len(without.front()) == 4
    assert "eligible" not in without[0]
    with pytest.raises(ValueError, match="needs the score 'accuracy_change'"):
        sweep(lambda weight: {"accuracy": 1.0}, {"weight": [0.1]}, tmp_path / "other.jsonl", max_accuracy_drop=0.01)


def test_sweep_checks_the_limit_before_the_first_run_and_the_scores_after_it(tmp_path):
    calls = []

    def run(weight):
        calls.append(weight)
        return {"accuracy": 1.0}

    for limit, n_calls in ((5, 0), (0.01, 1)):
        with pytest.raises(ValueError, match="max_accuracy_drop"):
            sweep(run, {"weight": [1, 2, 3]}, tmp_path / "early.jsonl", max_accuracy_drop=limit)
        assert len(calls) == n_calls


def test_evaluation_of_a_shuffled_loader_leaves_the_change_out():
    trainer = trainer_of(network(), max_accuracy_drop=0.5)
    trainer.fit(*loaders(), epochs=1)
    shuffled = DataLoader(TRAIN, 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="another order in each pass"):
        scores = trainer.evaluate(shuffled)
    assert "accuracy_change" not in scores
    assert "accuracy" in scores


def test_limit_reads_labels_out_of_structured_targets():
    model = network()
    judge = InsertionDeletion(
        InputXGradient(model), baselines=0.0, target_transform=lambda target: target["label"], step_size=1
    )
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        (),
        lambda output, target: cross_entropy(output, target["label"]),
        evaluation=judge,
        max_accuracy_drop=0.5,
        show_progress=False,
    )
    batch = [(X, {"label": Y})]
    (row,) = trainer.fit(batch, batch)
    assert "val_accuracy_change" in row


def test_sweep_mean_judges_the_mean_change():
    changes = {0.1: (0.0, -0.03), 0.2: (-0.05, -0.06)}
    rows = [
        {"weight": weight, "seed": seed, "accuracy": 0.9 + change, "insertion": weight, "accuracy_change": change,
         "accuracy_change_standard_error": 0.002}
        for weight, values in changes.items() for seed, change in enumerate(values)
    ]  # fmt: skip
    means = Sweep(rows, settings=("weight", "seed"), max_accuracy_drop=0.01).mean()
    assert [row["eligible"] for row in means] == [True, False]  # -.015 +- .015, -.055 +- .005
    assert means[0]["accuracy_change"] == pytest.approx(-0.015)
    assert means[0]["accuracy_change_standard_error"] == pytest.approx(0.015)  # between the two runs
    assert means.max_accuracy_drop == 0.01


def test_fronts_show_what_costs_too_much():
    found = Sweep(ROWS, settings=("weight",), max_accuracy_drop=0.02)
    for figure in (found.plot(), plot_fronts({"ours": found, "all": [{"accuracy": 0.8, "insertion": 0.1}]})):
        (axis,) = figure.axes
        assert "accuracy falls too far" in [text.get_text() for text in axis.get_legend().get_texts()]
    (axis,) = plot_front(found, found.front()).axes
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [(x, y) for line in crosses for x, y in zip(*line.get_data(), strict=True)] == [(0.87, 0.8), (0.85, 0.9)]
    (axis,) = Sweep(ROWS).plot().axes
    assert "accuracy falls too far" not in [text.get_text() for text in axis.get_legend().get_texts()]


def test_history_plot_shades_epochs_that_cost_too_much():
    rows = [{"epoch": e, "loss": 1.0, "valscore": 2.0 + e, "eligible": float(e < 2)} for e in range(4)]
    losses, scores = plot_history(rows).axes
    assert len(scores.patches) == 2
    assert [text.get_text() for text in scores.get_legend().get_texts()].count("accuracy falls too far") == 1
    assert "eligible" not in [line.get_label() for axis in (losses, scores) for line in axis.lines]
