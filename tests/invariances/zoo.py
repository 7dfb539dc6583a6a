"""Small models of the kinds that people explain, in double precision, each with inputs and a layer to explain."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[bool], nn.Module]] = {
    "ReLU": lambda inplace: nn.ReLU(inplace=inplace),
    "LeakyReLU": lambda inplace: nn.LeakyReLU(0.2, inplace=inplace),
    "ELU": lambda inplace: nn.ELU(inplace=inplace),
    "Softplus": lambda inplace: nn.Softplus(),
    "Tanh": lambda inplace: nn.Tanh(),
    "Sigmoid": lambda inplace: nn.Sigmoid(),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "MaxPool": lambda: nn.MaxPool2d(2),
    "overlapping MaxPool": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "dilated MaxPool": lambda: nn.MaxPool2d(2, dilation=2),
    "AvgPool": lambda: nn.AvgPool2d(2),
}


class Siamese(nn.Module):
    """Both halves of the input go through one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branch(x[:, :3]) - self.branch(x[:, 3:]))


class Recurrent(nn.Module):
    """A series ``(B, T, F)`` through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.hidden, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.gru(x)[0][:, -1])))


class TransformerEncoder(nn.Module):
    """A series ``(B, T, F)`` through attention over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


class VisionTransformer(nn.Module):
    """Patches, a class token, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 4, 3, stride=3), nn.Parameter(torch.randn(1, 1, 4))
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp, self.head = (
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head((tokens + self.mlp(tokens))[:, 0])


class ChannelsLast(nn.Module):
    """Maps ``(B, H, W, C)`` between LayerNorm and linear layers, as in ConvNeXt and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mix, self.head = (
            nn.Conv2d(2, 4, 2, 2),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.stem(x).permute(0, 2, 3, 1))
        return self.head(torch.nn.functional.silu(self.mix(maps)).mean(dim=(1, 2)))


class TwoInputs(nn.Module):
    """An image and a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.row, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(image).mean(dim=(2, 3)) * self.row(row)))


class Graph(nn.Module):
    """Nodes ``(N, F)`` that hear their neighbours: the rows of a pass influence each other."""

    def __init__(self, n_nodes: int) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        nodes = torch.arange(n_nodes)
        self.register_buffer("edges", torch.stack([nodes, (nodes + 1) % n_nodes]))

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        heard = torch.zeros_like(x).index_add(0, target, x[source])
        return self.head(torch.tanh(self.layer(x + heard)))


def conv_net(activation: str, pooling: str, *, inplace: bool = False) -> nn.Sequential:
    """Activation and pooling in both orders, with a convolution between."""
    act, pool = ACTIVATIONS[activation], POOLINGS[pooling]
    layers = [nn.Conv2d(2, 3, 3, padding=1), act(inplace), pool(), nn.Conv2d(3, 3, 3, padding=1), act(inplace)]
    size = layers[2](torch.zeros(1, 1, 6, 6)).shape[-1]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * size**2, 3))


def batch_norm_net() -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(108, 3),
    )
    for norm in (layers[1], layers[4]):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return layers


def mlp(n_columns: int, *between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Linear(5, n_columns))


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo.

    Attributes:
        make: the model, before it is seeded and cast.
        shapes: of its inputs, without the batch axis.
        layer: the name of the module that layer classes explain.
        neuron: of this layer.
        n_columns: of the output.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    layer: str
    neuron: Any = 1
    n_columns: int = 3

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double().eval()

    def inputs(self, n_examples: int, seed: int = 1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        tensors = tuple(
            torch.randn(n_examples, *shape, dtype=torch.float64, generator=generator) for shape in self.shapes
        )
        return tensors if len(tensors) > 1 else tensors[0]

    def baselines(self) -> Any:
        """One baseline for all examples."""
        return self.inputs(1, seed=2)


IMAGE, ROW, SERIES = ((2, 6, 6),), ((6,),), ((4, 3),)
CONV_NETS = {
    f"{activation}, {pooling}": Specimen(lambda a=activation, p=pooling: conv_net(a, p), IMAGE, "3", (1, 1, 1))
    for activation, pooling in itertools.product(ACTIVATIONS, POOLINGS)
}
OTHERS = {
    "BatchNorm": Specimen(batch_norm_net, IMAGE, "3", (1, 2, 2)),
    "GELU, LayerNorm": Specimen(lambda: mlp(3, nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5)), ROW, "3"),
    "SiLU": Specimen(lambda: mlp(3, nn.SiLU(), nn.Linear(5, 5)), ROW, "2"),
    "siamese": Specimen(Siamese, ROW, "head"),
    "recurrent": Specimen(Recurrent, SERIES, "hidden"),
    "transformer": Specimen(TransformerEncoder, SERIES, "embed", (1, 1)),
    "vision transformer": Specimen(VisionTransformer, IMAGE, "norm", (1, 1)),
    "channels last": Specimen(ChannelsLast, IMAGE, "mix", (1, 1, 1)),
    "two inputs": Specimen(TwoInputs, ((2, 6, 6), (3,)), "head"),
    "one column": Specimen(lambda: mlp(1, nn.Tanh(), nn.Linear(5, 5)), ROW, "2", n_columns=1),
    "many columns": Specimen(lambda: mlp(12, nn.Tanh(), nn.Linear(5, 5)), ROW, "2", n_columns=12),
    "linear": Specimen(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), ROW, "0"),
}
# One convolutional net stands for all where activations and poolings are not the point.
ONE_EACH = {"ReLU, MaxPool": CONV_NETS["ReLU, MaxPool"], **OTHERS}
ZOO = {**CONV_NETS, **OTHERS}
