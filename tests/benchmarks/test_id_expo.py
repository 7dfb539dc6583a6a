"""The experiments on ID-ExpO, reduced: small real data, short runs, the arithmetic of the reports by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.id_expo import ablations, tables
from benchmarks.id_expo.experiment import (
    DOES_NOT_RISE,
    ETAS,
    KEEPS_ACCURACY,
    RISES,
    BestScore,
    InTurn,
    Judge,
    Results,
    by_rule,
    difference_table,
    fine_tune,
    gain,
    quiet,
    valscore,
    value,
    verdicts,
)
from benchmarks.id_expo.significance import holm, paired_p_value
from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.regularizers import RandomMasking

# The networks of these tests are hardly trained: Grad-CAM's ReLU leaves some of their maps empty, and large weights
# undo what they know.
pytestmark = [pytest.mark.filterwarnings(f"ignore:The {start}") for start in ("attribution of", "task loss was")]


@pytest.fixture(autouse=True)
def _one_thread():
    """As the scripts run."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def split():
    x, y = load_wine(return_X_y=True)
    return tables.Split.of_seed(torch.tensor(x, dtype=torch.float32), torch.tensor(y), 0)


@pytest.fixture(scope="module")
def digits():
    """A part of the digits, and a network that knows them."""
    sizes = {"train": 640, "val": 60, "test": 60}
    split = ablations.Split.of_seed(0)
    split = split._replace(**{part: TensorDataset(*getattr(split, part)[:n]) for part, n in sizes.items()})
    return split, ablations.pretrain(split, 0)


@pytest.fixture(scope="module")
def network(split):
    return tables.pretrain(split, 3, 0)


def test_results_survive_a_kill(tmp_path):
    path = tmp_path / "runs.jsonl"
    Results(path).add({"seed": 0})
    with path.open("a") as file:
        file.write('{"seed": 1, "sco')
    results = Results(path)
    assert results.has(seed=0)
    assert not results.has(seed=1)
    results.add({"seed": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"seed": 0}, {"seed": 1}]


def test_judge_averages_its_curves_up_to_each_fraction(split, network):
    x, y = split.test.tensors
    regularizer = tables.make_insertion_deletion(network, "LIME", n_samples=40)
    judge = Judge(lambda model: tables.make_insertion_deletion(model, "LIME", n_samples=40), (0.3, 0.5))
    found = judge.scores(network, split.test, 4)
    with torch.no_grad():
        scores = regularizer.scores(x, network(x).argmax(dim=1))
        right = network(x).argmax(dim=1) == y
    torch.testing.assert_close(found[0.5]["insertion"], scores.insertion)
    torch.testing.assert_close(found[0.3]["insertion"], scores.insertion_curve[:, :3].mean(dim=1))  # of 13 columns
    torch.testing.assert_close(found[0.5]["one_minus_deletion"], 1 - scores.deletion)
    torch.testing.assert_close(found[0.5]["accuracy"], right.double())


def test_fine_tune_keeps_the_best_epoch_of_each_eta(split, network):
    scores = iter([(0.9, 0.1), (0.5, 0.9), (0.7, 0.6)])  # accuracy and insertion before, after 2 and after 4 epochs

    class Scripted:
        def scores(self, model, data):
            accuracy, insertion = next(scores)
            rows = {"accuracy": accuracy, "insertion": insertion, "one_minus_deletion": 0.0}
            return {0.5: {name: torch.tensor([value]) for name, value in rows.items()}}

    best, _ = fine_tune(
        network,
        [],
        split.train,
        {"scripted": (Scripted(), split.val)},
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        epochs=4,
        batch_size=64,
        seed=0,
    )
    expected = {
        eta: max((0, 2, 4), key=lambda epoch, eta=eta: eta * (0.9, 0.5, 0.7)[epoch // 2] + (0.1, 0.9, 0.6)[epoch // 2])
        for eta in ETAS
    }
    assert {eta: best["scripted", 0.5, eta].epoch for eta in ETAS} == expected
    assert set(expected.values()) == {0, 2, 4}
    assert valscore({"accuracy": 0.5, "insertion": 0.25, "one_minus_deletion": 0.75}, 2.0) == 2.0


def test_in_turn_calls_each_member_and_knows_all_generators(split, network):
    x, y = (tensor[:8] for tensor in split.train.tensors)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    members = [
        RandomMasking(network, baselines=0.0, weight=w, generator=g)
        for w, g in zip((0.0, 1.0), generators[1:], strict=True)
    ]
    regularizer = InTurn(members, generators[0])
    assert regularizer.generators == generators
    values = [regularizer(x, y)["random_masking"].item() for _ in range(20)]
    assert 3 < sum(value == 0 for value in values) < 17


def test_best_score_keeps_the_weights_of_the_best_row():
    class Trainer:
        model = nn.Linear(1, 1)

    best = BestScore()
    for epoch, score in enumerate((0.5, 0.9, 0.7), 1):
        nn.init.constant_(Trainer.model.weight, epoch)
        best(Trainer, {"epoch": epoch, "valscore": score})
    assert best.epoch == 2
    assert best.weights["weight"].item() == 2


def test_by_rule_names_the_epoch_whose_weights_the_trainer_keeps(split, network):
    model, best, weights = copy.deepcopy(network), BestScore(), {0: copy.deepcopy(network.state_dict())}
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        [tables.make_insertion_deletion(model, "LIME", n_samples=30, insertion_weight=1.0, deletion_weight=1.0)],
        max_accuracy_drop=0.0,
        callbacks=[lambda t, row: weights.update({row["epoch"]: copy.deepcopy(t.model.state_dict())})],
        show_progress=False,
    )
    with quiet():
        history = trainer.fit(DataLoader(split.train, 32), DataLoader(split.val, 50), epochs=4)
    best.epoch, best.weights = 9, {name: value + 1 for name, value in weights[0].items()}
    chosen = by_rule(history, best, model)
    assert chosen["score"] == (9, best.weights)
    epoch, state = chosen["limit"]
    assert all(torch.equal(state[name], weights[epoch][name]) for name in state)
    none = by_rule([{**row, "eligible": 0.0} for row in history], best, network)
    assert none["limit"][0] == 0


# --- statistics ----------------------------------------------------------------------------------------------------


def test_paired_p_value_is_that_of_scipy_and_grows_with_the_overlap():
    a, b = [0.9, 0.8, 0.85, 0.95], [0.7, 0.75, 0.8, 0.85]
    assert paired_p_value(a, b) == pytest.approx(ttest_rel(a, b, alternative="greater").pvalue)
    # Nadeau and Bengio: t x sqrt(1/n / (1/n + overlap))
    t = ttest_rel(a, b).statistic * (0.25 / (0.25 + 0.3)) ** 0.5
    assert paired_p_value(a, b, overlap=0.3) == pytest.approx(student.sf(t, 3))
    assert paired_p_value([1.0, 1.0], [0.0, 0.0]) == 0
    assert paired_p_value([1.0, 1.0], [1.0, 1.0]) == 1
    with pytest.raises(ValueError, match="two splits or more"):
        paired_p_value([1.0], [0.0])


def test_holm_stops_at_the_first_p_value_above_its_level():
    # .05/4 = .0125, .05/3 = .0167, .05/2 = .025
    assert holm([0.02, 0.001, 0.06, 0.015]) == [True, True, False, True]
    assert holm([0.02, 0.001, 0.03, 0.017]) == [False, True, False, False]
    assert holm([0.04, 0.02]) == [True, True]


def test_difference_table_pairs_units_and_keeps_means_of_the_reference():
    names = ("insertion_gain, LIME, mean", "deletion_gain, LIME, mean")
    arms = {
        "plain": [{names[0]: 0.1, names[1]: 0.3}, {names[0]: 0.3, names[1]: 0.5}],
        "trained": [{names[0]: 0.2, names[1]: 0.4}, {names[0]: 0.4, names[1]: 0.6}],
    }
    lines = difference_table(arms, "plain", {"gain": gain("LIME, mean"), "insertion": value(names[0])}).splitlines()
    assert lines[2] == "| plain | 0.300 ± 0.100 | 0.200 ± 0.100 |"
    assert lines[3] == "| trained | +0.100 ± 0.000 | +0.100 ± 0.000 |"


def test_verdicts_ask_for_two_standard_errors():
    plain = [{"gain": 0.0, "loss": 0.0, "noisy": 0.0, "accuracy": 0.9} for _ in range(3)]
    values = ((0.1, -0.5, 0.895), (0.11, 0.5, 0.889), (0.12, 0.1, 0.88))
    arm = [{"gain": gain, "loss": gain, "noisy": noisy, "accuracy": accuracy} for gain, noisy, accuracy in values]
    asked = {"gain": RISES, "noisy": RISES, "loss": DOES_NOT_RISE, "accuracy": KEEPS_ACCURACY}

    def answers(rows):
        return [line.split("|")[-2].strip() for line in verdicts(rows, plain[: len(rows)], asked).splitlines()[2:]]

    assert answers(arm) == ["yes", "no", "no", "no"]
    assert answers([row | {"accuracy": row["accuracy"] + 0.005} for row in arm])[-1] == "yes"
    assert answers(arm[:1]) == ["", "", "", ""]  # one unit has no standard error


# --- ablations -----------------------------------------------------------------------------------------------------


def test_ablations_constant_variant_changes_the_gradient_not_the_value(digits):
    """The variants' losses: constants change the gradient and not the value, noise has no explanation."""
    split, model = digits
    x, y = (tensor[:8] for tensor in split.train.tensors)
    gradients, values = {}, {}
    for name in ("id_expo", "constant", "hard"):
        variant = ablations.VARIANTS[name]
        regularizer = ablations.InsertionDeletion(
            variant.explainer(model, model[5]), baselines=0.0, step_size=4, steps_per_update=None,
            attribute_kwargs={"relu_attributions": True}, **{"deletion_form": "ratio", **variant.settings},
        )  # fmt: skip
        model.zero_grad()
        loss = sum(regularizer(x, y).values())
        loss.backward()
        values[name] = loss.item()
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert values["constant"] == pytest.approx(values["id_expo"], rel=1e-5)
    cosine = torch.cosine_similarity(gradients["constant"], gradients["id_expo"], dim=0)
    assert 0.1 < cosine < 0.99
    noise = ablations.RandomMap(model, model[5]).attribute(x, target=y)
    assert noise.shape == (8, 1, 8, 8)


def test_ablations_one_temperature_is_that_of_the_batch():
    values = torch.tensor([[1.0, 2.0, 4.0], [10.0, 10.0, 12.0]])
    soft = ablations.OneTemperature(values)
    slope = 4 / 11  # five distinct values between 1 and 12
    expected = torch.sigmoid(slope * (values - torch.tensor([[3.0], [11.0]])))
    torch.testing.assert_close(soft(soft.thresholds(torch.tensor([[1, 1]])))[0], expected)


def test_ablations_train_with_batch_norm_frozen_or_updated(digits, monkeypatch):
    monkeypatch.setattr(ablations, "EPOCHS", 1)
    split, plain = digits
    networks = {False: plain, True: ablations.with_batch_norm(plain, split, 0)}
    rows = {name: ablations.measure(ablations.VARIANTS[name], networks, split, 0) for name in ("plain", "bn_updated")}
    for row in rows.values():
        assert 0.8 < row["accuracy"] <= 1
        assert 0 < row["masked accuracy"] < row["accuracy"]
