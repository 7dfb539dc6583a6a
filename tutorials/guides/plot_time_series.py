"""
Time series
===========

After this guide you can train the explanation of a network that reads series ``(B, T, F)``, with the steps before the
features. You can also tell the library which axis holds the steps.
"""

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import IntegratedGradients
from captum_idexpo.regularizers import InsertionDeletion

# %%
# Each series has 24 steps and 3 sensors. All sensors have noise. The second sensor also has a wave of 6 steps at a
# random time. The class is the sign of the wave.

generator = torch.Generator().manual_seed(0)
y = torch.randint(2, (800,), generator=generator)
start = torch.randint(18, (800, 1), generator=generator)
steps = torch.arange(24)
inside = ((steps >= start) & (steps < start + 6)).float()
x = 0.5 * torch.randn(800, 24, 3, generator=generator)
x[:, :, 1] += inside * (2 * y[:, None] - 1)
train = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=50, shuffle=True, generator=generator)
val = DataLoader(TensorDataset(x[600:650], y[600:650]), batch_size=50)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.GRU(3, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, series):
        return self.head(self.encoder(series)[0].mean(dim=1))


# %%
# One location is one step of one sensor. There are 72 locations. The baseline is the mean of each sensor over examples
# and steps, the axes ``(0, 1)``.

torch.manual_seed(0)
model = Recurrent()
regularizer = InsertionDeletion(
    IntegratedGradients(model),
    baselines=x[:600].mean(dim=(0, 1), keepdim=True),
    insertion_weight=0.1,
    deletion_weight=0.1,
    steps_per_update=2,
    attribute_kwargs={"n_steps": 8},
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
trainer = ExplanationRegularizedTrainer(model, optimizer, [regularizer], show_progress=False)
history = trainer.fit(train, val, epochs=6)
print(f"accuracy {history[-1]['val_accuracy']:.2f}, insertion {history[-1]['val_insertion']:.2f}")

# %%
# The upper plot shows the series. The lower plot shows the evidence for its class.

example, label = x[600:601], y[600:601]
attribution = regularizer.attribution(example, label)[0][0]
limit = float(attribution.abs().max())
figure = Figure(figsize=(7, 3.4), layout="constrained")
top, bottom = figure.subplots(2, 1, sharex=True)
top.plot(example[0], label=["sensor 0", "sensor 1", "sensor 2"])
top.axvspan(int(start[600]), int(start[600]) + 5, color="0.9", label="the wave")
top.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25))
image = bottom.imshow(attribution.T.numpy(), aspect="auto", cmap="cividis", vmin=-limit, vmax=limit)
bottom.set(xlabel="step", ylabel="sensor", yticks=range(3))
figure.colorbar(image, ax=bottom, label="evidence")

# %%
# The mistake to avoid
# --------------------
#
# Do not leave the axes out. A tensor of shape ``(B, 24, 3)`` does not say which axis holds the steps. The classes that
# need the axis have an argument for it. ``Smoothness`` takes ``axes=(1,)``. A layer ``(B, T, D)`` takes
# ``reshape_transform=steps_first``.

from captum_idexpo.attr import LayerIntegratedGradients, steps_first
from captum_idexpo.regularizers import Smoothness

try:
    Smoothness(IntegratedGradients(model))(example, label)
except ValueError as error:
    print(error)
print(Smoothness(IntegratedGradients(model), axes=(1,))(example, label))

# %%
# A GRU returns a tuple. This network does not use the second part of the tuple, so a layer attribution of the GRU
# fails. Pass the part that is used through an ``nn.Identity``, and explain the ``nn.Identity``.


class WithLayer(Recurrent):
    def __init__(self):
        super().__init__()
        self.states = nn.Identity()

    def forward(self, series):
        return self.head(self.states(self.encoder(series)[0]).mean(dim=1))


layered = WithLayer()
by_layer = InsertionDeletion(
    LayerIntegratedGradients(layered, layered.states), baselines=0.0, reshape_transform=steps_first
)
print(by_layer.attribution(example, label)[0].shape)
