"""One or more calls of every attribution, for the tests that all of them have to pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from captum_idexpo.attr.surrogates import Ridge
from tests.helpers import smooth_conv_net, smooth_net

N = torch.Generator().manual_seed(1)
ROWS = torch.randn(4, 6, dtype=torch.float64, generator=N)
IMAGES = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=N)
ROW_BASELINES = torch.randn(5, 6, dtype=torch.float64, generator=N)
IMAGE_BASELINES = torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=N)
TARGET = [0, 1, 2, 0]


class PoolNet(nn.Module):
    """Convolutions, a MaxPool, an activation that works in place where it can; each module is used once.

    A product stands between activation and pool, since Captum's DeepLIFT is wrong for non-linear modules that adjoin.
    """

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.act1, self.pool = nn.Conv2d(2, 4, 3, padding=1), activation(), nn.MaxPool2d(2)
        self.conv2, self.act2, self.flat = nn.Conv2d(4, 5, 3, padding=1), activation(), nn.Flatten()
        self.head, self.out = nn.Linear(45, 3), nn.Tanh()

    def forward(self, x):
        x = self.pool(1.5 * self.act1(self.conv1(x)))
        return self.out(self.head(self.flat(self.act2(self.conv2(x)))))


def pool_net() -> nn.Module:
    return PoolNet(nn.Tanh).double()


def relu_net() -> nn.Module:
    return PoolNet(lambda: nn.ReLU(inplace=True)).double()


class LrpNet(PoolNet):
    """LRP has no rule for modules that flatten."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.ReLU(inplace=True))
        del self.flat

    def forward(self, x):
        x = self.act2(self.conv2(self.pool(self.act1(self.conv1(x)))))
        return self.out(self.head(x.flatten(1)))


def lrp_net() -> nn.Module:
    return LrpNet().double()


@dataclass
class Case:
    """A call: (the package, the model) -> the explainer, and its arguments."""

    name: str
    explainer: Callable[[Any, Any], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = smooth_net

    @property
    def class_name(self) -> str:
        return self.name.split(",")[0]

    @property
    def inputs(self) -> torch.Tensor:
        return ROWS.clone() if self.model is smooth_net else IMAGES.clone()


class OfLoader:
    """An attribution that takes a loader, here one of a single batch."""

    def __init__(self, explainer: Any) -> None:
        self.explainer = explainer

    def attribute(self, inputs: torch.Tensor, **arguments: Any) -> Any:
        attribution = self.explainer.attribute([[inputs]], **arguments)
        return attribution[0]


def layer_lrp(package: Any, model: Any) -> Any:
    explainer = package.LayerLRP(model, model.conv2)
    explainer.device_ids = []  # which Captum's class lacks without a DataParallel
    return explainer


def _lime_base(package: Any, model: Any) -> Any:
    return package.LimeBase(
        lambda x: model(x)[:, 1],
        Ridge(1.0) if package.__name__.startswith("captum_idexpo") else _sk_ridge(),
        similarity_func=lambda x, perturbed, mask, **_: torch.exp(-(mask - 1).square().mean()).item(),
        perturb_func=lambda x, **_: torch.bernoulli(torch.full((1, 6), 0.5)).to(x.device),
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda mask, x, **_: mask * x[:1],
        to_interp_rep_transform=None,
    )


def _sk_ridge() -> Any:
    from captum._utils.models.linear_model import SkLearnRidge

    return SkLearnRidge(alpha=1.0)


T, NEURON = {"target": TARGET}, {"neuron_selector": (1, 2, 2)}
STEPS = {**T, "n_steps": 7}
IN_CHUNKS = {**STEPS, "internal_batch_size": 12}
CASES = [
    Case("Saliency", lambda c, m: c.Saliency(m), T),
    Case("Saliency, signed", lambda c, m: c.Saliency(m), {**T, "abs": False}),
    Case("InputXGradient", lambda c, m: c.InputXGradient(m), T),
    Case("IntegratedGradients", lambda c, m: c.IntegratedGradients(m), STEPS),
    Case("IntegratedGradients, in chunks", lambda c, m: c.IntegratedGradients(m), IN_CHUNKS),
    Case("IntegratedGradients, alone", lambda c, m: c.IntegratedGradients(m, multiply_by_inputs=False), STEPS),
    Case("GradientShap", lambda c, m: c.GradientShap(m), {**T, "baselines": ROW_BASELINES, "stdevs": 0.1}),
    Case("NoiseTunnel", lambda c, m: c.NoiseTunnel(c.Saliency(m)), {**T, "nt_samples_batch_size": 2}),
    Case("NoiseTunnel, squares", lambda c, m: c.NoiseTunnel(c.InputXGradient(m)), {**T, "nt_type": "smoothgrad_sq"}),
    Case("NoiseTunnel, variance", lambda c, m: c.NoiseTunnel(c.IntegratedGradients(m)), {**T, "nt_type": "vargrad"}),
    Case("NoiseTunnel, of ablation", lambda c, m: c.NoiseTunnel(c.FeatureAblation(m)), T),
    Case("DeepLift", lambda c, m: c.DeepLift(m), T, pool_net),
    Case("DeepLift, ReLU", lambda c, m: c.DeepLift(m), {**T, "baselines": IMAGE_BASELINES[:1]}, relu_net),
    Case("DeepLiftShap", lambda c, m: c.DeepLiftShap(m), {**T, "baselines": IMAGE_BASELINES}, pool_net),
    Case("GuidedBackprop", lambda c, m: c.GuidedBackprop(m), T, relu_net),
    Case("Deconvolution", lambda c, m: c.Deconvolution(m), T, relu_net),
    Case("GuidedGradCam", lambda c, m: c.GuidedGradCam(m, m.conv2), T, relu_net),
    Case("FeatureAblation", lambda c, m: c.FeatureAblation(m), T),
    Case("FeatureAblation, all outputs", lambda c, m: c.FeatureAblation(m)),
    Case(
        "FeatureAblation, groups",
        lambda c, m: c.FeatureAblation(m),
        {**T, "feature_mask": torch.tensor([[0, 0, 1, 2, 2, 4]]), "baselines": 0.5},
    ),
    Case("FeaturePermutation", lambda c, m: c.FeaturePermutation(m), T),
    Case(
        "Occlusion",
        lambda c, m: c.Occlusion(m),
        {**T, "sliding_window_shapes": (2, 3, 3), "strides": (1, 2, 2)},
        smooth_conv_net,
    ),
    Case("ShapleyValueSampling", lambda c, m: c.ShapleyValueSampling(m), {**T, "n_samples": 4}),
    Case("ShapleyValueSampling, all outputs", lambda c, m: c.ShapleyValueSampling(m), {"n_samples": 4}),
    Case("ShapleyValues", lambda c, m: c.ShapleyValues(m), {**T, "feature_mask": torch.tensor([[0, 0, 1, 2, 2, 3]])}),
    Case(
        "Lime",
        lambda c, m: c.Lime(m, Ridge(1.0) if c.__name__.startswith("captum_idexpo") else _sk_ridge()),
        {**T, "n_samples": 20},
    ),
    Case("LimeBase", _lime_base, {"n_samples": 20, "perturbations_per_eval": 3}),
    # Captum solves in float32: with many samples and few features it is closest.
    Case("KernelShap", lambda c, m: c.KernelShap(m), {**T, "n_samples": 100}),
    Case("LayerGradCam", lambda c, m: c.LayerGradCam(m, m[4]), T, smooth_conv_net),
    Case("LayerGradientXActivation", lambda c, m: c.LayerGradientXActivation(m, m[4]), T, smooth_conv_net),
    Case(
        "LayerGradientXActivation, list", lambda c, m: c.LayerGradientXActivation(m, [m[0], m[4]]), T, smooth_conv_net
    ),
    Case("LayerActivation", lambda c, m: c.LayerActivation(m, m[4]), {}, smooth_conv_net),
    Case("LayerActivation, list", lambda c, m: c.LayerActivation(m, [m[0], m[4]]), {}, smooth_conv_net),
    Case("LayerConductance", lambda c, m: c.LayerConductance(m, m[4]), STEPS, smooth_conv_net),
    Case("LayerConductance, in chunks", lambda c, m: c.LayerConductance(m, m[4]), IN_CHUNKS, smooth_conv_net),
    Case("InternalInfluence", lambda c, m: c.InternalInfluence(m, m[4]), STEPS, smooth_conv_net),
    Case("InternalInfluence, in chunks", lambda c, m: c.InternalInfluence(m, m[4]), IN_CHUNKS, smooth_conv_net),
    Case("LayerIntegratedGradients", lambda c, m: c.LayerIntegratedGradients(m, m[4]), STEPS, smooth_conv_net),
    Case(
        "LayerIntegratedGradients, in chunks",
        lambda c, m: c.LayerIntegratedGradients(m, m[4]),
        IN_CHUNKS,
        smooth_conv_net,
    ),
    Case(
        "LayerGradientShap",
        lambda c, m: c.LayerGradientShap(m, m[4]),
        {**T, "baselines": IMAGE_BASELINES, "stdevs": 0.1},
        smooth_conv_net,
    ),
    Case("LayerFeatureAblation", lambda c, m: c.LayerFeatureAblation(m, m[7]), {"target": 1}, smooth_conv_net),
    Case(  # Captum chooses the target twice, so it can have none
        "LayerFeaturePermutation",
        lambda c, m: c.LayerFeaturePermutation(lambda x: m(x)[:, 1], m[4]),
        {},
        smooth_conv_net,
    ),
    Case("LRP", lambda c, m: c.LRP(m), T, lrp_net),
    Case("LayerLRP", lambda c, m: layer_lrp(c, m), T, lrp_net),
    Case(
        "DataLoaderAttribution",
        lambda c, m: OfLoader(c.DataLoaderAttribution(c.FeatureAblation(m))),
        {"to_metric": lambda outputs: outputs.square().mean(dim=0)},
    ),
    Case("LayerDeepLift", lambda c, m: c.LayerDeepLift(m, m.conv2), T, pool_net),
    Case(
        "LayerDeepLift, input",
        lambda c, m: c.LayerDeepLift(m, m.conv2),
        {**T, "attribute_to_layer_input": True},
        relu_net,
    ),
    Case(
        "LayerDeepLiftShap", lambda c, m: c.LayerDeepLiftShap(m, m.conv2), {**T, "baselines": IMAGE_BASELINES}, pool_net
    ),
    Case("NeuronGradient", lambda c, m: c.NeuronGradient(m, m[5]), NEURON, smooth_conv_net),
    Case(
        "NeuronIntegratedGradients",
        lambda c, m: c.NeuronIntegratedGradients(m, m[5]),
        {**NEURON, "n_steps": 7, "internal_batch_size": 12},
        smooth_conv_net,
    ),
    Case(
        "NeuronGradientShap",
        lambda c, m: c.NeuronGradientShap(m, m[5]),
        {**NEURON, "baselines": IMAGE_BASELINES},
        smooth_conv_net,
    ),
    Case("NeuronConductance", lambda c, m: c.NeuronConductance(m, m[5]), {**NEURON, **STEPS}, smooth_conv_net),
    Case(
        "NeuronConductance, in chunks",
        lambda c, m: c.NeuronConductance(m, m[5]),
        {**NEURON, **IN_CHUNKS},
        smooth_conv_net,
    ),
    Case("NeuronDeepLift", lambda c, m: c.NeuronDeepLift(m, m.head), {"neuron_selector": 1}, pool_net),
    Case(
        "NeuronDeepLiftShap",
        lambda c, m: c.NeuronDeepLiftShap(m, m.head),
        {"neuron_selector": 1, "baselines": IMAGE_BASELINES},
        pool_net,
    ),
    Case("NeuronGuidedBackprop", lambda c, m: c.NeuronGuidedBackprop(m, m.head), {"neuron_selector": 1}, relu_net),
    Case("NeuronDeconvolution", lambda c, m: c.NeuronDeconvolution(m, m.head), {"neuron_selector": 1}, relu_net),
    Case("NeuronFeatureAblation", lambda c, m: c.NeuronFeatureAblation(m, m[5]), NEURON, smooth_conv_net),
]
# One call of each class, for what does not depend on the arguments.
ONE_EACH = list({case.class_name: case for case in reversed(CASES)}.values())[::-1]
