"""How many rows a forward pass has, and whether its rows influence each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo._core.chunks import default_rows_per_forward, look
from captum_idexpo._core.compiled import can_run_eagerly
from captum_idexpo.metrics import insertion


@pytest.mark.parametrize(
    ("shape", "largest", "rows"),
    [
        ((3, 32, 32), None, 42),  # 2^19 values, if a layer has four times the inputs'
        ((3, 32, 32), 2**14, 32),
        ((3, 32, 32), 100, 170),  # the inputs are the largest
        ((3, 64, 64), 2**16, 32),  # 2^21 values
        ((3, 64, 64), 2**17, 16),
        ((3, 224, 224), 2**20, 8),
        ((3, 448, 448), 2**22, 3),  # 2^21 input values
        ((3, 1024, 1024), 2**24, 1),
        ((5,), 64, 4096),
        ((0,), None, 4096),
    ],
)
def test_default_rows_per_forward_bounds_the_number_of_values(shape, largest, rows):
    assert default_rows_per_forward((torch.zeros(2, *shape), torch.zeros(2, 0)), largest) == rows


UNKNOWN = 2**19 // (4 * 192)


def looked_at(forward_func):
    x = torch.zeros(4, 3, 8, 8)
    seen = look(forward_func, lambda rows, examples, n_copies: forward_func(*rows), (x,))
    assert seen.output.shape == (4, 2)
    return seen.max_rows


def test_look_finds_the_largest_output():
    widening = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 2))
    assert looked_at(widening) == 2**19 // (64 * 64)
    assert looked_at(widening.forward) == 2**19 // (64 * 64)
    assert looked_at(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))) == 2**19 // 192
    assert looked_at(lambda x: widening(x)) == UNKNOWN  # not looked into
    assert not torch.nn.modules.module._global_forward_hooks


class Functional(nn.Module):
    def forward(self, x):
        return nn.functional.conv2d(x, torch.ones(64, 3, 1, 1)).mean(dim=(2, 3))[:, :2]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(24, 512, batch_first=True), nn.Linear(512, 2)

    def forward(self, x):
        return self.head(self.lstm(x.flatten(2).mT.reshape(len(x), 8, 24))[0][:, -1])


def test_look_falls_back_to_the_default_where_no_layer_is_visible():
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Flatten(), nn.Linear(64 * 64, 2))
    assert looked_at(Functional()) == UNKNOWN
    assert looked_at(torch.jit.trace(net, torch.zeros(4, 3, 8, 8))) == UNKNOWN
    assert looked_at(nn.Sequential(Functional())) == 2**19 // 192
    assert looked_at(Recurrent()) == 2**19 // (8 * 512)  # a layer that returns several tensors


def test_look_ignores_the_outputs_of_parametrizations():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 2))
    nn.utils.parametrizations.orthogonal(net[1])  # by way of a matrix of 192 x 192
    assert looked_at(net) == 2**19 // 192


def test_look_ignores_the_layers_of_other_models():
    net, other = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nn.Linear(1, 10**6)
    x = torch.zeros(4, 3, 8, 8)

    def evaluate(rows, examples, n_copies):
        other(torch.zeros(4, 1))  # as in another thread
        return net(*rows)

    assert look(net, evaluate, (x,)).max_rows == 2**19 // 192


def test_look_at_large_inputs_takes_one_row_at_a_time():
    rows = []

    def forward(x):
        rows.append(len(x))
        return x.flatten(1)[:, :2]

    insertion(forward, torch.zeros(3, 2**21), torch.rand(3, 2**21), target=0, step_size=2**21)
    assert rows == [1] * (1 + 3)


@pytest.mark.skipif(not can_run_eagerly(), reason="torch.compiler.set_stance needs PyTorch 2.6")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("in_place", [False, True])
def test_look_does_not_recompile_a_compiled_model(in_place):
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    compiled = net if in_place else torch.compile(net, backend=backend)
    if in_place:
        net.compile(backend=backend)
    with torch.no_grad():
        compiled(torch.zeros(4, 3, 8, 8))
    n_compilations = len(compilations)
    assert looked_at(compiled) == 2**19 // 192
    assert looked_at(nn.Sequential(compiled)) == 2**19 // 192
    assert looked_at(torch.compile(Functional(), backend=backend)) == UNKNOWN  # it calls functions
    assert len(compilations) == n_compilations
