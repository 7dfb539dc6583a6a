"""Seeing whether a graph reaches anything but the tensors that were made its leaves."""

from __future__ import annotations

import torch

from captum_idexpo.attr._graph import depends_on_leaf


def test_a_leaf_is_found_behind_any_number_of_steps():
    made, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    only_made = (made * 2).exp()
    both = (only_made * weight).sum()
    assert not depends_on_leaf(only_made, except_for=[made])
    assert depends_on_leaf(both, except_for=[made])
    assert depends_on_leaf(only_made, except_for=[])


def test_leaves_themselves_and_constants():
    weight = torch.ones(2, requires_grad=True)
    assert depends_on_leaf(weight, except_for=[])
    assert not depends_on_leaf(weight, except_for=[weight])
    assert not depends_on_leaf(torch.ones(2), except_for=[])
