"""What importing needs and tells, and that the text of the package keeps its promises."""

from __future__ import annotations

import subprocess
import sys

import captum_idexpo

# The extras; matplotlib, NumPy and tqdm come with Captum.
BLOCKED = ("sklearn", "accelerate", "safetensors", "torchvision", "skimage", "pandas")


def run(code):
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)


def test_importing_needs_only_torch_and_captum():
    code = (
        "import captum_idexpo, captum_idexpo.attr.surrogates, captum_idexpo.metrics, captum_idexpo.regularizers\n"
        "import captum_idexpo.training, captum_idexpo.feature_masks, captum_idexpo.visualization, torch\n"
        "from captum_idexpo.attr import KernelShap\n"
        "print(KernelShap(torch.nn.Linear(3, 2)).attribute(torch.ones(2, 3), target=0).shape)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 3])" in result.stdout


def test_the_trainer_names_its_extra():
    code = (
        "import torch, captum_idexpo\n"
        "model = torch.nn.Linear(3, 2)\n"
        "captum_idexpo.ExplanationRegularizedTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
    )
    result = run(code)
    assert "pip install 'captum-idexpo[train]'" in result.stderr


def test_importing_draws_no_random_number():
    code = (
        "import torch; torch.manual_seed(0); state = torch.get_rng_state(); import captum_idexpo;"
        "assert torch.equal(state, torch.get_rng_state())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_is_a_version():
    assert captum_idexpo.__version__.count(".") == 2
