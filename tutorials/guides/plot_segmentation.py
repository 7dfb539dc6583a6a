"""
Segmentation: explain a sum over the pixels
===========================================

After this guide you can explain and train a network that returns a class for each pixel. An attribution explains one
number per image. So the logits of the pixels are first summed to one number, as in Captum's own tutorial.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

# %%
# The images are grey, with noise and a bright disc. The target is a class for each pixel, ``(B, 24, 24)``: 1 on the
# disc.

generator = torch.Generator().manual_seed(0)
centres = torch.randint(6, 18, (600, 2, 1, 1), generator=generator)
rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
y = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 16).long()
x = (0.5 * y + 0.5 * torch.rand(600, 24, 24, generator=generator))[:, None]
train = DataLoader(TensorDataset(x[:500], y[:500]), batch_size=25, shuffle=True, generator=generator)

# %%
# ``evidence`` returns the number that is explained: the log-odds of class 1, summed over all pixels. ``score`` returns
# the number that insertion and deletion measure: the mean log probability of the correct classes. It is high if the
# image is segmented well.

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 2, 1)
)


def evidence(images):
    logits = model(images)
    return (logits[:, 1] - logits[:, 0]).sum(dim=(1, 2))


def score(logits, target):
    return logits.log_softmax(dim=1).gather(1, target[:, None]).mean(dim=(1, 2, 3))


regularizer = InsertionDeletion(
    LayerGradCam(evidence, model[2]),
    baselines=0.0,
    forward_func=model,
    outputs=score,
    insertion_weight=0.1,
    deletion_weight=0.1,
    steps_per_update=2,
)
trainer = ExplanationRegularizedTrainer(
    model, torch.optim.Adam(model.parameters(), lr=3e-3), [regularizer], show_progress=False
)
history = trainer.fit(train, epochs=5)
accuracy = (model(x[500:]).argmax(1) == y[500:]).float().mean()
print(f"pixels right {accuracy:.3f}, task loss {history[-1]['task']:.3f}")

# %%

shown, target = x[500:504], y[500:504]
figure = plot_explanations(shown.clip(0, 1), {"Grad-CAM": regularizer.attribution(shown, target)[0]})

# %%
# The mistake to avoid
# --------------------
#
# Do not sum only the logit of one class, over only the pixels that the network assigns to that class. This network
# predicts "disc" where it finds no sign of the background. Inside the disc its logits are constant. So in most images
# that sum has no gradient, and its map is 0. The log-odds over all pixels also contain the evidence against the class.


def logit_inside(images):
    logits = model(images)
    return (logits[:, 1] * (logits.argmax(dim=1) == 1)).sum(dim=(1, 2))


print(LayerGradCam(logit_inside, model[2]).attribute(shown).abs().amax(dim=(1, 2, 3)))
