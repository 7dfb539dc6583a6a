"""
Several labels per example
==========================

After this guide you can train and measure the explanations of a network that has one sigmoid per label.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import InputXGradient
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

# %%
# Each image shows two digits side by side. The ten labels tell which digits are there. The target is multi-hot, ``(B,
# 10)``.

digits = load_digits()
images, numbers = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)
pairs = torch.randint(len(images), (900, 2), generator=generator)
x = torch.cat([images[pairs[:, 0]], images[pairs[:, 1]]], dim=2)[:, None]
y = nn.functional.one_hot(numbers[pairs], 10).amax(dim=1).float()
train = DataLoader(TensorDataset(x[:700], y[:700]), batch_size=50, shuffle=True, generator=generator)
val = DataLoader(TensorDataset(x[700:750], y[700:750]), batch_size=50)

# %%
# Pass ``outputs="multilabel"``, and train with ``BCEWithLogitsLoss``.

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 48, 5, padding=2),
    nn.ReLU(),
    nn.AdaptiveMaxPool2d(1),
    nn.Flatten(),
    nn.Linear(48, 10),
)
regularizer = InsertionDeletion(
    InputXGradient(model),
    baselines=0.0,
    outputs="multilabel",
    steps_per_update=2,
)
trainer = ExplanationRegularizedTrainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-2),
    [regularizer],
    nn.BCEWithLogitsLoss(),
    show_progress=False,
)
history = trainer.fit(train, val, epochs=6)
print(f"labels right {history[-1]['val_accuracy']:.2f}, all labels right {history[-1]['val_exact_match']:.2f}")

# %%
# A map explains one label. The images below have two different labels, and the network predicts both of them. Each
# image has two maps: one of the left digit's label, and one of the right digit's label.

left, right = numbers[pairs[700:, 0]], numbers[pairs[700:, 1]]
predicted = regularizer.predicted_labels(x[700:]).float()
both = predicted.gather(1, left[:, None]) * predicted.gather(1, right[:, None]) * (left != right)[:, None]
chosen = both[:, 0].nonzero()[:, 0]
maps = {
    "left digit": regularizer.attribution(x[700:][chosen], left[chosen])[0],
    "right digit": regularizer.attribution(x[700:][chosen], right[chosen])[0],
}
for (name, values), half in zip(maps.items(), (slice(0, 8), slice(8, 16)), strict=True):
    share = values.relu()[..., half].sum() / values.relu().sum()
    print(f"{name}: {share:.0%} of its label's positive evidence is on its half")

figure = plot_explanations(x[700:][chosen[:4]], {name: values[:4] for name, values in maps.items()})

# %%
# The mistake to avoid
# --------------------
#
# Do not use the default, ``outputs="logits"``. It takes a softmax over the labels, in which two true labels compete.
# With this setting a multi-hot target raises an error, because it may also be classes in another form:

try:
    InsertionDeletion(InputXGradient(model), baselines=0.0)(x[700:704], y[700:704])
except ValueError as error:
    print(error)
