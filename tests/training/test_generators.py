"""Generators of every kind, wherever they are held: found, noted in numbers alone, put back."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.training.generators import generators_of, kind_of, set_state, state_of

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(0))

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
def test_a_generator_goes_on_where_it_was(name):
    make, draw, kind = KINDS[name]
    generator = make()
    draw(generator)
    file = io.BytesIO()
    torch.save(state_of(generator), file)
    expected = draw(generator)
    file.seek(0)
    another = make()
    set_state(another, torch.load(file, weights_only=True))
    assert draw(another) == expected
    assert kind_of(generator) == kind


class Shuffled(Sampler):
    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        return iter(self.generator.permutation(16).tolist())

    def __len__(self):
        return 16


class Jittered:
    """A collate_fn with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, items):
        x, y = map(torch.stack, zip(*items, strict=True))
        return x + torch.randn(x.shape, generator=self.generator), y


class Noisy(nn.Module):
    """A model that draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 3), torch.Generator().manual_seed(2)

    def forward(self, x):
        return self.linear(x + torch.randn(x.shape, generator=self.generator) if self.training else x)


def test_they_are_found_wherever_they_are_held():
    model, jittered, shuffled = nn.Sequential(Noisy()), Jittered(), Shuffled(np.random.default_rng(0))
    plain = DataLoader(TensorDataset(X, Y), sampler=shuffled, collate_fn=jittered)
    bound = DataLoader(TensorDataset(X, Y), collate_fn=jittered.__call__)
    held = {id(generator) for generator in generators_of(plain, model)}
    assert held == {id(model[0].generator), id(jittered.generator), id(shuffled.generator)}
    assert [*generators_of(bound)] == [jittered.generator]


def test_a_run_that_draws_from_them_is_resumed_bit_for_bit(tmp_path):
    def run(folder, epochs):
        torch.manual_seed(0)
        model = Noisy()
        loader = DataLoader(
            TensorDataset(X, Y), 4, sampler=Shuffled(np.random.default_rng(0)), collate_fn=Jittered(), num_workers=0
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = ExplanationRegularizedTrainer(model, optimizer, checkpoint_dir=folder, show_progress=False)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit(loader, epochs=epochs)
        return model.linear.weight.detach()

    expected = run(None, 3)
    run(tmp_path, 2)
    assert torch.equal(run(tmp_path, 3), expected)


def test_worker_processes_that_persist_draw_one_number_a_run(tmp_path):
    def run(folder, epochs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(), nn.Linear(4, 3))
        loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, num_workers=1, persistent_workers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = ExplanationRegularizedTrainer(model, optimizer, checkpoint_dir=folder, show_progress=False)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit(loader, epochs=epochs)
        return model[1].weight.detach()

    expected = run(None, 3)
    run(tmp_path, 1)
    assert torch.equal(run(tmp_path, 3), expected)


def test_a_function_of_an_object_that_draws_is_found_as_loss_too(tmp_path):
    class Noise:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)

        def loss(self, output, target):
            noise = torch.randn(output.shape, generator=self.generator)
            return nn.functional.cross_entropy(output + noise, target)

    def run(folder, epochs):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"checkpoint_dir": folder, "show_progress": False}
        trainer = ExplanationRegularizedTrainer(model, optimizer, [], Noise().loss, **settings)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit([(X, Y)] * 2, epochs=epochs)
        return model.weight.detach()

    expected = run(None, 2)
    run(tmp_path, 1)
    assert torch.equal(run(tmp_path, 2), expected)


def test_the_systems_own_source_has_no_state():
    class Holder:
        transform = None

        def __init__(self):
            self.generator = random.SystemRandom()

    assert list(generators_of(Holder())) == []
