"""
timm, with gradient checkpointing
=================================

After this guide you can train the explanations of a `timm` network with gradient checkpointing. Checkpointing discards
activations after the forward pass, and computes them again in the backward pass. The guide is for networks without
random parts in training mode. For parts such as stochastic depth, set the rate to 0, which is timm's default for vision
transformers. BatchNorm in a checkpointed part works with the trainer's frozen statistics.
"""

import copy

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam, tokens_to_map
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1).contiguous()
y = torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1300], y[1000:1300]), batch_size=300)

# %%
# Attention has several kernels. Only one of them has the second derivative that explanations need. A checkpointed block
# must use the same kernel in the forward pass and in the backward pass. So choose the kernel for the whole training.

torch.manual_seed(0)
vit = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=10
)
vit.set_grad_checkpointing()
optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
ExplanationRegularizedTrainer(vit, optimizer, show_progress=False).fit(train, epochs=14)  # train the task first


def make_regularizer(vit):
    explainer = LayerGradCam(vit, vit.blocks[-1].norm1, reshape_transform=tokens_to_map(4, 4))
    return InsertionDeletion(
        explainer,
        baselines=0.0,
        insertion_weight=0.1,
        deletion_weight=0.1,
        steps_per_update=2,
    )


before, regularizer = copy.deepcopy(vit), make_regularizer(vit)
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
trainer = ExplanationRegularizedTrainer(vit, optimizer, [regularizer], show_progress=False)
with sdpa_kernel(SDPBackend.MATH):
    history = trainer.fit(train, val, epochs=4)

# %%

judges = {"before": make_regularizer(before.eval()), "after": regularizer}
for name, judge in judges.items():
    scores = judge.scores(x[1300:])
    accuracy = (judge.predicted_class(x[1300:]) == y[1300:]).float().mean()
    insertion, deletion = scores.insertion.mean(), scores.deletion.mean()
    print(f"{name:6} accuracy {accuracy:.2f}, insertion {insertion:.2f}, deletion {deletion:.2f}")

shown = x[1300:1304]
figure = plot_explanations(
    shown, {name: judge.attribution(shown, judge.predicted_class(shown))[0] for name, judge in judges.items()}
)

# %%
# The mistake to avoid
# --------------------
#
# Do not leave ``sdpa_kernel`` out. The forward pass of the explanation chooses the kernel with a second derivative by
# itself. The backward pass computes the blocks again, and would choose another kernel:

try:
    trainer.fit(train, epochs=1)
except RuntimeError as error:
    print(error)
