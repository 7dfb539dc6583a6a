"""Copies of a batch in chunks: every row once, in its place, never more than asked for."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.forward import BatchForward, evaluate_batches, evaluate_copies
from captum_idexpo.attr import KernelShap, Lime
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.metrics import insertion


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 70))
def test_evaluate_copies_evaluates_each_copy_of_each_example_once(n_examples, n_copies, max_rows):
    values = torch.arange(n_examples * n_copies).view(n_copies, n_examples).double()
    sizes = []

    def perturb(examples, copies):
        return (values[copies, examples, None],)

    def evaluate(rows, examples, n):
        sizes.append(len(rows[0]))
        assert len(rows[0]) == n * (examples.stop - examples.start)
        return rows[0][:, 0]

    assert torch.equal(evaluate_copies(evaluate, perturb, n_examples, n_copies, max_rows), values.T)
    assert max(sizes) <= max_rows
    assert sum(sizes) == n_examples * n_copies


@pytest.mark.parametrize("target", [None, 1, torch.tensor(1), torch.tensor([0, 1, 0]), [0, 1, 0], [(0,), (1,), (0,)]])
def test_batch_forward_passes_arguments_with_their_examples(target):
    seen = []

    def forward(x, of_batch, single, scalar, text, a_list):
        seen.append((x, of_batch, a_list))
        assert single.shape == (1, 2)
        assert scalar.dim() == 0
        assert text == "as it is"
        return torch.stack([x[:, 0], x[:, 0] + 100], dim=1)

    arguments = (torch.tensor([10.0, 20.0, 30.0]), torch.zeros(1, 2), torch.tensor(1.0), "as it is", ["a", "b", "c"])
    batch = BatchForward(forward, arguments, 3, target)
    rows = (torch.tensor([[2.0], [3.0], [2.5], [3.5]]),)  # two copies of examples 1 and 2
    output = batch(rows, slice(1, 3), 2)
    assert seen[0][1].tolist() == [20.0, 30.0, 20.0, 30.0]
    assert seen[0][2] == ["a", "b", "c"]
    chosen = {"list": [1, 0, 1, 0]}.get(type(target).__name__)
    if isinstance(target, torch.Tensor) and target.dim():
        chosen = [1, 0, 1, 0]
    if target is None:
        assert output.shape == (4, 2)
    else:
        columns = chosen or [1, 1, 1, 1]
        assert output.tolist() == [float(row[0]) + 100 * c for row, c in zip(rows[0], columns, strict=True)]


def test_batch_forward_targets_follow_the_chunk_and_the_number_of_copies():
    batch = BatchForward(lambda x: torch.stack([x[:, 0], x[:, 0] + 100], dim=1), None, 3, torch.tensor([0, 1, 0]))
    for examples, n_copies, chosen in (
        (slice(0, 2), 2, [0, 1, 0, 1]),
        (slice(0, 2), 2, [0, 1, 0, 1]),
        (slice(1, 3), 2, [1, 0, 1, 0]),
        (slice(1, 3), 1, [1, 0]),
        (slice(0, 3), 1, [0, 1, 0]),
    ):
        output = batch((torch.zeros(len(chosen), 1),), examples, n_copies)
        assert output.tolist() == [100.0 * c for c in chosen]


def test_batch_forward_reads_a_target_of_one_element_as_a_number():
    """As in Captum, so that it chooses from outputs of any number of axes, whatever the number of rows."""
    output = torch.arange(24.0).view(4, 2, 3)
    batch = BatchForward(lambda x: output, None, 1, torch.tensor([1]))
    assert torch.equal(batch((torch.zeros(4, 1),), slice(0, 1), 4), output[:, 1])


def test_batch_forward_keeps_arguments_in_channels_last_format():
    seen = []
    image = torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last)
    batch = BatchForward(lambda x, image: seen.append(image) or x, image, 3)
    for n_copies in (1, 2, 200):
        batch((torch.zeros(2 * n_copies, 1),), slice(1, 3), n_copies)
        assert seen[-1].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(seen[-1], torch.cat([image[1:]] * n_copies))


@pytest.mark.parametrize("at_a_time", [1, 2, 5, 7])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_evaluate_batches_gives_the_output_of_each_copy(at_a_time, shape):
    values = torch.arange(5 * 3.0).view(5, 3)
    output = {(): lambda x: x.sum(), (3,): lambda x: x, (3, 2): lambda x: torch.stack([x, -x], dim=1)}[shape]
    if shape == ():
        at_a_time = 1
    outputs = evaluate_batches(
        lambda rows, n: output(*rows), lambda chunk: (values[chunk],), 5, at_a_time, output(values[0])
    )
    assert torch.equal(outputs, torch.stack([output(row) for row in values]))


def test_evaluate_batches_refuses_outputs_that_do_not_grow_with_copies():
    with pytest.raises(InputError, match="perturbations_per_eval=1"):
        evaluate_batches(lambda rows, n: rows[0].sum(), lambda chunk: (torch.zeros(3, 4),), 3, 3, torch.tensor(0.0))


def masked_lime(forward_func, x, arguments, target=None):
    torch.manual_seed(0)
    return Lime(forward_func, Ridge(0.1)).attribute(x, None, target, arguments, n_samples=60)


@pytest.mark.filterwarnings("ignore:The attribution of")
def test_additional_forward_args_lists_are_passed_whole_as_in_captum():
    torch.manual_seed(0)
    w, shift = torch.randn(4), torch.randn(1, 4)

    def forward(x, shifts):
        return (x + sum(shifts)).tanh() @ w

    x = torch.randn(1, 4)
    torch.manual_seed(0)
    expected = captum.attr.KernelShap(forward).attribute(x, additional_forward_args=([shift],), n_samples=40)
    torch.manual_seed(0)
    ours = KernelShap(forward).attribute(x, additional_forward_args=([shift],), n_samples=40)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)

    def raised(x, numbers):
        return x @ w + sum(numbers)

    for n in (1, 2, 3):  # however many examples there are
        x = torch.ones(n, 4)
        scores = insertion(raised, x, x, additional_forward_args=([1.0, 2.0],), outputs="raw", step_size=1)
        plain = insertion(lambda x: x @ w, x, x, outputs="raw", step_size=1)
        torch.testing.assert_close(scores, plain + 3)


@pytest.mark.filterwarnings("ignore:You are providing multiple inputs")
@pytest.mark.parametrize("n_classes", [2, 3])
def test_additional_forward_args_tensor_of_one_row_goes_with_its_example(n_classes):
    torch.manual_seed(0)
    net, temperature, x = nn.Linear(6, n_classes), torch.tensor([1.5]), torch.randn(1, 6)

    def own(x, t):
        return net(x) / t[:, None]

    def bound(x):
        return net(x) / temperature

    torch.testing.assert_close(masked_lime(own, x, (temperature,), 1), masked_lime(bound, x, None, 1))
    scores = insertion(own, x, x, target=1, additional_forward_args=(temperature,))
    torch.testing.assert_close(scores, insertion(bound, x, x, target=1))
