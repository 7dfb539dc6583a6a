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
    python -m benchmarks.frozen_batch_norm drift --data-root FOLDER      one run in detail
    python -m benchmarks.frozen_batch_norm report

A run that was stopped goes on where it stopped. It writes JSON lines, the report a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cifar10, imagenette
from captum_idexpo import ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS

RESULTS = Path(__file__).parent / "results"
UPDATES_OF_DRIFT = 5
UPDATES_FOLLOWED = (5, 10, 15, 20, 30, 60)
DRIFT_PREFACE = """ResNet-20, SGD at 0.01, batches of 32; statistics frozen / updated.
"""
MODES = {True: "frozen", False: "updated"}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
LEARNING_RATES = {"AdamW": (3e-5, 1e-4, 3e-4, 1e-3), "SGD": (1e-3, 1e-2)}
Row = dict[str, Any]
KEYS = ("network", "id_expo", "optimizer", "learning_rate", "batch_size", "frozen")
SCORES = ("accuracy", "insertion", "one_minus_deletion")
ID_EXPO_PREFACE = """One epoch of fine-tuning with ID-ExpO's term; statistics frozen / updated.
"""
PREFACE = """One epoch of fine-tuning; statistics frozen / updated. Loss: the task's, before (in eval mode, on training
images) and as a mean over the epoch. Accuracy: on images not trained on, before and after. Drift: after five updates,
the shift of the mean of a BatchNorm layer's input in running standard deviations, the mean over channels of the layer
where it is largest.
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
    id_expo_rates: tuple[float, ...] = (1e-4, 3e-4)


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
    "ResNet-20": Network(
        pretrained(3), cifar10.load_images, "layer3", 2000, 1000, (8, 32, 128), 64, LEARNING_RATES["AdamW"]
    ),
    "ResNet-56": Network(pretrained(9), cifar10.load_images, "layer3", 1000, 500, (8, 32), 64),
    "ResNet-20, barely trained": Network(barely_trained, cifar10.load_images, "layer3", 2000, 1000, (8, 32, 128), 64),
    "ResNet-18": Network(imagenette.pretrained_resnet18, imagenette.load_images, "layer4", 800, 300, (8, 32), 576),
}


def settings(names: list[str], seeds: int) -> Iterator[Setting]:
    """Yield all fine-tunings; ID-ExpO with AdamW only."""
    for seed, name in product(range(seeds), names):
        for optimizer, rates in LEARNING_RATES.items():
            for rate, size, frozen in product(rates, NETWORKS[name].batch_sizes, MODES):
                yield Setting(name, optimizer, rate, size, False, frozen, seed)
        for rate, size, frozen in product(NETWORKS[name].id_expo_rates, NETWORKS[name].batch_sizes[:2], MODES):
            yield Setting(name, "AdamW", rate, size, True, frozen, seed)


def measure(setting: Setting, model: nn.Module, train: TensorDataset, test: TensorDataset) -> Row:
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
        deletion_form="ratio",
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


def drift(root: Path, out: Path) -> None:
    """Follow loss and drift of ResNet-20 under SGD at 0.01, whose frozen run diverges, and write a table."""
    network = NETWORKS["ResNet-20"]
    train = network.load(root, "train", slice(0, network.n_train))
    probe = torch.stack([train[i][0] for i in range(128)])
    followed: dict[bool, list[tuple[float, float, float]]] = {}
    for frozen in MODES:
        model = network.make(root)
        reference, rows = copy.deepcopy(model).eval(), followed.setdefault(frozen, [])

        def follow(
            trainer: ExplanationRegularizedTrainer,
            row: dict[str, float],
            frozen: bool = frozen,
            reference: nn.Module = reference,
            rows: list[tuple[float, float, float]] = rows,
        ) -> None:
            if row["update"] in UPDATES_FOLLOWED:
                with in_mode_of_training(trainer.model, frozen):
                    drifts = drifts_of(trainer.model, probe, reference)
                rows.append((row["task"], drifts[0], max(drifts)))

        optimizer = OPTIMIZERS["SGD"](model.parameters(), lr=0.01)
        trainer = ExplanationRegularizedTrainer(
            model, optimizer, freeze_batch_norm=frozen, update_callbacks=[follow], show_progress=False
        )
        trainer.fit(DataLoader(train, 32, True, drop_last=True, generator=Generator().manual_seed(0)))
    lines = ["| update | loss of the batch | drift, first layer | drift, largest |", "| --- " * 4 + "|"]
    for number, pair in zip(UPDATES_FOLLOWED, zip(followed[True], followed[False], strict=True), strict=True):
        cells = " | ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(*pair, strict=True))
        lines.append(f"| {number} | {cells} |")
    (out / "frozen_batch_norm_drift.md").write_text(DRIFT_PREFACE + "\n" + "\n".join(lines) + "\n")


def read(path: Path) -> list[Row]:
    """Read the rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def means(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """Average over seeds: a row for each (network, ID-ExpO, optimizer, learning rate, batch size, frozen)."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEYS), []).append(row)
    numbers = [name for name in rows[0] if name not in Setting._fields and name != "drift"]
    return {
        key: {
            **{name: statistics.fmean(row[name] for row in group) for name in numbers if name in group[0]},
            "drift": statistics.fmean(row["drift"] for row in group if row["drift"] is not None),
            **{name: statistics.fmean(row[name] for row in group) for name in SCORES if name in group[0]},
        }
        for key, group in groups.items()
    }


def table(found: dict[tuple[Any, ...], Row]) -> str:
    """A line for each network, training and learning rate; frozen / updated."""
    lines = ["| network | trained | batch | loss before | loss of the epoch | accuracy before | after | drift |"]
    lines.append("| --- " * 8 + "|")
    for key in sorted({key[:-1] for key in found}, key=lambda key: (list(NETWORKS).index(key[0]), *key[1:])):
        frozen, updated = (found.get((*key, mode)) for mode in MODES)
        if frozen is None or updated is None:
            continue
        network, id_expo, optimizer, rate, size = key
        both = [(frozen[name], updated[name]) for name in ("epoch loss", "accuracy", "drift")]
        loss, accuracy, drift = (
            f"{a:.{digits}f} / {b:.{digits}f}" for (a, b), digits in zip(both, (2, 3, 2), strict=True)
        )
        before = f"{frozen['start loss']:.2f} | {loss} | {frozen['accuracy before']:.3f} | {accuracy} | {drift} |"
        lines.append(f"| {network} | {optimizer} {rate:g}{', ID-ExpO' if id_expo else ''} | {size} | {before}")
    return "\n".join(lines) + "\n"


def id_expo_table(found: dict[tuple[Any, ...], Row]) -> str:
    """The scores of eq. (15) after ID-ExpO; frozen / updated."""
    lines = ["| network | trained | batch | accuracy | insertion | 1 - deletion | eq. (15) |", "| --- " * 7 + "|"]
    for key in sorted(key for key in found if key[1] and key[-1] and (*key[:-1], False) in found):
        both = [found[key], found[(*key[:-1], False)]]
        columns = [[row[name] for row in both] for name in SCORES]
        columns.append([2 * row["accuracy"] + row["insertion"] + row["one_minus_deletion"] for row in both])
        cells = " | ".join(f"{a:.3f} / {b:.3f}" for a, b in columns)
        lines.append(f"| {key[0]} | {key[2]} {key[3]:g} | {key[4]} | {cells} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[tuple[Any, ...], Row]) -> Figure:
    """Accuracy by learning rate, the task alone trained by AdamW: a panel for each network."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (name, network) in zip(figure.subplots(1, len(NETWORKS)), NETWORKS.items(), strict=True):
        for color, size in zip(COLORS, network.batch_sizes, strict=False):
            for frozen, mode in MODES.items():
                points = [
                    (rate, found[name, False, "AdamW", rate, size, frozen])
                    for rate in LEARNING_RATES["AdamW"]
                    if (name, False, "AdamW", rate, size, frozen) in found
                ]
                rates, rows = zip(*points, strict=True)
                style = "-" if frozen else "--"
                axis.plot(rates, [row["accuracy"] for row in rows], style, color=color, label=f"{mode}, batch {size}")
        axis.axhline(rows[0]["accuracy before"], color="0.7", linewidth=1)
        axis.set(xscale="log", title=name, xlabel="learning rate of AdamW")
    figure.axes[0].set_ylabel("accuracy after one epoch")
    figure.axes[0].legend(frameon=False, fontsize=7)
    return figure


def report(out: Path) -> None:
    """Write both tables and the picture."""
    found = means(read(out / "frozen_batch_norm.jsonl"))
    (out / "frozen_batch_norm.md").write_text(f"{PREFACE}\n{table(found)}")
    (out / "frozen_batch_norm_id_expo.md").write_text(f"{ID_EXPO_PREFACE}\n{id_expo_table(found)}")
    picture(found).savefig(out / "frozen_batch_norm.png", dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "drift", "report"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    commands = {
        "run": lambda: run(arguments),
        "drift": lambda: drift(arguments.data_root, arguments.out),
        "report": lambda: report(arguments.out),
    }
    commands[arguments.command]()


if __name__ == "__main__":
    main()
