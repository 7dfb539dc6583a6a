"""
Scaling out with accelerate
===========================

The trainer runs on Hugging Face accelerate, so that one script serves a laptop and a cluster. This page writes such a
script, starts it as one process and as two, kills the two in the middle and resumes them, and compares: the weights are
those of the single process that was never killed.
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
# It contains no code for ranks. The lines for more than one process are marked:
#
# 1. Settings of accelerate come with an ``Accelerator`` of your own: here the CPU (and with it the gloo backend; on
#    GPUs leave ``cpu=True`` out), and how many batches one update accumulates. Mixed precision and trackers go there,
#    too.
# 2. The same seed everywhere. Every process builds the same model and draws the same random numbers for the whole
#    batch, of which it keeps those of its own examples.
# 3. ``batch_size`` is that of one process and one backward pass. An update is made of processes x accumulated batches
#    x ``batch_size`` images.
# 4. Loaders and model are handed over as they are: the trainer prepares them.
# 5. ``fit`` returns in all processes; files are written by one.
#
# Double precision is for this page only: it lets one see how equal "equal" is.

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
    """As a machine dies: at the end of an epoch, before its checkpoint, without a word."""
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
'''

temporary = tempfile.TemporaryDirectory()  # goes when this script ends
folder = Path(temporary.name)
script = folder / "train.py"
_ = script.write_text(SCRIPT, encoding="utf-8")

# %%
# One process
# -----------
#
# ``python train.py one``: 64 images an update.


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
# From a shell, any of these:
#
# .. code-block:: bash
#
#    accelerate launch --cpu --num_processes 2 train.py two --batch-size 16 --accumulate 2
#    torchrun --standalone --nproc-per-node 2 train.py two --batch-size 16 --accumulate 2
#
# Both set the environment variables by which processes find each other (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
# ``MASTER_PORT``) and start the script so many times. Over several machines torchrun is started on each of them, with
# ``--nnodes`` and ``--rdzv-endpoint host:port`` in place of ``--standalone``. On GPUs, one process drives one of them.
#
# Two processes of 16 images that accumulate two batches make an update of 64 images again. And they die in the third
# epoch: all at once, in the middle of everything, with a checkpoint every five updates.

torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # what torchrun runs
settings = ["--batch-size=16", "--accumulate=2"]
killed = start(torchrun, "two", *settings, "--die-in-epoch=3")
print("left behind:", sorted(path.name for path in (folder / "two" / "checkpoints").iterdir()))

# %%
# The last two checkpoints are kept; a file's number is that of its update. An epoch has 12, so that the third was to
# end with the 36th. The same command again finds them and goes on from there, within the epoch.

resumed = start(torchrun, "two", *settings)
assert resumed.returncode == 0, resumed.stderr

# %%
# The same weights
# ----------------
#
# Not nearly, as after other random masks, but to the rounding of sums that were added up in another order.

results = {name: torch.load(folder / name / "result.pt") for name in ("one", "two")}
for name, weight in results["one"]["model"].items():
    difference = (weight - results["two"]["model"][name]).abs().max()
    print(f"{name:9} largest weight {weight.abs().max():.3f}   largest difference {difference:.1e}")
    torch.testing.assert_close(weight, results["two"]["model"][name], rtol=0, atol=1e-9)

# %%
# What makes it so: Grad-CAM, the masked copies and the task are one forward pass of one module, which
# DistributedDataParallel wraps; the steps that ``steps_per_update`` draws are drawn by each process for all 64 images;
# validation gathers the scores of examples before it takes a mean. Three things break it: seeds that differ from
# process to process, batches that cannot be shared out evenly (768 images are 12 updates of 64; ``drop_last=True``
# otherwise), and BatchNorm in train mode, whose statistics are those of one process.
#
# The history is one for all processes, too, and continues through the kill. The lines are the two processes'; the
# circles around them the single one's.

shown = ["epoch", "loss", "task", "insertion", "deletion", "val_accuracy", "val_insertion", "valscore"]
histories = {name: [{key: row[key] for key in shown} for row in result["history"]] for name, result in results.items()}
figure = plot_history(histories["two"])
for axis, name in zip(figure.axes, ("loss", "valscore"), strict=True):
    epochs, values = ([row[key] for row in histories["one"]] for key in ("epoch", name))
    style = {"markersize": 11, "fillstyle": "none", "color": COLORS[2], "label": f"{name}, one process"}
    axis.plot(epochs, values, "o", **style)
    axis.axvline(3, color="black", linestyle=":", linewidth=1, label="killed and resumed")
    axis.legend(frameon=False, fontsize=7)
