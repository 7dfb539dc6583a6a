"""The speed benchmark, reduced: its baseline computes what the package computes, its report is made of its rounds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("cifar10", "jobs", "memory", "models", "per_example", "report", "timing")


@pytest.fixture
def speed(monkeypatch):
    for folder in (SCRIPTS, SCRIPTS / "speed"):
        monkeypatch.syspath_prepend(str(folder))
    n_threads = torch.get_num_threads()
    modules = {name: importlib.import_module(name) for name in MODULES}
    # A collection of garbage before each measurement takes longer than the reduced measurements.
    monkeypatch.setattr("gc.collect", lambda: 0)
    yield SimpleNamespace(**modules)
    torch.set_num_threads(n_threads)
    for name in MODULES:
        sys.modules.pop(name)


def test_loop_id_expo_computes_the_same_loss_and_gradient(speed):
    subject = speed.models.SUBJECTS["tiny"]
    model = subject.model(torch.device("cpu")).double()
    x, y = subject.batch(torch.device("cpu"), 3)
    x, step_size = x.double(), 64
    regularizer = InsertionDeletion(
        LayerGradCam(model, model[2]),
        baselines=0.0,
        insertion_weight=1.0,
        deletion_weight=1.0,
        step_size=step_size,
        steps_per_update=None,
        attribute_kwargs={"relu_attributions": True},
        deletion_form="ratio",
        deletion_floor=None,
    )
    ours = sum(regularizer(x, y).values())
    loops = speed.per_example.loop_id_expo(model, model[2], x, y, torch.arange(1, 9) * step_size)
    torch.testing.assert_close(loops, ours)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loops, parameters), torch.autograd.grad(ours, parameters))


def test_interleaved_alternates_contenders_and_repeats_short_calls(speed, monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(speed.timing.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    contenders = {"short": contender("short", 0.03), "long": contender("long", 2.0)}
    times = speed.timing.interleaved(contenders, 3, torch.device("cpu"))
    assert calls == ["short", "long", *["short"] * 4, "long", *["short"] * 4, "long", *["short"] * 4, "long"]
    assert times == {"short": pytest.approx([0.03] * 3), "long": pytest.approx([2.0] * 3)}


def test_ratio_is_computed_from_paired_rounds(speed):
    ratio = speed.timing.Ratio.of([3.0, 2.0, 8.0], [1.0, 1.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)


def test_speed_run_measures_every_job_and_writes_a_table_and_a_chart(speed, monkeypatch, tmp_path, capsys):
    small = speed.models.SUBJECTS["mlp128"]._replace(n_examples=2, n_samples=8, rows=(8, 16))
    monkeypatch.setitem(speed.models.SUBJECTS, "mlp128", small)
    monkeypatch.setattr(speed.timing, "_SECONDS", 1e-3)
    spec = importlib.util.spec_from_file_location("speed_main", SCRIPTS / "speed" / "__main__.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    monkeypatch.setattr(sys, "argv", ["speed", "--models", "mlp128", "--rounds", "1", "--out", str(tmp_path)])
    # A result of another run stays; of a model that is measured no more it is left out of the report.
    stamp = {"date": "2026-01-01", "machine": "other"}
    seconds = {"bare model": [1.0, 1.0], "soft": [2.0, 3.0]}
    known = {"cpu": {"tiny": {"metric": {**stamp, "seconds": seconds}}, "gone": {"metric": {**stamp}}}}
    (tmp_path / "speed.json").write_text(json.dumps(known))
    main.main()
    results = json.loads((tmp_path / "speed.json").read_text())["cpu"]
    assert results["tiny"] == known["cpu"]["tiny"]
    assert list(results["mlp128"]) == ["Lime, 8 samples", "KernelShap, 8 samples", "insertion and deletion"]
    assert all(
        len(times) == 1 and times[0] > 0
        for result in results["mlp128"].values()
        for times in result["seconds"].values()
    )
    table = (tmp_path / "speed.md").read_text()
    assert "| tiny CNN, 32 x 32 | metric | soft | **2.50** | 2.00 to 3.00 |" in table
    assert "| MLP, 30-128-128-2 | KernelShap, 8 samples | Captum |" in table
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "Lime, 8 samples (times over bare model)" in capsys.readouterr().out
