"""
Faithful LIME: train with masks, then with ID-ExpO, then ask a jury
===================================================================

After this tutorial you can train an image classifier whose LIME explanations are faithful, and check the gain with
judges that took no part in the training.

LIME explains a network by its outputs on masked images. A network that has never seen a masked image may answer it with
anything, so its explanations say little. This tutorial has three steps. First, the network learns to read masked
images. Second, its explanations become faithful at a limited cost in accuracy. Third, judges that took no part in the
training measure the gain.
"""

# sphinx_gallery_thumbnail_number = 1

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer, jury
from captum_idexpo.attr import IntegratedGradients, KernelShap, id_expo_lime
from captum_idexpo.baselines import blurred
from captum_idexpo.feature_masks import grid
from captum_idexpo.regularizers import InsertionDeletion, RandomMasking

# %%
# The data are handwritten digits. The CNN is trained in the usual way. A masked cell of 2x2 pixels becomes grey (0.5).
# No training image contains such a cell.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1300], y[1000:1300]), batch_size=300)
test = DataLoader(TensorDataset(x[1300:], y[1300:]), batch_size=250)
GREY = 0.5


def cells(images):
    """Return a feature mask of 16 cells of 2x2 pixels."""
    return grid(images, 2)


def fit(model, regularizers, epochs, learning_rate=1e-3, **settings):
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    trainer = ExplanationRegularizedTrainer(model, optimizer, regularizers, show_progress=False, **settings)
    trainer.fit(train, val, epochs=epochs)
    return trainer


plain = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(32 * 16, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
_ = fit(plain, [], epochs=12)

# %%
# Does the network read masked images? We measure its accuracy with half of the cells masked at random, and its usual
# accuracy.


def lime_regularizer(model, weight=0.0, **settings):
    return InsertionDeletion(
        id_expo_lime(model),
        forward_func=model,
        baselines=GREY,
        feature_mask=cells,
        insertion_weight=weight,
        deletion_weight=weight,
        attribute_kwargs={"n_samples": 48, "sampling": "independent"},
        **settings,
    )


def print_accuracies(name, model):
    masked = lime_regularizer(model).masked_accuracy(x[1300:], y[1300:]).mean()
    accuracy = (model(x[1300:]).argmax(1) == y[1300:]).float().mean()
    print(f"{name:12} accuracy {accuracy:.3f}   half of the cells masked {masked:.3f}")


print_accuracies("plain", plain)

# %%
# Step 1. ``RandomMasking`` is the cross-entropy on copies in which a random share of the cells is masked. It costs
# little, so train with it first.

warm = copy.deepcopy(plain)
_ = fit(warm, [RandomMasking(warm, baselines=GREY, feature_mask=cells)], epochs=10)
print_accuracies("masks", warm)

# %%
# Step 2. Insertion and deletion of LIME's explanation are added to the loss. ``max_accuracy_drop`` allows a loss of one
# point of accuracy. The control is the same network, trained further with ``RandomMasking`` alone.

faithful, control = copy.deepcopy(warm), copy.deepcopy(warm)
masks = {"baselines": GREY, "feature_mask": cells}
trainer = fit(
    faithful,
    [lime_regularizer(faithful, weight=0.2), RandomMasking(faithful, **masks)],
    epochs=6,
    max_accuracy_drop=0.01,
)
_ = fit(control, [RandomMasking(control, **masks)], epochs=6)
print_accuracies("control", control)
print_accuracies("faithful", faithful)

# %%
# Step 3. A jury compares the networks. The gains compare insertion and deletion with those of random orders of the same
# cells. So a network that only tolerates masks better has no gain. LIME and the grey baseline took part in the
# training. KernelSHAP, IntegratedGradients and the blurred baseline did not. Each network is compared with the control.
# The differences are paired by image and have standard errors.

found = jury.compare(
    {"control": control, "plain": plain, "faithful": faithful},
    test,
    {"LIME": id_expo_lime, "KernelSHAP": KernelShap, "IntegratedGradients": IntegratedGradients},
    {"grey": GREY, "blur": blurred(1.5)},
    ["accuracy", "insertion_gain", "deletion_gain"],
    reference="control",
    trained_on=["LIME", "grey"],
    feature_mask=cells,
    attribute_kwargs={
        "LIME": {"n_samples": 100, "sampling": "independent"},
        "KernelSHAP": {"n_samples": 100, "sampling": "independent"},
        "IntegratedGradients": {"n_steps": 16},
    },
)
figure = found.plot()

# %%
# The table shows the same results. Judges that took part in the training have an asterisk. The control was trained with
# the same masks for as many epochs. Compared with the control, the explanations gain by all judges, and the accuracy
# stays.
#
# The plain network has gains, too. Random masks destroy its predictions, so every order that is better than random has
# more to gain. The reference is therefore a network that also reads masked images.

print(found.table())
