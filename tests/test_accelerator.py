"""On a GPU, where there is one, everything is as on the CPU; its own random numbers apart.

Without a GPU, SIMULATED_ACCELERATOR=1 runs these tests on a simulated one (``make accelerator``).
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from captum.attr import LayerAttribution
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import captum_idexpo.attr
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo._core.rng import accelerators, kept_streams, random_state, seeded, set_random_state
from captum_idexpo.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradCam,
    Lime,
    MaskSimilarity,
    ShapleyValues,
    ShapleyValueSampling,
)
from captum_idexpo.attr.coalitions import KERNEL_SHAP_SAMPLINGS
from captum_idexpo.attr.sampling import LIME_SAMPLINGS
from captum_idexpo.attr.surrogates import BayesianRidge, BayesianShapleyRegression, Lasso, LinearRegression, Ridge
from captum_idexpo.baselines import blurred, mixture, noise, resampled
from captum_idexpo.jury import compare
from captum_idexpo.metrics import (
    LocalLinearModels,
    insertion,
    insertion_deletion,
    masked_accuracy,
    neighborhood_fidelity,
    point_fidelity,
    road,
    sensitivity_n,
    stability,
)
from captum_idexpo.regularizers import (
    Fidelity,
    GaussianNeighbors,
    InsertionDeletion,
    MaskedNeighbors,
    RandomMasking,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import CASES
from tests.helpers import smooth_conv_net, smooth_net

SIMULATED = bool(os.environ.get("SIMULATED_ACCELERATOR"))
if not SIMULATED and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

G = torch.Generator().manual_seed(0)
ROWS = torch.randn(4, 6, dtype=torch.float64, generator=G)
IMAGES = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=G)
Y = torch.randint(3, (8,), generator=G)
SUPERPIXELS = torch.arange(36).view(1, 1, 6, 6) // 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device():
    if not SIMULATED:
        return torch.device("cuda", 0)
    from tests.simulated import register

    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists() or not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("The simulated accelerator needs a C++ compiler and Python's headers.")
    return register()


def to(device, values):
    """Tensors, in whatever they are held, on a device."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {name: to(device, value) for name, value in values.items()}
    return type(values)(to(device, value) for value in values) if isinstance(values, (tuple, list)) else values


def assert_same_on(device, compute):
    """The same numbers from models and inputs on either device, and the same gradient, found on the device."""
    (here, net), (there, twin) = compute(CPU), compute(device)
    assert all(tensor.device == device for tensor in tensors_of(there))
    for ours, reference in zip(tensors_of(there), tensors_of(here), strict=True):
        torch.testing.assert_close(ours.cpu(), reference)
    for results in (here, there):
        sum(tensor.square().sum() for tensor in tensors_of(results)).backward()
    for ours, reference in zip(twin.parameters(), net.parameters(), strict=True):
        assert (ours.grad is None) == (reference.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.cpu(), reference.grad, atol=1e-8, rtol=1e-6)


def tensors_of(results):
    return [results] if isinstance(results, torch.Tensor) else [t for part in results for t in tensors_of(part)]


def explained(case, device):
    model = case.model().to(device)
    explainer, arguments = case.explainer(captum_idexpo.attr, model), to(device, case.arguments)
    return model, lambda: explainer.attribute(case.inputs.to(device), **arguments, create_graph=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attribution_gradient_on_the_device_passes_assert_trainable(case, device):
    model, attribute = explained(case, device)
    assert_trainable(attribute, model, n_directions=1)


DRAWN_ON_THE_DEVICE = ("GradientShap", "NoiseTunnel", "FeaturePermutation")


@pytest.mark.parametrize(
    "case", [c for c in CASES if not any(name in c.name for name in DRAWN_ON_THE_DEVICE)], ids=lambda case: case.name
)
def test_attribution_on_the_device_equals_that_on_the_cpu(case, device):
    def compute(device):
        model, attribute = explained(case, device)
        torch.manual_seed(0)
        np.random.seed(0)
        return attribute(), model

    assert_same_on(device, compute)


EXPLAINERS = {
    **{
        type(surrogate).__name__: partial(Lime, interpretable_model=surrogate, similarity_func=MaskSimilarity())
        for surrogate in (Ridge(), BayesianRidge(), LinearRegression(), Lasso(tol=1e-12))
    },
    "ShapleyRegression": KernelShap,
    "BayesianShapleyRegression": partial(KernelShap, interpretable_model=BayesianShapleyRegression()),
}


@pytest.mark.parametrize("make", [KernelShap, lambda net: Lime(net, Ridge(), MaskSimilarity())])
def test_default_device_changes_no_attribution(make, device):
    net = smooth_net().to(device)
    attributions = []
    for default in (CPU, device):
        torch.manual_seed(0)
        with torch.device(default):
            attributions.append(make(net).attribute(ROWS.to(device), target=1, n_samples=40))
            assert_trainable(lambda: make(net).attribute(ROWS.to(device), target=1, create_graph=True), net)
    assert torch.equal(*attributions)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("temperature", [None, "auto"])
def test_default_device_changes_no_insertion_score(temperature, gaps, device):
    net, mask = smooth_net().to(device), torch.tensor([[0, 0, 2, 2, 4, 4]], device=device)
    scores = []
    for default in (CPU, device):
        with torch.device(default):
            maps = ROWS.to(device)
            arguments = {"feature_mask": mask if gaps else None, "target": 1, "temperature": temperature}
            scores.append(insertion(net, maps, maps, **arguments))
    assert torch.equal(*scores)


@pytest.mark.parametrize("settings", [{}, {"share_masks": True}, {"memory_budget": 100.0}], ids=str)
@pytest.mark.parametrize(
    ("surrogate", "sampling"),
    [(s, d) for s in EXPLAINERS for d in (KERNEL_SHAP_SAMPLINGS if "Shapley" in s else LIME_SAMPLINGS)[1:]],
)
def test_masks_from_a_cpu_generator_are_the_same_on_the_device(surrogate, settings, sampling, device):
    def compute(device):
        net, generator = smooth_net().to(device), torch.Generator().manual_seed(0)
        arguments = {"target": 1, "n_samples": 40, "sampling": sampling, "generator": generator, **settings}
        return EXPLAINERS[surrogate](net).attribute(ROWS.to(device), **arguments, create_graph=True), net

    assert_same_on(device, compute)


@pytest.mark.parametrize("explainer", [ShapleyValues, ShapleyValueSampling, Lime, KernelShap, FeatureAblation])
def test_forward_function_that_returns_a_number_is_explained_on_the_device(explainer, device):
    arguments = {"interpretable_model": Ridge()} if explainer is Lime else {}
    attributions = []
    for where in (CPU, device):
        torch.manual_seed(0)
        attributions.append(explainer(lambda x: float(x.square().sum()), **arguments).attribute(ROWS.to(where)))
    assert attributions[1].device == device
    torch.testing.assert_close(attributions[1].cpu(), attributions[0])


def test_random_state_of_the_device_is_restored(device):
    generator = torch.Generator(device).manual_seed(3)
    state = random_state(device, [generator])

    def draw():
        return [torch.rand(3, device=device), torch.rand(3, device=device, generator=generator), torch.rand(3)]

    first = draw()
    set_random_state(state, device, [generator])
    with kept_streams(accelerators(device)):
        draw()
    with seeded(5, device):
        other = draw()
    with seeded(5, CPU):  # of a model on the CPU
        pass
    generator.set_state(state["generators"][0][1])
    for ours, expected in zip(draw(), first, strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(other[0], first[0])
    with pytest.warns(UserWarning, match="this one draws them on cpu"):
        set_random_state(state, CPU, [torch.Generator()])


def test_dropout_on_the_device_is_the_same_in_the_second_pass(device):
    """Of a memory budget; the gradient is that of the whole graph only if the same units are dropped."""
    gradients = []
    for budget in (None, 1e5):  # the chunks fit, the whole does not
        net = smooth_conv_net().to(device).train()
        lime = Lime(net, Ridge(), MaskSimilarity())
        torch.manual_seed(0)
        arguments = {"feature_mask": SUPERPIXELS.to(device), "n_samples": 60, "perturbations_per_eval": 1}
        lime.attribute(
            IMAGES[:2].to(device), target=1, create_graph=True, memory_budget=budget, **arguments
        ).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [None, "auto"])
@pytest.mark.parametrize("feature_mask", [None, SUPERPIXELS], ids=["pixels", "superpixels"])
@pytest.mark.parametrize("baselines", [0, "a tensor"])
def test_insertion_deletion_on_the_device_equals_that_on_the_cpu(temperature, feature_mask, baselines, device):
    def compute(device):
        net, x = smooth_conv_net().to(device), IMAGES.to(device)
        put = x.mean(0, keepdim=True) if baselines else 0
        maps = LayerGradCam(net, net[4]).attribute(x, target=Y.to(device), create_graph=True)
        maps = LayerAttribution.interpolate(maps, (6, 6))
        mask = None if feature_mask is None else feature_mask.to(device)
        orders = {"n_random_orders": 2, "generator": torch.Generator().manual_seed(0)}
        return insertion_deletion(
            net, x, maps, baselines=put, target=Y.to(device), feature_mask=mask, temperature=temperature, **orders
        ), net

    assert_same_on(device, compute)


def test_masked_accuracy_and_road_on_the_device_equal_those_on_the_cpu(device):
    values = []
    for where in (CPU, device):
        net, x = smooth_conv_net().to(where).eval(), IMAGES.to(where)
        baselines = mixture(0.0, blurred(1.0), resampled(generator=torch.Generator().manual_seed(1)), noise(
            generator=torch.Generator().manual_seed(2)), generator=torch.Generator().manual_seed(3))  # fmt: skip
        right = masked_accuracy(
            net, x, Y.to(where), baselines=baselines, generator=torch.Generator().manual_seed(0), share=0.3
        )
        imputed = road(net, x, x, target=Y.to(where), generator=torch.Generator().manual_seed(0))
        values.append([right.cpu(), imputed.detach().cpu()])
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


def test_jury_on_the_device_agrees_with_the_cpu(device):
    found = []
    for where in (CPU, device):
        net = smooth_conv_net().to(where)
        explainers = {"Grad-CAM": lambda model: LayerGradCam(model, model[4])}
        found.append(compare({"net": net}, [(IMAGES, Y)], explainers, {"zero": 0.0, "blur": blurred(1.0)}))
    for judge, values in found[0].examples["net"].items():
        if judge.metric in ("infidelity", "sensitivity"):  # whose random numbers are the device's own
            assert found[1].examples["net"][judge].isfinite().all()
        else:
            torch.testing.assert_close(found[1].examples["net"][judge], values, atol=1e-5, rtol=1e-5)


def test_random_metrics_on_the_device_equal_those_on_the_cpu(device):
    def compute(device):
        net, x = smooth_net().to(device), ROWS.to(device)

        def generator():
            return torch.Generator().manual_seed(0)

        with torch.no_grad():
            models = LocalLinearModels(net, generator=generator())
            values = [
                sensitivity_n(net, x, x, n=2, target=0, generator=generator()),
                point_fidelity(models, net, x),
                neighborhood_fidelity(models, net, x, generator=generator()),
                stability(models, x, generator=generator()),
            ]
        return [value * next(net.parameters()).sum() for value in values], net

    assert_same_on(device, compute)


def regularizers(net):
    """One of each kind; what they draw comes from generators on the CPU."""
    g = [torch.Generator().manual_seed(seed) for seed in range(8)]
    lime, cam = Lime(net, Ridge(0.1), MaskSimilarity()), LayerGradCam(net, net[4])
    masks = {"sampling": "independent", "n_samples": 20}
    held = {"baselines": 0.0, "deletion_form": "ratio", "deletion_floor": None}
    return {
        "Grad-CAM": InsertionDeletion(cam, steps_per_update=2, generator=g[0], **held),
        "LIME": InsertionDeletion(lime, feature_mask=SUPERPIXELS, attribute_kwargs=masks, generator=g[1], **held),
        "a mean": InsertionDeletion(cam, baselines="mean", steps_per_update=None),
        "random masking": RandomMasking(net, baselines=noise(generator=g[6]), generator=g[7]),
        "RRR": RightForTheRightReasons(net),
        "saliency-guided": SaliencyGuided(net, generator=g[2]),
        "smoothness": Smoothness(captum_idexpo.attr.InputXGradient(net)),
        "sparsity": Sparsity(cam, weight="auto"),
        "Fidelity": Fidelity(net, GaussianNeighbors(one_dimensional=True), generator=g[3]),
        "of masks": Fidelity(net, MaskedNeighbors(0.0, SUPERPIXELS), generator=g[4]),
        "Stability": Stability(net, generator=g[5]),
    }


NAMES = list(regularizers(smooth_conv_net()))


def net_that_draws_nothing():
    net = smooth_conv_net()
    net[3] = torch.nn.Identity()  # in place of dropout, whose random numbers are the device's own
    return net


@pytest.fixture
def accelerator_on(monkeypatch):
    """accelerate's, on the CPU or the device, one after the other."""

    def make(device, precision="no"):
        AcceleratorState._reset_state(True)
        if SIMULATED and device != CPU:
            monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
            scaler = partial(torch.amp.GradScaler, device.type)
            monkeypatch.setattr("accelerate.accelerator.get_grad_scaler", lambda *_, **settings: scaler(**settings))
        scale = GradScalerKwargs(init_scale=2.0**10)  # small enough for the first step
        accelerator = Accelerator(cpu=device == CPU, mixed_precision=precision, kwargs_handlers=[scale])
        assert accelerator.device.type == device.type
        return accelerator

    yield make
    AcceleratorState._reset_state(True)


def batches(x=IMAGES):
    return DataLoader(TensorDataset(x, Y, (x > 0).to(x)), batch_size=4)


@pytest.mark.parametrize("name", NAMES)
def test_training_on_the_device_ends_with_the_weights_of_the_cpu(name, device, accelerator_on, tmp_path):
    """A checkpoint and a resumed run included."""
    weights = []
    for where in (CPU, device):
        folder = tmp_path / where.type
        for epochs in (1, 2):
            net = net_that_draws_nothing().to(where)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            average = AveragedModel(net_that_draws_nothing(), multi_avg_fn=get_ema_multi_avg_fn(0.5))  # on the CPU
            trainer = ExplanationRegularizedTrainer(
                net,
                optimizer,
                [regularizers(net)[name]],
                accelerator=accelerator_on(where),
                checkpoint_dir=folder,
                averaged_model=average,
                gradient_norms_every=1,
                show_progress=False,
            )
            if epochs == 2:
                trainer.resume()
            history = trainer.fit(batches(), batches(), epochs=epochs)
        assert len(history) == 2
        assert {parameter.device.type for parameter in average.parameters()} == {where.type}
        weights.append([value.cpu() for value in net.state_dict().values()])
    torch.testing.assert_close(*weights, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_training_on_the_device_ends_near_single_precision(name, precision, device, accelerator_on):
    changes = []
    for used in ("no", precision):
        net = net_that_draws_nothing().float().to(device)
        before = parameters_to_vector(net.parameters()).detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        settings = {"accelerator": accelerator_on(device, used), "show_progress": False}
        trainer = ExplanationRegularizedTrainer(net, optimizer, [regularizers(net)[name]], **settings)
        trainer.fit(batches(IMAGES.float()), epochs=1)
        changes.append(parameters_to_vector(net.parameters()).detach() - before)
    assert torch.cosine_similarity(*changes, dim=0) > 0.99
