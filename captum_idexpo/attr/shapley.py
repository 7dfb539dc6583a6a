"""Trainable Shapley values: from sampled orders of the features, or exact values from all coalitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr as captum
import torch
from torch import Tensor

from captum_idexpo._core.captum import BaselineType, TargetType
from captum_idexpo._core.errors import InputError, warn
from captum_idexpo._core.inputs import Tensors
from captum_idexpo.attr._graph import by_outputs
from captum_idexpo.attr._trainable import TensorOrTensors, logged, part
from captum_idexpo.attr.ablation import BatchOutputs

_MANY_COALITIONS = 2**16
_VALUES_TO_COMPARE = 2**22


class ShapleyValueSampling(captum.ShapleyValueSampling):
    """Shapley values, estimated by the mean over random orders of the features (Strumbelj, Kononenko 2010).

    The values equal those of `captum.attr.ShapleyValueSampling` for the same seed of torch's global generator. Many
    coalitions share a forward pass, each coalition is evaluated once, and the precision of the outputs is kept.

    Args:
        forward_func: takes the inputs and the additional arguments. It returns outputs ``(B, ...)``, from which the
            target is chosen, or one value for the whole batch.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import ShapleyValueSampling
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> attribution = ShapleyValueSampling(model).attribute(x, target=1, n_samples=10, create_graph=True)
        >>> gap = (model(x) - model(torch.zeros_like(x)))[:, 1]
        >>> torch.allclose(attribution.sum(dim=1), gap, atol=1e-5)
        True
        >>> attribution.square().sum().backward()
    """

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """Return what each feature adds to the features before it, as the mean over random orders.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            baselines: replaces a missing feature: None (zero), a number, a tensor that broadcasts to the inputs, or a
                tuple of these. A tensor with fewer axes than its input has no batch axis.
            target: int, tensor (B,) or list: the output index to explain; None if there is one output per row.
            additional_forward_args: passed to the forward function after the inputs.
            feature_mask: whole numbers; the locations of one feature have the same number. The mask has the inputs'
                shape or broadcasts to it. For a tuple of inputs, a tuple of such tensors. None: every element is a
                feature.
            n_samples: number of random orders.
            perturbations_per_eval: coalitions per example in one forward pass, which then has this many times B rows.
                None: as for `FeatureAblation`.
            show_progress: show a progress bar over the forward passes.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            A tensor of the inputs' shape, or a tuple for a tuple of inputs. Without a target, the shape is the shape of
            the outputs followed by ``input.shape[1:]``. The dtype is that of the outputs, at least float32.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            ValueError: n_samples is below 1; baselines do not fit.
            AssertionError, IndexError: as Captum, on arguments that do not fit.
        """
        if n_samples < 1:
            raise InputError(f"n_samples must be at least 1, given: {n_samples}.")

        def compute(inputs: Tensors) -> Any:
            outputs = BatchOutputs(self, inputs, target, additional_forward_args, perturbations_per_eval)
            masked = outputs.masked(baselines, feature_mask)
            coalitions = self._coalitions(masked.layout.n_features, n_samples, outputs.tensors[0].device)

            def members(chunk: slice) -> tuple[Tensor, ...]:
                return masked.copies(coalitions.members(slice(1 + chunk.start, 1 + chunk.stop))[:, None])

            changed = outputs.on_copies(members, coalitions.n - 1, masked.emptied(), show_progress)
            with torch.autocast(changed.device.type, enabled=False):
                # The plain output is subtracted, because a large common offset would cost precision in the differences.
                gains = (changed - outputs.plain).to(torch.promote_types(changed.dtype, torch.float32))
                values = coalitions.values(torch.cat([gains.new_zeros(1, *gains.shape[1:]), gains]).flatten(1))
            return outputs.formatted(outputs.laid_out(values, masked.layout))

        attribution: TensorOrTensors = by_outputs(self, compute, inputs, create_graph)
        return attribution

    def _coalitions(self, n_features: int, n_samples: int, device: torch.device) -> Coalitions:
        orders = [torch.randperm(n_features) for _ in range(n_samples)]  # the same random draws as Captum's
        return Coalitions.of_orders(torch.stack(orders).to(device))


class ShapleyValues(ShapleyValueSampling, captum.ShapleyValues):
    """Exact Shapley values (Shapley 1953), as `captum.attr.ShapleyValues`.

    Captum evaluates all D! orders. This class evaluates each of the 2^D coalitions once and returns the same values.

    Args:
        forward_func: as for `ShapleyValueSampling`.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import ShapleyValues
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> attribution = ShapleyValues(model).attribute(x, target=1, create_graph=True)
        >>> torch.allclose(attribution, x * model.weight[1], atol=1e-5)
        True
    """

    # As in Captum, there is no `n_samples`, so mypy reports an incompatible override.
    @logged
    def attribute(  # type: ignore[override]
        self,
        inputs: TensorOrTensors,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """Return what each feature adds to the features before it, as the mean over all orders.

        For the arguments, the result and the errors see `ShapleyValueSampling`.
        """
        attribution: TensorOrTensors = part(ShapleyValueSampling)(
            self,
            inputs,
            baselines=baselines,
            target=target,
            additional_forward_args=additional_forward_args,
            feature_mask=feature_mask,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            create_graph=create_graph,
        )
        return attribution

    def _coalitions(self, n_features: int, n_samples: int, device: torch.device) -> Coalitions:
        if 2**n_features > _MANY_COALITIONS:
            warn(
                f"Exact Shapley values of {n_features} features take 2^{n_features} evaluations of each example: group "
                "them with a feature_mask, or use ShapleyValueSampling or KernelShap.",
            )
        return Coalitions.all(n_features, device)


class Coalitions(NamedTuple):
    """Coalitions of features, the full one first, and the function from their outputs to the features' values."""

    n: int
    members: Callable[[slice], Tensor]
    """Slice of the coalitions -> their features, booleans ``(m, D)``."""
    values: Callable[[Tensor], Tensor]
    """Outputs ``(n, K)`` -> values ``(D, K)``."""

    @classmethod
    def all(cls, n_features: int, device: torch.device) -> Coalitions:
        """Return all 2^D coalitions, which give exact values."""
        features = torch.arange(n_features, device=device)
        # shares[|S|] = |S|! (D - |S| - 1)! / D! is the weight of f(S + i) - f(S) in the value of a feature i outside S.
        shares = [1 / (n_features * math.comb(n_features - 1, size)) for size in range(n_features)]

        def members(chunk: slice) -> Tensor:
            numbers = _last_first(2**n_features, device)[chunk]
            return (numbers[:, None] >> features).bitwise_and(1).bool()

        def values(outputs: Tensor) -> Tensor:
            inside = members(slice(None))
            share = outputs.new_tensor([0.0, *shares, 0.0])
            size = inside.sum(dim=1)
            return torch.where(inside, share[size][:, None], -share[size + 1][:, None]).T @ outputs

        return cls(2**n_features, members, values)

    @classmethod
    def of_orders(cls, orders: Tensor) -> Coalitions:
        """Return the coalitions in the orders ``(n, D)``: the first k features of each order, for k from 0 to D."""
        n_orders, n_features = orders.shape
        position = orders.argsort(dim=1)
        sizes = torch.arange(n_features + 1, device=orders.device)
        if n_orders * n_features**2 > _VALUES_TO_COMPARE:
            return cls._one_by_one(orders, position)
        # Equal coalitions are evaluated once. Larger numbers of coalitions take too much memory to compare.
        distinct, number = (position[:, None, :] < sizes[:, None]).flatten(0, 1).unique(dim=0, return_inverse=True)
        order = _last_first(len(distinct), orders.device)
        number = order.argsort()[number].reshape(n_orders, -1)
        return cls(len(distinct), distinct[order].__getitem__, _gains(orders, number))

    @classmethod
    def _one_by_one(cls, orders: Tensor, position: Tensor) -> Coalitions:
        """Return the full and the empty coalition, which all orders share, then all others, made on demand."""
        n_orders, n_features = orders.shape
        n_inner = n_features - 1
        inner = torch.arange(2, 2 + n_orders * n_inner, device=orders.device).reshape(n_orders, n_inner)
        number = torch.cat([torch.ones_like(orders[:, :1]), inner, torch.zeros_like(orders[:, :1])], dim=1)

        def members(chunk: slice) -> Tensor:
            index = torch.arange(2 + inner.numel(), device=orders.device)[chunk]
            size = torch.where(index < 2, (1 - index) * n_features, (index - 2) % max(1, n_inner) + 1)
            return position[(index - 2).clamp_min(0) // max(1, n_inner)] < size[:, None]

        return cls(2 + inner.numel(), members, _gains(orders, number))


def _last_first(n: int, device: torch.device) -> Tensor:
    """Return n - 1, then 0 to n - 2."""
    return torch.arange(n, device=device).roll(1)


def _gains(orders: Tensor, number: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from outputs to values: the means of the features' gains over the orders.

    Args:
        orders: ``(n, D)``.
        number: index of the coalition of each prefix of each order, ``(n, D + 1)``.
    """

    def values(outputs: Tensor) -> Tensor:
        gains = (outputs[number[:, 1:]] - outputs[number[:, :-1]]).flatten(0, 1) / len(orders)
        return outputs.new_zeros(orders.shape[1], outputs.shape[1]).index_add(0, orders.flatten(), gains)

    return values
