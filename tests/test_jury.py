"""The jury: its values against the metrics themselves, its errors against literal formulas, its page."""

from __future__ import annotations

import html.parser
import math

import captum.metrics
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import Batch, jury
from captum_idexpo.attr import InputXGradient, IntegratedGradients, KernelShap, LayerGradCam, Saliency
from captum_idexpo.baselines import noise, resampled
from captum_idexpo.jury import Comparison, Judge, compare, standard_error
from captum_idexpo.metrics import insertion_deletion, masked_accuracy, road
from captum_idexpo.visualization import plot_comparison
from captum_idexpo.visualization.comparisons import change_text, comparison_page
from tests.helpers import smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 6, dtype=torch.float64, generator=G), torch.arange(24) % 3
IMAGES = torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=G)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=10)
MODELS = {"before": smooth_net(seed=0), "plain": smooth_net(seed=1), "trained": smooth_net(seed=2)}
EXPLAINERS = {"gradient": InputXGradient, "KernelSHAP": KernelShap}
BASELINES = {"zero": 0.0, "one": 1.0}


@pytest.fixture(scope="module")
def found():
    return compare(MODELS, LOADER, EXPLAINERS, BASELINES, reference="plain", trained_on=["gradient", "zero"])


def test_jury_has_every_judge_for_every_model(found):
    judges = {str(judge) for judge in found.judges}
    assert {"accuracy", "masked_accuracy, one", "insertion, KernelSHAP, one", "sensitivity, gradient"} <= judges
    assert "road, gradient" not in judges  # rows are no images
    per_model = 1 + 2 + 4 * 4 + 4 + 2  # accuracy, masked, insertion to gains, infidelity, sensitivity
    assert len(found.judges) == per_model
    assert len(found.rows) == 3 * per_model
    assert all(len(values) == 24 for scores in found.examples.values() for values in scores.values())


def test_jury_values_are_those_of_the_metrics(found):
    model = MODELS["trained"]
    predicted = model(X).argmax(1)
    maps = InputXGradient(model).attribute(X, target=predicted)
    scores = insertion_deletion(model, X, maps, baselines=1.0, target=predicted)
    own = found.examples["trained"]
    torch.testing.assert_close(own[Judge("insertion", "gradient", "one")], scores.insertion.detach())
    torch.testing.assert_close(own[Judge("deletion", "gradient", "one")], scores.deletion.detach())
    torch.testing.assert_close(own[Judge("accuracy")], (predicted == Y).double())
    # Masks are drawn batch by batch, from the seed plus the number of the batch, which counts from 1.
    masked = [
        masked_accuracy(model, x, y, baselines=1.0, generator=torch.Generator().manual_seed(number))
        for number, (x, y) in enumerate(LOADER, start=1)
    ]
    torch.testing.assert_close(own[Judge("masked_accuracy", None, "one")], torch.cat(masked).double())


def gains_by_the_metric(net, make, x, baseline, *, mask=None, **attribute_kwargs):
    """Return both gains of an explainer of the predicted class, over orders that no other explainer shares."""
    predicted = net(x).argmax(1)
    maps = make(net).attribute(x, target=predicted, **attribute_kwargs)
    given = {"baselines": baseline, "feature_mask": mask, "target": predicted}
    generator = torch.Generator().manual_seed(1)
    scores = insertion_deletion(net, x, maps.detach(), n_random_orders=4, generator=generator, **given)
    return {"insertion_gain": scores.insertion_gain, "deletion_gain": scores.deletion_gain}


@pytest.mark.parametrize("baseline", ["zero", "one"])
def test_jury_gains_of_explainers_that_share_random_orders_are_those_of_the_metric(baseline):
    net, pairs, value = smooth_net(), torch.tensor([[0, 0, 1, 1, 2, 2]]), BASELINES[baseline]
    masks = {"KernelSHAP": None, "gradient": None, "in pairs": pairs, "also in pairs": pairs, "of all": pairs % 2}
    explainers = {name: KernelShap if name == "KernelSHAP" else InputXGradient for name in masks}
    samples = {"n_samples": 30, "sampling": "independent"}
    found = compare(
        {"net": net}, [(X, Y)], explainers, BASELINES, feature_mask=masks, attribute_kwargs={"KernelSHAP": samples}
    )
    for name, mask in masks.items():
        drawn = samples | {"baselines": value, "generator": torch.Generator().manual_seed(1)}
        given = drawn if name == "KernelSHAP" else {}
        expected = gains_by_the_metric(net, explainers[name], X, value, mask=mask, **given)
        for metric, gain in expected.items():
            torch.testing.assert_close(found.examples["net"][Judge(metric, name, baseline)], gain.detach())


def test_jury_gains_of_explainers_with_other_locations_have_random_orders_of_their_own():
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    series = IMAGES[..., 0]  # (8, 2, 6)
    explainers = {
        "of elements": Saliency,
        "of times": lambda model: LayerGradCam(model, model[1], reshape_transform=lambda maps: maps),
    }
    found = compare({"net": net}, [(series, Y[:8])], explainers, {"zero": 0.0}, ["insertion_gain"])
    for name, make in explainers.items():
        expected = gains_by_the_metric(net, make, series, 0.0)["insertion_gain"].detach()
        torch.testing.assert_close(found.examples["net"][Judge("insertion_gain", name, "zero")], expected)


def test_jury_scores_random_orders_once_for_all_explainers():
    n_rows = 0

    def count(module, rows, output):
        nonlocal n_rows
        n_rows += len(output)

    def rows_of(explainers, metrics):
        nonlocal n_rows
        n_rows = 0
        made = []
        compare({"net": net}, [(X, Y)], explainers, {"zero": 0.0}, metrics, feature_mask=lambda x: made.append(x))
        assert len(made) == 1  # one function, called once for all explainers
        return n_rows

    net = smooth_net()
    net.register_forward_hook(count)
    names = ("first", "second", "third")
    one, all_three = ({name: InputXGradient for name in names[:n]} for n in (1, 3))
    plain, gain = ["insertion"], ["insertion", "insertion_gain"]
    assert rows_of(all_three, gain) - rows_of(all_three, plain) == rows_of(one, gain) - rows_of(one, plain) > 0


def test_jury_judges_all_models_with_the_same_random_numbers():
    twins = {"a": MODELS["trained"], "b": MODELS["trained"]}
    baselines = {
        "noise": noise(generator=torch.Generator().manual_seed(3)),
        "global noise": noise(),
        "row": resampled(),
    }
    pair = compare(twins, LOADER, EXPLAINERS, baselines)
    for judge in pair.judges:
        assert torch.equal(pair.examples["a"][judge], pair.examples["b"][judge]), judge
    once, again, other = (
        compare({"a": MODELS["trained"]}, LOADER, EXPLAINERS, baselines, ["insertion_gain"], seed=seed).examples["a"]
        for seed in (0, 0, 1)
    )
    gain = Judge("insertion_gain", "KernelSHAP", "noise")
    assert torch.equal(once[gain], again[gain])
    assert not torch.equal(once[gain], other[gain])
    first, second = pair.examples["a"][Judge("masked_accuracy", None, "global noise")].split([10, 14])
    assert len(first) == 10
    assert len(second) == 14


def test_jury_values_of_an_explainer_do_not_depend_on_the_others():
    """Nor on the other metrics: their draws do not move those of loaders, baselines and judges."""

    class Noisy(InputXGradient):
        """An explainer that draws from the global stream."""

        def attribute(self, inputs, target=None, *, create_graph=False):
            maps = super().attribute(inputs, target, create_graph=create_graph)
            return maps + torch.randn_like(maps)

    net, baselines = MODELS["trained"], {"noise": noise(), "zero": 0.0}
    loader = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
    both = compare({"a": net, "b": net}, loader, {"noisy": Noisy, "KernelSHAP": KernelShap}, baselines).examples
    for metrics in (None, ["masked_accuracy"], ["infidelity"], ["sensitivity"], ["infidelity", "sensitivity"]):
        alone = compare({"a": net}, loader, {"KernelSHAP": KernelShap}, baselines, metrics).examples["a"]
        assert {*(metrics or ["infidelity"])} <= {judge.metric for judge in alone}
        for judge, values in alone.items():
            assert torch.equal(values, both["a"][judge]), judge
            assert torch.equal(values, both["b"][judge]), judge


@pytest.mark.parametrize("metric", ["infidelity", "sensitivity"])
def test_jury_judges_with_other_random_numbers_than_the_explainer_draws(metric):
    """LIME would otherwise fit the very perturbations that it is judged on."""
    of_explainer, of_model = [], []

    class Noting(InputXGradient):
        def attribute(self, inputs, target=None, *, create_graph=False):
            of_explainer.append(torch.initial_seed())
            return super().attribute(inputs, target, create_graph=create_graph)

    net = smooth_net()
    net.register_forward_hook(lambda *_: of_model.append(torch.initial_seed()))
    compare({"a": net}, [(X, Y)], {"noting": Noting}, {"zero": 0.0}, [metric])
    assert of_model[-1] != of_explainer[0]  # the judge comes last


def test_jury_leaves_random_streams_modes_and_generators_alone():
    generator = torch.Generator().manual_seed(5)
    model = smooth_conv_net().train()
    before, own = torch.random.get_rng_state(), generator.get_state()
    compare({"a": model}, [(IMAGES, Y[:8])], {"gradient": InputXGradient}, {"noise": noise(generator=generator)})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(generator.get_state(), own)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_jury_judges_images_by_road_and_captums_metrics():
    net = smooth_conv_net().eval()
    explainers = {"Grad-CAM": lambda model: LayerGradCam(model, model[4])}
    found = compare({"net": net}, [(IMAGES, Y[:8])], explainers, {"zero": 0.0, "one": 1.0}, explain="label")
    maps = LayerGradCam(net, net[4]).attribute(IMAGES, target=Y[:8]).detach()
    generator = torch.Generator().manual_seed(1)
    expected = road(net, IMAGES, maps, target=Y[:8], generator=generator)
    torch.testing.assert_close(found.examples["net"][Judge("road", "Grad-CAM")], expected)
    assert [judge for judge in found.judges if judge.metric == "sensitivity"] == [Judge("sensitivity", "Grad-CAM")]
    assert all(row["value"] >= 0 for row in found.rows if row["metric"] in ("infidelity", "sensitivity"))


@pytest.mark.parametrize("explainer", [InputXGradient, Saliency])
def test_jury_judges_one_logit_as_its_two_columns(explainer):
    """The maps that it judges speak for the target, also for class 0 of a single column."""
    net = smooth_conv_net(n_classes=1).eval()
    middle = net(IMAGES).median().item()

    class One(nn.Module):
        def forward(self, x):
            return net(x) - middle

    class Two(nn.Module):
        def forward(self, x):
            return torch.cat([middle - net(x), net(x) - middle], dim=1) / 2

    y = (net(IMAGES)[:, 0] > middle).long()
    assert 0 < y.sum() < 8
    single, double = (
        compare({"a": model}, [(IMAGES, y)], {"map": explainer}, {"zero": 0.0, "one": 1.0}).examples["a"]
        for model in (One(), Two())
    )
    assert {"road", "infidelity", "insertion_gain", "masked_accuracy"} <= {judge.metric for judge in single}
    scale = {"infidelity", "sensitivity"}  # of the logit and of its half
    for judge, values in single.items():
        if judge.metric not in scale:
            torch.testing.assert_close(values, double[judge], msg=str(judge))


def test_infidelity_of_exact_attributions_of_a_linear_model_is_zero():
    """With small logits the probabilities change nearly linearly."""

    class Random(InputXGradient):
        def attribute(self, inputs, *args, create_graph=False, **kwargs):
            return torch.randn(inputs.shape, dtype=inputs.dtype, generator=torch.Generator().manual_seed(0))

    Random.attribute.__signature__ = InputXGradient.attribute.__signature__
    model = nn.Linear(6, 1).double()
    with torch.no_grad():
        model.weight.mul_(1e-3)
    explainers = {"exact": InputXGradient, "random": Random}
    found = compare({"linear": model}, [(X, Y % 2)], explainers, {"zero": 0.0}, ["infidelity"])
    exact, random = (found.examples["linear"][Judge("infidelity", name, "zero")].mean() for name in explainers)
    assert float(exact) < 1e-3 * float(random)


def test_infidelity_equals_captums_for_features_that_are_columns():
    model, generator = MODELS["before"], torch.Generator().manual_seed(0)
    found = compare(
        {"a": model}, [(X, Y)], {"gradient": InputXGradient}, {"one": 1.0}, ["infidelity"], n_perturbations=40
    )
    predicted = model(X).argmax(1)

    def perturb(rows):
        noise = torch.rand(rows.shape, generator=generator)
        masked = noise >= noise.kthvalue(6, dim=1, keepdim=True).values  # one column of six is nearest to a fifth
        return masked.double(), torch.where(masked, torch.ones_like(rows), rows)

    expected = captum.metrics.infidelity(
        lambda x: model(x).softmax(1), perturb, X, InputXGradient(model).attribute(X, target=predicted),
        target=predicted, n_perturb_samples=200, normalize=True,
    )  # fmt: skip
    ours = found.examples["a"][Judge("infidelity", "gradient", "one")]
    correlation = np.corrcoef(ours.numpy(), expected.detach().numpy())[0, 1]
    assert correlation > 0.95
    assert float(ours.mean()) == pytest.approx(float(expected.detach().mean()), rel=0.2)


# --- errors and marks ----------------------------------------------------------------------------------------------


def test_differences_are_paired_and_their_errors_literal(found):
    judge = Judge("insertion", "KernelSHAP", "one")
    row = found.row("trained", judge)
    difference = found.examples["trained"][judge] - found.examples["plain"][judge]
    assert row["difference"] == pytest.approx(float(difference.mean()))
    assert row["difference_standard_error"] == pytest.approx(float(difference.std()) / math.sqrt(24))
    assert row["better"] == pytest.approx(row["difference"] / row["difference_standard_error"])
    deletion = found.row("trained", Judge("deletion", "KernelSHAP", "one"))
    assert deletion["better"] == pytest.approx(-deletion["difference"] / deletion["difference_standard_error"])
    reference = found.row("plain", judge)
    assert reference["difference"] == 0.0
    assert math.isnan(reference["better"])


def test_standard_error_takes_clusters_as_independent():
    values = torch.randn(12, dtype=torch.float64, generator=G)
    assert standard_error(values) == pytest.approx(float(values.std()) / math.sqrt(12))
    assert standard_error(values, torch.arange(12) * 7) == pytest.approx(standard_error(values))
    # Three copies of each example say no more than one.
    repeated, clusters = values.repeat_interleave(3), torch.arange(12).repeat_interleave(3)
    assert standard_error(repeated, clusters) == pytest.approx(standard_error(values))
    assert standard_error(repeated) < 0.6 * standard_error(values)
    assert math.isnan(standard_error(values, torch.zeros(12, dtype=torch.long)))
    assert math.isnan(standard_error(values[:1]))


def test_clusters_of_the_loader_reach_the_errors():
    def patients(batch):
        return (batch.inputs[:, 0] > 0).long() + 2 * (batch.inputs[:, 1] > 0).long()

    found = compare(MODELS, LOADER, EXPLAINERS, BASELINES, ["insertion"], clusters=patients)
    numbers = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
    of_numpy = compare(MODELS, LOADER, EXPLAINERS, BASELINES, ["insertion"], clusters=lambda b: patients(b).numpy())
    assert [row["standard_error"] for row in of_numpy.rows] == [row["standard_error"] for row in found.rows]
    row = found.rows[-1]
    judge = Judge(row["metric"], row["explainer"], row["baseline"])
    difference = found.examples["trained"][judge] - found.examples["before"][judge]
    assert row["difference_standard_error"] == pytest.approx(standard_error(difference, numbers))
    assert row["n_clusters"] == 4


def test_held_out_judges_are_those_with_a_part_that_the_training_did_not_have(found):
    marks = {str(judge): found.held_out(judge) for judge in found.judges}
    assert marks["insertion, gradient, zero"] is False
    assert marks["deletion_gain, gradient, zero"] is False
    assert marks["accuracy"] is False
    for judge in ("insertion, gradient, one", "insertion, KernelSHAP, zero", "infidelity, gradient, zero"):
        assert marks[judge] is True
    assert marks["masked_accuracy, zero"] is True
    unknown = compare(MODELS, LOADER, EXPLAINERS, BASELINES, ["accuracy"])
    assert {row["held_out"] for row in unknown.rows} == {None}
    masked = compare(MODELS, LOADER, EXPLAINERS, BASELINES, ["masked_accuracy"], trained_on=["zero", "masked_accuracy"])
    assert [masked.held_out(judge) for judge in masked.judges] == [False, True]


# --- other inputs --------------------------------------------------------------------------------------------------


def test_jury_of_a_regression_leaves_out_what_needs_classes():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    found = compare({"a": model}, [(X, X[:, 0])], EXPLAINERS, BASELINES, outputs="raw")
    metrics = {judge.metric for judge in found.judges}
    assert metrics == {"insertion", "deletion", "insertion_gain", "deletion_gain", "sensitivity"}
    with pytest.raises(ValueError, match="need classes"):
        compare({"a": model}, [(X, X[:, 0])], EXPLAINERS, BASELINES, ["accuracy"], outputs="raw")


@pytest.mark.parametrize("outputs", ["logits", "multilabel"])
def test_jury_of_one_logit_and_of_labels(outputs):
    n_outputs, target = (1, Y % 2) if outputs == "logits" else (4, torch.randint(2, (24, 4), generator=G))
    models = {name: nn.Linear(6, n_outputs).double() for name in "ab"}
    found = compare(models, [(X, target)], EXPLAINERS, BASELINES, outputs=outputs)
    assert all(math.isfinite(row["value"]) for row in found.rows)
    if outputs == "logits":  # exact attributions of a linear model rank better than chance, for both classes
        gains = found.examples["a"][Judge("insertion_gain", "KernelSHAP", "zero")]
        predicted = models["a"](X)[:, 0] > 0
        assert gains[predicted].mean() > 0 < gains[~predicted].mean()


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (smooth_net(), torch.nn.functional.one_hot(Y, 3).double()),
        (nn.Linear(6, 1).double(), (Y % 2).double()),
        (nn.Linear(6, 1).double(), (Y % 2).double()[:, None]),
    ],
)
def test_jury_explains_labels_of_every_form(model, target):
    found = compare({"a": model}, [(X, target)], EXPLAINERS, BASELINES, explain="label")
    labels = target.argmax(1) if target.shape[-1] == 3 else target.flatten().long()
    plain = compare({"a": model}, [(X, labels)], EXPLAINERS, BASELINES, explain="label")
    for judge, values in plain.examples["a"].items():
        torch.testing.assert_close(found.examples["a"][judge], values)
    many = torch.ones(24, 3)
    with pytest.raises(ValueError, match="index of one label per example"):
        compare({"a": smooth_net()}, [(X, many)], EXPLAINERS, BASELINES, outputs="multilabel", explain="label")


def test_sensitivity_holds_drawn_baselines_and_takes_those_of_each_example():
    """The explanation of a nearly linear model hardly moves with its input, as long as the baseline stays."""
    model = nn.Linear(6, 3).double()
    explainers = {"KernelSHAP": KernelShap}
    values = [
        float(compare({"a": model}, [(X, Y)], explainers, {"b": given}, ["sensitivity"]).rows[0]["value"])
        for given in (0.0, noise(generator=torch.Generator().manual_seed(7)), resampled(), X.flip(0))
    ]
    assert max(values) < 3 * values[0]
    masks = {"KernelSHAP": torch.arange(6).expand(24, 6) // torch.tensor([1, 2, 3]).repeat(8)[:, None]}
    found = compare({"a": model}, [(X, Y)], explainers, {"b": 0.0}, ["sensitivity"], feature_mask=masks)
    assert math.isfinite(found.rows[0]["value"])


def test_sensitivity_of_inputs_that_do_not_move_is_zero_since_masks_are_the_same():
    settings = {"attribute_kwargs": {"KernelSHAP": {"n_samples": 12, "sampling": "independent"}}}
    judges = {"KernelSHAP": KernelShap}, {"zero": 0.0}, ["sensitivity"]
    still = compare(MODELS, LOADER, *judges, perturbation_radius=0.0, **settings)
    assert {row["value"] for row in still.rows} == {0.0}
    moved = compare(MODELS, LOADER, *judges, **settings)
    assert all(row["value"] > 0 for row in moved.rows)
    for n_rows in (24, 1000):
        found = compare(MODELS, LOADER, *judges, **settings, max_examples_per_batch=n_rows)
        for row, expected in zip(found.rows, moved.rows, strict=True):
            assert row["value"] == pytest.approx(expected["value"])


def test_infidelity_of_groups_of_different_sizes_adds_up_gradients_and_not_group_values():
    """Of a linear model both attributions are exact, whatever the groups."""
    model = nn.Linear(6, 1).double()
    with torch.no_grad():
        model.weight.mul_(1e-3)
    mask, zero = torch.tensor([0, 1, 1, 2, 2, 2]), {"zero": 0.0}
    found = compare({"a": model}, [(X, Y % 2)], EXPLAINERS, zero, ["infidelity"], feature_mask=mask)
    gradient, shapley = (row["value"] for row in found.rows)
    assert gradient == pytest.approx(shapley, rel=1e-3)
    assert gradient < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_jury_judges_models_of_half_precision(dtype):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    batch = (IMAGES.to(dtype), Y[:8])
    found = compare({"a": net}, [batch], {"gradient": InputXGradient}, {"zero": 0.0}, max_examples_per_batch=8)
    assert all(math.isfinite(row["value"]) for row in found.rows)


def test_jury_draws_other_numbers_for_every_batch_and_seed():
    batches = [(X[:8], Y[:8])] * 2
    found = compare({"a": smooth_net()}, batches, EXPLAINERS, BASELINES, ["insertion_gain"])
    first, second = found.examples["a"][Judge("insertion_gain", "gradient", "one")].split(8)
    assert not torch.equal(first, second)
    other = compare({"a": smooth_net()}, batches, EXPLAINERS, BASELINES, ["insertion_gain"], seed=1)
    assert not torch.equal(other.examples["a"][Judge("insertion_gain", "gradient", "one")][:8], second)


def test_jury_takes_side_inputs_tuples_and_masks_by_explainer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth_net(n_features=8)

        def forward(self, a, b, shift):
            return self.net(torch.cat([a, b], dim=1) + shift)

    shift = torch.randn(24, 8, dtype=torch.float64, generator=G)
    batch = Batch((X, X[:, :2]), Y, additional_forward_args=shift)
    groups = (torch.arange(6) // 2, torch.tensor([3, 3]))
    found = compare(
        {"a": Two(), "b": Two()}, [batch], EXPLAINERS, {"zero": (0.0, 0.0)}, feature_mask={"KernelSHAP": groups},
        attribute_kwargs={"KernelSHAP": {"n_samples": 20}},
    )  # fmt: skip
    assert all(math.isfinite(row["value"]) for row in found.rows)
    with pytest.raises(ValueError, match="'road' needs images"):
        compare({"a": Two()}, [batch], EXPLAINERS, {"zero": (0.0, 0.0)}, ["road"])


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_comparison_page_is_one_file_with_verdicts_table_and_picture(found, tmp_path):
    path = tmp_path / "page.html"
    found.to_html(path)
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert not page.open
    assert page.tags.count("tr") == 1 + len(found.judges)
    assert "data:image/png;base64," in text
    assert "http" not in text.replace("http-equiv", "")  # nothing is fetched
    kinds = {"with an explainer that took no part in the training": 0, "with another baseline or metric": 0}
    for judge in found.judges:
        if found.held_out(judge):
            is_new = judge.explainer is not None and judge.explainer not in found.trained_on
            kinds[list(kinds)[not is_new]] += 1
    for kind, n in kinds.items():
        assert n
        assert f"of {n} judges {kind}" in text
    assert "the same 24 examples" in text
    assert list(tmp_path.iterdir()) == [path]
    odd = compare({"<b>&": MODELS["before"], "x": MODELS["plain"]}, LOADER, EXPLAINERS, BASELINES, ["accuracy"])
    odd.to_html(path)
    assert "<b>&" not in path.read_text()
    assert "&lt;b&gt;&amp;" in path.read_text()


def test_comparison_page_counts_verdicts_by_metric_and_lists_arguments(tmp_path):
    arguments = {"gradient": {"n_steps": 5, "baselines": torch.zeros(1, 6, dtype=torch.float64)}}
    metrics = ["insertion", "infidelity"]
    explainers = {"gradient": IntegratedGradients}
    found = compare(MODELS, LOADER, explainers, BASELINES, metrics, attribute_kwargs=arguments)
    page = comparison_page(found)
    assert "<dt>arguments of gradient</dt><dd>n_steps=5, baselines=tensor of shape (1, 6)</dd>" in page
    for model in ("plain", "trained"):
        counts = []
        for sign in (1, -1):
            rows = [row for row in found.rows if row["model"] == model and sign * row["better"] > 2]
            of_metrics = [(metric, sum(row["metric"] == metric for row in rows)) for metric in metrics]
            listed = ", ".join(f"{metric}: {count}" for metric, count in of_metrics if count)
            counts.append(f"{len(rows)} ({listed})" if rows else "0")
        verdict = (
            f"<strong>{model}</strong>: of {len(found.judges)} judges, {counts[0]} find it better and {counts[1]} worse"
        )
        assert verdict in page


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_comparison_page_names_judges_that_cannot_decide(value):
    """All examples differ by the same, or have no score: there is no error to compare the difference with."""
    examples = {"a": {Judge("accuracy"): torch.zeros(9)}, "b": {Judge("accuracy"): torch.full((9,), value)}}
    page = comparison_page(Comparison(examples, clusters=None, reference="a", trained_on=None, settings={}))
    assert "of 1 judges, 0 find it better and 0 worse" in page
    assert "and 1 (accuracy: 1) have no error to compare with" in page


def test_settings_are_those_that_the_values_depend_on():
    def pairs(inputs):
        return torch.arange(6).div(2, rounding_mode="floor").unsqueeze(0)

    settings = {
        "feature_mask": {"gradient": pairs},
        "fraction": 0.5,
        "step_size": 1,
        "n_random_orders": 3,
        "n_perturbations": 7,
        "perturbation_radius": 0.1,
    }
    explainers = {"gradient": IntegratedGradients}
    common = {"explained class": "predicted by each model", "feature mask of gradient": "pairs", "seed": 0}
    of_masks = {"share of the locations inserted or deleted": 0.5, "step size": 1}
    for metrics, used in (
        (["infidelity"], {"perturbations": 7}),
        (["sensitivity"], {"perturbations": 7, "perturbation radius": 0.1}),
        (["insertion"], of_masks),
        (["deletion_gain"], of_masks | {"random orders": 3}),
        (["masked_accuracy"], {"share masked for masked accuracy": 0.5}),
    ):
        assert compare(MODELS, LOADER, explainers, BASELINES, metrics, **settings).settings == common | used


@pytest.mark.parametrize(
    ("difference", "error", "text"),
    [
        (0.0123, 0.0456, "+0.012 ± 0.046"),
        (-0.000123, 0.0000456, "-0.000123 ± 0.000046"),
        (0.0, 0.0, "+0.000 ± 0.000"),
        (1.5, float("nan"), "+1.500 ± nan"),
    ],
)
def test_differences_show_two_digits_of_their_errors(difference, error, text):
    assert change_text({"difference": difference, "difference_standard_error": error}) == text


def test_comparison_table_and_frame_name_all_judges(found):
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(found.judges)
    assert lines[0] == "| judge | before | plain | trained |"
    assert any(line.startswith("| insertion, gradient, zero ↑* |") for line in lines)
    frame = found.to_pandas()
    assert list(frame.columns[:5]) == ["model", "metric", "explainer", "baseline", "value"]
    assert len(frame) == len(found.rows)


def test_comparison_plot_has_an_axis_for_each_metric_and_hollow_markers(found):
    figure = found.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert {title[:-2].replace(" ", "_") for title in titles} == {judge.metric for judge in found.judges}
    assert {"deletion ↓", "insertion ↑"} <= {*titles}
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "insertion ↑"]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "gradient, zero", "gradient, one", "KernelSHAP, zero", "KernelSHAP, one",
    ]  # fmt: skip
    markers = [line for line in axis.lines if line.get_marker() in "os^Dv<>" and len(line.get_xdata()) == 1]
    assert [line.get_fillstyle() for line in markers] == ["none", "full", "full", "full"] * 2
    alone = compare({"a": MODELS["before"]}, LOADER, EXPLAINERS, BASELINES, ["accuracy"])
    assert plot_comparison(alone.rows, "a").axes[0].lines


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "models must be a mapping", {"models": [smooth_net()]}),
        (ValueError, "models is empty", {"models": {}}),
        (TypeError, r"models\['f'\] must be a torch.nn.Module", {"models": {"f": lambda x: x}}),
        (TypeError, "explainers must be a mapping", {"explainers": [Saliency]}),
        (TypeError, "explainer must be an attribution", {"explainers": {"f": lambda model: model}}),
        (
            ValueError,
            r"explainers\['first'\] returns an attribution of another model",
            {"explainers": {"first": lambda _: InputXGradient(MODELS["plain"])}},
        ),
        (TypeError, "baselines must be a mapping", {"baselines": 0.0}),
        (ValueError, "metrics must be some of", {"metrics": ["faithfulness"]}),
        (ValueError, "metrics must be some of", {"metrics": []}),
        (ValueError, "reference='other' is none of the models", {"reference": "other"}),
        (ValueError, r"trained_on names \['black'\]", {"trained_on": ["black"]}),
        (ValueError, r"\['zero'\], which several of", {"explainers": {"zero": Saliency}, "trained_on": ["zero"]}),
        (ValueError, "feature_mask names", {"feature_mask": {"LIME": None}}),
        (ValueError, "attribute_kwargs must be by explainer", {"attribute_kwargs": {"n_samples": 5}}),
        (ValueError, "explain must be", {"explain": "both"}),
        (ValueError, "yielded no batch", {"loader": []}),
        (ValueError, "clusters must return one integer per example", {"clusters": lambda batch: batch.inputs}),
        (ValueError, "n_perturbations", {"n_perturbations": 0}),
        (ValueError, "perturbation_radius", {"perturbation_radius": -1.0}),
        (ValueError, "Gains need random orders", {"n_random_orders": 0}),
        (ValueError, "Gains need random orders", {"n_random_orders": 0, "metrics": ["insertion_gain"]}),
        (TypeError, "trained_on must be a list of names", {"trained_on": "gradient"}),
        (TypeError, "clusters must return integers", {"clusters": lambda batch: ["a"] * len(batch.target)}),
        (ValueError, "floating-point inputs", {"loader": [(X.long(), Y)], "metrics": ["sensitivity"]}),
        (ValueError, r"images \(B, C, H, W\)", {"metrics": ["road"]}),
    ],
)
def test_jury_errors_name_bad_arguments(error, text, arguments):
    given = {"models": MODELS, "loader": LOADER, "explainers": EXPLAINERS, "baselines": BASELINES, **arguments}
    with pytest.raises(error, match=text):
        jury.compare(**given)
