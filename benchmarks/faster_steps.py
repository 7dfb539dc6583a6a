"""How much faster is a step of ID-ExpO with what a user may switch on, one by one and together?

A step is the gradient of the task's loss and of insertion and deletion (k = 4 of the steps) on a ResNet-20 for 32x32
pixels, with random weights: with Grad-CAM on 32 images, and with LIME on 8 images, 64 superpixels, 200 masked copies
each. Switches:

* channels last: ``model.to(memory_format=torch.channels_last)``, and the images likewise;
* bfloat16: ``torch.autocast`` around the loss, which needs a machine that multiplies in bfloat16 (on CPUs: AMX);
* compiled: ``torch.compile``; with Grad-CAM, which needs second derivatives, of what is scored alone;
* fewer steps: k = 2 in place of 4;
* fewer copies: LIME with 100 masked copies in place of 200, of an orthogonal design, and a ridge whose strength the
  samples choose (see `sampling_noise.py`).

    python benchmarks/faster_steps.py

Contenders take turns on one core; a figure is the median of the paired ratios of a run. The agreement is the cosine of
the gradient in the weights to that of float64, with the same masks.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from cifar10 import ResNet
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity

from captum_idexpo import ExplanationRegularizedLoss
from captum_idexpo.attr import LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import BayesianRidge, Ridge
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import InsertionDeletion

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from timing import Ratio, interleaved

CELL = 4
N_COPIES, FEWER = 200, 100
AS_IT_IS = "as it is"


class Switches(NamedTuple):
    """What is switched on."""

    channels_last: bool = False
    bfloat16: bool = False
    compiled: bool = False
    fewer_copies: bool = False
    fewer_steps: bool = False


PLAIN = {
    AS_IT_IS: Switches(),
    "channels last": Switches(channels_last=True),
    "bfloat16": Switches(bfloat16=True),
    "channels last, bfloat16": Switches(channels_last=True, bfloat16=True),
}
GRAD_CAM = {
    **PLAIN,
    "compiled": Switches(compiled=True),
    "channels last, compiled": Switches(channels_last=True, compiled=True),
    "fewer steps": Switches(fewer_steps=True),
    "channels last, compiled, fewer steps": Switches(channels_last=True, compiled=True, fewer_steps=True),
}
LIME = {
    **PLAIN,
    "fewer copies": Switches(fewer_copies=True),
    "compiled": Switches(compiled=True),
    "channels last, compiled, fewer copies": Switches(channels_last=True, compiled=True, fewer_copies=True),
}
JOBS = {"Grad-CAM, 32 images": GRAD_CAM, "LIME, 8 images": LIME}


class Step(NamedTuple):
    """A training step, without the optimizer's part."""

    loss: ExplanationRegularizedLoss
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    context: Callable[[], Any]

    def __call__(self) -> list[Tensor]:
        """Return the gradient."""
        with self.context():
            loss, _ = self.loss(self.batch)
        return list(torch.autograd.grad(loss, list(self.model.parameters())))


def make_step(job: str, model: nn.Module, switches: Switches, dtype: torch.dtype, device: torch.device) -> Step:
    """Return the step of a job; each has its own copy of the model, and the same random numbers."""
    model = copy.deepcopy(model).to(device, dtype)
    x = torch.randn(int(job.split()[-2]), 3, 32, 32, generator=Generator().manual_seed(0)).to(device, dtype)
    y = torch.arange(len(x), device=device) % 10
    if switches.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    called = torch.compile(model) if switches.compiled else model
    regularizer = make_regularizer(job, called, model, switches)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if switches.bfloat16 else nullcontext
    return Step(ExplanationRegularizedLoss(called, [regularizer]), model, (x, y), autocast)


def make_regularizer(job: str, called: nn.Module, model: nn.Module, switches: Switches) -> InsertionDeletion:
    arguments: dict[str, Any] = {"feature_mask": partial(grid, cell_size=CELL), "fraction": 0.5, "baselines": 0.0}
    arguments |= {"steps_per_update": 2 if switches.fewer_steps else 4, "generator": Generator().manual_seed(0)}
    if job.startswith("Grad-CAM"):
        return InsertionDeletion(LayerGradCam(model, model.get_submodule("layer3")), forward_func=called, **arguments)
    surrogate = BayesianRidge() if switches.fewer_copies else Ridge(1.0)
    drawn = {"n_samples": FEWER, "sampling": "orthogonal"} if switches.fewer_copies else {"n_samples": N_COPIES}
    lime = Lime(called, surrogate, MaskSimilarity())
    return InsertionDeletion(lime, attribute_kwargs={"sampling": "independent", **drawn}, **arguments)


def measure(
    job: str, rounds: int, device: torch.device, names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Seconds of each contender in each round, seconds of its first step, and its agreement with float64."""
    torch.manual_seed(0)
    model = ResNet().eval()
    steps, rows = {}, {}
    for name in JOBS[job] if names is None else names:
        switches = JOBS[job][name]
        drawn = Switches(fewer_copies=switches.fewer_copies, fewer_steps=switches.fewer_steps)
        exact = flat(make_step(job, model, drawn, torch.float64, device)())
        steps[name] = make_step(job, model, switches, torch.float32, device)
        torch.compiler.reset()  # what another contender compiled would serve this one, too
        start = time.perf_counter()
        gradient = flat(steps[name]())
        first = time.perf_counter() - start
        rows[name] = {"first": first, "cosine": float(cosine_similarity(gradient, exact, dim=0))}
        print(job, name, rows[name], flush=True)
    for name, seconds in interleaved(dict(steps), rounds, device).items():
        rows[name]["seconds"] = seconds
    return rows


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table: time over the step as it is, agreement, and after how many steps compiling has paid."""
    lines = ["| step | switched on | time | lowest to highest | cosine to float64 | compiling pays after |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for job, rows in results.items():
        for name, row in rows.items():
            ratio = Ratio.of(row["seconds"], rows[AS_IT_IS]["seconds"])
            pays = pays_after(row, rows) if JOBS[job][name] == Switches(compiled=True) else ""
            spread = f"{ratio.low:.2f} to {ratio.high:.2f}"
            lines.append(f"| {job} | {name} | **{ratio.median:.2f}** | {spread} | {row['cosine']:.6f} | {pays} |")
    return "\n".join(lines)


def pays_after(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """After how many steps the seconds of compiling are saved again, beside the same step that is not compiled."""
    seconds, eager = (sorted(each["seconds"])[len(each["seconds"]) // 2] for each in (row, rows[AS_IT_IS]))
    compiling = row["first"] - seconds
    if seconds >= eager:
        return f"never ({compiling:.0f} s)"
    return f"{compiling / (eager - seconds):.0f} steps ({compiling:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # compile as for the first time
    path = arguments.out / "faster_steps.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for job in arguments.jobs:
        results[job] = measure(job, arguments.rounds, torch.device(arguments.device))
        path.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "faster_steps.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
