"""What the experiments on ID-ExpO share: judging a model's explanations, training with selection, stored results."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.digits import mean_and_error
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.metrics import sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion

Row = dict[str, Any]
ETAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
SCORES = {
    "accuracy": "accuracy",
    "insertion": "insertion",
    "one_minus_deletion": "1 - deletion",
    "sensitivity_n": "sensitivity-n",
}
JUDGED_AT_ONCE = 500
JUDGED_EVERY = 2  # epochs


class Judge(NamedTuple):
    """An explainer that a model is judged with, and the shares of locations up to which its curves are averaged."""

    make: Callable[[nn.Module], InsertionDeletion]
    fractions: tuple[float, ...]
    n_subsets: int = 100  # of sensitivity-n

    @torch.no_grad()
    def scores(
        self,
        model: nn.Module,
        data: TensorDataset | Iterable[tuple[Tensor, Tensor]],
        n: int | None = None,
        feature_mask: Callable[[Tensor], Tensor] = lambda _: None,
    ) -> dict[float, dict[str, Tensor]]:
        """Each example's scores for each fraction, the predicted class explained; with n also sensitivity-n.

        The regularizer is made anew, so that each judgement draws the same masks. Sensitivity-n is that of the groups
        of `feature_mask`. Data may come as batches. Scores are on the CPU, wherever the model is.
        """
        regularizer, device = self.make(model), next(model.parameters()).device
        batches = DataLoader(data, batch_size=JUDGED_AT_ONCE) if isinstance(data, TensorDataset) else data
        batches = ((x.to(device), y.to(device)) for x, y in batches)
        parts = [self._part(regularizer, model.eval(), x, y, n, feature_mask(x)) for x, y in batches]
        return {
            fraction: {name: torch.cat([part[fraction][name].cpu() for part in parts]) for name in parts[0][fraction]}
            for fraction in self.fractions
        }

    def _part(
        self,
        regularizer: InsertionDeletion,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        n: int | None,
        feature_mask: Tensor | None,
    ) -> dict[float, dict[str, Tensor]]:
        predicted = model(x).argmax(dim=1)
        curves = regularizer.scores(x, predicted)
        common = {"accuracy": (predicted == y).double()}
        if n is not None:
            regularizer.generator.manual_seed(0)
            explanation = regularizer.attribution(x, predicted)
            common["sensitivity_n"] = sensitivity_n(
                model,
                x,
                explanation,
                n,
                feature_mask=feature_mask,
                target=predicted,
                generator=Generator().manual_seed(0),
            )
        result = {}
        for fraction in self.fractions:
            within = curves.fractions <= fraction + 1e-6
            result[fraction] = {
                **common,
                "insertion": curves.insertion_curve[:, within].mean(dim=1),
                "one_minus_deletion": 1 - curves.deletion_curve[:, within].mean(dim=1),
            }
        return result


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: round(float(values.double().mean()), 5) for name, values in scores.items()}


def valscore(scores: Mapping[str, float], eta: float) -> float:
    """Eq. (15) of ID-ExpO (arXiv 2310.12553)."""
    return eta * scores["accuracy"] + scores["insertion"] + scores["one_minus_deletion"]


class Best(NamedTuple):
    """The epoch that a judge prefers, and its weights."""

    score: float
    epoch: int
    val: dict[str, float]
    weights: dict[str, Tensor]


def fine_tune(
    model: nn.Module,
    regularizers: Iterable[nn.Module],
    train: TensorDataset | Sequence[tuple[Tensor, Tensor]],
    judges: Mapping[str, tuple[Judge, Any]],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int | None,
    seed: int,
) -> tuple[dict[tuple[str, float, float], Best], float]:
    """Trains; for each judge, fraction and eta the best epoch on its validation data, and the seconds it took.

    The weights before the first epoch are a candidate too. With a batch size of None `train` holds batches.
    """
    best: dict[tuple[str, float, float], Best] = {}

    def select(epoch: int) -> None:
        weights = copy.deepcopy(model.state_dict())
        for name, (judge, val) in judges.items():
            for fraction, scores in judge.scores(model, val).items():
                found = means(scores)
                for eta in ETAS:
                    score, key = valscore(found, eta), (name, fraction, eta)
                    if key not in best or score > best[key].score:
                        best[key] = Best(score, epoch, found, weights)

    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        regularizers,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        callbacks=[lambda _, row: None if row["epoch"] % JUDGED_EVERY else select(int(row["epoch"]))],
        show_progress=False,
    )
    select(0)
    start = time.perf_counter()
    batches = DataLoader(train, batch_size=batch_size, shuffle=True, generator=Generator().manual_seed(seed))
    with warnings.catch_warnings():
        # A network that is sure of itself has deleted copies below the floor from the start.
        warnings.filterwarnings("ignore", message="The deletion floor")
        trainer.fit(batches, epochs=epochs)
    return best, time.perf_counter() - start


class Results:
    """JSON lines; a run that was killed leaves all of them but the one it was at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines if line.endswith("\n")]
        if len(self.rows) < len(lines):
            path.write_text("".join(lines[: len(self.rows)]))

    def has(self, **key: Any) -> bool:
        """Whether a row with these values was written."""
        return bool(self.where(**key))

    def where(self, **key: Any) -> list[Row]:
        """The rows that have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: Row) -> None:
        """Writes a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def with_error(values: Sequence[float], form: str = ".3f") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:.3f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
