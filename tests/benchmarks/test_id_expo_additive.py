"""The experiment on models that explain themselves, reduced, on scikit-learn's breast cancer table."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_breast_cancer

from captum_idexpo.testing import assert_trainable


@pytest.fixture
def additive(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.id_expo import additive

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does
    yield additive
    torch.set_num_threads(n_threads)


@pytest.fixture
def nam(additive):
    torch.manual_seed(0)
    return additive.Additive(torch.randn(10, 5), n_classes=2, width=4).double()


X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 1])


def test_additive_terms_depend_on_one_column_each_and_sum_to_the_output(nam):
    torch.testing.assert_close(nam.bias + nam.terms(X).sum(dim=1), nam(X))
    other = X.clone()
    other[:, 2] += 1
    changed = (nam.terms(other) - nam.terms(X)).abs().sum(dim=(0, 2))
    assert changed.gt(0).tolist() == [False, False, True, False, False]


def test_terms_explainer_centers_the_terms_of_the_class_and_is_trainable(additive, nam):
    explainer = additive.Terms(nam, nam)
    means = nam.terms(nam.background).mean(dim=0)
    for row, (x, y) in enumerate(zip(X, Y, strict=True)):
        torch.testing.assert_close(explainer.attribute(X, Y)[row], nam.terms(x[None])[0, :, y] - means[:, y])
    assert not explainer.attribute(X, Y).requires_grad
    assert_trainable(lambda: explainer.attribute(X, Y, create_graph=True), nam)


def test_best_order_is_not_beaten_by_any_set_of_columns(additive, nam):
    found = additive.best_order(nam, X, Y)
    steps = {"insertion": [], "one_minus_deletion": []}
    for size in (1, 2):
        masks = torch.stack([torch.zeros(5).index_fill(0, torch.tensor(c), 1.0) for c in combinations(range(5), size)])
        for name, keep in (("insertion", masks), ("one_minus_deletion", 1 - masks)):
            p = nam((X[:, None] * keep).flatten(0, 1)).softmax(dim=1).view(3, -1, 2)[torch.arange(3), :, Y]
            steps[name].append((p if name == "insertion" else 1 - p).amax(dim=1))
    for name, best in steps.items():
        torch.testing.assert_close(found[name], torch.stack(best).mean(dim=0))


def test_surrogate_follows_the_network_without_gradient_into_the_network(additive, nam):
    model = additive.WithSurrogate(torch.nn.Linear(5, 2).double(), nam)
    (penalty,) = additive.Following(model)(X, Y).values()
    p, q = model(X).softmax(dim=1), nam(X).softmax(dim=1)
    torch.testing.assert_close(penalty, (p * (p / q).log()).sum(dim=1).mean())
    penalty.backward()
    assert model.network.weight.grad is None
    assert nam.bias.grad.abs().sum() > 0


def test_additive_training_makes_terms_more_faithful_and_a_run_resumes(additive, tmp_path, monkeypatch):
    x, y = load_breast_cancer(return_X_y=True)
    table = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    monkeypatch.setattr(additive.tables, "load", lambda *_: table)
    monkeypatch.setattr(additive, "JUDGED_SAMPLES", 50)
    monkeypatch.setattr(additive, "EPOCHS", 4)
    monkeypatch.setattr(additive, "SETS", ("breast cancer",))
    monkeypatch.setattr(additive, "SPLITS", range(1))
    kept = {name: additive.SETTINGS[name] for name in ("nam", "nam_0.1", "surrogate", "surrogate_0.1")}
    alone = additive.SETTINGS["surrogate_alone"]
    monkeypatch.setattr(additive, "SETTINGS", {**kept, "surrogate_alone": alone})
    additive.run(additive.SETS, None, tmp_path, additive.SPLITS)
    path = tmp_path / "additive.jsonl"
    rows = {row["setting"]: row for row in additive.Results(path).rows}
    assert list(rows) == list(additive.SETTINGS)
    both = ("insertion", "one_minus_deletion")
    for plain, trained in (("nam", "nam_0.1"), ("surrogate", "surrogate_0.1"), ("surrogate", "surrogate_alone")):
        assert sum(rows[trained][score] for score in both) > sum(rows[plain][score] for score in both)
    for name in ("nam", "nam_0.1"):
        assert all(rows[name]["reference"][score] >= rows[name][score] for score in rows[name]["reference"])
    assert min(rows[name]["accuracy"] for name in rows) > 0.8
    assert min(rows[name]["agreement"] for name in rows if name.startswith("surrogate")) > 0.9

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    additive.run(additive.SETS, None, tmp_path, additive.SPLITS)
    (last,) = additive.Results(path).where(setting="surrogate_alone")
    assert {**last, "seconds": 0} == {**rows["surrogate_alone"], "seconds": 0}

    assert all(setting.title in additive.report(tmp_path) for setting in kept.values())
    additive.plot(tmp_path).savefig(tmp_path / "additive.png")
    assert (tmp_path / "additive.png").stat().st_size
