"""
Several labels per example
==========================

After this guide you can train and measure the explanations of a network that has one sigmoid per label, label by label.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer, jury
from captum_idexpo.attr import InputXGradient
from captum_idexpo.feature_masks import grid
from captum_idexpo.jury import Judge, standard_error
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

# %%
# Each image shows two digits side by side. The ten labels tell which digits are there. The target is multi-hot, ``(B,
# 10)``. The digits of the test images are not in the training images.

digits = load_digits()
images, numbers = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
generator = torch.Generator().manual_seed(0)


def pairs(start, stop, n):
    """Return images of two digits, and the numbers of both digits, ``(n, 2)``."""
    chosen = torch.randint(start, stop, (n, 2), generator=generator)
    return torch.cat([images[chosen[:, 0]], images[chosen[:, 1]]], dim=2)[:, None], numbers[chosen]


def multi_hot(numbers):
    return nn.functional.one_hot(numbers, 10).amax(dim=1).float()


x, shown = pairs(0, 1000, 1000)
x_val, shown_val = pairs(1000, 1200, 40)
x_test, shown_test = pairs(1200, 1797, 120)
train = DataLoader(TensorDataset(x, multi_hot(shown)), batch_size=50, shuffle=True, generator=generator)
val = DataLoader(TensorDataset(x_val, multi_hot(shown_val)), batch_size=60)
test = DataLoader(TensorDataset(x_test, multi_hot(shown_test)), batch_size=200)

# %%
# Train the task first, with ``BCEWithLogitsLoss``. Then train one copy with the terms, and one without them as the
# control. Pass ``outputs="multilabel"``. The trainer measures the accuracy with such a regularizer, so the plain copy
# gets one as ``evaluation=``. Validation evaluates all steps, which is slow, so it has few images.


def fit(model, epochs, lr, regularizers=(), evaluation=None, val=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    given = {"evaluation": evaluation, "show_progress": False}
    trainer = ExplanationRegularizedTrainer(model, optimizer, regularizers, nn.BCEWithLogitsLoss(), **given)
    trainer.fit(train, val, epochs=epochs)
    return trainer


def terms(model):
    return InsertionDeletion(
        InputXGradient(model),
        baselines=0.0,
        outputs="multilabel",
        insertion_weight=0.03,
        deletion_weight=0.03,
        steps_per_update=2,
    )


torch.manual_seed(0)
before = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 48, 5, padding=2),
    nn.ReLU(),
    nn.AdaptiveMaxPool2d(1),
    nn.Flatten(),
    nn.Linear(48, 10),
)
fit(before, epochs=8, lr=1e-2)
plain, trained = copy.deepcopy(before), copy.deepcopy(before)
trainers = {
    "plain": fit(plain, epochs=3, lr=3e-3, evaluation=terms(plain), val=val),
    "trained": fit(trained, epochs=3, lr=3e-3, regularizers=[terms(trained)], val=val),
}
for name, trainer in trainers.items():
    scores = trainer.evaluate(test, explain="label")
    print(f"{name}: labels right {scores['accuracy']:.3f}, all labels right {scores['exact_match']:.3f}")

# %%
# Did it help, and did it help every label? The jury explains one label of each row. So the loader yields one row for
# each label that an image has: the image, and the index of the label. The differences are then averaged label by label:
# the mean of all can hide labels that got worse. The gains are over random orders of cells of 2x2 pixels. Without any
# change, about one of 20 such tests would show one. This explainer and this baseline took part in the training. For a
# claim, add others.

image, label = multi_hot(shown_test).nonzero(as_tuple=True)
found = jury.compare(
    {"before": before, "plain": plain, "trained": trained},
    DataLoader(TensorDataset(x_test[image], label), batch_size=200),
    {"InputXGradient": InputXGradient},
    {"black": 0.0},
    ["insertion_gain", "deletion_gain"],
    reference="plain",
    feature_mask=lambda images: grid(images, 2),
    outputs="multilabel",
    explain="label",
    fraction=0.5,
    n_random_orders=2,
)
print(found.table())
for metric in ("insertion_gain", "deletion_gain"):
    judge = Judge(metric, "InputXGradient", "black")
    start, control, end = (found.examples[name][judge] for name in ("before", "plain", "trained"))
    values = [
        f"{number}: {start[label == number].mean():.2f} -> {end[label == number].mean():.2f}" for number in range(10)
    ]
    print(f"{metric} before and after, {', '.join(values)}")
    differences = end - control
    of_labels = [differences[label == number] for number in range(10)]
    better = [number for number, each in enumerate(of_labels) if each.mean() > 2 * standard_error(each)]
    worse = [number for number, each in enumerate(of_labels) if each.mean() < -2 * standard_error(each)]
    print(f"{metric} over plain: better for the labels {better}, worse for {worse} (by two standard errors)")

# %%
# A map explains one label. The images below have two different labels, and the network predicts both of them. Each
# image has two maps: one of the left digit's label, and one of the right digit's label.

left, right = shown_test.unbind(dim=1)
regularizer = terms(trained)
predicted = regularizer.predicted_labels(x_test).float()
both = predicted.gather(1, left[:, None]) * predicted.gather(1, right[:, None]) * (left != right)[:, None]
chosen = both[:, 0].nonzero()[:, 0]
maps = {
    "left digit": regularizer.attribution(x_test[chosen], left[chosen])[0],
    "right digit": regularizer.attribution(x_test[chosen], right[chosen])[0],
}
for (name, values), half in zip(maps.items(), (slice(0, 8), slice(8, 16)), strict=True):
    share = values.relu()[..., half].sum() / values.relu().sum()
    print(f"{name}: {share:.0%} of its label's positive evidence is on its half")

titles = {
    "left digit": [f"label {number}" for number in left[chosen[:4]]],
    "right digit": [f"label {number}" for number in right[chosen[:4]]],
}
figure = plot_explanations(x_test[chosen[:4]], {name: values[:4] for name, values in maps.items()}, titles=titles)

# %%
# The mistake to avoid
# --------------------
#
# Do not use the default, ``outputs="logits"``. It takes a softmax over the labels, in which two true labels compete.
# With this setting a multi-hot target raises an error, because it may also be classes in another form:

try:
    InsertionDeletion(InputXGradient(trained), baselines=0.0)(x_test[:4], multi_hot(shown_test[:4]))
except ValueError as error:
    print(error)
