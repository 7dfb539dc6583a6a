"""Trainable attributions of a metric over a whole data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import captum.attr as captum
from captum.attr import Attribution
from torch import Tensor

from captum_idexpo._core.captum import BaselineType
from captum_idexpo._core.errors import InputTypeError
from captum_idexpo.attr._graph import by_outputs
from captum_idexpo.attr._trainable import logged, part, require_trainable
from captum_idexpo.attr.ablation import FeatureAblation

_KINDS = (FeatureAblation, captum.FeatureAblation)


class DataLoaderAttribution(captum.DataLoaderAttribution):
    """Decrease of a metric over a loader when a feature is replaced, as `captum.attr.DataLoaderAttribution`.

    Args:
        attr_method: a `captum_idexpo.attr.FeatureAblation`. Without create_graph, Captum's class is also accepted.
            Subclasses are not accepted.

    Raises:
        TypeError: ``attr_method`` is another attribution.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import DataLoaderAttribution, FeatureAblation
        >>> model = torch.nn.Linear(3, 1)
        >>> loader = torch.utils.data.DataLoader(torch.randn(20, 3), batch_size=8)
        >>> attribution = DataLoaderAttribution(FeatureAblation(model)).attribute(
        ...     loader, to_metric=lambda outputs: outputs.square().mean(dim=0), create_graph=True
        ... )
        >>> attribution.shape
        torch.Size([1, 3])
        >>> attribution.sum().backward()
    """

    def __init__(self, attr_method: Attribution) -> None:
        if type(attr_method) not in _KINDS:
            raise InputTypeError(
                f"DataLoaderAttribution takes a FeatureAblation, given: {type(attr_method).__name__}. Its features are "
                "replaced by a baseline in all batches alike, which no other attribution does."
            )
        Attribution.__init__(self, attr_method.forward_func)
        self.attr_method = copy.copy(attr_method)
        self.attr_method.forward_func = self._forward_with_dataloader

    @logged
    def attribute(
        self,
        dataloader: Any,
        input_roles: tuple[int, ...] | None = None,
        baselines: BaselineType = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        reduce: Callable[..., Any] | None = None,
        to_metric: Callable[[Any], Tensor] | None = None,
        perturbations_per_pass: int = 1,
        show_progress: bool = False,
        return_input_shape: bool = True,
        *,
        create_graph: bool = False,
    ) -> Any:
        """Return the metric minus the metric with the feature replaced in every batch.

        Args:
            dataloader: yields batches, tensors or tuples of tensors. Every iteration must yield the same batches.
            input_roles: for each tensor of a batch 0 (explained), 1 (passed to the forward function) or 2 (passed only
                to ``reduce``). None: all tensors are explained.
            baselines: replaces a feature: None (zero), a number, a tensor with a batch axis of size 1, or a tuple of
                these.
            feature_mask: numbers of features, with a batch axis of size 1; None: every element is a feature.
            reduce: (state, outputs of a batch, perturbed tensors of the batch) -> new state. The first state is None.
                None: concatenates the outputs.
            to_metric: computes the metric, a tensor, from the last state. None: the last state is the metric.
            perturbations_per_pass: features that are replaced during one pass over the loader.
            show_progress: show a progress bar over the passes.
            return_input_shape: return tensors of the inputs' shapes; else one row of features.
            create_graph: attach the attribution to the model's graph; else it is detached. The graphs of all batches
                are kept.

        Returns:
            ``(*metric.shape, *input.shape[1:])``, a tuple if the batches are tuples. With return_input_shape=False,
            ``(*metric.shape, n_features)``.

        Raises:
            RuntimeError: create_graph where no graph can exist.
            TypeError: create_graph with Captum's FeatureAblation.
            AssertionError: as Captum, on arguments that do not fit.
        """
        if create_graph:
            require_trainable(self.attr_method)
        explainer = copy.copy(self)
        explainer.attr_method = _Part(self.attr_method)

        def compute(loader: Any) -> Any:
            batches = _Batches(loader)
            attribution = captum.DataLoaderAttribution.attribute(
                explainer,
                batches,
                input_roles,
                baselines,
                feature_mask,
                reduce,
                to_metric,
                perturbations_per_pass,
                show_progress,
                return_input_shape,
            )
            return attribution[0] if batches.single and return_input_shape else attribution

        return by_outputs(self, compute, dataloader, create_graph)


class _Batches:
    """A loader that yields each batch as a list, because Captum treats the rows of a tensor as several tensors."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.single = False

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.single = isinstance(batch, Tensor)
            yield [batch] if self.single else list(batch)


class _Part:
    """An attribution that runs as a part of another one."""

    def __init__(self, explainer: Any) -> None:
        self._explainer = explainer

    def attribute(self, inputs: Any, **arguments: Any) -> Any:
        return part(type(self._explainer))(self._explainer, inputs, **arguments)
