"""What is averaged over a loader: losses by examples, accuracy where there are labels, in the same order each time."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import InputXGradient, KernelShap
from captum_idexpo.regularizers import InsertionDeletion, RightForTheRightReasons, Stability

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def trainer_of(model, regularizers=(), loss_fn=cross_entropy, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return ExplanationRegularizedTrainer(model, optimizer, regularizers, loss_fn, show_progress=False, **settings)


class Column(nn.Module):
    """One number an example, ``(B,)``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x).squeeze(1)


def squared(output, target):
    return mse_loss(output, target.float())


@pytest.mark.parametrize("announced", [False, True])
def test_accuracy_is_absent_for_a_regression_on_whole_numbers(announced):
    model, counts = Column(), (5 + 3 * X[:, 0]).round().long().clamp_min(0)
    regularizers = [Stability(model, outputs="raw")] if announced else []
    trainer = trainer_of(model, regularizers, squared)
    scores = trainer.evaluate(DataLoader(TensorDataset(X, counts), 8))
    assert set(scores) == {"loss", "valscore"}
    assert scores["valscore"] == pytest.approx(-2 * scores["loss"])
    # Some batches may hold zeros and ones alone.
    few = torch.tensor([0, 1, 1, 0, 1, 0, 2, 3])
    loader = DataLoader(TensorDataset(X[:8], few), 2)
    assert set(trainer.evaluate(loader)) == {"loss", "valscore"}
    assert trainer.example_scores(loader) == {}


JUDGES = {
    "a lambda": lambda net: InsertionDeletion(
        KernelShap(lambda x: net(x)), model=net, baselines=0.0, outputs="probabilities"
    ),
    "the model": lambda net: InsertionDeletion(KernelShap(net), baselines=0.0, outputs="probabilities"),
    "a wrapper": lambda net: InsertionDeletion(
        KernelShap(nn.Sequential(net, nn.Identity())), baselines=0.0, outputs="probabilities"
    ),
    "no judge": lambda net: RightForTheRightReasons(net, weight=0.0, outputs="probabilities"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_accuracy_of_a_probability_column_uses_a_threshold_of_one_half(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    labels = (net(X)[:, 0] > 0.5).long()
    labels[:4] = 1 - labels[:4]

    def loss_fn(output, target):
        return binary_cross_entropy(output.squeeze(1), target.float())

    scores = trainer_of(net, [JUDGES[name](net)], loss_fn).evaluate(DataLoader(TensorDataset(X, labels), 16))
    assert scores["accuracy"] == pytest.approx(0.9)


def test_accuracy_of_a_column_is_by_the_judge_of_a_wrapper_beside_a_term_on_raw_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    judge = InsertionDeletion(KernelShap(nn.Sequential(net, nn.Identity())), baselines=0.0, outputs="probabilities")
    trainer = trainer_of(net, [RightForTheRightReasons(net, outputs="raw"), judge], binary_cross_entropy)
    labels = (net(X) > net(X).median()).float()
    expected = ((net(X) > 0.5) == labels.bool()).double().mean().item()
    assert trainer.evaluate([(X, labels)])["accuracy"] == pytest.approx(expected)


def test_accuracy_of_a_column_is_the_models_beside_a_judge_of_another_head():
    torch.manual_seed(0)
    trunk = nn.Linear(4, 4)
    net, other = nn.Sequential(trunk, nn.Linear(4, 1)), nn.Sequential(trunk, nn.Linear(4, 5))
    judge = InsertionDeletion(KernelShap(other), baselines=0.0)
    labels = (net(X) > 0).float()
    trainer = trainer_of(net, [], nn.functional.binary_cross_entropy_with_logits, evaluation=judge)
    assert trainer.evaluate([(X, labels)])["accuracy"] == 1


def test_accuracy_of_a_column_is_absent_where_only_another_function_is_announced():
    net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    term = RightForTheRightReasons(lambda x: net(x), model=net, outputs="probabilities")
    trainer = trainer_of(net, [term], binary_cross_entropy)
    assert "accuracy" not in trainer.evaluate([(X, (net(X) > 0.5).float())])


def test_accuracy_is_the_models_when_the_judge_wraps_a_logit_in_sigmoid():
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    labels = (net(X)[:, 0] > 0).long()
    judge = InsertionDeletion(KernelShap(lambda x: net(x).sigmoid()), model=net, baselines=0.0, outputs="probabilities")

    def loss_fn(output, target):
        return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target.float())

    assert trainer_of(net, [judge], loss_fn).evaluate([(X, labels)])["accuracy"] == 1.0


def test_loss_weighs_a_batch_of_mapping_targets_by_its_examples():
    def loss_fn(output, target):
        return cross_entropy(output[:, :3], target["class"]) + mse_loss(output[:, 3], target["value"])

    data = [(x, {"class": torch.tensor(k % 3), "value": 9 * x[0]}) for k, x in enumerate(X[:5])]
    torch.manual_seed(0)
    trainer = trainer_of(nn.Linear(4, 4), [], loss_fn)
    whole = trainer.evaluate(DataLoader(data, 5))["loss"]
    assert trainer.evaluate(DataLoader(data, 4))["loss"] == pytest.approx(whole, rel=1e-5)


def test_accuracy_is_absent_for_outputs_with_more_than_two_axes():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x)[:, None].expand(-1, 2, -1)

    trainer = trainer_of(Steps(), [], lambda output, target: cross_entropy(output.mean(1), target))
    assert set(trainer.evaluate([(X, torch.arange(40) % 3)])) == {"loss", "valscore"}


def test_evaluate_reads_a_shuffled_loader_in_the_same_order_each_time():
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    judge = InsertionDeletion(KernelShap(net), baselines=0.0, attribute_kwargs={"n_samples": 8})
    trainer = trainer_of(net, [judge], accelerator=Accelerator(cpu=True, dataloader_config=configuration))
    loader = DataLoader(TensorDataset(X, torch.arange(40) % 3), 16, shuffle=True)
    first = trainer.evaluate(loader)
    assert trainer.evaluate(loader) == first


def test_accuracy_of_a_classifier_is_kept_beside_a_term_on_raw_outputs():
    torch.manual_seed(0)
    net, labels = nn.Linear(4, 3), torch.arange(40) % 3
    judge = InsertionDeletion(KernelShap(net), baselines=0.0, attribute_kwargs={"n_samples": 8})
    expected = float((net(X).argmax(1) == labels).float().mean())
    for regularizers in ([Stability(net, outputs="raw")], [judge, Stability(net, outputs="raw")]):
        assert trainer_of(net, regularizers).evaluate([(X, labels)])["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("n_boxes", [[5, 1, 2, 3], [0, 1, 2, 3], [1, 1, 1, 1]])
def test_loss_weighs_a_batch_of_list_targets_by_its_examples(n_boxes):
    targets = [{"boxes": torch.ones(n, 4)} for n in n_boxes]

    def loss_fn(output, target):
        assert len(output) == len(target)
        return sum(output[k].sum() * len(one["boxes"]) for k, one in enumerate(target)) / len(target)

    torch.manual_seed(0)
    trainer = trainer_of(nn.Linear(4, 4), [], loss_fn)
    whole = trainer.evaluate([(X[:4], targets)])["loss"]
    assert trainer.evaluate([(X[:3], targets[:3]), (X[3:4], targets[3:])])["loss"] == pytest.approx(whole, rel=1e-4)


def test_evaluate_leaves_the_iteration_count_of_a_loader_unchanged():
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    trainer = trainer_of(nn.Linear(4, 3), accelerator=Accelerator(cpu=True, dataloader_config=configuration))
    loader = trainer.accelerator.prepare_data_loader(
        DataLoader(TensorDataset(X, torch.arange(40) % 3), 16, shuffle=True)
    )
    loader.iteration = 3
    trainer.evaluate(loader)
    assert loader.iteration == 3

    class Stream:
        iteration = 5

        def __iter__(self):
            self.iteration += 1
            yield X, torch.arange(40) % 3

    stream = Stream()
    trainer.evaluate(stream)
    assert stream.iteration == 6


# --- gains over random orders --------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_gains_of_the_judge_reach_evaluation_history_and_examples():
    model, y = classifier(), torch.arange(40) % 3
    judge = InsertionDeletion(InputXGradient(model), baselines=0.0, n_random_orders=3)
    trainer, loader = trainer_of(model, evaluation=judge), DataLoader(TensorDataset(X, y), 16)
    scores = trainer.evaluate(loader)
    assert scores == trainer.evaluate(loader)  # every evaluation draws the same orders
    examples = trainer.example_scores(loader)
    for name in ("insertion_gain", "deletion_gain"):
        assert scores[name] == pytest.approx(float(examples[name].mean()))
        assert examples[name].shape == (40,)
    assert scores["insertion_gain"] > 0.01 < scores["deletion_gain"]
    first = trainer.example_scores([(X, y)])
    torch.manual_seed(torch.initial_seed())  # from which every evaluation draws
    direct = judge.scores(X)
    torch.testing.assert_close(first["insertion_gain"], direct.insertion_gain)
    torch.testing.assert_close(first["deletion_gain"], direct.deletion_gain)
    expected = 2 * scores["accuracy"] + scores["insertion"] + scores["one_minus_deletion"]
    assert scores["valscore"] == pytest.approx(expected)  # eq. (15) as before
    (row,) = trainer.fit(loader, loader)
    assert row["val_insertion_gain"] == trainer.evaluate(loader)["insertion_gain"]


def test_gains_of_several_labels_are_means_over_the_true_ones():
    model = classifier()
    judge = InsertionDeletion(
        InputXGradient(model), baselines=0.0, outputs="multilabel", n_random_orders=2, step_size=1, fraction=1.0
    )
    target = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    scores = judge.scores(X[:3], target)
    assert all(values[1].isnan().all() for values in scores if values.dim() == 1 and len(values) == 3)
    assert scores.insertion_gain[0] != 0 != scores.deletion_gain[2]


def test_examples_without_a_true_label_are_left_out_of_the_means_of_explanations():
    model = classifier()
    judge = InsertionDeletion(InputXGradient(model), baselines=0.0, outputs="multilabel", n_random_orders=2)
    trainer = trainer_of(model, evaluation=judge, loss_fn=nn.BCEWithLogitsLoss())
    target = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    x, has_label = X[:4], target.any(dim=1)
    scores = trainer.evaluate([(x, target)], explain="label")
    labelled = trainer.evaluate([(x[has_label], target[has_label])], explain="label")
    for name in ("insertion", "deletion", "one_minus_deletion"):
        assert scores[name] == pytest.approx(labelled[name])
    assert scores["one_minus_deletion"] == pytest.approx(1 - scores["deletion"])
    assert scores["accuracy"] != pytest.approx(labelled["accuracy"])  # of all examples
    examples = trainer.example_scores([(x, target)], explain="label")
    assert examples["insertion"].isnan().tolist() == [False, True, False, True]
    unlabelled = trainer.evaluate([(x[~has_label], target[~has_label])], explain="label")
    assert {"loss", "accuracy"} <= set(unlabelled)
    assert not {"insertion", "deletion", "insertion_gain"} & set(unlabelled)


def test_loss_of_nan_stays_so_in_the_mean():
    trainer = trainer_of(classifier(), loss_fn=lambda output, y: output.mean() * y.sum() / y.sum())
    batches = [(X[:2], torch.tensor([0, 1])), (X[:2], torch.tensor([0, 0]))]
    assert math.isnan(trainer.evaluate(batches)["loss"])


@pytest.mark.parametrize("outputs", ["logits", "raw"])
def test_gain_of_a_random_attribution_is_zero_in_the_mean(outputs):
    """And that of the model's own explanation is not, although both have the same masked inputs in general."""

    class Chance(InputXGradient):
        @functools.wraps(InputXGradient.attribute)
        def attribute(self, inputs, *args, **kwargs):
            return torch.rand(inputs.shape, generator=generator)

    model, generator = classifier(), torch.Generator().manual_seed(0)
    x, target = X.repeat(20, 1), torch.zeros(800, dtype=torch.long)
    arguments = {"baselines": 0.0, "outputs": outputs, "n_random_orders": 4, "target_transform": lambda _: target}
    chance = InsertionDeletion(Chance(model), **arguments).scores(x, target)
    own = InsertionDeletion(InputXGradient(model), **arguments).scores(x, target)
    for name in ("insertion_gain", "deletion_gain"):
        gain = getattr(chance, name)
        assert abs(float(gain.mean())) < 4 * float(gain.std()) / 800**0.5
        assert float(getattr(own, name).mean()) > 0.02
