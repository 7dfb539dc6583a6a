"""What importing needs and tells, and that the text of the package keeps its promises."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain

import captum_idexpo
from tests.helpers import EXTRAS, EXTRAS_IMPORTS, ROOT, project

# What needs an extra: the extra, and a statement that needs it. matplotlib comes with Captum, which imports it.
NEEDS = {
    "trainer": ("train", "captum_idexpo.ExplanationRegularizedTrainer(model, optimizer)"),
    "torchmetrics": ("train", "metrics.Insertion(model)"),
    "Lime": ("lime", "attr.Lime(model).attribute(inputs, target=0)"),
    "slic": ("image", "feature_masks.slic(images)"),
    "quickshift": ("image", "feature_masks.quickshift(images)"),
    "felzenszwalb": ("image", "feature_masks.felzenszwalb(images)"),
    "pictures": ("plot", "sys.modules.update({'matplotlib.figure': None}); visualization.plot_history(history)"),
    "History.plot": ("plot", "sys.modules.update({'matplotlib.figure': None}); history.plot()"),
    "History.to_pandas": ("plot", "history.to_pandas()"),
    "Sweep.to_pandas": ("plot", "Sweep([{'accuracy': 0.5}]).to_pandas()"),
    "Comparison.to_pandas": ("plot", "compared.to_pandas()"),
    "Comparison.plot": ("plot", "sys.modules.update({'matplotlib.figure': None}); compared.plot()"),
}

# A new process in which importing an extra's package is an ImportError.
WITHOUT_EXTRAS = f"""
import json, runpy, sys
sys.modules.update(dict.fromkeys({EXTRAS_IMPORTS!r}))
import torch
state = torch.get_rng_state()
import captum_idexpo
from captum_idexpo import attr, feature_masks, metrics, regularizers, testing, training, visualization
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.training import History, Sweep
assert torch.equal(state, torch.get_rng_state()), "importing draws random numbers"

runpy.run_module("captum_idexpo", run_name="__main__")
model = torch.nn.Linear(3, 2)
inputs = torch.ones(2, 3)
for explainer in (
    attr.IntegratedGradients(model),
    attr.KernelShap(model),
    attr.Lime(model, interpretable_model=Ridge()),
):
    attributions = explainer.attribute(inputs, target=0, create_graph=True)
    assert metrics.insertion(model, inputs, attributions, target=0).shape == (2,)
    loss = captum_idexpo.ExplanationRegularizedLoss(model, [regularizers.InsertionDeletion(explainer, baselines=0.0)])
    total, parts = loss((inputs, torch.tensor([0, 1])))
    total.backward()
    assert model.weight.grad.isfinite().all()
images = torch.zeros(1, 3, 8, 8)
feature_masks.grid(images, 2)
history = History([{{"epoch": 1, "loss": 0.5}}])
history.plot()

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
compared = captum_idexpo.jury.compare(
    {{"a": model}}, [(inputs, torch.tensor([0, 1]))], {{"Saliency": attr.Saliency}}, {{"zero": 0.0}}, ["accuracy"]
)
messages = {{}}
for name, (_, statement) in {NEEDS!r}.items():
    try:
        exec(statement)
    except ImportError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""


def test_package_without_extras_trains_and_names_the_missing_extra():
    """All in one process, because its imports take the time."""
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *facts, messages = result.stdout.splitlines()
    assert facts[0].startswith("captum-idexpo:")
    for name, (extra, _) in NEEDS.items():
        assert f"`pip install 'captum-idexpo[{extra}]'`" in json.loads(messages)[name]


def test_oldest_tested_versions_are_the_oldest_admitted():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    tested = {line.replace("==", ">=") for line in lines if "==" in line}
    extras = project()["optional-dependencies"]
    admitted = {*project()["dependencies"], *chain.from_iterable(extras[name] for name in (*EXTRAS, "dev"))}
    lower = {requirement.partition(",<")[0] for requirement in admitted}  # Captum has an upper bound, too
    assert tested == {requirement for requirement in lower if not requirement.startswith("captum-idexpo[")}


def test_version_has_three_parts():
    assert captum_idexpo.__version__.count(".") == 2
