"""How far are LIME and KernelSHAP of few samples from those of infinitely many?

Every sampling design with every surrogate of the package, at M = 200 samples an example. The goal is M = 800, drawn
independently (Captum's distribution, which stands for Captum's own sampling), with the plain surrogate: eq. (12) of
ID-ExpO for LIME, `ShapleyRegression` for KernelSHAP. Errors are squared distances over the limit's squared norm.

Without intercept, as in eq. (12), LIME's limit has one constant more in all of its coefficients than with one (the
kernel treats all features alike). Rankings and the masks of insertion and deletion do not see such a constant, so
LIME's attributions are compared less each one's mean over the features; KernelSHAP's as they are.

The limit is the mean of two halves of many samples: LIME by ridge with intercept on orthogonal masks, KernelSHAP by
its plain regression on leverage masks. A quarter of the halves' squared distance estimates its own error.

    python benchmarks/sampling_noise.py run --data-root FOLDER     CIFAR-10: see cifar10.py; tables: FOLDER/tabular
    python benchmarks/sampling_noise.py report

Tables end in a column of class numbers; an MLP is trained on each, columns standardised, a feature being a column.
CIFAR-10 is classified by the pretrained ResNet-20, a feature being 4x4 pixels. Masked features are 0, the mean. A run
that was stopped goes on where it stopped; it writes JSON lines, the report tables and a picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cifar10 import load_images, pretrained_resnet20
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from captum_idexpo.attr import KernelShap, Lime, MaskSimilarity, surrogates
from captum_idexpo.feature_masks import grid
from captum_idexpo.visualization import COLORS

DATA = {"wine-quality-red": "wine", "qsar-biodeg": "qsar", "mfeat-fourier": "mfeat", "cifar10": "CIFAR-10"}
OUTPUTS = ("probability", "logit")
N_ROWS, N_IMAGES, N_DRAWS = 24, 8, 6
HALF_ROWS, HALF_IMAGES = 30_000, 12_000
SAMPLINGS = {
    "LIME": ("independent", "paired", "orthogonal"),
    "KernelSHAP": ("independent", "paired", "orthogonal", "leverage"),
}
SURROGATES: dict[str, dict[str, surrogates.Surrogate]] = {
    "LIME": {
        "plain": surrogates.Ridge(0.01, fit_intercept=False),
        "intercept": surrogates.Ridge(0.01),
        "Bayesian": surrogates.BayesianRidge(),
    },
    "KernelSHAP": {"plain": surrogates.ShapleyRegression(), "Bayesian": surrogates.BayesianShapleyRegression()},
}
LIMITS = {"LIME": (surrogates.Ridge(1e-6), "orthogonal"), "KernelSHAP": (surrogates.ShapleyRegression(), "leverage")}
GOAL = "goal: M = 800, independent, plain"
PREFACE = f"""M = 200, relative squared error: mean / median over examples ({N_ROWS} rows a table, {N_IMAGES} images) of
the means of {N_DRAWS} draws; LIME less each attribution's mean. Bold: as good as the goal's. "independent" has the
distribution of Captum's sampling. The limits' own mean errors, below which no difference is real:"""
Row = dict[str, Any]


class Remembered(nn.Module):
    """A model that evaluates a batch once: other surrogates and outputs see the same masks again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.logits = model, dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        key = hash(x.numpy().tobytes())
        if key not in self.logits:
            self.logits[key] = self.model(x)
        return self.logits[key]


class Problem(NamedTuple):
    """A trained model and inputs whose predicted class is explained."""

    model: nn.Module
    x: Tensor
    feature_mask: Tensor | None
    n_half: int

    @classmethod
    def of(cls, name: str, root: Path) -> Problem:
        """A table with an MLP trained on it, or CIFAR-10."""
        if name == "cifar10":
            x = load_images(root, "test", slice(0, N_IMAGES)).tensors[0]
            return cls(Remembered(pretrained_resnet20(root)), x, grid(x, 4), HALF_IMAGES)
        table = torch.from_numpy(np.loadtxt(root / "tabular" / f"{name}.csv", delimiter=",", skiprows=1))
        table = table[torch.randperm(len(table), generator=Generator().manual_seed(0))]
        x, y = table[:, :-1], table[:, -1].long()
        x = ((x - x.mean(dim=0)) / x.std(dim=0).clamp_min(1e-6)).float()
        n_train = len(x) * 4 // 5
        model = train_mlp(x[:n_train], y[:n_train], int(y.max()) + 1)
        accuracy = (model(x[n_train:]).argmax(dim=1) == y[n_train:]).float().mean()
        print(f"{name}: {x.shape[1]} features, accuracy {accuracy:.3f}", flush=True)
        return cls(Remembered(model), x[n_train : n_train + N_ROWS], None, HALF_ROWS)

    def attribute(
        self, explainer: str, output: str, surrogate: Any, sampling: str, n_samples: int, seed: int
    ) -> Tensor:
        """The package's attributions ``(B, D)``, LIME's less their means."""

        def forward(x: Tensor) -> Tensor:
            logits = self.model(x)
            return logits.softmax(dim=1) if output == "probability" else logits

        lime = explainer == "LIME"
        kernel_shap = KernelShap(forward, interpretable_model=None if lime else surrogate)
        method = Lime(forward, surrogate, MaskSimilarity()) if lime else kernel_shap
        attributions = method.attribute(
            self.x,
            target=self.model(self.x).argmax(dim=1),
            feature_mask=self.feature_mask,
            n_samples=n_samples,
            return_input_shape=False,
            sampling=sampling,
            generator=Generator().manual_seed(seed),
        ).double()
        return attributions - attributions.mean(dim=1, keepdim=True) if lime else attributions


def train_mlp(x: Tensor, y: Tensor, n_classes: int) -> nn.Sequential:
    """Two hidden layers of 256, trained in seconds."""
    torch.manual_seed(0)
    layers = (nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_classes))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(40):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.requires_grad_(False)


# --- running -------------------------------------------------------------------------------------------------------


def columns(explainer: str) -> dict[str, tuple[surrogates.Surrogate, str, int]]:
    """Surrogate, sampling and M of each column of the table."""
    models = SURROGATES[explainer]
    settings = {f"{s}, {name}": (model, s, 200) for s in SAMPLINGS[explainer] for name, model in models.items()}
    return {GOAL: (models["plain"], "independent", 800), **settings}


def limit(problem: Problem, explainer: str, output: str) -> tuple[Tensor, Tensor]:
    """The limit ``(B, D)`` and its own relative squared error ``(B,)``, example by example to save memory."""
    examples = [problem._replace(x=problem.x[i : i + 1]) for i in range(len(problem.x))]
    options = (explainer, output, *LIMITS[explainer], problem.n_half)
    first, second = (
        torch.cat([example.attribute(*options, seed=1000 * half + i) for i, example in enumerate(examples)])
        for half in (1, 2)
    )
    mean = (first + second) / 2
    return mean, relative_error(first, mean)


def relative_error(attributions: Tensor, reference: Tensor) -> Tensor:
    """Squared distances, example by example, over the reference's squared norms."""
    return (attributions - reference).square().sum(dim=1) / reference.square().sum(dim=1)


def measure(problem: Problem, output: str) -> Row:
    """Errors and cosines of each explainer's columns, an example each, and the errors of its limit."""
    row: Row = {"limit": {}, "errors": {}, "cosines": {}}
    for explainer in SAMPLINGS:
        reference, own = limit(problem, explainer, output)
        row["limit"][explainer] = rounded(own)
        row["errors"][explainer], row["cosines"][explainer] = {}, {}
        for column, options in columns(explainer).items():
            draws = [problem.attribute(explainer, output, *options, seed=seed) for seed in range(N_DRAWS)]
            errors = torch.stack([relative_error(draw, reference) for draw in draws])
            cosines = torch.stack([cosine_similarity(draw, reference) for draw in draws])
            row["errors"][explainer][column] = rounded(errors.mean(dim=0))
            row["cosines"][explainer][column] = rounded(cosines.mean(dim=0))
    return row


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def run(out: Path, root: Path, names: list[str]) -> None:
    """All data sets and outputs that are not yet done."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "sampling_noise.jsonl"
    for name in names:
        missing = [output for output in OUTPUTS if (name, output) not in read_results(results)]
        if not missing:
            continue
        problem = Problem.of(name, root)
        for output in missing:
            row = {"data": name, "output": output, **measure(problem, output)}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, output, flush=True)


# --- reporting -----------------------------------------------------------------------------------------------------


def read_results(path: Path) -> dict[tuple[str, str], Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["data"], row["output"]): row for row in rows}


def report(out: Path) -> None:
    """A table of errors, one of cosines, and a picture."""
    done = read_results(out / "sampling_noise.jsonl")
    rows = [done[name, output] for name in DATA for output in OUTPUTS if (name, output) in done]
    if not rows:
        return
    own = [
        f"{title(row)} " + ", ".join(f"{name} {statistics.fmean(errors):.1g}" for name, errors in row["limit"].items())
        for row in rows
    ]
    lines = [f"{PREFACE}\n{'; '.join(own)}.", "", *table(rows, "errors")]
    lines += ["", "Mean cosine with the limit.", "", *table(rows, "cosines"), ""]
    (out / "sampling_noise.md").write_text("\n".join(lines))
    draw(rows).savefig(out / "sampling_noise.png", dpi=110)
    print("\n".join(lines))


def title(row: Row) -> str:
    return f"{DATA[row['data']]} {row['output']}"


def table(rows: list[Row], score: str) -> list[str]:
    """A line for each data set, output and explainer, as Markdown."""
    names = list(dict.fromkeys(column for explainer in SAMPLINGS for column in columns(explainer)))
    lines = [["data, output, explainer", *names], ["---"] * (len(names) + 1)]
    for row in rows:
        for explainer, values in row[score].items():
            cells = [cell(values[name], values[GOAL], score) if name in values else "" for name in names]
            lines.append([f"{title(row)}, {explainer}", *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(values: list[float], goal: list[float], score: str) -> str:
    """Mean and median of errors, or the mean of cosines; bold where as good as the goal's."""
    sign, averages = (1, (statistics.fmean, statistics.median)) if score == "errors" else (-1, (statistics.fmean,))
    texts = []
    for average in averages:
        text = format(average(values), ".2g" if sign > 0 else ".3f")
        reached = values is not goal and sign * average(values) <= sign * average(goal)
        texts.append(f"**{text}**" if reached else text)
    return " / ".join(texts)


def draw(rows: list[Row]) -> Figure:
    """Mean errors: a panel for each explainer, a color for each design; a filled dot is the Bayesian surrogate's."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, explainer in zip(figure.subplots(1, 2, sharey=True), SAMPLINGS, strict=True):
        names = [name for name in columns(explainer) if not name.endswith("intercept")]
        for i, name in enumerate(names):
            places = [place + 0.1 * (i - (len(names) - 1) / 2) for place in range(len(rows))]
            means = [statistics.fmean(row["errors"][explainer][name]) for row in rows]
            style = {"color": COLORS[(i + 1) // 2], "fillstyle": "full" if i % 2 == 0 else "none", "label": name}
            axis.plot(places, means, "o" if i else "D", **style)
        axis.set_xticks(range(len(rows)), [title(row).replace(" ", "\n") for row in rows], fontsize=7)
        axis.set(title=explainer, yscale="log", ylabel="mean relative squared error, M = 200")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of CIFAR-10 and of tabular/*.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers however many cores a machine has
    if arguments.command == "run":
        run(arguments.out, arguments.data_root, arguments.data)
    report(arguments.out)


if __name__ == "__main__":
    main()
