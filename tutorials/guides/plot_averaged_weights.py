"""
Averaged weights (EMA)
======================

After this guide you can train with an exponential moving average of the weights. The trainer evaluates the average, and
not the current weights, to select the epoch. You can also use a warm-up that is counted in updates.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion

digits = load_digits()
x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1100], y[1000:1100]), batch_size=100)

# %%
# Pass PyTorch's own ``AveragedModel`` to the trainer. The validation scores are those of the average. At the end, the
# model has the averaged weights.

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
regularizer = InsertionDeletion(
    LayerGradCam(model, model[0]),
    baselines=0.0,
    insertion_weight=0.1,
    deletion_weight=0.1,
    steps_per_update=2,
    generator=torch.Generator().manual_seed(0),
)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=40)

own_scores = []


def judge_own_weights(trainer, row):
    own_scores.append(trainer.evaluate(val)["valscore"])


trainer = ExplanationRegularizedTrainer(
    model,
    optimizer,
    [regularizer],
    scheduler=warm_up,
    scheduler_interval="update",
    averaged_model=average,
    callbacks=[judge_own_weights],
    show_progress=False,
)
history = trainer.fit(train, val, epochs=8)

# %%
# The figure shows the score of the average and the score of the current weights ("weights of the moment"), for each
# epoch.

from matplotlib.figure import Figure

figure = Figure(figsize=(5, 3), layout="constrained")
axis = figure.subplots()
axis.plot(range(1, 9), [row["valscore"] for row in history], "o-", label="average")
axis.plot(range(1, 9), own_scores, "o--", label="weights of the moment")
axis.set(xlabel="epoch", ylabel="validation score, eq. (15)")
axis.legend(frameon=False)

# %%
# The mistake to avoid
# --------------------
#
# Do not update the average in a callback of your own. The trainer would still select the epoch by the current weights.
#
# Also avoid an average whose memory is longer than the training. With 20 updates per epoch, a decay of 0.999 remembers
# 50 epochs, so the average is still close to the random start. Choose a memory, 1 / (1 - decay) updates, of an epoch or
# less.

print(f"memory: {1 / (1 - 0.95):.0f} updates, one epoch: {len(train)} updates")
