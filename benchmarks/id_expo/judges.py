"""Does ID-ExpO's gain survive judges that it was not trained on?

The networks that `images.py` kept (those that validation chose for Grad-CAM at eta = 2, S = 0.5), compared by
`captum_idexpo.jury` on the same test images, the predicted class explained: other explainers (LIME,
IntegratedGradients) and other baselines (black, noise, the blurred image) than Grad-CAM and the mean colour that the
training had, ROAD, Captum's infidelity, and accuracy on half-masked images.

    python -m benchmarks.id_expo.judges cifar10 --data-root FOLDER

It writes a table, a page, and the value of each image by each judge.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Generator, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar10 import MEAN, STD
from benchmarks.id_expo.experiment import Results
from benchmarks.id_expo.images import KEPT, TASKS, Images, Task, chosen, load_chosen, methods
from captum_idexpo.attr import IntegratedGradients, LayerGradCam, id_expo_lime
from captum_idexpo.baselines import blurred, noise
from captum_idexpo.feature_masks import grid
from captum_idexpo.jury import METRICS, Comparison, compare

N_IMAGES = 100
BASELINES = {
    "mean colour": 0.0,
    "black": -MEAN / STD,
    "noise": noise(generator=Generator().manual_seed(0)),
    "blur": blurred(5.0),
}
# LIME is explained once for each image: its sensitivity, eleven explanations, would cost more than all the rest.
JUDGED = [metric for metric in METRICS if metric != "sensitivity"]


def judge(task: Task, networks: dict[str, nn.Module], images: TensorDataset) -> Comparison:
    """All networks on the same images."""
    return compare(
        networks,
        DataLoader(images, batch_size=25),
        {
            "Grad-CAM": lambda model: LayerGradCam(model, model.get_submodule(task.layer)),
            "LIME": id_expo_lime,
            "IntegratedGradients": IntegratedGradients,
        },
        BASELINES,
        JUDGED,
        reference="CE-only",
        trained_on=["Grad-CAM", "mean colour"],
        feature_mask={"LIME": partial(grid, cell_size=task.cell)},
        attribute_kwargs={
            "Grad-CAM": {"relu_attributions": True},
            "LIME": {"n_samples": 200, "sampling": "independent"},
            "IntegratedGradients": {"n_steps": 20},
        },
        fraction=KEPT[0],
        show_progress=True,
    )


def run(name: str, root: Path | None, out: Path) -> None:
    """Judge the kept networks, and write table, page and values."""
    task, kept = TASKS[name], Results(out / f"{name}.jsonl")
    names = methods(chosen(kept), "Grad-CAM")
    networks = {method: load_chosen(name, method, "Grad-CAM", kept, root, out) for method in names}
    found = judge(task, networks, TensorDataset(*Images(task, root).classified[:N_IMAGES]))
    results = Results(out / f"judges_{name}.jsonl")
    for method, scores in found.examples.items():
        values = {str(judge): [round(value, 4) for value in given.tolist()] for judge, given in scores.items()}
        results.add({"network": method, "scores": values})
    (out / f"judges_{name}.md").write_text(found.table() + "\n")
    found.to_html(out / f"judges_{name}.html")


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
