"""The models that are measured, with what explains them: from twenty thousand to two billion multiplications a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from cifar10 import ResNet
from torch import Tensor, nn
from torchvision.models import resnet18

from captum_idexpo.feature_masks import grid


class Subject(NamedTuple):
    """A model and a batch for it.

    Attributes:
        shape: of one input.
        n_examples, n_samples: of an attribution by LIME or KernelSHAP.
        cell: pixels of a superpixel's side; 0: every column is a feature.
        layer: Grad-CAM's; None: there is no convolution.
        rows: sizes of a forward pass among which the model itself is measured at its best.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_examples: int
    n_samples: int
    cell: int
    layer: str | None
    rows: tuple[int, ...]

    def model(self, device: torch.device) -> nn.Module:
        """The model with random weights, in eval mode, the same at every call."""
        torch.manual_seed(0)
        return self.make().eval().to(device)

    def batch(self, device: torch.device, n_examples: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        torch.manual_seed(1)
        inputs = torch.randn(n_examples or self.n_examples, *self.shape)
        return inputs.to(device), torch.zeros(len(inputs), dtype=torch.long, device=device)

    def feature_mask(self, inputs: Tensor) -> Tensor | None:
        """Its superpixels."""
        return grid(inputs, self.cell) if self.cell else None


def _tiny() -> nn.Module:
    """Half a million multiplications a row, where the ResNet-20 has 41 million."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 40, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(640, 10),
    )


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


ROWS_OF_COLUMNS = (256, 512, 1024, 2048, 4096)
IMAGE_ROWS = (16, 32, 48, 64, 96, 128, 256)
SUBJECTS = {
    "mlp128": Subject("MLP, 30-128-128-2", partial(_mlp, 128), (30,), 32, 200, 0, None, ROWS_OF_COLUMNS),
    "mlp256": Subject("MLP, 30-256-256-2", partial(_mlp, 256), (30,), 32, 200, 0, None, ROWS_OF_COLUMNS),
    "tiny": Subject("tiny CNN, 32 x 32", _tiny, (3, 32, 32), 32, 200, 4, "2", IMAGE_ROWS),
    "resnet20": Subject("ResNet-20, 32 x 32", ResNet, (3, 32, 32), 8, 200, 4, "layer2", IMAGE_ROWS[:5]),
    "resnet18": Subject("ResNet-18, 224 x 224", resnet18, (3, 224, 224), 2, 25, 32, "layer3", (4, 8, 16)),
}
