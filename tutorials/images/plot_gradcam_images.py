"""
Grad-CAM on colour images: where does the network look?
=======================================================

After this tutorial you can train a network on colour images for a faithful Grad-CAM, and check whether the map marks
the right place.

The images have the size of CIFAR's, and the network is a small residual network. Each image shows a piece of a
photograph somewhere on a grey wall. The network predicts which photograph the piece is from. We know where the piece
lies, so we can check a heat map against its place. First we train in the usual way and look at the maps. Then we add
insertion and deletion of Grad-CAM to the loss, train again, and compare the maps.
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
# The ten classes are ten photographs that come with scikit-image and scikit-learn. Each photograph is scaled so that
# its short side has 100 pixels, and divided into blocks of 20 x 20 pixels. A fifth of the blocks is for validation, a
# fifth is for testing, and the rest is for training. Each piece of 16 x 16 pixels is cut from within one block, so
# training and test pieces come from disjoint areas. The walls (brick, grass, gravel) are divided, too. The upper part
# is for training, the lower part is for validation and testing. There are few blocks, about six per photograph for
# testing, and the pieces of a block overlap. The numbers below therefore describe these ten photographs, and say less
# about photographs in general.

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
    """Return the picture with channels first, in [0, 1], scaled to the short side."""
    image = torch.tensor(picture).view(*picture.shape[:2], -1).permute(2, 0, 1)[None] / 255
    return interpolate(image, scale_factor=short_side / min(image.shape[2:]), mode="bilinear", antialias=True)[0]


def crop(image, size):
    row, column = (int(torch.randint(side - size + 1, (), generator=generator)) for side in image.shape[1:])
    return image[:, row : row + size, column : column + size]


def choice(items):
    return items[int(torch.randint(len(items), (), generator=generator))]


def compose(blocks, walls):
    """Return an image with a piece of a random block on a random wall, and a mask of the piece's place."""
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
# The network has a convolution, two of torchvision's residual blocks, an average over the image, and a linear layer.
# Grad-CAM explains the last residual block, whose maps have 8 x 8 cells.

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
# Two lines change in code that uses Captum: the import, and ``create_graph=True``. The regularizer below sets
# ``create_graph`` itself. A map that requires grad can still have the wrong gradient. Captum's map requires grad, but
# autograd treats its channel weights as constants. A loss on Captum's map therefore trains the activations only. It
# gives no gradient to the last layer, although that layer determines the channel weights and so the map.
#
# ``assert_trainable`` compares the gradient with finite differences. The first check below passes. The second check
# uses Captum's own Grad-CAM, and fails:

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
# We pass ``freeze_batch_norm=False`` because the network starts from random weights. The default is for fine-tuning.
# The last epochs use the learning rate of the fine-tuning below. So a gain in the fine-tuning is not caused by a
# smaller learning rate.


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
# Masked pixels become 0. After standardisation, 0 is the average colour, a middle grey. Black would be a poor baseline
# here, because the images of galaxies look black. In each update the regularizer evaluates 4 of the 16 steps. They are
# drawn per image.
#
# As a control, a copy of the network is trained further without the terms. It separates the effect of the terms from
# the effect of more training. For both networks, the trainer considers the epochs that cost at most one point of
# accuracy. Among these it keeps the epoch with the highest 2 x accuracy + insertion + 1 - deletion.


def make_regularizer(model):
    return InsertionDeletion(
        LayerGradCam(model, model[4]),
        baselines=0.0,
        insertion_weight=0.01,
        deletion_weight=0.05,
        step_size=32,
        attribute_kwargs={"relu_attributions": True},  # evidence for the class only, as in the paper
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
# Insertion and deletion are measured for the class that the network predicts. *Inside* is the share of the map that
# lies on the piece. *Points inside* is the share of images in which the largest cell of the map lies on the piece (the
# pointing game). Neither is in the loss, which does not use the place of the piece. A map that is the same everywhere
# has a quarter of its sum inside.


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
# The map marked the right place before the fine-tuning, and it still does: its largest cell lies on the piece for
# nearly all images. But the marked pixels were not enough for the prediction. Now the eighth of the pixels that is
# ranked first, on a grey image, makes the class as probable as a quarter did before. More training alone has no such
# effect. Accuracy stays within the limit. Deletion was already low, because the map covers the piece. It is a little
# higher now.
#
# Insertion and deletion measure whether the prediction depends on the pixels that the map marks. They do not measure
# whether the map is sharp. The share inside does not rise either.

figure = plot_curves({name: scores for name, (_, scores, _, _) in judged.items()})

# %%
# The figure shows the first test image of every other class. Above each map are the predicted class, which may be
# wrong, and the insertion score. Most maps of a row look alike, but their scores differ. You cannot see from a map how
# faithful it is.

shown = torch.arange(0, 400, 80)
titles = {
    name: [f"{list(PHOTOGRAPHS)[predicted[i]]}, {float(scores.insertion[i]):.2f}" for i in shown]
    for name, (_, scores, _, predicted) in judged.items()
}
maps = {name: maps[shown] for name, (_, _, maps, _) in judged.items()}
figure = plot_explanations(images["test"][shown], maps, titles)
