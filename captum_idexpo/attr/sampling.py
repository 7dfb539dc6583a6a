"""Which features the perturbed copies of LIME and KernelSHAP keep: the random masks.

Two streams of the same distributions: Captum's own, draw by draw, so that equal seeds give Captum's numbers, and an
independent one in a single draw on the inputs' device, for training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import Categorical


def captum_lime_masks(n_examples: int, n_samples: int, n_features: int) -> Tensor:
    """LIME's masks as Captum draws them from torch's global generator, on the CPU, ``(n_examples, n_samples, D)``."""
    masks = []
    for _ in range(n_examples):
        masks.append(torch.bernoulli(torch.ones(n_samples, n_features) * 0.5).bool())
        replay_captum_fit(n_features)
    return torch.stack(masks)


def captum_kernel_shap_masks(n_examples: int, n_samples: int, n_features: int) -> Tensor:
    """KernelSHAP's masks as Captum draws them from torch's global generator, ``(n_examples, n_samples, D)``."""
    sizes = _coalition_sizes(n_features).probs[None]
    masks = []
    for _ in range(n_examples):
        # Captum draws a size, then its noise, sample by sample; no single call has the same stream.
        draws = [(torch.multinomial(sizes, 1, True), torch.randn(1, n_features)) for _ in range(2, n_samples)]
        masks.append(_with_end_points(_largest([size for size, _ in draws], [noise for _, noise in draws]), n_features))
        replay_captum_fit(n_features)
    return torch.stack(masks)[:, :n_samples]


def independent_lime_masks(
    n_examples: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None = None
) -> Tensor:
    """LIME's masks, each feature kept with probability 1/2, in one draw, ``(n_examples, n_samples, D)``."""
    n_masked = n_examples * n_samples * n_features
    return _random_bits(n_masked, device, generator).view(n_examples, n_samples, n_features)


def independent_kernel_shap_masks(
    n_examples: int, n_samples: int, n_features: int, device: torch.device, generator: Generator | None = None
) -> Tensor:
    """KernelSHAP's masks (the full, the empty, then Shapley-distributed coalitions) in one draw."""
    source = device if generator is None else generator.device
    probabilities = _coalition_sizes(n_features).probs.to(source)
    n_random = max(0, n_samples - 2)
    noise = _random_numbers(n_examples * n_random * n_features, source, generator)
    noise = noise.view(n_examples, n_random, n_features)
    sizes = torch.zeros(n_examples, n_random, 1, dtype=torch.long, device=source)
    if n_random:
        sizes = torch.multinomial(probabilities, n_examples * n_random, True, generator=generator).view_as(sizes)
    masks = _with_end_points(_above_threshold(noise, sizes), n_features)
    return masks[:, :n_samples].to(device)


def _coalition_sizes(n_features: int) -> Categorical:
    """Shapley's distribution of a coalition's size k in 1..D-1: proportional to (D - 1) / (k (D - k))."""
    if n_features < 2:
        raise ValueError(f"KernelShap shares the output among features and needs two at least; given: {n_features}.")
    sizes = torch.arange(n_features, dtype=torch.float)
    probabilities = (n_features - 1) / (sizes * (n_features - sizes))
    probabilities[0] = 0.0
    return Categorical(probabilities)


def _largest(sizes: list[Tensor], noise: list[Tensor]) -> Tensor:
    if not sizes:
        return torch.zeros(0, 0, dtype=torch.bool)
    return _above_threshold(torch.cat(noise), torch.cat(sizes))


def _above_threshold(noise: Tensor, sizes: Tensor) -> Tensor:
    """Keeps the ``sizes`` (..., 1) largest of the noise (..., D)."""
    n_features = noise.shape[-1]
    return noise > _sorted(noise).gather(-1, n_features - sizes - 1)


def _sorted(noise: Tensor) -> Tensor:
    """Sorted along the last axis; on a CPU by NumPy, which is ten times faster at it than torch."""
    if noise.device.type == "cpu":
        return torch.from_numpy(np.sort(noise.numpy(), axis=-1))
    return noise.sort(dim=-1).values


def _random_bits(n: int, device: torch.device, generator: Generator | None) -> Tensor:
    """n fair coins, thirty-two to a random number: ``(n,)``, bool."""
    source = device if generator is None else generator.device
    octets = _random_numbers(-(-n // 32), source, generator).view(torch.uint8)
    positions = torch.arange(8, dtype=torch.uint8, device=source)[:, None]
    return ((octets >> positions) & 1).view(torch.bool).flatten()[:n].to(device)


def _random_numbers(n: int, device: torch.device, generator: Generator | None) -> Tensor:
    """n numbers ``(n,)``, uniform over all of int32."""
    wide = torch.empty(-(-n // 2), dtype=torch.int64, device=device)
    wide.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return wide.view(torch.int32)[:n]


def _with_end_points(masks: Tensor, n_features: int) -> Tensor:
    """Puts the full and the empty coalition before the random ones (..., n, D)."""
    full = masks.new_ones(*masks.shape[:-2], 1, n_features)
    return torch.cat([full, torch.zeros_like(full), *([masks] if masks.numel() else [])], dim=-2)


def replay_captum_fit(n_features: int) -> None:
    """Draws what Captum's fit of a surrogate draws: a DataLoader's seed and a linear layer's initial weights."""
    torch.empty((), dtype=torch.int64).random_()
    torch.nn.Linear(n_features, 1)
