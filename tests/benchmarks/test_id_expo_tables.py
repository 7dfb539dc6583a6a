"""The experiment on tables, reduced: scikit-learn's wine, two splits, short runs."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_wine

from benchmarks.id_expo import tables
from benchmarks.id_expo.experiment import Results
from benchmarks.id_expo.tables import Arm

ARMS = [
    Arm("CE-only", passes=12),
    Arm("ID-ExpO", 0.1, "ratio", passes=12),
    Arm("ID-ExpO", 0.1, "complement", passes=12),
    Arm("in turn", 0.1, "complement", passes=12),
    Arm("masks alone", 1.0, passes=12),
    Arm("ExpO-S", 0.3, passes=12),
    Arm("ExpO-F", 0.3, passes=12),
    Arm("CE-only", explainer="KernelSHAP", passes=12),
    Arm("ID-ExpO", 0.1, "ratio", "KernelSHAP", passes=12),
    Arm("ID-ExpO", 0.1, "complement", "KernelSHAP", passes=12),
]


@pytest.fixture(scope="module", autouse=True)
def small():
    x, y = load_wine(return_X_y=True)
    patched = pytest.MonkeyPatch()
    patched.setattr(tables, "load", lambda name, root: (torch.tensor(x, dtype=torch.float32), torch.tensor(y)))
    for name, value in {
        "N_SPLITS": 2,
        "N_EPOCHS": 3,
        "ARMS": ARMS,
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
            for rule in tables.RULES:
                assert set(tables.RECIPE) <= set(row[rule])
                assert all(math.isfinite(column(row[rule])) for column in tables.COLUMNS.values())


def check_that_the_report_has_each_arm(folder):
    text = tables.report(folder)
    assert text.startswith("Sets: 1, splits of each: 2.")
    for arm in ARMS:
        assert text.count(f"| {tables.title(arm)} |") == (2 if arm.explainer == "LIME" else 1)
    assert "| ratio | insertion | " in text
    assert " of 1 |" in text  # one set
    assert "#### collins" in tables.each_set(folder)


def test_the_hardest_rival_decides_a_test():
    def rows(*values):
        return [{"score": {"insertion, LIME, mean": value}} for value in values]

    found = {
        tables.title(Arm("ID-ExpO", 0.1, "ratio")): rows(0.9, 0.95),
        "CE-only": rows(0.1, 0.16),
        tables.title(ARMS[5]): rows(0.5, 0.6),
        tables.title(ARMS[6]): rows(0.2, 0.26),
    }
    p_value = tables.largest_p_value(found, "ratio", "insertion", 0.0)
    assert p_value == pytest.approx(tables.paired_p_value([0.9, 0.95], [0.5, 0.6]))


def test_leak_is_zero_where_every_row_has_the_same_class():
    x, y = tables.load("wine", None)
    split = tables.Split.of_seed(x, y, 0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 3))
    with torch.no_grad():
        model[0].bias += torch.tensor([100.0, 0.0, 0.0])
        assert tables.of_explanation(model, split, "LIME")["leak, LIME"] == 0
