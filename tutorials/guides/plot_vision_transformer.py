"""
Vision transformers and channels-last networks
==============================================

After this guide you can train the Grad-CAM of a network whose layers do not return ``(B, C, h, w)``. A vision
transformer returns tokens ``(B, n, D)``. Swin and similar networks return ``(B, h, w, C)``.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import SwinTransformer, VisionTransformer

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam, channels_first, tokens_to_map
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous()
y = torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1100], y[1000:1100]), batch_size=100)

# %%
# The vision transformer has patches of 2x2 pixels. Its tokens are a class token, then 4x4 patches. ``tokens_to_map``
# tells Grad-CAM this order.

torch.manual_seed(0)
vit = VisionTransformer(
    image_size=8, patch_size=2, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
)
# The head of torchvision's transformers starts at 0, so the maps are 0 at first. Train the task first.
optimizer = torch.optim.Adam(vit.parameters(), lr=3e-3)
ExplanationRegularizedTrainer(vit, optimizer, show_progress=False).fit(train, epochs=6)


def make_regularizer(vit):
    explainer = LayerGradCam(vit, vit.encoder.layers[-1].ln_1, reshape_transform=tokens_to_map(4, 4))
    return InsertionDeletion(
        explainer,
        baselines=0.0,
        insertion_weight=0.1,
        deletion_weight=0.1,
        steps_per_update=2,
    )


def fine_tune(vit, regularizers, judge):
    optimizer = torch.optim.Adam(vit.parameters(), lr=1e-3)
    trainer = ExplanationRegularizedTrainer(vit, optimizer, regularizers, evaluation=judge, show_progress=False)
    trainer.fit(train, val, epochs=4)


plain = copy.deepcopy(vit)
judges = {"plain": make_regularizer(plain), "ID-ExpO": make_regularizer(vit)}
fine_tune(plain, [], judges["plain"])
fine_tune(vit, [judges["ID-ExpO"]], judges["ID-ExpO"])

# %%
# Both networks were fine-tuned for as many epochs. With ID-ExpO, insertion is higher and deletion lower. The test
# images were used neither for training nor for the selection of the epoch. The map is Grad-CAM of the predicted class,
# with its sign. Blue is evidence against the class.

for name, judge in judges.items():
    scores = judge.scores(x[1300:1500])
    accuracy = (judge.predicted_class(x[1300:1500]) == y[1300:1500]).float().mean()
    insertion, deletion = scores.insertion.mean(), scores.deletion.mean()
    print(f"{name:7} accuracy {accuracy:.2f}, insertion {insertion:.2f}, deletion {deletion:.2f}")

shown = x[1300:1304]
figure = plot_explanations(
    shown, {name: judge.attribution(shown, judge.predicted_class(shown))[0] for name, judge in judges.items()}
)

# %%
# For a network with channels last, use ``channels_first``. It moves the channels.

swin = SwinTransformer([2, 2], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2], num_classes=10)
explainer = LayerGradCam(swin, swin.features[1], reshape_transform=channels_first)
print(explainer.attribute(shown, target=y[1300:1304], create_graph=True).shape)

# %%
# The mistake to avoid
# --------------------
#
# Do not explain a layer after the last block. Only the class token has a gradient there, so the map is 0 at all
# patches. Take the first normalisation *inside* the last block, as above. The regularizer warns of such maps:

import warnings

behind = LayerGradCam(vit, vit.encoder.ln, reshape_transform=tokens_to_map(4, 4))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    InsertionDeletion(behind, baselines=0.0)(shown, y[1300:1304])
print(caught[0].message)
