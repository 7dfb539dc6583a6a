"""
An image with metadata
======================

After this guide you can train the explanation of an image for a network that also reads a table row, such as a
patient's age or a camera's position. The row is passed to the network. It is neither explained nor masked.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from captum_idexpo import Batch, ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

# %%
# Each example is an image of a digit and a flag. The flag says whether the label is the digit or its double, modulo 10.
# The loader yields dictionaries.

digits = load_digits()
images, numbers = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
doubled = torch.randint(2, (len(images),), generator=torch.Generator().manual_seed(0))
labels = numbers * (1 + doubled) % 10
rows = [
    {"image": image, "doubled": flag, "label": label}
    for image, flag, label in zip(images, doubled.float(), labels, strict=True)
]
train, val = DataLoader(rows[:1400], batch_size=50, shuffle=True), DataLoader(rows[1400:1500], batch_size=100)


class ImageAndRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.digit = nn.Linear(32 * 64, 32)
        self.hidden, self.head = nn.Linear(33, 128), nn.Linear(128, 10)

    def forward(self, image, doubled):
        digit = self.digit(self.conv(image).relu().flatten(1)).relu()
        return self.head(self.hidden(torch.cat([digit, doubled[:, None]], dim=1)).relu())


# %%
# ``unpack`` tells the trainer what each part of a batch is. The values in ``additional_forward_args`` are repeated for
# all masked copies of their example.


def unpack(batch):
    return Batch(batch["image"], batch["label"], additional_forward_args=batch["doubled"])


torch.manual_seed(0)
model = ImageAndRow()
regularizer = InsertionDeletion(LayerGradCam(model, model.conv), baselines=0.0, steps_per_update=2)
trainer = ExplanationRegularizedTrainer(
    model,
    torch.optim.Adam(model.parameters(), lr=5e-3),
    [regularizer],
    unpack=unpack,
    show_progress=False,
)
history = trainer.fit(train, val, epochs=8)
print(f"accuracy {history[-1]['val_accuracy']:.2f}, insertion {history[-1]['val_insertion']:.2f}")

# %%
# The figure explains the same images for both values of the flag. The evidence is nearly the same. This is correct,
# because the network has to read the digit in both cases.

shown = images[1400:1404]
maps = {}
for name, flag in (("digit", 0.0), ("double", 1.0)):
    side = torch.full((4,), flag)
    classes = model(shown, side).argmax(dim=1)
    maps[name] = regularizer.attribution(shown, classes, additional_forward_args=side)[0]
figure = plot_explanations(shown, maps)

# %%
# The mistake to avoid
# --------------------
#
# Do not pass the row as a second *input*, ``(image, row)``. The row would then be explained and masked as well, and
# each of its numbers would be a location among the pixels. A layer's map has no place for the row. (Pass several rows
# in ``additional_forward_args`` as a tuple, in the order of the model's arguments.)

by_inputs = InsertionDeletion(LayerGradCam(model, model.conv), baselines=(0.0, 0.0))
try:
    by_inputs((shown, torch.zeros(4)), labels[1400:1404])
except ValueError as error:
    print(error)
