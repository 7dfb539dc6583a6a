"""The experiment on tables, reduced: half of scikit-learn's wine, two splits, short runs of large steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from sklearn.datasets import load_wine
from torch.utils.data import DataLoader

from benchmarks.id_expo import tables
from benchmarks.id_expo.experiment import FACTORS, RULES, Results, multiplied, surer
from benchmarks.id_expo.tables import Arm
from captum_idexpo import ExplanationRegularizedTrainer

SURER = Arm("CE-only, surer", passes=12)
ARMS = [
    Arm("CE-only", passes=12),
    Arm("ID-ExpO", 0.1, "ratio", passes=12),
    Arm("ID-ExpO", 0.1, "complement", passes=12),
    Arm("in turn", 0.1, "complement", passes=12),
    Arm("masks alone", 1.0, passes=12),
    Arm("ExpO-S", 0.3, passes=12),
    Arm("ExpO-F", 0.3, passes=12),
    Arm("CE-only", explainer="KernelSHAP", passes=12),
    Arm("ID-ExpO", 0.1, "complement", "KernelSHAP", passes=12),
    SURER,
]


@pytest.fixture(scope="module", autouse=True)
def small():
    x, y = (values[::2] for values in load_wine(return_X_y=True))
    patched = pytest.MonkeyPatch()
    patched.setattr(tables, "load", lambda name, root: (torch.tensor(x, dtype=torch.float32), torch.tensor(y)))
    for name, value in {
        "N_SPLITS": 2,
        "N_EPOCHS": 3,
        "LEARNING_RATE": 0.1,
        "ARMS": ARMS,
        "SURER": SURER,
        "RECIPE_ARM": ARMS[3],
        "JUDGED_SAMPLES": 40,
    }.items():
        patched.setattr(tables, name, value)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script runs
    yield
    torch.set_num_threads(n_threads)
    patched.undo()


def test_a_reduced_run(tmp_path):
    """Check one run in several ways, because the run takes the time."""
    tables.run(["collins"], None, tmp_path)
    check_that_it_is_complete_and_not_repeated(tmp_path)
    check_that_id_expo_gains_more_than_its_rivals(tables.read(tmp_path)["collins"])
    check_that_every_row_has_the_judges_of_the_report(tables.read(tmp_path)["collins"])
    check_that_the_surer_network_decides_as_the_plain_one(tables.read(tmp_path)["collins"])
    check_that_the_report_has_each_arm(tmp_path)


def check_that_it_is_complete_and_not_repeated(folder):
    path = folder / "tables_collins.jsonl"
    written = path.read_text()
    assert len(Results(path).rows) == 2 * len(ARMS)
    tables.run(["collins"], None, folder)
    assert path.read_text() == written


def check_that_id_expo_gains_more_than_its_rivals(found):
    def mean(arm):
        return sum(tables.COLUMNS["LIME"](row["score"]) for row in found[tables.title(arm)]) / 2

    rivals = [ARMS[i] for i in (0, 5, 6)]
    assert min(mean(ARMS[1]), mean(ARMS[2])) > max(map(mean, rivals))


def check_that_every_row_has_the_judges_of_the_report(found):
    for rows in found.values():
        for row in rows:
            for rule in RULES:
                assert set(tables.RECIPE) <= set(row[rule])
                assert all(math.isfinite(column(row[rule])) for column in tables.COLUMNS.values())


def check_that_the_surer_network_decides_as_the_plain_one(found):
    for plain, sure in zip(found["CE-only"], found["CE-only, surer"], strict=True):
        assert sure["limit"]["accuracy"] == plain["limit"]["accuracy"]
        assert sure["score"]["epoch"] == plain["score"]["epoch"]
        assert sure["score"]["insertion, LIME, mean"] != plain["score"]["insertion, LIME, mean"]


def check_that_the_report_has_each_arm(folder):
    text = tables.report(folder)
    assert text.startswith("Sets: 1, splits of each: 2.")
    for arm in ARMS:
        assert text.count(f"| {tables.title(arm)} |") == (2 if arm.explainer == "LIME" else 1)
    assert "| ratio | insertion | " in text
    assert " of 1 |" in text  # one set
    assert "#### collins" in tables.each_set(folder)


@pytest.fixture
def split():
    return tables.Split.of_seed(*tables.load("wine", None), 0)


def test_arms_have_the_terms_that_they_are_named_after(split):
    model = tables.pretrain(split, 3, 0)
    for arm in ARMS:
        made = tables.make_regularizers(arm, model, 0)
        if arm.method == "in turn":
            (in_turn,) = made
            assert [type(member.explainer).__name__ for member in in_turn.members] == ["Lime", "IntegratedGradients"]
            made = in_turn.members
            x = split.train.tensors[0]
            assert all(0.3 < float((m.baselines(x) == 0).all(dim=1).float().mean()) < 0.7 for m in made)
        kinds = {"masks alone": ["RandomMasking"], "ExpO-S": ["Stability"], "ExpO-F": ["Fidelity"]}
        others = [] if arm.method.startswith("CE-only") else ["InsertionDeletion"] * len(made)
        expected = kinds.get(arm.method, others)
        assert [type(each).__name__ for each in made] == expected
        for each in made:
            if arm.form:
                assert each.deletion_form == arm.form
                assert each.insertion_weight == each.deletion_weight == arm.weight
            if arm.method == "ID-ExpO":
                assert type(each.explainer).__name__.lower() == arm.explainer.lower()
                assert each.baselines == 0
            if arm.method.startswith("ExpO"):
                assert each.ratio == arm.weight


def test_the_surer_network_has_the_factor_with_the_best_validation_score(split):
    model, validation = tables.pretrain(split, 3, 0), DataLoader(split.val, 500)
    judge = tables.make_insertion_deletion(model, "LIME")
    trainer = ExplanationRegularizedTrainer(model, tables.make_optimizer(model), evaluation=judge, show_progress=False)
    weights = copy.deepcopy(model.state_dict())

    def score(candidate):
        model.load_state_dict(candidate)
        return trainer.evaluate(validation)["valscore"]

    scores = [score(multiplied(weights, factor, "4")) for factor in FACTORS]
    assert len(set(scores)) > 1
    chosen = surer(trainer, {"score": (3, weights)}, validation, layer="4")
    assert chosen["score"][0] == 3
    assert score(chosen["score"][1]) == max(scores)


def test_judge_sees_the_test_rows(split):
    model = tables.pretrain(split, 3, 0)
    x, y = split.test.tensors
    with torch.no_grad():
        right = (model(x).argmax(dim=1) == y).double().mean()
        swapped = split._replace(test=torch.utils.data.TensorDataset(x, (y + 1) % 3))
    assert tables.judge(model, split)["accuracy"] == pytest.approx(float(right), abs=1e-5)
    assert tables.judge(model, swapped)["accuracy"] < 0.5


def test_leak_lays_explanations_on_rows_of_another_class(split, monkeypatch):
    model, calls, measure = tables.pretrain(split, 3, 0), [], tables.insertion_deletion

    def noted(forward_func, inputs, attributions, *, target, **settings):
        calls.append((forward_func(inputs).argmax(dim=1), target))
        found = measure(forward_func, inputs, attributions, target=target, **settings)
        calls[-1] += (float(found.insertion_gain.mean()),)
        return found

    monkeypatch.setattr(tables, "insertion_deletion", noted)
    with torch.no_grad():
        row = tables.of_explanation(model, split, "LIME")
    ((given, explained, gain),) = calls
    assert len(explained) == len(split.test)
    assert (given != explained).all()
    assert row["leak, LIME"] == gain


def test_a_lower_deletion_is_better():
    def rows(*values):
        return [{"score": {"deletion, LIME, mean": value}} for value in values]

    arms = {tables.title(arm): rows(0.5, 0.6) for arm in ARMS}
    arms[tables.title(Arm("ID-ExpO", 0.1, "ratio"))] = rows(0.1, 0.16)
    assert tables.largest_p_value(arms, "ratio", "deletion", 0.0) < 0.05


def test_the_hardest_rival_decides_a_test():
    def rows(*values):
        return [{"score": {"insertion, LIME, mean": value}} for value in values]

    found = {
        tables.title(Arm("ID-ExpO", 0.1, "ratio")): rows(0.9, 0.95),
        "CE-only": rows(0.1, 0.16),
        "CE-only, surer": rows(0.8, 0.83),
        tables.title(ARMS[5]): rows(0.5, 0.6),
        tables.title(ARMS[6]): rows(0.2, 0.26),
    }
    p_value = tables.largest_p_value(found, "ratio", "insertion", 0.0)
    assert p_value == pytest.approx(tables.paired_p_value([0.9, 0.95], [0.5, 0.6]))
    p_value = tables.largest_p_value(found, "ratio", "insertion", 0.0, (*tables.RIVALS, "CE-only, surer"))
    assert p_value == pytest.approx(tables.paired_p_value([0.9, 0.95], [0.8, 0.83]))


def test_the_picture_has_the_differences_of_each_rule_with_errors_over_the_sets():
    def rows(accuracy, insertion_gain):
        judged = {"insertion_gain, LIME, mean": insertion_gain, "deletion_gain, LIME, mean": 0.1}
        return [{rule: judged | {"accuracy": accuracy * (1 + (rule == "score"))} for rule in tables.HEADS}]

    arms = [arm for arm in ARMS if arm.explainer == "LIME"]
    found = {name: {tables.title(arm): rows(0.5, 0.2) for arm in arms} for name in ("one", "two")}
    for name, accuracy in (("one", 0.4), ("two", 0.44)):
        found[name][tables.title(ARMS[1])] = rows(accuracy, 0.4)
    point = tables.differences(found, ARMS[1], "limit")
    assert point == pytest.approx({"accuracy": -0.08, "accuracy error": 0.02, "LIME": 0.1, "LIME error": 0.0})
    figure = tables.plot(found)
    assert [axis.get_title() for axis in figure.axes] == list(tables.HEADS.values())
    for axis, change in zip(figure.axes, (-0.08, -0.16), strict=True):
        names = [text.get_text() for text in axis.get_legend().get_texts()]
        assert names == [", ".join(filter(None, (arm.method, arm.form))) for arm in arms[1:]]
        assert any(line.get_xydata().tolist() == [[pytest.approx(change), pytest.approx(0.1)]] for line in axis.lines)


def test_conditions_are_counted_by_rule_against_the_plain_and_the_surer_network():
    def rows(**gains):
        judges = {rule: dict.fromkeys(tables.RECIPE, gain) | {"accuracy": 0.9} for rule, gain in gains.items()}
        for found in judges.values():
            found |= {judge: 0.2 for judge in tables.RECIPE if judge.startswith("infidelity")}
        return [judges]

    arms = {tables.title(arm): rows(limit=0.2, score=0.4) for arm in (ARMS[3], *tables.COMPLEMENT_AND_RATIO)}
    found = arms | {"CE-only": rows(limit=0.2, score=0.1), "CE-only, surer": rows(limit=0.1, score=0.4)}
    lines = tables.conditions({"one": found, "two": found}).splitlines()[2:]
    # Only the six gains can fail: accuracy and infidelity are the same for all.
    within, alone = ("4 of 10", "10 of 10 |"), ("10 of 10", "4 of 10 |")
    assert [tuple(line.split(" | ")[2:]) for line in lines] == [within, alone] * 3


def test_leak_is_zero_where_every_row_has_the_same_class(split):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 3))
    with torch.no_grad():
        model[0].bias += torch.tensor([100.0, 0.0, 0.0])
        assert tables.of_explanation(model, split, "LIME")["leak, LIME"] == 0
