"""An explainer as a regularizer calls it, and how a layer's attribution gets to the locations of the inputs."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Mapping
from typing import Any

import captum.attr as captum
import torch
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import Tensors
from captum_idexpo._core.modes import eval_mode, module_of, no_graph
from captum_idexpo.attr._trainable import require_trainable
from captum_idexpo.attr.layer import LayerGradCam
from captum_idexpo.attr.layouts import ReshapeTransform, reshaped


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
    def channels_are_second(self) -> bool:
        """True if the explained layer is known to have channels on its second axis, or was brought to that layout."""
        layer = getattr(self._method, "layer", None)
        laid_out = isinstance(self._method, LayerGradCam) and self._method.reshape_transform is not None
        return laid_out or isinstance(layer, _CHANNELS_SECOND)

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


_CHANNELS_SECOND = (
    _ConvNd,
    _NormBase,
    nn.GroupNorm,
    _AvgPoolNd,
    _MaxPoolNd,
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
)
"""Modules of PyTorch whose output is ``(B, C, ...)``."""


def layer_cells(
    maps: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    transform: ReshapeTransform | None = None,
    *,
    channels_are_second: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return a layer's attribution at the locations of the input, and at its own cells ``(B, n_cells)``.

    For images and volumes ``(B, C, h, w)`` channels are averaged and cells are enlarged to the nearest. For series the
    result is ``(B, 1, T)`` or, if the steps of the input come first, ``(B, T, 1)``. For inputs ``(B, T)``, such as
    token ids, a further axis of the attribution is that of the embedding and is averaged.

    Args:
        maps: the attribution.
        tensors: the inputs.
        transform: brings the attribution to ``(B, C, h, w)`` or ``(B, C, T)``.
        channels_are_second: the attribution is known to be ``(B, C, ...)``.

    Raises:
        ValueError: several layer outputs or inputs; a shape that has no place in the input's; axes that cannot be told
            apart.
    """
    if len(maps) != 1 or len(tensors) != 1:
        raise ValueError("A layer attribution can be ranked where the layer has one output and the model one input.")
    map, tensor = maps[0], tensors[0]
    if transform is not None:
        map = reshaped(map, transform)
    no_place = ValueError(
        f"The layer's attribution {tuple(map.shape)} has no place in the input {tuple(tensor.shape)}: choose a layer "
        "with the input's spatial axes, or one with a row for each of its columns, such as an embedding; or bring it "
        "to (B, C, h, w) or (B, C, T) by reshape_transform=, such as captum_idexpo.attr.tokens_to_map(height, width)."
    )
    if tensor.dim() == 2:
        cells = map if map.dim() == 2 else map.mean(1) if transform is not None else map.flatten(2).mean(2)
        if cells.shape[1:] != tensor.shape[1:]:
            raise no_place
        return cells, cells
    if map.dim() != tensor.dim():
        raise no_place
    if transform is None and not channels_are_second:
        _require_known_axes(map, tensor)
    cells, size = map.mean(1, keepdim=True), tuple(tensor.shape[2:])
    if tensor.dim() == 3:
        return (cells if _axis_of_steps(cells, tensor) == 2 else cells.mT), cells.flatten(1)
    expanded = cells if cells.shape[2:] == size else LayerAttribution.interpolate(cells, size, "nearest")
    return expanded, cells.flatten(1)


def _axis_of_steps(cells: Tensor, tensor: Tensor) -> int:
    """Return the axis of a series that has as many steps as the cells ``(B, 1, T)``."""
    n_steps = cells.shape[2]
    fitting = [axis for axis in (1, 2) if tensor.shape[axis] == n_steps]
    if len(fitting) == 1:
        return fitting[0]
    found = "either" if fitting else "neither"
    raise InputError(
        f"The axes of the input {tuple(tensor.shape)} cannot be told apart: the layer's {n_steps} steps may be on "
        f"{found} of the last two. Bring the layer to as many steps as the input has: reshape_transform=lambda map: "
        "torch.nn.functional.interpolate(map, n_steps) for maps (B, C, T); or explain the inputs themselves."
    )


def _require_known_axes(map: Tensor, tensor: Tensor) -> None:
    """Refuse a map whose channels may lie elsewhere than on the second axis.

    A map of an image has the proportions of the image, up to one cell of rounding. A series has no proportions.
    """
    sizes, full = map.shape[2:], tensor.shape[2:]
    proportional = all(
        abs(a * d - b * c) <= max(c, d) for (a, c), (b, d) in itertools.combinations(zip(sizes, full, strict=True), 2)
    )
    if len(sizes) > 1 and proportional and len(set(map.shape[1:])) > 1:
        return
    raise InputError(
        f"The axes of the layer's attribution {tuple(map.shape)} cannot be told apart for the input "
        f"{tuple(tensor.shape)}: its channels may be second or last. Say so by reshape_transform=: "
        "captum_idexpo.attr.steps_first for (B, T, D), channels_first for (B, h, w, C), tokens_to_map(height, width) "
        "for the tokens of a vision transformer, or lambda tensor: tensor if the channels are second."
    )
