"""Imagenette at 96 pixels and a ResNet-18 trained on it, in the place of the paper's STL-10.

The folder holds `imagenette96_train.npz` (2,000 photographs) and `imagenette96_test.npz` (1,000), laid out as in
`benchmarks/cifar10.py`. Without a folder torchvision downloads the whole set, and as many are drawn from it. The
network, torchvision's, is trained from random weights once and kept beside the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import TensorDataset
from torchvision.datasets import Imagenette
from torchvision.models import resnet18

from benchmarks.cifar10 import normalised, read_images

WEIGHTS = Path(__file__).parent / "results" / "models" / "imagenette_resnet18.safetensors"
FOLDER = Path("data") / "imagenette2-160"  # torchvision's
SIZES = {"train": 2000, "test": 1000}
N_TRAIN = 1800  # of 2,000; the others select
EPOCHS = 16


def load_images(root: Path | None, part: Literal["train", "test"], rows: slice) -> TensorDataset:
    """Normalised images ``(n, 3, 96, 96)`` and their labels; any slice is a random subset of all classes."""
    if root is not None:
        return normalised(*read_images(root / f"imagenette96_{part}.npz", rows))
    downloaded = Imagenette("data", "train" if part == "train" else "val", size="160px", download=not FOLDER.exists())
    numbers = torch.randperm(len(downloaded), generator=Generator().manual_seed(0))[: SIZES[part]][rows]
    images, labels = zip(*(downloaded[i] for i in numbers.tolist()), strict=True)
    small = [np.asarray(ImageOps.fit(image.convert("RGB"), (96, 96))) for image in images]
    return normalised(np.stack(small), np.asarray(labels))


def pretrained_resnet18(root: Path | None) -> nn.Module:
    """The network, trained first if it has not been."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    if not WEIGHTS.exists():
        train(model, load_images(root, "train", slice(0, N_TRAIN)))
        WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), WEIGHTS)
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def train(model: nn.Module, data: TensorDataset) -> None:
    """SGD in one cycle, in bfloat16; images are flipped and moved by up to 12 pixels."""
    x, y = data.tensors
    generator = Generator().manual_seed(0)
    batches = [order for _ in range(EPOCHS) for order in torch.randperm(len(x), generator=generator).split(32)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.06, total_steps=len(batches))
    model.train()
    for step, rows in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(moved(x[rows], generator)), y[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 57 == 0:
            print(f"Imagenette, step {step} of {len(batches)}: loss {loss.item():.3f}", flush=True)


def moved(images: Tensor, generator: Generator, border: int = 12) -> Tensor:
    """Each image flipped or not, and moved."""
    size = images.shape[-1]
    wide = pad(images, (border,) * 4, mode="reflect")
    top, left = torch.randint(2 * border + 1, (2, len(images)), generator=generator).tolist()
    flipped = torch.rand(len(images), generator=generator) < 0.5
    crops = [image[:, y : y + size, x : x + size] for image, y, x in zip(wide, top, left, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flipped, strict=True)])
