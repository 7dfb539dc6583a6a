"""Baselines as distributions: their values, their independence, and where they are used."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import IntegratedGradients, KernelShap
from captum_idexpo.baselines import blurred, generators_of, mean_inputs, mixture, noise, resampled
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion, MaskedNeighbors, RightForTheRightReasons, Stability
from tests.helpers import smooth_net

G = torch.Generator().manual_seed(0)
IMAGES = torch.rand(3, 2, 7, 9, dtype=torch.float64, generator=G)
ROWS, Y = torch.randn(8, 6, dtype=torch.float64, generator=G), torch.arange(8) % 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mean_of_integers_and_booleans_keeps_its_fraction():
    columns = torch.tensor([[0, 1, 5], [0, 1, 6], [1, 0, 6]])
    mean = mean_inputs([(columns, 0)])
    torch.testing.assert_close(mean, torch.tensor([[1 / 3, 2 / 3, 17 / 3]]))
    torch.testing.assert_close(mean_inputs([(columns[:, :2].bool(), 0)]), mean[:, :2])
    model, maps = nn.Linear(3, 2), torch.rand(3, 3)
    scores = [
        insertion_deletion(lambda x: model(x.float()), x, maps, baselines=mean, target=1).insertion
        for x in (columns, columns.float())
    ]
    torch.testing.assert_close(*scores)


def test_blurred_is_the_mean_of_the_positions_inside_weighted_by_a_gaussian():
    sigma = 1.3
    result = blurred(sigma)(IMAGES)
    for row, column in ((0, 0), (3, 4), (6, 2)):
        weights = torch.tensor(
            [
                [
                    math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
                    if max(abs(i - row), abs(j - column)) <= math.ceil(3 * sigma)
                    else 0.0
                    for j in range(9)
                ]
                for i in range(7)
            ],
            dtype=torch.float64,
        )
        expected = (IMAGES * weights).sum((2, 3)) / weights.sum()
        torch.testing.assert_close(result[:, :, row, column], expected)


def test_blurred_keeps_constants_and_tends_to_the_mean():
    constant = torch.full((2, 1, 5, 4), 0.3)
    torch.testing.assert_close(blurred(2.0)(constant), constant)
    torch.testing.assert_close(
        blurred(1000.0)(IMAGES), IMAGES.mean((2, 3), keepdim=True).expand_as(IMAGES), atol=1e-3, rtol=0
    )


def test_blurred_series_and_tuples_need_their_axes():
    series = torch.randn(3, 5, 4, generator=G)
    along_steps = blurred(1.0, axes=(1,))(series)
    torch.testing.assert_close(along_steps, blurred(1.0, axes=(2,))(series.mT).mT)
    both = blurred(1.0, axes=(None, (1,)))((IMAGES, series))
    torch.testing.assert_close(both[0], blurred(1.0)(IMAGES))
    torch.testing.assert_close(both[1], along_steps)


@pytest.mark.parametrize(
    ("baselines", "inputs", "error", "text"),
    [
        (blurred(1.0), torch.zeros(2, 3, 4), ValueError, r"axes=\(2,\)"),
        (blurred(1.0), ROWS, ValueError, "have no neighbours"),
        (blurred(1.0, axes=(0, 1)), IMAGES, ValueError, "1 or more"),
        (blurred(1.0), IMAGES.long(), TypeError, "floating-point"),
        (resampled(torch.rand(5, 3)), torch.ones(2, 3).long(), TypeError, "would lose its fractions"),
        (noise(), torch.zeros(2, 3, dtype=torch.long), TypeError, "floating-point"),
        (noise(std=torch.ones(5)), ROWS, ValueError, "baseline"),
        (resampled(), ROWS[:1], ValueError, r"resampled\(data=train_inputs\)"),
        (resampled(ROWS[:, :3]), ROWS, ValueError, "no examples of the inputs' shapes"),
        (resampled((ROWS, ROWS[:2])), (ROWS, ROWS), ValueError, "no examples of the inputs' shapes"),
        (mixture(0.5), torch.zeros(2, 3, dtype=torch.long), TypeError, "whole numbers"),
        (mixture(0.0, (1.0, 2.0)), ROWS, ValueError, "baselines holds 2 values for 1"),
    ],
)
def test_baselines_refuse_inputs_that_they_do_not_fit(baselines, inputs, error, text):
    with pytest.raises(error, match=text):
        baselines(inputs)


@pytest.mark.parametrize("sigma", [0, -1.0, math.inf, math.nan, "1", True])
def test_blurred_needs_a_positive_sigma(sigma):
    with pytest.raises(ValueError, match="sigma must be a positive number"):
        blurred(sigma)


@pytest.mark.parametrize("weights", [(1.0,), (1, 1, 1), (1, 0), (1, -1), (1, math.nan)])
def test_mixture_needs_a_positive_weight_for_each(weights):
    with pytest.raises(ValueError, match="one positive number for each of the 2"):
        mixture(0.0, 1.0, weights=weights)
    with pytest.raises(ValueError, match="needs baselines"):
        mixture()


def test_noise_has_its_mean_and_standard_deviation():
    std = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    drawn = noise(std, mean=3.0, generator=seeded())(torch.zeros(500, 2, 4, 4))
    assert drawn.mean((0, 2, 3)).tolist() == pytest.approx([3.0, 3.0], abs=0.1)
    assert drawn.std((0, 2, 3)).tolist() == pytest.approx([0.5, 2.0], rel=0.05)
    two = noise((1.0, 0.1), generator=seeded())((torch.zeros(500, 3), torch.zeros(500, 2)))
    assert [float(each.std()) for each in two] == pytest.approx([1.0, 0.1], rel=0.1)
    assert noise()(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_resampled_takes_whole_other_examples_each_equally_often():
    x = torch.arange(5.0)[:, None].expand(5, 3)
    taken = torch.zeros(5, 5)
    draw = resampled(generator=seeded())
    for _ in range(800):
        rows = draw(x)
        assert (rows == rows[:, :1]).all()
        taken[torch.arange(5), rows[:, 0].long()] += 1
    assert (taken.diagonal() == 0).all()  # never itself
    assert (taken + 200 * torch.eye(5)).flatten().tolist() == pytest.approx([200] * 25, abs=60)


def test_resampled_from_data_and_of_token_ids():
    data, ids = torch.arange(100.0)[:, None], torch.randint(9, (4, 3))
    drawn = resampled((data, data), generator=seeded())((torch.zeros(50, 1), torch.zeros(50, 1)))
    assert torch.equal(*drawn)  # both tensors of one example
    assert len(drawn[0].unique()) > 20
    assert resampled()(ids).dtype == torch.long


def test_mixture_draws_a_kind_for_each_example():
    draw = mixture(0.0, 1.0, lambda x: x.mean() + 1, weights=(1, 2, 1), generator=seeded())
    drawn = draw(torch.ones(4000, 2, 3))
    assert (drawn == drawn[:, :1, :1]).all()
    counts = torch.bincount(drawn[:, 0, 0].long()) / 4000
    assert counts.tolist() == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    pair = mixture((0.0, 10.0), (1.0, 11.0), generator=seeded())((torch.zeros(9, 2), torch.zeros(9, 1)))
    assert torch.equal(pair[0][:, :1] + 10, pair[1])  # one kind for all tensors of an example


@pytest.mark.parametrize("make", [noise, resampled, lambda generator: mixture(0.0, 1.0, generator=generator)])
def test_drawn_baselines_repeat_with_their_generator_and_never_touch_another(make):
    before = torch.random.get_rng_state()
    first, second = (make(generator=seeded())(ROWS) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)
    draw = make(generator=seeded())
    draw(ROWS)
    assert not torch.equal(draw(ROWS), first)


def test_generators_of_a_mixture_are_those_of_its_parts():
    a, b, c = seeded(1), seeded(2), seeded(3)
    baselines = mixture(noise(generator=a), mixture(resampled(generator=b), 0.0), generator=c)
    assert generators_of(baselines) == [c, a, b]
    assert generators_of(0.0) == []
    model = smooth_net()
    for regularizer in (
        InsertionDeletion(IntegratedGradients(model), baselines=baselines),
        RightForTheRightReasons(model, explainer=KernelShap(model), attribute_kwargs={"baselines": baselines}),
        Stability(model, MaskedNeighbors(baselines)),
    ):
        assert regularizer.generators == [c, a, b]


# --- where they are used -------------------------------------------------------------------------------------------


def test_metrics_call_baselines_with_the_inputs():
    net, phi = smooth_net(), torch.randn(8, 6, dtype=torch.float64, generator=G)
    by_function = insertion_deletion(net, ROWS, phi, target=Y, baselines=lambda x: 0.5 * x)
    by_values = insertion_deletion(net, ROWS, phi, target=Y, baselines=0.5 * ROWS)
    torch.testing.assert_close(by_function[:5], by_values[:5])
    arguments = {"target": Y, "n_samples": 10}
    values = [
        sensitivity_n(net, ROWS, phi, 2, baselines=each, generator=seeded(), **arguments)
        for each in (resampled(generator=seeded()), resampled(generator=seeded())(ROWS))
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("of", ["insertion and deletion", "right reasons", "stability"])
def test_regularizers_draw_baselines_for_the_explainer_and_the_copies(of):
    def make(model, baselines):
        if of == "insertion and deletion":
            return InsertionDeletion(IntegratedGradients(model), baselines=baselines, steps_per_update=None)
        if of == "stability":
            return Stability(model, MaskedNeighbors(baselines), n_neighbors=4, generator=seeded(5))
        given = {"baselines": baselines, "n_steps": 5}
        return RightForTheRightReasons(model, explainer=IntegratedGradients(model), attribute_kwargs=given)

    model = smooth_net()
    baselines = mixture(0.0, noise(generator=seeded(1)), resampled(generator=seeded(2)), generator=seeded(3))
    fixed = mixture(0.0, noise(generator=seeded(1)), resampled(generator=seeded(2)), generator=seeded(3))(ROWS)
    ours, expected = (make(model, given)(ROWS, Y, torch.eye(8, 6)) for given in (baselines, fixed))
    for name, term in expected.items():
        torch.testing.assert_close(ours[name], term)


def test_killed_run_with_drawn_baselines_resumes_bit_for_bit(tmp_path):
    def trainer(folder):
        model = smooth_net()
        baselines = mixture(0.0, noise(generator=seeded(1)), generator=seeded(2))
        regularizer = InsertionDeletion(IntegratedGradients(model), baselines=baselines, insertion_weight=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ExplanationRegularizedTrainer(
            model, optimizer, [regularizer], cross_entropy, checkpoint_dir=folder, show_progress=False
        )

    batches = [(ROWS, Y)] * 2
    whole = trainer(tmp_path / "whole")
    whole.fit(batches, batches, epochs=2)
    trainer(tmp_path / "killed").fit(batches, batches, epochs=1)
    resumed = trainer(tmp_path / "killed")
    resumed.resume()
    resumed.fit(batches, batches, epochs=2)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_draws_the_same_baselines_each_time():
    model = nn.Sequential(nn.Linear(6, 3)).double()
    for baselines in (noise(), noise(generator=seeded())):
        judge = InsertionDeletion(IntegratedGradients(model), baselines=baselines)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = ExplanationRegularizedTrainer(model, optimizer, evaluation=judge, show_progress=False)
        assert trainer.evaluate([(ROWS, Y)]) == trainer.evaluate([(ROWS, Y)])
