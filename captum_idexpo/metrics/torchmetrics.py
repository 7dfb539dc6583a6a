"""Insertion and deletion as torchmetrics classes, accumulated over batches and processes (extra ``train``)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from captum_idexpo._core.inputs import Baselines, Tensors
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.targets import Outputs
from captum_idexpo.metrics.insertion_deletion import deletion, insertion

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "captum_idexpo.metrics.Insertion and Deletion need torchmetrics: `pip install 'captum-idexpo[train]'`."
    ) from error


_NUMBERS = itertools.count()


class _Accumulated(Metric):
    """The mean of a metric over all examples of all batches and processes."""

    is_differentiable = False
    full_state_update = False
    forward_func: Callable[..., Any]
    total: Tensor
    count: Tensor
    _metric: Callable[..., Tensor]

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        baselines: Baselines = None,
        group_reduction: Literal["mean", "sum"] = "mean",
        fraction: float = 1.0,
        step_size: int | None = None,
        temperature: float | Literal["auto"] | None = None,
        outputs: Outputs = "logits",
        max_examples_per_batch: int | None = None,
        check_finite: bool = True,
        metric_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(**(metric_kwargs or {}))
        self.__dict__["forward_func"] = forward_func  # so that a module does not become the metric's submodule
        self.baselines = baselines
        self.options: dict[str, Any] = {
            "group_reduction": group_reduction,
            "fraction": fraction,
            "step_size": step_size,
            "temperature": temperature,
            "outputs": outputs,
            "max_examples_per_batch": max_examples_per_batch,
            "check_finite": check_finite,
        }
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # A MetricCollection merges metrics whose states were equal once, even if they score different models.
        self.add_state("number", torch.tensor(next(_NUMBERS)), dist_reduce_fx="max")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Accumulated:
        """Return a copy that scores the same model, for torchmetrics' ``clone``."""
        memo[id(self.forward_func)] = self.forward_func
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    @no_graph()
    def update(
        self,
        inputs: Tensors,
        attributions: Tensors,
        target: Any = None,
        *,
        feature_mask: Tensors | None = None,
        additional_forward_args: object = None,
    ) -> None:
        """Add a batch. The arguments are those of `captum_idexpo.metrics.insertion_deletion`."""
        scores = self._metric(
            self.forward_func,
            inputs,
            attributions,
            baselines=self.baselines,
            feature_mask=feature_mask,
            additional_forward_args=additional_forward_args,
            target=target,
            **self.options,
        )
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Return the mean over all examples so far."""
        return self.total / self.count


class Insertion(_Accumulated):
    """Mean insertion over batches and processes; `captum_idexpo.metrics.insertion` as a `torchmetrics.Metric`.

    Args:
        forward_func: the model to score; switch it to eval mode first.
        baselines: values of deleted locations, and of locations that are not inserted yet.
        group_reduction: a group's attribution is the "mean" or the "sum" over its positions.
        fraction: share of the locations that is inserted. The default is 1.0 (all locations) here, and 0.5 in
            `captum_idexpo.regularizers.InsertionDeletion`.
        step_size: locations per step; None: the smallest number that gives at most 32 steps.
        temperature: None: the hard metric. "auto" or a number: the soft one.
        outputs: what the model returns, as for `captum_idexpo.metrics.insertion_deletion`.
        max_examples_per_batch: rows per forward pass; None: chosen automatically.
        check_finite: check for NaN and infinity.
        metric_kwargs: keyword arguments of `torchmetrics.Metric` (``dist_sync_on_step``, ...).

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Saliency
        >>> from captum_idexpo.metrics import Insertion
        >>> model = torch.nn.Linear(6, 3)
        >>> metric, saliency = Insertion(model, fraction=0.5), Saliency(model)
        >>> for x, y in [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])), (torch.randn(2, 6), torch.tensor([1, 2]))]:
        ...     metric.update(x, saliency.attribute(x, target=y), target=y)
        >>> bool(0 < metric.compute() < 1)
        True
    """

    higher_is_better = True
    _metric = staticmethod(insertion)


class Deletion(_Accumulated):
    """Mean deletion over batches and processes; `captum_idexpo.metrics.deletion` as a `torchmetrics.Metric`.

    The arguments are those of `Insertion`: ``fraction`` defaults to 1.0 (all locations).

    Example:
        >>> import torch
        >>> from captum_idexpo.metrics import Deletion
        >>> model, x = torch.nn.Linear(6, 3), torch.randn(4, 6)
        >>> metric = Deletion(model, baselines=0.0)
        >>> metric.update(x, torch.rand(4, 6), target=1)
        >>> int(metric.count)
        4
    """

    higher_is_better = False
    _metric = staticmethod(deletion)
