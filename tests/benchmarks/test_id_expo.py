"""The experiments on ID-ExpO, reduced: small real data, short runs, the arithmetic of the reports by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.id_expo import ablations, images, judges, tabular
from benchmarks.id_expo.experiment import ETAS, Judge, Results, fine_tune, valscore

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
    return tabular.Split.of_seed(torch.tensor(x, dtype=torch.float32), torch.tensor(y), 0)


@pytest.fixture(scope="module")
def network(split):
    return tabular.pretrain(split, 3, 0)


GRID = tabular.Grid(4, (30, 30), 4, (0.3,), (0.0,), (0.3,), (0.01,))


def faithfulness(row):
    return next(
        judged["insertion"] + judged["one_minus_deletion"]
        for judged in row["judged"]
        if (judged["explainer"], judged["fraction"], judged["eta"]) == ("LIME", 0.5, 1.0)
    )


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
    regularizer = tabular.make_insertion_deletion(network, "LIME", 40, 0, fraction=0.5)
    judge = Judge(lambda model: tabular.make_insertion_deletion(model, "LIME", 40, 0, fraction=0.5), (0.3, 0.5))
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


def test_tabular_id_expo_is_more_faithful_than_its_rivals(split, network):
    rows = {
        method: tabular.measure(setting, network, split, GRID, 0)
        for method, setting in {
            "CE-only": tabular.Setting("CE-only"),
            "ExpO-S": tabular.Setting("ExpO-S", 0.3),
            "ExpO-F": tabular.Setting("ExpO-F", 0.3),
            "ID-ExpO": tabular.Setting("ID-ExpO", 0.3, explainer="LIME", fraction=0.5),
        }.items()
    }
    assert faithfulness(rows["ID-ExpO"]) > max(faithfulness(rows[m]) for m in ("CE-only", "ExpO-S", "ExpO-F"))


def test_tabular_report_marks_the_best_settings_and_averages_the_gains(tmp_path):
    noise = np.random.default_rng(0)
    for name in tabular.SETS:
        results = Results(tmp_path / f"tabular_{name}.jsonl")
        for split_, setting in ((s, setting) for s in range(tabular.N_SPLITS) for setting in tabular.settings(GRID)):
            gain = 0.2 * (setting.method == "ID-ExpO") * (name != "collins")
            scores = {"accuracy": 0.8, "insertion": 0.5 + gain, "one_minus_deletion": 0.5, "sensitivity_n": 0.5}
            judged = [
                {"explainer": explainer, "fraction": fraction, "eta": eta, "epoch": 0, "valscore": 1.0}
                | {score: value + 0.01 * noise.standard_normal() for score, value in scores.items()}
                for explainer in tabular.EXPLAINERS
                for fraction in tabular.FRACTIONS
                for eta in ETAS
                if setting.explainer in (None, explainer) and setting.fraction in (None, fraction)
            ]
            results.add({"split": split_, **setting._asdict(), "judged": judged})
    found = tabular.chosen(tmp_path)
    for name in tabular.SETS:
        assert tabular.is_best(found, (name, "LIME", 0.5, 3.0), "insertion") is (name != "collins")
    text = tabular.report(tmp_path)
    assert "20 of 24" in text.splitlines()[-1 + 8]  # five sets, two explainers, two fractions at eta = 3
    (row,) = (line for line in text.splitlines() if line.startswith("| 0.3 | +") or line.startswith("| 0.3 | -"))
    gain = float(row.split("|")[3].split("±")[0])
    assert gain == pytest.approx(0.2 * 5 / 6, abs=0.01)  # five of six sets
    assert (tmp_path / "tabular.png").stat().st_size > 10_000


# --- images --------------------------------------------------------------------------------------------------------


def load_small(_root, part, rows):
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 8 - 1
    first = 0 if part == "train" else 1000
    return TensorDataset(x[first:][rows].contiguous(), torch.tensor(y)[first:][rows])


def small_network(_root):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    x, y = load_small(None, "train", slice(0, 600)).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def task():
    counts = {"n_val": {"Grad-CAM": 20, "LIME": 20}, "n_test": {"Grad-CAM": 30, "LIME": 20}}
    train = {"n_train": 128, "epochs": 6}
    task = images.Task(
        settings=(
            images.Setting("CE-only", **train),
            images.Setting("ID-ExpO", 0.3, "Grad-CAM", **train),
            images.Setting("ID-ExpO", 0.1, "LIME", **train),
            images.Setting("ExpO-S", 0.1, **train),
            images.Setting("ExpO-F", 0.1, **train),
        ),
        explainers=images.EXPLAINERS,
        load=load_small, pretrained=small_network, layer="3", cell=2, fidelity_cell=4, step_size=4,
        n_classified=60, first_val=600, learning_rate=5e-3, n_samples=40, **counts,
    )  # fmt: skip
    images.TASKS["small"] = task
    yield task
    del images.TASKS["small"]


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    """Where a whole run has written."""
    folder = tmp_path_factory.mktemp("small")
    images.run("small", task, None, folder)
    return folder


@pytest.fixture
def run_of_images(folder):
    return Results(folder / "small.jsonl")


def test_images_run_is_complete_and_reported(task, run_of_images, folder):
    assert len(run_of_images.rows) == 6
    n_bytes = (folder / "small.jsonl").stat().st_size
    images.run("small", task, None, folder)  # nothing is missing
    assert (folder / "small.jsonl").stat().st_size == n_bytes
    text = images.report("small", task, folder)
    images.draw_examples("small", task, None, folder).savefig(folder / "small_examples.png")
    found = images.chosen(run_of_images)
    for explainer in images.EXPLAINERS:
        before, after = (found[(explainer, *images.KEPT, m)]["examples"] for m in ("before", "ID-ExpO"))
        rise = fall = 0
        for i in range(len(before["insertion"])):
            changes = [after[s][i] - before[s][i] for s in ("insertion", "one_minus_deletion")]
            rise, fall = rise + (min(changes) > 0), fall + (max(changes) < 0)
        n = len(before["insertion"])
        assert images.rising_and_falling(found, explainer, "ID-ExpO") == (rise / n, fall / n)
        assert f"{rise / n:.1%} | {fall / n:.1%}" in text
    assert found[("Grad-CAM", *images.KEPT, "ID-ExpO")]["epoch"] > 0
    for picture in ("fronts", "quadrants", "examples"):
        assert (folder / f"small_{picture}.png").stat().st_size > 10_000


def test_images_load_chosen_model_reproduces_its_scores(task, run_of_images, folder):
    model = images.load_chosen("small", "ID-ExpO", "Grad-CAM", run_of_images, None, folder)
    kept = images.chosen(run_of_images)[("Grad-CAM", *images.KEPT, "ID-ExpO")]
    again = images.test(task, images.Images(task, None), model, "Grad-CAM")
    assert [row["insertion"] for row in again if row["fraction"] == 0.5] == pytest.approx([kept["insertion"]], abs=1e-4)


@pytest.mark.filterwarnings("ignore:With half of the features masked")
def test_judges_run_scores_every_network(task, run_of_images, folder, monkeypatch):
    monkeypatch.setattr(judges, "N_IMAGES", 12)
    judges.run("small", None, folder)
    rows = Results(folder / "judges_small.jsonl").rows
    assert [row["network"] for row in rows] == ["before", *images.METHODS]
    for row in rows:
        assert {len(values) for values in row["scores"].values()} == {12}
        assert all(np.isfinite(values).all() for values in row["scores"].values())
        assert {"road, LIME", "infidelity, Grad-CAM, blur", "masked_accuracy, mean colour"} <= set(row["scores"])
    table = (folder / "judges_small.md").read_text()
    assert table.startswith("| judge | before | CE-only | ExpO-S | ExpO-F | ID-ExpO |")
    assert "| insertion, Grad-CAM, mean colour* |" in table
    assert "judges that took no part" in (folder / "judges_small.html").read_text()


# --- ablations -----------------------------------------------------------------------------------------------------


def test_ablations_constant_variant_changes_the_gradient_not_the_value():
    """The variants' losses: constants change the gradient and not the value, noise has no explanation."""
    split = ablations.Split.of_seed(0)
    model = ablations.pretrain(split, 0)
    x, y = (tensor[:8] for tensor in split.train.tensors)
    gradients, values = {}, {}
    for name in ("id_expo", "constant", "hard"):
        variant = ablations.VARIANTS[name]
        regularizer = ablations.InsertionDeletion(
            variant.explainer(model, model[5]), baselines=0.0, step_size=4, steps_per_update=None,
            attribute_kwargs={"relu_attributions": True}, **variant.settings,
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


def test_ablations_train_with_batch_norm_frozen_or_updated(monkeypatch):
    monkeypatch.setattr(ablations, "EPOCHS", 1)
    split = ablations.Split.of_seed(0)
    plain = ablations.pretrain(split, 0)
    networks = {False: plain, True: ablations.with_batch_norm(plain, split, 0)}
    rows = {name: ablations.measure(ablations.VARIANTS[name], networks, split, 0) for name in ("plain", "bn_updated")}
    for row in rows.values():
        assert 0.8 < row["accuracy"] <= 1
        assert 0 < row["masked accuracy"] < row["accuracy"]
