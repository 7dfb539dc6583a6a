"""What several test files need: small smooth nets, finite differences of a total loss, the extras."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn
import torch
from torch import Tensor, nn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

# scikit-learn's, before 1.9: where there are fewer samples than features, its least squares take rounding for one.
LEAST_SQUARES_OF_FULL_RANK_ONLY = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9)

# The extras of the package itself, and what they import, but for matplotlib and tqdm, which come with Captum.
EXTRAS = ("lime", "train", "image", "plot")
EXTRAS_IMPORTS = ("sklearn", "accelerate", "safetensors", "torchmetrics", "torchvision", "skimage", "pandas")


def project() -> dict[str, Any]:
    """The project's table in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def smooth_net(n_features: int = 6, n_classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(n_features, 8), nn.Tanh(), nn.Linear(8, n_classes))
    return layers.double()


def smooth_conv_net(n_channels: int = 2, size: int = 6, n_classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Two convolutions, BatchNorm and dropout; the second convolution (index 4) is the layer to explain."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(n_channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * (size // 2) ** 2, n_classes),
        nn.Tanh(),  # an output that is not linear in the last layer, as behind a softmax
    ).double()
    net[1].running_mean.normal_(0, 0.1)
    net[1].running_var.uniform_(0.5, 1.5)
    return net.eval()


def gradient_error(loss: Callable[[], Tensor], model: nn.Module, n_directions: int = 3) -> float:
    """Largest relative error of autograd's gradient against central differences, over random directions.

    The loss has to be the same function at every call (seeds set inside). Each parameter is checked by itself.
    """
    model.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    errors = []
    for parameter in model.parameters():
        for _ in range(n_directions):
            direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            claimed = float((parameter.grad * direction).sum()) if parameter.grad is not None else 0.0
            measured = _central_difference(loss, parameter, direction)
            errors.append(abs(claimed - measured) / max(abs(measured), 1e-4 * float(direction.norm()), 1e-12))
    return max(errors)


def _central_difference(loss: Callable[[], Tensor], parameter: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    original = parameter.detach().clone()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.copy_(original + sign * step * direction)
            with torch.enable_grad():
                values.append(float(loss().detach()))
        parameter.copy_(original)
    return (values[0] - values[1]) / (2 * step)


class Spy(nn.Module):
    """Keeps the rows of the last pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        self.rows = inputs
        return self.model(*inputs)
