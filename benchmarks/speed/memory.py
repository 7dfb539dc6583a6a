"""A LIME training step in bounded memory: time and peak, each in a process of its own, where nothing else is held."""

from __future__ import annotations

import multiprocessing
import time

import torch
from models import SUBJECTS
from timing import peak_megabytes

from captum_idexpo.attr import id_expo_lime
from captum_idexpo.regularizers import InsertionDeletion

N_EXAMPLES = 32
BUDGET = 250e6


def lime_step(n_samples: int, memory_budget: float | None, device_type: str, n_threads: int) -> tuple[float, float]:
    """Seconds and peak megabytes of one ID-ExpO step with LIME on a ResNet-20, after a small one that warms up."""
    torch.set_num_threads(n_threads)
    device = torch.device(device_type)
    subject = SUBJECTS["resnet20"]
    model = subject.model(device)
    x, y = subject.batch(device, N_EXAMPLES)

    def step(n_samples: int, n_examples: int) -> None:
        regularizer = InsertionDeletion(
            id_expo_lime(model),
            baselines=0.0,
            forward_func=model,
            feature_mask=subject.feature_mask,
            attribute_kwargs={"n_samples": n_samples, "sampling": "independent"},
            memory_budget=memory_budget,
        )
        torch.stack(list(regularizer(x[:n_examples], y[:n_examples]).values())).sum().backward()

    step(4, 2)
    start = time.perf_counter()
    peak = peak_megabytes(lambda: step(n_samples, N_EXAMPLES), device)
    return time.perf_counter() - start, float("nan") if peak is None else peak


def measure(
    n_samples: int, rounds: int, device: torch.device, whole_graph: bool
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and megabytes of each round, bounded memory and whole graph by turns."""
    budgets = {"memory_budget": BUDGET, **({"whole graph": None} if whole_graph else {})}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in budgets}
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for name, budget in budgets.items():
            with context.Pool(1) as pool:
                arguments = (n_samples, budget, device.type, torch.get_num_threads())
                results[name].append(pool.apply(lime_step, arguments))
    return results
