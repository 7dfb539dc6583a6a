"""The benchmark of ExpO on tables, reduced."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.utils import Bunch
from torch.utils.data import TensorDataset

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("expo_uci", SCRIPTS / "expo_uci.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "N_EXPLAINED", 8)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does
    yield module
    torch.set_num_threads(n_threads)


@pytest.fixture
def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None])


def test_expo_uci_fidelity_improves_explanations_at_little_cost_in_mse(benchmark, diabetes):
    plain = benchmark.run(diabetes, "plain", 0.0, trial=0, n_epochs=16)
    for method in ("Fidelity", "1D-Fidelity"):
        regularized = benchmark.run(diabetes, method, 0.03, trial=0, n_epochs=16)
        assert regularized["neighborhood"] < 0.5 * plain["neighborhood"]
        assert regularized["point"] < 0.5 * plain["point"]
        assert regularized["mse"] < 1.2 * plain["mse"]


def test_expo_uci_run_resumes_and_is_reported(benchmark, diabetes, tmp_path, monkeypatch):
    table = benchmark.Table((10,), (0.2, 0.1), n_tuned=1, n_epochs=1)
    monkeypatch.setattr(benchmark, "TABLES", {"diabetes": table})
    monkeypatch.setattr(benchmark, "RATIOS", (0.1,))
    path = tmp_path / "expo_uci.jsonl"
    benchmark.run_all("diabetes", diabetes, benchmark.Results(path), n_trials=2)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == [0, 1] * len(benchmark.METHODS)

    path.write_text("\n".join(lines[:-1]) + "\n")
    results = benchmark.Results(path)
    benchmark.run_all("diabetes", diabetes, results, n_trials=2)
    again = path.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["mse"] == json.loads(lines[-1])["mse"]

    benchmark.report(tmp_path, results, n_trials=2)
    rows = [line for line in (tmp_path / "expo_uci.md").read_text().splitlines() if line.startswith("| diabetes")]
    assert len(rows) == len(benchmark.METHODS)
    assert (tmp_path / "expo_uci.png").stat().st_size


def test_expo_uci_chooses_the_largest_ratio_within_the_margin(benchmark, tmp_path):
    for largest in benchmark.RATIOS:
        results = benchmark.Results(tmp_path / f"{largest}.jsonl")
        results.add(("housing", "plain", 0.0, 0), {"val_mse": 1.0})
        ratio, decided = benchmark.choice("housing", "Fidelity", results, [0])
        while not decided:
            results.add(("housing", "Fidelity", ratio, 0), {"val_mse": 1.04 if ratio <= largest else 1.06})
            ratio, decided = benchmark.choice("housing", "Fidelity", results, [0])
        assert ratio == largest
        assert len(results.rows) <= 4


def test_expo_uci_load_drops_columns_that_are_no_features(benchmark, tmp_path):
    columns = range(103)
    lines = [",".join(["", *map(str, columns)])] + [
        ",".join(str(1000 * row + column) for column in [0, *columns]) for row in range(3)
    ]
    (tmp_path / "communities.csv").write_text("\n".join(lines))
    x, y = benchmark.load("communities", tmp_path).tensors
    assert x[0].tolist() == list(range(1, 101))
    assert y.tolist() == [[101], [1101], [2101]]


def test_expo_uci_load_converts_values_of_openml_to_numbers(benchmark, monkeypatch):
    frame = pd.DataFrame({"a": [1.0, 2.0, None], "b": pd.Categorical(["4", "5", "4"]), "class": ["7", "8", "9"]})
    fetched = Bunch(frame=frame, target_names=["class"])
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *arguments, **options: fetched)
    x, y = benchmark.load("winequality-red", None).tensors
    assert x.tolist() == [[1, 4], [2, 5]]
    assert y.tolist() == [[7], [8]]


def test_expo_uci_load_explains_how_to_get_a_set_that_openml_lacks(benchmark):
    with pytest.raises(SystemExit, match="--data-root"):
        benchmark.load("music", None)


def test_expo_uci_standardised_makes_constant_columns_zero(benchmark):
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 6.0]])
    assert benchmark.standardised(values, torch.tensor([0, 1]))[:, 1].eq(0).all()


def test_expo_uci_finished_leaves_out_a_set_without_results(benchmark, tmp_path):
    assert benchmark.finished("music", benchmark.Results(tmp_path / "none.jsonl"), 10) == {}
