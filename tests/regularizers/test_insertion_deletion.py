"""ID-ExpO's terms against the literal equations, in value and, by finite differences, in the gradient."""

from __future__ import annotations

import functools
import math
import warnings

import captum.attr
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import captum_idexpo.attr
from captum_idexpo import InputError
from captum_idexpo.attr import IntegratedGradients, KernelShap, LayerGradCam, Lime, MaskSimilarity, id_expo_lime
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.baselines import mean_inputs
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import insertion, insertion_deletion
from captum_idexpo.metrics._masking import StepSchedule
from captum_idexpo.regularizers import AttributionSupervision, InsertionDeletion, Sparsity
from captum_idexpo.testing import assert_trainable
from tests.attr.cases import ONE_EACH
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 2, 1])
CELLS = torch.arange(36).view(6, 6).div(2, rounding_mode="floor")[None, None]  # 18 cells of 1 x 2 pixels
SETTINGS = {
    "baselines": 0.2,
    "insertion_weight": 0.7,
    "deletion_weight": 0.4,
    "l2_weight": 0.3,
    "steps_per_update": None,
}


# --- the literal loss ----------------------------------------------------------------------------------------------


def grad_cam_map(net):
    """Captum's own values, expanded to the pixels: (cells (B, D), map (B, 36))."""
    map = captum.attr.LayerGradCam(net, net[4]).attribute(X, target=Y).detach()
    return map.flatten(1), map.flatten(1)


def coarse_grad_cam_map(net):
    """Captum's own values on the 3x3 stage behind the pooling, each cell expanded to 2x2 pixels."""
    map = captum.attr.LayerGradCam(net, net[6]).attribute(X, target=Y).detach()
    return map.flatten(1), interpolate(map, (6, 6)).flatten(1)


def lime_map(net, n_samples=40):
    """Eq. (12) on 18 cells, with Captum's masks and Captum's kernel on the masked inputs."""
    torch.manual_seed(3)
    values = []
    cells = CELLS.flatten()
    for x, y in zip(X, Y, strict=True):
        z = torch.bernoulli(torch.full((n_samples, 18), 0.5)).double()
        torch.empty((), dtype=torch.int64).random_()
        nn.Linear(18, 1)
        copies = torch.where(z[:, cells].view(n_samples, 1, 6, 6) > 0, x, torch.full_like(x, 0.2))
        v = net(copies)[:, y]
        distance = 1 - torch.nn.functional.cosine_similarity(copies.flatten(1), x.flatten()[None])
        k = torch.exp(-(distance**2) / 2).diag()
        values.append(torch.linalg.solve(z.T @ k @ z + 0.1 * torch.eye(18).double(), z.T @ k @ v))
    phi = torch.stack(values).detach()
    return phi, phi[:, cells]


def frozen_steps(phi, n_steps, step):
    """T and t_s of eq. (8), from sorted lists; they carry no gradient, so finite differences must hold them."""
    frozen = []
    for row in phi.tolist():
        ranked = sorted(row, reverse=True)
        t = (len(set(row)) - 1) / (ranked[0] - ranked[-1])
        frozen.append((t, [(ranked[s - 1] + ranked[s]) / 2 for s in range(step, n_steps * step + 1, step)]))
    return frozen


def literal_terms(net, cells, pixel_values, frozen, form="ratio"):
    """Eq. (9)-(11), one example, one step and one forward pass at a time."""
    ins = dele = l2 = 0.0
    for b in range(len(X)):
        t, thresholds = frozen[b]
        log_p_x = net(X[b : b + 1]).log_softmax(1)[0, Y[b]]
        for threshold in thresholds:
            r = torch.sigmoid(t * (pixel_values[b] - threshold)).view(1, 1, 6, 6)
            inserted = net(r * X[b] + (1 - r) * 0.2).log_softmax(1)[0]
            deleted = net((1 - r) * X[b] + r * 0.2).log_softmax(1)[0]
            share = 1 / (len(thresholds) * len(X))
            ins += -share * inserted[Y[b]]
            dele += (
                share
                * {
                    "ratio": -(log_p_x - deleted[Y[b]]),
                    "log": deleted[Y[b]],
                    "complement": -torch.log(1 - deleted[Y[b]].exp()),
                }[form]
            )
        l2 += (cells[b] ** 2).sum() / len(X)
    return {"insertion": 0.7 * ins, "deletion": 0.4 * dele, "l2": 0.3 * l2}


def lime(net):
    return Lime(net, Ridge(0.1, fit_intercept=False)), {"feature_mask": CELLS, "attribute_kwargs": {"n_samples": 40}}


CASES = {
    "Grad-CAM": (grad_cam_map, lambda net: (LayerGradCam(net, net[4]), {"step_size": 3}), 3, "pixels"),
    "Grad-CAM on a coarse stage": (
        coarse_grad_cam_map,
        lambda net: (LayerGradCam(net, net[6]), {"step_size": 5}),
        5,
        "pixels",
    ),
    "LIME": (lime_map, lime, 1, "cells"),
}


def prepare(name, form="ratio", **settings):
    map_of, make, step, kind = CASES[name]
    net = smooth_conv_net()
    explainer, extra = make(net)
    regularizer = InsertionDeletion(explainer, fraction=0.5, deletion_form=form, **extra, **SETTINGS, **settings)
    cells, pixels = map_of(net)
    ranked = pixels if kind == "pixels" else cells
    frozen = frozen_steps(ranked, int(0.5 * ranked.shape[1]) // step, step)
    return net, regularizer, map_of, frozen


def call(regularizer):
    torch.manual_seed(3)
    return regularizer(X, Y)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["ratio", "log", "complement"])
def test_insertion_deletion_terms_equal_the_equations(name, form):
    net, regularizer, map_of, frozen = prepare(name, form)
    ours = call(regularizer)
    expected = literal_terms(net, *map_of(net), frozen, form)
    assert set(ours) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(ours[term].detach(), value.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["ratio", "complement"])
@pytest.mark.parametrize("max_examples_per_batch", [None, 5])
def test_insertion_deletion_total_loss_has_the_true_gradient(name, form, max_examples_per_batch):
    """Task loss and all terms, against central differences of the literal loss with T and t_s held."""
    net, regularizer, map_of, frozen = prepare(name, form, max_examples_per_batch=max_examples_per_batch)
    (cross_entropy(net(X), Y) + sum(call(regularizer).values())).backward()

    @torch.no_grad()
    def literal_loss():
        with torch.enable_grad():
            cells, pixels = map_of(net)
        return float(cross_entropy(net(X), Y) + sum(literal_terms(net, cells, pixels, frozen, form).values()))

    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        claimed = float((parameter.grad * direction).sum())
        original = parameter.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(original + sign * 1e-5 * direction)
            values.append(literal_loss())
        with torch.no_grad():
            parameter.copy_(original)
        measured = (values[0] - values[1]) / 2e-5
        assert claimed == pytest.approx(measured, rel=1e-5, abs=1e-7)


def test_grad_cam_with_constant_channel_weights_has_another_gradient():
    """The trap the test above guards against: the same loss with Captum's half-true graph trains something else."""
    net, regularizer, _, _ = prepare("Grad-CAM")
    gradients = []
    for explainer in (LayerGradCam(net, net[4]), HalfTrue(net, net[4])):
        regularizer._explaining.explainer = explainer
        net.zero_grad()
        sum(call(regularizer).values()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    assert float(torch.cosine_similarity(*gradients, dim=0)) < 0.99


class HalfTrue(captum.attr.LayerGradCam):
    def attribute(self, *args, create_graph=False, memory_budget=None, **kwargs):
        return super().attribute(*args, **kwargs)


# --- fewer steps an update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_locations", "k"), [(32, 4), (30, 4), (7, 7), (5, 1), (5, 2), (7, 3)])
def test_step_schedule_draws_stratified_and_unbiased_steps(n_locations, k):
    schedule = StepSchedule.of(torch.tensor([n_locations]), 1.0, 1)
    steps, weights = schedule.draw(k, 40_000, torch.float32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(40_000))
    assert (steps.diff(dim=1) > 0).all()
    probability = torch.zeros(n_locations + 1)
    probability.scatter_add_(0, steps.flatten(), weights.flatten())
    expected = torch.full((n_locations,), 1 / n_locations)
    torch.testing.assert_close(probability[1:] / 40_000, expected, atol=0.004, rtol=0)


def test_step_schedule_draws_one_place_of_all_strata_for_each_example():
    schedule = StepSchedule.of(torch.tensor([32]), 1.0, 1)
    steps, _ = schedule.draw(4, 200, torch.float32, torch.Generator().manual_seed(0))
    assert (steps.diff(dim=1) == 8).all()
    assert set(steps[:, 0].tolist()) == set(range(1, 9))


def test_step_schedule_draws_only_steps_that_the_example_has():
    schedule = StepSchedule.of(torch.tensor([32, 3]), 1.0, 1)
    steps, weights = schedule.draw(4, 2, torch.float32, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert steps[1].max() <= 3
    assert set(steps[1][weights[1] > 0].tolist()) == {1, 2, 3}


def test_steps_per_update_estimates_the_terms_of_all_steps():
    net = smooth_conv_net()
    explainer = LayerGradCam(net, net[4])
    full = InsertionDeletion(explainer, step_size=2, **SETTINGS)(X, Y)
    drawn = {**SETTINGS, "steps_per_update": 3, "generator": torch.Generator().manual_seed(0)}
    partial = InsertionDeletion(explainer, step_size=2, **drawn)
    with torch.no_grad():
        draws = [partial(X, Y) for _ in range(300)]
    for name in ("insertion", "deletion"):
        values = torch.stack([draw[name] for draw in draws])
        assert values.std() > 0
        error = float(values.std()) / len(values) ** 0.5
        assert float(values.mean()) == pytest.approx(float(full[name].detach()), abs=4 * error)


@pytest.mark.parametrize("k", [6, 7])
def test_steps_per_update_takes_all_steps_if_there_are_not_more(k):
    net = smooth_conv_net()
    settings = {**SETTINGS, "step_size": 3}  # 6 steps
    explainer = LayerGradCam(net, net[4])
    full = InsertionDeletion(explainer, **settings)(X, Y)
    drawn = InsertionDeletion(explainer, **{**settings, "steps_per_update": k})(X, Y)
    for name in full:
        torch.testing.assert_close(drawn[name], full[name], atol=1e-12, rtol=0)


def test_steps_per_update_is_4_unless_it_is_chosen_and_scores_take_all_steps():
    settings = {name: value for name, value in SETTINGS.items() if name != "steps_per_update"}
    net, rows = smooth_conv_net(), []
    net[0].register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), step_size=3, **settings)
    regularizer(X, Y)
    assert rows[-3:] == [3, 12, 12]  # the explanation, 4 copies of 3 images for each term
    assert regularizer.scores(X, Y).insertion_curve.shape == (3, 6)


# --- how many samples ----------------------------------------------------------------------------------------------


def samples_of(make, x, **settings):
    """The number of samples and the design that an explainer is called with by a regularizer."""
    seen = {}

    class Noted(make):
        @functools.wraps(make.attribute)
        def attribute(self, *args, **kwargs):
            seen.update({name: kwargs.get(name) for name in ("n_samples", "sampling", "generator")})
            return super().attribute(*args, **kwargs)

    surrogate = {} if make is KernelShap else {"interpretable_model": Ridge(0.1)}
    InsertionDeletion(Noted(smooth_conv_net(), **surrogate), baselines=0.0, **settings)(x, Y)
    return seen


@pytest.mark.parametrize("make", [Lime, KernelShap])
def test_lime_and_kernel_shap_draw_three_independent_samples_for_each_group(make):
    generator = torch.Generator().manual_seed(0)
    seen = samples_of(make, X, generator=generator)
    assert seen == {"n_samples": 3 * 72, "sampling": "independent", "generator": generator}
    assert samples_of(make, X, feature_mask=CELLS)["n_samples"] == 3 * 18
    cells = torch.cat([CELLS, CELLS.clamp(max=4), CELLS.clamp(max=9)])  # 18, 5 and 10 groups
    assert samples_of(make, X, feature_mask=cells)["n_samples"] == 3 * 18


def test_samples_that_are_chosen_are_taken_as_they_are():
    seen = samples_of(Lime, X, attribute_kwargs={"n_samples": 30}, generator=torch.Generator())
    assert seen == {"n_samples": 30, "sampling": None, "generator": None}  # Captum's design, from the global stream
    seen = samples_of(Lime, X, attribute_kwargs={"sampling": "paired"})
    assert (seen["n_samples"], seen["sampling"]) == (3 * 72, "paired")


def test_lime_of_a_users_own_perturbation_keeps_captums_sampling():
    def coins(_, **given):
        return torch.bernoulli(torch.full((1, given["num_interp_features"]), 0.3))

    lime = Lime(smooth_conv_net(), Ridge(0.1), MaskSimilarity(), perturb_func=coins)
    terms = InsertionDeletion(lime, baselines=0.0, feature_mask=CELLS)(X, Y)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("make", [Lime, KernelShap])
def test_more_than_1024_groups_are_refused_unless_the_number_of_samples_is_chosen(make):
    x, net = torch.randn(2, 1025), nn.Linear(1025, 3)
    explainer = make(net) if make is KernelShap else make(net, Ridge(0.1))
    for regularizer in (InsertionDeletion(explainer, baselines=0.0), Sparsity(explainer)):
        with pytest.raises(ValueError, match=r"1025 features.*feature_mask=.*n_samples"):
            regularizer(x, Y[:2])
    assert InsertionDeletion(explainer, baselines=0.0, attribute_kwargs={"n_samples": 5})(x, Y[:2])
    groups = torch.arange(1025).clamp(max=1023)
    assert InsertionDeletion(explainer, baselines=0.0, feature_mask=groups)(x, Y[:2])


# --- modes ---------------------------------------------------------------------------------------------------------


def state(net):
    return [tensor.clone() for tensor in net.buffers()], [module.training for module in net.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_insertion_deletion_restores_modes_and_buffers_of_the_model(fails):
    net = smooth_conv_net().train()
    net[4].eval()  # a module the user has frozen stays frozen
    buffers, modes = state(net)
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), **SETTINGS)
    if fails:
        with pytest.raises(IndexError):
            regularizer(X, torch.tensor([0, 1, 9]))
    else:
        regularizer(X, Y)
        regularizer.scores(X)
    for before, after in zip(buffers, state(net)[0], strict=True):
        assert torch.equal(before, after)
    assert modes == state(net)[1]


def test_eval_mode_makes_examples_independent_and_can_be_switched_off():
    net = smooth_conv_net().train()
    explainer = LayerGradCam(net, net[4])
    held = InsertionDeletion(explainer, **SETTINGS)
    together = held(X, Y)["insertion"].detach()
    alone = torch.stack([held(X[b : b + 1], Y[b : b + 1])["insertion"].detach() for b in range(3)]).mean()
    torch.testing.assert_close(together, alone)
    buffers = state(net)[0]
    InsertionDeletion(explainer, eval_mode=False, **SETTINGS)(X, Y)
    assert not torch.equal(buffers[0], net[1].running_mean)


def test_eval_mode_holds_a_model_passed_beside_a_lambda():
    net = smooth_conv_net().train()
    forward = lambda x: net(x)  # noqa: E731
    explainer = Lime(forward, Ridge(0.1), MaskSimilarity())
    with pytest.warns(UserWarning, match="pass model="):
        InsertionDeletion(explainer, **SETTINGS)
    regularizer = InsertionDeletion(explainer, model=net, feature_mask=CELLS, **SETTINGS)
    buffers = state(net)[0]
    regularizer(X, Y)
    assert torch.equal(buffers[0], net[1].running_mean)
    bound = InsertionDeletion(Lime(net.forward, Ridge(0.1), MaskSimilarity()), feature_mask=CELLS, **SETTINGS)
    bound(X, Y)
    assert torch.equal(buffers[0], net[1].running_mean)


def test_eval_mode_holds_the_module_of_the_explainer():
    net = smooth_conv_net().train()
    buffers = state(net)[0]
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), forward_func=lambda x: net(x), **SETTINGS)
    regularizer(X, Y)
    regularizer.scores(X)
    assert torch.equal(buffers[0], net[1].running_mean)


def test_insertion_deletion_bounds_the_rows_of_a_forward_pass():
    net, rows = smooth_conv_net(), []
    net.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    explainer = Lime(net, Ridge(0.1), MaskSimilarity())
    arguments = {"perturbations_per_eval": 1, "n_samples": 3}
    regularizer = InsertionDeletion(
        explainer, max_examples_per_batch=2, feature_mask=CELLS, attribute_kwargs=arguments, **SETTINGS
    )
    regularizer(X, Y)
    regularizer.scores(X)
    explained = [len(X)] * 4  # LIME's look at the outputs, and its samples
    assert sorted(rows, reverse=True)[:9] == [*explained, *explained, 2]


def test_insertion_deletion_under_no_grad_has_the_same_values_and_no_graph():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), **SETTINGS)
    with torch.no_grad():
        silent = regularizer(X, Y)
    for name, term in regularizer(X, Y).items():
        assert term.requires_grad
        assert not silent[name].requires_grad
        assert torch.equal(term.detach(), silent[name])


def test_insertion_deletion_does_not_register_the_model_as_a_submodule():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), model=net, forward_func=net, **SETTINGS)
    assert not list(regularizer.parameters())
    assert not regularizer.state_dict()


# --- options -------------------------------------------------------------------------------------------------------


def test_insertion_deletion_leaves_out_terms_of_weight_zero():
    net = smooth_conv_net()
    terms = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, insertion_weight=0.0)(X, Y)
    assert list(terms) == ["deletion"]


def test_deletion_floor_binds_and_warns_once():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(
        LayerGradCam(net, net[4]), baselines=0.0, insertion_weight=0.0, deletion_floor=0.999, deletion_form="log"
    )
    with pytest.warns(UserWarning, match=r"deletion floor of 0.999 binds for 100.0%"):
        terms = regularizer(X, Y)
    assert float(terms["deletion"].detach()) == pytest.approx(0.01 * math.log(0.999))
    assert float(regularizer.floor_share) == 1.0
    terms["deletion"].backward()
    assert not any(parameter.grad.any() for parameter in net.parameters())
    regularizer(X, Y)  # once is enough


@pytest.mark.parametrize(("n_examples", "n_certain", "warns"), [(20, 1, True), (40, 1, False), (20, 0, False)])
def test_deletion_floor_warns_from_a_share_of_five_percent(n_examples, n_certain, warns):
    rows = torch.zeros(n_examples, 2, dtype=torch.float64)
    rows[:n_certain] = -40.0  # deleted or not, class 0 is impossible

    class Certain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return torch.stack([self.scale * x[:, 0], 0.1 * x[:, 1]], dim=1)

    model = Certain()
    regularizer = InsertionDeletion(
        captum_idexpo.attr.InputXGradient(model), baselines=-40.0 * rows.ne(0), deletion_form="ratio"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regularizer(rows, 0)
    assert any("deletion floor" in str(w.message) for w in caught) is warns


def test_insertion_deletion_warns_once_of_maps_that_rank_no_location():
    net = smooth_conv_net()
    for parameter in net[8].parameters():  # a new head
        torch.nn.init.zeros_(parameter)
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0)
    with pytest.warns(UserWarning, match=r"of 3 of 3 examples is 0 everywhere, so it ranks no location.*last layer"):
        regularizer(X, Y)
    regularizer(X, Y)  # once is enough


def test_insertion_deletion_terms_of_a_confident_network_are_finite():
    net = smooth_conv_net()
    confident = nn.Sequential(net, Scale(1e4))
    for form in ("ratio", "log", "complement"):
        terms = InsertionDeletion(LayerGradCam(confident, net[4]), deletion_form=form, deletion_floor=None, **SETTINGS)
        for parts in (terms(X, Y), terms(X, (Y + 1) % 3)):
            assert all(term.isfinite() for term in parts.values())


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_insertion_deletion_loss_uses_logits_beside_lime_on_probabilities():
    net = smooth_net()
    x = torch.randn(3, 6, dtype=torch.float64)
    regularizer = InsertionDeletion(id_expo_lime(net), forward_func=net, attribute_kwargs={"n_samples": 20}, **SETTINGS)
    torch.manual_seed(0)
    terms = regularizer(x, Y)
    torch.manual_seed(0)
    phi = id_expo_lime(net).attribute(x, target=Y, n_samples=20, baselines=0.2)
    soft = insertion_deletion(net, x, phi, baselines=0.2, target=Y, fraction=0.5, temperature="auto").insertion_curve
    torch.testing.assert_close(terms["insertion"], -0.7 * soft.log().mean())


def test_insertion_deletion_calls_functions_for_masks_and_baselines():
    net = smooth_conv_net()
    explainer = Lime(net, Ridge(0.1), MaskSimilarity())
    torch.manual_seed(0)
    called = InsertionDeletion(
        explainer,
        feature_mask=functools.partial(grid, cell_size=2),
        **{**SETTINGS, "baselines": lambda images: images.mean(dim=(2, 3), keepdim=True)},
    )(X, Y)
    torch.manual_seed(0)
    given = InsertionDeletion(
        explainer, feature_mask=grid(X, 2), **{**SETTINGS, "baselines": X.mean(dim=(2, 3), keepdim=True)}
    )(X, Y)
    for name in given:
        assert torch.equal(called[name], given[name])


def test_insertion_deletion_generator_draws_the_masks_of_the_explainer():
    net = smooth_conv_net()
    explainer, state = KernelShap(net), torch.get_rng_state()
    settings = {
        "feature_mask": CELLS,
        "attribute_kwargs": {"sampling": "independent"},
        "steps_per_update": 2,
        **SETTINGS,
    }
    values = [
        float(
            InsertionDeletion(explainer, generator=torch.Generator().manual_seed(seed), **settings)(X, Y)["l2"].detach()
        )
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert torch.equal(state, torch.get_rng_state())


def test_additional_forward_args_reach_explainer_and_metric():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth_net()

        def forward(self, x, shift):
            return self.net(x + shift)

    model, x, shift = Shifted(), torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    explainer = Lime(model, Ridge(0.1), MaskSimilarity())
    torch.manual_seed(0)
    regularizer = InsertionDeletion(explainer, attribute_kwargs={"additional_forward_args": (shift,)}, **SETTINGS)
    terms = regularizer(x, Y)
    torch.manual_seed(0)
    phi = explainer.attribute(x, 0.2, Y, (shift,), n_samples=18, sampling="independent")
    expected = insertion_deletion(
        model,
        x,
        phi,
        baselines=0.2,
        feature_mask=None,
        additional_forward_args=shift,
        target=Y,
        fraction=0.5,
        temperature="auto",
    )
    torch.testing.assert_close(terms["insertion"], -0.7 * expected.insertion_curve.log().mean())


def test_insertion_deletion_of_one_column_equals_that_of_two_columns():
    """A net of one column gives the terms of its two-column twin, for either class."""
    net = smooth_conv_net(n_classes=1)
    twin = nn.Sequential(net, TwoColumns())
    y = torch.tensor([0, 1, 0])
    ours = InsertionDeletion(LayerGradCam(net, net[4]), **SETTINGS)(X, y)
    # Of the twin's two columns, both are explained by the same map with opposite signs, at half the scale.
    theirs = InsertionDeletion(LayerGradCam(twin, net[4]), **SETTINGS)(X, y)
    for name in ("insertion", "deletion"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_insertion_deletion_of_one_column_scored_as_two_flips_for_class_0():
    net = smooth_net(n_classes=1)
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 0])
    explainer = captum_idexpo.attr.InputXGradient(net)
    settings = {**SETTINGS, "baselines": 0.0}
    ours = InsertionDeletion(explainer, **settings)
    theirs = InsertionDeletion(explainer, forward_func=nn.Sequential(net, TwoColumns()), **settings)
    for name, value in ours(x, y).items():
        torch.testing.assert_close(theirs(x, y)[name], value)
    torch.testing.assert_close(theirs.scores(x, y), ours.scores(x, y))


@pytest.mark.parametrize(("n_columns", "outputs"), [(3, "logits"), (2, "raw")])
def test_insertion_deletion_of_one_column_scored_otherwise_keeps_its_sign(n_columns, outputs):
    """No class is the complement of another there, so one map of the column serves every target."""
    scored = smooth_net(n_classes=n_columns)
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 0])
    explainer = captum_idexpo.attr.InputXGradient(smooth_net(n_classes=1, seed=1))
    settings = {**SETTINGS, "baselines": 0.0}
    regularizer = InsertionDeletion(explainer, forward_func=scored, outputs=outputs, **settings)
    scores = regularizer.scores(x, y)
    phi = explainer.attribute(x)
    expected = insertion_deletion(scored, x, phi, baselines=0.0, target=y, fraction=0.5, outputs=outputs)
    for a, b in zip(scores, expected, strict=True):
        torch.testing.assert_close(a, b)


class TwoColumns(nn.Module):
    def forward(self, x):
        return torch.cat([-x / 2, x / 2], dim=1)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda net: LayerGradCam(net, net[4]), {"relu_attributions": True}, "Leave relu_attributions out"),
        (captum_idexpo.attr.GuidedBackprop, {}, "GuidedBackprop keeps positive values alone.*two columns"),
        (captum_idexpo.attr.Deconvolution, {}, "Deconvolution keeps positive values alone.*two columns"),
    ],
)
def test_positive_evidence_of_one_column_is_refused_since_class_0_has_none(make, arguments, message):
    net, twin = smooth_conv_net(n_classes=1), nn.Sequential(smooth_conv_net(n_classes=1), TwoColumns())
    y = torch.tensor([0, 1, 0])
    with pytest.raises(InputError, match=message):
        InsertionDeletion(make(net), attribute_kwargs=arguments, **SETTINGS)(X, y)
    with pytest.raises(InputError, match=message):
        AttributionSupervision(make(net), attribute_kwargs=arguments)(X, y, torch.ones(3, 1, 6, 6).tril())
    InsertionDeletion(make(net), attribute_kwargs=arguments, outputs="raw", **SETTINGS)(X, None)
    grad_cam_of_twin = lambda model: LayerGradCam(model, model[0][4])  # noqa: E731
    make = grad_cam_of_twin if arguments else make
    InsertionDeletion(make(twin), attribute_kwargs=arguments, **SETTINGS)(X, y)


@pytest.mark.parametrize("name", ["DeepLift", "IntegratedGradients", "InputXGradient"])
def test_mean_colours_are_a_baseline_of_every_explainer(name):
    """One value for each channel, ``(1, C, 1, 1)``, as `mean_inputs` returns it: not every explainer broadcasts it."""
    net = smooth_conv_net()
    explainer = getattr(captum_idexpo.attr, name)(net)
    colours = mean_inputs([(X, Y)])
    assert colours.shape == (1, 2, 1, 1)
    number = InsertionDeletion(explainer, **{**SETTINGS, "baselines": torch.tensor(0.2).double()})(X, Y)
    torch.testing.assert_close(number, InsertionDeletion(explainer, **SETTINGS)(X, Y))
    for x, y in ((X, Y), (X[:1], Y[:1])):
        ours = InsertionDeletion(explainer, **{**SETTINGS, "baselines": colours})(x, y)
        theirs = InsertionDeletion(explainer, **{**SETTINGS, "baselines": colours.expand_as(x)})(x, y)
        for term, value in ours.items():
            torch.testing.assert_close(value, theirs[term])


def test_insertion_deletion_of_a_regression_uses_the_raw_outputs():
    net = smooth_conv_net(n_classes=1)
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), outputs="raw", **SETTINGS)
    terms = regularizer(X, torch.tensor([0.3, -1.0, 2.0]))
    phi = LayerGradCam(net, net[4]).attribute(X)
    scores = insertion_deletion(net, X, phi, baselines=0.2, fraction=0.5, temperature="auto", outputs="raw")
    torch.testing.assert_close(terms["insertion"], -0.7 * scores.insertion.mean())
    torch.testing.assert_close(terms["deletion"], 0.4 * scores.deletion.mean())


def test_insertion_deletion_scores_are_hard_scores_of_the_predicted_class():
    net = smooth_conv_net()
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), step_size=3, **{**SETTINGS, "steps_per_update": 2})
    predicted = net(X).argmax(1)
    for target, given in ((predicted, None), (Y, Y)):
        phi = LayerGradCam(net, net[4]).attribute(X, target=target)
        with torch.no_grad():
            expected = insertion_deletion(net, X, phi, baselines=0.2, target=target, fraction=0.5, step_size=3)
        ours = regularizer.scores(X, given)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert not ours.insertion.requires_grad
    torch.testing.assert_close(regularizer.attribution(X, Y)[0], LayerGradCam(net, net[4]).attribute(X, target=Y))


def test_insertion_deletion_attribution_of_pixels_averages_the_channels():
    net = smooth_conv_net()
    explainer = Lime(net, Ridge(0.1), MaskSimilarity())
    torch.manual_seed(0)
    (map,) = InsertionDeletion(explainer, **SETTINGS).attribution(X, Y)
    torch.manual_seed(0)
    phi = explainer.attribute(X, 0.2, Y, n_samples=3 * 72, sampling="independent")
    torch.testing.assert_close(map, phi.mean(1, keepdim=True))


# --- bad input -----------------------------------------------------------------------------------------------------

NET = smooth_conv_net()
BAD = {
    "negative weight": (ValueError, "insertion_weight", {"insertion_weight": -1.0}),
    "NaN weight": (ValueError, "l2_weight", {"l2_weight": math.nan}),
    "fraction": (ValueError, "fraction", {"fraction": 0.0}),
    "step size": (ValueError, "step_size", {"step_size": 0}),
    "steps per update": (ValueError, "steps_per_update", {"steps_per_update": 0}),
    "fractional steps per update": (ValueError, "steps_per_update", {"steps_per_update": 1.5}),
    "zero rows": (ValueError, "max_examples_per_batch", {"max_examples_per_batch": 0}),
    "form": (ValueError, "deletion_form", {"deletion_form": "square"}),
    "floor": (ValueError, "deletion_floor", {"deletion_floor": 1.0}),
    "temperature": (ValueError, "temperature", {"temperature": 0.0}),
    "outputs": (ValueError, "outputs", {"outputs": "scores"}),
    "Captum's own class": (
        TypeError,
        "from captum_idexpo.attr import LayerGradCam",
        {"explainer": captum.attr.LayerGradCam(NET, NET[4])},
    ),
    "no explainer": (TypeError, "explainer must be an attribution", {"explainer": NET}),
}


@pytest.mark.parametrize(("error", "text", "arguments"), BAD.values(), ids=BAD)
def test_insertion_deletion_errors_name_bad_settings_at_construction(error, text, arguments):
    with pytest.raises(error, match=text):
        InsertionDeletion(**{"explainer": LayerGradCam(NET, NET[4]), "baselines": 0.0, **arguments})


def test_insertion_deletion_errors_name_bad_batches():
    regularizer = InsertionDeletion(LayerGradCam(NET, NET[4]), baselines=0.0)
    with pytest.raises(IndexError, match="out of range"):
        regularizer(X, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="empty"):
        regularizer(X[:0], Y[:0])
    with pytest.raises(ValueError, match="NaN"):
        regularizer(X * math.nan, Y)
    lime = InsertionDeletion(Lime(NET, Ridge()), baselines=0.0, feature_mask=torch.full((1, 1, 6, 6), 0.5))
    with pytest.raises(TypeError, match="must hold whole numbers"):
        lime(X, Y)
    with pytest.raises(TypeError, match="given: a mapping of x"):
        regularizer({"x": X}, Y)
    with pytest.raises(ValueError, match="baseline of shape"):
        InsertionDeletion(LayerGradCam(NET, NET[4]), baselines=torch.zeros(7))(X, Y)


def test_insertion_deletion_with_a_frozen_model_is_an_error():
    net = smooth_conv_net().requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires_grad_"):
        InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0)(X, Y)


# Every attribution as the explainer. Neurons need a selector, some a distribution of baselines.
UNSUITED = {"LimeBase": "explains one input as a whole", "DataLoaderAttribution": "explains a data set as a whole"}


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.class_name not in UNSUITED], ids=lambda c: c.name)
def test_insertion_deletion_accepts_every_attribution_as_explainer(case):
    model = case.model()
    explainer = case.explainer(captum_idexpo.attr, model)
    if case.class_name == "LayerFeatureAblation":  # the case's own layer has no place in an image
        explainer = captum_idexpo.attr.LayerFeatureAblation(model, model[6])
    arguments = {name: value for name, value in case.arguments.items() if name != "target"}
    if isinstance(arguments.get("baselines"), (int, float)):
        del arguments["baselines"]
    mask = arguments.pop("feature_mask", None)
    regularizer = InsertionDeletion(
        explainer,
        baselines=0.0,
        forward_func=model,
        attribute_kwargs=arguments,
        feature_mask=mask,
        insertion_weight=0.1,
        l2_weight=1.0,
    )
    target = torch.tensor([0, 1, 2, 0])
    # The temperature counts as a constant, so that differences of the soft terms would measure something else.
    assert_trainable(lambda: regularizer(case.inputs, target)["l2"], model, n_directions=1)
    assert regularizer(case.inputs, target)["insertion"].requires_grad
    assert regularizer.scores(case.inputs, target).insertion.shape == (4,)


def test_insertion_deletion_attribution_of_groups_reproduces_the_scores():
    torch.manual_seed(0)
    reader = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 3)).double()
    vectors, tokens = torch.randn(4, 5, 4, dtype=torch.float64), torch.arange(5).view(1, 5, 1)
    explainer = captum_idexpo.attr.InputXGradient(reader)
    regularizer = InsertionDeletion(explainer, baselines=0.0, feature_mask=tokens, temperature=None, fraction=1.0)
    maps = regularizer.attribution(vectors, 1)
    expected = explainer.attribute(vectors, target=1).mean(-1, keepdim=True).expand_as(vectors)
    torch.testing.assert_close(maps[0], expected)
    scores = insertion_deletion(reader, vectors, maps, baselines=0.0, feature_mask=tokens, target=1)
    torch.testing.assert_close(scores.insertion, regularizer.scores(vectors, 1).insertion)


def test_insertion_deletion_sums_embedding_maps_over_the_last_axis():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(20, 3)).double()
    tokens = torch.randint(1, 10, (4, 5))
    explainer = captum_idexpo.attr.LayerGradientXActivation(model, model[0])
    regularizer = InsertionDeletion(explainer, baselines=0, temperature=None)
    (ranked,) = regularizer.attribution(tokens, 1)
    torch.testing.assert_close(ranked, explainer.attribute(tokens, target=1).sum(-1))
    assert regularizer.scores(tokens, 1).insertion.shape == (4,)


def test_insertion_deletion_refuses_layer_maps_that_do_not_fit_the_input():
    model = smooth_net()
    explainer = captum_idexpo.attr.LayerConductance(model, model[0])
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(4, 8\) has no place in the input \(4, 6\)"):
        InsertionDeletion(explainer, baselines=0.0)(x, 1)


def test_insertion_deletion_with_gradient_shap_needs_many_baselines():
    explainer = captum_idexpo.attr.GradientShap(smooth_net())
    with pytest.raises(ValueError, match=r"GradientShap needs a distribution.*attribute_kwargs"):
        InsertionDeletion(explainer, baselines=0.0)


def test_insertion_deletion_keeps_the_sign_of_magnitudes_for_class_0():
    """A single logit: what speaks for class 1 speaks against class 0, but a magnitude speaks for neither."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    x, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    saliency = captum_idexpo.attr.Saliency(model)
    for absolute in (True, False):
        regularizer = InsertionDeletion(saliency, baselines=0.0, attribute_kwargs={"abs": absolute})
        sign = 1 if absolute else 2 * target - 1
        maps = sign * saliency.attribute(x, abs=absolute)

        def two_columns(x):
            return torch.cat([torch.zeros(len(x), 1), model(x)], dim=1)

        expected = insertion(two_columns, x, maps, baselines=0.0, target=target.long().flatten(), fraction=0.5)
        torch.testing.assert_close(regularizer.scores(x, target).insertion, expected)


def test_insertion_deletion_broadcasts_the_baselines_of_each_example():
    """Captum's gradient methods do not broadcast them."""
    net = smooth_conv_net()
    x, y = X, Y

    def make(baselines):
        settings = {"attribute_kwargs": {"n_steps": 4}, "steps_per_update": None}
        return InsertionDeletion(IntegratedGradients(net), baselines=baselines, **settings)

    means = make(lambda inputs: inputs.mean((2, 3), keepdim=True))(x, y)
    whole = make(lambda inputs: inputs.mean((2, 3), keepdim=True).expand_as(inputs))(x, y)
    for name, term in whole.items():
        torch.testing.assert_close(means[name], term)


def test_insertion_deletion_refuses_return_convergence_delta():
    net = smooth_conv_net()
    arguments = {"return_convergence_delta": True}
    with pytest.raises(ValueError, match="leave return_convergence_delta out"):
        InsertionDeletion(IntegratedGradients(net), baselines=0.0, attribute_kwargs=arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_insertion_deletion_l2_term_is_squared_in_single_precision(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 3)
    )
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    squares = InsertionDeletion(
        LayerGradCam(net, net[0]), baselines=0.0, insertion_weight=0, deletion_weight=0, l2_weight=1.0
    )
    expected = squares(x, y)["l2"]
    with torch.autocast("cpu", dtype=dtype):
        value = squares(x, y)["l2"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.05, atol=0.0)
