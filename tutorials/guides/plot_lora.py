"""
LoRA, or a frozen backbone
==========================

After this guide you can train for faithful explanations when only a few weights are trained: the low-rank adapters of
`peft`, or the head of a frozen network. The gradient of the explanation passes through the frozen weights, and reaches
the weights that require gradient.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

digits = load_digits()
x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1300], y[1000:1300]), batch_size=300)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32 * 64, 10)

    def forward(self, images):
        return self.head(self.second(self.first(images).relu()).relu().flatten(1))


torch.manual_seed(0)
network = Network()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
ExplanationRegularizedTrainer(network, optimizer, show_progress=False).fit(train, epochs=5)

# %%
# First wrap the network. Then find the layer *in the wrapped model*. Then create the optimizer from the parameters that
# require gradient.

before = copy.deepcopy(network)
lora = get_peft_model(network, LoraConfig(r=8, target_modules=["first", "second", "head"]))
layer = lora.get_submodule("base_model.model.second")


def make_regularizer(model, layer):
    return InsertionDeletion(
        LayerGradCam(model, layer),
        baselines=0.0,
        insertion_weight=0.1,
        deletion_weight=0.1,
        steps_per_update=2,
    )


regularizer = make_regularizer(lora, layer)
trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
trainer = ExplanationRegularizedTrainer(lora, torch.optim.Adam(trained, lr=1e-3), [regularizer], show_progress=False)
history = trainer.fit(train, val, epochs=3)
print(f"trained weights: {sum(p.numel() for p in trained)} of {sum(p.numel() for p in lora.parameters())}")

for name, judge in (("before", make_regularizer(before, before.second)), ("after", regularizer)):
    scores = judge.scores(x[1300:])
    print(f"{name:6} insertion {scores.insertion.mean():.3f}, 1 - deletion {1 - scores.deletion.mean():.3f}")

# %%

shown, classes = x[1300:1304], y[1300:1304]
maps = {
    "before": make_regularizer(before, before.second).attribution(shown, classes)[0],
    "after": regularizer.attribution(shown, classes)[0],
}
figure = plot_explanations(shown, maps)

# %%
# A frozen backbone does not need peft. Call ``requires_grad_(False)`` on the backbone, and create an optimizer of the
# other parameters. The gradient of the map reaches the head. (A map that does not depend on any trained weight has no
# graph. This raises an error.)

frozen = copy.deepcopy(before).requires_grad_(False)
frozen.head.requires_grad_(True)
terms = make_regularizer(frozen, frozen.second)(shown, classes)
sum(terms.values()).backward()
print(f"gradient at the head: {frozen.head.weight.grad.norm():.4f}, at the backbone: {frozen.second.weight.grad}")

# %%
# The mistake to avoid
# --------------------
#
# Do not create the explainer before you wrap the network. peft replaces the layers in place. An explainer of
# ``network.second`` then keeps the old layer, which the model now calls as a part of the adapter. The output of the old
# layer is that of the frozen convolution, without the adapter's part.

inner = make_regularizer(lora, layer.base_layer)
difference = regularizer.attribution(shown, classes)[0] - inner.attribution(shown, classes)[0]
print(f"the two maps differ by {difference.abs().mean() / maps['after'].abs().mean():.0%}")
