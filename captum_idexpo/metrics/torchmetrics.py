"""Insertion and deletion as torchmetrics: accumulated over batches and processes (extra ``train``)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.modes import no_graph
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

    def __init__(
        self, forward_func: Any, baselines: Any = None, *, metric_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Args: see the subclasses."""
        super().__init__(**(metric_kwargs or {}))
        self.__dict__["forward_func"] = forward_func  # the user's; no submodule of a metric
        self.baselines = baselines
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # A MetricCollection takes metrics for one whose states have once been equal, whatever they score.
        self.add_state("number", torch.tensor(next(_NUMBERS)), dist_reduce_fx="max")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Accumulated:
        """A copy that scores the same model, as torchmetrics' ``clone``."""
        memo[id(self.forward_func)] = self.forward_func
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def compute(self) -> Tensor:
        """The mean over what was seen."""
        return self.total / self.count

    def _add(self, scores: Tensor) -> None:
        self.total += scores.double().sum()
        self.count += len(scores)


class Insertion(_Accumulated):
    """Mean insertion over batches and processes; `captum_idexpo.metrics.insertion` as a `torchmetrics.Metric`.

    Args:
        forward_func: what is scored; put it in eval mode.
        baselines: what masked locations are set to.
        metric_kwargs: of `torchmetrics.Metric` (``dist_sync_on_step``, ...).

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Saliency
        >>> from captum_idexpo.metrics import Insertion
        >>> model = torch.nn.Linear(6, 3)
        >>> metric, saliency = Insertion(model), Saliency(model)
        >>> for x, y in [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])), (torch.randn(2, 6), torch.tensor([1, 2]))]:
        ...     metric.update(x, saliency.attribute(x, target=y), target=y)
        >>> bool(0 < metric.compute() < 1)
        True
    """

    higher_is_better = True

    @no_graph()
    def update(self, inputs: Any, attributions: Any, target: Any = None, **arguments: Any) -> None:
        """Adds a batch; arguments as for `captum_idexpo.metrics.insertion`."""
        self._add(insertion(self.forward_func, inputs, attributions, self.baselines, target=target, **arguments))


class Deletion(_Accumulated):
    """Mean deletion over batches and processes; `captum_idexpo.metrics.deletion` as a `torchmetrics.Metric`.

    Arguments as for `Insertion`.

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

    @no_graph()
    def update(self, inputs: Any, attributions: Any, target: Any = None, **arguments: Any) -> None:
        """Adds a batch; arguments as for `captum_idexpo.metrics.deletion`."""
        self._add(deletion(self.forward_func, inputs, attributions, self.baselines, target=target, **arguments))
