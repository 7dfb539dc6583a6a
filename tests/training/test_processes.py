"""Two gloo processes on one machine: the same scores as one, and a failure in one stops both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, NonFiniteError
from captum_idexpo.attr import LayerGradCam, Lime, MaskSimilarity
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.regularizers import Fidelity, GaussianNeighbors, InsertionDeletion, RightForTheRightReasons
from tests.helpers import smooth_conv_net

generator = torch.Generator().manual_seed(0)
x = torch.randn(22, 2, 6, 6, dtype=torch.float64, generator=generator)
y = torch.randint(3, (22,), generator=generator)
net = smooth_conv_net()
net[3].p = 0.0
regularizer = InsertionDeletion(LayerGradCam(net, net[4]), baselines=0.0, step_size=6)
trainer = ExplanationRegularizedTrainer(
    net,
    torch.optim.SGD(net.parameters(), lr=0.01),
    [regularizer],
    accelerator=Accelerator(cpu=True),
    show_progress=False,
)
result = {"evaluate": trainer.evaluate(DataLoader(TensorDataset(x, y), batch_size=4))}
processes = trainer.accelerator.num_processes
# More examples than whole batches, fewer than the data set has; and items of two examples each.
some = torch.utils.data.SubsetRandomSampler(range(13), generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(x, y), batch_size=2, sampler=some)
result["sampled"] = {name: values.tolist() for name, values in trainer.example_scores(loader).items()}
items = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
joined = DataLoader(items, batch_size=2, collate_fn=lambda pairs: tuple(map(torch.cat, zip(*pairs))))
result["joined"] = {name: values.tolist() for name, values in trainer.example_scores(joined).items()}
# Streams, whose batches the first process hands out, as it does for all loaders if told to.
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(x[:13], y[:13]))


loader = DataLoader(Stream(), batch_size=2)
result["stream"] = {name: values.tolist() for name, values in trainer.example_scores(loader).items()}
if processes > 1:
    trainer.accelerator.dataloader_config.dispatch_batches = True
loader = DataLoader(TensorDataset(x[:13], y[:13]), batch_size=2)
result["dispatched"] = {name: values.tolist() for name, values in trainer.example_scores(loader).items()}
trainer.accelerator.dataloader_config.dispatch_batches = None
# Whole numbers of a regression, of which one process sees zeros and ones alone.
column = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 1), torch.nn.Flatten(0)).double()
torch.nn.init.constant_(column[1].weight, 0.01)
regression = ExplanationRegularizedTrainer(
    column,
    torch.optim.SGD(column.parameters(), lr=0.01),
    [],
    lambda output, target: torch.nn.functional.mse_loss(output, target.double()),
    accelerator=trainer.accelerator,
    show_progress=False,
)
counts = TensorDataset(x[:8], torch.tensor([0, 1, 1, 0, 2, 3, 4, 5]))
result["counts"] = regression.evaluate(DataLoader(counts, batch_size=8 // processes))
result["history"] = trainer.fit(DataLoader(TensorDataset(x[:16], y[:16]), batch_size=8 // processes), epochs=2)
result["weight"] = net[0].weight.flatten().tolist()

# Other regularizers, whose random numbers have to be those of one process: gradients of one global batch.
def gradients(name):
    net = smooth_conv_net()
    generator = torch.Generator().manual_seed(5)
    lime = Lime(net, Ridge(0.1), MaskSimilarity())
    regularizers = {
        "LIME": lambda: InsertionDeletion(
            lime,
            baselines=0.0,
            feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
            steps_per_update=2,
            attribute_kwargs={"sampling": "independent", "n_samples": 9},
            generator=generator,
        ),
        "shared": lambda: InsertionDeletion(
            lime,
            baselines=0.0,
            feature_mask=torch.arange(36).view(1, 1, 6, 6) // 9,
            attribute_kwargs={"sampling": "independent", "n_samples": 9, "share_masks": True},
            generator=generator,
        ),
        "Grad-CAM": lambda: InsertionDeletion(
            LayerGradCam(net, net[4]), baselines=0.0, step_size=6, steps_per_update=2, generator=generator
        ),
        "RRR": lambda: RightForTheRightReasons(net, weight=0.3),
        "Fidelity": lambda: Fidelity(net, GaussianNeighbors(one_dimensional=True), generator=generator),
    }
    loss = ExplanationRegularizedLoss(net, [regularizers[name]()])
    size = 8 // processes
    own = slice(rank * size, (rank + 1) * size)
    annotations = (x > 0).double()
    module = loss
    if processes > 1:
        module = torch.nn.parallel.DistributedDataParallel(loss, static_graph=True)
    for _ in range(2):  # a second step, since a static graph is learned from the first
        net.zero_grad()
        total, _ = module((x[own], y[own], annotations[own]))
        total.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]).tolist()


rank = trainer.accelerator.process_index
result["gradients"] = {name: gradients(name) for name in ("LIME", "shared", "Grad-CAM", "RRR", "Fidelity")}
if processes > 1:
    x[:1] = float("nan")  # in the first process's part only
    try:
        trainer.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    except NonFiniteError as error:
        result["error"] = str(error)
    torch.distributed.barrier()  # both are still here
with open(f"{sys.argv[1]}-{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in (("one", []), ("two", launch)):
        result = subprocess.run(
            [sys.executable, *command, str(script), str(folder / name)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert result.returncode == 0, result.stderr
    return [[json.loads(path.read_text()) for path in folder.glob(f"{name}-*.json")] for name in ("one", "two")]


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


@pytest.mark.parametrize("name", ["LIME", "shared", "Grad-CAM", "RRR", "Fidelity"])
def test_gradients_do_not_depend_on_the_number_of_processes(results, name):
    """Under DDP with a static graph; what is drawn for an example is drawn for it, not for its process."""
    [one], two = results
    for process in two:
        assert process["gradients"][name] == pytest.approx(one["gradients"][name], abs=1e-9)


def test_failure_in_one_process_stops_both(results):
    _, two = results
    errors = sorted(process["error"] for process in two)
    assert any("Another process" in error for error in errors)
    assert any("'task'" in error for error in errors)
    assert all("epoch 1, step 1" in error for error in errors)
