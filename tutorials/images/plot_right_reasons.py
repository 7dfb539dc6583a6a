"""
Right for the right reasons: a decoy found, removed, proven
===========================================================

A classifier that is right in the laboratory may be right for a wrong reason: a ruler beside the tumour, a hospital's
stamp on the X-ray. We plant such a decoy in scikit-learn's handwritten digits, as Decoy MNIST does (Ross et al. 2017,
arXiv 1703.03717), find it with an attribution, forbid it with ``RightForTheRightReasons``, and check on images where
the decoy lies that it is gone.
"""

# sphinx_gallery_thumbnail_number = -1

import torch
from captum.attr import IntegratedGradients
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, pad

from captum_idexpo.metrics import deletion, insertion_deletion
from captum_idexpo.regularizers import RightForTheRightReasons
from captum_idexpo.visualization import COLORS, draw_heat_map, draw_image, plot_curves, plot_explanations

# %%
# The decoy
# ---------
#
# Each digit gets a black frame and, in one of its four corners, a patch of 2x2 pixels. In the data that we train on,
# the patch's grey is ``1 - label / 10``: it tells the answer. In the test data it says a random digit. The patches hide
# no ink, so that nothing is lost by ignoring them.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
clean = pad(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, (2, 2, 2, 2))[order]
y = torch.tensor(labels)[order]

starts = torch.randint(2, (2, len(y), 1)) * 10
pixels = torch.arange(12)
rows, columns = (pixels >= starts) & (pixels < starts + 2)
patches = (rows[:, :, None] & columns[:, None, :])[:, None].float()


def with_decoys(said):
    return torch.where(patches == 1, 1 - said.view(-1, 1, 1, 1) / 10, clean)


telling, lying = with_decoys(y), with_decoys(torch.randint(10, y.shape))
train, held_out, test = slice(0, 1200), slice(1200, 1500), slice(1500, None)

figure = Figure(figsize=(7, 2.9), layout="constrained")
figure.suptitle("training: the patch says the label (above); test: a random digit (below)", fontsize=9)
shown, digits = [*telling[:6], *lying[test][:6]], [*y[:6], *y[test][:6]]
for axis, image, digit in zip(figure.subplots(2, 6).flat, shown, digits, strict=True):
    draw_image(axis, image, f"{int(digit)}")

# %%
# Found
# -----
#
# A plain network, and its accuracy on 300 held-out images *of the same source*, where the patch still tells. Nothing
# looks wrong.


def fit(inputs, weight=0.0):
    """A network trained on the training part, the patches forbidden if there is a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    regularizer = RightForTheRightReasons(model, weight=weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, target, annotations = inputs[train], y[train], patches[train]
    for _ in range(50):
        for batch in torch.randperm(len(x)).split(100):
            loss = cross_entropy(model(x[batch]), target[batch])
            if weight:
                loss = loss + sum(regularizer(x[batch], target[batch], annotations[batch]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, inputs, part):
    return float((model(inputs[part]).argmax(1) == y[part]).float().mean())


plain = fit(telling)
print(f"accuracy on held-out images: {accuracy(plain, telling, held_out):.3f}")

# %%
# Captum's integrated gradients, averaged over these images, show what it goes by. A digit never has ink in the frame,
# and yet the four corners are lit, dimly, since each of them holds the patch in a quarter of the images only: a reason
# to look at the corners of the data.


def explain(model, inputs):
    """Magnitudes of integrated gradients from a black image, for the predicted class."""
    return IntegratedGradients(model).attribute(inputs, target=model(inputs).argmax(1)).abs().detach()


mean_map = explain(plain, telling[held_out]).mean(0)
figure = Figure(figsize=(4.5, 2.3), layout="constrained")
left, right = figure.subplots(1, 2)
draw_image(left, clean[held_out].mean(0), "mean digit, without patches")
draw_heat_map(right, torch.zeros(1, 12, 12), mean_map, "mean attribution, plain training")

# %%
# Removed
# -------
#
# ``RightForTheRightReasons`` adds the squared input gradient inside the annotations, here each image's own patch, to
# the loss. How large its weight should be, held-out accuracy cannot say: the patch tells the label there, too, so that
# the model that cheats has the best chance to win. What can be read from held-out images, without any knowledge of the
# test, is the share of the attribution that lies in the patch. We take the smallest weight that leaves it less than
# one percent; the patch is 4 of 144 pixels, 2.8 percent of the area.


def share_in_patch(model, inputs, part):
    attribution = explain(model, inputs[part])
    return float(((attribution * patches[part]).sum((1, 2, 3)) / attribution.sum((1, 2, 3))).mean())


candidates = {0.0: plain, **{weight: fit(telling, weight) for weight in (0.0001, 0.001, 0.01)}}
shares = {weight: share_in_patch(model, telling, held_out) for weight, model in candidates.items()}
for weight, model in candidates.items():
    print(f"weight {weight:<6} accuracy {accuracy(model, telling, held_out):.3f}   in the patch {shares[weight]:.1%}")
chosen = min((weight for weight in shares if shares[weight] < 0.01), default=max(shares))
right = candidates[chosen]
print(f"chosen: {chosen}")

# %%
# The scale of a good weight is that of the inputs: with pixels from 0 to 255, gradients are 255 times smaller and the
# weight for the same penalty 255 squared times larger.
#
# Proven
# ------
#
# The test images' patches say random digits. Beside the two models stands a third that never saw a patch, as the
# accuracy that there is to win back; it is judged on images without patches.

never = fit(clean)
print(f"plain, lying patches                {accuracy(plain, lying, test):.3f}")
print(f"right reasons, lying patches        {accuracy(right, lying, test):.3f}")
print(f"never saw a patch, no patches       {accuracy(never, clean, test):.3f}")

# %%
# The penalty is on the gradient at the image itself. A model could satisfy it and still go by the patch, by being flat
# there and steep elsewhere, so that the proof must not rest on that gradient. Three other witnesses: integrated
# gradients, which look at the whole way from black to the image; an intervention, the same images with another patch,
# which a model that reads digits should not notice; and the patch painted black, a deletion with the annotation as its
# ranking.

models = {"plain": plain, "right reasons": right}
x_test, patches_test = lying[test], patches[test]
predicted = {name: model(x_test).argmax(1) for name, model in models.items()}
measures = {
    "accuracy": {name: accuracy(model, lying, test) for name, model in models.items()},
    "attribution in the patch": {name: share_in_patch(model, lying, test) for name, model in models.items()},
    "predictions changed by another patch": {
        name: float((model(telling[test]).argmax(1) != predicted[name]).float().mean())
        for name, model in models.items()
    },
}
for name, model in models.items():
    target = predicted[name]
    with torch.no_grad():
        sure = float(model(x_test).softmax(1).gather(1, target[:, None]).mean())
        painted = float(deletion(model, x_test, patches_test, target=target, fraction=4 / 144, step_size=4).mean())
    print(f"{name:13}  probability of the predicted class {sure:.3f}, the patch painted black {painted:.3f}")

figure = Figure(figsize=(9, 1.8), layout="constrained")
for axis, (measure, values) in zip(figure.subplots(1, 3, sharey=True), measures.items(), strict=True):
    bars = axis.barh(list(values), list(values.values()), color=COLORS[:2])
    axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axis.set_title(measure, fontsize=9)
    axis.set_xlim(0, 1.2)
axis.invert_yaxis()

# %%
# Insertion and deletion of each model's own explanation are another matter, and it is worth knowing what they do *not*
# prove. They ask whether an explanation is faithful to its model, be that model's reason right or wrong. The plain
# model's map is as faithful as the other's: its deletion is as low, and its insertion curve lies lower only because
# it ends lower, at a model that is less certain when digit and patch contradict each other.

scores = {
    name: insertion_deletion(model, x_test, explain(model, x_test), target=predicted[name])
    for name, model in models.items()
}
figure = plot_curves(scores)

# %%
# Last, the maps themselves, over test images on which the two models disagree; above each map, what its model says.
# One more warning is in them: a dark patch misleads the plain model, too, and hardly shows in its map. Integrated
# gradients are multiplied by the distance from the baseline, so that from black they are blind to what is nearly black.

shown = [i for i in range(len(x_test)) if predicted["plain"][i] != predicted["right reasons"][i]][:4]
figure = plot_explanations(
    x_test[shown],
    {name: explain(model, x_test[shown]) for name, model in models.items()},
    titles={name: [f"says {int(k)}" for k in predicted[name][shown]] for name in models},
)
