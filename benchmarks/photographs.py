"""Photographs: a network that reads a stamp is trained to look at the picture instead.

The images are random crops of four photographs that scikit-image ships, with random colours and noise. Each crop has a
stamp in one of its corners, whose colour gives the class away. A small CNN that is trained on them reads the stamp.
Then the same weights are trained further, for as many epochs, in two ways:

* plainly;
* with two terms that forbid evidence at the stamp: Right for the Right Reasons (Ross et al. 2017), which penalises the
  input gradient there, and attribution supervision (Rao et al. 2023), which penalises Grad-CAM's evidence there.

Accuracy is measured on other crops with the stamp of their class, without a stamp, and with the stamp of another class.
All crops are of the same four photographs, so this is a demonstration and no benchmark of generalisation.

    python benchmarks/photographs.py        a table and a picture in demo/ (`make demo`)

The photographs: cat by Stefan van der Walt (CC0), coffee by Rachel Michetti (CC0), Eileen Collins by NASA (public
domain), rocket by SpaceX (public domain).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import skimage.data
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import AttributionSupervision, RightForTheRightReasons
from captum_idexpo.training import linear_warmup
from captum_idexpo.visualization import draw_image

PHOTOGRAPHS = {"cat": "chelsea", "coffee": "coffee", "astronaut": "astronaut", "rocket": "rocket"}
SHOWN = 17  # seed of the crops in the picture
STAMPS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.1], [0.1, 0.2, 0.9], [0.95, 0.8, 0.1]])  # a colour for each class
SIZE, STAMP = 64, 12  # pixels of a side
N_TRAIN, N_TEST = 1200, 400
BATCH, EPOCHS, MORE_EPOCHS = 32, 10, 8
WEIGHT = 3.0  # of both terms


class Crops(NamedTuple):
    """Crops ``(n, 3, 64, 64)`` in [0, 1], and the numbers of their photographs ``(n,)``."""

    images: Tensor
    classes: Tensor


class Stamped(NamedTuple):
    """Crops with stamps, and where evidence is right, ``(n, 64, 64)``: 0 at the stamps, 1 elsewhere."""

    images: Tensor
    annotations: Tensor


# --- data ----------------------------------------------------------------------------------------------------------


def draw_crops(n: int, generator: Generator, *, distorted: bool = True) -> Crops:
    """Random squares of random photographs, half of them mirrored."""
    photographs = [load(name) for name in PHOTOGRAPHS]
    classes = torch.randint(len(photographs), (n,), generator=generator)
    crops = [draw_crop(photographs[number], generator) for number in classes]
    return Crops(torch.stack([distort(crop, generator) if distorted else crop for crop in crops]), classes)


def load(name: str) -> Tensor:
    """A photograph ``(3, H, W)`` in [0, 1]."""
    photograph = getattr(skimage.data, PHOTOGRAPHS[name])()
    return torch.from_numpy(photograph.copy()).permute(2, 0, 1) / 255


def draw_crop(photograph: Tensor, generator: Generator) -> Tensor:
    """A random square whose side is 0.35 to 0.85 of the shorter side of the photograph."""
    height, width = photograph.shape[1:]
    side = int(min(height, width) * (0.35 + 0.5 * float(torch.rand((), generator=generator))))
    top = int(torch.randint(height - side + 1, (), generator=generator))
    left = int(torch.randint(width - side + 1, (), generator=generator))
    crop = photograph[None, :, top : top + side, left : left + side]
    crop = interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if torch.rand((), generator=generator) < 0.5 else crop


def distort(crop: Tensor, generator: Generator) -> Tensor:
    """Paler, in another light and with noise, so that the photograph's colours do not give the class away."""
    saturation, contrast = torch.rand(2, generator=generator).tolist()
    light = 0.6 * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    grey = crop.mean(dim=0, keepdim=True)
    crop = grey + 0.6 * saturation * (crop - grey)
    crop = (crop - 0.5) * (0.5 + contrast) + 0.5 + light
    return (crop + 0.1 * torch.randn(crop.shape, generator=generator)).clamp(0, 1)


def stamp(images: Tensor, classes: Tensor, generator: Generator) -> Stamped:
    """Put the stamp of a class into a random corner of each image."""
    images, annotations = images.clone(), torch.ones(len(images), SIZE, SIZE)
    near, far = slice(2, 2 + STAMP), slice(SIZE - 2 - STAMP, SIZE - 2)
    for image, annotation, number in zip(images, annotations, classes, strict=True):
        corner = int(torch.randint(4, (), generator=generator))
        rows, columns = (near, far)[corner // 2], (near, far)[corner % 2]
        image[:, rows, columns] = 1.0  # a white frame
        image[:, rows, columns][:, 2:-2, 2:-2] = STAMPS[number][:, None, None]
        annotation[rows, columns] = 0.0
    return Stamped(images, annotations)


# --- the network and its training ----------------------------------------------------------------------------------


class Network(nn.Module):
    """A CNN for images in [0, 1]; its last convolution has 8x8 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(64, len(PHOTOGRAPHS))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.classifier(self.features(4 * images - 2).mean(dim=(2, 3)))


def train(model: Network, data: TensorDataset, epochs: int, learning_rate: float, *, forbid: bool = False) -> Network:
    """Train plainly, or with evidence at the stamps forbidden."""
    torch.manual_seed(0)
    terms = [
        RightForTheRightReasons(model, weight=WEIGHT, annotates="right"),
        AttributionSupervision(LayerGradCam(model, model.features), weight=WEIGHT),
    ]
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=learning_rate),
        terms if forbid else [],
        weight_schedule=linear_warmup(2 * N_TRAIN // BATCH),
        max_grad_norm=1.0,
        show_progress=sys.stderr.isatty(),
    )
    trainer.fit(DataLoader(data, batch_size=BATCH, shuffle=True), epochs=epochs)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    return float((model(images).argmax(dim=1) == classes).float().mean())


def grad_cam(model: Network, images: Tensor, classes: Tensor) -> Tensor:
    """Maps ``(n, 1, 64, 64)`` of the evidence for the classes."""
    explainer = LayerGradCam(model, model.features)
    maps = explainer.attribute(images, target=classes, relu_attributions=True).detach()
    return interpolate(maps, (SIZE, SIZE), mode="bilinear")


# --- the picture ---------------------------------------------------------------------------------------------------


def draw(images: Tensor, maps: dict[str, Tensor]) -> Figure:
    """A column for each photograph: the image, and the evidence of each network."""
    figure = Figure(figsize=(2 * len(images) + 0.2, 2 * (1 + len(maps)) + 0.2), layout="constrained")
    rows = figure.subplots(1 + len(maps), len(images))
    for column, image in enumerate(images):
        draw_image(rows[0, column], image)
        for row, of_network in zip(rows[1:], maps.values(), strict=True):
            draw_evidence(row[column], image, of_network[column, 0])
    for row, name in zip(rows, ("image", *maps), strict=True):
        place = {"transform": row[0].transAxes, "rotation": 90, "ha": "center", "va": "center"}
        row[0].text(-0.07, 0.5, name, **place, fontsize=12, color="#808080")  # readable on white and on black
    return figure


def draw_evidence(axis: Axes, image: Tensor, evidence: Tensor) -> None:
    """The image, covered where there is evidence: violet is little, yellow is most."""
    draw_image(axis, image)
    share = (evidence / evidence.max().clamp_min(1e-12)).numpy()
    colors = colormaps["inferno"](share)
    colors[..., 3] = 0.85 * share**0.7
    axis.imshow(colors)


# --- the demo ------------------------------------------------------------------------------------------------------


def make_data(generator: Generator) -> tuple[TensorDataset, Tensor, dict[str, Tensor]]:
    """The training data with annotations; the classes of the test images, and these with three kinds of stamps."""
    crops = draw_crops(N_TRAIN, generator)
    stamped = stamp(*crops, generator)
    images, classes = draw_crops(N_TEST, generator)
    n_classes = len(PHOTOGRAPHS)
    others = (classes + torch.randint(1, n_classes, classes.shape, generator=generator)) % n_classes
    tests = {
        "stamp of its class": stamp(images, classes, generator).images,
        "no stamp": images,
        "stamp of another class": stamp(images, others, generator).images,
    }
    return TensorDataset(stamped.images, crops.classes, stamped.annotations), classes, tests


def make_networks(data: TensorDataset) -> dict[str, Network]:
    """A network that was trained plainly, and the two that were trained further."""
    torch.manual_seed(0)
    print("training a network on photographs with stamps", flush=True)
    before = train(Network(), data, EPOCHS, 2e-3)
    print("training it further, plainly", flush=True)
    plain = train(copy.deepcopy(before), data, MORE_EPOCHS, 1e-3)
    print("training it further, evidence at the stamps forbidden", flush=True)
    after = train(copy.deepcopy(before), data, MORE_EPOCHS, 1e-3, forbid=True)
    return {"before": before, "plain": plain, "stamps forbidden": after}


def make_picture(networks: dict[str, Network]) -> Figure:
    """The first crop of each photograph, its stamp, and the evidence before and after."""
    generator = Generator().manual_seed(SHOWN)
    shown = draw_crops(60, generator, distorted=False)
    first = [int((shown.classes == number).nonzero()[0]) for number in range(len(PHOTOGRAPHS))]
    images, classes = stamp(*shown, generator).images[first], shown.classes[first]
    named = {"before": networks["before"], "after": networks["stamps forbidden"]}
    return draw(images, {name: grad_cam(network, images, classes) for name, network in named.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(2)  # the same numbers on every machine of this kind, however many cores it has
    # At first some crops have no positive evidence at all. Right for the Right Reasons trains on them all the same.
    warnings.filterwarnings("ignore", message=".*have no positive evidence")
    # The network shall unlearn something: what the stamps mean.
    warnings.filterwarnings("ignore", message=".*training may have undone what the model knew")
    start = time.perf_counter()
    data, classes, tests = make_data(Generator().manual_seed(0))
    networks = make_networks(data)
    print(f"\n{'accuracy':24}" + "".join(f"{name:>18}" for name in networks))
    for name, images in tests.items():
        values = [accuracy(network, images, classes) for network in networks.values()]
        print(f"{name:24}" + "".join(f"{value:18.2f}" for value in values))
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_picture(networks).savefig(arguments.out / "photographs.png", dpi=110, transparent=True)
    print(f"\npicture: {arguments.out / 'photographs.png'}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
