"""Tables: does ID-ExpO's gain survive judges that took no part in the training, and what does it cost?

The experiment of ID-ExpO (arXiv 2310.12553) on six tables, with the controls that a reviewer would ask for. A network
of two hidden layers of 256 units is trained in the usual way on each of five random splits (70 % to train, 10 % to
validate, 20 % to test; standardised on the first). It is then fine-tuned from the same weights by each arm:

* CE-only: the task loss alone.
* CE-only, surer: the same, with all logits multiplied by the factor from 1 to 5 that has the best validation score. The
  network decides as before, and has learned nothing about explanations. (Added after the first rows, because a reader
  saw that a surer network has higher gains.)
* masks alone: the task loss and `RandomMasking`, for as long a time as ID-ExpO takes.
* ExpO-S, ExpO-F: Stability or Fidelity on masked copies (the paper's appendix B.1).
* ID-ExpO: insertion and deletion of the explanation by LIME or KernelSHAP, with each deletion form (appendix A.1).
* in turn: ID-ExpO with "complement". LIME or IntegratedGradients is drawn for each update, and the mean or noise as the
  baseline for each row. Earlier runs chose it as the candidate for a recipe, before any run of this script. It holds on
  tables if, under the accuracy limit, both order gains of LIME with the values of another row, and of KernelSHAP with
  both baselines, exceed those of CE-only by more than two standard errors over the sets, infidelity does not rise, and
  accuracy falls by less than one point.

Validation rows choose the epoch by two rules: the best validation score of eq. (15) at eta = 2, and the same among the
epochs whose validation accuracy has not fallen by more than one point, plus one standard error of the comparison
(`max_accuracy_drop=0.01`). If there is none, the weights before the fine-tuning are kept. Test rows are judged by
`captum_idexpo.jury`, by sensitivity-n, and by the leak test: if the explanation of a row, laid on a row of another
class, raises the probability of the first one's class, then the mask itself carries the label.

    python -m benchmarks.id_expo.tables run --data-root FOLDER    CSV files, last column "target"
    python -m benchmarks.id_expo.tables run                       from OpenML, by scikit-learn
    python -m benchmarks.id_expo.tables report

A run that was stopped continues with the first missing arm. Several processes can run with different `--sets`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from benchmarks.digits import mean_and_error
from benchmarks.id_expo.experiment import (
    DOES_NOT_RISE,
    KEEPS_ACCURACY,
    RISES,
    BestScore,
    Chosen,
    InTurn,
    Results,
    Row,
    Scores,
    by_rule,
    difference_table,
    differences_of,
    gain,
    holds,
    markdown,
    mean_scores,
    quiet,
    surer,
    value,
    verdicts,
)
from benchmarks.id_expo.significance import holm, paired_p_value
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import IntegratedGradients, KernelShap, id_expo_lime
from captum_idexpo.attr.lime import Probabilities
from captum_idexpo.baselines import mixture, noise, resampled
from captum_idexpo.jury import compare
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, MaskedNeighbors, RandomMasking, Stability
from captum_idexpo.visualization import plot_fronts

# By number at OpenML.
SETS = {
    "collins": 987,
    "mfeat-fourier": 14,
    "one-hundred-plants-shape": 1492,
    "qsar-biodeg": 1494,
    "steel-plates-fault": 40982,
    "wine-quality-red": 40691,
}
# These columns number the text, its genre and the corpus, and so give the label away.
DROPPED = {"collins": ["Text", "Genre", "Counter", "Corpus"]}
EXPLAINERS = {
    "LIME": id_expo_lime,
    "KernelSHAP": lambda model: KernelShap(Probabilities(model)),
    "IntegratedGradients": lambda model: IntegratedGradients(Probabilities(model)),
}
N_SPLITS = 5
N_LOCATIONS = 4  # of sensitivity-n
JUDGED_SAMPLES = 200
PASSES = 60
N_EPOCHS = 12  # of several passes: validation after each pass would cost more than the passes themselves
BATCH_SIZE, LEARNING_RATE = 128, 0.01
MAX_ACCURACY_DROP = 0.01


class Arm(NamedTuple):
    """One way to fine-tune the network."""

    method: str
    weight: float = 0.0
    form: str = ""
    explainer: str = "LIME"  # of the loss, and of the selection
    passes: int = PASSES  # over the training rows


# Measured on one core, a pass of ID-ExpO takes as long as 14 to 16 passes of masks alone.
MASKS_ALONE = Arm("masks alone", 1.0, passes=15 * PASSES)
SURER = Arm("CE-only, surer")
RECIPE_ARM = Arm("in turn", 0.1, "complement")
COMPLEMENT_AND_RATIO = (Arm("ID-ExpO", 0.1, "complement"), Arm("ID-ExpO", 0.1, "ratio"))
ARMS = [
    Arm("CE-only"),
    SURER,
    Arm("ID-ExpO", 0.1, "ratio"),
    Arm("ID-ExpO", 0.1, "complement"),
    RECIPE_ARM,
    MASKS_ALONE,
    Arm("ID-ExpO", 0.01, "ratio"),
    Arm("ID-ExpO", 0.01, "complement"),
    Arm("ExpO-S", 0.3),
    Arm("ExpO-F", 0.3),
    Arm("ID-ExpO", 0.1, "log"),
    Arm("CE-only", explainer="KernelSHAP"),
    Arm("ID-ExpO", 0.1, "ratio", "KernelSHAP"),
    Arm("ID-ExpO", 0.1, "complement", "KernelSHAP"),
]


# --- data and network ----------------------------------------------------------------------------------------------


@cache
def load(name: str, root: Path | None) -> tuple[Tensor, Tensor]:
    """Return features ``(n, D)`` and classes ``(n,)`` from 0."""
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
    """70 % of the rows to train on, 10 % to validate on, 20 % to test on; standardised on the first."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset

    @classmethod
    def of_seed(cls, x: Tensor, y: Tensor, seed: int) -> Split:
        """Split at random."""
        order = torch.randperm(len(x), generator=Generator().manual_seed(seed))
        n_train, n_val = int(0.7 * len(x)), int(0.1 * len(x))
        parts = order.split([n_train, n_val, len(x) - n_train - n_val])
        std, mean = torch.std_mean(x[parts[0]], dim=0)
        x = (x - mean) / std.clamp(min=1e-6)
        return cls(*(TensorDataset(x[part], y[part]) for part in parts))


def pretrain(split: Split, n_classes: int, seed: int) -> nn.Sequential:
    """Train a network of two hidden layers until its validation loss has not fallen for 20 epochs."""
    torch.manual_seed(seed)
    n_features = split.train.tensors[0].shape[1]
    model = nn.Sequential(
        nn.Linear(n_features, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_classes)
    )
    optimizer = make_optimizer(model)
    batches = DataLoader(split.train, BATCH_SIZE, shuffle=True, generator=Generator().manual_seed(seed))
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


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return the paper's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)


# --- arms ----------------------------------------------------------------------------------------------------------


def make_insertion_deletion(
    model: nn.Sequential, explainer: str, *, n_samples: int | None = None, seed: int = 0, **arguments: object
) -> InsertionDeletion:
    """Return the terms for one explainer; its explanations are those of the class's probability."""
    n_samples = n_samples or min(max(2 * model[0].in_features, 50), 100)
    sampled = {"n_samples": n_samples, "sampling": "independent"}
    return InsertionDeletion(
        EXPLAINERS[explainer](model),
        forward_func=model,
        model=model,
        step_size=1,
        fraction=0.5,
        attribute_kwargs={"n_steps": 10} if explainer == "IntegratedGradients" else sampled,
        generator=Generator().manual_seed(seed),
        **({"baselines": 0.0} | arguments),
    )


def make_regularizers(arm: Arm, model: nn.Sequential, seed: int) -> list[nn.Module]:
    """Return an arm's terms. A masked feature has its mean, 0."""
    generator = Generator().manual_seed(seed)
    if arm.method.startswith("CE-only"):
        return []
    if arm.method == "masks alone":
        return [RandomMasking(model, baselines=0.0, weight=arm.weight, generator=generator)]
    if arm.method in ("ExpO-S", "ExpO-F"):
        term, n_copies = (Stability, 10) if arm.method == "ExpO-S" else (Fidelity, 2 * model[0].in_features)
        settings = {"weight": "auto", "ratio": arm.weight, "outputs": "probabilities", "generator": generator}
        return [term(Probabilities(model), MaskedNeighbors(), n_neighbors=n_copies, **settings)]
    settings = {"insertion_weight": arm.weight, "deletion_weight": arm.weight, "deletion_form": arm.form, "seed": seed}
    if arm.method == "ID-ExpO":
        return [make_insertion_deletion(model, arm.explainer, **settings)]
    settings["baselines"] = mixture(0.0, noise(generator=generator), generator=generator)
    members = [make_insertion_deletion(model, name, **settings) for name in ("LIME", "IntegratedGradients")]
    return [InTurn(members, generator)]


def fine_tune(arm: Arm, model: nn.Sequential, split: Split, seed: int) -> Chosen:
    """Train, and return by rule the chosen epoch and its weights."""
    torch.manual_seed(seed)
    optimizer = make_optimizer(model)
    best = BestScore()
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        make_regularizers(arm, model, seed),
        evaluation=make_insertion_deletion(model, arm.explainer, seed=seed),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, N_EPOCHS),
        max_accuracy_drop=MAX_ACCURACY_DROP,
        patience=N_EPOCHS,
        callbacks=[best],
        show_progress=False,
    )
    rows = ConcatDataset([split.train] * (arm.passes // N_EPOCHS))
    batches = DataLoader(rows, BATCH_SIZE, shuffle=True, generator=Generator().manual_seed(seed))
    validation = DataLoader(split.val, 500)
    chosen = by_rule(trainer.fit(batches, validation, epochs=N_EPOCHS), best, model)
    if arm != SURER:
        return chosen
    return surer(trainer, chosen, validation, layer="4")


# --- judges --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(model: nn.Sequential, split: Split) -> dict[str, float]:
    """Return the mean of each judge over the test rows, the predicted class explained."""
    sampled = {"n_samples": JUDGED_SAMPLES, "sampling": "independent"}
    found = compare(
        {"model": model},
        DataLoader(split.test, 500),
        EXPLAINERS,
        {"mean": 0.0, "another row": resampled(split.train.tensors[0], generator=Generator().manual_seed(0))},
        ("accuracy", "masked_accuracy", "insertion", "deletion", "insertion_gain", "deletion_gain", "infidelity"),
        attribute_kwargs={"LIME": sampled, "KernelSHAP": sampled, "IntegratedGradients": {"n_steps": 50}},
        fraction=0.5,
        step_size=1,
    )
    means = {str(judge): float(values.double().mean()) for judge, values in found.examples["model"].items()}
    for explainer in ("LIME", "KernelSHAP"):
        means |= of_explanation(model, split, explainer)
    return {name: round(value, 5) for name, value in means.items()}


def of_explanation(model: nn.Sequential, split: Split, explainer: str) -> dict[str, float]:
    """Return sensitivity-n and the leak of one explainer."""
    x, _ = split.test.tensors
    predicted = model(x).argmax(dim=1)
    regularizer = make_insertion_deletion(model, explainer, n_samples=JUDGED_SAMPLES)
    (maps,) = regularizer.attribution(x, predicted)
    generator = Generator().manual_seed(0)
    correlation = sensitivity_n(model, x, maps, N_LOCATIONS, target=predicted, generator=generator)
    found = {f"sensitivity_n, {explainer}": float(correlation.mean()), f"leak, {explainer}": 0.0}
    # Each row is replaced by a random row that the model gives another class.
    differ = predicted[:, None] != predicted
    explained = differ.any(dim=1)
    if not explained.any():  # All rows are given the same class, so that a mask cannot tell classes apart.
        return found
    others = torch.multinomial(differ[explained].float(), 1, generator=generator)[:, 0]
    leak = insertion_deletion(
        model,
        x[others],
        maps[explained],
        target=predicted[explained],
        baselines=0.0,
        fraction=0.5,
        step_size=1,
        n_random_orders=4,
        generator=generator,
    )
    return found | {f"leak, {explainer}": float(leak.insertion_gain.mean())}


def run(names: Iterable[str], root: Path | None, out: Path) -> None:
    """Run and judge all arms that are missing, and write a row for each rule."""
    for seed, name in product(range(N_SPLITS), names):
        results = Results(out / f"tables_{name}.jsonl")
        missing = [arm for arm in ARMS if not results.has(split=seed, **arm._asdict())]
        if not missing:
            continue
        x, y = load(name, root)
        split = Split.of_seed(x, y, seed)
        pretrained = pretrain(split, int(y.max()) + 1, seed)
        for arm in missing:
            start, model = time.process_time(), copy.deepcopy(pretrained)
            with quiet():
                chosen = fine_tune(arm, model, split, seed)
                row = {"split": seed, **arm._asdict(), "seconds": round(time.process_time() - start, 1)}
                judged: dict[int, dict[str, float]] = {}
                for rule, (epoch, weights) in chosen.items():
                    model.load_state_dict(weights)
                    judged[epoch] = judged.get(epoch) or judge(model, split)
                    row[rule] = {"epoch": epoch, **judged[epoch]}
            results.add(row)
            print(name, seed, *arm, row["seconds"], round(time.process_time() - start), flush=True)


# --- the report ----------------------------------------------------------------------------------------------------

BySet = dict[str, dict[str, list[Row]]]
"""set -> title of an arm -> its row of each split"""
HEADS = {"limit": "Within the accuracy limit", "score": "By the validation score alone"}
COLUMNS = {
    "accuracy": value("accuracy"),
    "half-masked accuracy": value("masked_accuracy, mean"),
    "LIME": gain("LIME, mean"),
    "KernelSHAP": gain("KernelSHAP, mean"),
    "IntegratedGradients": gain("IntegratedGradients, mean"),
    "LIME, another row": gain("LIME, another row"),
    "KernelSHAP, another row": gain("KernelSHAP, another row"),
    "infidelity": value("infidelity, LIME, mean"),
    "sensitivity-n": value("sensitivity_n, LIME"),
    "leak": value("leak, LIME"),
}
HELD_OUT = ("LIME, another row", "KernelSHAP, mean", "KernelSHAP, another row")
RECIPE = {
    "accuracy": KEEPS_ACCURACY,
    **{f"{metric}_gain, {name}": RISES for name in HELD_OUT for metric in ("insertion", "deletion")},
    **{f"infidelity, {name}": DOES_NOT_RISE for name in HELD_OUT},
}
OVERLAP = 0.2 / 0.7  # test to training rows
RIVALS = ("CE-only", "ExpO-S", "ExpO-F")


def title(arm: Arm) -> str:
    """Return the name of an arm in tables."""
    weight = f" {arm.weight:g}" if arm.weight and arm.method != "masks alone" else ""
    form = f", {arm.form}" if arm.form else ""
    return f"{arm.method}{weight}{form}" + (f" ({arm.explainer})" if arm.explainer != "LIME" else "")


def read(out: Path) -> BySet:
    """Return the rows of all sets that have any, of the splits that are complete in each of these sets."""
    results = {name: Results(out / f"tables_{name}.jsonl") for name in SETS}
    results = {name: found for name, found in results.items() if found.rows}
    complete = [
        seed
        for seed in range(N_SPLITS)
        if all(found.has(split=seed, **arm._asdict()) for found in results.values() for arm in ARMS)
    ]
    return {
        name: {title(arm): [found.where(split=seed, **arm._asdict())[0] for seed in complete] for arm in ARMS}
        for name, found in results.items()
        if complete
    }


def units(found: BySet, arm: str, rule: str) -> list[Scores]:
    """Return the means over the splits of each set, for what a rule chose."""
    return [mean_scores([row[rule] for row in rows[arm]]) for rows in found.values()]


def report(out: Path) -> str:
    """Return the tables of both rules, the verdict on the recipe, the tests, and each set."""
    found = read(out)
    n_splits = len(next(iter(found.values()))["CE-only"])
    parts = [f"Sets: {len(found)}, splits of each: {n_splits}. {kept_start(found)}"]
    for rule, head in HEADS.items():
        arms = {title(arm): units(found, title(arm), rule) for arm in ARMS if arm.explainer == "LIME"}
        parts.append(f"#### {head}\n\n{difference_table(arms, 'CE-only', COLUMNS)}")
    recipe, plain = (units(found, arm, "limit") for arm in (title(RECIPE_ARM), "CE-only"))
    parts.append(f"#### In turn\n\n{verdicts(recipe, plain, RECIPE)}")
    if len(found) > 1:
        parts.append(f"#### How many of these conditions hold\n\n{conditions(found)}")
    parts.append(f"#### KernelSHAP in the loss, within the accuracy limit\n\n{of_kernel_shap(found)}")
    if n_splits > 1:
        parts.append(f"#### Tests\n\n{tests(found)}")
    return "\n\n".join(parts) + "\n"


def conditions(found: BySet) -> str:
    """Return how many of the recipe's conditions hold for three arms, against the plain and the surer network."""
    references = [title(Arm("CE-only")), title(SURER)]
    lines = []
    for arm, (rule, head) in product((RECIPE_ARM, *COMPLEMENT_AND_RATIO), HEADS.items()):
        own = units(found, title(arm), rule)
        counts = [
            sum(
                holds(differences_of(own, units(found, reference, rule), judge), asked)
                for judge, asked in RECIPE.items()
            )
            for reference in references
        ]
        lines.append([title(arm), head.lower(), *(f"{count} of {len(RECIPE)}" for count in counts)])
    return markdown(["arm", "epoch", *(f"against {reference}" for reference in references)], lines)


def of_kernel_shap(found: BySet) -> str:
    """Return the table of the arms that KernelSHAP trains and selects."""
    arms = {title(arm): units(found, title(arm), "limit") for arm in ARMS if arm.explainer == "KernelSHAP"}
    return difference_table(arms, title(Arm("CE-only", explainer="KernelSHAP")), COLUMNS)


def kept_start(found: BySet) -> str:
    """Return how often the accuracy limit kept the weights before the fine-tuning."""
    counts = {
        title(arm): sum(row["limit"]["epoch"] == 0 for rows in found.values() for row in rows[title(arm)])
        for arm in ARMS
    }
    listed = ", ".join(f"{arm} {count}" for arm, count in counts.items() if count)
    return f"No epoch within the limit: {listed or 'none'}."


def tests(found: BySet) -> str:
    """Return on how many sets LIME's ID-ExpO at 0.1 is better than each of its rivals."""
    lines = []
    compared = product(((), (SURER.method,)), ("ratio", "complement"), ("insertion", "deletion", "sensitivity_n"))
    for also, form, score in compared:
        p_values: dict[float, list[float]] = {overlap: [] for overlap in (0.0, OVERLAP)}
        for rows, overlap in product(found.values(), p_values):
            p_values[overlap].append(largest_p_value(rows, form, score, overlap, (*RIVALS, *also)))
        n = len(p_values[0.0])
        counts = [sum(p < 0.05 for p in values) for values in p_values.values()]
        counts += [sum(holm(values)) for values in p_values.values()]
        rivals = "; ".join([", ".join(RIVALS), *also])
        lines.append([form, score.replace("_", "-"), rivals, *(f"{count} of {n}" for count in counts)])
    head = ["deletion", "better in", "than", "t-tests", "Nadeau-Bengio", "Holm", "both"]
    return markdown(head, lines)


def largest_p_value(
    rows: dict[str, list[Row]], form: str, score: str, overlap: float, rivals: tuple[str, ...] = RIVALS
) -> float:
    """Return the p-value of the hardest rival; the validation score chooses the epochs."""
    judge = "sensitivity_n, LIME" if score == "sensitivity_n" else f"{score}, LIME, mean"
    sign = -1 if score == "deletion" else 1

    def values(arm: Arm) -> list[float]:
        return [sign * row["score"][judge] for row in rows[title(arm)]]

    own = values(Arm("ID-ExpO", 0.1, form))
    others = [arm for arm in ARMS if arm.method in rivals and arm.explainer == "LIME"]
    return max(paired_p_value(own, values(rival), overlap) for rival in others)


def each_set(out: Path) -> str:
    """Return the table of all sets, within the accuracy limit."""
    found, parts = read(out), []
    for name, rows in found.items():
        arms = {title(arm): [row["limit"] for row in rows[title(arm)]] for arm in ARMS if arm.explainer == "LIME"}
        parts.append(f"#### {name}\n\n{difference_table(arms, 'CE-only', COLUMNS)}")
    return "\n\n".join(parts) + "\n"


def plot(found: BySet) -> Figure:
    """Return accuracy against the order gain of LIME, by both rules, as differences to CE-only."""
    methods: dict[str, list[Arm]] = {}
    for arm in ARMS[1:]:
        if arm.explainer == "LIME" and arm.form != "log":  # "log" is where "ratio" is
            methods.setdefault(f"{arm.method}, {arm.form}".rstrip(", "), []).append(arm)
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (rule, head) in zip(figure.subplots(1, 2, sharex=True, sharey=True), HEADS.items(), strict=True):
        points = {method: [differences(found, arm, rule) for arm in arms] for method, arms in methods.items()}
        plot_fronts(points, "accuracy", "LIME", x_error="accuracy error", y_error="LIME error", axis=axis)
        axis.set(title=head, xlabel="change of accuracy", ylabel="change of the order gain of LIME")
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    return figure


def differences(found: BySet, arm: Arm, rule: str) -> dict[str, float]:
    """Return the mean differences to CE-only of accuracy and the order gain, and their errors over the sets."""
    own, plain = (units(found, name, rule) for name in (title(arm), "CE-only"))
    point = {}
    for name in ("accuracy", "LIME"):
        column = COLUMNS[name]
        pairs = zip(own, plain, strict=True)
        point[name], point[f"{name} error"] = mean_and_error([column(a) - column(b) for a, b in pairs])
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--data-root", type=Path, help="folder of CSV files; None: OpenML")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on every machine of this kind, however many cores it has
    if arguments.command == "run":
        run(arguments.sets, arguments.data_root, arguments.out)
    if found := read(arguments.out):
        plot(found).savefig(arguments.out / "tables.png", dpi=110)
        (arguments.out / "tables.md").write_text(report(arguments.out))
        (arguments.out / "tables_sets.md").write_text(each_set(arguments.out))


if __name__ == "__main__":
    main()
