"""Streams put back; numbers drawn where the generator is, whatever device they are for (here one without values)."""

from __future__ import annotations

import functools
import io
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from captum_idexpo._core.rng import (
    accelerators,
    kept_streams,
    random_state,
    seeded,
    set_random_state,
    set_streams,
    source,
    streams,
)
from captum_idexpo.attr.coalitions import kernel_shap_masks
from captum_idexpo.attr.local_linear import normal_steps
from captum_idexpo.attr.sampling import lime_masks
from captum_idexpo.metrics._locations import Locations
from captum_idexpo.metrics._masking import StepSchedule
from captum_idexpo.metrics.sensitivity_n import _random_subsets
from captum_idexpo.regularizers import GaussianNeighbors, SaliencyGuided, UniformNeighbors

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
X = torch.zeros(3, 4, device=ELSEWHERE)


def test_source_is_the_device_of_the_generator():
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
        lambda g: normal_steps(X, 5, g),
        lambda g: StepSchedule.of(torch.tensor([16]), 1.0, None, ELSEWHERE).draw(3, 2, torch.float32, g)[0],
        lambda g: _random_subsets(Locations.of(X, (X,), None), 2, 5, g),
        lambda g: SaliencyGuided(torch.nn.Linear(4, 2), generator=g)._random(X),
    ],
)
def test_generator_draws_are_moved_to_the_device_of_the_inputs(draw):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw(generator).device == ELSEWHERE
    assert not torch.equal(before, generator.get_state())


def test_accelerators_of_other_kinds_of_device_are_none():
    assert accelerators(CPU) == accelerators(ELSEWHERE) == []


def test_seeded_sets_all_random_streams_and_restores_them():
    def draw():
        return [*torch.rand(2).tolist(), *np.random.rand(2).tolist(), random.random()]

    with seeded(2**40, CPU):
        drawn = draw()
        before = draw()
        with seeded(2**40, CPU):
            assert draw() == drawn
        after = draw()
    with seeded(2**40, CPU):
        assert [draw(), draw(), draw()] == [drawn, before, after]
    state = random.getstate()
    with suppress(KeyError), seeded(1, CPU):
        raise KeyError
    assert random.getstate() == state


def test_kept_streams_restores_the_random_streams():
    torch.manual_seed(1)
    states = streams([])
    expected = torch.rand(2)
    set_streams(states, [])
    with kept_streams(accelerators(CPU)):
        torch.manual_seed(5)
    assert torch.equal(torch.rand(2), expected)


KINDS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.randn(3, generator=g).tolist(), "cpu"),
    "random": (lambda: random.Random(3), lambda g: [g.gauss(0, 1) for _ in range(3)], "python"),
    "legacy NumPy": (lambda: np.random.RandomState(3), lambda g: g.randn(3).tolist(), "numpy"),
    **{
        bits.__name__: (
            functools.partial(lambda bits: np.random.Generator(bits(3)), bits),
            lambda g: g.standard_normal(3).tolist(),
            "numpy",
        )
        for bits in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_random_state_of_any_generator_is_plain_data_and_restored(name):
    make, draw, kind = KINDS[name]
    generator = make()
    draw(generator)
    file = io.BytesIO()
    torch.save(random_state(CPU, [generator]), file)
    expected, from_numpy, from_python = draw(generator), np.random.rand(), random.random()
    file.seek(0)
    state, another = torch.load(file, weights_only=True), make()
    set_random_state(state, CPU, [another])
    assert draw(another) == expected
    assert (np.random.rand(), random.random()) == (from_numpy, from_python)
    assert state["generators"][0][0] == kind


def test_random_state_of_other_generators_is_restored_with_a_warning():
    state = random_state(CPU, [torch.Generator(), torch.Generator()])
    with pytest.warns(UserWarning, match="drew from 2 generators, this one knows 1"):
        set_random_state(state, CPU, [torch.Generator()])
    with pytest.warns(UserWarning, match="drew random numbers on cpu, this one draws them on numpy"):
        set_random_state(random_state(CPU, [torch.Generator()]), CPU, [np.random.default_rng(0)])


def test_seeded_generators_start_from_their_initial_seed():
    generator = torch.Generator().manual_seed(7)
    first = torch.rand(2, generator=generator)
    state = generator.get_state()
    with seeded(1, CPU, [generator]):
        assert torch.equal(torch.rand(2, generator=generator), first)
    assert torch.equal(generator.get_state(), state)


def test_random_state_of_another_kind_of_device_is_skipped():
    generator = torch.Generator().manual_seed(3)
    state = random_state(CPU, [generator])
    first = torch.rand(1)
    state["torch"][0] = "cuda"
    with pytest.warns(UserWarning, match="drew random numbers on cuda, this one draws them on cpu"):
        set_random_state(state, CPU, [generator])
    assert torch.equal(torch.rand(1), first)
    state["torch"][0], state["generators"] = "cpu", [["cuda", torch.zeros(16, dtype=torch.uint8)]]
    before = generator.get_state()
    with pytest.warns(UserWarning, match="drew random numbers on cuda, this one draws them on cpu"):
        set_random_state(state, CPU, [generator])
    assert torch.equal(generator.get_state(), before)
