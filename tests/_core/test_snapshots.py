"""What a failed or measured step has moved is put back, whatever the model does with its buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo._core.modes import Snapshot

X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(0))


def trainer_of(net, **settings):
    return ExplanationRegularizedTrainer(
        net, torch.optim.SGD(net.parameters(), lr=0.05), show_progress=False, **settings
    )


def loader(x):
    return DataLoader(TensorDataset(x, Y), batch_size=4)


class Centred(nn.Module):
    """Keeps a mean of its inputs in a buffer that it assigns anew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3).double()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)


def test_snapshot_restores_buffers_that_a_model_reassigns():
    spoiled = X.clone()
    spoiled[5, 0] = float("nan")
    model, twin = Centred(), Centred()
    with pytest.raises(NonFiniteError, match="last good weights"):
        trainer_of(model).fit(loader(spoiled))
    trainer_of(twin).fit([(X[:4], Y[:4])])
    assert torch.equal(model.mean, twin.mean)
    measured = Centred()
    trainer_of(measured, gradient_norms_every=1).fit([(X[:4], Y[:4])])
    assert torch.equal(measured.mean, twin.mean)


class Queue(nn.Module):
    """Buffers of every kind: that grow, change their type, begin as None, are expanded."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3).double()
        self.register_buffer("seen", torch.zeros(0, 6, dtype=torch.float64))
        self.register_buffer("kind", torch.zeros(1))
        self.register_buffer("last", None)
        self.register_buffer("grid", torch.arange(6.0, dtype=torch.float64).expand(4, 6))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, x.detach()])
            self.kind = self.kind.double() if self.kind.dtype == torch.float32 else self.kind.float()
            self.last = x.detach().mean(0)
        return self.linear(x + 0 * self.grid[0]) + 0 * (0 if self.last is None else self.last.sum())

    def state(self):
        return [self.seen, self.kind, self.last, self.grid]


def test_snapshot_restores_buffers_of_every_kind():
    spoiled = [(X[:4], Y[:4]), (X[4:8] * float("nan"), Y[4:8])]
    model, twin = Queue(), Queue()
    with pytest.raises(NonFiniteError, match="last good weights"):
        trainer_of(model).fit(spoiled)
    trainer_of(twin).fit(spoiled[:1])
    for ours, theirs in zip(model.state(), twin.state(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    model = Queue()
    with pytest.raises(NonFiniteError, match="last good weights"):
        trainer_of(model).fit(spoiled[1:])
    assert model.last is None
    assert not len(model.seen)


def test_snapshot_restores_parameters_and_buffers_in_place():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    net[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    objects = [*net.parameters(), *net.buffers()]
    weights = Snapshot(net, parameters=True)
    for _ in range(2):
        net(torch.randn(5, 2))
        with torch.no_grad():
            net[0].weight.add_(1)
        weights.restore()
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name])
    assert all(ours is theirs for ours, theirs in zip([*net.parameters(), *net.buffers()], objects, strict=True))
    net(torch.randn(5, 2))
    weights.keep()
    moved = net[1].running_mean.clone()
    net(torch.randn(5, 2))
    weights.restore()
    assert torch.equal(net[1].running_mean, moved)


def test_snapshot_restores_buffers_made_under_inference_mode():
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        net.register_buffer("grid", torch.ones(2))
    kept = Snapshot(net)
    kept.keep()
    kept.restore()
    assert net.grid.tolist() == [1.0, 1.0]


def test_snapshot_restores_a_buffer_that_was_resized_in_place():
    net = nn.Linear(2, 2)
    net.register_buffer("queue", torch.ones(2))
    kept = Snapshot(net)
    net.queue.resize_(3).fill_(5.0)
    kept.restore()
    assert net.queue.tolist() == [1.0, 1.0]
