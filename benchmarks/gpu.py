"""All that a GPU has to say about this package: one command, under eight minutes, no download.

* tests: the accelerator's tests (`tests/test_accelerator.py`).
* speed: this package beside Captum, a loop over examples and the bare model (`benchmarks/speed`), by CUDA events, with
  the peak memory of each.
* rows of a forward pass: the bare model at many sizes, and where the package's own choice lies among them.
* faster steps: channels last, bfloat16 and compiled models in a step of ID-ExpO (`benchmarks/faster_steps.py`).
* fine-tuning: a ResNet-18 on images of 64x64 pixels (scikit-learn's digits, enlarged), trained plainly, then with
  ID-ExpO and Grad-CAM.

    python -m benchmarks.gpu                     on the GPU that is there
    python -m benchmarks.gpu --device cpu --small    everything in a reduced form, in two minutes

A part that is done is not done again on the same machine, unless its line is taken out of `gpu.json`. The table for the
documentation, `gpu.md`, is written after each part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo._core.chunks import look
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion

HERE = Path(__file__).parent
for folder in (HERE, HERE / "speed"):
    sys.path.insert(0, str(folder))

import faster_steps
import report
from jobs import attribution, metric, training_step
from models import SUBJECTS
from timing import interleaved, peak_megabytes

Result = dict[str, Any]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# --- the parts -----------------------------------------------------------------------------------------------------


def tests(device: torch.device, small: bool) -> Result:
    """What the accelerator's tests say, one kind of them alone where everything is reduced; an error if one fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_accelerator.py",
        *(["-k", "generator"] if small else []),
    ]
    environment = dict(os.environ) if device.type == "cuda" else {**os.environ, "SIMULATED_ACCELERATOR": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=environment, check=False)
    if ran.returncode:
        raise RuntimeError(f"The accelerator's tests failed:\n{ran.stdout[-3000:]}{ran.stderr[-1000:]}")
    return {"last lines": ran.stdout.splitlines()[-3:]}


def speed(device: torch.device, small: bool) -> Result:
    """Ratios to the bare model, and what each contender holds at most."""
    names, rounds = (("tiny",), 1) if small else (("resnet20", "resnet18"), 5)
    found: Result = {}
    for name in names:
        subject = SUBJECTS[name]
        jobs = [attribution(subject, device, "Lime"), metric(subject, device)]
        jobs += [training_step(subject, device)] if subject.shape[-1] == 32 and not small else []
        for job in jobs:
            found[f"{subject.title}, {job.title}"] = {
                "seconds": interleaved(job.contenders, rounds, device),
                "peak megabytes": {each: peak_megabytes(call, device) for each, call in job.contenders.items()},
            }
    return found


def rows_of_a_pass(device: torch.device, small: bool) -> Result:
    """Seconds of a row at several sizes of a forward pass, and the size that the package chooses."""
    found = {}
    for name in ("tiny",) if small else ("tiny", "resnet20", "resnet18"):
        subject = SUBJECTS[name]
        model = subject.model(device)
        x, _ = subject.batch(device, 8)
        chosen = look(model, lambda rows, examples, n_copies, model=model: model(*rows), (x,)).max_rows
        sizes = sorted({chosen, *(2**power for power in range(3, 7 if small else 14))})
        found[subject.title] = {"chosen": chosen, "seconds": seconds_of_a_row(model, x, sizes, device)}
    return found


def seconds_of_a_row(model: nn.Module, x: Tensor, sizes: list[int], device: torch.device) -> dict[str, float]:
    """Seconds of a row in passes of so many rows; without the sizes that do not fit into memory."""
    found = {}
    for size in sizes:
        rows = x[torch.arange(size, device=device) % len(x)]

        def run(rows: Tensor = rows) -> None:
            with torch.no_grad():
                model(rows)

        try:
            found[str(size)] = min(interleaved({"": run}, 3, device)[""]) / size
        except torch.OutOfMemoryError:
            break
    return found


def faster(device: torch.device, small: bool) -> Result:
    """Times of a step over that as it is, and the agreement of its gradient with float64."""
    if small:
        job, switches = next(iter(faster_steps.JOBS.items()))
        return {job: faster_steps.measure(job, 1, device, list(switches)[:2])}
    return {job: faster_steps.measure(job, 5, device) for job in faster_steps.JOBS}


def fine_tuning(device: torch.device, small: bool) -> Result:
    """The scores before and after, seconds of an update, and what an update holds at most."""
    torch.manual_seed(0)
    train, val = enlarged_digits(32 if small else 1400), enlarged_digits(-16 if small else -397)
    model = resnet18(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    plain = ExplanationRegularizedTrainer(model, optimizer, freeze_batch_norm=False, show_progress=False)
    plain.fit(DataLoader(train, batch_size=32, shuffle=True), epochs=1 if small else 8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    regularizer = InsertionDeletion(
        LayerGradCam(model, model.layer3), baselines=0.0, insertion_weight=0.05, deletion_weight=0.05, fraction=0.5
    )
    trainer = ExplanationRegularizedTrainer(model, optimizer, [regularizer], show_progress=False)
    judged, batch = DataLoader(val, batch_size=32), DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    before = trainer.evaluate(judged)
    held = peak_megabytes(lambda: trainer.fit(batch, epochs=1), device)
    start = time.perf_counter()
    trainer.fit(batch, epochs=1 if small else 3)
    synchronize(device)
    n_updates = len(batch) * (1 if small else 3)
    return {
        "before": before,
        "after": trainer.evaluate(judged),
        "seconds of an update": (time.perf_counter() - start) / n_updates,
        "peak megabytes": held,
    }


def enlarged_digits(n: int) -> TensorDataset:
    """The first n digits, or the last -n, as colour images of 64x64 pixels."""
    digits = load_digits()
    rows = slice(0, n) if n > 0 else slice(n, None)
    images = torch.tensor(digits.images[rows], dtype=torch.float32)[:, None] / 8 - 1
    return TensorDataset(interpolate(images, size=64).expand(-1, 3, -1, -1), torch.tensor(digits.target[rows]))


PARTS: Mapping[str, Callable[[torch.device, bool], Result]] = {
    "tests": tests,
    "speed": speed,
    "rows of a forward pass": rows_of_a_pass,
    "faster steps": faster,
    "fine-tuning": fine_tuning,
}

# --- the table -----------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Mapping[str, Result]]) -> str:
    """A section a machine: Markdown."""
    text = []
    for machine, parts in results.items():
        text += [f"### {machine}", ""]
        for name, part in parts.items():
            text += [f"**{name}** ({part['seconds of the part']:.0f} s)", "", *SECTIONS[name](part["found"]), ""]
    return "\n".join(text)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def of_tests(found: Result) -> list[str]:
    return [f"* passed: {' '.join(found['last lines'][-1:])}"]


def of_speed(found: Result) -> list[str]:
    rows = []
    for job, result in found.items():
        for name, ratio in report.ratios(result).items():
            peak = result["peak megabytes"][name]
            held = "" if peak is None else f"{peak:.0f}"
            rows.append([job, name, f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}", held])
    return table(["job", "contender", "time over the bare model", "lowest to highest", "peak, MB"], rows)


def of_rows(found: Result) -> list[str]:
    rows = []
    for model, result in found.items():
        seconds = {int(size): value for size, value in result["seconds"].items()}
        best = min(seconds, key=lambda size: seconds[size])
        over = f"{seconds[result['chosen']] / seconds[best]:.2f}" if result["chosen"] in seconds else "does not fit"
        rows.append([model, str(result["chosen"]), str(best), over])
    return table(["model", "rows chosen", "fastest rows", "time over the fastest"], rows)


def of_fine_tuning(found: Result) -> list[str]:
    names = ["accuracy", "insertion", "one_minus_deletion"]
    rows = [[when, *(f"{found[when][name]:.3f}" for name in names)] for when in ("before", "after")]
    held = "" if found["peak megabytes"] is None else f", {found['peak megabytes']:.0f} MB at most"
    line = f"* {found['seconds of an update']:.3f} s an update of 32 images{held}."
    return [*table(["", "accuracy", "insertion", "1 - deletion"], rows), "", line]


SECTIONS: Mapping[str, Callable[[Result], list[str]]] = {
    "tests": of_tests,
    "speed": of_speed,
    "rows of a forward pass": of_rows,
    "faster steps": lambda found: faster_steps.table(found).splitlines(),
    "fine-tuning": of_fine_tuning,
}


def run(device: torch.device, small: bool, out: Path, parts: list[str]) -> None:
    """Do the parts that are not done yet, and write results and table after each."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    done = results.setdefault(report.machine(device) + (", reduced" if small else ""), {})
    for name in parts:
        if name in done:
            continue
        start = time.perf_counter()
        found = PARTS[name](device, small)
        done[name] = {"found": found, "seconds of the part": time.perf_counter() - start}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)
        (out / "gpu.md").write_text(page(results) + "\n")
        print(f"{name}: {done[name]['seconds of the part']:.0f} s", *SECTIONS[name](found), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a reduced form, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    run(torch.device(arguments.device), arguments.small, arguments.out, arguments.parts)


if __name__ == "__main__":
    main()
