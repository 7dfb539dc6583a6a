"""Targets beyond one class: several labels, soft labels, columns of a regression, scores of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, InsertionDeletion
from captum_idexpo.attr import InputXGradient, Lime, Saliency
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import (
    Fidelity,
    MaskedNeighbors,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)
from captum_idexpo.testing import assert_trainable
from tests.helpers import smooth_net

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]).double()  # one true label each
SEVERAL = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1]]).double()
SETTINGS = {"baselines": 0.2, "insertion_weight": 1.0, "deletion_weight": 1.0, "l2_weight": 0.5, "step_size": 1}


def one_label(model, label):
    """The same model with the column of one label alone."""
    return lambda x: model(x)[:, [label]]


def id_expo(model, **more):
    return InsertionDeletion(InputXGradient(model), outputs="multilabel", **SETTINGS, **more)


def of_one_column(model, label, row, **more):
    """ID-ExpO's terms of one example for class 1 of a model of one label."""
    explainer = InputXGradient(one_label(model, label))
    terms = InsertionDeletion(explainer, **SETTINGS, eval_mode=False, **more)(X[[row]], torch.tensor([1]))
    return torch.stack([terms[name] for name in ("insertion", "deletion", "l2")])


def in_order(terms):
    return torch.stack([terms[name] for name in ("insertion", "deletion", "l2")])


# --- several labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, "auto"])
def test_multilabel_metrics_equal_those_of_a_model_of_one_label(temperature):
    model, maps = smooth_net(), torch.randn(5, 6, dtype=torch.float64)
    target = LABELS.argmax(1)
    settings = {"baselines": 0.2, "temperature": temperature, "step_size": 1}
    ours = insertion_deletion(model, X, maps, target=target, outputs="multilabel", **settings)
    for row, label in enumerate(target.tolist()):
        single = insertion_deletion(one_label(model, label), X[[row]], maps[[row]], target=1, **settings)
        torch.testing.assert_close(ours.insertion[row], single.insertion[0])
        torch.testing.assert_close(ours.deletion_curve[row], single.deletion_curve[0])
    drawn = {"n_samples": 20, "target": target, "outputs": "multilabel"}
    assert sensitivity_n(model, X, maps, 2, generator=torch.Generator().manual_seed(0), **drawn).shape == (5,)


@pytest.mark.parametrize("deletion_form", ["ratio", "log", "complement"])
def test_deletion_of_one_true_label_equals_a_model_of_one_label_in_every_form(deletion_form):
    model, more = smooth_net(), {"deletion_form": deletion_form}
    singles = [of_one_column(model, label, row, **more) for row, label in enumerate(LABELS.argmax(1).tolist())]
    torch.testing.assert_close(in_order(id_expo(model, **more)(X, LABELS)), torch.stack(singles).mean(0))


@pytest.mark.parametrize("target", [LABELS, LABELS.long(), LABELS.bool(), LABELS.argmax(1)])
def test_insertion_deletion_of_one_true_label_equals_a_model_of_one_label(target):
    model = smooth_net()
    expected = torch.stack([of_one_column(model, label, row) for row, label in enumerate(LABELS.argmax(1).tolist())])
    torch.testing.assert_close(in_order(id_expo(model)(X, target)), expected.mean(0))


def test_insertion_deletion_draws_true_labels_evenly_and_counts_examples_without_any_as_zero():
    model = smooth_net()
    expected = torch.zeros(3, dtype=torch.float64)
    for row, labels in enumerate(SEVERAL.bool()):
        every = [of_one_column(model, label, row).detach() for label in labels.nonzero().flatten().tolist()]
        expected += torch.stack(every).mean(0) / 5 if every else 0
    regularizer = id_expo(model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = torch.stack([in_order(regularizer(X, SEVERAL)) for _ in range(400)])
    error = (drawn.mean(0) - expected).abs() / (drawn.std(0) / 20 + 1e-12)
    assert bool((error < 4).all())
    assert bool((drawn.std(0) > 1e-4).all())  # it does draw


@pytest.mark.parametrize(
    "make",
    [
        id_expo,
        lambda model: Smoothness(InputXGradient(model), outputs="multilabel"),
        lambda model: RightForTheRightReasons(model, outputs="multilabel"),
        lambda model: RightForTheRightReasons(model, explainer=InputXGradient(model), outputs="multilabel"),
        lambda model: Fidelity(model, outputs="multilabel"),
        lambda model: Stability(model, MaskedNeighbors(), outputs="multilabel"),
        lambda model: SaliencyGuided(model, outputs="multilabel"),
    ],
)
def test_multilabel_terms_have_their_true_gradient(make):
    model = smooth_net()
    regularizer = make(model)
    if isinstance(regularizer, InsertionDeletion):
        regularizer.temperature = None  # the soft mask's temperature counts as constant
    annotations = (torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.5).double()
    assert_trainable(lambda: tuple(regularizer(X, SEVERAL, annotations).values()), model)


def test_insertion_deletion_scores_are_means_over_the_true_labels():
    model = smooth_net()
    regularizer = id_expo(model)
    ours = regularizer.scores(X, SEVERAL)
    for row, labels in enumerate(SEVERAL.bool()):
        every = [regularizer.scores(X, torch.full((5,), label)) for label in labels.nonzero().flatten().tolist()]
        expected = torch.stack([scores.insertion[row] for scores in every]).mean() if every else torch.tensor(torch.nan)
        torch.testing.assert_close(ours.insertion[row], expected.double(), equal_nan=True)
        if every:
            curve = torch.stack([scores.deletion_curve[row] for scores in every]).mean(0)
            torch.testing.assert_close(ours.deletion_curve[row], curve)
    predicted = regularizer.scores(X)
    torch.testing.assert_close(predicted.insertion, regularizer.scores(X, model(X).argmax(1)).insertion)


def test_right_reasons_adds_both_outcomes_of_every_label():
    model, x = smooth_net(), X.clone().requires_grad_()
    annotations = torch.zeros(5, 6).double()
    annotations[:, :2] = 1
    logits = model(x)
    (gradient,) = torch.autograd.grad((logsigmoid(logits) + logsigmoid(-logits)).sum(), x)
    expected = (gradient * annotations).square().sum(1).mean()
    ours = RightForTheRightReasons(model, outputs="multilabel")(X, LABELS, annotations)["right_reasons"]
    torch.testing.assert_close(ours.detach(), expected)


def test_saliency_guided_adds_the_divergences_of_all_labels():
    model = smooth_net()
    labels = LABELS.clone()
    labels[1] = 0  # contributes nothing
    expected = torch.zeros((), dtype=torch.float64)
    for row, label in ((0, 0), (2, 1), (3, 0), (4, 2)):
        x = X[[row]].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[0, label], x)
        changed = X[[row]].clone()
        changed[0, gradient[0].abs().argsort(stable=True)[:3]] = 0.0
        p, q = model(X[[row]])[0].sigmoid(), model(changed)[0].sigmoid()
        expected += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / 5
    ours = SaliencyGuided(model, value_range=(0.0, 0.0), outputs="multilabel")(X, labels)["saliency_guided"]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [Fidelity, Stability, lambda f, **more: Stability(f, MaskedNeighbors(), **more)])
def test_fidelity_and_stability_of_labels_are_those_of_their_probabilities(make):
    model, values = smooth_net(), []
    probabilities = nn.Sequential(model, nn.Sigmoid())
    for forward, outputs, target in ((model, "multilabel", LABELS), (probabilities, "raw", LABELS)):
        torch.manual_seed(0)
        if outputs == "raw" and "Masked" in repr(make(forward, outputs=outputs).neighborhood):
            return  # raw outputs on masked copies need a column
        values.append(next(iter(make(forward, outputs=outputs)(X, target).values())))
    torch.testing.assert_close(*values)


def test_trainer_reports_accuracy_per_label_and_exact_match_of_several_labels():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(6, 3).double(), nn.BCEWithLogitsLoss()
    regularizer = InsertionDeletion(InputXGradient(model), baselines=0.0, outputs="multilabel")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(model, optimizer, [regularizer], loss_fn, show_progress=False)
    loader = DataLoader(TensorDataset(X, SEVERAL), batch_size=2)
    history = trainer.fit(loader, loader, epochs=2)
    assert {"val_accuracy", "val_exact_match", "val_insertion"} <= set(history[-1])
    right = (model(X) > 0) == SEVERAL.bool()
    scores = trainer.evaluate(loader)
    assert scores["accuracy"] == pytest.approx(float(right.double().mean()))
    assert scores["exact_match"] == pytest.approx(float(right.all(1).double().mean()))
    torch.testing.assert_close(
        trainer.example_scores(loader, explain="label")["insertion"],
        regularizer.scores(X, SEVERAL).insertion,
        equal_nan=True,
    )


def trained_by(model, regularizers, loss_fn, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ExplanationRegularizedTrainer(model, optimizer, regularizers, loss_fn, show_progress=False, **settings)


def test_accuracy_of_several_labels_is_read_from_the_judges_logits_of_a_model_of_probabilities():
    model = nn.Sequential(smooth_net(), nn.Sigmoid())

    def logits(x):
        return model(x).logit()

    judge = InsertionDeletion(InputXGradient(logits), baselines=0.0, outputs="multilabel", model=model)
    scores = trained_by(model, [judge], nn.BCELoss()).evaluate([(X, SEVERAL)])
    assert scores["accuracy"] == pytest.approx(float(((model(X) > 0.5) == SEVERAL.bool()).double().mean()))


def test_an_example_without_a_true_label_has_no_score():
    model = smooth_net()
    trainer = trained_by(model, [id_expo(model)], nn.BCEWithLogitsLoss())
    scores = trainer.example_scores([(X, SEVERAL)], explain="label")
    for name in ("insertion", "deletion", "one_minus_deletion"):
        assert scores[name][1].isnan()
        assert bool((scores[name][[0, 2, 3, 4]] > 0).all())


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("make", [id_expo, lambda model: Sparsity(Saliency(model), outputs="multilabel")])
def test_multi_hot_target_has_one_column_for_each_output(make, width):
    with pytest.raises((ValueError, IndexError), match=rf"has {width} labels, the output 3 columns|out of range"):
        make(smooth_net())(X, torch.ones(5, width))


def test_sparsity_of_a_batch_without_any_true_label_is_zero():
    model = smooth_net()
    assert Sparsity(InputXGradient(model), outputs="multilabel")(X, torch.zeros(5, 3))["sparsity"] == 0


def test_proportions_of_a_regression_are_no_soft_labels():
    model, target = smooth_net(), torch.randn(5, 3).double().softmax(1)
    scores = trained_by(model, [Stability(model, outputs="raw")], nn.MSELoss()).evaluate([(X, target)])
    assert set(scores) == {"loss", "valscore"}


def test_accuracy_follows_target_transform():
    model = smooth_net()
    target = model(X).argmax(1) + 1  # numbered from 1
    judge = InsertionDeletion(InputXGradient(model), baselines=0.0, target_transform=lambda target: target - 1)
    trainer = trained_by(model, [judge], lambda output, target: nn.functional.cross_entropy(output, target - 1))
    assert trainer.evaluate([(X, target)])["accuracy"] == 1


def test_accuracy_follows_the_judge_where_a_regularizer_explains_another_class_than_the_label():
    model = smooth_net()
    target = model(X).argmax(1)
    always_0 = Sparsity(InputXGradient(model), target_transform=torch.zeros_like)
    judge = InsertionDeletion(InputXGradient(model), baselines=0.0)
    trainer = trained_by(model, [always_0], nn.functional.cross_entropy, evaluation=judge)
    assert trainer.evaluate([(X, target)])["accuracy"] == 1


def test_masked_accuracy_of_smoothed_labels_is_that_of_the_labels():
    model = smooth_net()
    judge = id_expo(model, target_transform=lambda target: (target > 0.5).double())
    trainer = trained_by(model, [judge], nn.functional.binary_cross_entropy_with_logits)
    of_smoothed, of_labels = (
        trainer.evaluate([(X, target)], masked_share=0.5) for target in (0.9 * SEVERAL + 0.05, SEVERAL)
    )
    for name in ("accuracy", "masked_accuracy"):
        assert of_smoothed[name] == of_labels[name]


def test_smoothed_labels_of_one_column_are_explained_by_the_more_probable_class():
    model = smooth_net(n_classes=1)
    smoothed = torch.tensor([[0.05], [0.95], [0.05], [0.95], [0.95]]).double()
    regularizer = InsertionDeletion(InputXGradient(model), **SETTINGS)
    for target in (smoothed, smoothed[:, 0]):
        torch.testing.assert_close(regularizer(X, target), regularizer(X, (smoothed[:, 0] > 0.5).long()))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]), r"multi-hot target \(B, L\).*float32 of shape \(5,\)"),
        (0.9 * LABELS + 0.05, r"zeros and ones, given: 0\.05 to 0\.95.*target_transform"),
        (LABELS[:, :, None], r"multi-hot target \(B, L\).*shape \(5, 3, 1\)"),
        ("cat", "given: str"),
    ],
)
@pytest.mark.parametrize("make", [id_expo, lambda model: Sparsity(Saliency(model), outputs="multilabel")])
def test_multilabel_targets_of_another_form_are_refused(make, target, message):
    with pytest.raises(TypeError, match=message):
        make(smooth_net())(X, target)


@pytest.mark.parametrize(
    "make", [RightForTheRightReasons, Fidelity, SaliencyGuided, lambda model: Sparsity(Saliency(model))]
)
@pytest.mark.parametrize("target", [SEVERAL, SEVERAL.long()])
def test_several_labels_without_their_outputs_are_refused_also_where_no_target_is_read(make, target):
    model = smooth_net()
    loss = ExplanationRegularizedLoss(model, [make(model)], lambda output, _: output.mean())
    with pytest.raises(TypeError, match=r"target\.argmax\(dim=1\).*outputs='multilabel'"):
        loss((X, target, torch.ones(5, 6).double() * torch.arange(6).gt(2)))


def test_multilabel_metrics_take_one_label_per_example():
    with pytest.raises(TypeError, match=r"one label per example.*\(5, 3\).*index of that label"):
        insertion_deletion(smooth_net(), X, X, target=SEVERAL, outputs="multilabel")


def test_metrics_explain_the_largest_class_of_soft_labels():
    model, soft = smooth_net(), torch.randn(5, 3).softmax(1)
    ours = insertion_deletion(model, X, X, target=soft)
    torch.testing.assert_close(ours.insertion, insertion_deletion(model, X, X, target=soft.argmax(1)).insertion)
    for target in (SEVERAL, SEVERAL.long()):
        with pytest.raises(TypeError, match=r"target\.argmax\(dim=1\).*outputs='multilabel'"):
            insertion_deletion(model, X, X, target=target)


def test_multilabel_outputs_that_look_like_probabilities_are_warned_of():
    probabilities = nn.Sequential(smooth_net(), nn.Sigmoid())
    with pytest.warns(UserWarning, match="look like probabilities, but outputs='multilabel'"):
        insertion_deletion(probabilities, X.repeat(2, 1), X.repeat(2, 1), target=1, outputs="multilabel")


# --- transformed targets, columns, scores ----------------------------------------------------------------------------


def test_target_transform_chooses_the_column_of_a_regression():
    model, target = smooth_net(), torch.randn(5, 3, dtype=torch.float64)
    settings = {**SETTINGS, "outputs": "raw", "temperature": None}
    ours = InsertionDeletion(InputXGradient(model), target_transform=lambda _: 1, **settings)
    column = nn.Sequential(model, Column(1))
    theirs = InsertionDeletion(InputXGradient(column), **settings)
    torch.testing.assert_close(in_order(ours(X, target)), in_order(theirs(X, target[:, 1])))
    torch.testing.assert_close(ours.scores(X, target).insertion, theirs.scores(X).insertion)
    with pytest.raises(ValueError, match="target is missing"):
        InsertionDeletion(InputXGradient(model), **settings)(X, target)


class Column(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, output):
        return output[:, self.index]


def test_target_transform_reads_labels_of_another_form():
    model, names = smooth_net(), ["b", "a", "c", "a", "b"]
    regularizer = Sparsity(
        InputXGradient(model), target_transform=lambda names: torch.tensor([*map("abc".index, names)])
    )
    expected = Sparsity(InputXGradient(model))(X, torch.tensor([1, 0, 2, 0, 1]))
    torch.testing.assert_close(regularizer(X, names), expected)


class Segmenter(nn.Module):
    """Logits of two classes for each pixel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1)).double()

    def forward(self, x):
        return self.net(x)


IMAGES = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PIXELS = torch.randint(2, (3, 4, 4), generator=torch.Generator().manual_seed(3))


def score_of_pixels(output, target):
    """The mean log probability of the right classes."""
    return output.log_softmax(1).gather(1, target[:, None]).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_function_as_outputs_scores_each_row_with_its_target(chunk):
    model, maps = Segmenter(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    ours = insertion_deletion(
        model, IMAGES, maps, target=PIXELS, outputs=score_of_pixels, step_size=4, max_examples_per_batch=chunk
    )
    for row in range(3):

        def alone(x, row=row):
            return score_of_pixels(model(x), PIXELS[[row]].expand(len(x), -1, -1))

        single = insertion_deletion(alone, IMAGES[[row]], maps[[row]], outputs="raw", step_size=4)
        torch.testing.assert_close(ours.insertion[row], single.insertion[0])
        torch.testing.assert_close(ours.deletion[row], single.deletion[0])


@pytest.mark.parametrize("names", [lambda target: target, lambda target: {"pixels": target}])
def test_insertion_deletion_with_a_function_as_outputs_has_its_true_gradient(names):
    model = Segmenter()

    def total(x):
        return model(x).square().mean(dim=(1, 2, 3))

    def score(output, target):
        return score_of_pixels(output, target["pixels"] if isinstance(target, dict) else target)

    settings = {**SETTINGS, "step_size": 4, "temperature": None}
    regularizer = InsertionDeletion(InputXGradient(total), forward_func=model, model=model, outputs=score, **settings)
    assert_trainable(lambda: tuple(regularizer(IMAGES, names(PIXELS)).values()), model)
    loss = ExplanationRegularizedLoss(model, [regularizer], lambda output, target: -score(output, target).mean())
    total_loss, parts = loss((IMAGES, names(PIXELS)))
    torch.testing.assert_close(total_loss.detach(), sum(parts.values()))


def test_trainer_judges_with_a_function_as_outputs():
    model = Segmenter()
    judge = InsertionDeletion(
        Saliency(lambda x: model(x).mean(dim=(1, 2, 3))),
        model=model,
        forward_func=model,
        baselines=0.0,
        outputs=score_of_pixels,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(
        model, optimizer, loss_fn=nn.CrossEntropyLoss(), evaluation=judge, show_progress=False
    )
    loader = DataLoader(TensorDataset(IMAGES, PIXELS), batch_size=2)
    scores = trainer.evaluate(loader)
    assert set(scores) == {"loss", "insertion", "deletion", "valscore"}
    assert scores["insertion"] == pytest.approx(float(judge.scores(IMAGES, PIXELS).insertion.mean()))


@pytest.mark.parametrize(
    ("score", "given"),
    [(lambda o, t: o.sum(), r"shape \(\)"), (lambda o, t: o, r"shape \(.*3\)"), (lambda o, t: 1.0, "float")],
)
def test_a_function_as_outputs_must_return_one_score_per_row(score, given):
    with pytest.raises(ValueError, match=rf"one score per row; given: {given}"):
        insertion_deletion(smooth_net(), X, X, outputs=score)


def test_a_function_as_outputs_is_refused_where_probabilities_are_needed():
    model, score = smooth_net(), lambda output, target: output.sum(1)
    with pytest.raises(ValueError, match="pass explainer="):
        RightForTheRightReasons(model, outputs=score)
    with pytest.raises(ValueError, match="raw outputs have none"):
        SaliencyGuided(model, outputs=score)
    with pytest.raises(ValueError, match="no predicted class"):
        InsertionDeletion(Saliency(model), baselines=0.0, outputs=score).predicted_class(X)


def test_lime_explains_each_of_several_labels():
    model = smooth_net()
    regularizer = InsertionDeletion(
        Lime(model, Ridge(0.1)), outputs="multilabel", attribute_kwargs={"n_samples": 50}, **SETTINGS
    )
    terms = regularizer(X, SEVERAL)
    sum(terms.values()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
