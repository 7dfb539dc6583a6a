"""Insertion and Deletion as torchmetrics: the mean over all examples, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torchmetrics import MetricCollection

from captum_idexpo.metrics import Deletion, Insertion, deletion, insertion
from tests.helpers import smooth_net

X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAPS = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize(("metric", "function"), [(Insertion, insertion), (Deletion, deletion)])
def test_batches_of_any_size_give_the_mean_over_examples(metric, function):
    net = smooth_net()
    accumulated = metric(net, baselines=0.3)
    for part in (slice(0, 5), slice(5, 7)):
        accumulated.update(X[part], MAPS[part], target=Y[part], fraction=0.5)
    expected = function(net, X, MAPS, 0.3, target=Y, fraction=0.5).mean()
    torch.testing.assert_close(accumulated.compute(), expected.detach())
    accumulated.reset()
    assert int(accumulated.count) == 0
    assert not accumulated.state_dict()


def test_a_collection_takes_both():
    net = smooth_net()
    both = MetricCollection([Insertion(net), Deletion(net)])
    both.update(X, MAPS, target=Y)
    assert set(both.compute()) == {"Insertion", "Deletion"}
