"""Random masks: the features that the perturbed copies of LIME and KernelSHAP keep.

* "captum": Captum's random draws in Captum's order, so that equal seeds give Captum's numbers.
* "independent": Captum's distribution, drawn in one call on the inputs' device.
* "paired": each mask is followed by its complement. This cancels every interaction of even order.
* "orthogonal": pairs from blocks with orthogonal columns (LIME: Hadamard matrices) or orthogonal rows (KernelSHAP).
  This reduces the influence of features on each other's coefficients.
* "leverage" (KernelSHAP only): as "orthogonal", but all coalition sizes are drawn equally often. Weights restore
  Shapley's distribution. These are the leverage scores of Musco and Witter (2024, arXiv 2410.01917).

All designs have the same limit for infinitely many samples. Except with "captum", KernelSHAP evaluates no coalition
twice: sizes are drawn in exact proportion, and sizes with few coalitions are taken whole
(`captum_idexpo.attr.coalitions`). With 2^D samples, the number of coalitions, its values are exact.

Masks are booleans ``(n_sets, n_samples, D)``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Generator, Tensor

from captum_idexpo._core.rng import source

LIME_SAMPLINGS: tuple[str, ...] = ("captum", "independent", "paired", "orthogonal")


def lime_masks(
    sampling: str, n_sets: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None
) -> Tensor:
    """Return LIME's masks, in which each feature is kept with probability 1/2."""
    if sampling == "captum":
        return captum_lime_masks(n_sets, n_samples, n_features).to(device)
    at = source_of_masks(device, generator)
    if sampling == "independent":
        return coins((n_sets, n_samples, n_features), at, generator).to(device)
    n_pairs = -(-n_samples // 2)
    draw = _orthogonal_coins if sampling == "orthogonal" else coins
    return with_complements(draw((n_sets, n_pairs, n_features), at, generator))[:, :n_samples].to(device)


# --- Captum's stream -------------------------------------------------------------------------------------------------


def captum_lime_masks(n_sets: int, n_samples: int, n_features: int) -> Tensor:
    """Return LIME's masks as Captum draws them from torch's global generator, on the CPU."""
    masks = []
    for _ in range(n_sets):
        masks.append(torch.bernoulli(torch.ones(n_samples, n_features, device="cpu") * 0.5).bool())
        replay_captum_fit(n_features)
    return torch.stack(masks)


def replay_captum_fit(n_features: int) -> None:
    """Make the random draws of Captum's surrogate fit: a DataLoader's seed and a linear layer's initial weights."""
    torch.empty((), dtype=torch.int64, device="cpu").random_()
    torch.nn.Linear(n_features, 1, device="cpu")


# --- coins and subsets -----------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]
"""(sets, masks, features)"""


def coins(shape: Shape, device: torch.device, generator: Generator | None) -> Tensor:
    """Return fair coins as booleans; each random number gives 32 coins."""
    n = shape[0] * shape[1] * shape[2]
    octets = noise((-(-n // 32),), device, generator).view(torch.uint8)
    positions = torch.arange(8, dtype=torch.uint8, device=device)[:, None]
    return ((octets >> positions) & 1).view(torch.bool).flatten()[:n].view(shape)


def _orthogonal_coins(shape: Shape, device: torch.device, generator: Generator | None) -> Tensor:
    """Return fair coins with orthogonal columns: blocks of Hadamard matrices with random rows, columns and signs.

    If one block is enough, two halves are used. With one block all columns would have the same length, and a surrogate
    that looks at the residuals could not tell signal from noise.
    """
    n_sets, n, n_features = shape
    matrix = hadamard(max(2, n_features)).to(device)
    order = len(matrix)
    n_blocks = max(2, -(-n // order))
    size = order if n > order else -(-n // n_blocks)
    rows = permutations((n_sets, n_blocks, order), device, generator)[..., :size, None]
    columns = permutations((n_sets, n_blocks, order), device, generator)[..., None, :n_features]
    signs = coins((n_sets, n_blocks, n_features), device, generator)[:, :, None]
    return ((matrix[rows, columns] > 0) ^ signs).flatten(1, 2)[:, :n]


def source_of_masks(device: torch.device, generator: Generator | None) -> torch.device:
    """Return the device on which masks are drawn: the generator's device, or the CPU for MPS.

    MPS has 32-bit random integers, but `noise` draws 64-bit integers.

    Raises:
        ValueError: the generator is on MPS.
    """
    at = source(device, generator)
    if at.type != "mps":
        return at
    if generator is not None:
        raise ValueError("A generator on MPS cannot draw masks: give one on the CPU, torch.Generator().")
    return torch.device("cpu")


@functools.lru_cache(maxsize=8)
def hadamard(n: int) -> Tensor:
    """Return the smallest Hadamard matrix of at least n rows by Sylvester's and Paley's constructions, as int8."""
    primes = [p for p in range(3, 2 * n + 4, 4) if all(p % q for q in range(3, math.isqrt(p) + 1, 2))]
    orders = [
        (core << doublings, core) for core in [1, *(p + 1 for p in primes)] for doublings in range(n.bit_length() + 1)
    ]
    order, core = min(candidate for candidate in orders if candidate[0] >= n)
    with torch.device("cpu"):  # the matrix is cached, so it must not depend on the default device of the first call
        matrix = _paley(core - 1) if core > 1 else torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(prime: int) -> Tensor:
    """Return Paley's first construction, of order prime + 1, for a prime that is 3 modulo 4."""
    residue = -torch.ones(prime, dtype=torch.int8)
    residue[torch.arange(prime) ** 2 % prime] = 1
    residue[0] = 0
    index = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index - index[:, None]) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.int8)


def permutations(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Return random permutations along the last axis."""
    return noise(shape, device, generator).argsort(dim=-1)


def noise(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Return uniform random numbers over all of int32, which are cheaper than floats and have fewer ties."""
    n = math.prod(shape)
    wide = torch.empty(-(-n // 2), dtype=torch.int64, device=device)
    wide.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return wide.view(torch.int32)[:n].view(shape)


def with_complements(masks: Tensor) -> Tensor:
    """Return each mask ``(..., n, D)`` followed by its complement, ``(..., 2n, D)``."""
    return torch.stack([masks, ~masks], dim=-2).flatten(-3, -2)
