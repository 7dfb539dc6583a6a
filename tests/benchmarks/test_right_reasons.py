"""The experiments of Ross et al. (2017), reduced: what is forbidden is not used, and the rest serves as well."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "right_reasons"
SMALL = {"n_images": 4000, "epochs": 120}


@pytest.fixture
def script(monkeypatch):
    """Imports a script; it runs on one thread, as from the command line."""
    monkeypatch.syspath_prepend(FOLDER)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(n_threads)


def test_iris_cancer_penalty_raises_the_accuracy_with_iris_zeroed(script):
    iris_cancer = script("iris_cancer")
    plain, rrr = (
        statistics.mean(iris_cancer.measure("standardised", weight, seed)["iris zeroed"] for seed in range(3))
        for weight in iris_cancer.WEIGHTS.values()
    )
    assert rrr > plain + 0.2
    assert rrr > 0.85


def test_toy_colors_with_corners_forbidden_uses_the_top_middle(script):
    row = script("toy_colors").measure("corners forbidden", 0, **SMALL)
    assert row["accuracy"] > 0.99
    assert row["corners"] < 0.05
    assert row["top middle"] > 0.9


def test_toy_colors_search_finds_one_rule_and_then_the_other(script, monkeypatch):
    toy_colors = script("toy_colors")
    monkeypatch.setattr(toy_colors, "MAX_MODELS", 2)
    first, second = toy_colors.search(0, **SMALL)["models"]
    assert first["corners"] > 0.9
    assert second["top middle"] > 0.9
    assert min(first["accuracy"], second["accuracy"]) > 0.99


def test_experiment_results_are_measured_once(script, tmp_path):
    experiment = script("experiment")
    calls = []
    for _ in range(2):
        row = experiment.Results(tmp_path / "results.json").measure("setting", 0, lambda: calls.append(0) or {"a": 1})
        assert row == {"a": 1}
    assert len(calls) == 1
