"""
Lightning, with validation
==========================

After this guide you can train for faithful explanations in a ``LightningModule``, and measure them in its validation.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedLoss
from captum_idexpo.attr import LayerGradCam
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_explanations

digits = load_digits()
x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True)
val = DataLoader(TensorDataset(x[1000:1300], y[1000:1300]), batch_size=100)

# %%
# ``ExplanationRegularizedLoss`` is the loss of a training step. ``scores`` returns hard insertion and deletion of the
# predicted class, one number per example. The loss holds the model. Do not also make the model an attribute of the
# ``LightningModule``: each weight would be stored twice.


class Explained(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
        regularizer = InsertionDeletion(
            LayerGradCam(model, model[0]),
            baselines=0.0,
            insertion_weight=0.1,
            deletion_weight=0.1,
            steps_per_update=2,
        )
        self.loss = ExplanationRegularizedLoss(model, [regularizer])

    def training_step(self, batch, _):
        loss, parts = self.loss(batch)
        self.log_dict(parts)
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        scores = self.loss.regularizers[0].scores(images)
        self.log("val_accuracy", (self.loss.model(images).argmax(1) == labels).float().mean())
        self.log("val_insertion", scores.insertion.mean())
        self.log("val_deletion", scores.deletion.mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


quiet = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
lightning.seed_everything(0, verbose=False)
explained = Explained()
trainer = lightning.Trainer(max_epochs=4, inference_mode=False, **quiet)
trainer.fit(explained, train, val)
results = trainer.validate(explained, val, verbose=False)
print({name: round(value, 3) for name, value in results[0].items()})

# %%

explained.eval()
shown, classes = x[1300:1304], y[1300:1304]
figure = plot_explanations(shown, {"trained": explained.loss.regularizers[0].attribution(shown, classes)[0]})

# %%
# The mistake to avoid
# --------------------
#
# Do not leave ``inference_mode=False`` out. Without it, Lightning validates under ``torch.inference_mode``, which
# forbids the gradients that Grad-CAM needs. ``fit`` alone does not show the mistake, because the validation inside it
# runs under ``no_grad``. ``validate`` and ``test`` show it:

try:
    lightning.Trainer(**quiet).validate(explained, val, verbose=False)
except RuntimeError as error:
    print(error)
