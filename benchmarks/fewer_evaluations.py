"""Which steps should an update of ID-ExpO draw, and how many? The noise of its gradient, without a training run.

In an update `InsertionDeletion` draws k of the T steps of insertion and deletion for each image. The gradients in all
weights, of each image at each step, give the noise of every way to draw the steps: an estimate with weights w of the
steps, instead of 1/T, has the squared error (w - 1/T)' G (w - 1/T), where G holds the products of the steps' gradients.
Ways without bias:

* strata: one step from each of k strata, the same steps for insertion and deletion;
* independent: each of the k steps from all steps;
* apart: as strata, with other steps for deletion than for insertion;
* mirrored: as strata, with deletion at the mirrored place of each stratum;
* one place: the same place in every stratum, drawn once (systematic sampling), which is what `InsertionDeletion` does;
* by size: drawn by the mean size of the steps' gradients, which training does not know.

Outputs that are kept from the epoch before can serve no such estimate: they have no gradient.

    python benchmarks/fewer_evaluations.py run --studies "digits, Grad-CAM" "digits, LIME" "table, KernelSHAP"
    python benchmarks/fewer_evaluations.py run --studies "CIFAR-10, Grad-CAM" --data-root FOLDER     see cifar10.py
    python benchmarks/fewer_evaluations.py report

Each study takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cifar10 import load_images, pretrained_resnet20
from digits import Split, mean_and_error, pretrain
from sklearn.datasets import load_breast_cancer
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from captum_idexpo.attr import KernelShap, LayerGradCam, id_expo_lime
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import insertion_deletion

N_DRAWS = 4000
COUNTS = (1, 2, 4, 8, 16)
OVERHEAD = 2  # evaluations of an image beside 2 k copies: the task's and Grad-CAM's explanation


class Problem(NamedTuple):
    """A trained network, images or rows that it was trained on, and their explanation."""

    model: nn.Module
    x: Tensor
    y: Tensor
    explain: Callable[[Tensor, Tensor], Tensor]  # an attribution with a graph
    feature_mask: Callable[[Tensor], Tensor] | None = None


# --- ways to draw ---------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """T steps in k strata, from which estimates are drawn."""

    k: int
    n_steps: int
    sizes: Tensor  # of each step's gradient, `(T,)`
    generator: Generator

    def uniform(self, n: int) -> Tensor:
        """Numbers in [0, 1), `(n, k)`."""
        return torch.rand(n, self.k, generator=self.generator)

    def in_strata(self, places: Tensor) -> Tensor:
        """The weights `(n, T)` of one step from each stratum, at the given places of it, `(n, k)`."""
        bounds = torch.arange(self.k + 1) * self.n_steps // self.k
        sizes = bounds.diff()
        steps = bounds[:-1] + torch.minimum((places * sizes).long(), sizes - 1)
        return self.weighted(steps, (sizes / self.n_steps).expand(places.shape))

    def weighted(self, steps: Tensor, weights: Tensor) -> Tensor:
        """The weights of all steps `(n, T)`, 0 where a step was not drawn."""
        return torch.zeros(len(steps), self.n_steps).scatter_add_(1, steps, weights)


def strata(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    drawn = steps.in_strata(steps.uniform(n))
    return drawn, drawn


def independent(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    places = torch.randint(steps.n_steps, (n, steps.k), generator=steps.generator)
    drawn = steps.weighted(places, torch.full(places.shape, 1 / steps.k))
    return drawn, drawn


def apart(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    return steps.in_strata(steps.uniform(n)), steps.in_strata(steps.uniform(n))


def mirrored(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    places = steps.uniform(n)
    return steps.in_strata(places), steps.in_strata(1 - places)


def one_place(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    drawn = steps.in_strata(steps.uniform(n)[:, :1].expand(n, steps.k))
    return drawn, drawn


def by_size(steps: Steps, n: int) -> tuple[Tensor, Tensor]:
    shares = steps.sizes / steps.sizes.sum()
    points = (torch.arange(steps.k) + steps.uniform(n)) / steps.k
    places = torch.searchsorted(shares.cumsum(0), points).clamp_max(steps.n_steps - 1)
    drawn = steps.weighted(places, 1 / (steps.k * steps.n_steps * shares[places]))
    return drawn, drawn


WAYS = {
    "strata": strata,
    "independent": independent,
    "apart": apart,
    "mirrored": mirrored,
    "one place": one_place,
    "by size": by_size,
}


# --- gradients ------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Of each image: the products of its steps' gradients, insertion's T before deletion's, and their mean."""

    products: Tensor  # (n, 2 T, 2 T)
    means: Tensor  # (n, n_weights), the sum of both terms

    @property
    def between_images(self) -> float:
        """The squared distance of an image's gradient to that of all images."""
        return float((self.means - self.means.mean(dim=0)).square().sum() / (len(self.means) - 1))


def gradients(problem: Problem) -> Gradients:
    """Gradients of both terms' steps in all weights, image by image."""
    products, means = [], []
    for x, y in zip(problem.x.split(1), problem.y.split(1), strict=True):
        steps = torch.stack([flat(step, problem.model) for step in penalties(problem, x, y)]).double()
        products.append(steps @ steps.T)
        means.append(2 * steps.mean(dim=0))
    return Gradients(torch.stack(products), torch.stack(means))


def penalties(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """The loss of insertion and of deletion ("complement") at each step of one image, `(2 T,)`."""
    scores = insertion_deletion(
        problem.model,
        x,
        problem.explain(x, y),
        baselines=0.0,
        feature_mask=None if problem.feature_mask is None else problem.feature_mask(x),
        target=y,
        fraction=0.5,
        temperature="auto",
    )
    return -torch.cat([scores.insertion_curve[0].log(), torch.log1p(-scores.deletion_curve[0].clamp_max(1 - 1e-6))])


def flat(value: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def noise(found: Gradients, way: Callable[[Steps, int], tuple[Tensor, Tensor]], k: int) -> Tensor:
    """The squared error of each image's gradient by drawn steps, over that of the batch's one image, `(n,)`."""
    n_steps = found.products.shape[1] // 2
    sizes = found.products.diagonal(dim1=1, dim2=2).mean(dim=0).sqrt().view(2, n_steps).mean(dim=0).float()
    drawn = way(Steps(k, n_steps, sizes, Generator().manual_seed(0)), N_DRAWS)
    wrong = (torch.cat(drawn, dim=1) - 1 / n_steps).double()
    errors = torch.einsum("di,nij,dj->n", wrong, found.products, wrong) / N_DRAWS
    return errors / found.between_images


def measure(found: Gradients) -> dict[str, Any]:
    """For each number of steps the noise of each way, and its difference to that of the strata with its error."""
    rows = {}
    for k in (k for k in COUNTS if 2 * k < found.products.shape[1]):
        by_way = {name: noise(found, way, k) for name, way in WAYS.items()}
        rows[str(k)] = {
            name: {
                "noise": float(values.mean()),
                "to strata": list(mean_and_error((values - by_way["strata"]).tolist())),
            }
            for name, values in by_way.items()
        }
    return rows


# --- problems -------------------------------------------------------------------------------------------------------


def enlarged_grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    explainer = LayerGradCam(model, layer)
    return interpolate(explainer.attribute(x, target=y, create_graph=True, relu_attributions=True), x.shape[-2:])


def digits_grad_cam(_: Path | None) -> Problem:
    split = Split.of_seed(0)
    model = pretrain(split, 0).eval()
    return Problem(model, *split.train[:96], partial(enlarged_grad_cam, model, model[5]))


def digits_lime(_: Path | None) -> Problem:
    problem = digits_grad_cam(None)
    cells = partial(grid, cell_size=1)
    arguments = {"n_samples": 192, "sampling": "independent", "create_graph": True, "baselines": 0.0}

    def explain(x: Tensor, y: Tensor) -> Tensor:
        generator = Generator().manual_seed(0)
        lime = id_expo_lime(problem.model)
        values: Tensor = lime.attribute(x, target=y, feature_mask=cells(x), generator=generator, **arguments)
        return values

    return problem._replace(x=problem.x[:48], y=problem.y[:48], explain=explain)


def table_kernel_shap(_: Path | None) -> Problem:
    features, classes = load_breast_cancer(return_X_y=True)
    x = torch.tensor(features, dtype=torch.float32)
    x, y = (x - x.mean(dim=0)) / x.std(dim=0), torch.tensor(classes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(x[:400]), y[:400]).backward()
        optimizer.step()

    def explain(x: Tensor, y: Tensor) -> Tensor:
        arguments = {"n_samples": 90, "sampling": "independent", "generator": Generator().manual_seed(0)}
        values: Tensor = KernelShap(model).attribute(x, baselines=0.0, target=y, create_graph=True, **arguments)
        return values

    return Problem(model, x[:96], y[:96], explain)


def cifar_grad_cam(root: Path | None) -> Problem:
    model = pretrained_resnet20(root).eval()
    x, y = load_images(root, "train", slice(0, 32))[:]
    return Problem(model, x, y, partial(enlarged_grad_cam, model, model.layer3), partial(grid, cell_size=4))


STUDIES = {
    "digits, Grad-CAM": digits_grad_cam,
    "digits, LIME": digits_lime,
    "table, KernelSHAP": table_kernel_shap,
    "CIFAR-10, Grad-CAM": cifar_grad_cam,
}


# --- the report -----------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """The noise of each way with k = 4, and the noise of the strata for the same number of evaluations."""
    lines = ["| k = 4 | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    for study, rows in results.items():
        cells = [shown(rows["4"][name], name) for name in WAYS]
        lines.append(f"| {study} | " + " | ".join(cells) + " |")
    lines += ["", "| noise for as many evaluations, k = 4 is 1 | " + " | ".join(f"k = {k}" for k in COUNTS) + " |"]
    lines.append("| --- |" + " --- |" * len(COUNTS))
    for study, rows in results.items():
        costs = {k: (1 + row["strata"]["noise"]) * (OVERHEAD + 2 * int(k)) for k, row in rows.items()}
        cells = [f"{costs[str(k)] / costs['4']:.2f}" if str(k) in costs else "" for k in COUNTS]
        lines.append(f"| {study} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(row: dict[str, Any], way: str) -> str:
    mean, error = row["to strata"]
    return f"{row['noise']:.3f}" if way == "strata" else f"{mean:+.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--data-root", type=Path, help="folder of cifar10.py's files; None: downloaded")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "fewer_evaluations.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for study in arguments.studies if arguments.command == "run" else ():
        results[study] = measure(gradients(STUDIES[study](arguments.data_root)))
        path.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "fewer_evaluations.md").write_text(report(results) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
