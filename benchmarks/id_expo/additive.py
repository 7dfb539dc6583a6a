"""Interpretable models: what does ID-ExpO add where the explanation is part of the model?

Inherently interpretable models are future work in the paper of ID-ExpO (arXiv 2310.12553). A neural additive model
(NAM; Agarwal et al. 2021, arXiv 2004.13912) has one small network a column; its logits are their sum and a bias. What
column d adds to the class explained, less its mean over training rows, is an explanation and differentiable.

* NAM: it explains itself. In a sum there is a best order in which to insert or delete columns, and how far the
  explanation is from it is measured: for two classes the greedy order is the best one, for more nearly so. It
  differs from the explanation's for two reasons: the mean over the rows is not the value at the baseline, and the
  other classes' logits move too.
* Surrogate: a NAM that follows the probabilities of a network of two hidden layers, fitted beside it; its terms
  explain the network. ID-ExpO trains both, or the NAM alone. KernelSHAP of the same network is the measure.

Two tables, split and standardised as in `tables.py`. Eq. (15) on validation rows chooses among every second epoch:

    python -m benchmarks.id_expo.additive run --data-root FOLDER    CSV files, last column "target"
    python -m benchmarks.id_expo.additive run                       from OpenML, by scikit-learn
    python -m benchmarks.id_expo.additive report

A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, silu
from torch.utils.data import TensorDataset

from benchmarks.id_expo import tables
from benchmarks.id_expo.experiment import (
    SCORES,
    Judge,
    Results,
    Row,
    fine_tune,
    markdown,
    mean_and_error,
    means,
    with_error,
)
from benchmarks.id_expo.tables import JUDGED_SAMPLES, N_LOCATIONS, Split
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS

SETS = ("qsar-biodeg", "steel-plates-fault")
FRACTION, ETA = 0.5, 2.0
SPLITS = range(3)
N_BACKGROUND = 100
EPOCHS, BATCH_SIZE, LEARNING_RATE = 8, 128, 3e-3


class Setting(NamedTuple):
    """One fine-tuning of a model of a kind: a NAM, or a network with a NAM as surrogate."""

    kind: str
    title: str
    weight: float = 0.0
    trains_network: bool = True


SETTINGS = {
    "nam": Setting("NAM", "CE-only"),
    "nam_0.03": Setting("NAM", "ID-ExpO, 0.03", 0.03),
    "nam_0.1": Setting("NAM", "ID-ExpO, 0.1", 0.1),
    "surrogate": Setting("surrogate", "CE-only"),
    "surrogate_0.03": Setting("surrogate", "ID-ExpO, 0.03", 0.03),
    "surrogate_0.1": Setting("surrogate", "ID-ExpO, 0.1", 0.1),
    "surrogate_alone": Setting("surrogate", "ID-ExpO, NAM alone, 0.3", 0.3, trains_network=False),
}
REFERENCES = {"NAM": "best order", "surrogate": "KernelSHAP"}


# --- models --------------------------------------------------------------------------------------------------------


class Additive(nn.Module):
    """A neural additive model: for each column a network of two hidden layers from its value to a term of each logit.

    Args:
        background: rows ``(n, D)`` over which the terms are averaged.
        n_classes: C.
        width: of the hidden layers.
    """

    def __init__(self, background: Tensor, n_classes: int, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("background", background)
        n_features = background.shape[1]
        sizes = [(1, width), (width, width), (width, n_classes)]
        self.weights = nn.ParameterList(torch.randn(n_features, n_in, n_out) / n_in**0.5 for n_in, n_out in sizes)
        self.biases = nn.ParameterList(torch.randn(n_features, 1, n_out) for _, n_out in sizes[:2])
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def terms(self, x: Tensor) -> Tensor:
        """What each column of rows ``(B, D)`` adds to the logits, ``(B, D, C)``."""
        hidden = x.T[..., None]
        for weight, bias in zip(self.weights, self.biases, strict=False):  # the last layer has no bias
            hidden = silu(torch.baddbmm(bias, hidden, weight))
        return (hidden @ self.weights[-1]).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.bias + self.terms(x).sum(dim=1)


class WithSurrogate(nn.Module):
    """A network that predicts, beside a NAM that follows it."""

    def __init__(self, network: nn.Module, additive: Additive) -> None:
        super().__init__()
        self.network, self.additive = network, additive

    def forward(self, x: Tensor) -> Tensor:
        """The network's logits."""
        return self.network(x)


class Terms(Attribution):
    """The terms of a NAM that add up to the target's logit, less their means over its background.

    Args:
        forward_func: what is explained: the NAM, or what it is a surrogate of.
        additive: the NAM.
    """

    def __init__(self, forward_func: Callable[..., Tensor], additive: Additive) -> None:
        super().__init__(forward_func)
        self.additive = additive

    def attribute(self, inputs: Tensor, target: Tensor, *, create_graph: bool = False) -> Tensor:
        """Attributions ``(B, D)`` of rows ``(B, D)`` for classes ``(B,)``."""
        with torch.set_grad_enabled(create_graph):
            terms = self.additive.terms(inputs) - self.additive.terms(self.additive.background).mean(dim=0)
            return terms[torch.arange(len(terms)), :, target]


class Following(nn.Module):
    """The divergence of the surrogate's probabilities from the network's, which it does not move."""

    def __init__(self, model: WithSurrogate) -> None:
        super().__init__()
        self.__dict__["model"] = model  # the user's, kept out of the submodules

    def forward(self, inputs: Tensor, target: Tensor, annotations: Any = None) -> dict[str, Tensor]:
        """The term, its weight 1."""
        return {"surrogate": divergence(self.model.additive(inputs), self.model.network(inputs).detach())}


def divergence(logits: Tensor, of: Tensor) -> Tensor:
    """KL(of || logits), a mean over the batch."""
    return kl_div(logits.log_softmax(dim=1), of.log_softmax(dim=1), reduction="batchmean", log_target=True)


def pretrain(split: Split, n_classes: int, seed: int, network: nn.Module | None = None) -> Additive:
    """A NAM trained on the labels, or to follow a network, until its validation loss falls no longer."""
    torch.manual_seed(seed)
    (x, y), (val_x, val_y) = split.train.tensors, split.val.tensors
    model = Additive(x[torch.randperm(len(x))[:N_BACKGROUND]], n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    if network is None:
        wanted, val_wanted, loss_fn = y, val_y, cross_entropy
    else:
        with torch.no_grad():
            wanted, val_wanted, loss_fn = network(x), network(val_x), divergence
    lowest, since, weights = float("inf"), 0, {}
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_fn(model(x[rows]), wanted[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(loss_fn(model(val_x), val_wanted))
        since += 1
        if loss < lowest:
            lowest, since, weights = loss, 0, copy.deepcopy(model.state_dict())
        elif since == 10:
            break
    model.load_state_dict(weights)
    return model


# --- explanations --------------------------------------------------------------------------------------------------


def additive_of(model: Additive | WithSurrogate) -> Additive:
    return model.additive if isinstance(model, WithSurrogate) else model


def make_insertion_deletion(model: Additive | WithSurrogate, seed: int, **arguments: Any) -> InsertionDeletion:
    """Of the NAM's terms; a masked feature has its mean, 0."""
    return InsertionDeletion(
        Terms(model, additive_of(model)),
        baselines=0.0,
        model=model,
        fraction=FRACTION,
        step_size=1,
        deletion_form="ratio",
        generator=Generator().manual_seed(seed),
        **arguments,
    )


JUDGE = Judge(lambda model: make_insertion_deletion(model, 0), (FRACTION,))
KERNEL_SHAP = Judge(
    lambda model: tables.make_insertion_deletion(model, "KernelSHAP", n_samples=JUDGED_SAMPLES), (FRACTION,)
)


@torch.no_grad()
def best_order(model: Additive, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Insertion and 1 - deletion ``(B,)`` of columns in the best order: at each step the one that moves p most."""
    change = model.terms(x) - model.terms(torch.zeros_like(x[:1]))
    everyone = torch.arange(len(x))
    scores = {}
    for name, sign, logits in (("insertion", 1, model(torch.zeros_like(x))), ("deletion", -1, model(x))):
        left, curve = torch.ones_like(x, dtype=torch.bool), []
        for _ in range(int(FRACTION * x.shape[1])):
            log_p = (logits[:, None] + sign * change).log_softmax(dim=2)[everyone, :, target]
            column = (sign * log_p).masked_fill(~left, -torch.inf).argmax(dim=1)
            logits = logits + sign * change[everyone, column]
            left[everyone, column] = False
            curve.append(log_p[everyone, column].exp())
        scores[name] = torch.stack(curve).mean(dim=0)
    return {"insertion": scores["insertion"], "one_minus_deletion": 1 - scores["deletion"]}


# --- running -------------------------------------------------------------------------------------------------------


def run(names: Iterable[str], root: Path | None, out: Path, splits: Iterable[int] = SPLITS) -> None:
    """All fine-tunings that are not yet done."""
    results = Results(out / "additive.jsonl")
    for name in names:
        for seed in splits:
            missing = [key for key in SETTINGS if not results.has(set=name, split=seed, setting=key)]
            if not missing:
                continue
            x, y = tables.load(name, root)
            split, n_classes = Split.of_seed(x, y, seed), int(y.max()) + 1
            network = tables.pretrain(split, n_classes, seed)
            pretrained = {
                "NAM": pretrain(split, n_classes, seed),
                "surrogate": WithSurrogate(network, pretrain(split, n_classes, seed, network)),
            }
            for key in missing:
                start = time.process_time()
                row = measure(SETTINGS[key], pretrained, split, seed)
                seconds = round(time.process_time() - start, 1)
                results.add({"set": name, "split": seed, "setting": key, "seconds": seconds, **row})
                print(name, seed, key, seconds, row, flush=True)


def measure(setting: Setting, pretrained: dict[str, nn.Module], split: Split, seed: int) -> Row:
    """Fine-tunes, and tests what the validation data chose."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained[setting.kind])
    regularizers: list[nn.Module] = []
    if isinstance(model, WithSurrogate):
        model.network.requires_grad_(setting.trains_network)
        regularizers.append(Following(model))
    if setting.weight:
        weights = {"insertion_weight": setting.weight, "deletion_weight": setting.weight}
        regularizers.append(make_insertion_deletion(model, seed, **weights))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    best, _ = fine_tune(
        model,
        regularizers,
        split.train,
        {"": (JUDGE, split.val)},
        optimizer=torch.optim.Adam(parameters, lr=LEARNING_RATE, weight_decay=1e-4),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    chosen = best["", FRACTION, ETA]
    model.load_state_dict(chosen.weights)
    return {"epoch": chosen.epoch, **test(model, split.test)}


@torch.no_grad()
def test(model: Additive | WithSurrogate, data: TensorDataset) -> Row:
    """Scores of the NAM's terms; those of the reference; and how often a surrogate predicts the network's class."""
    predicted = model(data.tensors[0]).argmax(dim=1)
    row: Row = means(JUDGE.scores(model, data, N_LOCATIONS)[FRACTION])
    if isinstance(model, WithSurrogate):
        kernel_shap = KERNEL_SHAP.scores(model, data)[FRACTION]
        row["reference"] = means({name: kernel_shap[name] for name in ("insertion", "one_minus_deletion")})
        followed = model.additive(data.tensors[0]).argmax(dim=1) == predicted
        row["agreement"] = round(float(followed.double().mean()), 5)
    else:
        row["reference"] = means(best_order(model, data.tensors[0], predicted))
    return row


# --- the report ----------------------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """For each table and kind of model the means over the splits and the paired difference to CE-only, as Markdown."""
    results = Results(out / "additive.jsonl")
    parts = []
    for name in SETS:
        for kind, reference in REFERENCES.items():
            keys = [key for key, setting in SETTINGS.items() if setting.kind == kind]
            splits = complete(results, name)
            lines = [line_of(results, name, key, keys[0], splits) for key in keys]
            head = ["fine-tuning", *SCORES.values(), f"insertion, {reference}", f"1 - deletion, {reference}"]
            head += ["agreement"] * (kind == "surrogate")
            parts += [f"{name}, {kind}, {len(splits)} splits:", markdown(head, lines)]
    preface = (
        "Means and standard errors over random splits; in brackets the paired difference to CE-only. The number in a "
        "fine-tuning's name is the weight of both terms. Test rows, the predicted class explained by the terms of the "
        f"NAM, up to {FRACTION:.0%} of the columns inserted or deleted; sensitivity-n with n = {N_LOCATIONS}. Best "
        "order: of the columns of the same NAM, one by one the column that moves the probability most; for two classes "
        "that is the order by what a column adds to the log odds beyond its value at the baseline, and no order is "
        "better. KernelSHAP: of the same network, in place of the NAM. Agreement: how often the NAM predicts the "
        "network's class. Where the NAM is trained alone, the network is the pretrained one.\n\n"
        "In the picture the wide lines are standard errors of accuracy."
    )
    return "\n\n".join([preface, *parts]) + "\n"


def complete(results: Results, name: str) -> list[int]:
    """The splits of which all settings are done."""
    return [seed for seed in SPLITS if all(results.has(set=name, split=seed, setting=key) for key in SETTINGS)]


def line_of(results: Results, name: str, key: str, plain: str, splits: list[int]) -> list[str]:
    rows, others = (values_of(results, name, which, splits) for which in (key, plain))
    line = [SETTINGS[key].title]
    for score, values in rows.items():
        line.append(with_error(values))
        if key != plain:
            differences = [a - b for a, b in zip(values, others[score], strict=True)]
            line[-1] += f" ({with_error(differences, '+.3f')})"
    return line


def values_of(results: Results, name: str, key: str, splits: list[int]) -> dict[str, list[float]]:
    """Each score over the splits."""
    rows = [results.where(set=name, split=seed, setting=key)[0] for seed in splits]
    values = {score: [row[score] for row in rows] for score in SCORES}
    for score in rows[0]["reference"]:
        values[f"reference {score}"] = [row["reference"][score] for row in rows]
    if "agreement" in rows[0]:
        values["agreement"] = [row["agreement"] for row in rows]
    return values


def plot(out: Path) -> Figure:
    """Mean of insertion and 1 - deletion against accuracy; a line leads from the explanation to its reference."""
    results = Results(out / "additive.jsonl")
    figure = Figure(figsize=(9, 3.4 * len(SETS)), layout="constrained")
    grid = figure.subplots(len(SETS), len(REFERENCES), squeeze=False)
    for row, name in zip(grid, SETS, strict=True):
        splits = complete(results, name)
        for axis, (kind, reference) in zip(row, REFERENCES.items(), strict=True):
            keys = [key for key, setting in SETTINGS.items() if setting.kind == kind]
            for color, key in zip(COLORS, keys, strict=False):
                values = values_of(results, name, key, splits)
                mean = {score: mean_and_error(column)[0] for score, column in values.items()}
                accuracy, error = mean_and_error(values["accuracy"])
                own = (mean["insertion"] + mean["one_minus_deletion"]) / 2
                other = (mean["reference insertion"] + mean["reference one_minus_deletion"]) / 2
                axis.plot([accuracy] * 2, [own, other], color=color, linewidth=1)
                axis.plot(accuracy, other, "_", markersize=12, color=color)
                axis.errorbar(accuracy, own, xerr=error, fmt="o", color=color, label=SETTINGS[key].title)
            axis.set_title(f"{name}: {kind} (short line: {reference})", fontsize=10)
            axis.set(xlabel="accuracy", ylabel="mean of insertion and 1 - deletion")
    # The colours are the same everywhere; the last panel has all of them.
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--data-root", type=Path, help="folder of CSV files; None: OpenML")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        run(arguments.sets, arguments.data_root, arguments.out)
    (arguments.out / "additive.md").write_text(report(arguments.out))
    plot(arguments.out).savefig(arguments.out / "additive.png", dpi=110)


if __name__ == "__main__":
    main()
