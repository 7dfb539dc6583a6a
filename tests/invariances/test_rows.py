"""A row alone gives what it gives in any batch, of any size: 1, 2, a prime, or a size that the call has, too."""

from __future__ import annotations

import pytest
import torch

import captum_idexpo.attr as attr
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, RightForTheRightReasons, Stability
from captum_idexpo.testing import assert_rows_independent
from tests.invariances.calls import CALLS, assert_same, feature_mask, rows_of, tensors_of
from tests.invariances.zoo import ONE_EACH, ZOO, Graph

# Six rows, columns, or pixels a side; four steps or features; three classes; two channels.
SIZES = (1, 2, 3, 4, 5, 6)
NO_RULE = ("siamese", "DeepLift")  # a module that is used twice is refused


pytestmark = pytest.mark.filterwarnings("ignore:The attributions of DeepLift")  # modules without a rule


def cases():
    for specimen in ONE_EACH:
        for name, call in CALLS.items():
            refused = specimen == NO_RULE[0] and "DeepLift" in name and "Layer" not in name
            if call.random or refused or (name == "GuidedGradCam" and specimen not in ("ReLU, MaxPool", "BatchNorm")):
                continue
            yield specimen, name


@pytest.mark.parametrize(("specimen", "name"), cases())
def test_rows_are_explained_alike_in_any_batch(specimen, name):
    specimen, call = ZOO[specimen], CALLS[name]
    inputs, target = specimen.inputs(6), torch.arange(6) % specimen.n_columns
    whole = call(specimen, inputs, target)
    for size in SIZES:
        rows = list(range(6))[-size:][::-1]
        part = call(specimen, rows_of(inputs, rows), target[rows])
        assert_same(part, [tensor[rows] for tensor in tensors_of(whole)])


@pytest.mark.parametrize("specimen", ONE_EACH)
def test_zoo_models_have_independent_rows(specimen):
    assert_rows_independent(ZOO[specimen].model(), ZOO[specimen].inputs(6))


FORMS = {
    "a number": lambda s: 0.3,
    "one for all": lambda s: s.inputs(1, seed=2),
    "no batch axis": lambda s: rows_of(s.inputs(1, seed=2), 0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["FeatureAblation", "Occlusion", "ShapleyValues", "Lime", "KernelShap"])
@pytest.mark.parametrize("specimen", ["ReLU, MaxPool", "linear", "recurrent"])
def test_baselines_and_masks_are_read_alike_in_any_batch(specimen, name, form):
    """Also if the first size of one without a batch axis happens to be the batch's."""
    specimen, call = ZOO[specimen], CALLS[name]
    inputs, target = specimen.inputs(6), torch.arange(6) % specimen.n_columns
    arguments = {"baselines": FORMS[form](specimen)}
    if name != "Occlusion":
        arguments["feature_mask"] = feature_mask(specimen)[0]
    whole = call(specimen, inputs, target, **arguments)
    for size in SIZES:
        part = call(specimen, inputs[:size], target[:size], **arguments)
        assert_same(part, whole[:size])


@pytest.mark.parametrize("temperature", [None, "auto"])
@pytest.mark.parametrize("specimen", ONE_EACH)
def test_insertion_deletion_scores_a_row_alike_in_any_batch(specimen, temperature):
    specimen = ZOO[specimen]
    model, inputs = specimen.model(), specimen.inputs(6)
    target = torch.arange(6) % max(2, specimen.n_columns)
    attributions = specimen.inputs(6, seed=5)
    arguments = {"temperature": temperature, "feature_mask": feature_mask(specimen)}

    def scores(rows):
        return insertion_deletion(
            model,
            rows_of(inputs, rows),
            rows_of(attributions, rows),
            baselines=specimen.baselines(),
            target=target[rows],
            **arguments,
        )

    whole = scores(list(range(6)))
    for size in SIZES:
        rows = list(range(6))[-size:]
        part = scores(rows)
        assert_same([part.insertion, part.deletion], [whole.insertion[rows], whole.deletion[rows]])


def test_regularizer_loss_of_a_batch_is_the_mean_over_its_rows():
    specimen = ZOO["Tanh, AvgPool"]
    model, x, y = specimen.model(), specimen.inputs(5), torch.arange(5) % 3
    mask, annotations = feature_mask(specimen), (specimen.inputs(5, seed=4) > 0).double()
    lime, settings = attr.Lime(model, Ridge(0.1)), {"baselines": 0.3, "steps_per_update": None}
    regularizers = {
        "Grad-CAM": InsertionDeletion(attr.LayerGradCam(model, model[3]), l2_weight=0.1, **settings),
        "LIME": InsertionDeletion(
            lime,
            **settings,
            feature_mask=mask,
            attribute_kwargs={"sampling": "independent", "share_masks": True, "n_samples": 12},
        ),
        "right reasons": RightForTheRightReasons(model),
    }
    for regularizer in regularizers.values():

        def terms(rows, regularizer=regularizer):
            torch.manual_seed(0)
            return regularizer(x[rows], y[rows], annotations[rows])

        whole, alone = terms(slice(None)), [terms(slice(b, b + 1)) for b in range(5)]
        for name, value in whole.items():
            torch.testing.assert_close(value, torch.stack([each[name] for each in alone]).mean(), rtol=1e-9, atol=0)


# --- models whose rows influence each other -------------------------------------------------------------------------


def graph(n_nodes):
    torch.manual_seed(0)
    model = Graph(n_nodes).double().eval()
    x = torch.randn(n_nodes, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, x, torch.arange(n_nodes) % 3


MIXING = {
    "graph of 5": lambda: graph(5),
    "graph of 20": lambda: graph(20),
    "centred": lambda: ((lambda x: graph(6)[0].head(torch.tanh(graph(6)[0].layer(x - x.mean(0))))), *graph(6)[1:]),
    "scaled": lambda: ((lambda x: graph(6)[0].head(graph(6)[0].layer(x / (1 + x.norm())))), *graph(6)[1:]),
    "one number of rows": lambda: ((lambda x: graph(6)[0].head(graph(6)[0].layer(x * graph(6)[1]))), *graph(6)[1:]),
}


@pytest.mark.parametrize("name", MIXING)
def test_dependent_rows_are_refused_where_each_row_has_a_different_mask(name):
    model, x, y = MIXING[name]()
    regularizers = [
        InsertionDeletion(attr.FeatureAblation(model), baselines=0.0, model=torch.nn.Identity()),
        Fidelity(model, outputs="raw", eval_mode=False),
        Stability(model, outputs="raw", eval_mode=False),
    ]
    calls = [
        lambda: attr.KernelShap(model).attribute(x, target=y),
        lambda: attr.KernelShap(model).attribute(x, target=y, perturbations_per_eval=1),
        lambda: attr.Lime(model, Ridge()).attribute(x, target=y, create_graph=True),
        lambda: insertion_deletion(model, x, x, target=y),
        lambda: insertion_deletion(model, x, x, target=y, max_examples_per_batch=4),
        lambda: sensitivity_n(model, x, x, 2, target=y),
        *(lambda regularizer=regularizer: regularizer(x, y) for regularizer in regularizers),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"The rows of a forward pass influence.*share_masks=True.*max_examples"):
            call()


@pytest.mark.parametrize("name", ["graph of 5", "graph of 20", "centred", "scaled", "one number of rows"])
def test_dependent_rows_can_be_explained_with_shared_masks(name):
    model, x, y = MIXING[name]()
    together = {"share_masks": True, "perturbations_per_eval": 1, "sampling": "independent"}
    shap = attr.KernelShap(model).attribute(x, target=y, n_samples=8, **together)
    exact = attr.ShapleyValues(model).attribute(x, target=y, perturbations_per_eval=1)
    torch.testing.assert_close(shap, exact)
    assert_same(attr.ShapleyValues(model).attribute(x, target=y), exact)
    n = len(x)
    scores = insertion_deletion(model, x, exact, target=y, max_examples_per_batch=n)
    ranks = exact.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    curve = [model(torch.where(ranks < s, x, 0)).softmax(1).gather(1, y[:, None])[:, 0] for s in (1, 2, 3)]
    torch.testing.assert_close(scores.insertion, torch.stack(curve).mean(0))


def test_dependent_rows_check_accepts_functions_that_draw_random_numbers():
    specimen = ZOO["linear"]
    model, x = specimen.model(), specimen.inputs(6)
    insertion_deletion(lambda x: model(x) + 0.1 * torch.randn(len(x), 3), x, x, target=0)
    dropout = torch.nn.Sequential(torch.nn.Dropout(0.5), model).train()
    insertion_deletion(dropout, x, x, target=0)
    insertion_deletion(lambda x: dropout(x), x, x, target=0)
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(6), model).double().train()
    insertion_deletion(lambda x: norm(x), x, x, target=0)


@pytest.mark.parametrize("outputs", ["raw", "logits"])
def test_dependent_rows_check_accepts_rounding_in_half_precision(outputs):
    model, x = ZOO["linear"].model().bfloat16(), ZOO["linear"].inputs(6)

    def forward(x):  # vectorised kernels end with rows that they add up in another order
        last = torch.arange(len(x)) >= len(x) // 2
        return (model(x.bfloat16()) * torch.where(last, 1 + 2**-7, 1)[:, None]).double()

    insertion_deletion(forward, x, x, target=0, outputs=outputs)
