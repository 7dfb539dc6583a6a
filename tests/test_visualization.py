"""Figures hold what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_idexpo.metrics import insertion_deletion
from captum_idexpo.visualization import plot_curves, plot_explanations, plot_history
from tests.helpers import smooth_conv_net

X = torch.rand(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("masked", [False, True])
def test_curves_are_means_over_the_examples(masked):
    mask = torch.randint(5, (3, 1, 6, 6)) if masked else None
    scores = insertion_deletion(smooth_conv_net(), X, X[:, :1], feature_mask=mask, target=1)
    figure = plot_curves({"a": scores, "b": scores})
    insertion, deletion = figure.axes
    assert [line.get_label() for line in insertion.lines] == [
        f"{name} ({scores.insertion.detach().mean():.2f})" for name in "ab"
    ]
    np.testing.assert_allclose(insertion.lines[0].get_ydata(), scores.insertion_curve.detach().mean(0))
    np.testing.assert_allclose(deletion.lines[1].get_ydata(), scores.deletion_curve.detach().mean(0))
    assert len(insertion.lines[0].get_xdata()) == scores.insertion_curve.shape[1]


def test_explanations_stand_beside_their_images():
    maps = torch.randn(3, 1, 6, 6, requires_grad=True)
    figure = plot_explanations(X[:, :1], {"before": maps, "after": 0 * maps}, {"before": "abc", "after": "def"})
    assert len(figure.axes) >= 9
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "before\na", "after\nd", "b", "e", "c", "f"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), X[0, 0], atol=1e-6)


def test_a_history_without_validation_has_losses_only():
    losses, scores = plot_history([{"epoch": 1, "loss": 0.7, "task": 0.6}]).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "task"]
    assert not scores.lines
