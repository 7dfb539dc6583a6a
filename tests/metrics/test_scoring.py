"""Each score of each kind of output, against probabilities written out."""

from __future__ import annotations

import pytest
import torch

from captum_idexpo._core.targets import class_labels
from captum_idexpo.metrics._scoring import TargetScorer, predicted_class

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]], dtype=torch.float64)
COLUMN = torch.tensor([[0.7], [-1.2]], dtype=torch.float64)
KINDS = {
    "logits": (lambda z: z, lambda z: z),
    "log_probabilities": (lambda z: z.log_softmax(1), lambda z: torch.nn.functional.logsigmoid(z)),
    "probabilities": (lambda z: z.softmax(1), lambda z: z.sigmoid()),
}


def score(forward, logits, target, outputs, kind):
    scorer = TargetScorer(forward, (logits,), target, outputs=outputs)
    return scorer((logits,), slice(None), 1, kind)


@pytest.mark.parametrize("outputs", KINDS)
def test_target_scorer_gives_probability_logarithm_and_log_complement(outputs):
    multiclass, binary = KINDS[outputs]
    p = LOGITS.softmax(1)[[0, 1], [2, 0]]
    q = torch.stack([1 - COLUMN[0, 0].sigmoid(), COLUMN[1, 0].sigmoid()])
    for forward, logits, target, expected in (
        (multiclass, LOGITS, [2, 0], p),
        (binary, COLUMN, [0, 1], q),
        (lambda z: binary(z)[:, 0], COLUMN, [0, 1], q),
    ):
        torch.testing.assert_close(score(forward, logits, target, outputs, "probability"), expected)
        torch.testing.assert_close(score(forward, logits, target, outputs, "log_probability"), expected.log())
        torch.testing.assert_close(score(forward, logits, target, outputs, "log_complement"), (1 - expected).log())


@pytest.mark.parametrize("columns", [1, 3])
def test_target_scorer_logarithms_of_confident_logits_are_finite(columns):
    logits = torch.full((2, columns), -300.0).requires_grad_()
    sure = logits + torch.tensor([600.0] + [0.0] * (columns - 1))
    for kind in ("log_probability", "log_complement"):
        for target in (0, 1):
            values = TargetScorer(lambda z: z, (sure.detach(),), target)((sure,), slice(None), 1, kind)
            assert values.isfinite().all()
            assert torch.autograd.grad(values.sum(), logits, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize(("columns", "target"), [(3, 1), (1, 0)])
def test_log_complement_of_probabilities_near_one_is_that_of_logits(columns, target):
    """1 - p is 0 there in single precision, and so would be its gradient."""
    forward = KINDS["probabilities"][int(columns == 1)]
    logits = torch.tensor([[0.5, 25.0, -1.0]] if columns == 3 else [[-25.0]]).requires_grad_()
    values = [
        TargetScorer(of, (logits.detach(),), target, outputs=outputs)((logits,), slice(None), 1, "log_complement")
        for of, outputs in ((forward, "probabilities"), (lambda z: z, "logits"))
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), logits)[0] for value in values))


def test_target_scorer_returns_raw_outputs_unchanged():
    assert score(lambda z: z, LOGITS, [2, 0], "raw", "log_probability").tolist() == [0.5, 3.0]


def test_predicted_class_of_each_kind_of_outputs():
    assert predicted_class(LOGITS, "logits").tolist() == [0, 0]
    assert predicted_class(COLUMN, "logits").tolist() == [1, 0]
    assert predicted_class(COLUMN[:, 0].sigmoid(), "probabilities").tolist() == [1, 0]
    assert predicted_class(torch.nn.functional.logsigmoid(COLUMN), "log_probabilities").tolist() == [1, 0]
    with pytest.raises(ValueError, match="no predicted class"):
        predicted_class(COLUMN, "raw")
    with pytest.raises(ValueError, match="no single predicted class"):
        predicted_class(torch.zeros(2, 3, 4), "logits")


def test_class_labels_of_a_binary_loss_become_integers():
    assert class_labels(torch.tensor([[0.0], [1.0]])).tolist() == [0, 1]
    assert class_labels(torch.tensor([True, False])).dtype == torch.int64
    assert class_labels(torch.tensor([0.5, 1.0])).dtype == torch.float32
    assert class_labels(torch.tensor([2.0, 1.0])).dtype == torch.float32
    assert class_labels([0, 1]) == [0, 1]
