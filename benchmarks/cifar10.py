"""CIFAR-10 and the pretrained ResNet-20 of He et al. (2015), read from a folder of compact files, or downloaded.

The folder holds `cifar10_train.npz` and `cifar10_test.npz`, whose arrays are ``images`` (encoded images, one after the
other), ``offsets`` (n + 1 byte positions) and ``labels``, shuffled once; and `weights/cifar10_resnet20.safetensors`, a
state dict of `ResNet` (91.7 % of the test images). Without a folder torchvision downloads the images, and torch.hub the
weights of github.com/akamaster/pytorch_resnet_cifar10, each compared with its checksum.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import TensorDataset

# The weights were trained on inputs normalised with ImageNet's constants.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
WEIGHTS = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet20-12fca82f.th"  # checksum
)


def load_images(root: Path | None, part: Literal["train", "test"], rows: slice) -> TensorDataset:
    """Normalised images ``(n, 3, 32, 32)`` and their labels; any slice is a random subset of all classes."""
    if root is None:
        from torchvision.datasets import CIFAR10

        downloaded = CIFAR10("data", train=part == "train", download=True)
        return normalised(downloaded.data[rows], np.asarray(downloaded.targets)[rows])
    return normalised(*read_images(root / f"cifar10_{part}.npz", rows))


def read_images(path: Path, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, H, W, 3)`` of bytes and their labels, decoded from a compact file."""
    with np.load(path) as arrays:
        encoded, offsets, labels = arrays["images"], arrays["offsets"], arrays["labels"]
    numbers = range(len(labels))[rows]
    images = [Image.open(io.BytesIO(encoded[offsets[i] : offsets[i + 1]])).convert("RGB") for i in numbers]
    return np.stack([np.asarray(image) for image in images]), labels[rows]


def normalised(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Images with channels first, by ImageNet's constants."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return TensorDataset((x - MEAN) / STD, torch.from_numpy(labels.astype("int64")))


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al.'s type A)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.stride = 1 if n_in == n_out else 2
        self.extra = (n_out - n_in) // 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Every second pixel and zeros for the new channels, where the shape changes."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return (out + shortcut).relu()


class ResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers: three stages of n blocks, of 32x32, 16x16 and 8x8 pixels."""

    def __init__(self, n_blocks: int = 3, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n_blocks)
        self.layer2 = self._stage(16, 32, n_blocks)
        self.layer3 = self._stage(32, 64, n_blocks)
        self.linear = nn.Linear(64, n_classes)

    @staticmethod
    def _stage(n_in: int, n_out: int, n_blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(n_in, n_out), *(Block(n_out, n_out) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, n_classes)``."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def pretrained_resnet20(root: Path | None) -> ResNet:
    """ResNet-20 with its weights."""
    model = ResNet()
    if root is None:
        saved = torch.hub.load_state_dict_from_url(WEIGHTS, map_location="cpu", check_hash=True, weights_only=True)
        model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    else:
        model.load_state_dict(load_file(root / "weights" / "cifar10_resnet20.safetensors"))
    return model.eval()
