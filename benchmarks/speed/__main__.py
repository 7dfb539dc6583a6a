"""How fast is this package? Beside what a user would pick instead, and beside the bare model on as many rows.

    python benchmarks/speed                       all that is installed; prints a table, writes JSON, a table, a chart
    python benchmarks/speed --quantus             only what needs Quantus, from an environment that has it:
                                                  python -m venv quantus
                                                  quantus/bin/pip install quantus '.[lime,train,image,plot]'
                                                  quantus/bin/python benchmarks/speed --quantus

All figures are ratios of one interleaved run, medians with their range over rounds. On a GPU, times are those of CUDA
events, and the peak memory of each contender stands beside them. Results of other runs of the same device are kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # cifar10.py

import report
from jobs import Job, agreement, jobs
from memory import STEPS, measure
from models import SUBJECTS
from timing import interleaved, peak_megabytes


def run(names: list[str], device: torch.device, rounds: int, quantus: bool, path: Path) -> None:
    """Measures the subjects named, one job after the other; each result is written when it is there."""
    for name in names:
        for make in jobs(SUBJECTS[name], device, quantus):
            job = make()
            result = measured(job, rounds, device)
            print("\n".join(report.lines(SUBJECTS[name].title, job.title, result)), flush=True)
            store(path, device, name, job.title, result)
    if quantus or "resnet20" not in names:
        return
    result = {"gradient's cosine to float64": agreement(SUBJECTS["resnet20"], device)}
    store(path, device, "resnet20", "faster models, agreement", result)
    for step in STEPS:
        store(path, device, "resnet20", step.title, {"bounded memory": measure(step, 3, device)})


def measured(job: Job, rounds: int, device: torch.device) -> dict[str, object]:
    """Seconds of each contender, and on a GPU what each holds at most."""
    result: dict[str, object] = {"seconds": interleaved(job.contenders, rounds, device)}
    if device.type == "cuda":
        result["peak megabytes"] = {
            name: peak_megabytes(contender, device) for name, contender in job.contenders.items()
        }
    return result


def store(path: Path, device: torch.device, subject: str, job: str, result: dict[str, object]) -> None:
    """Adds a result to the file, which keeps those of other jobs."""
    results = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"date": datetime.date.today().isoformat(), "machine": report.machine(device)}
    results.setdefault(device.type, {}).setdefault(subject, {})[job] = {**stamp, **result}
    path.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quantus", action="store_true", help="only what needs Quantus")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Captum warns of many features and of what scikit-learn finds ill-conditioned.
    warnings.filterwarnings("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "speed.json"
    run(arguments.models, torch.device(arguments.device), arguments.rounds, arguments.quantus, path)
    report.write(path)


if __name__ == "__main__":
    main()
