"""ROAD: remove pixels by filling them in from their neighbours, so that no mask shows (Rong et al. 2022).

A network may recognise the mask itself: its shape, or a colour that occurs nowhere else. ROAD (arXiv 2202.00449)
replaces a removed pixel by the mean of its neighbours, removed ones included, and a little noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.forward import evaluate_given
from captum_idexpo._core.inputs import check_inputs, check_not_negative, check_optional_count, require_finite
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics._locations import Locations
from captum_idexpo.metrics._scoring import TargetScorer
from captum_idexpo.metrics.masks import HardMasks

# The four neighbours at the sides count twice as much as those at the corners (the paper's weights 1/6 and 1/12).
_NEIGHBORS = ((1.0, 2.0, 1.0), (2.0, 0.0, 2.0), (1.0, 2.0, 1.0))
_SOLVED = 1e-4  # relative residual; the imputed values differ from the exact ones by about as much
_MOST_STEPS = 1000


@no_graph()
def road(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    attributions: Tensor,
    *,
    target: Any = None,
    additional_forward_args: object = None,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5),
    noise: float = 0.01,
    outputs: Outputs = "logits",
    generator: Generator | None = None,
    max_examples_per_batch: int | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Compute the target's probability without the least relevant pixels, minus that without the most relevant ones.

    The mean over shares of removed pixels. Removed pixels are filled in by noisy linear imputation (`imputed`).
    Arguments not listed here are those of `insertion_deletion`.

    Args:
        inputs: images ``(B, C, H, W)``.
        attributions: ``(B, H, W)``, ``(B, 1, H, W)``, or ``(B, C, H, W)``, of which the mean over the channels counts.
        shares: shares of the pixels that are removed, in (0, 1).
        noise: standard deviation of the noise on imputed pixels, in the inputs' units.
        generator: source of the noise; None: torch's global generator of the inputs' device.

    Returns:
        ``(B,)`` in [-1, 1], high if the attribution is faithful, and about 0 for a random order.

    Raises:
        ValueError: inputs that are no images, a share outside (0, 1), or an error of `insertion_deletion`.

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import road
        >>> images = torch.zeros(1, 1, 8, 8)
        >>> images[..., 2:5, 2:5] = 1
        >>> def forward(x):  # class 1 is the bright square
        ...     return torch.stack([torch.zeros(len(x)), x[:, 0, 2:5, 2:5].sum((1, 2)) - 5], dim=1)
        >>> bool(road(forward, images, attributions=images[:, 0], target=1) > 0.5)
        True
    """
    (images,), _ = check_inputs(inputs, None, check_finite)
    if images.dim() != 4 or not images.is_floating_point():
        raise InputError(f"ROAD fills in the pixels of images (B, C, H, W), given: {tuple(images.shape)}.")
    if not isinstance(shares, Sequence) or not shares or not all(0 < share < 1 for share in shares):
        raise InputError(f"shares must be numbers in (0, 1), given: {shares}.")
    check_not_negative("noise", noise)
    if attributions.dim() == 4:
        attributions = attributions.mean(1, keepdim=True)
    locations = Locations.of(attributions, (images,), None)
    if check_finite:
        require_finite((locations.values,), "attributions")
    max_rows = check_optional_count("max_examples_per_batch", max_examples_per_batch)
    scorer = TargetScorer(forward_func, (images,), target, additional_forward_args, outputs, check_finite, max_rows)
    sign = scorer.sign()
    values = locations.values if sign is None else locations.values * sign
    removed = torch.stack([_removed(order, shares) for order in (-values, values)])  # the least relevant first
    at, shape = source(images.device, generator), images.shape[1:]
    drawn = drawn_for(len(images), lambda n: torch.randn(n, *shape, device=at, generator=generator))
    copies = [
        imputed(images, mask.view(len(images), 1, *shape[1:])) + noise * _where(mask, drawn.to(images), shape)
        for mask in removed.flatten(0, 1)
    ]

    def evaluate(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
        return scorer(rows, examples, n_copies, "probability")

    scores = evaluate_given(evaluate, (torch.stack(copies),), scorer.max_rows)
    if check_finite:
        require_finite((scores,), "the forward function's output on imputed images")
    least, most = scores.unflatten(1, (2, len(shares))).mean(dim=2).unbind(1)
    difference: Tensor = least - most
    return difference


def imputed(images: Tensor, mask: Tensor) -> Tensor:
    """Return images whose masked pixels are the weighted mean of their eight neighbours, the masked ones included.

    That is a linear system with one unknown for each masked pixel and channel, symmetric and positive definite, which
    conjugate gradients solve for the whole batch, in single precision at least.

    Args:
        images: ``(B, C, H, W)``.
        mask: booleans ``(B, 1, H, W)``, True where a pixel is removed.

    Returns:
        Images of the same shape. Where everything is masked, 0.
    """
    dtype, images = images.dtype, images.to(torch.promote_types(images.dtype, torch.float32))
    mask = mask.expand_as(images)
    known = torch.where(mask, 0.0, images)
    degree = _neighbors(torch.ones_like(images[:1]))

    def system(unknown: Tensor) -> Tensor:
        return torch.where(mask, degree * unknown - _neighbors(unknown), 0.0)

    residual = torch.where(mask, _neighbors(known), 0.0)
    size = _squared_norm(residual)
    solution, direction, squared = torch.zeros_like(images), residual, size
    for _ in range(_MOST_STEPS):
        if bool((squared <= _SOLVED**2 * size).all()):
            break
        image_of = system(direction)
        step = squared / _product(direction, image_of).clamp_min(torch.finfo(images.dtype).tiny)
        solution = solution + step * direction
        residual = residual - step * image_of
        before, squared = squared, _squared_norm(residual)
        direction = residual + squared / before.clamp_min(torch.finfo(images.dtype).tiny) * direction
    return torch.where(mask, solution, images).to(dtype)


def _neighbors(images: Tensor) -> Tensor:
    """Return the weighted sum of each pixel's neighbours inside the image."""
    n_channels = images.shape[1]
    weights = torch.tensor(_NEIGHBORS, dtype=images.dtype, device=images.device)
    return conv2d(images, weights.expand(n_channels, 1, 3, 3), padding=1, groups=n_channels)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _squared_norm(a: Tensor) -> Tensor:
    return _product(a, a)


def _removed(order: Tensor, shares: Sequence[float]) -> Tensor:
    """Return which locations are removed at each share, the highest of the order first, booleans ``(k, B, D)``."""
    masks = HardMasks(order)
    counts = torch.tensor([[int(share * order.shape[1] + 1e-9)] for share in shares], device=order.device)
    return masks(masks.thresholds(counts.expand(-1, len(order)))).bool()


def _where(mask: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.where(mask.view(len(mask), 1, *shape[1:]), values, 0.0)
