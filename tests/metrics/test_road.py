"""ROAD: the imputation against a dense solve, the score against a loop, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_idexpo.metrics import road
from captum_idexpo.metrics.road import imputed
from tests.helpers import smooth_conv_net

G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
MAPS = torch.randn(3, 6, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 2, 1])


def solved(image, mask):
    """Each masked pixel is the weighted mean of its neighbours: one dense linear system."""
    height, width = image.shape
    numbers = {place: k for k, place in enumerate(zip(*np.nonzero(mask), strict=True))}
    system, right = np.zeros((len(numbers), len(numbers))), np.zeros(len(numbers))
    for (i, j), k in numbers.items():
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                a, b = i + di, j + dj
                if (di, dj) == (0, 0) or not (0 <= a < height and 0 <= b < width):
                    continue
                weight = 1 / 12 if di and dj else 1 / 6
                system[k, k] += weight
                if (a, b) in numbers:
                    system[k, numbers[a, b]] -= weight
                else:
                    right[k] += weight * image[a, b]
    result = image.copy()
    result[mask] = np.linalg.solve(system, right)
    return result


def test_imputed_pixels_solve_the_linear_system():
    mask = torch.rand(3, 1, 6, 6, generator=G) < 0.6
    mask[0] = False
    ours = imputed(IMAGES, mask)
    for image, own, found in zip(IMAGES, mask, ours, strict=True):
        for channel in range(2):
            expected = solved(image[channel].numpy(), own[0].numpy()) if own.any() else image[channel].numpy()
            np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-3)
    assert torch.equal(imputed(IMAGES, torch.ones(3, 1, 6, 6, dtype=torch.bool)), torch.zeros_like(IMAGES))


def test_imputed_large_holes_converge():
    image = torch.linspace(0, 1, 96).expand(1, 1, 96, 96).clone()
    mask = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    mask[..., 10:90, 10:90] = True
    torch.testing.assert_close(imputed(image, mask), image, atol=2e-3, rtol=0)  # a slope is its own imputation


def test_road_is_the_difference_of_probabilities_without_the_least_and_the_most_relevant():
    net, shares = smooth_conv_net(), (0.1, 0.5)
    found = road(net, IMAGES, MAPS, target=Y, shares=shares, noise=0.0)
    for b in range(3):
        expected = 0.0
        order = MAPS[b].flatten().argsort(descending=True)
        for share in shares:
            n = int(share * 36)
            for sign, chosen in ((1, order[-n:]), (-1, order[:n])):
                mask = torch.zeros(36, dtype=torch.bool)
                mask[chosen] = True
                image = torch.stack([torch.tensor(solved(c.numpy(), mask.view(6, 6).numpy())) for c in IMAGES[b]])
                p = net(image[None]).softmax(1)[0, Y[b]]
                expected += sign * float(p.detach()) / len(shares)
        assert float(found[b]) == pytest.approx(expected, abs=1e-3)


def test_road_takes_maps_of_any_channels_and_its_noise_from_a_generator():
    net = smooth_conv_net()
    maps = MAPS[:, None].expand(-1, 2, -1, -1)
    values = [road(net, IMAGES, given, target=Y, generator=torch.Generator().manual_seed(0)) for given in (MAPS, maps)]
    assert torch.equal(*values)
    assert not torch.equal(values[0], road(net, IMAGES, MAPS, target=Y, noise=0.0))
    chunks = road(net, IMAGES, MAPS, target=Y, noise=0.0, max_examples_per_batch=2)
    torch.testing.assert_close(chunks, road(net, IMAGES, MAPS, target=Y, noise=0.0))


def test_road_sees_what_the_network_uses_and_not_the_shape_of_the_mask():
    """A network that counts pixels of exactly 0 is fooled by masks of 0, but not by imputed pixels."""
    images = torch.rand(8, 1, 8, 8, generator=G) + 0.1

    def counts_zeros(x):
        return torch.stack([torch.zeros(len(x)), 4 - (x == 0).flatten(1).sum(1).float()], dim=1)

    maps = torch.rand(8, 8, 8, generator=G)
    assert road(counts_zeros, images, maps, target=1).abs().max() == 0


def test_road_of_one_logit_turns_the_sign_for_class_0():
    net = smooth_conv_net(n_classes=1)
    two = lambda x: torch.cat([torch.zeros(len(x), 1), net(x)], dim=1)  # noqa: E731
    target = torch.tensor([0, 1, 0])
    signed = torch.where(target.view(-1, 1, 1) == 1, MAPS, -MAPS)  # MAPS explain the column
    expected = road(two, IMAGES, signed, target=target, noise=0.0)
    torch.testing.assert_close(road(net, IMAGES, MAPS, target=target, noise=0.0), expected)


def test_road_solves_half_precision_in_single_precision_and_reports_nan():
    images = IMAGES.half() + 4
    mask = torch.rand(3, 1, 6, 6, generator=G) < 0.6
    torch.testing.assert_close(imputed(images, mask), imputed(images.float(), mask).half())
    assert imputed(images, mask).dtype == torch.float16

    def breaks(x):
        return torch.where((x == IMAGES[:1]).flatten(1).all(1, keepdim=True), 1.0, torch.nan) * torch.ones(len(x), 2)

    with pytest.raises(ValueError, match="imputed images"):
        road(breaks, IMAGES[:1], MAPS[:1], target=1)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, r"images \(B, C, H, W\)", {"inputs": torch.randn(3, 6), "attributions": torch.randn(3, 6)}),
        (ValueError, r"shares must be numbers in \(0, 1\)", {"shares": (0.5, 1.0)}),
        (ValueError, "shares", {"shares": ()}),
        (ValueError, "shares", {"shares": 0.5}),
        (ValueError, "noise", {"noise": -1.0}),
        (ValueError, "target is missing", {"target": None}),
        (ValueError, "NaN or infinity in attributions", {"attributions": MAPS / 0}),
    ],
)
def test_road_errors_name_bad_arguments(error, text, arguments):
    given = {"inputs": IMAGES, "attributions": MAPS, "target": Y, **arguments}
    with pytest.raises(error, match=text):
        road(smooth_conv_net(), **given)
