"""Insertion and Deletion as torchmetrics: the mean over all examples, whatever the batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from captum_idexpo.metrics import Deletion, Insertion, deletion, insertion
from tests.helpers import smooth_net

X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAPS = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.mark.parametrize(("metric", "function"), [(Insertion, insertion), (Deletion, deletion)])
def test_torchmetrics_give_the_mean_over_examples_for_any_batch_sizes(metric, function):
    net = smooth_net()
    accumulated = metric(net, baselines=0.3, fraction=0.5)
    for part in (slice(0, 5), slice(5, 7)):
        accumulated.update(X[part], MAPS[part], target=Y[part])
    expected = function(net, X, MAPS, baselines=0.3, target=Y, fraction=0.5).mean()
    torch.testing.assert_close(accumulated.compute(), expected.detach())
    accumulated.reset()
    assert int(accumulated.count) == 0
    assert not accumulated.state_dict()


def test_metric_collection_accepts_insertion_and_deletion():
    net = smooth_net()
    both = MetricCollection([Insertion(net), Deletion(net)])
    both.update(X, MAPS, target=Y)
    assert set(both.compute()) == {"Insertion", "Deletion"}


def test_metric_clones_score_the_same_model_and_collections_stay_separate():
    torch.manual_seed(0)
    model, x, phi = torch.nn.Linear(6, 3), torch.randn(8, 6), torch.randn(8, 6)
    clone = Insertion(model).clone()
    before = copy.deepcopy(model)
    both = MetricCollection({"before": Insertion(before), "after": Insertion(model), "deletion": Deletion(model)})
    both.update(x, phi, target=1)
    both.compute()
    torch.nn.init.normal_(model.weight)  # training
    both.reset()
    for metric in (clone, both):
        metric.update(x, phi, target=1)
    expected = insertion(model, x, phi, target=1).mean().double()
    torch.testing.assert_close(clone.compute(), expected)
    torch.testing.assert_close(both.compute()["after"], expected)
    torch.testing.assert_close(both.compute()["before"], insertion(before, x, phi, target=1).mean().double())
    torch.testing.assert_close(both.compute()["deletion"], deletion(model, x, phi, target=1).mean().double())
    torch.testing.assert_close(pickle.loads(pickle.dumps(both["after"])).compute(), expected)
