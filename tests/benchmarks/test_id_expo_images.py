"""The experiment on images, reduced: scikit-learn's digits in place of CIFAR-10, a small network, short runs."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.id_expo import images
from benchmarks.id_expo.experiment import RISES, Results, quiet
from benchmarks.id_expo.images import Arm

# The network is hardly trained: Grad-CAM's ReLU leaves some of its maps empty.
pytestmark = [pytest.mark.filterwarnings(f"ignore:The {start}") for start in ("attribution of", "task loss was")]


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


SMALL = {
    "pretrained": small_network, "load": load_small, "layer": "3", "cell": 2, "n_train": 600, "n_val": 40,
    "n_test": 60, "n_explained": 30, "first_test": 300, "learning_rate": 5e-3, "n_samples": 30, "n_epochs": 3,
    "seeds": range(1), "last_layer": "6",
}  # fmt: skip
GRAD_CAM = images.Experiment(
    "Grad-CAM",
    (
        Arm("CE-only", 40),
        Arm("CE-only, surer", 40),
        Arm("ID-ExpO", 10, 0.3, "ratio"),
        Arm("ID-ExpO", 40, 0.3, "complement"),
        images.RECIPE_ARM._replace(n_updates=20),
        Arm("masks alone", 20),
    ),
    **SMALL,
)
LIME = images.Experiment(
    "LIME", (Arm("CE-only", 12), Arm("ID-ExpO", 12, 0.2, "complement")), n_warm_up=200, **SMALL
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the script runs."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def test_a_reduced_run(tmp_path):
    """Check one run in several ways, because the run takes the time."""
    images.run("gradcam", GRAD_CAM, None, tmp_path)
    check_that_it_is_complete_and_not_repeated(tmp_path)
    rows = images.complete(GRAD_CAM, Results(tmp_path / "images_gradcam.jsonl"))
    column = images.columns(GRAD_CAM)["Grad-CAM"]
    gained, plain = (column(rows[arm][0]["score"]) for arm in ("ID-ExpO, complement", "CE-only"))
    assert gained > plain
    surer, plain = (rows[arm][0]["limit"] for arm in ("CE-only, surer", "CE-only"))
    assert surer["accuracy"] == plain["accuracy"]
    assert surer["insertion, Grad-CAM, mean colour"] != plain["insertion, Grad-CAM, mean colour"]
    check_the_shares_of_images_that_change_both_ways(rows, images.report(GRAD_CAM, rows))
    check_the_picture(rows)


def check_that_it_is_complete_and_not_repeated(folder):
    path = folder / "images_gradcam.jsonl"
    written = path.read_text()
    assert len(Results(path).rows) == 1 + len(GRAD_CAM.arms)
    images.run("gradcam", GRAD_CAM, None, folder)
    assert path.read_text() == written


def check_the_shares_of_images_that_change_both_ways(rows, text):
    after, before = (rows[arm][0]["limit"] for arm in ("in turn", "start"))
    rise = 0
    for i in range(GRAD_CAM.n_explained):
        insertion = after["each insertion"][i] - before["each insertion"][i]
        deletion = after["each deletion"][i] - before["each deletion"][i]
        rise += insertion > 0 and deletion < 0
    assert text.startswith("Seeds: 1, explained images: 30.")
    assert "#### Grad-CAM, S = 0.5. Within the accuracy limit" in text
    assert f"| in turn | {rise / GRAD_CAM.n_explained:.1%} |" in text
    assert text.count(f"| {RISES} |") == 11


def check_the_picture(rows):
    panels = {axis.get_title().splitlines()[0]: axis for axis in images.plot(rows).axes}
    assert list(panels) == list(images.PICTURED)
    for name, axis in panels.items():
        after, before = (rows[arm][0]["score"] for arm in (name, "start"))
        insertion = [new - old for new, old in zip(after["each insertion"], before["each insertion"], strict=True)]
        deletion = [old - new for new, old in zip(after["each deletion"], before["each deletion"], strict=True)]
        points = axis.lines[-1].get_xydata()
        assert points[:, 0].tolist() == pytest.approx(insertion, abs=1e-6)
        assert points[:, 1].tolist() == pytest.approx(deletion, abs=1e-6)


def test_the_arms_of_lime_start_from_a_network_that_reads_masks(tmp_path):
    images.run("lime", LIME, None, tmp_path)
    rows = images.complete(LIME, Results(tmp_path / "images_lime.jsonl"))
    (warm,) = rows["start"]
    with quiet():
        cold = images.judge(LIME, small_network(None), LIME.images(None, 0))
        fewer = images.judge(LIME._replace(fraction=0.25), small_network(None), LIME.images(None, 0))
    for name in ("Grad-CAM", "LIME"):  # fewer inserted and fewer deleted
        assert fewer[f"insertion, {name}, black"] < cold[f"insertion, {name}, black"]
        assert fewer[f"deletion, {name}, black"] > cold[f"deletion, {name}, black"]
    assert warm["limit"]["masked_accuracy, mean colour"] > cold["masked_accuracy, mean colour"] + 0.1
    assert "#### In turn" not in images.report(LIME, rows)
    same = {arm: [row | {"limit": row["score"]} for row in found] for arm, found in rows.items()}
    assert images.report(LIME, same).count("####") == 1


def test_arms_have_the_terms_that_they_are_named_after():
    model = small_network(None)
    x = load_small(None, "train", slice(0, 200)).tensors[0]
    for experiment, arm in ((each, arm) for each in images.EXPERIMENTS.values() for arm in each.arms):
        experiment = experiment._replace(layer="3", cell=2)
        made = experiment.regularizers(arm, model, 0)
        if arm.method.startswith("CE-only"):
            assert made == []
        elif arm.method == "masks alone":
            assert [type(each).__name__ for each in made] == ["RandomMasking"]
        else:
            members = made[0].members if arm.method == "in turn" else made
            named = [type(member.explainer).__name__ for member in members]
            own = {"Grad-CAM": "LayerGradCam", "LIME": "Lime"}[experiment.explainer]
            assert named == ([own, "IntegratedGradients"] if arm.method == "in turn" else [own])
            for each in members:
                assert each.deletion_form == arm.form
                assert each.fraction == experiment.fraction
                assert each.insertion_weight == each.deletion_weight == arm.weight
                if arm.method == "in turn":
                    assert 0.3 < float((each.baselines(x) == 0).flatten(1).all(dim=1).float().mean()) < 0.7
                else:
                    assert each.baselines == 0


def test_no_two_seeds_share_an_image_to_choose_by_or_to_report():
    seen = set()
    for seed in images.EXPERIMENTS["gradcam"].seeds:
        experiment = images.EXPERIMENTS["gradcam"]._replace(
            load=lambda root, part, rows: TensorDataset(torch.arange(50_000 if part == "train" else 10_000)[rows])
        )
        given = experiment.images(None, seed)
        for part in (given.val, given.test):
            (numbers,) = part.tensors
            assert not seen & {*numbers.tolist()}
            seen |= {*numbers.tolist()}
        assert given.val.tensors[0].max() < 5000 <= given.test.tensors[0].min()
