"""
Grad-CAM on colour images: where does the network look?
=======================================================

Colour images of CIFAR's size with a small residual network: the setting in which most people meet Grad-CAM. A piece of
a photograph lies somewhere on a grey wall, and the network says which photograph it is from. We know where the
piece lies, so that a heat map can be checked against it. We train plainly, look at the maps, put insertion and deletion
of Grad-CAM into the loss, and look again.
"""

# sphinx_gallery_thumbnail_number = -1

import copy

import captum.attr
import pandas as pd
import torch
from matplotlib.figure import Figure
from skimage import data
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.testing import assert_trainable
from captum_idexpo.visualization import draw_image, plot_curves, plot_explanations

# %%
# The images
# ----------
#
# Ten photographs that scikit-image and scikit-learn carry are ten classes. Scaled to 100 pixels, each is divided into
# blocks of 20 x 20; a fifth of the blocks is for validation, a fifth for testing, and pieces of 16 x 16 are cut from
# within a block, so that training and test pieces come from disjoint areas. The walls (brick, grass, gravel) are
# divided into an upper part for training and a lower one. Blocks are few, about six a photograph for testing, and
# pieces of a block overlap: the numbers below say more about these photographs than about photographs.

PHOTOGRAPHS = {
    "astronaut": data.astronaut(),
    "cat": data.chelsea(),
    "coffee": data.coffee(),
    "rocket": data.rocket(),
    "tissue": data.immunohistochemistry(),
    "retina": data.retina(),
    "galaxies": data.hubble_deep_field(),
    "motorcycle": data.stereo_motorcycle()[0],
    "temple": load_sample_image("china.jpg"),
    "flower": load_sample_image("flower.jpg"),
}
WALLS = (data.brick(), data.grass(), data.gravel())
BLOCK, PIECE, SIZE = 20, 16, 32
generator = torch.Generator().manual_seed(0)


def resized(picture, short_side):
    """Channels first, in [0, 1]."""
    image = torch.tensor(picture).view(*picture.shape[:2], -1).permute(2, 0, 1)[None] / 255
    return interpolate(image, scale_factor=short_side / min(image.shape[2:]), mode="bilinear", antialias=True)[0]


def crop(image, size):
    row, column = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[1:])
    return image[:, row : row + size, column : column + size]


def choice(items):
    return items[int(torch.randint(len(items), (), generator=generator))]


def compose(blocks, walls):
    """A piece of a random block on a random wall, and where it lies."""
    image = crop(choice(walls), SIZE).expand(3, SIZE, SIZE).clone()
    place = torch.zeros(1, SIZE, SIZE)
    crop(place, PIECE).fill_(1)
    image[:, place[0].bool()] = crop(choice(blocks), PIECE).flatten(1)
    return image, place


walls = [resized(wall, 256) for wall in WALLS]
upper, lower = [wall[:, :128] for wall in walls], [wall[:, 128:] for wall in walls]
parts = {"train": [], "val": [], "test": []}
for label, photograph in enumerate(PHOTOGRAPHS.values()):
    blocks = resized(photograph, 100).unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).flatten(1, 2).transpose(0, 1)
    blocks = blocks[torch.randperm(len(blocks), generator=generator)]
    fifth = len(blocks) // 5
    for name, own, wall, n in (
        ("val", blocks[:fifth], lower, 15),
        ("test", blocks[fifth : 2 * fifth], lower, 40),
        ("train", blocks[2 * fifth :], upper, 100),
    ):
        parts[name] += [(*compose(own, wall), torch.tensor(label)) for _ in range(n)]

images, places, labels = {}, {}, {}
for name, examples in parts.items():
    images[name], places[name], labels[name] = (torch.stack(column) for column in zip(*examples, strict=True))
mean = images["train"].mean(dim=(0, 2, 3), keepdim=True)
std = images["train"].std(dim=(0, 2, 3), keepdim=True)
x = {name: (part - mean) / std for name, part in images.items()}
train, val = (TensorDataset(x[name], labels[name]) for name in ("train", "val"))

figure = Figure(figsize=(8, 1.9), layout="constrained")
for axis, number in zip(figure.subplots(2, 10).T.flat, torch.arange(400).view(10, 40)[:, :2].flatten(), strict=True):
    draw_image(axis, images["test"][number], list(PHOTOGRAPHS)[labels["test"][number]] if number % 40 == 0 else "")

# %%
# The network
# -----------
#
# Two of torchvision's residual blocks between a convolution and the average over the image. Grad-CAM looks at the last
# one, whose maps have 8 x 8 cells.

torch.manual_seed(0)
shortcut = nn.Sequential(nn.Conv2d(16, 48, 1, stride=2, bias=False), nn.BatchNorm2d(48))
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    BasicBlock(16, 16),
    BasicBlock(16, 48, stride=2, downsample=shortcut),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(48, len(PHOTOGRAPHS)),
)

# %%
# Grad-CAM with a gradient
# ------------------------
#
# Two lines change: the import, and ``create_graph=True`` (which the regularizer below sets by itself). That a map
# requires grad is not enough. Captum's does, and yet its channel weights are constants: a loss on it moves the
# activations and never learns that the last layer, which sets the channels' weights, moves the map, too.
# ``assert_trainable`` compares the gradient with finite differences. It has no objection to the first of these, and
# finds the second out:

double = copy.deepcopy(model).double().eval()
pair, classes = x["val"][:2].double(), labels["val"][:2]
assert_trainable(
    lambda: LayerGradCam(double, double[4]).attribute(pair, target=classes, create_graph=True), double, rtol=1e-4
)
try:
    assert_trainable(lambda: captum.attr.LayerGradCam(double, double[4]).attribute(pair, target=classes), double)
except AssertionError as error:
    print(error)

# %%
# Plain training
# --------------
#
# ``freeze_batch_norm=False`` because the network starts from random weights; the default is for fine-tuning. The last
# epochs have the learning rate of the fine-tuning below, so that what is gained there is not owed to a smaller rate.


def fit(model, regularizers, learning_rate, epochs, evaluation=None):
    torch.manual_seed(0)
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=learning_rate),
        regularizers,
        evaluation=evaluation,
        freeze_batch_norm=evaluation is not None,
        max_accuracy_drop=None if evaluation is None else 0.01,
        show_progress=False,
    )
    history = trainer.fit(DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=150), epochs)
    model.eval()
    return history


fit(model, [], learning_rate=3e-3, epochs=16)
fit(model, [], learning_rate=5e-4, epochs=4)
before = copy.deepcopy(model)

# %%
# Fine-tuning with insertion and deletion of the map
# --------------------------------------------------
#
# Masked pixels become 0, which after standardisation is the average colour, a middle grey. Black would be a poor choice
# of baseline here: it is what the galaxies look like. In each update the regularizer evaluates 4 of the 16 steps, drawn
# for each image. A copy is trained on without the terms, to tell their effect from that of more training. Of the epochs
# that cost at most one point of accuracy, the trainer keeps the one with the highest 2 x accuracy + insertion + 1 -
# deletion, for both.


def make_regularizer(model):
    return InsertionDeletion(
        LayerGradCam(model, model[4]),
        baselines=0.0,
        insertion_weight=0.01,
        deletion_weight=0.05,
        step_size=32,
        attribute_kwargs={"relu_attributions": True},
    )


regularizer = make_regularizer(model)
history = fit(model, [regularizer], learning_rate=5e-4, epochs=4, evaluation=regularizer)
longer = copy.deepcopy(before)
fit(longer, [], learning_rate=5e-4, epochs=4, evaluation=make_regularizer(longer))
columns = ["epoch", "task", "insertion", "deletion", "val_accuracy", "val_insertion", "val_one_minus_deletion"]
history.to_pandas()[columns].round(3)

# %%
# On test images
# --------------
#
# The scores are those of the class that the network predicts. *Inside* is the share of the map that lies on the piece,
# *points inside* how often its largest cell does (the pointing game): neither is in the loss, which knows nothing of
# where the pieces lie. A map that is the same everywhere has a quarter of itself inside.


@torch.no_grad()
def judge(model):
    predicted = model(x["test"]).argmax(dim=1)
    regularizer = make_regularizer(model)
    scores, maps = regularizer.scores(x["test"]), regularizer.attribution(x["test"], predicted)[0]
    inside = (maps * places["test"]).flatten(1).sum(1) / maps.flatten(1).sum(1).clamp_min(1e-9)
    points = places["test"].flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))
    row = {
        "accuracy": (predicted == labels["test"]).float().mean(),
        "insertion": scores.insertion.mean(),
        "1 - deletion": 1 - scores.deletion.mean(),
        "inside": inside.mean(),
        "points inside": points.mean(),
    }
    return {name: float(value) for name, value in row.items()}, scores, maps, predicted


networks = {"before": before, "trained longer": longer, "after": model}
judged = {name: judge(network) for name, network in networks.items()}
pd.DataFrame({name: row for name, (row, *_) in judged.items()}).round(3).T

# %%
# The map knew where to look before: its largest cell was on the piece nearly always, and is so still. What it marked
# did not suffice, though. On a grey image, the eighth of the pixels that is marked first now makes the class as
# probable as a quarter did before. More training alone does nothing of the kind; both gain two points of accuracy.
# Deletion was low already, as it must be where the map covers the piece; it is a little higher now. Insertion and
# deletion say whether the network goes by what the map marks, not whether the map is sharp: the share inside does not
# rise either.

figure = plot_curves({name: scores for name, (_, scores, _, _) in judged.items()})

# %%
# The first test image of every other class, with the predicted class, right or wrong, and its insertion score. Most
# maps of a row look alike, while their scores do not: how faithful a map is cannot be seen by looking at it.

shown = torch.arange(0, 400, 80)
titles = {
    name: [f"{list(PHOTOGRAPHS)[predicted[i]]}, {float(scores.insertion[i]):.2f}" for i in shown]
    for name, (_, scores, _, predicted) in judged.items()
}
maps = {name: maps[shown] for name, (_, _, maps, _) in judged.items()}
figure = plot_explanations(images["test"][shown], maps, titles)
