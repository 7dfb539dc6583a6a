"""The GPU's script, reduced: what is done is not done again, and every part has its section."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    for folder in (ROOT, ROOT / "benchmarks", ROOT / "benchmarks" / "speed"):
        monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module("benchmarks.gpu")
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


def test_part_is_done_once_and_has_a_table(gpu, tmp_path, monkeypatch):
    part = "rows of a forward pass"
    monkeypatch.setattr(sys.modules["timing"], "_SECONDS", 1e-3)
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than the reduced measurements
    gpu.run(torch.device("cpu"), True, tmp_path, [part])
    (done,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert set(done) == {part}
    (row,) = done[part]["found"].values()
    assert str(row["chosen"]) in row["seconds"]
    assert min(row["seconds"].values()) > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| model | rows chosen | fastest rows | time over the fastest |" in text
    monkeypatch.setattr(gpu, "PARTS", {})  # any part would be an error
    gpu.run(torch.device("cpu"), True, tmp_path, [part])
    assert (tmp_path / "gpu.md").read_text() == text


def test_sections_tell_what_was_found(gpu):
    scores = {"accuracy": 0.5, "insertion": 0.25, "one_minus_deletion": 0.75}
    parts = {
        "tests": {"last lines": ["....", "90 passed"]},
        "speed": {"a job": {"seconds": {"bare model": [1.0], "ours": [2.0]}, "peak megabytes": {"ours": 30.4}}},
        "fine-tuning": {"before": scores, "after": scores, "seconds of an update": 0.5, "peak megabytes": 12.0},
    }
    machine = {name: {"found": found, "seconds of the part": 1.0} for name, found in parts.items()}
    text = gpu.page({"a machine": machine})
    for expected in (
        "### a machine",
        "* passed: 90 passed",
        "| a job | ours | 2.00 |",
        "| 30 |",
        "12 MB at most",
    ):
        assert expected in text
    assert set(gpu.SECTIONS) == set(gpu.PARTS)
