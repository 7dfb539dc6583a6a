"""Tables: are explanations by LIME and KernelSHAP more faithful after training with ID-ExpO than with its rivals?

The experiment of ID-ExpO (arXiv 2310.12553) on six tables: a network of two hidden layers of 256 units is trained in
the usual way, then fine-tuned plainly (CE-only), with ExpO's Stability or Fidelity (ExpO-S, ExpO-F), or with insertion
and deletion of its explanations (ID-ExpO), over five random splits of 70 % to train, 10 % to validate and 20 % to test.
For each explainer, share S of features and eta of eq. (15), validation data choose the weight and the epoch; the hard
metrics on test data, the predicted class explained, are reported, with paired t-tests over the splits.

    python -m benchmarks.id_expo.tabular run --data-root FOLDER    CSV files, last column "target"
    python -m benchmarks.id_expo.tabular run                       from OpenML, by scikit-learn
    python -m benchmarks.id_expo.tabular report

A run that was stopped goes on where it stopped; several may run at once on different `--sets`. `--full` is the paper's
grid (200 epochs, M = 200, all weights, both learning rates), days on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.id_expo.experiment import ETAS, SCORES, Judge, Results, Row, fine_tune, markdown, means, with_error
from captum_idexpo.attr import KernelShap, id_expo_lime
from captum_idexpo.attr.lime import Probabilities
from captum_idexpo.regularizers import Fidelity, GaussianNeighbors, InsertionDeletion, Stability, UniformNeighbors
from captum_idexpo.visualization import COLORS

# By name at OpenML.
SETS = {
    "collins": 987,
    "mfeat-fourier": 14,
    "one-hundred-plants-shape": 1492,
    "qsar-biodeg": 1494,
    "steel-plates-fault": 40982,
    "wine-quality-red": 40691,
}
# They number the text, its genre and the corpus, and so give the label away.
DROPPED = {"collins": ["Text", "Genre", "Counter", "Corpus"]}
METHODS = ("CE-only", "ExpO-S", "ExpO-F", "ID-ExpO")
EXPLAINERS = ("LIME", "KernelSHAP")
FRACTIONS = (0.3, 0.5)
N_SPLITS = 5
SENSITIVITY_N = 4
VAL_SAMPLES, TEST_SAMPLES = 100, 200


class Grid(NamedTuple):
    """What is tried, and how long."""

    epochs: int
    n_samples: tuple[int, int]  # as many as two a feature within these bounds
    steps_per_update: int | None
    weights: tuple[float, ...]
    l2_weights: tuple[float, ...]
    ratios: tuple[float, ...]  # ExpO's terms, to the task loss at the start
    learning_rates: tuple[float, ...]


REDUCED = Grid(10, (50, 100), 4, (0.3, 0.1), (0.0,), (0.3, 3.0), (0.01,))
FULL = Grid(200, (200, 200), None, (0.1, 0.01, 0.001), (0.001, 0.0), (0.01, 0.1, 1.0, 10.0), (0.01, 0.001))


class Setting(NamedTuple):
    """One fine-tuning; explainer and fraction only where the method has them."""

    method: str
    weight: float = 0.0
    l2_weight: float = 0.0
    learning_rate: float = 0.01
    explainer: str | None = None
    fraction: float | None = None


def settings(grid: Grid) -> Iterator[Setting]:
    for rate in grid.learning_rates:
        yield Setting("CE-only", learning_rate=rate)
        for method, ratio in product(("ExpO-S", "ExpO-F"), grid.ratios):
            yield Setting(method, ratio, learning_rate=rate)
        for explainer, fraction, weight, l2_weight in product(EXPLAINERS, FRACTIONS, grid.weights, grid.l2_weights):
            yield Setting("ID-ExpO", weight, l2_weight, rate, explainer, fraction)


# --- data ----------------------------------------------------------------------------------------------------------


@cache
def load(name: str, root: Path | None) -> tuple[Tensor, Tensor]:
    """Features ``(n, D)`` and classes ``(n,)`` from 0."""
    if root is None:
        from sklearn.datasets import fetch_openml  # which compares checksums

        frame, labels = fetch_openml(data_id=SETS[name], return_X_y=True, as_frame=True)
    else:
        frame = pd.read_csv(root / "tabular" / f"{name}.csv")
        labels = frame.pop("target")
    frame = frame.drop(columns=DROPPED.get(name, []), errors="ignore")
    x = torch.tensor(frame.apply(pd.to_numeric).to_numpy(), dtype=torch.float32)
    return x, torch.tensor(labels.astype("category").cat.codes.to_numpy(), dtype=torch.long)


class Split(NamedTuple):
    """70 % of the rows to train on, 10 % to select by, 20 % to test; standardised on the first."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset

    @classmethod
    def of_seed(cls, x: Tensor, y: Tensor, seed: int) -> Split:
        """A random split."""
        order = torch.randperm(len(x), generator=Generator().manual_seed(seed))
        n_train, n_val = int(0.7 * len(x)), int(0.1 * len(x))
        parts = order.split([n_train, n_val, len(x) - n_train - n_val])
        std, mean = torch.std_mean(x[parts[0]], dim=0)
        x = (x - mean) / std.clamp(min=1e-6)
        return cls(*(TensorDataset(x[part], y[part]) for part in parts))


# --- models --------------------------------------------------------------------------------------------------------


def pretrain(split: Split, n_classes: int, seed: int) -> nn.Sequential:
    """A network of two hidden layers, trained until its validation loss falls no longer."""
    torch.manual_seed(seed)
    n_features = split.train.tensors[0].shape[1]
    model = nn.Sequential(
        nn.Linear(n_features, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_classes)
    )
    optimizer = make_optimizer(model, 0.01)
    batches = DataLoader(split.train, batch_size=128, shuffle=True, generator=Generator().manual_seed(seed))
    best, best_epoch, weights = float("inf"), 0, model.state_dict()
    for epoch in range(200):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(model(split.val.tensors[0]), split.val.tensors[1]))
        if loss < best:
            best, best_epoch, weights = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= 20:
            break
    model.load_state_dict(weights)
    return model


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The paper's."""
    return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def make_insertion_deletion(
    model: nn.Module, explainer: str, n_samples: int, seed: int, **arguments: Any
) -> InsertionDeletion:
    """Of an explanation of the class's probability; a masked feature has its mean, 0."""
    return InsertionDeletion(
        id_expo_lime(model) if explainer == "LIME" else KernelShap(Probabilities(model)),
        baselines=0.0,
        forward_func=model,
        model=model,
        step_size=1,
        attribute_kwargs={"n_samples": n_samples, "sampling": "independent"},
        generator=Generator().manual_seed(seed),
        **arguments,
    )


def make_judge(explainer: str, n_samples: int) -> Judge:
    return Judge(lambda model: make_insertion_deletion(model, explainer, n_samples, 0, fraction=0.5), FRACTIONS)


def make_regularizers(setting: Setting, model: nn.Sequential, grid: Grid, seed: int) -> list[nn.Module]:
    generator, n_features = Generator().manual_seed(seed), model[0].in_features
    if setting.method == "ExpO-S":
        return [
            Stability(
                Probabilities(model),
                UniformNeighbors(0.5),
                weight="auto",
                ratio=setting.weight,
                n_neighbors=10,
                outputs="probabilities",
                generator=generator,
            )
        ]
    if setting.method == "ExpO-F":
        return [
            Fidelity(
                Probabilities(model),
                GaussianNeighbors(0.5),
                weight="auto",
                ratio=setting.weight,
                outputs="probabilities",
                generator=generator,
            )
        ]
    if setting.method == "CE-only":
        return []
    return [
        make_insertion_deletion(
            model,
            setting.explainer,
            min(max(2 * n_features, grid.n_samples[0]), grid.n_samples[1]),
            seed,
            fraction=setting.fraction,
            insertion_weight=setting.weight,
            deletion_weight=setting.weight,
            l2_weight=setting.l2_weight,
            steps_per_update=grid.steps_per_update,
        )
    ]


# --- running -------------------------------------------------------------------------------------------------------


def run(names: list[str], root: Path | None, out: Path, grid: Grid) -> None:
    """All fine-tunings that are not yet done."""
    for name, seed in product(names, range(N_SPLITS)):
        results = Results(out / f"tabular_{name}.jsonl")
        missing = [setting for setting in settings(grid) if not results.has(split=seed, **setting._asdict())]
        if not missing:
            continue
        x, y = load(name, root)
        split = Split.of_seed(x, y, seed)
        pretrained = pretrain(split, int(y.max()) + 1, seed)
        for setting in missing:
            row = {"set": name, "split": seed, **setting._asdict(), **measure(setting, pretrained, split, grid, seed)}
            results.add(row)
            print(name, seed, *setting, row["seconds"], row["judged"][-3], flush=True)


def measure(setting: Setting, pretrained: nn.Module, split: Split, grid: Grid, seed: int) -> Row:
    """Fine-tunes, and tests what the validation data chose for each explainer, fraction and eta."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained)
    explainers = [name for name in EXPLAINERS if setting.explainer in (None, name)]
    best, seconds = fine_tune(
        model,
        make_regularizers(setting, model, grid, seed),
        split.train,
        {name: (make_judge(name, VAL_SAMPLES), split.val) for name in explainers},
        optimizer=make_optimizer(model, setting.learning_rate),
        epochs=grid.epochs,
        batch_size=128,
        seed=seed,
    )
    tested: dict[tuple[str, int], dict[float, dict[str, Tensor]]] = {}
    judged = []
    for (explainer, fraction, eta), chosen in best.items():
        if setting.fraction not in (None, fraction):
            continue
        if (explainer, chosen.epoch) not in tested:
            model.load_state_dict(chosen.weights)
            tested[explainer, chosen.epoch] = make_judge(explainer, TEST_SAMPLES).scores(
                model, split.test, SENSITIVITY_N
            )
        judged.append(
            {
                "explainer": explainer,
                "fraction": fraction,
                "eta": eta,
                "epoch": chosen.epoch,
                "valscore": round(chosen.score, 5),
                **means(tested[explainer, chosen.epoch][fraction]),
            }
        )
    return {"seconds": round(seconds, 1), "judged": judged}


# --- the report ----------------------------------------------------------------------------------------------------

Judged = dict[tuple[str, str, float, float, str], list[Row]]
"""(set, explainer, fraction, eta, method) -> what validation chose on each split."""


def chosen(out: Path) -> Judged:
    """Of each method the weight and epoch with the best validation score; sets whose splits are all done."""
    best: dict[tuple[Any, ...], Row] = {}
    for name in SETS:
        results = Results(out / f"tabular_{name}.jsonl")
        for row, judged in ((run, judged) for run in results.rows for judged in run["judged"]):
            key = (name, judged["explainer"], judged["fraction"], judged["eta"], row["method"], row["split"])
            if key not in best or judged["valscore"] > best[key]["valscore"]:
                best[key] = {**judged, "weight": row["weight"]}
    found: Judged = {}
    for (*key, _), row in sorted(best.items(), key=lambda item: item[0][-1]):
        found.setdefault(tuple(key), []).append(row)
    return {key: rows for key, rows in found.items() if len(rows) == N_SPLITS}


def is_best(found: Judged, key: tuple[str, str, float, float], score: str) -> bool:
    """Whether ID-ExpO is above every other method, by paired t-tests over the splits at 5 %."""
    own = [row[score] for row in found[(*key, "ID-ExpO")]]
    others = [[row[score] for row in found[(*key, method)]] for method in METHODS if method != "ID-ExpO"]
    return all(ttest_rel(own, other, alternative="greater").pvalue < 0.05 for other in others)


def report(out: Path) -> str:
    """Tables at eta = 3 for both fractions, the summary of the tests, and a figure."""
    found = chosen(out)
    names = [
        name for name in SETS if all((name, e, s, ETAS[-1], "ID-ExpO") in found for e in EXPLAINERS for s in FRACTIONS)
    ]
    parts = [f"#### By weight\n\n{by_weight(out, names)}"]
    parts += [f"#### S = {fraction}\n\n{table(found, names, fraction, ETAS[-1])}" for fraction in FRACTIONS]
    draw(found, names).savefig(out / "tabular.png", dpi=110)
    return summary(found, names) + "\n\n" + "\n\n".join(parts) + "\n"


def summary(found: Judged, names: list[str]) -> str:
    """How often ID-ExpO is significantly best, and what it costs."""
    lines = []
    for eta in ETAS:
        keys = list(product(names, EXPLAINERS, FRACTIONS, [eta]))
        row = [f"{eta:g}"]
        row += [f"{sum(is_best(found, key, score) for key in keys)} of {len(keys)}" for score in list(SCORES)[1:]]
        losses = [
            a["accuracy"] - b["accuracy"]
            for key in keys
            for a, b in zip(found[(*key, "ID-ExpO")], found[(*key, "CE-only")], strict=True)
        ]
        lines.append([*row, with_error(losses, "+.3f")])
    head = ["eta", *(f"best in {SCORES[score]}" for score in list(SCORES)[1:]), "accuracy over CE-only"]
    return markdown(head, lines)


def by_weight(out: Path, names: list[str]) -> str:
    """What each weight of ID-ExpO brings and costs, paired with CE-only; epochs chosen at the largest eta."""
    differences: dict[float, dict[str, list[list[float]]]] = {}
    for name in names:
        rows = Results(out / f"tabular_{name}.jsonl").rows
        judged = [(row, j) for row in rows for j in row["judged"] if j["eta"] == ETAS[-1]]
        plain = {(row["split"], j["explainer"], j["fraction"]): j for row, j in judged if row["method"] == "CE-only"}
        for row, j in judged:
            if row["method"] == "ID-ExpO":
                other = plain[row["split"], j["explainer"], j["fraction"]]
                group = differences.setdefault(row["weight"], {}).setdefault(name, [])
                group.append([j[score] - other[score] for score in SCORES])
    n_runs = len(EXPLAINERS) * len(FRACTIONS) * N_SPLITS
    lines = []
    for weight, groups in sorted(differences.items()):
        if all(len(groups.get(name, [])) == n_runs for name in names):
            columns = zip(*(row for name in names for row in groups[name]), strict=True)
            lines.append([f"{weight:g}", *(with_error(list(column), "+.3f") for column in columns)])
    return markdown(["weight", *(f"{title} over CE-only" for title in SCORES.values())], lines)


def table(found: Judged, names: list[str], fraction: float, eta: float) -> str:
    """Means and standard errors over the splits; bold where ID-ExpO is significantly best."""
    lines = []
    for name, explainer, method in product(names, EXPLAINERS, METHODS):
        key = (name, explainer, fraction, eta)
        line = [name, explainer, method]
        for score in SCORES:
            text = with_error([row[score] for row in found[(*key, method)]])
            line.append(f"**{text}**" if method == "ID-ExpO" and is_best(found, key, score) else text)
        lines.append(line)
    return markdown(["set", "explainer", "method", *SCORES.values()], lines)


def draw(found: Judged, names: list[str]) -> Figure:
    """For each set, accuracy against the mean of insertion and 1 - deletion, over eta; LIME, S = 0.5."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, name in zip(axes, names, strict=False):
        for method, color, marker in zip(METHODS, COLORS, "osD^", strict=False):
            rows = [found[name, "LIME", 0.5, eta, method] for eta in ETAS]
            x = [statistics.fmean(row["accuracy"] for row in group) for group in rows]
            y = [
                statistics.fmean((row["insertion"] + row["one_minus_deletion"]) / 2 for row in group) for group in rows
            ]
            axis.plot(x, y, marker + "-", color=color, label=method, alpha=0.8)
        axis.set_title(name, fontsize=10)
        axis.set(xlabel="accuracy", ylabel="faithfulness")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--data-root", type=Path, help="folder of CSV files; None: OpenML")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--full", action="store_true", help="the paper's grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on every machine of this kind, however many cores it has
    if arguments.command == "run":
        run(arguments.sets, arguments.data_root, arguments.out, FULL if arguments.full else REDUCED)
    (arguments.out / "tabular.md").write_text(report(arguments.out))


if __name__ == "__main__":
    main()
