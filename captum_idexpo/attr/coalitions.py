"""The coalitions that KernelSHAP evaluates, and their weights.

Except with Captum's sampling, no coalition is drawn twice. The coalitions of one size form a class. A class is taken
whole if there are enough samples for it. From the other classes, coalitions are drawn without replacement. Weights
correct for this: for infinitely many samples, and if all coalitions are taken, they equal Shapley's kernel.

The designs "paired", "orthogonal" and "leverage" draw pairs of a coalition and its complement, so their classes hold
pairs. `captum_idexpo.attr.sampling` describes the designs.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.features import as_numbers
from captum_idexpo.attr.sampling import (
    LIME_SAMPLINGS,
    coins,
    noise,
    permutations,
    replay_captum_fit,
    source_of_masks,
    with_complements,
)

KERNEL_SHAP_SAMPLINGS: tuple[str, ...] = (*LIME_SAMPLINGS, "leverage")


def kernel_shap_masks(
    sampling: str, n_sets: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Return KernelSHAP's masks (full coalition, empty coalition, random coalitions) and their weights.

    Args:
        sampling: one of `KERNEL_SHAP_SAMPLINGS`.
        n_sets: number of independent sets of masks.
        n_samples: masks per set. It must be less than 2^D unless the sampling is "captum"; else use `all_coalitions`.
        n_features: D, at least 2.
        device: device of the result.
        generator: source of the random numbers; not used with sampling "captum".

    Returns:
        Boolean masks ``(n_sets, n_samples, D)`` and weights ``(n_sets, n_samples)``, or None if all weights are 1.

    Raises:
        ValueError: n_samples is at least 2^D; the generator is on MPS.
    """
    if sampling == "captum":
        return captum_kernel_shap_masks(n_sets, n_samples, n_features).to(device), None
    if n_samples >= 2**n_features:
        raise InputError(f"There are no {n_samples} different coalitions, or all of them: use all_coalitions.")
    at = source_of_masks(device, generator)
    n_random = max(0, n_samples - 2)
    plan = _plan(n_random, n_features, sampling != "independent", sampling == "leverage")
    drawn = _drawn(plan, n_sets, sampling in ("orthogonal", "leverage"), at, generator)
    masks = torch.cat([plan.whole.to(at).expand(n_sets, -1, -1), *drawn], dim=1)
    if plan.in_pairs:
        if n_random % 2:  # the last pair loses one mask, so a random pair must be the last one
            masks = masks[:, permutations((masks.shape[1],), at, generator)]
        masks = masks ^ coins((n_sets, masks.shape[1], 1), at, generator)  # the first mask of each pair is random
        masks = with_complements(masks)[:, :n_random]
    weights = None
    if plan.weights is not None:
        weights = plan.weights.to(at)[masks.sum(dim=-1)]
        weights = torch.cat([weights.new_ones(n_sets, 2), weights], dim=1)[:, :n_samples].to(device)
    return _with_end_points(masks)[:, :n_samples].to(device), weights


def all_coalitions(n_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all coalitions ``(1, 2^D, D)``, the full and the empty first, and Shapley kernel weights ``(1, 2^D)``."""
    sizes = range(1, n_features)
    none = torch.zeros(0, n_features, dtype=torch.bool, device="cpu")
    masks = _with_end_points(torch.cat([none, *(_subsets(n_features, size) for size in sizes)]))
    kernel = [1 / (size * (n_features - size) * math.comb(n_features, size)) for size in sizes]
    weights = torch.tensor([1.0, *kernel, 1.0], device="cpu")[masks.sum(dim=-1)]
    return masks[None].to(device), weights[None].to(device)


def captum_kernel_shap_masks(n_sets: int, n_samples: int, n_features: int) -> Tensor:
    """Return KernelSHAP's masks as Captum draws them from torch's global generator, on the CPU."""
    cpu = torch.device("cpu")  # the user may have set another default device
    sizes = torch.arange(n_features, dtype=torch.float, device=cpu)
    probabilities = (n_features - 1) / (sizes * (n_features - sizes))
    probabilities[0] = 0.0
    probabilities = (probabilities / probabilities.sum())[None]
    no_sizes, no_noise = torch.zeros(0, dtype=torch.long, device=cpu), torch.zeros(0, n_features, device=cpu)
    masks = []
    for _ in range(n_sets):
        # Captum draws a size, then noise, for each sample. One call for all samples would give other numbers.
        draws = [
            (torch.multinomial(probabilities, 1, True)[0], torch.randn(1, n_features, device=cpu))
            for _ in range(2, n_samples)
        ]
        drawn_sizes = torch.cat([no_sizes, *(size for size, _ in draws)])
        drawn_noise = torch.cat([no_noise, *(normal for _, normal in draws)])
        masks.append(_with_end_points(_largest(drawn_noise, drawn_sizes)))
        replay_captum_fit(n_features)
    return torch.stack(masks)[:, :n_samples]


class _Plan(NamedTuple):
    """The coalitions that are always taken, and how the others are drawn."""

    n_features: int
    in_pairs: bool
    whole: Tensor
    """Coalitions of the classes taken whole, one coalition of each pair: booleans ``(n, D)``."""
    n_drawn: int
    """Number of coalitions (or pairs) to draw from the other classes."""
    quantiles: list[float]
    """Shares of the drawn coalitions that have at most 0, 1, ... features."""
    tables: dict[int, Tensor]
    """All coalitions of the small classes from which some are drawn, by size."""
    weights: Tensor | None
    """Weights of coalitions by size ``(D + 1,)``; None: all weights are 1."""


@functools.lru_cache(maxsize=8)
def _plan(n: int, n_features: int, in_pairs: bool, all_sizes_equally: bool) -> _Plan:
    """Return the plan for n coalitions.

    Args:
        n: number of coalitions, less than 2^D - 2.
        n_features: D.
        in_pairs: draw pairs of complements; one of each pair has at most D / 2 features.
        all_sizes_equally: draw all sizes equally often; else by Shapley's distribution.
    """
    sizes = range(1, n_features // 2 + 1 if in_pairs else n_features)
    # The class of size D / 2 holds both coalitions of each pair, so it has half as many pairs as coalitions.
    share = {size: 0.5 if in_pairs and 2 * size == n_features else 1.0 for size in sizes}
    counts = {size: count * share[size] for size, count in zip(sizes, _binomials(n_features), strict=False)}
    shapley = {size: share[size] / (size * (n_features - size)) for size in sizes}
    drawn = dict(share if all_sizes_equally else shapley)
    left, whole = math.ceil(n / 2) if in_pairs else n, []
    for size in sorted(sizes, key=lambda size: counts[size] / drawn[size]):
        # The loop starts with the class whose coalitions have the highest probability each.
        if left * drawn[size] < counts[size] * sum(drawn.values()):
            break
        whole.append(size)
        left -= int(counts[size])
        del drawn[size]
    weights = None
    if whole or all_sizes_equally:
        per_draw = sum(drawn.values()) / max(1, left)
        weights = torch.zeros(n_features + 1, device="cpu")
        for size in sizes:
            weight = shapley[size] / counts[size] if size in whole else shapley[size] / drawn[size] * per_draw
            weights[[size, n_features - size if in_pairs else size]] = weight
        weights /= weights.max().clone()
    tables = {size: _subsets(n_features, size)[: int(counts[size])] for size in sizes if counts[size] <= n}
    none = torch.zeros(0, n_features, dtype=torch.bool, device="cpu")
    return _Plan(
        n_features,
        in_pairs,
        torch.cat([none, *(tables.pop(size) for size in whole)]),
        left,
        _quantiles([drawn.get(size, 0.0) for size in range(max(sizes) + 1)]),
        tables,
        weights,
    )


def _binomials(n_features: int) -> list[float]:
    """Return the numbers of coalitions with 1, 2, ..., D - 1 features, each at most 2^60."""
    counts, count = [], 1
    for size in range(1, n_features // 2 + 1):
        count = min(2**60, count * (n_features - size + 1) // size)
        counts.append(float(count))
    return [counts[min(size, n_features - size) - 1] for size in range(1, n_features)]


def _quantiles(masses: list[float]) -> list[float]:
    """Return the shares of draws that have at most 0, 1, ... features, given the probability mass of each size."""
    total = sum(masses)
    quantiles = [share / total if total else 1.0 for share in itertools.accumulate(masses)]
    last = max((size for size, mass in enumerate(masses) if mass), default=0)
    return quantiles[:last] + [1.0] * (len(masses) - last)  # rounding may have missed 1


def _drawn(
    plan: _Plan, n_sets: int, orthogonal: bool, device: torch.device, generator: Generator | None
) -> list[Tensor]:
    """Return the random coalitions as a list of tensors ``(n_sets, n, D)``, without repetitions within a set."""
    start = torch.rand((), device=device, generator=generator)
    counts = _in_proportion(plan.quantiles, plan.n_drawn, float(start))
    parts = []
    for size, table in plan.tables.items():
        order = permutations((n_sets, len(table)), device, generator)[:, : counts[size]]
        parts.append(table.to(device)[order])
    of_others = [size for size, count in enumerate(counts) if size not in plan.tables for _ in range(count)]
    left = torch.tensor(of_others, dtype=torch.long, device=device).expand(n_sets, -1)
    shape = (*left.shape, plan.n_features)
    if orthogonal:  # shuffled, so that each block of orthogonal directions gets coalitions of all sizes
        left = left.gather(1, permutations(shape[:2], device, generator))
    scores = _orthogonal_rows(shape, device, generator) if orthogonal else noise(shape, device, generator)
    masks = _one_of_each_pair(plan, _largest(scores, left))
    # These classes are large, so few coalitions are repeated. Repeated ones are drawn again.
    in_order = _ascending(_keys(masks))
    sets = (in_order[:, 1:] == in_order[:, :-1]).any(dim=1).nonzero().flatten()
    while len(sets):
        some = masks[sets]
        again = _repeated(some)
        n_again = int(again.sum())
        if not n_again:
            break
        redrawn = _largest(noise((n_again, plan.n_features), device, generator), left[sets][again])
        some[again] = _one_of_each_pair(plan, redrawn)
        masks[sets] = some
    return [*parts, masks]


def _one_of_each_pair(plan: _Plan, masks: Tensor) -> Tensor:
    """Replace a coalition of D / 2 features by its complement if it lacks the first feature (pairs only)."""
    if not plan.in_pairs or plan.n_features % 2:
        return masks
    half = masks.sum(dim=-1) == plan.n_features // 2
    return masks ^ (half & ~masks[..., 0])[..., None]


def _repeated(masks: Tensor) -> Tensor:
    """Return True for masks ``(n_sets, n, D)`` that equal an earlier mask of their set, as ``(n_sets, n)``."""
    keys, order = _keys(masks).sort(dim=1, stable=True)
    same = torch.zeros_like(masks[..., 0])
    same[:, 1:] = keys[:, 1:] == keys[:, :-1]
    return torch.zeros_like(same).scatter_(1, order, same)


def _keys(masks: Tensor) -> Tensor:
    """Return a hash number per mask.

    Two different masks rarely have the same number. Then one of them is drawn again without need.
    """
    return as_numbers(masks, torch.float32) @ _weights_of_keys(masks.shape[-1]).to(masks.device)


@functools.lru_cache(maxsize=8)
def _weights_of_keys(n_features: int) -> Tensor:
    # Sums of D such integers are below 2^24, so float32 represents them exactly in any order of summation.
    weights = torch.randint(2**24 // n_features, (n_features,), generator=Generator().manual_seed(0), device="cpu")
    return weights.float()


def _subsets(n_features: int, size: int) -> Tensor:
    """Return all coalitions of a size as booleans ``(n, D)``, in lexicographic order of their features."""
    # Not torch.combinations, which enumerates all D^size tuples.
    members = torch.tensor(list(itertools.combinations(range(n_features), size)), device="cpu")
    return torch.zeros(len(members), n_features, dtype=torch.bool, device="cpu").scatter_(1, members, True)


def _orthogonal_rows(shape: tuple[int, int, int], device: torch.device, generator: Generator | None) -> Tensor:
    """Return blocks of D - 1 orthogonal directions, each uniform on the sphere of vectors with sum 0."""
    n_sets, n, n_features = shape
    size = max(1, min(n_features - 1, n))
    gauss = torch.randn(n_sets, -(-n // size), n_features, size, device=device, generator=generator)
    directions = torch.linalg.qr(gauss - gauss.mean(dim=2, keepdim=True)).Q
    # The signs of LAPACK's QR depend on the first coordinates and would favour some features.
    signs = coins((n_sets, directions.shape[1], size), device, generator)[:, :, None]
    return torch.where(signs, directions, -directions).mT.flatten(1, 2)[:, :n]


def _in_proportion(quantiles: list[float], n: int, start: float) -> list[int]:
    """Return how many of n draws have each size, by systematic sampling: the expected number, rounded down or up."""
    # Systematic sampling places the draws at the points (start + i) / n. `below` counts the points below each quantile.
    below = [min(n, max(0, math.ceil(n * quantile - start))) for quantile in quantiles]
    return [after - before for before, after in zip([0, *below], below, strict=False)]


def _largest(noise: Tensor, sizes: Tensor) -> Tensor:
    """Return True for the largest entries of noise ``(..., D)``; sizes ``(...)`` is the number of them per row."""
    n_features = noise.shape[-1]
    return noise > _ascending(noise).gather(-1, (n_features - 1 - sizes)[..., None])


def _ascending(values: Tensor) -> Tensor:
    # NumPy sorts several times faster than torch on a CPU: 40 % of a call with 64 features.
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _with_end_points(masks: Tensor) -> Tensor:
    """Put the full and the empty coalition before the coalitions ``(..., n, D)``."""
    full = masks.new_ones(*masks.shape[:-2], 1, masks.shape[-1])
    return torch.cat([full, ~full, masks], dim=-2)
