"""Schedules of the regularizers' weights."""

from __future__ import annotations

import pytest

from captum_idexpo.training import linear_warmup


def test_linear_warmup_rises_linearly_and_ends_at_one():
    assert [linear_warmup(4)(update) for update in (0, 1, 3, 4, 100)] == [0, 0.25, 0.75, 1, 1]


def test_linear_warmup_refuses_zero_updates():
    with pytest.raises(ValueError, match="n_updates"):
        linear_warmup(0)
