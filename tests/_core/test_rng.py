"""Streams put back; numbers drawn where the generator is, whatever device they are for (here one without values)."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from captum_idexpo._core.rng import accelerators, kept_streams, seeded, set_streams, source, streams
from captum_idexpo.attr.coalitions import kernel_shap_masks
from captum_idexpo.attr.sampling import lime_masks
from captum_idexpo.metrics._locations import Locations
from captum_idexpo.metrics.insertion_deletion import StepSchedule
from captum_idexpo.metrics.local_fidelity import _normal
from captum_idexpo.metrics.sensitivity_n import _random_subsets
from captum_idexpo.regularizers import GaussianNeighbors, SaliencyGuided, UniformNeighbors

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
X = torch.zeros(3, 4, device=ELSEWHERE)


def test_numbers_are_drawn_at_the_generator():
    assert source(ELSEWHERE, None) == ELSEWHERE
    assert source(ELSEWHERE, torch.Generator()) == CPU


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: GaussianNeighbors().draw((X,), 5, g).coordinates,
        lambda g: GaussianNeighbors(one_dimensional=True).draw((X,), 5, g).coordinates,
        lambda g: UniformNeighbors().draw((X,), 5, g).coordinates,
        lambda g: lime_masks("independent", 2, 5, 4, ELSEWHERE, g),
        lambda g: kernel_shap_masks("leverage", 2, 5, 4, ELSEWHERE, g)[0],
        lambda g: _normal(X, 5, g),
        lambda g: StepSchedule.of(torch.tensor([16]), 1.0, None, ELSEWHERE).draw(3, 2, torch.float32, g)[0],
        lambda g: _random_subsets(Locations.of(X, (X,), None), 2, 5, g),
        lambda g: SaliencyGuided(torch.nn.Linear(4, 2), generator=g)._random(X),
    ],
)
def test_what_a_generator_draws_is_brought_to_the_inputs(draw):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw(generator).device == ELSEWHERE
    assert not torch.equal(before, generator.get_state())


def test_of_other_kinds_of_device_there_are_no_streams():
    assert accelerators(CPU) == accelerators(ELSEWHERE) == []


def test_all_streams_are_seeded_inside_and_put_back():
    def draw():
        return [*torch.rand(2).tolist(), *np.random.rand(2).tolist(), random.random()]

    with seeded(2**40, []):
        drawn = draw()
        before = draw()
        with seeded(2**40, []):
            assert draw() == drawn
        after = draw()
    with seeded(2**40, []):
        assert [draw(), draw(), draw()] == [drawn, before, after]
    state = random.getstate()
    with suppress(KeyError), seeded(1, []):
        raise KeyError
    assert random.getstate() == state


def test_streams_are_kept():
    torch.manual_seed(1)
    states = streams([])
    expected = torch.rand(2)
    set_streams(states, [])
    with kept_streams(accelerators(CPU)):
        torch.manual_seed(5)
    assert torch.equal(torch.rand(2), expected)
