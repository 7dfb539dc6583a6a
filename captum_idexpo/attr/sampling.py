"""Which features the perturbed copies of LIME and KernelSHAP keep: the random masks.

* "captum": Captum's own stream, draw by draw, so that equal seeds give Captum's numbers;
* "independent": the same distribution in a single draw on the inputs' device;
* "paired": each mask is followed by its complement, which cancels every interaction of even order;
* "orthogonal": pairs made of blocks whose columns (LIME: Hadamard matrices) or rows (KernelSHAP) are orthogonal, so
  that features take less from each other; KernelSHAP's coalition sizes in exact proportion;
* "leverage" (KernelSHAP): as "orthogonal", but all coalition sizes equally often and weighted back to Shapley's
  distribution, the leverage scores of Musco and Witter (2024, arXiv 2410.01917).

Every design has the same limit of infinitely many samples. Masks are ``(n_sets, n_samples, D)``, bool.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Generator, Tensor

from captum_idexpo._core.order import ascending
from captum_idexpo._core.rng import source

LIME_SAMPLINGS: tuple[str, ...] = ("captum", "independent", "paired", "orthogonal")
KERNEL_SHAP_SAMPLINGS: tuple[str, ...] = (*LIME_SAMPLINGS, "leverage")


def lime_masks(
    sampling: str, n_sets: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None
) -> Tensor:
    """LIME's masks, each feature kept with probability 1/2."""
    if sampling == "captum":
        return captum_lime_masks(n_sets, n_samples, n_features).to(device)
    at = _source(device, generator)
    if sampling == "independent":
        return _coins((n_sets, n_samples, n_features), at, generator).to(device)
    n_pairs = -(-n_samples // 2)
    draw = _orthogonal_coins if sampling == "orthogonal" else _coins
    return _with_complements(draw((n_sets, n_pairs, n_features), at, generator))[:, :n_samples].to(device)


def kernel_shap_masks(
    sampling: str, n_sets: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None
) -> tuple[Tensor, Tensor | None]:
    """KernelSHAP's masks (the full, the empty, then coalitions) and their weights ``(n_sets, n_samples)``.

    None stands for weights of 1.
    """
    if sampling == "captum":
        return captum_kernel_shap_masks(n_sets, n_samples, n_features).to(device), None
    at = _source(device, generator)
    quantiles = _quantiles_of_sizes(n_features, sampling == "leverage").to(at)
    n_random = max(0, n_samples - 2)
    n_drawn = n_random if sampling == "independent" else -(-n_random // 2)
    shape = (n_sets, n_drawn, n_features)
    if sampling in ("independent", "paired"):
        points = torch.rand(n_sets, n_drawn, device=at, generator=generator)
        sizes = torch.searchsorted(quantiles, points, right=True)
        masks = _largest(_noise(shape, at, generator), sizes)
    else:
        sizes = _in_proportion(quantiles, n_sets, n_drawn, generator)
        masks = _largest(_orthogonal_rows(shape, at, generator), sizes)
    if sampling != "independent":
        masks = _with_complements(masks)[:, :n_random]
    masks = _with_end_points(masks)[:, :n_samples]
    if sampling != "leverage":
        return masks.to(device), None
    ratio = torch.ones(n_features + 1, device=at)
    ratio[1:n_features] = (n_features - 1) * _coalition_sizes(n_features)[1:].to(at)
    return masks.to(device), ratio[masks.sum(dim=-1)].to(device)


# --- Captum's stream -------------------------------------------------------------------------------------------------


def captum_lime_masks(n_sets: int, n_samples: int, n_features: int) -> Tensor:
    """LIME's masks as Captum draws them from torch's global generator, on the CPU."""
    masks = []
    for _ in range(n_sets):
        masks.append(torch.bernoulli(torch.ones(n_samples, n_features, device="cpu") * 0.5).bool())
        replay_captum_fit(n_features)
    return torch.stack(masks)


def captum_kernel_shap_masks(n_sets: int, n_samples: int, n_features: int) -> Tensor:
    """KernelSHAP's masks as Captum draws them from torch's global generator, on the CPU."""
    probabilities, cpu = _coalition_sizes(n_features)[None], torch.device("cpu")
    no_sizes, no_noise = torch.zeros(0, dtype=torch.long, device=cpu), torch.zeros(0, n_features, device=cpu)
    masks = []
    for _ in range(n_sets):
        # Captum draws a size, then its noise, sample by sample; no single call has the same stream.
        draws = [
            (torch.multinomial(probabilities, 1, True)[0], torch.randn(1, n_features, device=cpu))
            for _ in range(2, n_samples)
        ]
        sizes = torch.cat([no_sizes, *(size for size, _ in draws)])
        noise = torch.cat([no_noise, *(noise for _, noise in draws)])
        masks.append(_with_end_points(_largest(noise, sizes)))
        replay_captum_fit(n_features)
    return torch.stack(masks)[:, :n_samples]


def replay_captum_fit(n_features: int) -> None:
    """Draws what Captum's fit of a surrogate draws: a DataLoader's seed and a linear layer's initial weights."""
    torch.empty((), dtype=torch.int64, device="cpu").random_()
    torch.nn.Linear(n_features, 1, device="cpu")


# --- coins and subsets -----------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]
"""(sets, masks, features)"""


def _coins(shape: Shape, device: torch.device, generator: Generator | None) -> Tensor:
    """Fair coins, thirty-two to a random number."""
    n = shape[0] * shape[1] * shape[2]
    octets = _noise((-(-n // 32),), device, generator).view(torch.uint8)
    positions = torch.arange(8, dtype=torch.uint8, device=device)[:, None]
    return ((octets >> positions) & 1).view(torch.bool).flatten()[:n].view(shape)


def _orthogonal_coins(shape: Shape, device: torch.device, generator: Generator | None) -> Tensor:
    """Fair coins whose columns are orthogonal: blocks of Hadamard rows, columns and signs at random.

    Where one block would do, two halves: with all columns of one length nothing would tell signal from noise to a
    surrogate that looks at the residuals.
    """
    n_sets, n, n_features = shape
    matrix = hadamard(max(2, n_features)).to(device)
    order = len(matrix)
    n_blocks = max(2, -(-n // order))
    size = order if n > order else -(-n // n_blocks)
    rows = _permutations((n_sets, n_blocks, order), device, generator)[..., :size, None]
    columns = _permutations((n_sets, n_blocks, order), device, generator)[..., None, :n_features]
    signs = _coins((n_sets, n_blocks, n_features), device, generator)[:, :, None]
    return ((matrix[rows, columns] > 0) ^ signs).flatten(1, 2)[:, :n]


def _orthogonal_rows(shape: Shape, device: torch.device, generator: Generator | None) -> Tensor:
    """Blocks of D - 1 orthogonal directions, each uniform on the sphere of vectors that add up to 0."""
    n_sets, n, n_features = shape
    size = max(1, min(n_features - 1, n))
    gauss = torch.randn(n_sets, -(-n // size), n_features, size, device=device, generator=generator)
    directions = torch.linalg.qr(gauss - gauss.mean(dim=2, keepdim=True)).Q
    # LAPACK's signs depend on the first coordinates and would favour some features.
    signs = _coins((n_sets, directions.shape[1], size), device, generator)[:, :, None]
    return torch.where(signs, directions, -directions).mT.flatten(1, 2)[:, :n]


def _source(device: torch.device, generator: Generator | None) -> torch.device:
    """Where masks are drawn: at the generator; for MPS, whose integers have 32 bits, on the CPU."""
    at = source(device, generator)
    if at.type != "mps":
        return at
    if generator is not None:
        raise ValueError("A generator on MPS cannot draw masks: give one on the CPU, torch.Generator().")
    return torch.device("cpu")


@functools.lru_cache(maxsize=8)
def hadamard(n: int) -> Tensor:
    """The smallest Hadamard matrix of at least n rows by Sylvester's and Paley's constructions, +1 and -1 as int8."""
    primes = [p for p in range(3, 2 * n + 4, 4) if all(p % q for q in range(3, math.isqrt(p) + 1, 2))]
    orders = [
        (core << doublings, core) for core in [1, *(p + 1 for p in primes)] for doublings in range(n.bit_length() + 1)
    ]
    order, core = min(candidate for candidate in orders if candidate[0] >= n)
    with torch.device("cpu"):  # whatever the default is at the first call
        matrix = _paley(core - 1) if core > 1 else torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(prime: int) -> Tensor:
    """Paley's first construction, of order prime + 1 for a prime that leaves 3 when divided by 4."""
    residue = -torch.ones(prime, dtype=torch.int8)
    residue[torch.arange(prime) ** 2 % prime] = 1
    residue[0] = 0
    index = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index - index[:, None]) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.int8)


@functools.lru_cache(maxsize=8)
def _coalition_sizes(n_features: int) -> Tensor:
    """Shapley's distribution of a coalition's size k in 1..D-1: proportional to (D - 1) / (k (D - k))."""
    if n_features < 2:
        raise ValueError(f"KernelShap shares the output among features and needs two at least; given: {n_features}.")
    sizes = torch.arange(n_features, dtype=torch.float, device="cpu")  # whatever the default is at the first call
    probabilities = (n_features - 1) / (sizes * (n_features - sizes))
    probabilities[0] = 0.0
    return probabilities / probabilities.sum()


@functools.lru_cache(maxsize=8)
def _quantiles_of_sizes(n_features: int, all_equal: bool) -> Tensor:
    """Up to which quantile a coalition has at most 0, 1, ... features; by Shapley's distribution, or all equally."""
    shapley = _coalition_sizes(n_features)
    quantiles = ((shapley > 0).float() if all_equal else shapley).cumsum(0)
    quantiles /= quantiles[-1].clone()
    quantiles[-1] = torch.inf  # a quantile may be rounded to 1
    return quantiles


def _in_proportion(quantiles: Tensor, n_sets: int, n: int, generator: Generator | None) -> Tensor:
    """n values a set ``(n_sets, n)`` of a distribution over 0, 1, ...: systematic sampling, in random order.

    Each draw by itself has the distribution; each value comes as often as is expected, rounded down or up.
    """
    device = quantiles.device
    points = (torch.arange(n, device=device) + torch.rand(n_sets, 1, device=device, generator=generator)) / max(n, 1)
    values = torch.searchsorted(quantiles, points, right=True)
    return values.gather(1, _permutations((n_sets, n), device, generator))


def _largest(noise: Tensor, sizes: Tensor) -> Tensor:
    """Keeps as many of the largest entries of noise ``(..., D)`` as sizes ``(...)`` say."""
    n_features = noise.shape[-1]
    return noise > ascending(noise).gather(-1, (n_features - 1 - sizes)[..., None])


def _permutations(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Random permutations of the last axis."""
    return _noise(shape, device, generator).argsort(dim=-1)


def _noise(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Numbers uniform over all of int32, which are cheaper than floats and have fewer ties."""
    n = math.prod(shape)
    wide = torch.empty(-(-n // 2), dtype=torch.int64, device=device)
    wide.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return wide.view(torch.int32)[:n].view(shape)


def _with_complements(masks: Tensor) -> Tensor:
    """Each mask ``(..., n, D)`` followed by its complement, ``(..., 2n, D)``."""
    return torch.stack([masks, ~masks], dim=-2).flatten(-3, -2)


def _with_end_points(masks: Tensor) -> Tensor:
    """Puts the full and the empty coalition before the random ones ``(..., n, D)``."""
    full = masks.new_ones(*masks.shape[:-2], 1, masks.shape[-1])
    return torch.cat([full, ~full, masks], dim=-2)
