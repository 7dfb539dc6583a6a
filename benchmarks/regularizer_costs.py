"""What each regularizer costs a training step: its time over that of the plain step, forward, backward and update.

An MLP on 30 columns, a ResNet-20 on 32x32 images and a ResNet-18 on larger ones, random data. Each regularizer has its
default settings, except those that are named. Steps take turns, so that a slow spell of the machine hits all of them
alike. The table has medians over rounds.

    python benchmarks/regularizer_costs.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from cifar10 import ResNet
from torch import Tensor, nn
from torchvision.models import resnet18

from captum_idexpo import ExplanationRegularizedLoss
from captum_idexpo.attr import GradientShap, InputXGradient, LayerGradCam, Saliency, id_expo_lime
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import (
    AttributionDistillation,
    AttributionSupervision,
    Fidelity,
    GaussianNeighbors,
    InsertionDeletion,
    MaskedNeighbors,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)

ROUNDS = 15
Step = Callable[[], None]


def step_of(model: nn.Module, batch: tuple[Tensor, ...], regularizers: list[nn.Module]) -> Step:
    """Return a function that makes one update of the model with these terms."""
    loss = ExplanationRegularizedLoss(model, regularizers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        total, _ = loss(batch)
        total.backward()
        optimizer.step()

    return step


def tabular() -> dict[str, Step]:
    """Return the steps with 128 rows of 30 columns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    x, y = torch.randn(128, 30), torch.randint(2, (128,))
    batch = (x, y, (torch.rand(128, 30) < 0.2).float())
    lime = {"sampling": "independent", "n_samples": 50}
    insertion_deletion = InsertionDeletion(
        id_expo_lime(model), baselines=0.0, forward_func=model, attribute_kwargs=lime
    )
    return {
        "plain": step_of(model, batch, []),
        "RightForTheRightReasons": step_of(model, batch, [RightForTheRightReasons(model)]),
        "AttributionSupervision of InputXGradient": step_of(
            model, batch, [AttributionSupervision(InputXGradient(model))]
        ),
        "AttributionDistillation, Saliency, a teacher of the same size": step_of(
            model, batch, [AttributionDistillation(Saliency(model), Saliency(copy.deepcopy(model)))]
        ),
        "SaliencyGuided": step_of(model, batch, [SaliencyGuided(model)]),
        "Stability": step_of(model, batch, [Stability(model)]),
        "Fidelity, one-dimensional": step_of(model, batch, [Fidelity(model, GaussianNeighbors(one_dimensional=True))]),
        "Fidelity": step_of(model, batch, [Fidelity(model)]),
        "Sparsity of GradientShap": step_of(
            model, batch, [Sparsity(GradientShap(model), attribute_kwargs={"baselines": x[:8]})]
        ),
        "InsertionDeletion, LIME with 50 samples, 4 steps": step_of(model, batch, [insertion_deletion]),
    }


def images() -> dict[str, Step]:
    """Return the steps with 32 images of 32x32 pixels."""
    torch.manual_seed(0)
    model = ResNet()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    batch = (x, y, (torch.rand(32, 1, 32, 32) < 0.2).float())
    masked = MaskedNeighbors(feature_mask=grid(x, 8))
    grad_cam, teacher = LayerGradCam(model, model.layer2), ResNet()
    insertion_deletion = InsertionDeletion(grad_cam, baselines=0.0, attribute_kwargs={"relu_attributions": True})
    return {
        "plain": step_of(model, batch, []),
        "RightForTheRightReasons": step_of(model, batch, [RightForTheRightReasons(model)]),
        "RightForTheRightReasons, Grad-CAM": step_of(
            model, batch, [RightForTheRightReasons(model, explainer=grad_cam)]
        ),
        "AttributionSupervision of Grad-CAM": step_of(model, batch, [AttributionSupervision(grad_cam)]),
        "AttributionDistillation, Grad-CAM, a teacher of the same size": step_of(
            model, batch, [AttributionDistillation(grad_cam, LayerGradCam(teacher, teacher.layer2))]
        ),
        "SaliencyGuided": step_of(model, batch, [SaliencyGuided(model)]),
        "Stability": step_of(model, batch, [Stability(model)]),
        "Fidelity on masked copies, 16 cells": step_of(model, batch, [Fidelity(model, masked)]),
        "Smoothness of Grad-CAM": step_of(model, batch, [Smoothness(grad_cam)]),
        "InsertionDeletion, Grad-CAM, 4 steps": step_of(model, batch, [insertion_deletion]),
    }


def large_images(side: int, n_images: int, layer: str) -> dict[str, Step]:
    """Return the steps of a ResNet-18 with larger images."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    batch = (torch.randn(n_images, 3, side, side), torch.randint(10, (n_images,)))
    grad_cam = LayerGradCam(model, model.get_submodule(layer))
    return {
        "plain": step_of(model, batch, []),
        "RightForTheRightReasons": step_of(
            model, (*batch, torch.ones(n_images, side, side)), [RightForTheRightReasons(model)]
        ),
        "InsertionDeletion, Grad-CAM, 4 steps": step_of(model, batch, [InsertionDeletion(grad_cam, baselines=0.0)]),
    }


MODELS = {
    "MLP, 30 columns, 128 rows": tabular,
    "ResNet-20, 32 images of 32 pixels": images,
    "ResNet-18, 16 images of 64 pixels": lambda: large_images(64, 16, "layer3"),
    "ResNet-18, 8 images of 224 pixels": lambda: large_images(224, 8, "layer4"),
}


def ratios(steps: dict[str, Step]) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """Return the seconds of a plain step, and each step's median, lowest and highest time over it, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    paired = {
        name: [own / plain for own, plain in zip(times, seconds["plain"], strict=True)]
        for name, times in seconds.items()
    }
    found = {name: (statistics.median(values), min(values), max(values)) for name, values in paired.items()}
    return statistics.median(seconds["plain"]), found


def main() -> None:
    """Measure all models, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = [
        "| model | plain step | regularizer | step over the plain step | lowest to highest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, make in MODELS.items():
        plain, found = ratios(make())
        for name, (median, low, high) in found.items():
            if name != "plain":
                lines.append(f"| {title} | {plain:.2g} s | {name} | **{median:.1f}** | {low:.1f} to {high:.1f} |")
                print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "regularizer_costs.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
