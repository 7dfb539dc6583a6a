"""The noise of drawn steps: all ways are unbiased, and the closed form is what drawing gradients gives."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from captum_idexpo.attr import InputXGradient
from captum_idexpo.regularizers import InsertionDeletion

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("cifar10", "digits", "fewer_evaluations")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("fewer_evaluations")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def problem(script):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 16, dtype=torch.float64)

    def explain(x, y):
        x = x.requires_grad_()
        return torch.autograd.grad(model(x)[0, y], x, create_graph=True)[0] * x

    return script.Problem(model, x, torch.tensor([0, 1, 2, 0, 1]), explain)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("way", ["strata", "independent", "apart", "mirrored", "one place", "by size"])
def test_ways_to_draw_steps_are_unbiased(script, way, k):
    steps = script.Steps(k, 8, torch.arange(1.0, 9.0), torch.Generator().manual_seed(0))
    for weights in script.WAYS[way](steps, 40_000):
        torch.testing.assert_close(weights.mean(dim=0), torch.full((8,), 1 / 8), atol=0.006, rtol=0)


def test_one_place_is_the_same_in_every_stratum(script):
    steps = script.Steps(4, 32, torch.ones(32), torch.Generator().manual_seed(0))
    drawn = script.one_place(steps, 50)[0].nonzero()[:, 1].view(50, 4)
    assert (drawn.diff(dim=1) == 8).all()


def test_means_are_the_gradients_of_the_loss_with_all_steps(script, problem):
    regularizer = InsertionDeletion(
        InputXGradient(problem.model),
        baselines=0.0,
        insertion_weight=1.0,
        deletion_weight=1.0,
        deletion_form="complement",
        steps_per_update=None,
    )
    found = script.gradients(problem)
    for x, y, mean in zip(problem.x.split(1), problem.y.split(1), found.means, strict=True):
        loss = sum(regularizer(x.detach(), y).values())
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(problem.model.parameters()))])
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(found.between_images, float(found.means.var(dim=0).sum()))


def test_noise_is_that_of_gradients_of_drawn_steps(script, problem):
    found = script.gradients(problem)
    steps = script.Steps(2, 8, torch.ones(8), torch.Generator().manual_seed(0))
    drawn = torch.cat(script.one_place(steps, script.N_DRAWS), dim=1).double()
    x, y = problem.x[1:2], problem.y[1:2]
    of_steps = torch.stack([script.flat(step, problem.model) for step in script.penalties(problem, x, y)])
    wrong = drawn @ of_steps - of_steps.mean(dim=0) * 2
    expected = wrong.square().sum(dim=1).mean() / found.between_images
    torch.testing.assert_close(script.noise(found, script.one_place, 2)[1], expected)


def test_report_has_each_way_and_each_number_of_steps(script, problem):
    rows = {"small": script.measure(script.gradients(problem))}
    assert list(rows["small"]) == ["1", "2", "4"]  # of eight steps
    table = script.report(rows)
    assert all(name in table for name in script.WAYS)
    assert table.count("small") == 2
    assert rows["small"]["4"]["independent"]["to strata"][0] > 0
