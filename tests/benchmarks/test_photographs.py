"""The demo, reduced: stamps and their annotations agree, forbidden evidence goes, a table and a picture come."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.utils.data import TensorDataset

from captum_idexpo.attr import Saliency

pytest.importorskip("skimage")


@pytest.fixture
def photographs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("photographs")
    for name, value in {"N_TRAIN": 32, "SIZE": 32, "STAMP": 8}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    sys.modules.pop("photographs")


def test_annotations_are_0_exactly_where_a_stamp_changed_the_image(photographs):
    generator = Generator().manual_seed(0)
    images, classes = photographs.draw_crops(12, generator)
    images = 0.01 + 0.9 * images  # no pixel has a stamp's colour already
    stamped = photographs.stamp(images, classes, generator)
    changed = (stamped.images != images).any(dim=1)
    assert torch.equal(changed, stamped.annotations == 0)
    assert (changed.sum(dim=(1, 2)) == photographs.STAMP**2).all()


@pytest.mark.filterwarnings("ignore:.*have no positive evidence")
def test_training_with_forbidden_stamps_leaves_less_evidence_at_them(photographs):
    generator = Generator().manual_seed(0)
    images, classes = photographs.draw_crops(32, generator)
    stamped = photographs.stamp(images, classes, generator)
    data = TensorDataset(stamped.images, classes, stamped.annotations)

    def evidence_at_stamps(forbid):
        torch.manual_seed(0)
        model = photographs.train(photographs.Network(), data, 30, 2e-3, forbid=forbid)
        maps = photographs.grad_cam(model, stamped.images, classes)[:, 0]
        gradients = Saliency(lambda x: model(x).log_softmax(1).sum(1)).attribute(stamped.images).square().sum(dim=1)
        return [float((values * (1 - stamped.annotations)).sum() / values.sum()) for values in (maps, gradients)]

    forbidden, plain = evidence_at_stamps(True), evidence_at_stamps(False)
    assert forbidden[0] < 0.5 * plain[0]  # attribution supervision
    assert forbidden[1] < 0.5 * plain[1]  # right for the right reasons


def test_demo_prints_a_table_and_writes_a_picture(photographs, monkeypatch, tmp_path, capsys):
    for name, value in {"N_TEST": 16, "EPOCHS": 1, "MORE_EPOCHS": 1}.items():
        monkeypatch.setattr(photographs, name, value)
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--out", str(tmp_path)])
    n_threads = torch.get_num_threads()
    photographs.main()
    torch.set_num_threads(n_threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if "stamp" in line and "0." in line]
    assert len(rows) == 3
    assert (tmp_path / "photographs.png").stat().st_size > 10_000
