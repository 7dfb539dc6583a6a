"""Side inputs: what a model takes after the inputs goes with each example, is explained by none and masked by none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from captum_idexpo import Batch, ExplanationRegularizedLoss, ExplanationRegularizedTrainer, InsertionDeletion
from captum_idexpo.attr import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    Lime,
    NoiseTunnel,
    Saliency,
)
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import (
    Fidelity,
    MaskedNeighbors,
    Penalty,
    RightForTheRightReasons,
    SaliencyGuided,
    Smoothness,
    Sparsity,
    Stability,
)
from captum_idexpo.testing import assert_trainable

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK = (torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.3).double()
AGE = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y = torch.tensor([0, 1, 2, 1])
A = torch.zeros(4, 6).double()
A[:, :3] = 1
SETTINGS = {"baselines": 0.2, "insertion_weight": 1.0, "deletion_weight": 1.0, "temperature": None}


class Patients(nn.Module):
    """Takes the inputs, then a mask, the age of each patient, and how strongly it counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(9, 3).double()

    def forward(self, x, mask, age, strength=1.0):
        hidden = self.first(x * mask).tanh()
        return self.last(torch.cat([hidden, strength * age[:, None]], dim=1))


class Bound(nn.Module):
    """The same model of one example, whose side inputs are constants."""

    def __init__(self, model, row):
        super().__init__()
        self.model, self.row = model, row

    def forward(self, x):
        n = len(x)
        return self.model(x, MASK[self.row].expand(n, -1), AGE[self.row].expand(n), 0.5)


SIDE = (MASK, AGE, 0.5)
MAKE = {
    "RRR": RightForTheRightReasons,
    "RRR of LIME": lambda model: RightForTheRightReasons(
        model, explainer=Lime(model, Ridge(0.1)), attribute_kwargs={"n_samples": 30}
    ),
    "smoothness": lambda model: Smoothness(IntegratedGradients(model), attribute_kwargs={"n_steps": 10}),
    "ID-ExpO of gradients": lambda model: InsertionDeletion(InputXGradient(model), **SETTINGS),
    "ID-ExpO of KernelSHAP": lambda model: InsertionDeletion(
        KernelShap(model), attribute_kwargs={"n_samples": 64, "sampling": "independent"}, **SETTINGS
    ),
    "fidelity": lambda model: Fidelity(model, MaskedNeighbors(), n_neighbors=40),
    "stability": Stability,
    "saliency-guided": lambda model: SaliencyGuided(model, value_range=(0.0, 0.0)),
}
# They explain logits, or compare them with each other, and the age adds the same number to the logits of all copies.
BLIND_TO_AGE = ("RRR of LIME", "smoothness", "stability")
DETERMINISTIC = ("RRR", "smoothness", "ID-ExpO of gradients", "ID-ExpO of KernelSHAP", "saliency-guided")


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_side_inputs_equal_a_closure_over_them(name):
    model = Patients()
    (ours,) = [sum(MAKE[name](model)(X, Y, A, additional_forward_args=SIDE).values())]
    alone = [sum(MAKE[name](Bound(model, row))(X[[row]], Y[[row]], A[[row]]).values()) for row in range(4)]
    torch.testing.assert_close(ours, torch.stack(alone).mean())


@pytest.mark.parametrize("name", MAKE)
def test_side_inputs_leave_the_gradient_true(name):
    model = Patients()
    regularizer = MAKE[name](model)
    assert_trainable(lambda: tuple(regularizer(X, Y, A, additional_forward_args=SIDE).values()), model, n_directions=1)


def test_side_inputs_move_the_result_in_every_regularizer():
    model = Patients()
    for name, make in MAKE.items():
        values = []
        for side in (SIDE, (MASK.flip(0), AGE, 0.5), (MASK, -AGE, 0.5), (MASK, AGE, 2.0)):
            torch.manual_seed(0)
            values.append(sum(make(model)(X, Y, A, additional_forward_args=side).values()).item())
        unmoved = [value == pytest.approx(values[0], rel=1e-9) for value in values]
        assert unmoved == [True, False, *[name in BLIND_TO_AGE] * 2], name


@pytest.mark.parametrize(
    ("explainer", "arguments"),
    [
        (lambda model: NoiseTunnel(Saliency(model)), {"nt_samples": 3}),
        (GradientShap, {"baselines": X[:2], "n_samples": 3}),
        (lambda model: LayerGradCam(model, model.first), {}),
    ],
)
def test_side_inputs_reach_explainers_that_repeat_the_batch_themselves(explainer, arguments):
    model = Patients()
    regularizer = Sparsity(explainer(model), attribute_kwargs=arguments) if arguments else None
    if regularizer is None:  # a layer of 8 cells has no place in 6 columns: its attribution alone
        assert explainer(model).attribute(X, target=Y, additional_forward_args=SIDE).shape[0] == 4
    else:
        regularizer(X, Y, additional_forward_args=SIDE)["sparsity"].backward()
        assert model.first.weight.grad.isfinite().all()


def test_side_inputs_travel_from_the_loader_to_every_regularizer():
    model = Patients()
    regularizers = [make(model) for make in MAKE.values()]
    batch = Batch(X, Y, A, SIDE)
    loss = ExplanationRegularizedLoss(model, regularizers)
    total, parts = loss(batch)
    torch.testing.assert_close(parts["task"], cross_entropy(model(X, *SIDE), Y).detach())
    assert len(parts) == 11
    total.backward()
    as_mapping = dict(zip(Batch._fields, batch, strict=True))
    torch.testing.assert_close(loss(as_mapping)[1]["right_reasons"], parts["right_reasons"])


def loader(n_batches=2):
    for number in range(n_batches):
        rows = slice(2 * number, 2 * number + 2)
        yield {"x": X[rows], "mask": MASK[rows], "age": AGE[rows], "diagnosis": Y[rows]}


def unpack(batch):
    return Batch(batch["x"], batch["diagnosis"], None, (batch["mask"], batch["age"]))


def trainer_of(model, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = InsertionDeletion(InputXGradient(model), baselines="mean")
    return ExplanationRegularizedTrainer(
        model, optimizer, [regularizer, Sparsity(Saliency(model), weight="auto")], show_progress=False, **settings
    )


def test_trainer_unpacks_batches_for_training_selection_and_evaluation(tmp_path):
    model = Patients()
    trainer = trainer_of(model, unpack=unpack, checkpoint_dir=tmp_path, gradient_norms_every=1)
    history = trainer.fit([*loader()], [*loader()], epochs=2)
    assert {"sparsity", "val_insertion", "sparsity_weight", "task_gradient_norm"} <= set(history[-1])
    scores = trainer.evaluate([*loader()])
    predicted = model(X, MASK, AGE).argmax(1)
    assert scores["accuracy"] == pytest.approx(float((predicted == Y).double().mean()))
    torch.testing.assert_close(trainer.regularizers[0].baselines, X.mean(0, keepdim=True))
    ours = trainer.evaluation.scores(X, additional_forward_args=(MASK, AGE))
    torch.testing.assert_close(trainer.example_scores([*loader()])["insertion"], ours.insertion)
    resumed = trainer_of(Patients(), unpack=unpack, checkpoint_dir=tmp_path)
    resumed.resume()
    assert len(resumed.fit([*loader()], [*loader()], epochs=3)) == 3


def test_trainer_without_unpack_refuses_a_mapping_of_other_names():
    with pytest.raises(TypeError, match=r"a mapping of x, mask, age, diagnosis.*unpack="):
        trainer_of(Patients()).fit([*loader()])


def test_one_of_several_inputs_is_explained_while_the_others_pass_through():
    """An image is explained, a table goes along: no baselines for it, no attribution of it."""
    torch.manual_seed(0)
    model = Patients()
    regularizer = InsertionDeletion(InputXGradient(model), **SETTINGS)
    (map,) = regularizer.attribution(X, Y, additional_forward_args=(MASK, AGE))
    assert map.shape == X.shape
    scores = regularizer.scores(X, Y, additional_forward_args=(MASK, AGE))
    assert scores.insertion.shape == (4,)


def test_side_inputs_are_given_once():
    model = Patients()
    constant = {"additional_forward_args": (MASK[:1], AGE[:1])}
    regularizer = InsertionDeletion(InputXGradient(model), attribute_kwargs=constant, **SETTINGS)
    with pytest.raises(ValueError, match="with the batch and in attribute_kwargs"):
        regularizer(X, Y, additional_forward_args=(MASK, AGE))
    assert regularizer(X[:1], Y[:1])["insertion"].isfinite()


@pytest.mark.parametrize("name", MAKE)
def test_side_inputs_of_another_length_are_refused(name):
    with pytest.raises(ValueError, match=r"additional_forward_args\[0\] of shape \(1, 6\).*functools\.partial"):
        MAKE[name](Patients())(X, Y, A, additional_forward_args=(MASK[:1], AGE))


def test_side_inputs_reach_a_users_own_regularizer():
    seen = []

    class Own(Penalty):
        def penalty(self, batch):
            (maps,) = self.explain(batch)
            seen.append(batch.additional_forward_args)
            return maps.square().mean()

    model = Patients()
    own = Own("own", model, explainer=Saliency(model), weight="auto")
    loss = ExplanationRegularizedLoss(model, [own])
    total, parts = loss(Batch(X, Y, None, SIDE))
    assert all(side is SIDE for side in seen)
    assert parts["own"] > 0
    total.backward()


def test_a_plain_module_as_regularizer_gets_side_inputs_by_keyword():
    class Plain(nn.Module):
        def forward(self, inputs, target, annotations=None, additional_forward_args=None):
            return {"plain": inputs.mean() * 0 + len(additional_forward_args)}

    _, parts = ExplanationRegularizedLoss(Patients(), [Plain()])(Batch(X, Y, None, SIDE))
    assert parts["plain"] == 3


def test_a_mapping_of_inputs_beside_side_inputs_is_refused():
    with pytest.raises(TypeError, match=r"captum_idexpo\.KeywordModel"):
        ExplanationRegularizedLoss(Patients())(Batch({"x": X}, Y, None, SIDE))
