"""Random masking: its loss by a loop, its gradient by finite differences, the distribution of its masks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import InputXGradient, KernelShap
from captum_idexpo.baselines import noise
from captum_idexpo.metrics import masked_accuracy
from captum_idexpo.regularizers import InsertionDeletion, RandomMasking, Sparsity
from captum_idexpo.testing import assert_trainable
from tests.helpers import Spy, smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(1)
X, Y = torch.randn(8, 6, dtype=torch.float64, generator=G), torch.arange(8) % 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_masking_of_a_class_that_is_impossible_is_finite_unless_it_is_the_label():
    net, y = nn.Linear(6, 3).double(), torch.tensor([0, 1, 1, 0])
    impossible = torch.tensor([False, False, True])

    def forward(x):
        return net(x).masked_fill(impossible, -torch.inf).log_softmax(1)

    x = torch.randn(4, 6, dtype=torch.float64)
    values = []
    for target in (y, F.one_hot(y, 3).double()):
        masking = RandomMasking(
            forward, model=net, baselines=0.0, outputs="log_probabilities", generator=torch.Generator().manual_seed(0)
        )
        (value,) = masking(x, target).values()
        assert torch.autograd.grad(value, net.weight)[0].isfinite().all()
        values.append(value)
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masking_takes_soft_labels_of_half_precision(dtype):
    soft = (3 * torch.randn(512, 100)).softmax(1).to(dtype)
    net = nn.Linear(6, 100)
    for labels in soft.split(64):
        (value,) = RandomMasking(net, baselines=0.0)(torch.randn(64, 6), labels).values()
        assert value.isfinite()


@pytest.mark.parametrize(
    ("outputs", "transform"),
    [("logits", None), ("log_probabilities", lambda z: z.log_softmax(1)), ("probabilities", lambda z: z.softmax(1))],
)
def test_random_masking_is_the_cross_entropy_on_the_masked_copies(outputs, transform):
    net = smooth_net()
    spy = Spy(net if transform is None else lambda x: transform(net(x)))
    for target in (Y, F.one_hot(Y, 3).double(), torch.rand(8, 3, generator=G).double().softmax(1), Y[:, None]):
        masking = RandomMasking(spy, baselines=9.0, weight=0.5, outputs=outputs, generator=seeded())
        term = masking(X, target)["random_masking"]
        (rows,) = spy.rows
        assert ((rows == X) | (rows == 9)).all()
        labels = target.flatten() if target.shape[-1] == 1 or target.dim() == 1 else target
        torch.testing.assert_close(term, 0.5 * F.cross_entropy(net(rows), labels))


@pytest.mark.parametrize("target", [Y % 2, (Y % 2).double(), (Y % 2).double()[:, None], torch.rand(8, 1).double()])
def test_random_masking_of_one_logit_is_the_binary_cross_entropy(target):
    spy = Spy(nn.Linear(6, 1).double())
    term = RandomMasking(spy, baselines=9.0, generator=seeded())(X, target)["random_masking"]
    logit = spy.model(spy.rows[0])[:, 0]
    torch.testing.assert_close(term, F.binary_cross_entropy_with_logits(logit, target.double().flatten()))


def test_random_masking_of_labels_and_of_a_regression():
    spy = Spy(nn.Linear(6, 4).double())
    target = torch.randint(2, (8, 4), generator=G)
    term = RandomMasking(spy, baselines=9.0, outputs="multilabel", generator=seeded())(X, target)["random_masking"]
    logits = spy.model(spy.rows[0])
    torch.testing.assert_close(term, F.binary_cross_entropy_with_logits(logits, target.double()))
    term = RandomMasking(spy, baselines=9.0, outputs="multilabel", generator=seeded())(X, Y)["random_masking"]
    torch.testing.assert_close(term, -F.logsigmoid(logits[torch.arange(8), Y]).mean())
    real = torch.randn(8, 4, dtype=torch.float64, generator=G)
    term = RandomMasking(spy, baselines=9.0, outputs="raw", generator=seeded())(X, real)["random_masking"]
    torch.testing.assert_close(term, F.mse_loss(spy.model(spy.rows[0]), real))
    column = RandomMasking(lambda x: spy(x)[:, 0], model=spy, baselines=9.0, outputs="raw", generator=seeded())
    torch.testing.assert_close(column(X, real[:, :1])["random_masking"], F.mse_loss(logits[:, 0], real[:, 0]))


@pytest.mark.parametrize("outputs", ["logits", "raw"])
def test_random_masking_total_loss_has_the_true_gradient(outputs):
    net = smooth_net()
    target = Y if outputs == "logits" else torch.randn(8, 3, dtype=torch.float64, generator=G)
    masking = RandomMasking(net, baselines=0.3, weight=0.7, outputs=outputs)
    task = F.cross_entropy if outputs == "logits" else F.mse_loss
    assert_trainable(lambda: task(net(X), target) + masking(X, target)["random_masking"], net)


def test_random_masking_draws_a_share_of_its_own_for_each_example():
    """So every number of masked features, 0 to D, is equally likely, and every feature is masked half of the time."""
    spy = Spy(smooth_net())
    masking = RandomMasking(spy, baselines=9.0, generator=seeded())
    counts, features = torch.zeros(7), torch.zeros(6)
    for _ in range(300):
        masking(X, Y)
        masked = spy.rows[0] == 9
        counts += torch.bincount(masked.sum(1), minlength=7)
        features += masked.sum(0)
    assert (counts / 2400).tolist() == pytest.approx([1 / 7] * 7, abs=0.03)
    assert (features / 2400).tolist() == pytest.approx([0.5] * 6, abs=0.04)


def test_random_masking_shares_differ_within_a_batch():
    spy = Spy(smooth_net(n_features=40))
    x, y = torch.randn(300, 40, dtype=torch.float64, generator=G), torch.zeros(300, dtype=torch.long)
    RandomMasking(spy, baselines=9.0, generator=seeded())(x, y)
    shares = (spy.rows[0] == 9).double().mean(1)
    assert float(shares.std()) == pytest.approx(12**-0.5, abs=0.04)  # of U(0, 1); one share for all would give 0.08


def test_random_masking_masks_pixels_of_images_and_groups():
    spy, images = Spy(smooth_conv_net()), torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=G)
    RandomMasking(spy, baselines=9.0)(images, Y[:3])
    assert torch.equal(spy.rows[0][:, 0] == 9, spy.rows[0][:, 1] == 9)
    halves = torch.arange(6).div(3, rounding_mode="floor").expand(6, 6)
    for mask in (halves, lambda x: halves.expand(len(x), 1, 6, 6)):
        RandomMasking(spy, baselines=noise(generator=seeded()), feature_mask=mask, generator=seeded())(images, Y[:3])
        masked = (spy.rows[0] != images)[:, 0]
        assert (masked[..., :3] == masked[..., :1]).all()
        assert (masked[..., 3:] == masked[..., 5:]).all()


def test_random_masking_keeps_statistics_and_streams():
    net = smooth_conv_net().train()
    images, statistics = torch.randn(3, 2, 6, 6).double(), net[1].running_mean.clone()
    before = torch.random.get_rng_state()
    terms = [RandomMasking(net, baselines=0.0, generator=seeded())(images, Y[:3]) for _ in range(2)]
    assert terms[0] == terms[1]  # no dropout
    assert torch.equal(net[1].running_mean, statistics)
    assert net.training
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("error", "text", "settings", "target"),
    [
        (ValueError, "a score, not a loss", {"outputs": lambda output, target: output[:, 0]}, Y),
        (ValueError, "weight", {"weight": -1.0}, Y),
        (TypeError, r"mean_inputs\(train_loader\)", {"baselines": "mean"}, Y),
        (ValueError, "axis|axes|broadcast|fit", {"baselines": torch.zeros(5)}, Y),
        (IndexError, "out of range for 3 classes", {}, Y + 1),
        (ValueError, "do not fit 3 classes", {}, torch.full((8, 4), 0.25)),
        (IndexError, "out of range for 3 classes", {"outputs": "multilabel"}, Y + 1),
        (TypeError, r"argmax\(dim=1\)", {}, torch.ones(8, 3, dtype=torch.long)),
        (ValueError, "does not fit outputs", {"outputs": "multilabel"}, torch.ones(8, 2)),
        (ValueError, "do not fit the outputs", {"outputs": "raw"}, torch.ones(8, 2)),
        (TypeError, "tensor of targets", {"outputs": "raw"}, [1.0] * 8),
    ],
)
def test_random_masking_refuses_what_has_no_loss(error, text, settings, target):
    with pytest.raises(error, match=text):
        RandomMasking(smooth_net(), **{"baselines": 0.0, **settings})(X, target)


def test_random_masking_refuses_outputs_with_more_axes():
    net = nn.Conv2d(2, 3, 1).double()
    with pytest.raises(ValueError, match=r"outputs \(B, C\)"):
        RandomMasking(net, baselines=0.0)(torch.randn(2, 2, 4, 4).double(), Y[:2])


def test_random_masking_teaches_a_network_to_read_masks():
    """A network of a redundant rule: one column decides, or the five others together, which training alone ignores."""
    generator = seeded(3)
    y = torch.randint(2, (400,), generator=generator)
    sign = (2 * y - 1).double()[:, None]
    x = torch.cat([6 * sign, sign + 0.5 * torch.randn(400, 5, dtype=torch.float64, generator=generator)], dim=1)

    def trained(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = ExplanationRegularizedTrainer(model, optimizer, make(model), show_progress=False)
        trainer.fit([(x[:300], y[:300])] * 10, epochs=10)
        judge = {"baselines": -3.0, "share": 0.5, "generator": seeded()}
        return float(masked_accuracy(model, x[300:], y[300:], **judge).mean())

    plain = trained(lambda model: [])
    masked = trained(lambda model: [RandomMasking(model, baselines=-3.0, generator=seeded())])
    assert masked > plain + 0.1


# --- the warning of a model that does not read masks ---------------------------------------------------------------


class Blind(nn.Module):
    """A linear classifier, unless a feature is masked: then it answers with class 0, or by the mask's pattern."""

    def __init__(self, by_pattern=False):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3).double()
        self.by_pattern = by_pattern

    def forward(self, x):
        masked = (x == 0).long()
        pattern = (masked * torch.tensor([1, 2, 4, 8, 16, 32])).sum(1) % 3
        answer = F.one_hot(pattern if self.by_pattern else torch.zeros_like(pattern), 3)
        return self.linear(x) + (100.0 * answer - 50.0) * masked.any(dim=1, keepdim=True)


def rows(n):
    return torch.randn(n, 6, dtype=torch.float64, generator=seeded(5)), torch.arange(n) % 3


def warnings_of(call, times=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    return [str(each.message) for each in caught if "cannot read masked inputs" in str(each.message)]


@pytest.mark.parametrize("by_pattern", [False, True])
@pytest.mark.parametrize("n", [16, 64, 300])
def test_explaining_masked_copies_that_are_not_read_warns_once(n, by_pattern):
    x, y = rows(n)
    regularizer = InsertionDeletion(KernelShap(Blind(by_pattern)), baselines=0.0)
    (message,) = warnings_of(lambda: regularizer(x, y), times=max(6, 300 // n))
    assert "RandomMasking" in message
    judge = InsertionDeletion(KernelShap(Blind(by_pattern)), baselines=0.0)
    assert warnings_of(lambda: judge.scores(*rows(200)))
    assert warnings_of(lambda: Sparsity(KernelShap(Blind(by_pattern)))(*rows(200)))


def test_small_batches_are_collected_before_the_warning():
    x, y = rows(64)
    regularizer = InsertionDeletion(KernelShap(Blind()), baselines=0.0)
    assert not warnings_of(lambda: regularizer(x[:4], y[:4]))
    batches = iter([(x[start : start + 4], y[start : start + 4]) for start in range(4, 64, 4)])
    assert len(warnings_of(lambda: regularizer(*next(batches)), times=15)) == 1


@pytest.mark.parametrize("make", [smooth_net, lambda: nn.Linear(6, 3).double()])
@pytest.mark.parametrize("n", [8, 64, 256])
def test_models_that_read_masks_are_not_warned_of(make, n):
    torch.manual_seed(0)
    regularizer = InsertionDeletion(KernelShap(make()), baselines=0.0)
    assert not warnings_of(lambda: regularizer(*rows(n)), times=3)


@pytest.mark.parametrize("outputs", ["logits", "multilabel", "raw"])
def test_reading_is_judged_where_there_are_classes_or_labels(outputs):
    x, y = rows(200)
    target = F.one_hot(y, 3) if outputs == "multilabel" else y
    regularizer = InsertionDeletion(KernelShap(Blind(by_pattern=True)), baselines=0.0, outputs=outputs)
    assert bool(warnings_of(lambda: regularizer(x, target))) == (outputs != "raw")
    gradients = InsertionDeletion(InputXGradient(Blind(by_pattern=True)), baselines=0.0, outputs=outputs)
    assert not warnings_of(lambda: gradients(x, target))  # which asks no masked copies


def test_batches_of_one_class_say_nothing():
    """As a loader that is sorted by class yields them: agreement is chance, however well masks are read."""
    x, _ = rows(400)
    for model in (smooth_net(), Blind(by_pattern=True)):
        predicted = model(x).argmax(1)
        judge = InsertionDeletion(KernelShap(model), baselines=0.0)
        alike = x[predicted == predicted.mode().values][:60]
        assert not warnings_of(lambda judge=judge, alike=alike: judge.scores(alike))
    assert warnings_of(lambda: judge.scores(x[:100]))  # the blind one was not settled by one class


def test_labels_that_are_mostly_false_are_judged_by_chance():
    class Sparse(nn.Module):
        def forward(self, x):
            found = 9.0 * F.one_hot((x[:, 0] * 100).long().abs() % 20, 20) - 4.0 + 0.01 * x[:, :1]
            return torch.where((x == 0).any(1, keepdim=True), -4.0 + 0.01 * x[:, 1:2] * torch.ones(1, 20), found)

    x, _ = rows(100)
    judge = InsertionDeletion(KernelShap(Sparse()), model=nn.Identity(), baselines=0.0, outputs="multilabel")
    assert warnings_of(lambda: judge.scores(x))


def test_reading_is_judged_with_the_baselines_of_the_explainer():
    class ReadsFives(Blind):
        def forward(self, x):
            return super().forward(torch.where(x == 5, 1e-3, x))

    x, y = rows(100)
    for own, given, warns in ((5.0, 0.0, True), (0.0, 5.0, False)):
        arguments = {"baselines": own, "attribute_kwargs": {"baselines": given}}
        regularizer = InsertionDeletion(KernelShap(ReadsFives(by_pattern=True)), **arguments)
        assert bool(warnings_of(lambda regularizer=regularizer: regularizer(x, y))) == warns


def test_frequent_class_that_masks_leave_is_not_warned_of():
    """Nine in ten examples are of one class, and so is every masked copy: chance explains it, but masks do no harm."""

    class Rare(nn.Module):
        def forward(self, x):
            return x.sum(dim=1) - 3.2 - 10.0 * (x == 0).any(dim=1)

    x, y = rows(256)
    judge = InsertionDeletion(KernelShap(Rare()), baselines=0.0)
    assert not warnings_of(lambda: judge.scores(x, y % 2))


def test_reading_check_leaves_no_trace_in_random_streams_and_generators():
    x, y = rows(16)
    terms = []
    for checked in (True, False):
        generators = [seeded(1), seeded(2)]
        baselines = noise(0.1, generator=generators[1])
        regularizer = InsertionDeletion(KernelShap(smooth_net()), baselines=baselines, generator=generators[0])
        regularizer._reading.is_settled = not checked
        torch.manual_seed(0)
        terms.append([regularizer(x, y) for _ in range(2)])
        terms[-1].append(torch.rand(3))
    assert terms[0][:2] == terms[1][:2]
    assert torch.equal(terms[0][2], terms[1][2])


def test_evaluation_measures_masked_accuracy_on_request():
    x, y = rows(60)
    model = smooth_net()
    judge = InsertionDeletion(KernelShap(model), baselines=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ExplanationRegularizedTrainer(model, optimizer, evaluation=judge, show_progress=False)
    loader = [(x[:40], y[:40]), (x[40:], y[40:])]
    assert "masked_accuracy" not in trainer.evaluate(loader)
    scores = trainer.evaluate(loader, masked_share=1.0)
    only_baseline = int(model(torch.full((1, 6), 2.0, dtype=torch.float64)).argmax())
    assert scores["masked_accuracy"] == pytest.approx(float((y == only_baseline).double().mean()))
    assert trainer.evaluate(loader, masked_share=0.0)["masked_accuracy"] == pytest.approx(scores["accuracy"])
    half = trainer.example_scores(loader, masked_share=0.5)["masked_accuracy"]
    assert half.shape == (60,)
    assert math.isclose(trainer.evaluate(loader, masked_share=0.5)["masked_accuracy"], float(half.mean()), rel_tol=1e-6)
    plain = ExplanationRegularizedTrainer(model, optimizer, show_progress=False)
    with pytest.raises(ValueError, match="needs baselines, those of a judge"):
        plain.evaluate(loader, masked_share=0.5)
