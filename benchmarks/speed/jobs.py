"""What is measured: this package beside what a user would pick instead, and beside the bare model on as many rows."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnRidge
from models import Subject
from per_example import loop_id_expo, loop_scores
from timing import Contender
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from captum_idexpo.attr import KernelShap, LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import deletion, insertion_deletion
from captum_idexpo.regularizers import InsertionDeletion

N_STEPS = 32
STEPS_OF_A_TRAINING_STEP = 8


class Job(NamedTuple):
    """Contenders for one task; the first is the bare model on the same number of rows."""

    title: str
    contenders: dict[str, Contender]


def bare(subject: Subject, model: nn.Module, device: torch.device, n_rows: int, backward: bool = False) -> Contender:
    """The model itself on so many rows, at its best chunk size."""

    def run(size: int, total: int) -> None:
        for start in range(0, total, size):
            with torch.set_grad_enabled(backward):
                output = model(rows[start : min(start + size, total)])
                if backward:
                    output.sum().backward()

    sizes = [size for size in subject.rows if size <= n_rows] or [n_rows]
    rows, _ = subject.batch(device, n_rows)
    sample = min(n_rows, 4 * max(sizes))
    return partial(run, min(sizes, key=lambda size: _fastest(lambda: run(size, sample))), n_rows)


def _fastest(contender: Contender) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        contender()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def attribution(subject: Subject, device: torch.device, name: str) -> Job:
    """LIME with ridge, or KernelSHAP: masks of each example, masks shared by the batch, Captum's stream; Captum."""
    model = subject.model(device)
    x, y = subject.batch(device)
    arguments = {"target": y, "feature_mask": subject.feature_mask(x), "n_samples": subject.n_samples}
    ours: Lime = Lime(model, Ridge(1.0)) if name == "Lime" else KernelShap(model)
    theirs = captum.attr.Lime(model, SkLearnRidge(alpha=1.0)) if name == "Lime" else captum.attr.KernelShap(model)
    contenders: dict[str, Contender] = {
        "bare model": bare(subject, model, device, len(x) * subject.n_samples),
        "independent": lambda: ours.attribute(x, sampling="independent", **arguments),
        "shared masks": lambda: ours.attribute(x, sampling="independent", share_masks=True, **arguments),
    }
    if name == "Lime":  # whose default similarity weighs a mask anew for each example's inputs
        of_masks = Lime(model, Ridge(1.0), MaskSimilarity())
        contenders["shared masks, MaskSimilarity"] = lambda: of_masks.attribute(
            x, sampling="independent", share_masks=True, **arguments
        )
    contenders |= {
        "Captum's stream": lambda: ours.attribute(x, **arguments),
        "Captum": lambda: theirs.attribute(x, **arguments),
    }
    return Job(f"{name}, {subject.n_samples} samples", contenders)


def metric(subject: Subject, device: torch.device) -> Job:
    """Hard and soft insertion and deletion, 32 steps each."""
    model = subject.model(device)
    x, y = subject.batch(device)
    maps = torch.randn(len(x), 1, *x.shape[2:], device=device) if x.dim() > 2 else torch.randn_like(x)
    step_size = max(1, maps[0].numel() // N_STEPS)

    def score(temperature: Any) -> None:
        with torch.no_grad():
            insertion_deletion(model, x, maps, baselines=0, target=y, step_size=step_size, temperature=temperature)

    n_rows = 2 * len(x) * (maps[0].numel() // step_size)
    contenders = {
        "bare model": bare(subject, model, device, n_rows),
        "hard": partial(score, None),
        "soft": partial(score, "auto"),
    }
    return Job("insertion and deletion", contenders)


def soft_backward(subject: Subject, device: torch.device) -> Job:
    """Soft insertion and deletion, forward and backward, beside a loop over examples."""
    model = subject.model(device)
    x, y = subject.batch(device)
    maps = torch.randn(len(x), 1, *x.shape[2:], device=device, requires_grad=True)
    step_size = maps[0].numel() // N_STEPS
    steps = torch.arange(1, N_STEPS + 1, device=device) * step_size

    def ours() -> None:
        scores = insertion_deletion(model, x, maps, baselines=0, target=y, step_size=step_size, temperature="auto")
        (scores.deletion - scores.insertion).mean().backward()

    def loop() -> None:
        losses = []
        for example, label, map in zip(x.split(1), y.tolist(), maps.split(1), strict=True):
            inserted, deleted = loop_scores(model, example, label, map, steps)
            losses.append(deleted.exp().mean() - inserted.exp().mean())
        torch.stack(losses).mean().backward()

    bare_rows = bare(subject, model, device, 2 * len(x) * N_STEPS, backward=True)
    contenders = {"bare model": bare_rows, "soft": ours, "loop over examples": loop}
    return Job("soft insertion and deletion, forward and backward", contenders)


def grad_cam(subject: Subject, device: torch.device) -> Job:
    """The map alone, without a graph."""
    model = subject.model(device)
    x, y = subject.batch(device, 32)
    layer = model.get_submodule(str(subject.layer))
    ours, theirs = LayerGradCam(model, layer), captum.attr.LayerGradCam(model, layer)
    contenders = {
        "bare model": bare(subject, model, device, len(x)),
        "this package": lambda: ours.attribute(x, target=y),
        "Captum": lambda: theirs.attribute(x, target=y),
    }
    return Job("Grad-CAM, 32 examples", contenders)


def training_step(subject: Subject, device: torch.device) -> Job:
    """One ID-ExpO step with Grad-CAM beside forward and backward passes of its rows and a loop over examples."""
    model = subject.model(device)
    x, y = subject.batch(device, 32)
    layer = model.get_submodule(str(subject.layer))
    n_locations = x[0, 0].numel()
    step_size = n_locations // 2 // STEPS_OF_A_TRAINING_STEP
    arguments = {"relu_attributions": True}
    regularizer = InsertionDeletion(
        LayerGradCam(model, layer),
        baselines=0.0,
        step_size=step_size,
        steps_per_update=None,
        attribute_kwargs=arguments,
        deletion_form="ratio",
        deletion_floor=None,
    )
    steps = torch.arange(1, STEPS_OF_A_TRAINING_STEP + 1, device=device) * step_size
    # The copies, the explanation and the plain inputs of the deletion ratio.
    n_rows = len(x) * (2 * STEPS_OF_A_TRAINING_STEP + 2)
    contenders = {
        "bare model": bare(subject, model, device, n_rows, backward=True),
        "this package": lambda: sum(regularizer(x, y).values()).backward(),  # type: ignore[attr-defined]
        "loop over examples": lambda: loop_id_expo(model, layer, x, y, steps).backward(),
    }
    return Job("ID-ExpO step with Grad-CAM, 8 steps", contenders)


def levers(subject: Subject, device: torch.device) -> Job:
    """What a user may switch on: the metric in channels-last, in bfloat16, with BatchNorm folded; see `agreement`."""
    x, y = subject.batch(device)
    maps = torch.randn(len(x), 1, *x.shape[2:], device=device)
    contenders: dict[str, Contender] = {}
    for name, (model, context) in variants(subject.model(device), device).items():

        def score(model: nn.Module = model, context: Callable[[], Any] = context) -> None:
            with torch.no_grad(), context():
                insertion_deletion(model, x, maps, baselines=0, target=y)

        contenders[name] = score
    return Job("insertion and deletion, faster models", contenders)


def variants(model: nn.Module, device: torch.device) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """A model as it is, and in its faster forms, each with the context it runs in."""
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    folded = fuse(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    bfloat16 = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return {
        "as it is": (model, nullcontext),
        "channels last": (channels_last, nullcontext),
        "folded": (folded, nullcontext),
        "bfloat16": (channels_last, bfloat16),
    }


def agreement(subject: Subject, device: torch.device) -> dict[str, float]:
    """Cosine of ID-ExpO's gradient in the weights to float64's, for the variants that can be trained."""
    x, y = subject.batch(device, 8)
    gradients = {}
    exact = subject.model(device).double()
    for name, (model, context) in {"float64": (exact, None), **variants(subject.model(device), device)}.items():
        if name == "folded":  # its weights are copies
            continue
        layer = model.get_submodule(str(subject.layer))
        regularizer = InsertionDeletion(
            LayerGradCam(model, layer),
            baselines=0.0,
            fraction=0.5,
            step_size=64,
            steps_per_update=None,
            deletion_form="ratio",
            deletion_floor=None,
        )
        if context is None:
            loss: Any = sum(regularizer(x.double(), y).values())
        else:
            with context():
                loss = sum(regularizer(x, y).values())
        gradients[name] = _flat(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    return {
        name: float(torch.nn.functional.cosine_similarity(gradient, gradients["float64"], dim=0))
        for name, gradient in gradients.items()
        if name != "float64"
    }


def _flat(gradients: tuple[Tensor | None, ...]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


def pixel_flipping(subject: Subject, device: torch.device) -> Job:
    """Deletion beside Quantus' pixel flipping, where that is installed: 32 masked copies an example."""
    import quantus

    model = subject.model(device)
    x, y = subject.batch(device, 32)
    maps = torch.randn(len(x), 1, *x.shape[2:], device=device)
    step_size = maps[0].numel() // N_STEPS
    theirs = quantus.PixelFlipping(
        features_in_step=step_size, perturb_baseline="black", disable_warnings=True, display_progressbar=False
    )
    arrays = {"x_batch": x.cpu().numpy(), "y_batch": y.cpu().numpy(), "a_batch": maps.cpu().numpy()}

    def ours() -> None:
        with torch.no_grad():
            deletion(model, x, maps, baselines=0, target=y, step_size=step_size)

    contenders = {
        "bare model": bare(subject, model, device, len(x) * N_STEPS),
        "this package": ours,
        "Quantus": lambda: theirs(model=model, device=device.type, **arrays),
    }
    return Job("deletion, 32 examples", contenders)


def jobs(subject: Subject, device: torch.device, quantus: bool) -> list[Callable[[], Job]]:
    """All jobs of a subject, made when their turn comes; or only the one beside Quantus."""
    if quantus:
        return [partial(pixel_flipping, subject, device)] if len(subject.shape) > 1 and subject.shape[-1] == 32 else []
    chosen: list[Callable[[], Job]] = [
        partial(attribution, subject, device, "Lime"),
        partial(attribution, subject, device, "KernelShap"),
        partial(metric, subject, device),
    ]
    if subject.layer and subject.shape[-1] == 32:
        chosen += [partial(job, subject, device) for job in (soft_backward, grad_cam, training_step)]
    if subject.title.startswith("ResNet-20"):
        chosen.append(partial(levers, subject, device))
    return chosen
