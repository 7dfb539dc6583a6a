"""A training step of ID-ExpO in bounded memory: time and peak, in a process of its own where nothing else is held."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from models import SUBJECTS
from timing import peak_megabytes
from torch import nn

from captum_idexpo.attr import IntegratedGradients, id_expo_lime
from captum_idexpo.regularizers import InsertionDeletion

BUDGET = 250e6


class Step(NamedTuple):
    """A step on a ResNet-20 with an explainer of so many masked copies, or steps of the path, for each example."""

    explainer: str
    n_samples: int
    n_examples: int
    whole_graph: bool = True  # of LIME with 200 samples it takes eleven gigabytes

    @property
    def title(self) -> str:
        """How the table names it."""
        what = "samples" if self.explainer == "LIME" else "steps of the path"
        return f"ID-ExpO step with {self.explainer}, {self.n_samples} {what}, {self.n_examples} examples"

    def make(self, model: nn.Module) -> Attribution:
        """The explainer."""
        return id_expo_lime(model) if self.explainer == "LIME" else IntegratedGradients(model)

    def arguments(self, n_samples: int) -> dict[str, Any]:
        """The explainer's."""
        if self.explainer == "LIME":
            return {"n_samples": n_samples, "sampling": "independent"}
        return {"n_steps": n_samples}


STEPS = (
    Step("LIME", 50, 16),
    Step("LIME", 50, 32),
    Step("LIME", 200, 32, whole_graph=False),
    Step("Integrated Gradients", 25, 16),
)


def take(step: Step, memory_budget: float | None, device_type: str, n_threads: int) -> tuple[float, float]:
    """Seconds and peak megabytes of a step, after a small one that warms up."""
    torch.set_num_threads(n_threads)
    device = torch.device(device_type)
    subject = SUBJECTS["resnet20"]
    model = subject.model(device)
    x, y = subject.batch(device, step.n_examples)

    def run(n_samples: int, n_examples: int) -> None:
        regularizer = InsertionDeletion(
            step.make(model),
            baselines=0.0,
            forward_func=model,
            feature_mask=subject.feature_mask,
            attribute_kwargs=step.arguments(n_samples),
            memory_budget=memory_budget,
        )
        torch.stack(list(regularizer(x[:n_examples], y[:n_examples]).values())).sum().backward()

    run(4, 2)
    start = time.perf_counter()
    peak = peak_megabytes(lambda: run(step.n_samples, step.n_examples), device)
    return time.perf_counter() - start, float("nan") if peak is None else peak


def measure(step: Step, rounds: int, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """Seconds and megabytes of each round, bounded memory and whole graph by turns."""
    budgets = {"memory_budget": BUDGET, **({"whole graph": None} if step.whole_graph else {})}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in budgets}
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for name, budget in budgets.items():
            with context.Pool(1) as pool:
                results[name].append(pool.apply(take, (step, budget, device.type, torch.get_num_threads())))
    return results
