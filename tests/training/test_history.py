"""The history of a run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.training import History
from tests.helpers import smooth_net


def test_history_best_is_the_row_of_the_epoch_whose_weights_were_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, dtype=torch.float64, generator=generator)
    data = TensorDataset(x, torch.randint(3, (60,), generator=generator))
    model = smooth_net()
    trainer = ExplanationRegularizedTrainer(model, torch.optim.SGD(model.parameters(), lr=3.0), show_progress=False)
    history = trainer.fit(DataLoader(data, 20), DataLoader(data, 60), epochs=8)
    scores = [row["valscore"] for row in history]
    assert scores.index(max(scores)) < 7  # the last epoch is not the best
    assert history.best is history[scores.index(max(scores))]
    assert trainer.evaluate(DataLoader(data, 60))["valscore"] == pytest.approx(history.best["valscore"])


def test_history_best_is_eligible():
    rows = [{"valscore": 3.0, "eligible": 0.0}, {"valscore": 1.0, "eligible": 1.0}, {"valscore": 2.0, "eligible": 1.0}]
    assert History(rows).best is rows[2]
    assert History(rows[:1]).best is None


def test_history_is_written_whole_or_not_at_all(tmp_path):
    class Unwritable:
        def __str__(self):
            raise KeyboardInterrupt

    path = tmp_path / "history.csv"
    History([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "accuracy": 0.9}]).to_csv(path)
    written = path.read_text()
    assert written.splitlines() == ["epoch,loss,accuracy", "1,0.5,", "2,,0.9"]
    with pytest.raises(KeyboardInterrupt):
        History([{"epoch": 1, "loss": Unwritable()}]).to_csv(path)
    assert path.read_text() == written


def test_history_best_is_none_without_validation():
    assert History([{"epoch": 1, "loss": 0.5}]).best is None
