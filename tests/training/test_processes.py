"""Two gloo processes on one machine: the same scores as one, and a failure in one stops both."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import Fidelity, GaussianNeighbors, InsertionDeletion, RightForTheRightReasons
from tests.helpers import smooth_conv_net
from tests.launch import run_together

X = torch.randn(22, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (22,), generator=torch.Generator().manual_seed(0))
REGULARIZERS = ("LIME", "shared", "Grad-CAM", "RRR", "Fidelity")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(X[:13], Y[:13]))


def joined(pairs):
    return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))


def everything():
    """What each process finds."""
    accelerator = Accelerator(cpu=True)
    found = training(accelerator)
    found["wrapped"] = sum(isinstance(module, DistributedDataParallel) for module in gc.get_objects())
    if accelerator.num_processes > 1:
        found["error"] = error_of_one(make_trainer(accelerator))
        torch.distributed.destroy_process_group()
    return found


def make_trainer(accelerator):
    net = smooth_conv_net()
    net[3].p = 0.0
    regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    return ExplanationRegularizedTrainer(net, optimizer, [regularizer], accelerator=accelerator, show_progress=False)


def training(accelerator):
    """What each process finds while the trainer lives."""
    trainer = make_trainer(accelerator)
    n_processes, rank = accelerator.num_processes, accelerator.process_index
    found = {"evaluate": trainer.evaluate(DataLoader(TensorDataset(X, Y), batch_size=4)), **loader_scores(trainer)}
    found["counts"] = regression_scores(accelerator)
    batches = DataLoader(TensorDataset(X[:16], Y[:16]), batch_size=8 // n_processes)
    found["history"] = trainer.fit(batches, epochs=2)
    found["weight"] = trainer.model[0].weight.flatten().tolist()
    found["gradients"] = {name: gradients(name, rank, n_processes) for name in REGULARIZERS}
    return found


def loader_scores(trainer):
    """The scores of each example of several kinds of loaders, by their names."""
    # More examples than whole batches, fewer than the data set has; and items of two examples each.
    some = SubsetRandomSampler(range(13), generator=torch.Generator().manual_seed(0))
    items = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]
    loaders = {
        "sampled": DataLoader(TensorDataset(X, Y), batch_size=2, sampler=some),
        "joined": DataLoader(
            items, batch_size=2, collate_fn=lambda pairs: tuple(map(torch.cat, zip(*pairs, strict=True)))
        ),
        # Streams, whose batches the first process hands out, as it does for all loaders if told to.
        "stream": DataLoader(Stream(), batch_size=2),
        "dispatched": DataLoader(TensorDataset(X[:13], Y[:13]), batch_size=2),
    }
    found = {}
    for name, loader in loaders.items():
        if name == "dispatched" and trainer.accelerator.num_processes > 1:
            trainer.accelerator.dataloader_config.dispatch_batches = True
        found[name] = {score: values.tolist() for score, values in trainer.example_scores(loader).items()}
    trainer.accelerator.dataloader_config.dispatch_batches = None
    return found


def regression_scores(accelerator):
    """The scores of whole numbers of a regression, of which one process sees zeros and ones alone."""
    column = nn.Sequential(nn.Flatten(), nn.Linear(72, 1), nn.Flatten(0)).double()
    nn.init.constant_(column[1].weight, 0.01)
    nn.init.zeros_(column[1].bias)
    trainer = ExplanationRegularizedTrainer(
        column,
        torch.optim.SGD(column.parameters(), lr=0.01),
        [],
        lambda output, target: mse_loss(output, target.double()),
        accelerator=accelerator,
        show_progress=False,
    )
    counts = TensorDataset(X[:8], torch.tensor([0, 1, 1, 0, 2, 3, 4, 5]))
    return trainer.evaluate(DataLoader(counts, batch_size=8 // accelerator.num_processes))


def make_regularizer(name, net):
    """A regularizer whose random numbers have to be those of one process."""
    generator = torch.Generator().manual_seed(5)
    if name == "RRR":
        return RightForTheRightReasons(net, weight=0.3)
    if name == "Fidelity":
        return Fidelity(net, GaussianNeighbors(one_dimensional=True), generator=generator)
    if name == "Grad-CAM":
        explainer = LayerGradCam(net, net[4])
        return InsertionDeletion(explainer, baselines=0.0, step_size=6, steps_per_update=2, generator=generator)
    arguments = {"sampling": "independent", "n_samples": 9}
    return InsertionDeletion(
        Lime(net, Ridge(0.1), MaskSimilarity()),
        baselines=0.0,
        feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
        steps_per_update=2 if name == "LIME" else 4,
        attribute_kwargs=arguments | ({"share_masks": True} if name == "shared" else {}),
        generator=generator,
    )


def gradients(name, rank, n_processes):
    """The gradients of one global batch, of which each process has its share."""
    net = smooth_conv_net()
    module = ExplanationRegularizedLoss(net, [make_regularizer(name, net)])
    if n_processes > 1:
        module = DistributedDataParallel(module, static_graph=True)
    own = slice(rank * 8 // n_processes, (rank + 1) * 8 // n_processes)
    for _ in range(2):  # a second step, since a static graph is learned from the first
        net.zero_grad()
        total, _ = module((X[own], Y[own], (X[own] > 0).double()))
        total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).tolist()


def error_of_one(trainer):
    """The error of each process if one of them has a NaN."""
    x = X.clone()
    x[:1] = torch.nan  # in the first process's part only
    with pytest.raises(NonFiniteError) as error:
        trainer.fit(DataLoader(TensorDataset(x, Y), batch_size=4))
    torch.distributed.barrier()  # both are still here
    return str(error.value)


@pytest.fixture(scope="module")
def results():
    return [run_together(n_processes, everything) for n_processes in (1, 2)]


def without_times(row):
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


def test_scores_do_not_depend_on_the_number_of_processes(results):
    [one], two = results
    assert len(two) == 2
    for process in two:
        assert process["evaluate"] == pytest.approx(one["evaluate"], abs=1e-12)
        assert process["counts"] == pytest.approx(one["counts"], abs=1e-12)


@pytest.mark.parametrize(("name", "n_examples"), [("sampled", 13), ("joined", 8), ("stream", 13), ("dispatched", 13)])
def test_scores_hold_every_example_of_a_loader_once_in_two_processes(results, name, n_examples):
    [one], two = results
    for process in two:
        for score, values in one[name].items():
            assert len(values) == n_examples
            assert process[name][score] == pytest.approx(values, abs=1e-12)


def test_training_does_not_depend_on_the_number_of_processes(results):
    """The same examples in an update, shared out: the same loss and parts, the same weights."""
    [one], two = results
    for process in two:
        assert process["weight"] == pytest.approx(one["weight"], abs=1e-12)
        for ours, theirs in zip(process["history"], one["history"], strict=True):
            assert without_times(ours) == pytest.approx(without_times(theirs), abs=1e-12)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_do_not_depend_on_the_number_of_processes(results, name):
    """Under DDP with a static graph; what is drawn for an example is drawn for it, not for its process."""
    [one], two = results
    for process in two:
        assert process["gradients"][name] == pytest.approx(one["gradients"][name], abs=1e-9)


def test_nothing_holds_the_wrapped_loss_once_the_trainer_is_gone(results):
    """It would keep the connections between the processes open until Python shuts down."""
    _, two = results
    assert [process["wrapped"] for process in two] == [0, 0]


def test_failure_in_one_process_stops_both(results):
    _, two = results
    errors = sorted(process["error"] for process in two)
    assert any("Another process" in error for error in errors)
    assert any("'task'" in error for error in errors)
    assert all("epoch 1, step 1" in error for error in errors)
