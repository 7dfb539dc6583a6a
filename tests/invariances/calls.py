"""How each class is called on a model of the zoo, with settings under which the result is no matter of chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import captum_idexpo.attr as attr
from captum_idexpo.attr.surrogates import Ridge
from tests.invariances.zoo import Specimen


@dataclass(frozen=True)
class Call:
    """A class and how it is called.

    Attributes:
        build: (model, layer) -> the explainer.
        arguments: (specimen, target) -> the arguments of `attribute`.
        complete: attributions add up to the output's difference from the baselines'.
        random: results differ by chance from row to row, so that a row alone is not the same row in a batch.
        modules_only: the model has to be a module.
        chunk: the argument that bounds a forward pass, and values for a batch of five.
    """

    build: Callable[[Any, Any], Any]
    arguments: Callable[[Specimen, Any], dict[str, Any]] = lambda specimen, target: {"target": target}
    complete: bool = False
    random: bool = False
    modules_only: bool = False
    chunk: tuple[str, tuple[int, ...]] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __call__(self, specimen: Specimen, inputs: Any, target: Any, model: Any = None, **more: Any) -> Any:
        """Attribute, always from the same random numbers."""
        model = specimen.model() if model is None else model
        explainer = self.build(model, model.get_submodule(specimen.layer) if isinstance(model, nn.Module) else None)
        torch.manual_seed(0)
        np.random.seed(0)
        return explainer.attribute(inputs, **{**self.arguments(specimen, target), **more})


def _with_baselines(specimen: Specimen, target: Any) -> dict[str, Any]:
    return {"target": target, "baselines": specimen.baselines()}


def _integrated(specimen: Specimen, target: Any) -> dict[str, Any]:
    return {**_with_baselines(specimen, target), "n_steps": 20}


def _shared(specimen: Specimen, target: Any) -> dict[str, Any]:
    """The same masks for every row, whatever the batch is."""
    return {
        **_with_baselines(specimen, target),
        "feature_mask": feature_mask(specimen),
        "n_samples": 20,
        "sampling": "independent",
        "share_masks": True,
        "generator": torch.Generator().manual_seed(0),
    }


def feature_mask(specimen: Specimen) -> Any:
    """Four features in all, however many elements there are."""
    masks, start = [], 0
    per_tensor = 4 // len(specimen.shapes)
    for shape in specimen.shapes:
        size = int(np.prod(shape))
        masks.append(start + (torch.arange(size) * per_tensor // size).view(1, *shape))
        start += per_tensor
    return tuple(masks) if len(masks) > 1 else masks[0]


def _grouped(specimen: Specimen, target: Any) -> dict[str, Any]:
    return {**_with_baselines(specimen, target), "feature_mask": feature_mask(specimen)}


def _windows(specimen: Specimen, target: Any) -> dict[str, Any]:
    shapes = tuple(tuple(min(2, size) for size in shape) for shape in specimen.shapes)
    return {**_with_baselines(specimen, target), "sliding_window_shapes": shapes if len(shapes) > 1 else shapes[0]}


def _neuron(specimen: Specimen, target: Any) -> dict[str, Any]:
    return {"neuron_selector": specimen.neuron}


def _of_distribution(specimen: Specimen, target: Any) -> dict[str, Any]:
    return {"target": target, "baselines": specimen.inputs(4, seed=3)}


PER_EVAL = ("perturbations_per_eval", (1, 2, 3, 100))
INTERNAL = ("internal_batch_size", (5, 10, 15, 1000))
ROWS = ("internal_batch_size", (1, 3, 7, 1000))
BASELINES = ("internal_batch_size", (20, 30, 1000))  # two baselines at least
CALLS = {
    "Saliency": Call(lambda m, _: attr.Saliency(m)),
    "InputXGradient": Call(lambda m, _: attr.InputXGradient(m)),
    "IntegratedGradients": Call(lambda m, _: attr.IntegratedGradients(m), _integrated, complete=True, chunk=INTERNAL),
    "GradientShap": Call(lambda m, _: attr.GradientShap(m), _of_distribution, random=True, chunk=ROWS),
    "NoiseTunnel": Call(lambda m, _: attr.NoiseTunnel(attr.Saliency(m)), random=True),
    "DeepLift": Call(lambda m, _: attr.DeepLift(m), _with_baselines, complete=True, modules_only=True),
    "DeepLiftShap": Call(
        lambda m, _: attr.DeepLiftShap(m), _of_distribution, complete=True, modules_only=True, chunk=BASELINES
    ),
    "GuidedBackprop": Call(lambda m, _: attr.GuidedBackprop(m), modules_only=True),
    "Deconvolution": Call(lambda m, _: attr.Deconvolution(m), modules_only=True),
    "GuidedGradCam": Call(lambda m, layer: attr.GuidedGradCam(m, layer), modules_only=True),
    "FeatureAblation": Call(lambda m, _: attr.FeatureAblation(m), _grouped, chunk=PER_EVAL),
    "FeaturePermutation": Call(
        lambda m, _: attr.FeaturePermutation(m),
        lambda s, target: {"target": target, "feature_mask": feature_mask(s)},
        random=True,
        chunk=PER_EVAL,
    ),
    "Occlusion": Call(lambda m, _: attr.Occlusion(m), _windows, chunk=PER_EVAL),
    "ShapleyValueSampling": Call(
        lambda m, _: attr.ShapleyValueSampling(m),
        lambda s, target: {**_grouped(s, target), "n_samples": 3},
        complete=True,
        chunk=PER_EVAL,
    ),
    "ShapleyValues": Call(lambda m, _: attr.ShapleyValues(m), _grouped, complete=True, chunk=PER_EVAL),
    "Lime": Call(lambda m, _: attr.Lime(m, Ridge(0.1)), _shared, chunk=PER_EVAL),
    "KernelShap": Call(lambda m, _: attr.KernelShap(m), _shared, complete=True, chunk=PER_EVAL),
    "LayerGradCam": Call(lambda m, layer: attr.LayerGradCam(m, layer)),
    "LayerGradientXActivation": Call(lambda m, layer: attr.LayerGradientXActivation(m, layer)),
    "LayerActivation": Call(lambda m, layer: attr.LayerActivation(m, layer), lambda s, target: {}),
    "LayerConductance": Call(lambda m, layer: attr.LayerConductance(m, layer), _integrated, chunk=INTERNAL),
    "InternalInfluence": Call(lambda m, layer: attr.InternalInfluence(m, layer), _integrated, chunk=INTERNAL),
    "LayerIntegratedGradients": Call(
        lambda m, layer: attr.LayerIntegratedGradients(m, layer), _integrated, chunk=INTERNAL
    ),
    "LayerGradientShap": Call(
        lambda m, layer: attr.LayerGradientShap(m, layer), _of_distribution, random=True, chunk=ROWS
    ),
    "LayerFeatureAblation": Call(lambda m, layer: attr.LayerFeatureAblation(m, layer), chunk=PER_EVAL),
    "LayerFeaturePermutation": Call(
        lambda m, layer: attr.LayerFeaturePermutation(m, layer), random=True, chunk=PER_EVAL
    ),
    "LayerDeepLift": Call(lambda m, layer: attr.LayerDeepLift(m, layer), _with_baselines, modules_only=True),
    "LayerDeepLiftShap": Call(
        lambda m, layer: attr.LayerDeepLiftShap(m, layer), _of_distribution, modules_only=True, chunk=BASELINES
    ),
    "NeuronGradient": Call(lambda m, layer: attr.NeuronGradient(m, layer), _neuron),
    "NeuronIntegratedGradients": Call(
        lambda m, layer: attr.NeuronIntegratedGradients(m, layer),
        lambda s, target: {**_neuron(s, target), "baselines": s.baselines(), "n_steps": 20},
        chunk=INTERNAL,
    ),
    "NeuronGradientShap": Call(
        lambda m, layer: attr.NeuronGradientShap(m, layer),
        lambda s, target: {**_neuron(s, target), "baselines": s.inputs(4, seed=3)},
        random=True,
    ),
    "NeuronConductance": Call(
        lambda m, layer: attr.NeuronConductance(m, layer),
        lambda s, target: {**_integrated(s, target), **_neuron(s, target)},
        chunk=INTERNAL,
    ),
    "NeuronDeepLift": Call(
        lambda m, layer: attr.NeuronDeepLift(m, layer),
        lambda s, target: {**_neuron(s, target), "baselines": s.baselines()},
        modules_only=True,
    ),
    "NeuronDeepLiftShap": Call(
        lambda m, layer: attr.NeuronDeepLiftShap(m, layer),
        lambda s, target: {**_neuron(s, target), "baselines": s.inputs(4, seed=3)},
        modules_only=True,
    ),
    "NeuronGuidedBackprop": Call(lambda m, layer: attr.NeuronGuidedBackprop(m, layer), _neuron, modules_only=True),
    "NeuronDeconvolution": Call(lambda m, layer: attr.NeuronDeconvolution(m, layer), _neuron, modules_only=True),
    "NeuronFeatureAblation": Call(lambda m, layer: attr.NeuronFeatureAblation(m, layer), _neuron, chunk=PER_EVAL),
}


def tensors_of(attribution: Any) -> list[torch.Tensor]:
    return list(attribution) if isinstance(attribution, (tuple, list)) else [attribution]


def rows_of(inputs: Any, rows: Any) -> Any:
    return tuple(tensor[rows] for tensor in inputs) if isinstance(inputs, tuple) else inputs[rows]


def assert_same(some: Any, other: Any, rtol: float = 1e-9) -> None:
    """Equal but for rounding, on the scale of the largest value."""
    for a, b in zip(map(torch.detach, tensors_of(some)), map(torch.detach, tensors_of(other)), strict=True):
        assert a.shape == b.shape
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=max(rtol * scale, 1e-12))
