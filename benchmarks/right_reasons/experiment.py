"""What the experiments of this folder share: a training loop, accuracy, the store of results, Markdown tables."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_idexpo import ExplanationRegularizedLoss

Row = dict[str, Any]
ADAM = partial(torch.optim.Adam, lr=1e-3)


def mlp(
    n_features: int,
    n_classes: int,
    hidden: Sequence[int] = (50, 30),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The authors' network: two hidden layers of 50 and 30 units, rectified ones in the paper."""
    sizes = (n_features, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))


def train(
    model: nn.Module,
    data: Sequence[Tensor],
    regularizers: Iterable[nn.Module] = (),
    *,
    epochs: int,
    seed: int,
    batch_size: int = 256,
    make_optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
) -> nn.Module:
    """The model, trained on (inputs, labels) or (inputs, labels, annotations), in an order that the seed decides."""
    loss = ExplanationRegularizedLoss(model, regularizers)
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(batch_size):
            optimizer.zero_grad()
            total, _ = loss(tuple(tensor[rows] for tensor in data))
            total.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(float((model(x).argmax(dim=1) == y).double().mean()), 5)


class Results:
    """A JSON file of what was measured, by setting and seed; what it has is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Row]] = json.loads(path.read_text()) if path.exists() else {}

    def measure(self, setting: str, seed: int, measurement: Callable[[], Row]) -> Row:
        """The row of a setting and seed, measured if it is missing."""
        rows = self.rows.setdefault(setting, {})
        if str(seed) not in rows:
            rows[str(seed)] = measurement()
            self._save()
            print(f"{setting}, seed {seed}: {rows[str(seed)]}", flush=True)
        return rows[str(seed)]

    def column(self, setting: str, name: str) -> list[float]:
        """One measured number of a setting, over the seeds."""
        return [row[name] for row in self.rows[setting].values()]

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        partial.replace(self.path)


def chosen_weight(
    results: Results,
    name: str,
    weights: Iterable[float],
    seeds: Iterable[int],
    validate: Callable[[float, int], float],
) -> float:
    """Return the weight with the best mean of a score on validation data; the scores are kept with the results."""
    seeds = list(seeds)

    def score(weight: float) -> float:
        rows = (
            results.measure(
                weighted(f"validation of {name}", weight), seed, lambda seed=seed: {"score": validate(weight, seed)}
            )
            for seed in seeds
        )
        return statistics.fmean(row["score"] for row in rows)

    return max(weights, key=score)


def weighted(name: str, weight: float) -> str:
    """Return the key of a setting with a weight, under which its rows are stored."""
    return f"{name}, weight {weight:.4g}" if weight else name


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def with_error(values: Sequence[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*mean_and_error(values))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def write_table(path: Path, preface: str, table: str) -> None:
    """Prints a table and writes it below its preface."""
    print("\n" + table)
    path.write_text(f"{preface.strip()}\n\n{table}\n")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The options that all experiments have; one thread, so that numbers do not depend on the machine's cores."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of data files; None: scikit-learn's, torchvision's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args()
