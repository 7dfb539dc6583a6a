"""Does ID-ExpO's gain survive judges that it was not trained on?

The networks that `images.py` kept (those that validation chose for Grad-CAM at eta = 2, S = 0.5), all judged on the
same test images, the predicted class explained:

* other explainers: LIME and IntegratedGradients;
* other baselines: black, noise and the blurred image in the place of the mean colour;
* ROAD's question (Rong et al. 2022, arXiv 2202.00449): masked pixels are imputed by their neighbours, so that no mask
  shows; the probability that remains when the least relevant pixels go, minus that when the most relevant go;
* Captum's infidelity (normalised, of superpixels at the mean colour) and sensitivity_max;
* missingness (Jain et al. 2022): accuracy on images half of whose superpixels, drawn at random, have the mean colour.

    python -m benchmarks.id_expo.judges cifar10 --data-root FOLDER

A run that was stopped goes on where it stopped, a network at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import gaussian_blur

from benchmarks.cifar10 import MEAN, STD
from benchmarks.digits import mean_and_error
from benchmarks.id_expo.experiment import Results, Row, markdown
from benchmarks.id_expo.images import KEPT, TASKS, Images, Task, chosen, load_chosen, methods
from captum_idexpo.attr import IntegratedGradients
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import InsertionDeletion

N_IMAGES = 100
BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "black": lambda x: (-MEAN / STD).expand_as(x),
    "noise": lambda x: torch.randn(x.shape, generator=Generator().manual_seed(0)),
    "blur": lambda x: gaussian_blur(x, [15, 15], [5.0, 5.0]),
}
REMOVED = (0.1, 0.2, 0.3, 0.4, 0.5)
# An imputed pixel is the mean of its neighbours, those at the corners counting half.
NEIGHBOURS = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]]) / 12


def judge(task: Task, model: nn.Module, classified: TensorDataset) -> dict[str, list[float]]:
    """Each image's scores by every judge; missingness for all images that are classified."""
    torch.manual_seed(0)
    x = classified[:N_IMAGES][0]
    with torch.no_grad():
        predicted = model(x).argmax(dim=1)
    scores: dict[str, Tensor] = {}
    explainers = {
        "Grad-CAM": partial(task.insertion_deletion, "Grad-CAM", model, step_size=task.step_size),
        "LIME": partial(task.insertion_deletion, "LIME", model),
        "IntegratedGradients": partial(
            InsertionDeletion,
            IntegratedGradients(model),
            baselines=0.0,
            step_size=task.step_size,
            attribute_kwargs={"n_steps": 20},
        ),
    }
    for title, make in explainers.items():
        keep(scores, title, make(fraction=KEPT[0]), x, predicted)
    for title, baseline in BASELINES.items():
        regularizer = task.insertion_deletion("Grad-CAM", model, step_size=task.step_size, fraction=KEPT[0])
        regularizer.baselines = baseline
        keep(scores, f"Grad-CAM, {title}", regularizer, x, predicted)
    explain = partial(grad_cam, task, model)
    scores["ROAD"] = road(model, x, explain(x, predicted), predicted)
    scores["infidelity"] = infidelity_of_cells(task, model, x, explain(x, predicted), predicted)
    scores["sensitivity_max"] = sensitivity_max(
        lambda inputs, target: (explain(inputs[0], target),),
        x,
        perturb_radius=0.1,
        n_perturb_samples=10,
        target=predicted,
    )
    scores["masked accuracy"] = masked_accuracy(task, model, classified)
    return {title: [round(value, 4) for value in values.tolist()] for title, values in scores.items()}


def keep(scores: dict[str, Tensor], title: str, regularizer: InsertionDeletion, x: Tensor, predicted: Tensor) -> None:
    found = regularizer.scores(x, predicted)
    scores[f"{title}: insertion"] = found.insertion
    scores[f"{title}: 1 - deletion"] = 1 - found.deletion


def grad_cam(task: Task, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The map that is ranked, ``(B, 1, H, W)``."""
    (attribution,) = task.insertion_deletion("Grad-CAM", model).attribution(x, target)
    return attribution


@torch.no_grad()
def road(model: nn.Module, x: Tensor, attribution: Tensor, target: Tensor) -> Tensor:
    """Mean over shares of pixels: probability without the least relevant minus without the most relevant."""
    order = attribution.flatten(1).argsort(dim=1, descending=True, stable=True)
    difference = torch.zeros(len(x))
    for share in REMOVED:
        n = int(share * order.shape[1])
        for sign, removed in ((1, order[:, -n:]), (-1, order[:, :n])):
            mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, removed, True).view_as(attribution)
            probability = model(imputed(x, mask)).softmax(dim=1).gather(1, target[:, None])[:, 0]
            difference += sign * probability / len(REMOVED)
    return difference


def imputed(x: Tensor, mask: Tensor) -> Tensor:
    """Masked pixels as the solution of "each is the mean of its neighbours", and a little noise.

    Rong et al. solve the sparse system; so many Jacobi steps come within a hundredth of it on 32 pixels.
    """
    weights = NEIGHBOURS.expand(3, 1, 3, 3)
    inside = conv2d(torch.ones_like(x), weights, padding=1, groups=3)  # at a border there are fewer neighbours
    result = torch.where(mask, 0.0, x)
    for _ in range(300):
        result = torch.where(mask, conv2d(result, weights, padding=1, groups=3) / inside, x)
    noise = 0.05 * torch.randn(x.shape, generator=Generator().manual_seed(0))
    return torch.where(mask, result + noise, x)


def infidelity_of_cells(task: Task, model: nn.Module, x: Tensor, attribution: Tensor, target: Tensor) -> Tensor:
    """Captum's, where a perturbation puts a fifth of the superpixels to the mean colour."""
    cells = grid(x, task.cell)
    n_cells = int(cells.max()) + 1
    generator = Generator().manual_seed(0)

    def perturb(images: Tensor) -> tuple[Tensor, Tensor]:
        masked = (torch.rand(len(images), n_cells, generator=generator) < 0.2)[:, cells.flatten()]
        masked = masked.view(len(images), 1, *images.shape[2:])
        return masked.expand_as(images).to(images.dtype), images * ~masked

    with torch.no_grad():
        return infidelity(
            lambda images: model(images).softmax(dim=1),
            perturb,
            x,
            attribution.expand_as(x),
            target=target,
            n_perturb_samples=50,
            max_examples_per_batch=500,
            normalize=True,
        )


@torch.no_grad()
def masked_accuracy(task: Task, model: nn.Module, data: TensorDataset) -> Tensor:
    """Each image's share of right predictions over three masks."""
    generator = Generator().manual_seed(0)
    right = []
    for x, y in DataLoader(data, batch_size=250):
        cells = grid(x, task.cell)
        kept = torch.rand(3, len(x), int(cells.max()) + 1, generator=generator) < 0.5
        kept = kept[..., cells.flatten()].view(3, len(x), 1, *x.shape[2:])
        predicted = model((x * kept).flatten(0, 1)).argmax(dim=1).view(3, -1)
        right.append((predicted == y).double().mean(dim=0))
    return torch.cat(right)


def run(name: str, root: Path | None, out: Path) -> None:
    """All networks that are not yet judged."""
    task, results = TASKS[name], Results(out / f"judges_{name}.jsonl")
    classified = Images(task, root).classified
    kept = Results(out / f"{name}.jsonl")
    for method in methods(chosen(kept), "Grad-CAM"):
        if not results.has(network=method):
            scores = judge(task, load_chosen(name, method, "Grad-CAM", kept, root, out), classified)
            results.add({"network": method, "scores": scores})
            print(method, {score: round(mean_and_error(values)[0], 3) for score, values in scores.items()}, flush=True)
    (out / f"judges_{name}.md").write_text(table(results.rows))


def table(rows: list[Row]) -> str:
    """Means over the images; in brackets the paired difference to CE-only and its standard error."""
    plain: dict[str, Any] = next(row for row in rows if row["network"] == "CE-only")
    lines = []
    for score in rows[0]["scores"]:
        line = [score]
        for row in rows:
            values = row["scores"][score]
            line.append(f"{mean_and_error(values)[0]:.3f}")
            if row["network"] not in ("CE-only", "before"):
                differences = [a - b for a, b in zip(values, plain["scores"][score], strict=True)]
                line[-1] += " ({:+.3f} ± {:.3f})".format(*mean_and_error(differences))
        lines.append(line)
    return markdown(["judge", *(row["network"] for row in rows)], lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data-root", type=Path, help="folder of the images; None: downloads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.task, arguments.data_root, arguments.out)


if __name__ == "__main__":
    main()
