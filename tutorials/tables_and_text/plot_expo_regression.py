"""
ExpO for a regression: a network that a straight line describes
===============================================================

After this tutorial you can train a regression network whose predictions LIME's lines describe well, and measure the
error of these lines.

The data are diabetes patients, with ten measurements each. The target is the progression of the disease a year later. A
network predicts the progression as well as such data allow. LIME explains a prediction by a line: so many points for
each unit of the body mass index. Such an explanation is as good as the line. ExpO (Plumb et al. 2020, arXiv 1902.06787)
adds the error of the line to the loss. The network then becomes nearly linear around each patient. It is still free to
be nonlinear from one patient to the next. We train with and without ExpO, compare the errors, and look at one patient.
"""

import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from torch import Generator, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from captum_idexpo import ExplanationRegularizedTrainer
from captum_idexpo.metrics import LocalLinearModels, neighborhood_fidelity
from captum_idexpo.regularizers import Fidelity, GaussianNeighbors, Stability
from captum_idexpo.visualization import COLORS

# %%
# The data come with scikit-learn: 442 patients. Half of them train the network, a quarter choose the epoch and a
# quarter test it. Features and target are standardised with the means and standard deviations of the training patients,
# so a step of 1 is one standard deviation. The errors below are in standard deviations of the target, too, unless they
# are called points.

patients = load_diabetes(scaled=False)
features = torch.tensor(patients.data, dtype=torch.float32)
progression = torch.tensor(patients.target, dtype=torch.float32)[:, None]


def split(seed):
    order = torch.randperm(len(features), generator=Generator().manual_seed(seed))
    rows = order.split([221, 111, 110])
    x, y = ((values - values[rows[0]].mean(0)) / values[rows[0]].std(0) for values in (features, progression))
    return [TensorDataset(x[part], y[part]) for part in rows]


# %%
# We train the same network in four ways, from the same initial weights. ``weight="auto"`` measures the first batch, and
# sets the weight so that the term is ``ratio`` times the task loss there. So you need not know the unit of the target.
# The ratios are small because a network is nearly linear before it is trained. (On most of the tables in
# ``benchmarks/expo_uci.py`` these ratios cost no error.) ``GaussianNeighbors(0.5)`` draws points half a standard
# deviation away in all features. 1D-Fidelity moves a single random feature instead.


def regularizers(model):
    settings = {"weight": "auto", "outputs": "raw", "generator": Generator().manual_seed(0)}
    one_dimensional = GaussianNeighbors(0.5, one_dimensional=True)
    return {
        "plain": [],
        "Fidelity": [Fidelity(model, GaussianNeighbors(0.5), ratio=0.03, **settings)],
        "1D-Fidelity": [Fidelity(model, one_dimensional, ratio=0.03, **settings)],
        "Stability": [Stability(model, ratio=0.003, **settings)],
    }


METHODS = ("plain", "Fidelity", "1D-Fidelity", "Stability")


def train(method, train_set, val_set):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1))
    trainer = ExplanationRegularizedTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        regularizers(model)[method],
        mse_loss,
        show_progress=False,
    )
    trainer.fit(DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(val_set, batch_size=111), epochs=40)
    return model.eval()


# %%
# The trainer keeps the epoch with the lowest validation error, and ignores the explanations. So each network is the
# best predictor that its loss gave. The judge is not the penalty. The judge is LIME with a ridge regression on 1000
# neighbours, which are weighted by distance. *Neighbourhood fidelity* is the squared error of LIME's line on new
# neighbours, a tenth of a standard deviation away.


@torch.no_grad()
def judge(model, test_set):
    x, y = test_set.tensors
    lime = LocalLinearModels(model, generator=Generator().manual_seed(0))
    fidelity = neighborhood_fidelity(lime, model, x, generator=Generator().manual_seed(1))
    return float(mse_loss(model(x), y)), fidelity


splits = [split(seed) for seed in range(3)]
models = {method: [train(method, *parts[:2]) for parts in splits] for method in METHODS}
judged = {
    method: [judge(model, parts[2]) for model, parts in zip(models[method], splits, strict=True)] for method in METHODS
}
table = pd.DataFrame(
    {
        "mean squared error": {m: sum(mse for mse, _ in rows) / 3 for m, rows in judged.items()},
        "neighbourhood fidelity": {m: float(torch.cat([f for _, f in rows]).mean()) for m, rows in judged.items()},
    }
)
table.round(5)

# %%
# The table shows means over three splits. The mean squared errors differ by less than a hundredth. The error of the
# line falls to a sixth with Fidelity and to a quarter with 1D-Fidelity. Here both evaluate 20 neighbours per patient.
# With a hundred features, Fidelity would need 200 neighbours and 1D-Fidelity still 20. Stability asks for constant
# outputs, not for linear ones. At a ratio that costs no error, it does not improve the line.
#
# The square roots of the columns are errors in the unit of the target. For every network, the error of the line is
# small compared with the error of the prediction. This network is rather linear by itself, because its training stops
# at its best epoch.

points = float(progression.std()) * table**0.5
for method, (error, gap) in zip(METHODS, points.to_numpy(), strict=True):
    print(f"{method:12} the prediction is off by {error:.0f} points, LIME's line off the prediction by {gap:.1f}")

# %%
# Every test patient of the first split
# -------------------------------------
#
# A mean does not show the single patients. Below the diagonal are patients for whom the line describes ExpO's network
# better than the plain network. The patients above the diagonal already had a good line.

plain, expo = judged["plain"][0][1], judged["Fidelity"][0][1]
figure = Figure(figsize=(4, 4), layout="constrained")
axis = figure.subplots()
axis.loglog(plain, expo, ".", color=COLORS[1])
ends = [float(min(plain.min(), expo.min())), float(max(plain.max(), expo.max()))]
axis.plot(ends, ends, color="black", linewidth=0.8)
axis.set(title="neighbourhood fidelity of each patient", xlabel="plain", ylabel="Fidelity")
print(f"{int((expo < plain).sum())} of {len(plain)} patients lie below the diagonal")

# %%
# One patient
# -----------
#
# We take the patient for whom the line describes the plain network worst. We change this patient's body mass index and
# keep all other features. The curve is the output of the network. The dashed line is LIME's description of it.


def draw(axis, method, number, feature="bmi"):
    model, test_set = models[method][0], splits[0][2]
    patient, column = test_set.tensors[0][number], patients.feature_names.index(feature)
    explanation = LocalLinearModels(model, generator=Generator().manual_seed(0))(patient[None])
    moved = patient.repeat(101, 1)
    moved[:, column] = patient[column] + torch.linspace(-1.5, 1.5, 101)
    with torch.no_grad():
        curve, line, here = model(moved)[:, 0], explanation(moved[None])[0, :, 0], model(patient[None])[0]
    units, zero = (float(value) for value in (features[:, column].std(), features[:, column].mean()))
    level, deviation = float(progression.mean()), float(progression.std())
    axis.plot(zero + units * moved[:, column], level + deviation * curve, color=COLORS[1], label="network")
    axis.plot(zero + units * moved[:, column], level + deviation * line, "--", color=COLORS[2], label="LIME's line")
    axis.plot(zero + units * patient[column], level + deviation * here, "o", color="black", label="patient")
    slope = deviation / units * float(explanation.coefficients[0, column, 0])
    off = deviation * abs(float(explanation(patient[None]) - here))
    axis.set(
        title=f"{method}: {slope:.1f} points for each kg/m²,\nthe patient off the line by {off:.0f}",
        xlabel="body mass index",
        ylabel="progression",
    )
    axis.legend(frameon=False)


worst = int(plain.argmax())
figure = Figure(figsize=(8, 3.5), layout="constrained")
for axis, method in zip(figure.subplots(1, 2, sharey=True), ("plain", "Fidelity"), strict=True):
    draw(axis, method, worst)

# %%
# LIME's line is fitted to a wide neighbourhood of one standard deviation in each of the ten features. Where the network
# is not linear in this neighbourhood, the line misses even the prediction that it explains. Then "so many points for
# each unit" does not describe this patient. This patient was chosen as the worst one. The figure before shows all
# patients.
