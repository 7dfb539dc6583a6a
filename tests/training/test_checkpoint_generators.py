"""What a run draws from is in its checkpoint: generators of loaders and samplers, and those that the user names."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.training.checkpoint import generators_of

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(0))


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


def test_generators_of_finds_those_of_loaders_and_samplers():
    torchs, numpys = torch.Generator(), np.random.default_rng(0)
    shuffling = DataLoader(TensorDataset(X, Y), shuffle=True, generator=torchs)
    sampling = DataLoader(TensorDataset(X, Y), sampler=Shuffled(numpys))
    prepared = Accelerator().prepare_data_loader(DataLoader(TensorDataset(X, Y), sampler=Shuffled(numpys)))
    assert generators_of(shuffling, None) == [torchs]
    assert generators_of(sampling) == generators_of(prepared) == [numpys]
    assert generators_of([(X, Y)], "no loader") == []


def test_generators_of_samplers_and_users_are_resumed_bit_for_bit(tmp_path):
    def run(folder, epochs):
        torch.manual_seed(0)
        model, jittered, legacy = Noisy(), Jittered(), np.random.RandomState(4)
        loader = DataLoader(TensorDataset(X, Y), 4, sampler=Shuffled(np.random.default_rng(0)), collate_fn=jittered)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss_fn(output, target):
            return legacy.rand() * nn.functional.cross_entropy(output, target)

        own = [model.generator, jittered.generator, legacy]
        settings = {"checkpoint_dir": folder, "show_progress": False, "generators": own}
        trainer = ExplanationRegularizedTrainer(model, optimizer, [], loss_fn, **settings)
        if folder is not None and any(folder.iterdir()):
            trainer.resume()
        trainer.fit(loader, epochs=epochs)
        return model.linear.weight.detach()

    expected = run(None, 3)
    run(tmp_path, 2)
    assert torch.equal(run(tmp_path, 3), expected)


def test_persistent_workers_draw_one_random_number_per_run(tmp_path):
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
