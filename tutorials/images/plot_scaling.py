"""
Scaling out with accelerate
===========================

After this tutorial you can train on several processes or machines, and resume a run that was killed.

The trainer uses Hugging Face accelerate, so the same script runs on a laptop and on a cluster. This page writes such a
script. It starts the script as one process, and then as two processes. It kills the two processes before they finish,
and resumes them. At the end it compares the weights. The resumed run has the same weights as the single process, which
was never killed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from captum_idexpo.visualization import COLORS, plot_history

# %%
# The script
# ----------
#
# The script contains no code for ranks. Numbers mark the lines that matter for more than one process:
#
# 1. Create your own ``Accelerator`` to choose the settings of accelerate. Here they are the CPU, which uses the gloo
#    backend, and the number of batches that one update accumulates. On GPUs, leave ``cpu=True`` out. Mixed precision
#    and trackers are settings of the ``Accelerator``, too.
# 2. Set the same seed in every process. Every process builds the same model. Every process draws the same random
#    numbers for the whole batch, and uses those of its own examples.
# 3. ``batch_size`` is the batch size of one process and one backward pass. An update uses processes x accumulated
#    batches x ``batch_size`` images.
# 4. Pass the loaders and the model unprepared. The trainer prepares them.
# 5. ``fit`` returns in all processes. One process writes the files.
# 6. End the training, and return from the function. The connections between the processes are closed when nothing holds
#    the trainer any more. At the top level of a script they would be closed while Python shuts down, and a process that
#    exits first can then stop the others.
#
# Double precision is for this page only. It shows how small the differences between the weights are.

SCRIPT = '''
import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--die-in-epoch", type=int)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.accumulate)  # 1
    torch.manual_seed(0)  # 2
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    train, val = TensorDataset(x[:768], y[:768]), TensorDataset(x[768:1024], y[768:1024])
    train_loader = DataLoader(
        train, options.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0)  # 3
    )
    val_loader = DataLoader(val, 64)

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    ).double()
    regularizer = InsertionDeletion(
        LayerGradCam(model, model[3]), baselines=0.0, insertion_weight=0.01, deletion_weight=0.01,
        step_size=4, steps_per_update=2,
    )

    def die(trainer, row):
        """Exit as a failing machine does: at the end of an epoch, before its checkpoint, without a message."""
        if row["epoch"] == options.die_in_epoch:
            os._exit(1)

    trainer = ExplanationRegularizedTrainer(  # 4
        model,
        torch.optim.Adam(model.parameters(), lr=2e-3),
        [regularizer],
        accelerator=accelerator,
        checkpoint_dir=options.folder / "checkpoints",
        checkpoint_every=5,
        callbacks=[die],
        show_progress=False,
    )
    if any((options.folder / "checkpoints").glob("checkpoint-*.pt")):
        trainer.resume()
    history = trainer.fit(train_loader, val_loader, epochs=4)
    if accelerator.is_main_process:  # 5
        torch.save({"model": model.state_dict(), "history": list(history)}, options.folder / "result.pt")
        print(f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}, backend "
              f"{torch.distributed.get_backend() if accelerator.num_processes > 1 else None}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # 6


if __name__ == "__main__":
    main()
'''

temporary = tempfile.TemporaryDirectory()  # deleted when this script ends
folder = Path(temporary.name)
script = folder / "train.py"
_ = script.write_text(SCRIPT, encoding="utf-8")

# %%
# One process
# -----------
#
# The command is ``python train.py one``. An update uses 64 images.


def start(command, name, *options):
    (folder / name).mkdir(exist_ok=True)
    finished = subprocess.run(
        [sys.executable, *command, str(script), str(folder / name), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"exit code {finished.returncode}  {finished.stdout}")
    return finished


one = start([], "one")
assert one.returncode == 0, one.stderr

# %%
# Two processes
# -------------
#
# From a shell, use either of these commands:
#
# .. code-block:: bash
#
#    accelerate launch --cpu --num_processes 2 train.py two --batch-size 16 --accumulate 2
#    torchrun --standalone --nproc-per-node 2 train.py two --batch-size 16 --accumulate 2
#
# Both set the environment variables by which processes find each other (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
# ``MASTER_PORT``), and start the script once per process. For several machines, start torchrun on each of them, with
# ``--nnodes`` and ``--rdzv-endpoint host:port`` instead of ``--standalone``. On GPUs, each process uses one GPU.
#
# Each of the two processes has batches of 16 images and accumulates two batches. So an update uses 64 images again.
# Both processes are killed in the third epoch, at the same time. The trainer writes a checkpoint every five updates.

torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # the module that torchrun runs
settings = ["--batch-size=16", "--accumulate=2"]
killed = start(torchrun, "two", *settings, "--die-in-epoch=3")
print("left behind:", sorted(path.name for path in (folder / "two" / "checkpoints").iterdir()))

# %%
# The trainer keeps the last two checkpoints. The number in the name of a file is the number of its update. An epoch has
# 12 updates, so the third epoch would have ended with update 36. The same command, started again, finds the checkpoints
# and continues from the last one, within the epoch.

resumed = start(torchrun, "two", *settings)
assert resumed.returncode == 0, resumed.stderr[:5000]  # torchrun's own report comes after the cause

# %%
# The same weights
# ----------------
#
# The weights of both runs are equal up to rounding. Rounding differs because the sums are added in another order. With
# other random masks, the weights would be only similar.

results = {name: torch.load(folder / name / "result.pt") for name in ("one", "two")}
for name, weight in results["one"]["model"].items():
    difference = (weight - results["two"]["model"][name]).abs().max()
    print(f"{name:9} largest weight {weight.abs().max():.3f}   largest difference {difference:.1e}")
    torch.testing.assert_close(weight, results["two"]["model"][name], rtol=0, atol=1e-9)

# %%
# Three things make the weights equal:
#
# * Grad-CAM, the masked copies and the task are one forward pass of one module. DistributedDataParallel wraps this
#   module.
# * Each process draws the steps of ``steps_per_update`` for all 64 images.
# * Validation gathers the scores of the examples before it takes a mean.
#
# Three things make them differ:
#
# * The seeds differ from process to process.
# * The batches cannot be divided evenly among the processes. Here 768 images are 12 updates of 64. Otherwise use
#   ``drop_last=True``.
# * BatchNorm is in train mode. Its statistics are those of one process.
#
# All processes also share one history. It continues after the resume. The lines in the figure are the run with two
# processes. The circles around them are the run with one process.

shown = ["epoch", "loss", "task", "insertion", "deletion", "val_accuracy", "val_insertion", "valscore"]
histories = {name: [{key: row[key] for key in shown} for row in result["history"]] for name, result in results.items()}
figure = plot_history(histories["two"])
for axis, name in zip(figure.axes, ("loss", "valscore"), strict=True):
    epochs, values = ([row[key] for row in histories["one"]] for key in ("epoch", name))
    style = {"markersize": 11, "fillstyle": "none", "color": COLORS[2], "label": f"{name}, one process"}
    axis.plot(epochs, values, "o", **style)
    axis.axvline(3, color="black", linestyle=":", linewidth=1, label="killed and resumed")
    axis.legend(frameon=False, fontsize=7)
