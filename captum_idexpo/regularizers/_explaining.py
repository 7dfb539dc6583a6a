"""An explainer as a regularizer calls it, and how a layer's attribution gets to the locations of the inputs."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import captum.attr as captum
import torch
from captum.attr import Attribution, LayerAttribution
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.features import FeatureLayout
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import Tensors, as_batch
from captum_idexpo._core.modes import eval_mode, module_of, no_graph
from captum_idexpo.attr._trainable import require_trainable
from captum_idexpo.attr.layer import LayerGradCam
from captum_idexpo.attr.layouts import ReshapeTransform
from captum_idexpo.attr.lime import Lime
from captum_idexpo.baselines import DrawnBaselines, generators_of

SAMPLES_PER_GROUP = 3
"""Masked copies of LIME and KernelSHAP for each group of features, unless the user says how many."""

MOST_GROUPS = 1024
"""So many groups are explained without a word from the user: more need thousands of copies of each example."""


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
            of_method = require_trainable(explainer.attribution_method)
            self.takes = (self.takes - ({"memory_budget"} - of_method)) | of_method
        self._require_distribution()
        if self.arguments.get("return_convergence_delta"):
            raise ValueError("A convergence delta is no attribution: leave return_convergence_delta out.")
        self.seconds = 0.0
        self.layer_shape: torch.Size | None = None

    def __call__(self, inputs: Tensors, create_graph: bool, **offered: Any) -> tuple[Tensor, ...]:
        """Return the attribution, one map per tensor, in single precision at least.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            create_graph: attach the attribution to the graph of the model's parameters.
            offered: arguments, of which the explainer is given those that it takes and that are not fixed.

        Raises:
            InputError: LIME or KernelSHAP of too many features, without a number of samples.
        """
        started = time.perf_counter()
        arguments = {name: value for name, value in offered.items() if name in self.takes} | self.arguments
        if callable(arguments.get("feature_mask")):
            arguments["feature_mask"] = arguments["feature_mask"](inputs)
        if isinstance(arguments.get("baselines"), DrawnBaselines):
            arguments["baselines"] = arguments["baselines"](inputs)
        if isinstance(self._method, Lime):
            arguments = self._sampled(arguments, as_batch(inputs))
        with self._layer_noted():
            attribution = self.explainer.attribute(inputs, create_graph=create_graph, **arguments)
        self.seconds = time.perf_counter() - started
        maps = widened(tuple(attribution) if isinstance(attribution, (tuple, list)) else (attribution,))
        return maps if self.of_layer else tuple(map(_without_column, maps, as_batch(inputs)))

    def _sampled(self, arguments: dict[str, Any], tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        """Return LIME's or KernelSHAP's arguments with a number of samples, and a design that takes a generator."""
        if "n_samples" not in arguments:
            n_groups = _n_groups(arguments.get("feature_mask"), tensors)
            if n_groups > MOST_GROUPS:
                raise InputError(
                    f"{type(self._method).__name__} would explain {n_groups} features one by one: group them by "
                    "feature_mask=, such as lambda x: captum_idexpo.feature_masks.grid(x, 4) for images, or choose the "
                    "number of samples by attribute_kwargs={'n_samples': ...}."
                )
            at_once = {"sampling": "independent"} if self._method._draws_at_once else {}
            arguments = {"n_samples": SAMPLES_PER_GROUP * n_groups, **at_once, **arguments}
        if arguments.get("sampling", "captum") == "captum" and "generator" not in self.arguments:
            arguments = {**arguments, "generator": None}  # Captum's stream is torch's global one
        return arguments

    @property
    def generators(self) -> list[Generator]:
        """The random generators that the explainer is always given, for masks and baselines."""
        given = self.arguments.get("generator")
        return [*([] if given is None else [given]), *generators_of(self.arguments.get("baselines"))]

    def n_columns(self, tensors: tuple[Tensor, ...], additional_forward_args: object = None) -> int:
        """Return how many columns the explained output has."""
        arguments = additional_forward_args
        forward, first = BatchForward(self.explainer.forward_func, arguments, len(tensors[0])), slice(0, 1)
        with no_graph(), eval_mode(module_of(self.explainer.forward_func)):  # a single row has no statistics
            return int(forward(tuple(tensor[first].clone() for tensor in tensors), first).numel())

    @property
    def of_layer(self) -> bool:
        """True if a layer is explained, in its own shape; also under a NoiseTunnel."""
        return isinstance(self._method, LayerAttribution)

    @contextmanager
    def _layer_noted(self) -> Iterator[None]:
        """Note the shape of the layer's own tensor, since a Grad-CAM has no channels."""
        layer = getattr(self._method, "layer", None)
        if not isinstance(self._method, LayerGradCam) or not isinstance(layer, nn.Module):
            yield
            return

        def note(_module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
            explained = arguments if self.arguments.get("attribute_to_layer_input") else output
            tensor = explained[0] if isinstance(explained, (tuple, list)) and explained else explained
            self.layer_shape = tensor.shape if isinstance(tensor, Tensor) else None

        handle = layer.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def check_transform(self, transform: ReshapeTransform | None) -> None:
        """Refuse a layout transform of a regularizer whose explainer cannot use it; ValueError."""
        if transform is None:
            return
        if not self.of_layer:
            raise ValueError("reshape_transform is for explainers of a layer: this explainer explains the inputs.")
        if isinstance(self._method, LayerGradCam) and self._method.reshape_transform is None:
            raise ValueError(
                "LayerGradCam averages gradients over positions, so it has to know the layout before: pass "
                "LayerGradCam(forward_func, layer, reshape_transform=...)."
            )

    @property
    def asks_masked_copies(self) -> bool:
        """True if the explanation is made of the model's answers to copies of which many features are masked."""
        return isinstance(self._method, (Lime, captum.ShapleyValueSampling))

    @property
    def layout(self) -> Layout:
        """Where the channels of the explained layer's attribution are."""
        if isinstance(self._method, LayerGradCam) and self._method.reshape_transform is not None:
            return "named"
        return "known" if isinstance(getattr(self._method, "layer", None), _CHANNELS_SECOND) else "unknown"

    def sign_of_map(self, sign: Tensor | None) -> Tensor | None:
        """Return the sign by which to multiply the attribution of a single column, -1 for class 0.

        It is None for magnitudes and squares, which speak for both classes.

        Raises:
            InputError: the attribution keeps positive evidence or gradients alone, so that the evidence for class 0 is
                not its negative.
        """
        magnitude = isinstance(self._method, captum.Saliency) and self.arguments.get("abs", True)
        squared = self.arguments.get("nt_type", "smoothgrad") != "smoothgrad"
        if sign is None or "target" not in self.takes or magnitude or squared:
            return None
        relu = self.arguments.get("relu_attributions", False)
        if relu or isinstance(self._method, _POSITIVE_ALONE):
            what = "relu_attributions=True keeps" if relu else f"{type(self._method).__name__} keeps"
            cure = "Leave relu_attributions out, or let" if relu else "Let"
            raise InputError(
                f"{what} positive values alone, so the evidence for class 0 of a single column is lost. {cure} the "
                "model return two columns: torch.cat([-z / 2, z / 2], dim=1) of its logit z has the same probabilities."
            )
        return sign

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


def takes_gradients(explainer: Attribution | None) -> bool:
    """Return True unless the attribution is made of outputs on perturbed inputs alone; also where there is none."""
    if isinstance(explainer, captum.NoiseTunnel):
        return takes_gradients(explainer.attribution_method)
    of_outputs = isinstance(explainer, captum.PerturbationAttribution)
    return not of_outputs or isinstance(explainer, (LayerAttribution, captum.NeuronAttribution))


def require_attribution(explainer: object) -> Attribution:
    """Return an explainer; TypeError for anything that is no attribution."""
    if not isinstance(explainer, Attribution):
        raise TypeError(
            f"explainer must be an attribution of captum_idexpo.attr, given: {type(explainer).__name__}. "
            "Example: LayerGradCam(model, model.layer3)."
        )
    return explainer


def _without_column(map: Tensor, tensor: Tensor) -> Tensor:
    """Return a map ``(B, 1, ...)`` in its input's shape: Captum's Shapley values have an axis for a single output."""
    return map.squeeze(1) if map.dim() == tensor.dim() + 1 and map.shape[1] == 1 else map


def per_row(map: Tensor, values: Tensor) -> Tensor:
    """Return one value per example ``(B,)`` as a tensor that broadcasts against a map ``(B, ...)``."""
    return values.to(map.dtype).reshape(-1, *[1] * (map.dim() - 1))


def scaled_by_peak(rows: Tensor) -> Tensor:
    """Return rows ``(B, n)`` divided by their largest magnitude, as a constant; rows of nearly 0 become 0.

    What does not depend on the scale of a map is computed from these, since quotients of very small numbers have
    infinite gradients.
    """
    peaks = rows.detach().abs().amax(dim=1, keepdim=True)
    is_map = peaks > 2**20 * torch.finfo(rows.dtype).tiny
    return torch.where(is_map, rows, 0.0) / torch.where(is_map, peaks, 1.0)


def widened(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return maps in single precision at least, since squares of halves vanish and their ranks overflow."""
    return tuple(map.to(torch.promote_types(map.dtype, torch.float32)) for map in maps)


def _n_groups(feature_mask: object, tensors: tuple[Tensor, ...]) -> int:
    """Return the largest number of features that one example has."""
    layout = FeatureLayout.of(feature_mask, tensors)
    present = layout.present()
    return layout.n_features if present is None else int(present.sum(dim=1).max())


_POSITIVE_ALONE = (captum.GuidedBackprop, captum.GuidedGradCam, captum.Deconvolution)
"""Their backward pass drops negative gradients."""

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


Layout = Literal["placed", "named", "known", "unknown"]
"""Channels are second because a transform of the regularizer or of the explainer put them there, because of the kind of
layer, or maybe not."""


def layer_cells(
    maps: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    layout: Layout,
    layer_shape: torch.Size | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a layer's attribution at the locations of the input, and at its own cells ``(B, n_cells)``.

    The evidence of a location is the sum over its channels: attributions add up to the output (completeness), and so
    does the sum, but not a mean. For images and volumes ``(B, C, h, w)`` cells are enlarged to the nearest. For series
    the result is ``(B, 1, T)`` or, if the steps of the input come first, ``(B, T, 1)``. For inputs ``(B, T)``, such as
    token ids, a further axis of the attribution is that of the embedding, over which it is summed.

    Args:
        maps: the attribution.
        tensors: the inputs.
        layout: where its channels are.
        layer_shape: that of the layer's own tensor, if the map is a Grad-CAM, which has no channels.

    Raises:
        ValueError: several layer outputs or inputs; a shape that has no place in the input's; axes that cannot be told
            apart.
    """
    if len(maps) != 1 or len(tensors) != 1:
        raise ValueError(
            f"A layer's attribution is ranked for one input, given: {len(maps)} maps for {len(tensors)} inputs. Choose "
            "a layer with one output, and pass what is not explained as additional_forward_args."
        )
    map, tensor = maps[0], tensors[0]
    if tensor.dim() == 2:
        return _of_columns(map, tensor, layout)
    if map.dim() != tensor.dim():
        raise _no_place(map, tensor)
    if layout == "unknown":
        _require_known_axes(layer_shape or map.shape, tensor, by_definition=layer_shape is not None)
    cells, size = map.sum(1, keepdim=True), tuple(tensor.shape[2:])
    if tensor.dim() == 3 and layout in ("named", "placed"):
        one_channel = layout == "placed" and map.shape[1:] in ((1, tensor.shape[2]), (tensor.shape[1], 1))
        return (map, map.flatten(1)) if one_channel else (_of_steps(cells, tensor), cells.flatten(1))
    expanded = cells if cells.shape[2:] == size else LayerAttribution.interpolate(cells, size, "nearest")
    return expanded, cells.flatten(1)


def _no_place(map: Tensor, tensor: Tensor) -> ValueError:
    return ValueError(
        f"The layer's attribution {tuple(map.shape)} has no place in the input {tuple(tensor.shape)}: choose a layer "
        "with the input's spatial axes, or one with a row for each of its columns, such as an embedding; or bring it "
        "to (B, C, h, w) or (B, C, T) by reshape_transform=, such as captum_idexpo.attr.tokens_to_map(height, width)."
    )


def _of_columns(map: Tensor, tensor: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the cells of rows ``(B, T)``: of maps ``(B, T)``, ``(B, T, E)``, or ``(B, C, T)`` if that is known."""
    if map.dim() > 2:
        map = map.flatten(2).sum(2) if layout == "unknown" else map.sum(1)
    if map.shape[1:] != tensor.shape[1:]:
        raise _no_place(map, tensor)
    return map, map


def _of_steps(cells: Tensor, tensor: Tensor) -> Tensor:
    """Return cells ``(B, 1, T)`` on the axis of a series that has as many steps."""
    n_steps = cells.shape[2]
    fitting = [axis for axis in (1, 2) if tensor.shape[axis] == n_steps]
    if len(fitting) == 1:
        return cells if fitting[0] == 2 else cells.mT
    if fitting:
        raise InputError(
            f"The axes of the input {tuple(tensor.shape)} cannot be told apart: both have {n_steps} entries, and the "
            "layer's steps may be on either. Pass reshape_transform=lambda map: map.sum(1, keepdim=True) to the "
            "regularizer if they are last, or lambda map: map.sum(1, keepdim=True).mT if they come first."
        )
    raise InputError(
        f"The axes of the input {tuple(tensor.shape)} cannot be told apart: none has as many entries as the layer has "
        f"steps, {n_steps}. Bring the map (B, C, T) to as many steps as the input has by a reshape_transform that ends "
        "with torch.nn.functional.interpolate(map, n_steps)."
    )


def _require_known_axes(shape: torch.Size, tensor: Tensor, by_definition: bool) -> None:
    """Refuse a layer whose channels may lie last.

    Of images and volumes the sizes tell: positions do not grow, and keep the proportions of the input up to a cell of
    rounding. Where both readings fit, Grad-CAM's definition has the channels second. A series has no proportions.
    """
    full, sizes = tensor.shape[2:], ", ".join(map(str, shape[1:]))
    if len(shape) == tensor.dim() > 3 and _fits(shape[2:], full):
        could_be_last = _fits(shape[1:-1], full) and _is_proportional(shape[1:-1], full)
        if not could_be_last or (by_definition and _is_proportional(shape[2:], full)):
            return
    raise InputError(
        f"The axes of the layer (B, {sizes}) cannot be told apart for the input {tuple(tensor.shape)}: its channels "
        "may be second or last. Say so by reshape_transform=, an argument of LayerGradCam or, for other explainers, of "
        "the regularizer: lambda tensor: tensor if they are second, captum_idexpo.attr.channels_first for (B, h, w, "
        "C), steps_first for (B, T, D), tokens_to_map(height, width) for the tokens of a vision transformer."
    )


def _fits(sizes: torch.Size, full: torch.Size) -> bool:
    return all(size <= whole for size, whole in zip(sizes, full, strict=True))


def _is_proportional(sizes: torch.Size, full: torch.Size) -> bool:
    pairs = itertools.combinations(zip(sizes, full, strict=True), 2)
    return all(abs(a * d - b * c) <= max(c, d) for (a, c), (b, d) in pairs)
