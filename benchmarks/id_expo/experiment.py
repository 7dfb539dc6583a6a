"""What the experiments on ID-ExpO share: judging a model's explanations, training with selection, stored results."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.digits import mean_and_error
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.metrics import sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion, Regularizer

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


class InTurn(Regularizer):
    """One of several regularizers at each call, drawn at random."""

    def __init__(self, members: Sequence[Regularizer], generator: Generator) -> None:
        super().__init__(members[0].forward_func, generator=generator)
        self.members = tuple(members)

    @property
    def generators(self) -> list[Generator]:
        """The generators of the draw and of all members."""
        of_members = (generator for member in self.members for generator in member.generators)
        return list(dict.fromkeys([*super().generators, *of_members]))

    def forward(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        """Return the terms of the drawn member."""
        number = int(torch.randint(len(self.members), (), generator=self.generator))
        terms: dict[str, Tensor] = self.members[number](*arguments, **named)
        return terms


class BestScore:
    """A callback that keeps the weights with the best validation score, whatever their accuracy."""

    def __init__(self) -> None:
        self.epoch, self.score = 0, -math.inf
        self.weights: dict[str, Tensor] = {}

    def __call__(self, trainer: ExplanationRegularizedTrainer, row: Mapping[str, float]) -> None:
        """Keep the weights if their score is the best so far."""
        if row["valscore"] > self.score:
            self.epoch, self.score = int(row["epoch"]), row["valscore"]
            self.weights = copy.deepcopy(trainer.model.state_dict())


RULES = ("score", "limit")
Chosen = dict[str, tuple[int, dict[str, Tensor]]]
"""rule -> the epoch that it chose, 0 for the start, and its weights"""


def by_rule(history: Iterable[Mapping[str, float]], best: BestScore, model: nn.Module) -> Chosen:
    """Return what both rules chose: the best validation score, and the trainer's choice within its accuracy limit."""
    eligible = [row for row in history if row["eligible"]]
    kept = max(eligible, key=lambda row: row["valscore"])["epoch"] if eligible else 0
    return {"score": (best.epoch, best.weights), "limit": (int(kept), copy.deepcopy(model.state_dict()))}


FACTORS = (1.0, 1.5, 2.0, 3.0, 5.0)


def surer(trainer: ExplanationRegularizedTrainer, chosen: Chosen, validation: DataLoader, layer: str) -> Chosen:
    """Return what was chosen, its logits multiplied by the factor with the best validation score.

    The network decides as before. So this is the control for a gain that comes from a surer network alone.

    Args:
        trainer: the trainer of the network, which has nothing else to do.
        chosen: the weights.
        validation: the loader of the validation score.
        layer: the name of the layer whose outputs are the logits.
    """

    def score(weights: dict[str, Tensor]) -> float:
        trainer.model.load_state_dict(weights)
        return trainer.evaluate(validation)["valscore"]

    def best(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return max((multiplied(weights, factor, layer) for factor in FACTORS), key=score)

    return {rule: (epoch, best(weights)) for rule, (epoch, weights) in chosen.items()}


def multiplied(weights: dict[str, Tensor], factor: float, layer: str) -> dict[str, Tensor]:
    """Return the weights with those of one layer multiplied."""
    return {name: factor * value if name.startswith(f"{layer}.") else value for name, value in weights.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings that an experiment reports as numbers: the deletion floor, maps of zeros, unread masks, no
    epoch within the accuracy limit."""
    with warnings.catch_warnings():
        for start in ("The deletion floor", "The attribution of", "With half of the", "Every epoch costs"):
            warnings.filterwarnings("ignore", message=start)
        yield


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
    """The mean with its standard error, which a single value does not have."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}} ± {error:.3f}" if len(values) > 1 else f"{mean:{form}}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


Scores = Mapping[str, float]
Column = Callable[[Scores], float]


def gain(*names: str) -> Column:
    """Return a column: the mean order gain of insertion and deletion, averaged over names "explainer, baseline"."""
    judges = [f"{metric}_gain, {name}" for name in names for metric in ("insertion", "deletion")]
    return lambda scores: statistics.fmean(scores[judge] for judge in judges)


def value(name: str) -> Column:
    """Return a column: the value of one judge."""
    return lambda scores: scores[name]


def mean_scores(rows: Sequence[Scores]) -> Scores:
    """Return the mean of each judge over rows."""
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def difference_table(
    arms: Mapping[str, Sequence[Scores]], reference: str, columns: Mapping[str, Column], absolute: Sequence[str] = ()
) -> str:
    """Return a Markdown table: of each arm the differences to the reference, paired by independent unit.

    `arms` holds the scores of each unit, in the same order for all arms. Those named in `absolute`, and the reference,
    have their own means.
    """
    lines = []
    for arm, units in arms.items():
        line = [arm]
        for column in columns.values():
            own = [column(unit) for unit in units]
            if arm in (reference, *absolute):
                line.append(with_error(own))
            else:
                others = [column(unit) for unit in arms[reference]]
                line.append(with_error([a - b for a, b in zip(own, others, strict=True)], "+.3f"))
        lines.append(line)
    return markdown(["arm", *columns], lines)


RISES, DOES_NOT_RISE = "rises by more than two standard errors", "does not rise by more than two standard errors"
KEEPS_ACCURACY = "falls by less than one point"


def verdicts(arm: Sequence[Scores], reference: Sequence[Scores], judges: Mapping[str, str]) -> str:
    """Return a Markdown table of judges, and of what was asked of them before the run.

    With a single unit there is no standard error, and so no verdict.
    """
    lines = []
    for judge, asked in judges.items():
        differences = differences_of(arm, reference, judge)
        verdict = ("yes" if holds(differences, asked) else "no") if len(differences) > 1 else ""
        lines.append([judge, asked, with_error(differences, "+.3f"), verdict])
    return markdown(["judge", "asked", "difference", "holds"], lines)


def differences_of(arm: Sequence[Scores], reference: Sequence[Scores], judge: str) -> list[float]:
    """Return the differences of a judge, paired by independent unit."""
    return [a[judge] - b[judge] for a, b in zip(arm, reference, strict=True)]


def holds(differences: Sequence[float], asked: str) -> bool:
    """Return True if the differences are as they were asked to be."""
    mean, error = mean_and_error(differences)
    return {RISES: mean > 2 * error, DOES_NOT_RISE: mean <= 2 * error, KEEPS_ACCURACY: mean > -0.01}[asked]
