"""Which output is explained and scored."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def class_labels(target: Any) -> Any:
    """A loader's labels as a target: as int64, those of a binary loss, floats 0.0 and 1.0 of shape ``(B, 1)``, too."""
    if not isinstance(target, Tensor):
        return target
    if target.dim() == 2 and target.shape[1] == 1:
        target = target.squeeze(1)
    zeros_and_ones = target.is_floating_point() and bool(((target == 0) | (target == 1)).all())
    real = target.is_floating_point() or target.is_complex()
    return target.long() if zeros_and_ones or not real else target


def require_integers(target: Tensor) -> None:
    """Refuses what names no class, soft labels for example; TypeError."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        mend = "target.long(), or, where it is a regression's, with outputs='raw'"
        if target.dim() == 2 and target.shape[1] > 1:
            mend = "target.argmax(dim=1)"
        raise TypeError(
            f"target must hold integers, given: {target.dtype} of shape {tuple(target.shape)}; mend it with {mend}."
        )


def target_indices(target: Any, n_examples: int, device: torch.device) -> Tensor | None:
    """A target in any of Captum's forms as indices ``(B, n)``."""
    if target is None:
        return None
    if isinstance(target, Tensor):
        require_integers(target)
        if target.numel() == 1:
            return target.reshape(1, 1).to(device, torch.long).expand(n_examples, 1)
        if target.dim() == 1 and len(target) == n_examples:
            return target[:, None].to(device, torch.long)
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit {n_examples} examples: give ({n_examples},)."
        )
    if isinstance(target, list):
        if len(target) != n_examples:
            raise ValueError(f"target is a list of {len(target)} for {n_examples} examples: give one for each.")
        rows = [entry if isinstance(entry, tuple) else (entry,) for entry in target]
    else:
        rows = [target if isinstance(target, tuple) else (target,)] * n_examples
    for row in rows:
        if not all(isinstance(number, Integral) and not isinstance(number, bool) for number in row):
            raise TypeError(
                f"target must be an integer, a tuple of integers, a tensor, a list or None; given: {target!r}."
            )
    if len({len(row) for row in rows}) != 1:
        raise ValueError("target is a list of tuples of different lengths: give as many numbers for each example.")
    return torch.tensor(rows, dtype=torch.long, device=device)
