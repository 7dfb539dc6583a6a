"""
Quickstart: train a model for a faithful Grad-CAM
=================================================

After this tutorial you can fine-tune an image classifier so that its Grad-CAM marks the pixels that the prediction
depends on.

A small CNN reads handwritten digits well, but the pixels that its Grad-CAM marks hardly matter to its predictions. We
add insertion and deletion of that map to the loss and fine-tune the CNN. Then we compare the map before and after.
"""

# sphinx_gallery_thumbnail_number = -1

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam  # Captum's class, made trainable
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_curves, plot_explanations

# %%
# The data come with scikit-learn. The model is trained in the usual way.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train, val = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:1500], y[1200:1500])
x_test, y_test = x[1500:], y[1500:]

model = nn.Sequential(
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
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(10):
    for batch, target in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(model(batch), target).backward()
        optimizer.step()
before = copy.deepcopy(model)

# %%
# The regularizer adds the explanation to the loss. It sets ``create_graph=True``, so the map has its correct gradient
# with respect to the weights. Masked pixels become black. Half of the 64 pixels are inserted or deleted, four per step.
# This makes 8 steps, and each update draws 4 of these 8 steps per example. ``max_accuracy_drop=0.01`` allows an epoch
# to cost one point of accuracy, plus one standard error. ``n_random_orders`` measures the gain of the map over random
# orders of the same pixels. A warning may say that the maps of a few examples are 0 everywhere, because Grad-CAM's ReLU
# has removed all of their evidence. A few such maps do no harm.


def make_regularizer(model):
    return InsertionDeletion(
        LayerGradCam(model, model[3]),
        baselines=0.0,
        insertion_weight=0.005,
        deletion_weight=0.005,
        step_size=4,
        n_random_orders=3,
        attribute_kwargs={"relu_attributions": True},  # evidence for the class only, as in the paper
    )


trainer = ExplanationRegularizedTrainer(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-3),
    [make_regularizer(model)],
    max_accuracy_drop=0.01,
    show_progress=False,
)
history = trainer.fit(DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=300), epochs=8)
history.to_pandas().round(3)

# %%
# Among the epochs within this limit, the trainer kept the one with the best validation score. The score is twice the
# accuracy, plus insertion, plus 1 - deletion.

figure = history.plot()

# %%
# On held-out images the map now marks the pixels that the prediction depends on. Inserting the highest-ranked pixels
# into a black image makes the class probable sooner. Deleting them makes the class improbable sooner. Before the
# fine-tuning, the map ranked the pixels little better than random orders do.

scores = {name: make_regularizer(net).scores(x_test) for name, net in (("before", before), ("after", model))}
for name, net in (("before", before), ("after", model)):
    accuracy = (net(x_test).argmax(1) == y_test).float().mean()
    insertion, deletion = scores[name].insertion.mean(), scores[name].deletion.mean()
    gains = scores[name].insertion_gain.mean(), scores[name].deletion_gain.mean()
    print(f"{name:7} accuracy {accuracy:.3f}   insertion {insertion:.3f}   1 - deletion {1 - deletion:.3f}", end="")
    print("   gains {:+.3f} {:+.3f}".format(*gains))

figure = plot_curves(scores)

# %%
# The figure shows the maps before and after the fine-tuning.

shown = x_test[:4]
maps = {
    name: make_regularizer(net).attribution(shown, net(shown).argmax(1))[0]
    for name, net in (("before", before), ("after", model))
}
figure = plot_explanations(shown, maps)
