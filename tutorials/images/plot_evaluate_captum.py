"""
Evaluate any Captum explanation
===============================

After this tutorial you can measure how faithful the explanations of Captum's classes are, compare them, and avoid two
pitfalls of such measurements.

Only the classifier is trained here. Six explanations are judged, all of them from Captum's own classes. The metrics are
this package's insertion, deletion and sensitivity-n, and Captum's infidelity and maximum sensitivity. Two explanations
that do not use the model take part as controls. The last sections show each pitfall with an example.
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
# We train a small CNN on scikit-learn's digits, and take 100 test images that it classifies correctly.

warnings.filterwarnings("ignore", module="captum")  # it warns of hooks and of inputs that now require gradients
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
# Each candidate is a function of images and targets that returns one value per pixel. ``noise`` draws a random map.
# ``centre`` marks the middle of every image, whatever the image shows. If a metric does not rank these two last, either
# the metric measures something other than faithfulness, or the data are too easy.


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
# * Insertion and deletion rank the pixels. Insertion measures how fast the class appears on a black image. Deletion
#   measures how fast it disappears.
# * Sensitivity-n removes 16 random pixels: they turn black. It correlates the sum of their attribution with the fall of
#   the probability. It uses the values and signs of the attribution. The two metrics above use only the order.
# * Captum's infidelity is the mean squared error between the same two numbers, for perturbations that the user chooses.
#   We choose the same perturbation: 16 random pixels turn black. ``normalize=True`` fits one factor that scales the
#   attribution to the output. Attributions in other units, such as those of Grad-CAM, need this factor.
# * Captum's maximum sensitivity measures how far the map moves, relative to its norm, when the image moves by at most
#   0.02 per pixel. It measures stability, and does not use the output of the model.
#
# Captum's two metrics return one value per example, as this package's metrics do.


def probabilities(x):
    return model(x).softmax(1)


def blacken(x):
    """Return a mask of 16 random pixels of each image, and the image without them."""
    chosen = torch.rand_like(x).flatten(1).argsort(1).argsort(1).view_as(x) < 16
    return chosen.float(), x.masked_fill(chosen, 0.0)


def scores_of(name):
    attribution, explain = maps[name], methods[name]
    torch.manual_seed(0)  # the same random pixels for every explanation
    correlation = sensitivity_n(model, x, attribution, n=16, target=y, n_samples=100)
    error = infidelity(probabilities, blacken, x, attribution, target=y, n_perturb_samples=100, normalize=True)
    few = slice(0, 20)  # sensitivity_max explains each of them ten more times
    # sensitivity_max passes a tuple of inputs to the function, and expects a tuple of maps.
    moved = sensitivity_max(lambda x, target: (explain(x[0], target),), x[few], target=y[few])
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
# The figure shows the same table. The dashed line is the score of the noise. A score is informative if its bar ends on
# the better side of this line.

better = {"insertion": "higher", "deletion": "lower", "sensitivity-16": "higher", "infidelity": "lower"}
figure = Figure(figsize=(11, 2.8), layout="constrained")
for axis, metric in zip(figure.subplots(1, 5, sharey=True), table["noise"], strict=True):
    colors = [COLORS[0] if name in ("centre", "noise") else COLORS[1] for name in table]
    axis.barh(list(table), [row[metric] for row in table.values()], color=colors)
    axis.axvline(table["noise"][metric], color="black", linestyle="--", linewidth=1)
    axis.set_title(f"{metric}\n({better.get(metric, 'lower')} is better)", fontsize=9)
axis.invert_yaxis()

# %%
# The table shows:
#
# * The noise comes last in every metric that uses the model. A metric must achieve at least that. The score of the
#   noise is the score of an explanation without information. For insertion, this score is far from 0.
# * ``centre`` uses neither the image nor the model. It scores better than noise, because digits lie in the middle. On
#   this model it even scores better than Grad-CAM, by all four metrics that use the model. So compare an explanation
#   with the best map that ignores image and model, not with noise alone. (The quickstart trains such a Grad-CAM to be
#   faithful.)
# * The maximum sensitivity of ``centre`` is 0, which is the best value. A map that never changes is perfectly stable.
#   Always read stability together with faithfulness.
# * Sensitivity-n and infidelity rank the explanations in nearly the same order. This is not independent evidence. Both
#   use the same perturbations and the same question. One measures a correlation, the other an error.
# * Input x gradient, integrated gradients and DeepLift hardly differ here, and score better than Saliency. All three
#   multiply by the input. This leads to the first pitfall.

compared = ("IntegratedGradients", "Saliency", "LayerGradCam", "centre", "noise")
figure = plot_curves({name: curves[name] for name in compared})

# %%
# Pitfall: the baseline
# ---------------------
#
# So far, a removed pixel became black. Black is also the baseline of the three attributions above, so they give a black
# pixel exactly 0. Now let a removed pixel become grey, white or the pixel of the mean image. Then the same maps are
# judged with a baseline for which they were not computed. The table shows insertion into each baseline:

removed = {"black": 0.0, "grey": 0.5, "white": 1.0, "mean image": x.mean(0, keepdim=True)}


@torch.no_grad()
def mean_insertion(attribution, baselines=0.0):
    return float(insertion(model, x, attribution, baselines=baselines, target=y, step_size=2).mean())


by_baseline = {name: [mean_insertion(maps[name], baselines) for baselines in removed.values()] for name in maps}
by_baseline["IntegratedGradients, own"] = [  # from the same baseline as the metric's
    mean_insertion(IntegratedGradients(model).attribute(x, baselines, target=y, n_steps=20), baselines)
    for baselines in removed.values()
]

pandas.DataFrame(by_baseline, index=list(removed)).T.round(3)

# %%
# The order reverses. On white, integrated gradients from black score lower than noise. The reason: on white, the black
# background must be inserted, and integrated gradients from black give it 0. Integrated gradients from the baseline of
# the metric ("own") are at the top in every column. So give the explanation and the metric the same baseline. Report
# the baseline with every number. Compare only numbers of the same baseline.

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
# Insertion and deletion need an order, and pixels with equal attributions have none. This package orders tied pixels by
# position, from the top left, so that a score is reproducible. But an order by position is not random. A constant map
# does not score like noise, because it inserts the image row by row.

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
# In the attributions that multiply by the input, nearly half of the pixels are tied at 0. Here this makes no
# difference. The tied pixels are black, and inserting black pixels into a black image changes nothing. With another
# baseline it would make a difference.
#
# Break ties with a little noise, as above. If the score changes, report the mean over several such orders. The score
# changes for maps with a few large cells, and for maps that are cut off at zero.
