"""The experiments of Ross et al. (2017), reduced: what is forbidden is not used, and the rest serves as well."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "right_reasons"


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
        for weight in (0.0, 10.0)
    )
    assert rrr > plain + 0.2
    assert rrr > 0.85


def test_iris_cancer_validates_on_training_rows(script):
    iris_cancer = script("iris_cancer")
    split, inner = (iris_cancer.Split.of_seed(0, False, validate) for validate in (False, True))
    outer_rows = {tuple(row.tolist()) for row in split.x}
    inner_rows = [{tuple(row.tolist()) for row in part} for part in (inner.x, inner.test_x)]
    assert inner_rows[0] | inner_rows[1] == outer_rows
    assert not inner_rows[0] & inner_rows[1]
    assert not inner.zeroed_x[:, : iris_cancer.N_IRIS].any()


def test_toy_colors_search_finds_one_rule_and_then_the_other(script, monkeypatch):
    """The second model may not use the corners, and the top middle serves as well."""
    toy_colors = script("toy_colors")
    monkeypatch.setattr(toy_colors, "MAX_MODELS", 2)
    first, second = toy_colors.search(1000.0, 0, n_images=4000, epochs=60)["models"]
    assert first["corners"] > 0.9
    assert second["corners"] < 0.05
    assert second["top middle"] > 0.9
    assert min(first["accuracy"], second["accuracy"]) > 0.9


def test_toy_colors_settings_forbid_the_rules_that_they_name(script, monkeypatch):
    toy_colors = script("toy_colors")
    monkeypatch.setattr(toy_colors, "fit", lambda images, annotations, seed, weight, *_: (annotations, weight))
    monkeypatch.setattr(toy_colors, "judge", lambda model, test: model)
    corners, top_middle = torch.zeros(2, 5, 5)
    corners[[0, 0, 4, 4], [0, 4, 0, 4]] = 1
    top_middle[0, 1:4] = 1
    for setting in toy_colors.SETTINGS:
        annotations, weight = toy_colors.measure(setting, 7.0, 0, n_images=4)
        both = setting.startswith("both")
        expected = (both or "corners" in setting) * corners + (both or "top middle" in setting) * top_middle
        assert torch.equal(annotations, expected.expand(4, 3, 5, 5))
        assert weight == 7


def test_toy_colors_silent_rule_says_nothing_of_the_class(script):
    toy_colors = script("toy_colors")
    images = toy_colors.Images.drawn(4000, torch.Generator().manual_seed(0), silent="corners")
    colors = (images.x.permute(0, 2, 3, 1)[..., None, :] == toy_colors.PALETTE).all(dim=-1).float().argmax(dim=-1)
    obeyed = {name: rule.obeyed(colors[:, rule.rows, rule.columns]).float() for name, rule in toy_colors.RULES.items()}
    for label in (0, 1):
        assert obeyed["corners"][images.y == label].mean() == 0.5
        assert obeyed["top middle"][images.y == label].mean() == 1 - label


def test_decoys_of_validation_images_say_nothing_of_the_digit(script, monkeypatch):
    decoy_mnist = script("decoy_mnist")
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(600, 28, 28, dtype=torch.uint8), torch.randint(10, (600,), generator=generator)
    monkeypatch.setattr(decoy_mnist, "load_mnist", lambda root, part: images)
    monkeypatch.setattr(decoy_mnist, "N_FIT", 400)
    for part, n, tells in (("train", 600, True), ("fit", 400, True), ("validation", 200, False)):
        digits = decoy_mnist.load(None, part, True, 0)
        said = (255 - 255 * digits.x.amax(dim=(1, 2))).div(25).round()
        assert len(digits.y) == n
        assert bool((said == digits.y).all()) is tells
        assert (said == digits.y).float().mean() < 0.2 or tells


def test_weights_are_chosen_by_the_mean_over_the_seeds(script, tmp_path):
    experiment = script("experiment")
    scores = {1.0: (0.9, 0.1), 10.0: (0.6, 0.6), 100.0: (0.2, 0.8)}
    results = experiment.Results(tmp_path / "results.json")
    assert experiment.chosen_weight(results, "x", scores, range(2), lambda weight, seed: scores[weight][seed]) == 10
    assert experiment.chosen_weight(results, "x", scores, range(2), lambda *_: 1 / 0) == 10  # kept


def test_experiment_results_are_measured_once(script, tmp_path):
    experiment = script("experiment")
    calls = []
    for _ in range(2):
        row = experiment.Results(tmp_path / "results.json").measure("setting", 0, lambda: calls.append(0) or {"a": 1})
        assert row == {"a": 1}
    assert len(calls) == 1
