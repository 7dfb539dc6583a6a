"""Sweeps: each setting once, also after a kill; the front."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training import Sweep, sweep
from tests.helpers import smooth_conv_net

GRID = {"weight": [0.0, 0.5], "seed": [0, 1]}


def train(weight, seed, device="cpu"):
    """A short run."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=generator)
    loader = DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=4)
    net = smooth_conv_net().to(device)
    regularizer = InsertionDeletion(
        LayerGradCam(net, net[4]), baselines=0.0, step_size=6, insertion_weight=weight, deletion_weight=weight
    )
    trainer = ExplanationRegularizedTrainer(
        net, torch.optim.SGD(net.parameters(), lr=0.1), [regularizer], show_progress=False
    )
    trainer.fit(loader)
    return trainer.evaluate(loader)


def test_sweep_runs_each_setting_once(tmp_path):
    calls = []

    def run(**settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"accuracy": settings["weight"], "insertion": settings["seed"]}

    path = tmp_path / "results" / "sweep.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sweep(run, GRID, path)
    path.write_text(path.read_text() + '{"settings": {"weight": 0.5, "se')  # cut short by a kill
    found = sweep(run, GRID, path)
    assert [(row["weight"], row["seed"]) for row in found] == [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]
    assert len(calls) == 5  # the interrupted one twice
    sweep(run, {**GRID, "seed": [0, 1, 2]}, path)
    assert len(calls) == 7


def test_sweep_of_real_runs_gives_a_table_and_a_plot(tmp_path):
    found = sweep(train, GRID, tmp_path / "sweep.jsonl")
    assert {"accuracy", "insertion", "deletion"} <= set(found[0])
    assert len(found.table().splitlines()) == 6
    assert len(found.plot().axes[0].lines) == 2
    assert list(found.to_pandas()["seed"]) == [0, 1, 0, 1]


def test_sweep_front_holds_the_settings_that_no_other_beats():
    points = [(0.9, 0.1), (0.8, 0.5), (0.85, 0.4), (0.8, 0.3), (0.7, 0.5), (0.6, 0.9)]
    found = Sweep({"accuracy": x, "insertion": y} for x, y in points)
    assert [(row["accuracy"], row["insertion"]) for row in found.front()] == [
        (0.9, 0.1),
        (0.85, 0.4),
        (0.8, 0.5),
        (0.6, 0.9),
    ]
    assert found.table().count("yes") == 4


def test_sweep_accepts_numpy_numbers_and_refuses_unwritable_values_first(tmp_path):
    path = tmp_path / "sweep.jsonl"
    found = sweep(lambda weight, seed: {"accuracy": weight}, {"weight": np.arange(2), "seed": [np.float32(0.5)]}, path)
    assert found == [{"weight": 0, "seed": 0.5, "accuracy": 0.0}, {"weight": 1, "seed": 0.5, "accuracy": 1.0}]
    assert sweep(pytest.fail, {"weight": [0, 1], "seed": [0.5]}, path) == found
    with pytest.raises(TypeError, match=r"grid's weight holds tensor\(1\).*give numbers"):
        sweep(pytest.fail, {"weight": [torch.tensor(1)]}, path)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "empty"),
        ({"weight": []}, "empty"),
        ({"accuracy": [1]}, "share names"),
        ({"weight": [1, 2, 1]}, "weight holds a value twice"),
    ],
)
def test_sweep_refuses_invalid_grids(tmp_path, grid, message):
    with pytest.raises(ValueError, match=message):
        sweep(lambda **settings: {"accuracy": 1.0}, grid, tmp_path / "sweep.jsonl")


def test_sweep_front_excludes_a_run_with_a_nan_score():
    found = Sweep([{"accuracy": math.nan, "insertion": 0.9}, {"accuracy": 0.8, "insertion": 0.5}])
    assert found.front() == [found[1]]
    assert [line.split("|")[-2].strip() for line in found.table().splitlines()[2:]] == ["", "yes"]


def test_sweep_without_a_score_of_that_name_names_those_that_it_has():
    found = Sweep([{"weight": 0.1, "gain, blur": 0.2}], ["weight"])
    with pytest.raises(ValueError, match=r"'accuracy'.*\['weight', 'gain, blur'\].*x= and y="):
        found.table()


def test_sweep_mean_over_seeds_has_standard_errors_and_its_front():
    def score(weight, seed, size):
        return {"accuracy": 0.9 - weight + 0.01 * seed, "insertion": weight * size + seed * seed / 10}

    grid = {"weight": [0.0, 0.5], "seed": [0, 1, 3], "size": [1]}
    rows = [{**dict(zip(grid, own, strict=True)), **score(*own)} for own in itertools.product(*grid.values())]
    means = Sweep(rows, settings=grid).mean(over="seed")
    assert means.settings == ("weight", "size")
    assert [(row["weight"], row["n_runs"]) for row in means] == [(0.0, 3), (0.5, 3)]
    for row in means:
        values = torch.tensor([row["weight"] + seed * seed / 10 for seed in grid["seed"]])
        assert row["insertion"] == pytest.approx(float(values.mean()))
        assert row["insertion_standard_error"] == pytest.approx(float(values.std()) / math.sqrt(3))
    assert means.front() == [means[0], means[1]]
    (axis,) = means.plot().axes
    assert [text.get_text() for text in axis.texts] == ["weight 0.0", "weight 0.5"]
    upper = axis.collections[1].get_segments()[0][1, 1]  # of the first vertical bar
    assert upper == pytest.approx(means[0]["insertion"] + means[0]["insertion_standard_error"])


def test_sweep_mean_is_eligible_if_all_its_runs_are():
    """As rows of a history say so themselves."""
    scores = {"accuracy": [0.5, 0.6], "insertion": [0.9, 0.8]}
    rows = [
        {"weight": weight, "seed": seed, "eligible": float(weight == 0 or seed == 0)}
        | {name: values[weight] for name, values in scores.items()}
        for weight in (0, 1)
        for seed in (0, 1)
    ]
    mean = Sweep(rows, ("weight", "seed")).mean()
    assert [row["eligible"] for row in mean] == [True, False]
    assert [row["weight"] for row in mean.front()] == [0]


def test_sweep_names_scores_that_are_no_numbers_and_rows_without_a_change(tmp_path):
    with pytest.raises(TypeError, match="must return numbers by name; 'note' is None"):
        sweep(lambda weight: {"accuracy": 0.9, "note": None}, {"weight": [1]}, tmp_path / "a")
    sweep(lambda weight: {"accuracy": 0.9}, {"weight": [1]}, tmp_path / "b")
    ran = []
    with pytest.raises(ValueError, match=r"b holds rows without the score 'accuracy_change'.*\{'weight': 1\}"):
        sweep(ran.append, {"weight": [1, 2]}, tmp_path / "b", max_accuracy_drop=0.01)
    assert not ran


def test_sweep_table_keeps_its_columns_whatever_the_settings_are():
    table = Sweep([{"model": "a|b", "accuracy": 1.0, "insertion": 2.0}], ("model",)).table()
    assert table.splitlines()[-1] == r"| a\|b | 1 | 2 | yes |"


def test_sweep_mean_has_at_least_the_runs_own_error():
    def means(own_error):
        changes = {"accuracy_change": -0.02, "accuracy_change_standard_error": own_error}
        rows = [{"weight": 0.1, "seed": seed, "accuracy": 0.9, **changes} for seed in (0, 1, 2)]
        return Sweep(rows, ["weight", "seed"], max_accuracy_drop=0.01).mean()

    # All runs lose the same example, so that they do not differ.
    assert [(row["accuracy_change_standard_error"], row["eligible"]) for row in means(0.015)] == [(0.015, True)]
    assert [(row["accuracy_change_standard_error"], row["eligible"]) for row in means(0.005)] == [(0.005, False)]


def test_sweep_mean_refuses_unknown_settings_and_single_runs(tmp_path):
    found = sweep(lambda weight, seed: {"accuracy": 1.0}, {"weight": [0, 1], "seed": [0]}, tmp_path / "sweep.jsonl")
    with pytest.raises(ValueError, match=r"over must be one of the settings \['weight', 'seed'\], given: 'accuracy'"):
        found.mean(over="accuracy")
    with pytest.raises(ValueError, match=r"\{'weight': 0\} has 1 runs with 1 values: give the grid two or more"):
        found.mean()
    rows = [{"seed": seed, "accuracy": accuracy, "n_runs": 2.0} for seed, accuracy in ((0, 0.5), (1, 0.6))]
    with pytest.raises(ValueError, match=r"given: \['n_runs'\]"):
        Sweep(rows, settings=["seed"]).mean()
    with pytest.raises(ValueError, match="has 3 runs with 2 values"):
        Sweep([*rows, rows[0]], settings=["seed"]).mean()
