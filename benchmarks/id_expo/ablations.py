"""Which parts of ID-ExpO carry its gain? Each is taken away, or replaced, in turn.

A small CNN on scikit-learn's digits, explained by Grad-CAM on its 8x8 stage, fine-tuned from the same weights, selected
by eq. (15) on validation images and judged on held-out ones by the hard metrics (`benchmarks/digits.py` has network,
split and judge). Taken away or replaced:

* the second-order term: channel weights as constants, what Captum's own class trains on;
* the gradient through the mask: hard masks along the explanation, which is masking augmentation;
* the explanation itself: as many pixels masked at random;
* Del-A (the ratio, eq. 10) for Del-B (log) or Del-C (complement); the temperature, an example's or a batch's; S; and
  BatchNorm's statistics, frozen or not, in a network that has them.

Missingness is measured too: accuracy where half of all pixels, drawn at random, are black.

    python -m benchmarks.id_expo.ablations run
    python -m benchmarks.id_expo.ablations report

A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import captum.attr
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.digits import SCORES, Split, judge, pretrain
from benchmarks.id_expo.experiment import Results, Row, markdown, with_error
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.metrics.masks import SoftMasks
from captum_idexpo.regularizers import InsertionDeletion

# The module, whose name the metrics give to a function too.
masking = importlib.import_module("captum_idexpo.metrics._masking")
EPOCHS = 6
WEIGHT = 0.005
SEEDS = range(5)


class ConstantWeights(LayerGradCam):
    """Grad-CAM as Captum attaches it: the activations have a graph, the channel weights are constants."""

    def attribute(
        self, inputs: Tensor, target: Any = None, *, relu_attributions: bool = False, create_graph: bool = False
    ) -> Any:
        """As Captum's class, whatever is asked for."""
        return captum.attr.LayerGradCam.attribute(self, inputs, target, relu_attributions=relu_attributions)


class RandomMap(LayerGradCam):
    """No explanation at all."""

    def attribute(
        self, inputs: Tensor, target: Any = None, *, relu_attributions: bool = False, create_graph: bool = False
    ) -> Tensor:
        """Noise."""
        return torch.rand_like(inputs[:, :1])


class OneTemperature(SoftMasks):
    """One T for the whole batch, from its largest, smallest and distinct values."""

    def __init__(self, values: Tensor, present: Tensor | None = None, temperature: float = 1.0) -> None:
        super().__init__(values, present, temperature)
        distinct = self._ordered.unique()
        slope = temperature * (len(distinct) - 1) / (distinct[-1] - distinct[0])
        self._slope = torch.where(self._slope > 0, slope, 0.0)


class Variant(NamedTuple):
    """How the loss differs from ID-ExpO's; the judge does not."""

    title: str
    explainer: Callable[..., LayerGradCam] = LayerGradCam
    settings: dict[str, Any] = {}  # noqa: RUF012
    weight: float = WEIGHT
    masks: type[SoftMasks] = SoftMasks
    batch_norm: bool = False
    freeze_batch_norm: bool = True


VARIANTS = {
    "plain": Variant("plain fine-tuning", weight=0.0),
    "id_expo": Variant("ID-ExpO"),
    "constant": Variant("channel weights as constants", ConstantWeights),
    "hard": Variant("no gradient through the mask", settings={"temperature": None}),
    "random": Variant("random pixels masked", RandomMap, {"temperature": None}),
    "del_b": Variant("Del-B", settings={"deletion_form": "log"}),
    "del_c": Variant("Del-C", settings={"deletion_form": "complement"}),
    "sharp": Variant("three times the temperature", settings={"temperature": 3.0}),
    "blunt": Variant("a third of the temperature", settings={"temperature": 1 / 3}),
    "one_temperature": Variant("one temperature a batch", masks=OneTemperature),
    "s_0.3": Variant("S = 0.3", settings={"fraction": 0.3}),
    "insertion": Variant("insertion only", settings={"deletion_weight": 0.0}),
    "deletion": Variant("deletion only", settings={"insertion_weight": 0.0}),
    "bn_plain": Variant("with BatchNorm: plain", weight=0.0, batch_norm=True),
    "bn_frozen": Variant("with BatchNorm: ID-ExpO, statistics frozen", batch_norm=True),
    "bn_updated": Variant("with BatchNorm: ID-ExpO, statistics updated", batch_norm=True, freeze_batch_norm=False),
}


def run(out: Path) -> None:
    """All variants that are not yet done, seed by seed."""
    results = Results(out / "ablations.jsonl")
    for seed in SEEDS:
        missing = [name for name in VARIANTS if not results.has(seed=seed, variant=name)]
        if not missing:
            continue
        split = Split.of_seed(seed)
        networks = {False: pretrain(split, seed)}
        networks[True] = with_batch_norm(networks[False], split, seed)
        for name in missing:
            row = measure(VARIANTS[name], networks, split, seed)
            results.add({"seed": seed, "variant": name, **row})
            print(seed, name, row, flush=True)


def measure(variant: Variant, networks: dict[bool, nn.Sequential], split: Split, seed: int) -> Row:
    """One variant's cost and scores."""
    torch.manual_seed(seed)
    model = copy.deepcopy(networks[variant.batch_norm])
    layer = [module for module in model if isinstance(module, nn.ReLU)][2]
    make = partial(
        InsertionDeletion,
        baselines=0.0,
        attribute_kwargs={"relu_attributions": True},
        generator=Generator().manual_seed(seed),
    )
    weights = {"insertion_weight": variant.weight, "deletion_weight": variant.weight}
    settings = {**weights, "deletion_form": "ratio", **variant.settings}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = ExplanationRegularizedTrainer(
        model,
        optimizer,
        [make(variant.explainer(model, layer), step_size=4, **settings)] if variant.weight else [],
        evaluation=make(LayerGradCam(model, layer), step_size=4),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        freeze_batch_norm=variant.freeze_batch_norm,
        patience=EPOCHS,
        show_progress=False,
    )
    batches = DataLoader(split.train, batch_size=64, shuffle=True, generator=Generator().manual_seed(seed))
    start = time.perf_counter()
    with warnings.catch_warnings(), patch.object(masking, "SoftMasks", variant.masks):
        warnings.filterwarnings("ignore", message="The deletion floor")
        trainer.fit(batches, DataLoader(split.val, batch_size=len(split.val)), epochs=EPOCHS)
    seconds = time.perf_counter() - start
    model.eval()
    scores = judge(model, split.test, "gradcam", layer).means
    return {"seconds": round(seconds, 1), **rounded(scores), "masked accuracy": masked_accuracy(model, split)}


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in scores.items()}


@torch.no_grad()
def masked_accuracy(model: nn.Module, split: Split) -> float:
    """On held-out images, half of their pixels black: a model that was never shown such images is biased by them."""
    x, y = split.test.tensors
    kept = torch.rand(20, *x.shape, generator=Generator().manual_seed(0)) < 0.5
    predicted = model((x * kept).flatten(0, 1)).argmax(dim=1).view(20, -1)
    return round(float((predicted == y).double().mean()), 5)


def with_batch_norm(model: nn.Sequential, split: Split, seed: int) -> nn.Sequential:
    """The same network with BatchNorm after each convolution, trained as briefly as the other."""
    torch.manual_seed(seed)
    pairs = (
        [layer, nn.BatchNorm2d(layer.out_channels)] if isinstance(layer, nn.Conv2d) else [layer]
        for layer in copy.deepcopy(model)
    )
    normalised = nn.Sequential(*itertools.chain.from_iterable(pairs))
    optimizer = torch.optim.Adam(normalised.parameters(), lr=2e-3)
    batches = DataLoader(split.train, batch_size=64, shuffle=True, generator=Generator().manual_seed(seed))
    for _ in range(5):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(normalised(x), y).backward()
            optimizer.step()
    return normalised.eval()


# --- the report ----------------------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """Means over the seeds, and the paired difference to ID-ExpO, as Markdown."""
    results = Results(out / "ablations.jsonl")
    seeds = [seed for seed in SEEDS if all(results.has(seed=seed, variant=name) for name in VARIANTS)]
    columns = (*SCORES, "masked accuracy")
    lines = []
    for name, variant in VARIANTS.items():
        reference = "bn_frozen" if variant.batch_norm else "id_expo"
        row = [variant.title]
        for score in columns:
            values, others = (
                [results.where(seed=seed, variant=which)[0][score] for seed in seeds] for which in (name, reference)
            )
            row.append(with_error(values))
            if name != reference and score in ("insertion", "1 - deletion"):
                row[-1] += f" ({with_error([a - b for a, b in zip(values, others, strict=True)], '+.3f')})"
        lines.append(row)
    head = ["variant", *columns]
    return f"{len(seeds)} seeds; in brackets the paired difference to ID-ExpO.\n\n{markdown(head, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        run(arguments.out)
    (arguments.out / "ablations.md").write_text(report(arguments.out))


if __name__ == "__main__":
    main()
