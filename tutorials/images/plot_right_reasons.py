"""
Right for the right reasons: find a decoy, remove it, check the result
======================================================================

After this tutorial you can find wrong evidence that a classifier uses, stop the classifier from using it, and check
that it no longer does.

A classifier that is right in the laboratory may be right for a wrong reason, such as a ruler beside the tumour or a
hospital's stamp on the X-ray. We plant such a decoy in scikit-learn's handwritten digits, as Decoy MNIST does (Ross et
al. 2017, arXiv 1703.03717). We find the decoy with an attribution, and forbid it with ``RightForTheRightReasons``. Then
we check the model on images whose decoy indicates a random class.
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
# Each digit gets a black frame. One of the four corners of the frame has a patch of 2x2 pixels. In the training data,
# the grey value of the patch is ``1 - label / 10``, so the patch reveals the label. In the test data, the patch
# indicates a random digit. The patches hide no ink, so a model loses nothing if it ignores them.

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
# Find the decoy
# --------------
#
# We train a plain network. We measure its accuracy on 300 held-out images *of the same source*, where the patch still
# reveals the label. Nothing looks wrong.


def fit(inputs, weight=0.0):
    """Train a network on the training part, and penalise the use of the patches if there is a weight."""
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
# Captum's integrated gradients, averaged over these images, show what the network uses. A digit never has ink in the
# frame, but the attribution is not 0 in the four corners. It is weak there, because each corner has the patch in only a
# quarter of the images. This is a reason to look at the corners of the images.


def explain(model, inputs):
    """Return the magnitudes of integrated gradients from a black image, for the predicted class."""
    return IntegratedGradients(model).attribute(inputs, target=model(inputs).argmax(1)).abs().detach()


mean_map = explain(plain, telling[held_out]).mean(0)
figure = Figure(figsize=(4.5, 2.3), layout="constrained")
left, right = figure.subplots(1, 2)
draw_image(left, clean[held_out].mean(0), "mean digit, without patches")
draw_heat_map(right, torch.zeros(1, 12, 12), mean_map, "mean attribution, plain training")

# %%
# Remove the decoy
# ----------------
#
# ``RightForTheRightReasons`` adds the squared input gradient inside the annotations to the loss. Here the annotation of
# an image is its own patch.
#
# Held-out accuracy cannot tell how large the weight should be. The patch reveals the label there, too, so a model that
# uses the patch is likely to win. Another number helps: the share of the attribution that lies in the patch. It needs
# only held-out images, and nothing about the test. We take the smallest weight for which this share is less than one
# percent. The patch is 4 of 144 pixels, 2.8 percent of the area.


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
# A good weight depends on the scale of the inputs. With pixels from 0 to 255, gradients are 255 times smaller. The
# weight for the same penalty is then 255 squared times larger.
#
# Check the result
# ----------------
#
# The patches of the test images indicate random digits. We compare the two models with a third model that never saw a
# patch. Its accuracy is the accuracy that can be regained. It is measured on images without patches.

never = fit(clean)
print(f"plain, lying patches                {accuracy(plain, lying, test):.3f}")
print(f"right reasons, lying patches        {accuracy(right, lying, test):.3f}")
print(f"never saw a patch, no patches       {accuracy(never, clean, test):.3f}")

# %%
# The penalty is on the gradient at the image itself. A model could have a small gradient there, a large one elsewhere,
# and still use the patch. So the check must not rely on that gradient. We use three other checks:
#
# * Integrated gradients use the whole path from black to the image.
# * An intervention gives the same images another patch. A model that reads digits should not change its prediction.
# * A deletion paints the patch black. The annotation is its ranking.

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
# Insertion and deletion of each model's own explanation measure something else. It is important to know what they do
# *not* prove. They measure whether an explanation is faithful to its model. The reason of that model can be right or
# wrong. The plain model's map is as faithful as the other model's map. Its deletion is as low. Its insertion curve lies
# lower only because the curve ends lower: the plain model is less certain when digit and patch contradict each other.

scores = {
    name: insertion_deletion(model, x_test, explain(model, x_test), target=predicted[name])
    for name, model in models.items()
}
figure = plot_curves(scores)

# %%
# The last figure shows the maps of test images on which the two models disagree. Above each map is the prediction of
# its model. The maps contain one more warning. A dark patch also misleads the plain model, but hardly shows in its map.
# Integrated gradients are multiplied by the distance from the baseline. From a black baseline, they are therefore close
# to 0 at pixels that are nearly black.

shown = [i for i in range(len(x_test)) if predicted["plain"][i] != predicted["right reasons"][i]][:4]
figure = plot_explanations(
    x_test[shown],
    {name: explain(model, x_test[shown]) for name, model in models.items()},
    titles={name: [f"says {int(k)}" for k in predicted[name][shown]] for name in models},
)
