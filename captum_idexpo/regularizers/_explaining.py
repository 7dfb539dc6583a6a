"""An explainer as a regularizer calls it, and how a layer's attribution gets to the locations of the inputs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from typing import Any

import captum.attr as captum
import torch
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor

from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import Tensors
from captum_idexpo._core.modes import eval_mode, module_of, no_graph
from captum_idexpo.attr._trainable import require_trainable


class Explaining:
    """An explainer and the arguments it is always called with.

    Args:
        explainer: an attribution of `captum_idexpo.attr`.
        attribute_kwargs: arguments of its ``attribute``.

    Attributes:
        seconds: that the last call took.

    Raises:
        TypeError: no attribution, or one of Captum's own classes, through which nothing can be trained.
        ValueError: a distribution of baselines is needed and not given; a convergence delta is asked for.
    """

    def __init__(self, explainer: Attribution, attribute_kwargs: Mapping[str, Any] | None) -> None:
        self.explainer = require_attribution(explainer)
        self.arguments = dict(attribute_kwargs or {})
        self.takes = require_trainable(explainer)
        if isinstance(explainer, captum.NoiseTunnel):
            self.takes |= require_trainable(explainer.attribution_method)
        self._require_distribution()
        if self.arguments.get("return_convergence_delta"):
            raise ValueError("A convergence delta is no attribution: leave return_convergence_delta out.")
        self.seconds = 0.0

    def __call__(self, inputs: Tensors, create_graph: bool, **offered: Any) -> tuple[Tensor, ...]:
        """Return the attribution, one map per tensor, in single precision at least.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            create_graph: attach the attribution to the graph of the model's parameters.
            offered: arguments, of which the explainer is given those that it takes and that are not fixed.
        """
        started = time.perf_counter()
        arguments = {name: value for name, value in offered.items() if name in self.takes}
        attribution = self.explainer.attribute(inputs, create_graph=create_graph, **{**arguments, **self.arguments})
        self.seconds = time.perf_counter() - started
        return widened(tuple(attribution) if isinstance(attribution, (tuple, list)) else (attribution,))

    @property
    def generators(self) -> list[Generator]:
        """The random generator that the explainer is always given, if there is one."""
        given = self.arguments.get("generator")
        return [] if given is None else [given]

    def of_one_column(self, tensors: tuple[Tensor, ...], additional_forward_args: object = None) -> bool:
        """Return True if the explained output is a single (binary) logit."""
        arguments = additional_forward_args
        forward, first = BatchForward(self.explainer.forward_func, arguments, len(tensors[0])), slice(0, 1)
        with no_graph(), eval_mode(module_of(self.explainer.forward_func)):  # a single row has no statistics
            return bool(forward(tuple(tensor[first].clone() for tensor in tensors), first).numel() == 1)

    @property
    def of_layer(self) -> bool:
        """True if a layer is explained, in its own shape; also under a NoiseTunnel."""
        return isinstance(self._method, LayerAttribution)

    @property
    def signed_for_target(self) -> bool:
        """True if a positive attribution is evidence for the target, and so against the other of two classes."""
        magnitude = isinstance(self._method, captum.Saliency) and self.arguments.get("abs", True)
        squared = self.arguments.get("nt_type", "smoothgrad") != "smoothgrad"
        return "target" in self.takes and not magnitude and not squared

    @property
    def _method(self) -> Attribution:
        method: Attribution = getattr(self.explainer, "attribution_method", self.explainer)
        return method

    def _require_distribution(self) -> None:
        """Refuse GradientShap and other classes that need a distribution of baselines if none is given."""
        baselines = inspect.signature(self.explainer.attribute).parameters.get("baselines")
        needed = baselines is not None and baselines.default is inspect.Parameter.empty
        if needed and "baselines" not in self.arguments:
            raise ValueError(
                f"{type(self.explainer).__name__} needs a distribution of baselines, tensors (n, ...): pass "
                "attribute_kwargs={'baselines': ...}, for example a batch of training inputs."
            )


def require_attribution(explainer: object) -> Attribution:
    """Return an explainer; TypeError for anything that is no attribution."""
    if not isinstance(explainer, Attribution):
        raise TypeError(
            f"explainer must be an attribution of captum_idexpo.attr, given: {type(explainer).__name__}. "
            "Example: LayerGradCam(model, model.layer3)."
        )
    return explainer


def per_row(map: Tensor, values: Tensor) -> Tensor:
    """Return one value per example ``(B,)`` as a tensor that broadcasts against a map ``(B, ...)``."""
    return values.to(map.dtype).reshape(-1, *[1] * (map.dim() - 1))


def widened(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return maps in single precision at least, since squares of halves vanish and their ranks overflow."""
    return tuple(map.to(torch.promote_types(map.dtype, torch.float32)) for map in maps)


def layer_cells(maps: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return a layer's attribution at the locations of the input, and at its own cells ``(B, n_cells)``.

    For inputs ``(B, C, ...)``, images and series, channels are averaged and cells are enlarged to the nearest. For
    inputs ``(B, T)``, such as token ids, a further axis of the attribution is that of the embedding and is averaged.

    Raises:
        ValueError: several layer outputs or inputs; a shape that has no place in the input's.
    """
    if len(maps) != 1 or len(tensors) != 1:
        raise ValueError("A layer attribution can be ranked where the layer has one output and the model one input.")
    map, tensor = maps[0], tensors[0]
    no_place = ValueError(
        f"The layer's attribution {tuple(map.shape)} has no place in the input {tuple(tensor.shape)}: choose a layer "
        "with the input's spatial axes, or one with a row for each of its columns, such as an embedding."
    )
    if tensor.dim() == 2:
        cells = map.flatten(2).mean(2) if map.dim() > 2 else map
        if cells.shape[1] != tensor.shape[1]:
            raise no_place
        return cells, cells
    if map.dim() != tensor.dim():
        raise no_place
    cells, size = map.mean(1, keepdim=True), tuple(tensor.shape[2:])
    expanded = cells if cells.shape[2:] == size else LayerAttribution.interpolate(cells, size, "nearest")
    return expanded, cells.flatten(1)
