"""CIFAR-10: does ID-ExpO's gain survive judges that took no part in the training, and what does it cost?

The pretrained ResNet-20 of He et al. is fine-tuned in three experiments, each with five seeds. All arms of a seed start
from the same weights and draw from the same images. They train for the same time on a core, except "CE-only", which has
as many updates as ID-ExpO.

* `gradcam`: Grad-CAM on the 8x8 stage, 1,000 updates of eight images.
* `gradcam_s03`: the same with S = 0.3, which the paper's figure 3 has too: CE-only and ID-ExpO.
* `lime`: LIME on 64 superpixels, 100 updates of eight images. The network first learns to read masked images
  (`RandomMasking`), because the published one cannot. The arms start from there.

The arms:

* CE-only: the task loss alone, in `lime` also for the same time.
* CE-only, surer (`gradcam` only): the same, with all logits multiplied by the factor from 1 to 5 that has the best
  validation score, as in `tables.py`.
* masks alone: the task loss and `RandomMasking`.
* ID-ExpO: insertion and deletion of the explanation, with deletion as "ratio" (the paper's) or as "complement".
* in turn (`gradcam` only): ID-ExpO with "complement". Grad-CAM or IntegratedGradients is drawn for each update, and the
  mean colour or noise as the baseline for each image. A run of one seed chose it as the candidate for a recipe, before
  any run of this script. It holds on images if, under the accuracy limit and over the five seeds, both order gains
  of Grad-CAM with black and blurred masks, and of LIME with both and with the mean colour, exceed those of CE-only
  by more than two standard errors, ROAD rises, infidelity does not, and accuracy falls by less than one point.

The published network has seen every training image, so the first half of the test images chooses the epoch, and the
second half is reported. Each seed has 500 images of its own to choose by, 1,000 to count accuracy on, and the first 100
of these for all other judges. Two rules choose, as in `tables.py`: the best validation score at eta = 2, and the same
among the epochs whose accuracy has not fallen by more than one point, plus one standard error. The predicted class is
explained. All explainers are judged on the same 64 cells of 4x4 pixels. The share S of them is inserted or deleted, 0.5
where nothing is said.

    python -m benchmarks.id_expo.images run gradcam --data-root FOLDER       compact files, see benchmarks/cifar10.py
    python -m benchmarks.id_expo.images run lime                             torchvision downloads into ./data
    python -m benchmarks.id_expo.images report

A run that was stopped continues with the first missing arm.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import cifar10
from benchmarks.cifar10 import MEAN, STD
from benchmarks.id_expo.experiment import (
    DOES_NOT_RISE,
    KEEPS_ACCURACY,
    RISES,
    RULES,
    BestScore,
    Chosen,
    Column,
    InTurn,
    Results,
    Row,
    by_rule,
    difference_table,
    gain,
    markdown,
    quiet,
    surer,
    value,
    verdicts,
)
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import IntegratedGradients, LayerGradCam, id_expo_lime
from captum_idexpo.baselines import blurred, mixture, noise
from captum_idexpo.feature_masks import grid
from captum_idexpo.jury import compare
from captum_idexpo.metrics import InsertionDeletionScores, sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion, RandomMasking
from captum_idexpo.visualization import plot_quadrants

N_LOCATIONS = 4  # of sensitivity-n
MAX_ACCURACY_DROP = 0.01
BY_MASKS = ("accuracy", "masked_accuracy", "insertion", "deletion", "insertion_gain", "deletion_gain")
BASELINES = {"mean colour": 0.0, "black": -MEAN / STD, "blur": blurred(5.0)}


class Arm(NamedTuple):
    """One way to fine-tune the network."""

    method: str
    n_updates: int
    weight: float = 0.0
    form: str = ""


class Images(NamedTuple):
    """The images of a seed."""

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


class Experiment(NamedTuple):
    """A network, an explainer, and the arms."""

    explainer: str
    arms: tuple[Arm, ...]
    n_warm_up: int = 0  # updates with masks before all arms
    pretrained: Callable[[Path | None], nn.Module] = cifar10.pretrained_resnet20
    load: Callable[[Path | None, str, slice], TensorDataset] = cifar10.load_images
    layer: str = "layer3"  # Grad-CAM's
    last_layer: str = "linear"  # whose outputs are the logits
    cell: int = 4  # pixels of a superpixel's side
    n_train: int = 50_000
    n_val: int = 500
    n_test: int = 1000
    n_explained: int = 100
    first_test: int = 5000
    batch_size: int = 8
    learning_rate: float = 3e-4
    n_samples: int = 100
    n_epochs: int = 4
    fraction: float = 0.5  # S
    seeds: range = range(5)

    def images(self, root: Path | None, seed: int) -> Images:
        """Return the images of a seed; no two seeds share one of validation or test."""
        val, test = seed * self.n_test, self.first_test + seed * self.n_test
        return Images(
            self.load(root, "train", slice(0, self.n_train)),
            self.load(root, "test", slice(val, val + self.n_val)),
            self.load(root, "test", slice(test, test + self.n_test)),
        )

    def mask(self, images: Tensor) -> Tensor:
        """Return the cells that are masked together."""
        return grid(images, self.cell)

    def explainers(self) -> dict[str, Callable[[nn.Module], object]]:
        """Return by name what makes an explainer of a network."""
        return {
            "Grad-CAM": lambda model: LayerGradCam(model, model.get_submodule(self.layer)),
            "LIME": id_expo_lime,
        }

    def attribute_kwargs(self) -> dict[str, dict[str, object]]:
        """Return by name the arguments of the explainers."""
        return {
            "Grad-CAM": {"relu_attributions": True},
            "LIME": {"n_samples": self.n_samples, "sampling": "independent"},
        }

    def insertion_deletion(self, model: nn.Module, explainer: str, seed: int, **settings: object) -> InsertionDeletion:
        """Return the terms of one explainer."""
        return InsertionDeletion(
            self.explainers()[explainer](model),
            forward_func=model,
            feature_mask=self.mask,
            attribute_kwargs=self.attribute_kwargs()[explainer],
            generator=Generator().manual_seed(seed),
            **({"baselines": 0.0, "fraction": self.fraction, "steps_per_update": 2} | settings),
        )

    def regularizers(self, arm: Arm, model: nn.Module, seed: int) -> list[nn.Module]:
        """Return the terms of an arm. Masked pixels have the mean colour of the training images, 0."""
        generator = Generator().manual_seed(seed)
        if arm.method.startswith("CE-only"):
            return []
        if arm.method == "masks alone":
            return [RandomMasking(model, baselines=0.0, feature_mask=self.mask, generator=generator)]
        settings = {"insertion_weight": arm.weight, "deletion_weight": arm.weight, "deletion_form": arm.form}
        if arm.method == "ID-ExpO":
            return [self.insertion_deletion(model, self.explainer, seed, **settings)]
        settings["baselines"] = mixture(0.0, noise(generator=generator), generator=generator)
        grad_cam = self.insertion_deletion(model, "Grad-CAM", seed, **settings)
        gradients = InsertionDeletion(
            IntegratedGradients(model),
            feature_mask=self.mask,
            attribute_kwargs={"n_steps": 5},
            generator=generator,
            fraction=self.fraction,
            steps_per_update=2,
            **settings,
        )
        return [InTurn([grad_cam, gradients], generator)]


# The numbers of updates make the times equal, from the seconds of an update on one core: ID-ExpO 0.28 with Grad-CAM and
# 3.0 with LIME, in turn 0.43, masks alone 0.075 to 0.087, the task alone 0.06.
PLAIN, SURER = Arm("CE-only", 1000), Arm("CE-only, surer", 1000)
RATIO, COMPLEMENT = (Arm("ID-ExpO", 1000, 0.03, form) for form in ("ratio", "complement"))
SAME_TIME = Arm("CE-only, same time", 5000)
EXPERIMENTS = {
    "gradcam": Experiment(
        "Grad-CAM",
        (
            PLAIN,
            SURER,
            RATIO,
            COMPLEMENT,
            Arm("in turn", 660, 0.03, "complement"),
            Arm("masks alone", 3300),
        ),
    ),
    "gradcam_s03": Experiment("Grad-CAM", (PLAIN, RATIO, COMPLEMENT), fraction=0.3),
    "lime": Experiment(
        "LIME",
        (
            Arm("CE-only", 100),
            SAME_TIME,
            Arm("masks alone", 3900),
            Arm("ID-ExpO", 100, 0.2, "ratio"),
            Arm("ID-ExpO", 100, 0.2, "complement"),
        ),
        n_warm_up=2000,
        n_epochs=2,
    ),
}


def fine_tune(experiment: Experiment, arm: Arm, model: nn.Module, images: Images, seed: int) -> Chosen:
    """Train, and return by rule the chosen epoch and its weights."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=experiment.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    best = BestScore()
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        experiment.regularizers(arm, model, seed),
        evaluation=experiment.insertion_deletion(model, experiment.explainer, seed, step_size=2),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, experiment.n_epochs),
        max_accuracy_drop=MAX_ACCURACY_DROP,
        patience=experiment.n_epochs,
        callbacks=[best],
        show_progress=False,
    )
    updates = batches(experiment, arm.n_updates // experiment.n_epochs, images, seed)
    validation = DataLoader(images.val, 250)
    chosen = by_rule(trainer.fit(updates, validation, epochs=experiment.n_epochs), best, model)
    return surer(trainer, chosen, validation, experiment.last_layer) if arm.method == SURER.method else chosen


def batches(experiment: Experiment, n_updates: int, images: Images, seed: int) -> DataLoader:
    """Return a loader of random batches, as many as an epoch has updates."""
    generator = Generator().manual_seed(seed)
    n_images = n_updates * experiment.batch_size
    sampler = torch.utils.data.RandomSampler(images.train, num_samples=n_images, generator=generator)
    return DataLoader(images.train, experiment.batch_size, sampler=sampler)


def warmed_up(experiment: Experiment, model: nn.Module, images: Images, seed: int) -> nn.Module:
    """Return the network after it has learned to read masked images."""
    if not experiment.n_warm_up:
        return model
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=5e-4)
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        experiment.regularizers(Arm("masks alone", 0), model, seed),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, experiment.n_warm_up),
        scheduler_interval="update",
        show_progress=False,
    )
    trainer.fit(batches(experiment, experiment.n_warm_up, images, seed))
    return model


@torch.no_grad()
def judge(experiment: Experiment, model: nn.Module, images: Images) -> dict[str, float | list[float]]:
    """Return the mean of each judge, and the scores of each image by the judges of the training."""
    explained = TensorDataset(*images.test[: experiment.n_explained])
    found = partial(
        compare,
        {"model": model},
        DataLoader(explained, 100),
        experiment.explainers(),
        feature_mask=experiment.mask,
        attribute_kwargs=experiment.attribute_kwargs(),
        fraction=experiment.fraction,
        step_size=2,
        n_random_orders=2,
        n_perturbations=5,
    )
    values = found(BASELINES, BY_MASKS).examples["model"]
    values |= found({"mean colour": 0.0}, ("road", "infidelity")).examples["model"]
    means = {str(name): float(scores.double().mean()) for name, scores in values.items()}
    means["accuracy"] = accuracy(model, images.test)
    means["sensitivity_n"] = correlation(experiment, model, explained)
    own = {name: values[name] for name in values if name[1:] == (experiment.explainer, "mean colour")}
    kept = {f"each {name.metric}": own[name] for name in own if name.metric in ("insertion", "deletion")}
    each = {name: [round(value, 4) for value in scores.tolist()] for name, scores in kept.items()}
    return {**{name: round(value, 5) for name, value in means.items()}, **each}


def accuracy(model: nn.Module, images: TensorDataset) -> float:
    """Return the share of images that are classified right."""
    right = [model.eval()(x).argmax(dim=1) == y for x, y in DataLoader(images, 250)]
    return float(torch.cat(right).double().mean())


def correlation(experiment: Experiment, model: nn.Module, images: TensorDataset) -> float:
    """Return sensitivity-n of the trained explainer."""
    x, _ = images.tensors
    predicted = model(x).argmax(dim=1)
    (maps,) = experiment.insertion_deletion(model, experiment.explainer, 0).attribution(x, predicted)
    generator = Generator().manual_seed(0)
    mask = experiment.mask(x)
    return float(
        sensitivity_n(model, x, maps, N_LOCATIONS, feature_mask=mask, target=predicted, generator=generator).mean()
    )


def run(name: str, experiment: Experiment, root: Path | None, out: Path) -> None:
    """Run and judge all arms that are missing, and write a row for each."""
    results = Results(out / f"images_{name}.jsonl")
    start_arm = Arm("start", 0)
    for seed in experiment.seeds:
        missing = [arm for arm in (start_arm, *experiment.arms) if not results.has(seed=seed, **arm._asdict())]
        if not missing:
            continue
        images = experiment.images(root, seed)
        with quiet():
            network = warmed_up(experiment, experiment.pretrained(root), images, seed)
            for arm in missing:
                results.add({"seed": seed, **arm._asdict(), **measure(experiment, arm, network, images, seed)})
                print(name, seed, *arm, results.rows[-1]["seconds"], flush=True)


def measure(experiment: Experiment, arm: Arm, network: nn.Module, images: Images, seed: int) -> dict[str, object]:
    """Fine-tune a copy and judge what each rule chose; "start" is judged as it is."""
    start, model = time.process_time(), copy.deepcopy(network)
    chosen = dict.fromkeys(RULES, (0, copy.deepcopy(network.state_dict())))
    if arm.method != "start":
        chosen = fine_tune(experiment, arm, model, images, seed)
    row: dict[str, object] = {"seconds": round(time.process_time() - start, 1)}
    judged: dict[int, object] = {}
    for rule, (epoch, weights) in chosen.items():
        model.load_state_dict(weights)
        judged[epoch] = judged.get(epoch) or judge(experiment, model, images)
        row[rule] = {"epoch": epoch, **judged[epoch]}
    return row


# --- the report ----------------------------------------------------------------------------------------------------

RECIPE = {
    "accuracy": KEEPS_ACCURACY,
    **{
        f"{metric}_gain, {name}": RISES
        for name in ("Grad-CAM, black", "Grad-CAM, blur", "LIME, mean colour", "LIME, black", "LIME, blur")
        for metric in ("insertion", "deletion")
    },
    "road, Grad-CAM": RISES,
    "infidelity, Grad-CAM, mean colour": DOES_NOT_RISE,
}
RECIPE_ARM = next(arm for arm in EXPERIMENTS["gradcam"].arms if arm.method == "in turn")


def columns(experiment: Experiment) -> dict[str, Column]:
    """Return the columns of a table; an explainer's are mean order gains."""
    own = experiment.explainer
    other = next(name for name in experiment.explainers() if name != own)
    return {
        "accuracy": value("accuracy"),
        "half-masked accuracy": value("masked_accuracy, mean colour"),
        "insertion": value(f"insertion, {own}, mean colour"),
        "deletion": value(f"deletion, {own}, mean colour"),
        own: gain(f"{own}, mean colour"),
        f"{own}, black": gain(f"{own}, black"),
        f"{own}, blur": gain(f"{own}, blur"),
        other: gain(f"{other}, mean colour"),
        f"{other}, blur": gain(f"{other}, blur"),
        "ROAD": value(f"road, {own}"),
        "infidelity": value(f"infidelity, {own}, mean colour"),
        "sensitivity-n": value("sensitivity_n"),
    }


def title(arm: Arm) -> str:
    """Return the name of an arm in tables."""
    return f"{arm.method}, {arm.form}" if arm.method == "ID-ExpO" else arm.method


def complete(experiment: Experiment, results: Results) -> dict[str, list[Row]]:
    """Return by arm the rows of the seeds that are complete."""
    arms = (Arm("start", 0), *experiment.arms)
    seeds = [seed for seed in experiment.seeds if all(results.has(seed=seed, **arm._asdict()) for arm in arms)]
    return {title(arm): [results.where(seed=seed, **arm._asdict())[0] for seed in seeds] for arm in arms}


def report(experiment: Experiment, rows: dict[str, list[Row]]) -> str:
    """Return the tables of both rules, the shares of images that change both ways, and the verdict on the recipe."""
    n_seeds = len(rows["start"])
    parts = [f"Seeds: {n_seeds}, explained images: {n_seeds * experiment.n_explained}."]
    heads = {"limit": "Within the accuracy limit", "score": "By the validation score alone"}
    if all(row["limit"] == row["score"] for found in rows.values() for row in found):
        heads = {"score": "Both rules chose the same epochs"}
    for rule, head in heads.items():
        arms = {arm: [row[rule] for row in found] for arm, found in rows.items()}
        table = difference_table(arms, "CE-only", columns(experiment), absolute=["start"])
        parts.append(
            f"#### {experiment.explainer}, S = {experiment.fraction}. {head}\n\n{table}\n\n{both_ways(rows, rule)}"
        )
    if title(RECIPE_ARM) in rows:
        recipe, plain = ([row["limit"] for row in rows[arm]] for arm in (title(RECIPE_ARM), "CE-only"))
        parts.append(f"#### In turn\n\n{verdicts(recipe, plain, RECIPE)}")
    return "\n\n".join(parts) + "\n"


def both_ways(rows: dict[str, list[Row]], rule: str) -> str:
    """Return for each arm the shares of images whose insertion and 1 - deletion both rise, and both fall."""
    before = each_image(rows["start"], rule)
    lines = []
    for arm in list(rows)[1:]:
        after = each_image(rows[arm], rule)
        changes = torch.stack((after.insertion - before.insertion, before.deletion - after.deletion))
        shares = [float(both.all(dim=0).double().mean()) for both in (changes > 0, changes < 0)]
        lines.append([arm, *(f"{share:.1%}" for share in shares)])
    return markdown(["arm", "both rise", "both fall"], lines)


def each_image(rows: list[Row], rule: str) -> InsertionDeletionScores:
    """Return the scores of the images of all seeds. A curve has one step, its mean."""
    insertion, deletion = (
        torch.tensor([score for row in rows for score in row[rule][f"each {metric}"]])
        for metric in ("insertion", "deletion")
    )
    return InsertionDeletionScores(insertion, deletion, torch.ones(1), insertion[:, None], deletion[:, None])


TICKS = (-1, -0.5, 0, 0.5, 1)
PICTURED = ("CE-only", "masks alone", "ID-ExpO, ratio", "ID-ExpO, complement")


def plot(rows: dict[str, list[Row]]) -> Figure:
    """Return the changes of all images since the start, by the validation score alone (the paper's figure 4)."""
    figure = Figure(figsize=(8.8, 9.4), layout="constrained")
    for axis, arm in zip(figure.subplots(2, 2).flat, PICTURED, strict=True):
        plot_quadrants(each_image(rows["start"], "score"), each_image(rows[arm], "score"), axis)
        axis.set(xlim=(-1, 1), ylim=(-1, 1), xticks=TICKS, yticks=TICKS)
        axis.set_title(f"{arm}\n{axis.get_title()}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help="None: all")
    parser.add_argument("--data-root", type=Path, help="folder of the images; None: downloads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on every machine of this kind, however many cores it has
    if arguments.command == "run":
        for name in arguments.experiments or EXPERIMENTS:
            run(name, EXPERIMENTS[name], arguments.data_root, arguments.out)
    for name, experiment in EXPERIMENTS.items():
        rows = complete(experiment, Results(arguments.out / f"images_{name}.jsonl"))
        if rows["start"]:
            (arguments.out / f"images_{name}.md").write_text(report(experiment, rows))
            if rows.keys() >= set(PICTURED):
                plot(rows).savefig(arguments.out / f"images_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
