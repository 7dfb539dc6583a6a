"""Batches of any form, and the additional arguments that go with them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from captum_idexpo import Batch
from captum_idexpo._core.batch import as_side_inputs, unpacked

X, Y, A = torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Y), Batch(X, Y)),
        ([X, Y, A], Batch(X, Y, A)),
        ({"inputs": X, "target": Y}, Batch(X, Y)),
        ({"target": Y, "inputs": X, "additional_forward_args": (A,)}, Batch(X, Y, None, (A,))),
        (Batch(X, Y, A, A), Batch(X, Y, A, A)),
        (([X, A], Y), Batch((X, A), Y)),
    ],
)
def test_batch_is_read_by_position_or_field_name(batch, expected):
    read = unpacked(batch, None)
    assert type(read) is Batch
    assert repr(read) == repr(expected)


def test_unpack_reads_batches_of_any_other_form():
    def unpack(batch):
        return Batch(batch["image"], batch["label"], additional_forward_args=batch["age"])

    read = unpacked({"image": X, "label": Y, "age": A}, unpack)
    assert read.inputs is X
    assert read.additional_forward_args is A
    assert unpacked({"image": X, "label": Y}, lambda batch: (batch["image"], batch["label"])).target is Y
    assert unpacked(read, unpack) is read  # a Batch is taken as it is


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (X, "a Tensor"),
        ((X,), "a tuple of 1"),
        ((X, Y, A, A), "a tuple of 4"),
        ({"input_ids": X, "labels": Y}, "a mapping of input_ids, labels"),
        ({"inputs": X, "target": Y, "mask": A}, "a mapping of inputs, target, mask"),
        ({"inputs": X}, "a mapping of inputs"),
    ],
)
def test_batch_of_another_form_is_refused_and_unpack_is_named(batch, given):
    with pytest.raises(TypeError, match=rf"(?s)The loader must yield.*given: {given}.*unpack=lambda batch") as raised:
        unpacked(batch, None)
    assert "\n" in str(raised.value)
    with pytest.raises(TypeError, match=rf"unpack must return a captum_idexpo.Batch.*given: {given}"):
        unpacked(None, lambda _: batch)


def test_side_inputs_are_tensors_with_one_row_per_example_or_other_values():
    assert as_side_inputs(None, 3) == ()
    assert as_side_inputs(A, 3) == (A,)
    given = (Y, 2.5, None, "text", ["a"])
    assert as_side_inputs(given, 3) is given


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(1, 3), torch.tensor(1.5)])
def test_side_inputs_of_another_length_are_refused_and_partial_is_named(tensor):
    with pytest.raises(
        ValueError, match=r"additional_forward_args\[1\].*one row for each of the 3.*functools\.partial"
    ):
        as_side_inputs((A, tensor), 3)


@pytest.mark.parametrize("nested", [[A, A], {"mask": A}, (A,)])
def test_side_inputs_inside_other_objects_are_refused(nested):
    with pytest.raises(TypeError, match=rf"\[0\] is a {type(nested).__name__} of tensors.*pass each tensor by itself"):
        as_side_inputs((nested,), 3)


class Examples(Dataset):
    def __getitem__(self, index):
        return Batch(X[index], Y[index], A[index], (A[index], Y[index]))

    def __len__(self):
        return 3


def test_batch_is_collated_by_a_data_loader():
    """Which makes a list of a tuple of side inputs."""
    (batch,) = [unpacked(batch, None) for batch in DataLoader(Examples(), batch_size=3)]
    assert torch.equal(batch.inputs, X)
    mask, number = as_side_inputs(batch.additional_forward_args, 3)
    assert torch.equal(mask, A)
    assert torch.equal(number, Y)
