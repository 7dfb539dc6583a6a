r"""ExpO: models that are linear, or constant, around each input (Plumb, Al-Shedivat, Cabrera et al. 2020).

.. math::

    \Omega_\text{fidelity} = \operatorname{mean}_{x'} \big(f(x') - g_x(x')\big)^2, \qquad
    \Omega_\text{stability} = \operatorname{mean}_{x'} \big(f(x) - f(x')\big)^2

where :math:`g_x` is the local linear fit of f on the neighbours :math:`x'` themselves (arXiv 1902.06787, sec. 3). The
fit is a projection made of the neighbours alone, so that the gradient flows through the outputs only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.chunks import look
from captum_idexpo._core.compiled import has_compiled_parts
from captum_idexpo._core.forward import BatchForward, evaluate_given
from captum_idexpo._core.inputs import as_batch, check_count, check_optional_count
from captum_idexpo._core.modes import module_of, precision
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics._scoring import TargetScorer
from captum_idexpo.regularizers.base import Penalty, Weight
from captum_idexpo.regularizers.neighbors import (
    GaussianNeighbors,
    MaskedNeighbors,
    Neighborhood,
    Neighbors,
    UniformNeighbors,
)

Function = Callable[[tuple[Tensor, ...], slice, int], Tensor]
"""(rows, which examples they are copies of, how many copies) -> outputs ``(rows, K)``"""


class _LocalPenalty(Penalty):
    """A penalty on the outputs on neighbours of each example."""

    def __init__(
        self,
        term: str,
        forward_func: Callable[..., Any],
        neighborhood: Neighborhood,
        *,
        model: nn.Module | None,
        weight: Weight,
        ratio: float,
        n_neighbors: int | None,
        target_transform: Callable[[Any], Any] | None,
        outputs: Outputs,
        eval_mode: bool,
        generator: Generator | None,
        max_examples_per_batch: int | None,
    ) -> None:
        super().__init__(
            term,
            forward_func,
            model=model,
            weight=weight,
            ratio=ratio,
            target_transform=target_transform,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
        )
        self.neighborhood = neighborhood
        self.n_neighbors = check_optional_count("n_neighbors", n_neighbors)
        self.max_examples_per_batch = check_optional_count("max_examples_per_batch", max_examples_per_batch)

    @property
    def needs_second_derivative(self) -> bool:
        """False: the term is made of outputs alone."""
        return False

    @property
    def generators(self) -> list[Generator]:
        """The random generators that the neighbours are drawn from, beside the global ones."""
        return list(dict.fromkeys([*super().generators, *self.neighborhood.generators]))

    def _function(self, tensors: tuple[Tensor, ...], batch: Batch) -> tuple[Function, int]:
        """Return the function that evaluates rows, and the rows of a forward pass.

        It returns all outputs of a row, the probabilities of all labels, or, if the neighbours are masked copies, the
        score of the target.
        """
        max_rows, side = self.max_examples_per_batch, batch.additional_forward_args
        if self.outputs != "multilabel" and (callable(self.outputs) or isinstance(self.neighborhood, MaskedNeighbors)):
            target = batch.target if callable(self.outputs) else self.explained(batch).target
            scorer = TargetScorer(self.forward_func, tensors, target, side, self.outputs, max_rows=max_rows)

            def scores(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
                return _wide(scorer(rows, examples, n_copies, "probability")[:, None])

            return scores, scorer.max_rows
        forward = BatchForward(self.forward_func, side, len(tensors[0]))

        def all_outputs(rows: tuple[Tensor, ...], examples: slice, n_copies: int) -> Tensor:
            output = _wide(forward(rows, examples, n_copies).reshape(len(rows[0]), -1))
            return output.sigmoid() if self.outputs == "multilabel" else output

        together = max_rows is not None and len(tensors[0]) <= max_rows < 2 * len(tensors[0])
        return all_outputs, look(self.forward_func, all_outputs, tensors, max_rows, together=together).max_rows

    def _evaluate(self, tensors: tuple[Tensor, ...], batch: Batch, *copies: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the outputs ``(B, n, K)`` on each of some sets of copies ``(n, B, ...)`` of a batch."""
        # Differences of neighbouring outputs are smaller than what half precision resolves.
        with torch.autocast(tensors[0].device.type, enabled=False):
            function, max_rows = self._function(tensors, batch)
            compiled = has_compiled_parts(module_of(self.forward_func))
            return [evaluate_given(function, some, max_rows, one_size=compiled) for some in copies]


def _wide(values: Tensor) -> Tensor:
    """Return values in single precision at least, since squares of halves would vanish."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Fidelity(_LocalPenalty):
    """Penalises what a local linear fit leaves of the outputs: ExpO-Fidelity (Plumb et al. 2020, sec. 3.1).

    Least squares with an intercept on the neighbours themselves, averaged over neighbours and outputs. The outputs are
    those that the model returns; on `MaskedNeighbors` the probability of the target; with ``outputs="multilabel"`` the
    probabilities of all labels; with a function as ``outputs`` its score. The term is named "fidelity".

    Args:
        forward_func: the function that is trained: a module, or a callable of the input tensors.
        neighborhood: `GaussianNeighbors` (the authors'; with ``one_dimensional=True`` their 1D-Fidelity, which costs 20
            rows per example, whatever the number of features), `UniformNeighbors`, or `MaskedNeighbors` for images.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start, as the authors do.
        ratio: of the term to the task loss, for an automatic weight. An untrained network is nearly linear, so that
            useful ratios are small: 0.0003 to 0.1 in `benchmarks/expo_uci.py`.
        n_neighbors: of each example; None: twice as many as dimensions of the fit, at least 20.
        target_transform: a function of the loader's target that returns the target of the score, see `Regularizer`.
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
        forward_func: Callable[..., Any],
        neighborhood: Neighborhood | None = None,
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        n_neighbors: int | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
        max_examples_per_batch: int | None = None,
    ) -> None:
        super().__init__(
            "fidelity",
            forward_func,
            GaussianNeighbors() if neighborhood is None else neighborhood,
            model=model,
            weight=weight,
            ratio=ratio,
            n_neighbors=n_neighbors,
            target_transform=target_transform,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
            max_examples_per_batch=max_examples_per_batch,
        )

    def penalty(self, batch: Batch) -> Tensor:
        """Return the mean squared residual of the local fits."""
        tensors = _in_single(as_batch(batch.inputs))
        needed = self.neighborhood.n_unknowns(tensors) + 1
        n = self.neighborhood.n_default(tensors) if self.n_neighbors is None else self.n_neighbors
        if n < needed:
            raise ValueError(
                f"n_neighbors={n} leaves nothing of a local fit with {needed - 1} unknowns: give at least {needed}, or "
                "use GaussianNeighbors(one_dimensional=True), which needs 3."
            )
        neighbors = self.neighborhood.draw(tensors, n, self.generator)
        (values,) = self._evaluate(tensors, batch, neighbors.tensors)
        return weighted_mean(residuals(neighbors, values).square(), neighbors.weights)


class Stability(_LocalPenalty):
    """Penalises outputs that change around an input: ExpO-Stability (Plumb et al. 2020, sec. 3.2).

    The outputs are those of `Fidelity`. The term is named "stability".

    Args:
        forward_func: the function that is trained: a module, or a callable of the input tensors.
        neighborhood: `UniformNeighbors` (the authors'), `GaussianNeighbors`, or `MaskedNeighbors` for images.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        weight: of the term, or "auto": ``ratio`` times the task loss at the start.
        ratio: of the term to the task loss, for an automatic weight.
        n_neighbors: of each example.
        target_transform: a function of the loader's target that returns the target of the score, see `Regularizer`.
        outputs: what the model returns, see `Fidelity`.
        eval_mode: evaluate in eval mode (BatchNorm, dropout).
        generator: source of the neighbours; None: torch's global generator.
        max_examples_per_batch: rows per forward pass; None: chosen automatically.

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
        forward_func: Callable[..., Any],
        neighborhood: Neighborhood | None = None,
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        ratio: float = 1.0,
        n_neighbors: int = 1,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
        max_examples_per_batch: int | None = None,
    ) -> None:
        super().__init__(
            "stability",
            forward_func,
            UniformNeighbors() if neighborhood is None else neighborhood,
            model=model,
            weight=weight,
            ratio=ratio,
            n_neighbors=check_count("n_neighbors", n_neighbors),
            target_transform=target_transform,
            outputs=outputs,
            eval_mode=eval_mode,
            generator=generator,
            max_examples_per_batch=max_examples_per_batch,
        )

    def penalty(self, batch: Batch) -> Tensor:
        """Return the mean squared difference of the outputs on neighbours from those on the inputs."""
        tensors = _in_single(as_batch(batch.inputs))
        assert self.n_neighbors is not None
        neighbors = self.neighborhood.draw(tensors, self.n_neighbors, self.generator)
        plain = tuple(tensor[None].clone() for tensor in tensors)  # the model may write into its input
        values, here = self._evaluate(tensors, batch, neighbors.tensors, plain)
        return weighted_mean((values - here).square(), neighbors.weights)


def _in_single(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return halves, which an earlier layer returned under autocast, in the precision of the model's weights."""
    if precision(tensors[0].device) == torch.float32:
        return tensors
    return tuple(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors)


def residuals(neighbors: Neighbors, values: Tensor) -> Tensor:
    """Return the residuals of a least-squares fit with intercept to values ``(B, n, K)``, one fit per example.

    The fit is a projection, which depends on coordinates and weights alone. It is computed in double precision where
    the device has it. Coordinates that depend on each other (few distinct masks) are fitted in the space they span.
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
    """Return an orthonormal basis of the columns of ``(B, n, D)``, zero in place of those that add nothing."""
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
    """Return the mean over examples and outputs of the (weighted) mean over neighbours, of ``(B, n, K)``."""
    if weights is None:
        return squares.mean()
    weights = weights[..., None]
    return ((weights * squares).sum(dim=1) / weights.sum(dim=1)).mean()
