"""Masked accuracy against a loop over examples, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from captum_idexpo import NonFiniteError
from captum_idexpo.metrics import masked_accuracy
from tests.helpers import Spy, smooth_conv_net, smooth_net

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 6, generator=G), torch.arange(12) % 3
IMAGES = torch.randn(5, 2, 6, 6, generator=G)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("share", "n_masked"), [(0.0, 0), (0.25, 2), (0.3, 2), (0.5, 3), (0.75, 4), (1.0, 6)])
def test_masked_accuracy_masks_exactly_the_share_and_compares_with_the_label(share, n_masked):
    spy = Spy(smooth_net().float())
    right = masked_accuracy(spy, X, Y, baselines=9.0, share=share, generator=seeded())
    (rows,) = spy.rows
    assert ((rows == 9).sum(1) == n_masked).all()
    assert torch.equal(rows[rows != 9], X[rows != 9])
    expected = [float(int(spy.model(row[None]).argmax()) == label) for row, label in zip(rows, Y.tolist(), strict=True)]
    assert right.tolist() == expected


def test_masked_accuracy_masks_every_feature_equally_often():
    spy, counts, generator = Spy(smooth_net().float()), torch.zeros(6), seeded()
    for _ in range(100):
        masked_accuracy(spy, X, Y, baselines=9.0, generator=generator)
        counts += (spy.rows[0] == 9).sum(0)
    assert counts.tolist() == pytest.approx([600] * 6, abs=80)


def test_masked_accuracy_of_images_masks_pixels_or_groups():
    spy = Spy(smooth_conv_net().float().eval())
    masked_accuracy(spy, IMAGES, 1, baselines=9.0)
    assert torch.equal(spy.rows[0][:, 0] == 9, spy.rows[0][:, 1] == 9)  # all channels of a pixel
    assert ((spy.rows[0][:, 0] == 9).sum((1, 2)) == 18).all()
    cells = torch.arange(6).view(6, 1).expand(6, 6)  # rows of pixels
    masked_accuracy(spy, IMAGES, 1, baselines=9.0, feature_mask=cells, share=0.34)
    rows = spy.rows[0][:, 0] == 9
    assert ((rows.sum((1, 2)) == 12) & (rows == rows[..., :1]).all((1, 2))).all()


def test_masked_accuracy_counts_the_groups_that_an_example_has():
    spy = Spy(smooth_net().float())
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 3, 4, 5, 6, 7]])
    masked_accuracy(spy, X[:2], Y[:2], baselines=9.0, feature_mask=mask)
    assert (spy.rows[0] == 9).sum(1).tolist() == [3, 3]


def test_masked_accuracy_masks_a_tuple_of_inputs_together():
    spy = Spy(lambda a, b: a.sum(1) + b.sum(1))
    masked_accuracy(spy, (X, X[:, :2]), Y % 2, baselines=(9.0, 7.0), share=0.5)
    a, b = spy.rows
    assert ((a == 9).sum(1) + (b == 7).sum(1)).tolist() == [4] * 12


@pytest.mark.parametrize(
    ("outputs", "transform"),
    [("logits", None), ("log_probabilities", lambda z: z.log_softmax(1)), ("probabilities", lambda z: z.softmax(1))],
)
def test_masked_accuracy_agrees_for_all_kinds_of_outputs_and_targets(outputs, transform):
    net = smooth_net().float()
    forward = net if transform is None else lambda x: transform(net(x))
    expected = masked_accuracy(net, X, Y, generator=seeded())
    for target in (Y, Y.tolist(), Y[:, None], torch.nn.functional.one_hot(Y).float()):
        assert torch.equal(masked_accuracy(forward, X, target, outputs=outputs, generator=seeded()), expected)


def test_masked_accuracy_of_one_column_and_of_labels():
    net = nn.Linear(6, 1)
    two = lambda x: torch.cat([torch.zeros(len(x), 1), net(x)], dim=1)  # noqa: E731
    expected = masked_accuracy(two, X, Y % 2, generator=seeded())
    assert torch.equal(masked_accuracy(net, X, Y % 2, generator=seeded()), expected)
    assert torch.equal(masked_accuracy(net, X, (Y % 2).float()[:, None], generator=seeded()), expected)
    labels = nn.Linear(6, 4)
    target = torch.randint(2, (12, 4), generator=G)
    spy = Spy(labels)
    share = masked_accuracy(spy, X, target, outputs="multilabel", generator=seeded())
    torch.testing.assert_close(share, ((labels(spy.rows[0]) > 0) == target.bool()).float().mean(1))
    single = masked_accuracy(labels, X, Y, outputs="multilabel", generator=seeded())
    assert torch.equal(single, (labels(spy.rows[0]) > 0).gather(1, Y[:, None])[:, 0].float())


def test_masked_accuracy_repeats_with_its_generator_and_for_any_chunk_size():
    net = smooth_net().float()
    results = [masked_accuracy(net, X, Y, generator=seeded(), max_examples_per_batch=n) for n in (None, 1, 5)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not results[0].requires_grad


def test_masked_accuracy_passes_side_inputs_and_calls_baselines():
    shift = torch.randn(12, 6, generator=G)
    net = smooth_net().float()
    first = masked_accuracy(lambda x, s: net(x + s), X, Y, additional_forward_args=shift, generator=seeded())
    assert first.shape == (12,)
    spy = Spy(net)
    masked_accuracy(spy, X, Y, baselines=lambda x: -x, generator=seeded())
    assert ((spy.rows[0] == X) | (spy.rows[0] == -X)).all()
    assert ((spy.rows[0] == -X).sum(1) == 3).all()


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, r"share must be a number in \[0, 1\]", {"share": 1.5}),
        (ValueError, r"share must be a number in \[0, 1\]", {"share": True}),
        (ValueError, "outputs='raw'", {"outputs": "raw"}),
        (ValueError, "needs classes", {"outputs": lambda output, target: output}),
        (ValueError, "outputs must be one of", {"outputs": "scores"}),
        (ValueError, "needs the labels", {"target": None}),
        (ValueError, "12 examples", {"target": Y[:5]}),
        (IndexError, "out of range", {"target": Y + 3}),
        (TypeError, r"argmax\(dim=1\)", {"target": torch.ones(12, 3, dtype=torch.long)}),
        (ValueError, "NaN or infinity in inputs", {"inputs": X / 0}),
        (ValueError, "max_examples_per_batch", {"max_examples_per_batch": 0}),
    ],
)
def test_masked_accuracy_errors_name_bad_arguments(error, text, arguments):
    given = {"inputs": X, "target": Y, **arguments}
    with pytest.raises(error, match=text):
        masked_accuracy(smooth_net().float(), **given)


def test_masked_accuracy_refuses_labels_of_another_number_and_nan():
    with pytest.raises(ValueError, match="has 4 labels, the output 3 columns"):
        masked_accuracy(smooth_net().float(), X, torch.ones(12, 4), outputs="multilabel")
    with pytest.raises(NonFiniteError, match="NaN on a masked input"):
        masked_accuracy(lambda x: torch.where((x == 0).any(1, keepdim=True), torch.nan, x), X, Y)
