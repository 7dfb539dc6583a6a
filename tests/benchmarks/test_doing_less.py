"""Fewer evaluations: which settings a process runs, and what the table says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset


@pytest.fixture
def doing_less(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("doing_less")
    sys.modules.pop("doing_less")


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_a_process_runs_the_settings_of_one_precision(doing_less, tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 64, 3)]
    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 3)
    task = doing_less.Task(nn.Sequential(*layers), data, data, data)
    kinds = (doing_less.Setting("plain", weight=0.0), doing_less.Setting("all"))
    kinds += (doing_less.Setting("k = 2", 2), doing_less.Setting("k = 2, bfloat16", 2, bfloat16=True))
    study = doing_less.Study(
        "small", lambda seed, root: task, kinds, 0.01, torch.optim.Adam, 1, batch_size=4, n_seeds=2, layer="1"
    )
    monkeypatch.setattr(doing_less, "STUDIES", {"small": study})
    doing_less.run("small", tmp_path, Path(), bfloat16=False)
    rows = [json.loads(line) for line in (tmp_path / "doing_less_small.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in rows] == 2 * ["plain", "all", "k = 2"]
    doing_less.report(tmp_path)
    (line,) = (line for line in (tmp_path / "doing_less.md").read_text().splitlines() if line.startswith("| k = 2 |"))
    share = rows[2]["evaluations"] / rows[1]["evaluations"]
    assert line.split("|")[5].strip() == f"{share:.2f}"
    gain = sum(rows[i + 2]["valscore"] - rows[i]["valscore"] for i in (0, 3)) / 2
    assert line.split("|")[-3].strip().startswith(f"{gain:+.3f}")
