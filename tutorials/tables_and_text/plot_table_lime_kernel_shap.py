"""
A table: explain a diagnosis, and train for faithful explanations
=================================================================

After this tutorial you can explain a classifier of table rows with LIME and KernelSHAP, measure how faithful the
explanations are, and train the classifier for faithful ones.

A network reads ten measurements of the cell nuclei in a breast biopsy, and predicts the probability of a malignant
tumour. A person who decides by this prediction has two questions. Which measurements are evidence for it? Would the
prediction really change without them? LIME and KernelSHAP answer the first question with one bar per measurement.
Insertion and deletion answer the second question. We explain one patient, and measure how faithful such explanations
are. Then we fine-tune the network for faithful explanations, and explain the same patient again.
"""

import copy

import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.attr import KernelShap, id_expo_lime
from captum_idexpo.metrics import insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import plot_attribution_bars, plot_curves

# %%
# The data come with scikit-learn: 569 patients. Class 1 is malignant here. Every measurement has three columns: its
# mean over the nuclei, its standard error and its worst value. Separate explanations of the three columns are of little
# use, so a feature mask makes them one feature. LIME, KernelSHAP and the metrics all take the mask.

torch.manual_seed(0)
biopsies = load_breast_cancer()
x = torch.tensor(biopsies.data, dtype=torch.float32)
y = torch.tensor(1 - biopsies.target)
measurements = [name.removeprefix("mean ") for name in biopsies.feature_names[:10]]
feature_mask = torch.arange(30)[None] % 10  # ten means, ten errors, ten worst values

order = torch.randperm(len(x))
x, y = x[order], y[order]
x = (x - x[:284].mean(dim=0)) / x[:284].std(dim=0)
train, val = TensorDataset(x[:284], y[:284]), TensorDataset(x[284:398], y[284:398])
x_test, y_test = x[398:], y[398:]

# %%
# A masked measurement gets the value of its baseline. After standardisation the baseline 0 is the average patient,
# whose measurements are neither small nor large. A zero before standardisation would be a nucleus without radius, far
# from all data. (If the columns are not standardised, pass ``baselines="mean"``. The trainer then measures the mean.)
#
# The network is trained for at most 40 epochs. The training stops if the validation accuracy does not rise for ten
# epochs.

model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def fit(model, regularizers, epochs, evaluation=None):
    torch.manual_seed(0)
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
        regularizers,
        evaluation=evaluation,
        max_accuracy_drop=0.01 if regularizers or evaluation else None,
        show_progress=False,
    )
    trainer.fit(DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=114), epochs)
    model.eval()


fit(model, [], epochs=40)
before = copy.deepcopy(model)

# %%
# One patient
# -----------
#
# We explain the first patient of the test set who has a malignant tumour. LIME and KernelSHAP both explain the
# probability of that class. They explain a whole batch at once. Their masks are reproducible with torch's seed.
#
# The bars of KernelSHAP add up to the difference between this patient and the average patient: p(malignant) of this
# patient minus p(malignant) of the average patient. ID-ExpO's LIME is a regression without intercept. Its bars
# therefore divide the whole p(malignant) among the measurements, including the part of the average patient. So compare
# lengths within one colour, not between the colours.

patient = int((y_test == 1).nonzero()[0])
SAMPLING = {"feature_mask": feature_mask, "baselines": 0.0, "sampling": "independent", "return_input_shape": False}


def probabilities(model):
    return lambda rows: model(rows).softmax(dim=1)


def explain(model, rows, target):
    torch.manual_seed(0)
    return {
        "LIME": id_expo_lime(model).attribute(rows, target=target, n_samples=500, **SAMPLING),
        "KernelSHAP": KernelShap(probabilities(model)).attribute(rows, target=target, n_samples=500, **SAMPLING),
    }


row = x_test[patient : patient + 1]
explained = {name: values[0] for name, values in explain(model, row, 1).items()}
figure = plot_attribution_bars(explained, measurements)
figure.suptitle(f"p(malignant) = {float(probabilities(model)(row)[0, 1].detach()):.2f}")

# %%
# Are the explanations faithful?
# ------------------------------
#
# Insertion starts with all measurements at the average. It shows the network the measurements of a patient in the order
# of their bars, and averages the probability of the predicted class. It is high if a few measurements are enough.
# Deletion removes the measurements in that order. It is low if no other measurement carries the prediction.
# Sensitivity-n removes three random measurements, a hundred times. It correlates the sum of their bars with the fall of
# the probability. An explanation has to beat a random order of the measurements.


@torch.no_grad()
def judge(model):
    """Return the accuracy, a table of scores, and LIME's insertion and deletion."""
    predicted = model(x_test).argmax(dim=1)
    masked = {"baselines": 0.0, "feature_mask": feature_mask, "target": predicted}
    generator = torch.Generator().manual_seed(0)
    explained = explain(model, x_test, predicted)
    explained["random order"] = torch.randn(len(x_test), 10, generator=generator)
    rows, scores = {}, {}
    for name, values in explained.items():
        attribution = values[:, feature_mask[0]]  # one value per measurement, copied to its three columns
        correlation = sensitivity_n(
            probabilities(model), x_test, attribution, 3, outputs="probabilities", generator=generator, **masked
        )
        scores[name] = insertion_deletion(model, x_test, attribution, **masked)
        values = scores[name].insertion, 1 - scores[name].deletion, correlation
        rows[name] = [float(value.mean()) for value in values]
    table = pd.DataFrame(rows, index=["insertion", "1 - deletion", "sensitivity-3"]).T.round(3)
    return float((predicted == y_test).float().mean()), table, scores["LIME"]


accuracy_before, table_before, scores_before = judge(before)
table_before

# %%
# Both explanations beat a random order, but by less than desired. The curves below show why deletion is so high.
# Without the three or four highest measurements, most of the prediction is still there, because the other measurements
# carry the same information. For radius, perimeter and area the reason is geometry.

# %%
# Fine-tuning
# -----------
#
# We use the same trainer, now with LIME's insertion and deletion in the loss. LIME costs less than KernelSHAP here. The
# noise of LIME is no obstacle, because new masks are drawn at every step. With ``forward_func=model`` the masked copies
# are scored on the network's logits. KernelSHAP is not used in the training, so that it can judge the result
# independently.
#
# As a control, a copy of the network is trained further without the new terms. Its epoch is chosen by the same score.
# The control separates the effect of the terms from the effect of more training. An epoch may cost at most one point of
# validation accuracy.


def make_regularizer(model):
    return InsertionDeletion(
        id_expo_lime(model),
        forward_func=model,
        baselines=0.0,
        feature_mask=feature_mask,
        insertion_weight=0.02,
        deletion_weight=0.02,
        fraction=1.0,
        attribute_kwargs={"sampling": "independent", "n_samples": 100},
    )


fit(model, [make_regularizer(model)], epochs=15)
longer = copy.deepcopy(before)
fit(longer, [], epochs=15, evaluation=make_regularizer(longer))

accuracy_after, table_after, scores_after = judge(model)
accuracy_longer, table_longer, _ = judge(longer)
print(f"accuracy on {len(x_test)} patients: {accuracy_before:.3f} before, {accuracy_after:.3f} after, ", end="")
print(f"{accuracy_longer:.3f} trained longer without the terms")
pd.concat({"before": table_before, "after": table_after, "trained longer": table_longer})

# %%
# Insertion also rises with more training alone. Deletion improves mostly because of the terms. KernelSHAP took no part
# in the training, and gains as much as LIME. A random order gains a little insertion and loses in deletion. So the
# explanations have moved away from chance.
#
# Sensitivity-3 falls with the terms and without them. The probable reason is that a more certain network gives the same
# answer without most triples of measurements. The terms train the order of the bars. Sensitivity-n measures their
# lengths. If you read the lengths, do not train for the order alone.
#
# The figure shows the curves of LIME, as means over the test patients. The deletion curve ends where all measurements
# are at the average. Before that it lies lower, because the measurements that are deleted last are evidence for the
# other class.

figure = plot_curves({"before": scores_before, "after": scores_after})

# %%
# A network can reach a low deletion in a trivial way: it predicts with certainty that the average patient is healthy,
# or that the average patient is ill. The average patient is the baseline, so look at the prediction for it. With
# weights of 0.1 instead of 0.02 this does happen, and accuracy falls, too. Raise the weights only as far as this number
# and the accuracy allow.

average = torch.zeros(1, 30)
for name, network in (("before", before), ("after", model), ("trained longer", longer)):
    print(f"{name:15} p(malignant | average patient) = {float(probabilities(network)(average)[0, 1].detach()):.2f}")

# %%
# The same patient again
# ----------------------

explained_after = explain(model, row, 1)
figure = Figure(figsize=(9, 5), layout="constrained")
for axis, (name, values) in zip(figure.subplots(1, 2), explained.items(), strict=True):
    plot_attribution_bars({"before": values, "after": explained_after[name][0]}, measurements, axis=axis)
    axis.set_title(name, loc="left")

# %%
# Texture and smoothness had the longest bars before. Now their lead is larger. The bar of compactness changed its sign.
# Both methods show this change, so it is a change of the network and not of the explanation.
#
# ID-ExpO does not find a better explanation of the network that you have. It trains another network, which can be
# explained better. Validate that network again.
