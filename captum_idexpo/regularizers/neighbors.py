"""Neighbours of a batch: where ExpO's regularizers evaluate the model around each input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.inputs import Baselines, Tensors, as_baselines, require_real
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo.attr.sampling import lime_masks
from captum_idexpo.attr.similarity import MaskSimilarity
from captum_idexpo.baselines import generators_of


class Neighbors(NamedTuple):
    """Neighbours of a batch: their tensors ``(n, B, ...)``, coordinates ``(B, n, D)`` and weights ``(B or 1, n)``."""

    tensors: tuple[Tensor, ...]
    coordinates: Tensor
    weights: Tensor | None = None


class Neighborhood(ABC):
    """A distribution of neighbours around each example."""

    @property
    def generators(self) -> list[Generator]:
        """Random generators of the neighbourhood itself, beside the one that `draw` is given."""
        return []

    @abstractmethod
    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Return the number of unknowns of a local fit on these neighbours: an intercept and the slopes."""

    @abstractmethod
    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """Draw n neighbours of each example."""

    def n_default(self, tensors: tuple[Tensor, ...]) -> int:
        """Return the authors' number of neighbours: twice as many as dimensions, at least 20."""
        return max(20, 2 * (self.n_unknowns(tensors) - 1))


@dataclass(frozen=True)
class GaussianNeighbors(Neighborhood):
    """x + sigma N(0, I), the neighbours of ExpO's Fidelity.

    Args:
        sigma: standard deviation, in the inputs' units (the authors: 0.5 on standardised features).
        one_dimensional: move one random coordinate of each example only, as in the authors' 1D-Fidelity.

    Raises:
        ValueError: sigma that is not positive.
    """

    sigma: float = 0.5
    one_dimensional: bool = False

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, given: {self.sigma}.")

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Return 2 in one dimension, else 1 + D."""
        return 2 if self.one_dimensional else 1 + _n_values(tensors)

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """Draw n neighbours of each example."""
        require_real(tensors)
        n_values, device = _n_values(tensors), tensors[0].device
        if not self.one_dimensional:
            coordinates = _drawn(torch.randn, tensors, (n, n_values), generator)
            return Neighbors(_moved(tensors, self.sigma * coordinates), coordinates)
        at = source(device, generator)
        along = drawn_for(
            len(tensors[0]), lambda b: torch.randint(n_values, (b, 1, 1), generator=generator, device=at)
        ).to(device)
        coordinates = _drawn(torch.randn, tensors, (n, 1), generator)
        steps = coordinates.new_zeros(len(along), n, n_values).scatter_(2, along.expand(-1, n, -1), coordinates)
        return Neighbors(_moved(tensors, self.sigma * steps), coordinates)


@dataclass(frozen=True)
class UniformNeighbors(Neighborhood):
    """x + U(-radius, radius), the neighbours of ExpO's Stability.

    Args:
        radius: largest change of a value, in the inputs' units.

    Raises:
        ValueError: a radius that is not positive.
    """

    radius: float = 0.05

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, given: {self.radius}.")

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Return 1 + D."""
        return 1 + _n_values(tensors)

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """Draw n neighbours of each example."""
        require_real(tensors)
        coordinates = 2 * _drawn(torch.rand, tensors, (n, _n_values(tensors)), generator) - 1
        return Neighbors(_moved(tensors, self.radius * coordinates), coordinates)


@dataclass(frozen=True)
class MaskedNeighbors(Neighborhood):
    """LIME's masked copies, weighted by their similarity: ID-ExpO's form for images (arXiv 2310.12553, app. B.1).

    Args:
        baselines: what masked features are set to: a number, a tensor that broadcasts to the inputs, a tuple, or a
            callable of the inputs that returns these.
        feature_mask: a Captum feature mask (superpixels), or a callable of the inputs that returns one. None: every
            element is a feature.
        similarity: weight of a copy.
    """

    baselines: Baselines = 0.0
    feature_mask: Tensors | Callable[[Tensors], Tensors] | None = None
    similarity: MaskSimilarity = field(default_factory=MaskSimilarity)

    @property
    def generators(self) -> list[Generator]:
        """The random generators that the baselines are drawn from."""
        return generators_of(self.baselines)

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Return 1 + the number of features."""
        return 1 + self._layout(tensors).n_features

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """Draw n neighbours of each example."""
        layout, device = self._layout(tensors), tensors[0].device
        masks = drawn_for(
            len(tensors[0]), lambda b: lime_masks("independent", b, n, layout.n_features, device, generator)
        )
        found = self.baselines(self._whole(tensors)) if callable(self.baselines) else self.baselines
        given = found if isinstance(found, tuple) else (found,) * len(tensors)
        # Features that an example does not have count neither as coordinates nor in the weights.
        present = layout.present()
        present = None if present is None else present[:, None]
        coordinates = masks if present is None else masks & present
        masked = MaskedInputs(tensors, as_baselines(given, tensors), layout)
        dtype = tensors[0].dtype if tensors[0].is_floating_point() else torch.get_default_dtype()
        weights = self.similarity.weights(masks.to(torch.promote_types(dtype, torch.float32)), present).to(dtype)
        return Neighbors(masked.copies(masks.transpose(0, 1)), coordinates.to(dtype), weights)

    def _layout(self, tensors: tuple[Tensor, ...]) -> FeatureLayout:
        mask = self.feature_mask(self._whole(tensors)) if callable(self.feature_mask) else self.feature_mask
        return FeatureLayout.of(mask, tensors)

    @staticmethod
    def _whole(tensors: tuple[Tensor, ...]) -> Tensors:
        return tensors if len(tensors) > 1 else tensors[0]


def _n_values(tensors: tuple[Tensor, ...]) -> int:
    """Return the number of values of one example."""
    return sum(tensor[0].numel() for tensor in tensors)


def _drawn(
    sample: Callable[..., Tensor], tensors: tuple[Tensor, ...], shape: tuple[int, ...], generator: Generator | None
) -> Tensor:
    """Return random numbers ``(B, *shape)`` in the inputs' type and on their device."""
    device, dtype = tensors[0].device, tensors[0].dtype
    at = source(device, generator)
    drawn = drawn_for(len(tensors[0]), lambda b: sample(b, *shape, generator=generator, device=at, dtype=dtype))
    return drawn.to(device)


def _moved(tensors: tuple[Tensor, ...], steps: Tensor) -> tuple[Tensor, ...]:
    """Return each example plus its steps ``(B, n, D)``, as ``(n, B, ...)``."""
    sizes = [tensor[0].numel() for tensor in tensors]
    return tuple(
        tensor + part.transpose(0, 1).reshape(-1, *tensor.shape)
        for tensor, part in zip(tensors, steps.split(sizes, dim=2), strict=True)
    )
