"""Fine-tune with BatchNorm's statistics frozen or updated: which is better, and why?

Each run fine-tunes a network for one epoch, from the same weights on the same batches, with the trainer. Networks:
He et al.'s ResNet-20 and ResNet-56 for CIFAR-10, pretrained; a ResNet-20 that was trained for two epochs only; and a
ResNet-18 trained on 2,000 photographs (Imagenette). Optimizers, learning rates and batch sizes vary. The task alone
is trained, or ID-ExpO's loss is, with Grad-CAM.

Measured are the task loss before, its mean over the epoch, and the accuracy on images not trained on, before and
after. The cause is looked for in the drift: after five updates, by how many running standard deviations the mean of a
BatchNorm layer's input has moved away from the running mean. A layer with updated statistics subtracts that shift; a
frozen layer hands it on to the next one.

    python -m benchmarks.frozen_batch_norm run --data-root FOLDER        compact files, see benchmarks/cifar10.py
    python -m benchmarks.frozen_batch_norm report

A run that was stopped goes on where it stopped. It writes JSON lines, the report a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cifar10
from benchmarks.id_expo import imagenette
from captum_idexpo import ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion

RESULTS = Path(__file__).parent / "results"
UPDATES_OF_DRIFT = 5
MODES = {True: "frozen", False: "updated"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
LEARNING_RATES = {"AdamW": (3e-5, 1e-4, 3e-4, 1e-3), "SGD": (1e-3, 1e-2)}
PREFACE = """One epoch of fine-tuning. Loss: the task's, before (in eval mode, on training images) and as a mean over
the epoch. Accuracy: on images not trained on, before and after. Drift: after five updates, the shift of the mean of a
BatchNorm layer's input in running standard deviations, the mean over channels of the layer where it is largest.
"""


class Network(NamedTuple):
    """A network, the images it is fine-tuned and judged on, and how many of them."""

    make: Callable[[Path], nn.Module]
    load: Callable[[Path, str, slice], TensorDataset]
    layer: str  # Grad-CAM's
    n_train: int
    n_test: int
    batch_sizes: tuple[int, ...]
    step_size: int  # pixels of an insertion or deletion step


class Setting(NamedTuple):
    """One fine-tuning."""

    network: str
    optimizer: str
    learning_rate: float
    batch_size: int
    id_expo: bool
    frozen: bool
    seed: int


def pretrained(n_blocks: int) -> Callable[[Path], nn.Module]:
    """Return a function that reads a pretrained CIFAR ResNet."""

    def make(root: Path) -> nn.Module:
        model = cifar10.ResNet(n_blocks)
        model.load_state_dict(load_file(root / "weights" / f"cifar10_resnet{6 * n_blocks + 2}.safetensors"))
        return model

    return make


def barely_trained(root: Path) -> nn.Module:
    """Train a ResNet-20 from random weights for two epochs of 5,000 images."""
    torch.manual_seed(0)
    model, generator = cifar10.ResNet().train(), Generator().manual_seed(0)
    loader = DataLoader(cifar10.load_images(root, "train", slice(20_000, 25_000)), 64, True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for inputs, target in [*loader, *loader]:
        optimizer.zero_grad()
        cross_entropy(model(inputs), target).backward()
        optimizer.step()
    return model


NETWORKS = {
    "ResNet-20": Network(pretrained(3), cifar10.load_images, "layer3", 2000, 1000, (8, 32, 128), 64),
    "ResNet-56": Network(pretrained(9), cifar10.load_images, "layer3", 1000, 500, (8, 32), 64),
    "ResNet-20, barely trained": Network(barely_trained, cifar10.load_images, "layer3", 2000, 1000, (8, 32, 128), 64),
    "ResNet-18": Network(imagenette.pretrained_resnet18, imagenette.load_images, "layer4", 800, 300, (8, 32), 576),
}


def settings(names: list[str], seeds: int) -> Iterator[Setting]:
    """Yield all fine-tunings; ID-ExpO at the usual learning rates only."""
    for seed, name in product(range(seeds), names):
        for optimizer, rates in LEARNING_RATES.items():
            for rate, size, frozen in product(rates, NETWORKS[name].batch_sizes, MODES):
                yield Setting(name, optimizer, rate, size, False, frozen, seed)
        for rate, frozen in product((1e-4, 3e-4), MODES):
            yield Setting(name, "AdamW", rate, NETWORKS[name].batch_sizes[0], True, frozen, seed)


def measure(setting: Setting, model: nn.Module, train: TensorDataset, test: TensorDataset) -> dict[str, Any]:
    """Fine-tune a model for one epoch and return a row of results."""
    network = NETWORKS[setting.network]
    torch.manual_seed(setting.seed)
    # Batches of one size: the last one of an epoch must not be a small one, whose statistics are noise.
    loader = DataLoader(
        train, setting.batch_size, True, drop_last=True, generator=Generator().manual_seed(setting.seed)
    )
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters(), lr=setting.learning_rate)
    judge = InsertionDeletion(
        LayerGradCam(model, model.get_submodule(network.layer)),
        baselines=0.0,
        step_size=network.step_size,
        steps_per_update=2,
        insertion_weight=0.1,
        deletion_weight=0.1,
        attribute_kwargs={"relu_attributions": True},
        generator=Generator().manual_seed(setting.seed),
    )
    probe = torch.stack([train[i][0] for i in range(128)])
    drifts: list[float] = []

    def follow(trainer: ExplanationRegularizedTrainer, row: dict[str, float]) -> None:
        if row["update"] == UPDATES_OF_DRIFT:
            with in_mode_of_training(trainer.model, setting.frozen):
                drifts.append(max(drifts_of(trainer.model, probe, reference)))

    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        [judge] if setting.id_expo else [],
        freeze_batch_norm=setting.frozen,
        update_callbacks=[follow],
        show_progress=False,
    )
    reference = copy.deepcopy(model).eval()
    seen, unseen = DataLoader(TensorDataset(*train[:500]), 250), DataLoader(test, 250)
    model.train()
    before, start = trainer.evaluate(unseen), trainer.evaluate(seen)["loss"]
    began = time.perf_counter()
    try:
        loss = trainer.fit(loader)[0]["task"]
    except NonFiniteError:  # training diverged; the scores are those of the last finite weights
        loss = math.inf
    seconds = time.perf_counter() - began
    after = trainer.evaluate(unseen)
    scores = ("accuracy", "insertion", "one_minus_deletion") if setting.id_expo else ("accuracy",)
    return {
        **setting._asdict(),
        "start loss": start,
        "epoch loss": loss,
        **{f"{name} before": before[name] for name in scores},
        **{name: after[name] for name in scores},
        "drift": drifts[0] if drifts else None,
        "seconds": seconds,
    }


@torch.no_grad()
def drifts_of(model: nn.Module, inputs: Tensor, reference: nn.Module) -> list[float]:
    """Return each BatchNorm layer's mean shift, in standard deviations of the model before training."""
    means: list[Tensor] = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    was = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_pre_hook(lambda _, args: means.append(args[0].mean(dim=(0, 2, 3)))) for norm in norms
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return [
        float(((mean - norm.running_mean).abs() / (norm.running_var + norm.eps).sqrt()).mean())
        for mean, norm in zip(means, was, strict=True)
    ]


@contextmanager
def in_mode_of_training(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Inside, BatchNorm is in the mode of the training step, and afterwards its statistics are what they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(not frozen)
    yield
    model.train()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def run(arguments: argparse.Namespace) -> None:
    """Run what is not in the results yet."""
    path = arguments.out / "frozen_batch_norm.jsonl"
    done = {tuple(row[field] for field in Setting._fields) for row in read(path)}
    models: dict[str, tuple[nn.Module, TensorDataset, TensorDataset]] = {}
    for setting in settings(arguments.networks, arguments.seeds):
        if tuple(setting) in done:
            continue
        network = NETWORKS[setting.network]
        if setting.network not in models:
            train = network.load(arguments.data_root, "train", slice(0, network.n_train))
            test = network.load(arguments.data_root, "test", slice(0, network.n_test))
            models[setting.network] = (network.make(arguments.data_root), train, test)
        model, train, test = models[setting.network]
        row = measure(setting, copy.deepcopy(model), train, test)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{setting}: {row['start loss']:.3f} -> {row['epoch loss']:.3f}, {row['accuracy']:.3f}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    run(arguments) if arguments.command == "run" else report(arguments.out)


if __name__ == "__main__":
    main()
