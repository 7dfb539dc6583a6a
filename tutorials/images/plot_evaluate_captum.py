"""
Evaluate any Captum explanation
===============================

Which attribution should one believe? Nothing is trained here but the classifier: six explanations, all of Captum's own
classes, are judged by this package's insertion, deletion and sensitivity-n beside Captum's infidelity and maximum
sensitivity. Two explanations that know nothing of the model take part as controls, and the pitfalls are shown, not
only named.
"""

import warnings

import pandas
import torch
from captum.attr import (
    DeepLift,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    Occlusion,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from captum_idexpo.metrics import insertion, insertion_deletion, sensitivity_n
from captum_idexpo.visualization import COLORS, plot_curves, plot_explanations

# %%
# A small CNN on scikit-learn's digits, and 100 test images that it classifies right.

warnings.filterwarnings("ignore", module="captum")  # that inputs are made to require gradients, of hooks
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)

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
for _ in range(8):
    for batch in torch.randperm(1400).split(64):
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
model.eval()
right = model(x[1400:]).argmax(1) == y[1400:]
print(f"test accuracy {right.float().mean():.3f}")
x, y = x[1400:][right][:100], y[1400:][right][:100]

# %%
# The candidates
# --------------
#
# Each is a function of images and targets that returns one value a pixel. ``noise`` draws a map at random; ``centre``
# marks the middle of every image, whatever is in it. A metric that does not put these two last measures something else
# than faithfulness, or the data make it easy.


def grad_cam(x, target):
    return LayerAttribution.interpolate(LayerGradCam(model, model[2]).attribute(x, target=target), x.shape[2:])


def occlusion(x, target):
    return Occlusion(model).attribute(x, (1, 2, 2), target=target)


def noise(x, target):
    return torch.randn_like(x)


def centre(x, target):
    place = torch.arange(8) - 3.5
    return (25 - place[:, None] ** 2 - place**2).expand_as(x)


methods = {
    "Saliency": lambda x, target: Saliency(model).attribute(x, target=target),
    "InputXGradient": lambda x, target: InputXGradient(model).attribute(x, target=target),
    "IntegratedGradients": lambda x, target: IntegratedGradients(model).attribute(x, target=target, n_steps=20),
    "DeepLift": lambda x, target: DeepLift(model).attribute(x, target=target),
    "Occlusion 2x2": occlusion,
    "LayerGradCam": grad_cam,
    "centre": centre,
    "noise": noise,
}
torch.manual_seed(0)
maps = {name: explain(x, y).detach() for name, explain in methods.items()}
figure = plot_explanations(x[:3], {name: values[:3] for name, values in maps.items()})

# %%
# The metrics
# -----------
#
# * Insertion and deletion rank the pixels and ask how fast the class appears on black, or disappears.
# * Sensitivity-n correlates the attribution of 16 random pixels, together, with the fall of the probability when they
#   turn black. Unlike the two above it reads values and signs, not only the order.
# * Captum's infidelity is the mean squared error of that same statement, over perturbations of our choice; we choose
#   the same: 16 random pixels turn black. ``normalize=True`` fits the one factor that brings attributions of other
#   units, such as Grad-CAM's, to the scale of the output.
# * Captum's maximum sensitivity is how far the map moves, relative to its norm, when the image moves by at most 0.02 a
#   pixel. It asks for stability and does not look at the model's output at all.
#
# Captum's two metrics return one value an example, as this package's do.


def probabilities(x):
    return model(x).softmax(1)


def blacken(x):
    """16 random pixels of each image: which ones, and the image without them."""
    chosen = torch.rand_like(x).flatten(1).argsort(1).argsort(1).view_as(x) < 16
    return chosen.float(), x.masked_fill(chosen, 0.0)


def scores_of(name):
    attribution, explain = maps[name], methods[name]
    torch.manual_seed(0)  # the same random pixels for every explanation
    correlation = sensitivity_n(model, x, attribution, n=16, target=y, n_samples=100)
    error = infidelity(probabilities, blacken, x, attribution, target=y, n_perturb_samples=100, normalize=True)
    few = slice(0, 20)  # each of these explains every image ten times more
    moved = sensitivity_max(lambda x, target: (explain(x[0], target),), x[few], target=y[few])  # tuples in and out
    curve = insertion_deletion(model, x, attribution, target=y, step_size=2)
    return curve, {
        "insertion": curve.insertion,
        "deletion": curve.deletion,
        "sensitivity-16": correlation,
        "infidelity": error,
        "sensitivity_max": moved,
    }


curves, table = {}, {}
for name in methods:
    curves[name], scores = scores_of(name)
    table[name] = {metric: float(values.detach().mean()) for metric, values in scores.items()}

pandas.DataFrame(table).T.round(3)

# %%
# The same table as a picture. The dashed line is the noise's score; bars to the better side of it say something.

better = {"insertion": "higher", "deletion": "lower", "sensitivity-16": "higher", "infidelity": "lower"}
figure = Figure(figsize=(11, 2.8), layout="constrained")
for axis, metric in zip(figure.subplots(1, 5, sharey=True), table["noise"], strict=True):
    colors = [COLORS[0] if name in ("centre", "noise") else COLORS[1] for name in table]
    axis.barh(list(table), [row[metric] for row in table.values()], color=colors)
    axis.axvline(table["noise"][metric], color="black", linestyle="--", linewidth=1)
    axis.set_title(f"{metric}\n({better.get(metric, 'lower')} is better)", fontsize=9)
axis.invert_yaxis()

# %%
# What can be read from it:
#
# * The noise comes last in everything that asks the model. That is the least a metric must do; its score is what
#   nothing is worth, which is far from 0 for insertion.
# * ``centre`` knows no image and no model, and does better than noise, as digits lie in the middle. On this model it
#   even does better than Grad-CAM, by all four metrics that ask the model. An explanation should be compared with the
#   best map that looks at nothing, not with noise alone. (The quickstart trains such a Grad-CAM to be faithful.)
# * The maximum sensitivity of ``centre`` is 0, the best there is: a map that never changes is perfectly stable. Read
#   stability beside faithfulness, never alone.
# * Sensitivity-n and infidelity put the explanations in nearly the same order, which is no second opinion: over the
#   same perturbations they ask the same question, one as a correlation, one as an error.
# * Input x gradient, integrated gradients and DeepLift hardly differ, here, and are ahead of Saliency. All three
#   multiply by the input, and that is where the first pitfall lies.

compared = ("IntegratedGradients", "Saliency", "LayerGradCam", "centre", "noise")
figure = plot_curves({name: curves[name] for name in compared})

# %%
# Pitfall: the baseline
# ---------------------
#
# "Removed" was black so far, and black is also what the three attributions above compare with: they give a black pixel
# exactly 0. Where removed means grey, white or the mean image, the same maps are judged by a question that they did not
# answer. Insertion into each of them:

removed = {"black": 0.0, "grey": 0.5, "white": 1.0, "mean image": x.mean(0, keepdim=True)}


@torch.no_grad()
def mean_insertion(attribution, baselines=0.0):
    return float(insertion(model, x, attribution, baselines=baselines, target=y, step_size=2).mean())


by_baseline = {name: [mean_insertion(maps[name], baselines) for baselines in removed.values()] for name in maps}
by_baseline["IntegratedGradients, own"] = [  # from the baseline that it is judged with
    mean_insertion(IntegratedGradients(model).attribute(x, baselines, target=y, n_steps=20), baselines)
    for baselines in removed.values()
]

pandas.DataFrame(by_baseline, index=list(removed)).T.round(3)

# %%
# The order turns round: on white, integrated gradients from black are worth less than noise, because the black
# background, to which they give nothing, is what must be inserted. Integrated gradients from the same baseline as the
# metric's ("own") are at the top in every column. So give the explanation and the metric the same baseline, name it
# with every number, and compare numbers of one baseline only.

figure = Figure(figsize=(6, 3.2), layout="constrained")
axis = figure.subplots()
shown = ("IntegratedGradients", "IntegratedGradients, own", "Saliency", "centre", "noise")
for name, color in zip(shown, COLORS[1:6], strict=True):
    axis.plot(list(removed), by_baseline[name], "o:", color=color, label=name)
axis.set(ylabel="insertion", xlabel="what a removed pixel becomes", ylim=(0, 1))
_ = axis.legend(frameon=False, fontsize=8)

# %%
# Pitfall: ties
# -------------
#
# Insertion and deletion need an order, and equal attributions have none. This package takes tied pixels by position,
# from the top left, so that a score can be repeated; position is not chance, though. A map that is constant is not
# judged like noise: it inserts the image row by row.

torch.manual_seed(0)
constant = mean_insertion(torch.zeros_like(x))
shuffled = [mean_insertion(torch.rand_like(x)) for _ in range(5)]
print(
    f"a constant map, ties by position {constant:.3f}; ties broken at random {min(shuffled):.3f} to {max(shuffled):.3f}"
)
for name, values in maps.items():
    ordered = values.flatten(1).sort(1).values
    tied = float((ordered[:, 1:] == ordered[:, :-1]).float().mean())
    jitter = 1e-6 * values.abs().max() * torch.randn_like(values)
    with_jitter = mean_insertion(values + jitter)
    print(f"{name:20} tied {tied:4.0%}   insertion {table[name]['insertion']:.4f}, at random {with_jitter:.4f}")

# %%
# Nearly half of the pixels of the attributions that multiply by the input are tied, at 0, and it makes no difference:
# they are black, and black pixels put onto black change nothing. On another baseline it would. If breaking ties with a
# little noise moves a score, as it does for maps with a few large cells, or for maps cut off at zero, report the mean
# over several such orders.
