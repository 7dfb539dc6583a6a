"""
timm, with gradient checkpointing
=================================

After this guide you can train the explanations of a network of `timm` whose activations are checkpointed: thrown away
after the forward pass, and computed again in the backward pass.
"""

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
val = DataLoader(TensorDataset(x[1000:1200], y[1000:1200]), batch_size=200)

# %%
# Attention has several kernels, of which one has the second derivative that explanations need. A checkpointed block has
# to be computed by the same kernel in the forward and in the backward pass, so choose it around the training.

torch.manual_seed(0)
vit = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=10
)
vit.set_grad_checkpointing()
optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
ExplanationRegularizedTrainer(vit, optimizer, show_progress=False).fit(train, epochs=14)  # the task first

layer = vit.blocks[-1].norm1
regularizer = InsertionDeletion(
    LayerGradCam(vit, layer, reshape_transform=tokens_to_map(4, 4)),
    baselines=0.0,
    deletion_form="complement",
    steps_per_update=2,
)
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
trainer = ExplanationRegularizedTrainer(vit, optimizer, [regularizer], show_progress=False)
with sdpa_kernel(SDPBackend.MATH):
    history = trainer.fit(train, val, epochs=2)
print(f"accuracy {history[-1]['val_accuracy']:.2f}, insertion {history[-1]['val_insertion']:.2f}")

# %%

shown, classes = x[1200:1204], y[1200:1204]
figure = plot_explanations(shown, {"Grad-CAM": regularizer.attribution(shown, classes)[0]})

# %%
# The mistake to avoid
# --------------------
#
# Leaving ``sdpa_kernel`` out. The forward pass of the explanation takes the kernel with a second derivative by itself;
# the backward pass, which computes the blocks again, would take another one:

try:
    trainer.fit(train, epochs=1)
except RuntimeError as error:
    print(error)
