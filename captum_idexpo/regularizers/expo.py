r"""ExpO: models that are linear, or constant, around each input (Plumb, Al-Shedivat, Cabrera et al. 2020).

.. math::

    \Omega_\text{fidelity} = \operatorname{mean}_{x'} \big(f(x') - g_x(x')\big)^2, \qquad
    \Omega_\text{stability} = \operatorname{mean}_{x'} \big(f(x) - f(x')\big)^2

where :math:`g_x` is the local linear fit of f on the neighbours :math:`x'` themselves (arXiv 1902.06787, sec. 3). The
fit is a projection made of the neighbours alone, so that the gradient flows through the outputs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from captum_idexpo._core.chunks import look, slices
from captum_idexpo._core.features import FeatureLayout, MaskedInputs
from captum_idexpo._core.inputs import align_baselines
from captum_idexpo._core.modes import precision
from captum_idexpo._core.rng import source
from captum_idexpo._core.sharing import drawn_for
from captum_idexpo._core.targets import class_labels
from captum_idexpo.attr.sampling import lime_masks
from captum_idexpo.attr.similarity import MaskSimilarity
from captum_idexpo.metrics._scoring import TargetScorer
from captum_idexpo.regularizers.base import Regularizer, Weight, as_tensors, require_real


class Neighbors(NamedTuple):
    """Neighbours of a batch: their tensors ``(n, B, ...)``, coordinates ``(B, n, D)`` and weights ``(B or 1, n)``."""

    tensors: tuple[Tensor, ...]
    coordinates: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class GaussianNeighbors:
    """x + sigma N(0, I), the neighbours of ExpO's Fidelity.

    Args:
        sigma: standard deviation, in the inputs' units (the authors: 0.5 on standardised features).
        one_dimensional: move one random coordinate of each example only, that of the authors' 1D-Fidelity.

    Raises:
        ValueError: sigma that is not positive.
    """

    sigma: float = 0.5
    one_dimensional: bool = False

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, given: {self.sigma}.")

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Of the local fit: an intercept and the slopes."""
        return 2 if self.one_dimensional else 1 + sum(tensor[0].numel() for tensor in tensors)

    def n_default(self, tensors: tuple[Tensor, ...]) -> int:
        """The authors' choice: twice as many as dimensions, at least 20."""
        return max(20, 2 * (self.n_unknowns(tensors) - 1))

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """So many neighbours of each example."""
        require_real(tensors)
        n_examples, device, dtype = len(tensors[0]), tensors[0].device, tensors[0].dtype
        at = source(device, generator)
        sizes = [tensor[0].numel() for tensor in tensors]
        if not self.one_dimensional:
            coordinates = drawn_for(
                n_examples,
                lambda b: torch.randn(b, n, sum(sizes), generator=generator, device=at, dtype=dtype).to(device),
                n,
                sizes,
            )
            return Neighbors(_moved(tensors, self.sigma * coordinates), coordinates)
        along = drawn_for(
            n_examples,
            lambda b: torch.randint(sum(sizes), (b, 1, 1), generator=generator, device=at).to(device),
            sizes,
        )
        coordinates = drawn_for(
            n_examples, lambda b: torch.randn(b, n, 1, generator=generator, device=at, dtype=dtype).to(device), n
        )
        steps = coordinates.new_zeros(n_examples, n, sum(sizes)).scatter_(2, along.expand(-1, n, -1), coordinates)
        return Neighbors(_moved(tensors, self.sigma * steps), coordinates)


@dataclass(frozen=True)
class UniformNeighbors:
    """x + U(-radius, radius), the neighbours of ExpO's Stability; ValueError for a radius that is not positive."""

    radius: float = 0.05

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, given: {self.radius}.")

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Of the local fit: an intercept and the slopes."""
        return 1 + sum(tensor[0].numel() for tensor in tensors)

    def n_default(self, tensors: tuple[Tensor, ...]) -> int:
        """As for `GaussianNeighbors`."""
        return max(20, 2 * (self.n_unknowns(tensors) - 1))

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """So many neighbours of each example."""
        require_real(tensors)
        shape, device, dtype = (n, self.n_unknowns(tensors) - 1), tensors[0].device, tensors[0].dtype
        at = source(device, generator)
        uniform = drawn_for(
            len(tensors[0]),
            lambda b: torch.rand(b, *shape, generator=generator, device=at, dtype=dtype).to(device),
            shape,
        )
        coordinates = 2 * uniform - 1
        return Neighbors(_moved(tensors, self.radius * coordinates), coordinates)


@dataclass(frozen=True)
class MaskedNeighbors:
    """LIME's masked copies, weighted by their similarity: ID-ExpO's form for images (arXiv 2310.12553, app. B.1).

    Args:
        baselines: what masked features are set to: a number, a tensor that broadcasts to the inputs, or a tuple.
        feature_mask: a Captum feature mask (superpixels), or a callable of the inputs that returns one; None: every
            element is a feature.
        similarity: weight of a copy.
    """

    baselines: Any = 0.0
    feature_mask: Any = None
    similarity: MaskSimilarity = field(default_factory=MaskSimilarity)

    def n_unknowns(self, tensors: tuple[Tensor, ...]) -> int:
        """Of the local fit: an intercept and the slopes."""
        return 1 + self._layout(tensors).n_features

    def n_default(self, tensors: tuple[Tensor, ...]) -> int:
        """As for `GaussianNeighbors`."""
        return max(20, 2 * (self.n_unknowns(tensors) - 1))

    def draw(self, tensors: tuple[Tensor, ...], n: int, generator: Generator | None) -> Neighbors:
        """So many masked copies of each example."""
        layout = self._layout(tensors)
        masks = drawn_for(
            len(tensors[0]),
            lambda b: lime_masks("independent", b, n, layout.n_features, tensors[0].device, generator),
            n,
            layout.n_features,
        )
        given = self.baselines if isinstance(self.baselines, tuple) else (self.baselines,) * len(tensors)
        present = layout.present()
        coordinates = masks if present is None else masks & present[:, None]  # of features that the example has
        masked = MaskedInputs(tensors, align_baselines(given, tensors), layout)
        copies = masked.copies(masks.transpose(0, 1).bool())
        dtype = tensors[0].dtype if tensors[0].is_floating_point() else torch.get_default_dtype()
        return Neighbors(copies, coordinates.to(dtype), self.similarity.weights(masks).to(dtype))

    def _layout(self, tensors: tuple[Tensor, ...]) -> FeatureLayout:
        whole = tensors if len(tensors) > 1 else tensors[0]
        mask = self.feature_mask(whole) if callable(self.feature_mask) else self.feature_mask
        return FeatureLayout.of(mask, tensors)


Outputs = Callable[[tuple[Tensor, ...], slice, int], Tensor]
"""(rows, which examples they are copies of, how many copies) -> outputs ``(rows, K)``"""
Neighborhood = GaussianNeighbors | UniformNeighbors | MaskedNeighbors


class _Local(Regularizer):
    """What `Fidelity` and `Stability` share: neighbours and the outputs on them."""

    def __init__(
        self,
        term: str,
        model: Callable[..., Any],
        neighborhood: Neighborhood,
        *,
        weight: Weight,
        ratio: float,
        n_neighbors: int | None,
        outputs: str,
        eval_mode: bool,
        generator: Generator | None,
        max_examples_per_batch: int | None,
    ) -> None:
        super().__init__(term, model, weight=weight, ratio=ratio, outputs=outputs, eval_mode=eval_mode)
        for name, value in (("n_neighbors", n_neighbors), ("max_examples_per_batch", max_examples_per_batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; given: {value}.")
        self.neighborhood = neighborhood
        self.n_neighbors = n_neighbors
        self.generator = generator
        self.max_examples_per_batch = max_examples_per_batch

    def _outputs(self, tensors: tuple[Tensor, ...], target: Any) -> tuple[Outputs, int]:
        """Return what gives all outputs of rows, or the target's probability if they are masked; rows of a pass."""
        max_rows = self.max_examples_per_batch
        if not isinstance(self.neighborhood, MaskedNeighbors):

            def all_outputs(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
                output: Tensor = self.forward_func(*rows)
                return output.reshape(len(rows[0]), -1)

            together = max_rows is not None and len(tensors[0]) <= max_rows < 2 * len(tensors[0])
            return all_outputs, look(self.forward_func, all_outputs, tensors, max_rows, together=together).max_rows
        if self.outputs == "raw" and isinstance(target, Tensor) and target.is_floating_point():
            target = None  # a regression's target names no column
        scorer = TargetScorer(self.forward_func, tensors, class_labels(target), None, self.outputs, max_rows=max_rows)

        def probabilities(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            return scorer(rows, examples, n_copies, "probability")[:, None]

        return probabilities, scorer.max_rows

    def _evaluate(self, tensors: tuple[Tensor, ...], target: Any, *copies: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs ``(B, n, K)`` on each of some sets of copies ``(n, B, ...)`` of a batch."""
        # Differences of neighbouring outputs are smaller than what half precision resolves.
        with torch.autocast(tensors[0].device.type, enabled=False):
            outputs, max_rows = self._outputs(tensors, target)
            return [_outputs_on(some, outputs, max_rows) for some in copies]


def _outputs_on(copies: tuple[Tensor, ...], outputs: Outputs, max_rows: int) -> Tensor:
    """Return the outputs of copies ``(n, B, ...)``, as ``(B, n, K)``."""
    n_copies, n_examples = copies[0].shape[:2]

    def outputs_of(part: slice, examples: slice) -> Tensor:
        chunk = tuple(copy[part, examples] for copy in copies)
        n_chosen = part.stop - part.start
        values = outputs(tuple(copy.flatten(0, 1) for copy in chunk), examples, n_chosen)
        return values.reshape(n_chosen, examples.stop - examples.start, -1)

    blocks = [
        torch.cat([outputs_of(part, examples) for part in slices(n_copies, max(1, max_rows // n_examples))])
        for examples in slices(n_examples, max_rows)
    ]
    values = torch.cat(blocks, dim=1).transpose(0, 1)
    return values.to(torch.promote_types(values.dtype, torch.float32))  # squares of halves would vanish


class Fidelity(_Local):
    """Penalises what a local linear fit leaves of the outputs: ExpO-Fidelity (Plumb et al. 2020, sec. 3.1).

    Least squares with an intercept on the neighbours themselves, averaged over neighbours and outputs. The outputs are
    those the model returns, or, on `MaskedNeighbors`, the target's probability. The term is named "fidelity".

    Args:
        model: the module, or a forward function, that is trained.
        neighborhood: `GaussianNeighbors` (the authors'; with ``one_dimensional=True`` their 1D-Fidelity, which costs 20
            rows an example whatever the dimension), `UniformNeighbors`, or `MaskedNeighbors` for images.
        weight: the term's, or "auto": ``ratio`` times the task loss at the start, the authors' way.
        ratio: of the term to the task loss, for an automatic weight. An untrained network is nearly linear, so that
            useful ratios are small: 0.0003 to 0.1 in `benchmarks/expo_uci.py`.
        n_neighbors: of each example; None: twice as many as dimensions of the fit, at least 20.
        outputs: what the model returns, as for `captum_idexpo.metrics.insertion_deletion`; "raw" for regression.
        eval_mode: evaluate in eval mode (BatchNorm, dropout).
        generator: source of the neighbours; None: torch's global generator.
        max_examples_per_batch: rows of a forward pass.

    Raises:
        ValueError: an argument out of range; when called, fewer neighbours than the fit has unknowns.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import Fidelity, GaussianNeighbors
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x, y = torch.randn(5, 4), torch.randn(5, 1)
        >>> full = Fidelity(model, GaussianNeighbors(0.5), weight=0.1, outputs="raw")
        >>> full(x, y)["fidelity"].backward()
        >>> linear = Fidelity(torch.nn.Linear(4, 1), outputs="raw")
        >>> bool(linear(x, y)["fidelity"] < 1e-10)  # a linear model is its own local fit
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        neighborhood: Neighborhood | None = None,
        *,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        n_neighbors: int | None = None,
        outputs: str = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
        max_examples_per_batch: int | None = None,
    ) -> None:
        super().__init__(
            "fidelity",
            model,
            GaussianNeighbors() if neighborhood is None else neighborhood,
            weight=weight,
            ratio=ratio,
            n_neighbors=n_neighbors,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
            max_examples_per_batch=max_examples_per_batch,
        )

    def penalty(self, inputs: Any, target: Any, annotations: Any) -> Tensor:
        """The mean squared residual of the local fits."""
        tensors = _in_single(as_tensors(inputs))
        needed = self.neighborhood.n_unknowns(tensors) + 1
        n = self.neighborhood.n_default(tensors) if self.n_neighbors is None else self.n_neighbors
        if n < needed:
            raise ValueError(
                f"n_neighbors={n} leaves nothing of a local fit with {needed - 1} unknowns: give at least {needed}, or "
                "use GaussianNeighbors(one_dimensional=True), which needs 3."
            )
        neighbors = self.neighborhood.draw(tensors, n, self.generator)
        (values,) = self._evaluate(tensors, target, neighbors.tensors)
        return weighted_mean(residuals(neighbors, values).square(), neighbors.weights)


class Stability(_Local):
    """Penalises outputs that change around an input: ExpO-Stability (Plumb et al. 2020, sec. 3.2).

    The outputs are those the model returns, or, on `MaskedNeighbors`, the target's probability. The term is named
    "stability".

    Args:
        model: the module, or a forward function, that is trained.
        neighborhood: `UniformNeighbors` (the authors'), `GaussianNeighbors`, or `MaskedNeighbors` for images.
        weight: the term's, or "auto": ``ratio`` times the task loss at the start.
        ratio: of the term to the task loss, for an automatic weight.
        n_neighbors: of each example.
        outputs, eval_mode, generator, max_examples_per_batch: as for `Fidelity`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import Stability
        >>> model = torch.nn.Linear(4, 3)
        >>> Stability(model, weight=10.0)(torch.randn(5, 4), torch.randint(3, (5,)))["stability"].backward()
    """

    def __init__(
        self,
        model: Callable[..., Any],
        neighborhood: Neighborhood | None = None,
        *,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        n_neighbors: int = 1,
        outputs: str = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
        max_examples_per_batch: int | None = None,
    ) -> None:
        super().__init__(
            "stability",
            model,
            UniformNeighbors() if neighborhood is None else neighborhood,
            weight=weight,
            ratio=ratio,
            n_neighbors=n_neighbors,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
            max_examples_per_batch=max_examples_per_batch,
        )

    def penalty(self, inputs: Any, target: Any, annotations: Any) -> Tensor:
        """The mean squared difference of the outputs on neighbours from those on the inputs."""
        tensors = _in_single(as_tensors(inputs))
        assert self.n_neighbors is not None
        neighbors = self.neighborhood.draw(tensors, self.n_neighbors, self.generator)
        plain = tuple(tensor[None].clone() for tensor in tensors)  # the model may write into its input
        values, here = self._evaluate(tensors, target, neighbors.tensors, plain)
        return weighted_mean((values - here).square(), neighbors.weights)


def _in_single(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast halves, which an earlier layer returned, in the precision of the model's weights."""
    if precision(tensors[0].device) == torch.float32:
        return tensors
    return tuple(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors)


def residuals(neighbors: Neighbors, values: Tensor) -> Tensor:
    """What the least-squares fit with intercept, one an example, leaves of values ``(B, n, K)``.

    The fit is a projection, made of coordinates and weights alone; it is computed in double precision where there is
    any, and of coordinates that depend on each other (few distinct masks) in the space they span.
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        design = torch.nn.functional.pad(neighbors.coordinates.to(wide), (1, 0), value=1.0)
        root = None if neighbors.weights is None else neighbors.weights.to(wide).sqrt()[..., None]
        design = design if root is None else root * design
        basis = _orthonormal(design)
    scaled = values.to(wide) if root is None else root * values.to(wide)
    left = scaled - basis @ (basis.mT @ scaled)
    result: Tensor = left if root is None else left / root.clamp_min(torch.finfo(wide).tiny)
    return result.to(values.dtype)


def _orthonormal(design: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``(B, n, D)``, the zero vector in place of those that add nothing."""
    gram = design.mT @ design
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    if not bool(failed.any()) and bool((diagonal.amin(dim=-1) > 1e-4 * diagonal.amax(dim=-1)).all()):
        basis: Tensor = torch.linalg.solve_triangular(factor, design.mT, upper=False).mT
        return basis
    eigenvalues, vectors = torch.linalg.eigh(gram)  # several times slower, and sees which columns depend on others
    spanned = eigenvalues > 1e-10 * eigenvalues.amax(dim=-1, keepdim=True)
    basis = design @ (vectors * torch.where(spanned, eigenvalues, torch.inf).rsqrt()[:, None, :])
    return basis


def weighted_mean(squares: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over examples and outputs of the (weighted) mean over neighbours, of ``(B, n, K)``."""
    if weights is None:
        return squares.mean()
    weights = weights[..., None]
    return ((weights * squares).sum(dim=1) / weights.sum(dim=1)).mean()


def _moved(tensors: tuple[Tensor, ...], steps: Tensor) -> tuple[Tensor, ...]:
    """Each example plus its steps ``(B, n, D)``, as ``(n, B, ...)``."""
    sizes = [tensor[0].numel() for tensor in tensors]
    return tuple(
        tensor + part.transpose(0, 1).reshape(-1, *tensor.shape)
        for tensor, part in zip(tensors, steps.split(sizes, dim=2), strict=True)
    )
