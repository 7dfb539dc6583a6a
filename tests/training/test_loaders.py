"""Loaders of every kind: all their examples count, once, and a pass that breaks off leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import Saliency
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.training.loaders import is_its_own
from tests.helpers import smooth_net

X = torch.randn(22, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (22,), generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, Y)


class First(Sampler):
    """Another number of examples than the data set has."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self):
        return iter(range(self.n))

    def __len__(self) -> int:
        return self.n


class GrowingBatches(Sampler):
    def __iter__(self):
        yield from ([0], [1, 2], [3, 4, 5, 6])

    def __len__(self) -> int:
        return 3


class Pairs(Dataset):
    """Items of two examples each."""

    def __getitem__(self, index):
        return X[2 * index : 2 * index + 2], Y[2 * index : 2 * index + 2]

    def __len__(self) -> int:
        return 11


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


def joined(items):
    return tuple(map(torch.cat, zip(*items, strict=True)))


LOADERS = {
    "sampler": (DataLoader(DATA, batch_size=4, sampler=First(15)), 15),
    "batch sampler": (DataLoader(DATA, batch_sampler=BatchSampler(First(13), 5, False)), 13),
    "batches of its own": (DataLoader(DATA, batch_sampler=GrowingBatches()), 7),
    "batches as items": (DataLoader(Pairs(), batch_size=None), 22),
    "items joined": (DataLoader(Pairs(), batch_size=3, collate_fn=joined), 22),
    "stream": (DataLoader(Stream(), batch_size=4), 22),
    "dropped": (DataLoader(DATA, batch_size=4, drop_last=True), 20),
    "list": ([(X[:5], Y[:5]), (X[5:9], Y[5:9])], 9),
}


def trainer_of(net=None, regularized=True, **settings):
    net = smooth_net() if net is None else net
    regularizers = [InsertionDeletion(Saliency(net), baselines=0.0)] if regularized else []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    return ExplanationRegularizedTrainer(net, optimizer, regularizers, show_progress=False, **settings)


@pytest.mark.parametrize(("loader", "n_examples"), LOADERS.values(), ids=list(LOADERS))
def test_loader_examples_each_count_once(loader, n_examples):
    trainer = trainer_of()
    scores = trainer.example_scores(loader)
    assert {name: len(values) for name, values in scores.items()} == dict.fromkeys(scores, n_examples)
    whole = trainer.evaluate([(X[:n_examples], Y[:n_examples])])
    assert trainer.evaluate(loader) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("where", ["training", "evaluation", "loss"])
def test_loader_is_left_clean_when_its_last_batch_raises(where):
    """accelerate would cut every later batch to the size of that one."""
    spoiled = X[:10].clone()
    spoiled[9] = torch.nan
    loader = DataLoader(TensorDataset(spoiled, Y[:10]), batch_size=4)
    trainer = trainer_of()
    expected = trainer.evaluate([(X, Y)])

    def fail(output, target):
        raise KeyError

    if where == "loss":
        loader, trainer.loss_fn = DataLoader(DATA, batch_size=22), fail
    failed = None
    try:
        trainer.fit(loader) if where == "training" else trainer.evaluate(loader)
    except (NonFiniteError, KeyError) as error:
        failed = error  # held, with all frames of its traceback
    assert failed is not None
    assert trainer.accelerator.gradient_state.active_dataloader is None
    assert all(module.training for module in trainer.model.modules())
    trainer.loss_fn = torch.nn.functional.cross_entropy
    if where != "training":
        assert trainer.evaluate([(X, Y)]) == expected


@pytest.mark.parametrize("n_passes", [1, 2, 3, 5])
def test_gradient_accumulation_may_end_an_epoch_with_fewer_passes(n_passes):
    """Of seven batches, the last one short."""
    nets = [smooth_net(), smooth_net()]
    loader = DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=3)
    for net, batches in zip(nets, (loader, list(loader)), strict=True):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n_passes)
        trainer_of(net, regularized=False, accelerator=accelerator).fit(batches, epochs=2)
    twin = smooth_net()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(2):
        for number, (x, y) in enumerate(loader, start=1):
            (torch.nn.functional.cross_entropy(twin(x), y) / n_passes).backward()
            if number % n_passes == 0 or number == len(loader):
                optimizer.step()
                optimizer.zero_grad()
    for net in nets:
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


class Shifted(DataLoader):
    """A loader that changes what it yields, in a way that accelerate does not know."""

    def __iter__(self):
        return ((x + 100, y) for x, y in super().__iter__())


def test_loader_with_overridden_iter_is_iterated_through_it():
    net, seen = smooth_net(), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean().item()))
    trainer = ExplanationRegularizedTrainer(net, torch.optim.SGD(net.parameters(), lr=1e-9), show_progress=False)
    trainer.fit(Shifted(DATA, 11), Shifted(DATA, 11))
    assert min(seen) > 90


def test_loader_with_overridden_iter_is_refused_for_several_processes():
    with pytest.raises(ValueError, match=r"Shifted has an __iter__ of its own.*collate_fn"):
        is_its_own(Shifted(DATA, 11), SimpleNamespace(num_processes=2))
    assert not is_its_own(DataLoader(DATA), SimpleNamespace(num_processes=2))
    prepared = Accelerator(cpu=True).prepare_data_loader(DataLoader(DATA))
    assert not is_its_own(prepared, SimpleNamespace(num_processes=2))


class Quarter(DataLoader):
    def __iter__(self):
        yield next(super().__iter__())


class Endless(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Plain(DataLoader):
    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize("make", [lambda: Quarter(DATA, 6), lambda: Plain(Endless(), 8)])
def test_loader_with_overridden_iter_ends_its_epoch_whatever_its_length(make):
    net = smooth_net()
    before = net[0].weight.clone()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ExplanationRegularizedTrainer(net, optimizer, accelerator=accelerator, show_progress=False).fit(make())
    assert not torch.equal(net[0].weight, before)
