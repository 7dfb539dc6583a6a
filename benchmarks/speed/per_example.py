"""ID-ExpO as one would first write it: a loop over examples, a backward pass for each one's explanation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def loop_grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, y: int) -> Tensor:
    """Grad-CAM of one example with its graph, ``(1, 1, H, W)``."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    score = model(x)[0, y]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0], create_graph=True)
    map = (gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1, keepdim=True).relu()
    return interpolate(map, x.shape[2:], mode="nearest")


def loop_scores(model: nn.Module, x: Tensor, y: int, map: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """log p of one example after inserting and after deleting, softly, its highest locations, each ``(n_steps,)``."""
    values = map.flatten()
    ordered = values.detach().sort(descending=True).values
    n_gaps = len(ordered.unique()) - 1
    slope = n_gaps / (ordered[0] - ordered[-1]) if n_gaps else ordered[0] * 0
    thresholds = (ordered[steps - 1] + ordered[steps.clamp(max=len(ordered) - 1)]) / 2
    masks = torch.sigmoid(slope * (values - thresholds[:, None])).view(-1, *map.shape[1:])
    inserted, deleted = (model(mask * x).log_softmax(dim=1)[:, y] for mask in (masks, 1 - masks))
    return inserted, deleted


def loop_id_expo(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor, steps: Tensor) -> Tensor:
    """The loss's two terms of a batch."""
    losses = []
    for example, label in zip(x.split(1), y.tolist(), strict=True):
        map = loop_grad_cam(model, layer, example, label)
        inserted, deleted = loop_scores(model, example, label, map, steps)
        plain = model(example).log_softmax(dim=1)[0, label]
        losses.append(deleted.mean() - plain - inserted.mean())
    return torch.stack(losses).mean()
