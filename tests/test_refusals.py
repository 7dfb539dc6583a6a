"""Each line of the table of refusals is raised here, with the type and the cure that the page names."""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path

import captum.attr
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearModel
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import captum_idexpo
from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer, training
from captum_idexpo._core.compiled import can_run_eagerly
from captum_idexpo.attr import (
    LRP,
    GradientShap,
    GuidedBackprop,
    IntegratedGradients,
    KernelShap,
    LayerActivation,
    LayerFeatureAblation,
    LayerGradCam,
    Lime,
    Saliency,
)
from captum_idexpo.attr.surrogates import Ridge
from captum_idexpo.baselines import mean_inputs
from captum_idexpo.metrics import insertion
from captum_idexpo.regularizers import Fidelity, InsertionDeletion, RightForTheRightReasons, Sparsity

PAGE = Path(__file__).parents[1] / "docs" / "refusals.rst"
X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 0])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Checkpointed(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.part, self.last = nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(checkpoint(self.part, x, use_reentrant=False))


class Attending(nn.Module):
    def __init__(self, checkpointed=True):
        super().__init__()
        self.first, self.last, self.checkpointed = nn.Linear(6, 6), nn.Linear(3, 3), checkpointed

    def attention(self, x):
        return scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        tokens = self.first(x).reshape(-1, 1, 2, 3)
        run = partial(checkpoint, self.attention, use_reentrant=False) if self.checkpointed else self.attention
        attended = run(tokens)
        return self.last(attended.mean((1, 2)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(self.layer(x)))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


def trainer_of(model, regularizers=(), optimizer=torch.optim.SGD, **settings):
    return ExplanationRegularizedTrainer(
        model, optimizer(model.parameters(), lr=0.1), regularizers, show_progress=False, **settings
    )


def train_attention(model):
    trainer_of(model, [RightForTheRightReasons(model)]).fit([(X, Y, (X > 0).float())], epochs=2)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def mixing(x):
    return net()(x - x.mean(dim=0))


def frozen():
    return net().requires_grad_(False)


def under(mode, call):
    with mode:
        return call()


def train(model, attribution, **more):
    gradients = torch.autograd.grad(attribution.square().sum(), [*model.parameters()], **more)
    return sum(gradient.sum() for gradient in gradients)


def bounded(forward, model):
    return KernelShap(forward).attribute(X, target=1, n_samples=20, create_graph=True, memory_budget=1.0)


def jittered(model):
    numbers = itertools.count()
    return lambda x: model(x) * (1 + next(numbers))


def of_another_run(folder):
    trainer_of(net(), checkpoint_dir=folder).fit([(X, Y)])
    trainer_of(net(), checkpoint_dir=folder).fit([(X, Y)])


def with_own_rule():
    class Own(EpsilonRule):
        pass

    model = net()
    model[0].rule = Own()
    return LRP(model).attribute(X, target=1, create_graph=True)


def own_masks(x, **_):
    return torch.bernoulli(torch.full((1, 6), 0.5))


def ridge_lime(**arguments):
    return Lime(net(), Ridge()).attribute(X, target=1, n_samples=20, **arguments)


def inside_a_checkpoint():
    model = Checkpointed()
    return LayerFeatureAblation(model, model.part[0]).attribute(X, target=1, create_graph=True)


RAISED = {
    "Rows of a forward pass influence each other": lambda _: KernelShap(mixing).attribute(X, target=1, n_samples=20),
    "BatchNorm or dropout in training mode": lambda _: Fidelity(Checkpointed(nn.Dropout()))(X, Y),
    "The trainer: attention": lambda _: train_attention(Attending()),
    "A layer inside a part": lambda _: inside_a_checkpoint(),
    "A layer that runs several times": lambda _: LayerGradCam((twice := Twice()), twice.layer).attribute(X, target=1),
    "``create_graph=True`` under": lambda _: under(
        torch.no_grad(), lambda: Saliency(net()).attribute(X, target=1, create_graph=True)
    ),
    "An attribution that takes gradients": lambda _: under(
        torch.inference_mode(), lambda: Saliency(net()).attribute(X, target=1)
    ),
    "``create_graph=True`` where nothing": lambda _: KernelShap(frozen()).attribute(
        X, target=1, n_samples=20, create_graph=True
    ),
    "An explainer of Captum": lambda _: InsertionDeletion(captum.attr.Saliency(net()), baselines=0.0),
    "A surrogate of scikit-learn": lambda _: Lime(net(), SkLearnLinearModel("linear_model.ElasticNet")).attribute(
        X, target=1, create_graph=True
    ),
    "An own ``perturb_func``": lambda _: Lime(net(), Ridge(), perturb_func=own_masks).attribute(
        X, target=1, sampling="independent"
    ),
    "A generator with Captum": lambda _: ridge_lime(generator=torch.Generator()),
    "LIME or KernelSHAP of more": lambda _: Sparsity(KernelShap(nn.Linear(2000, 3)))(
        torch.randn(4, 2000), torch.tensor([0, 1, 2, 0])
    ),
    "GradientShap without": lambda _: Sparsity(GradientShap(net())),
    "A convergence delta": lambda _: Sparsity(
        GradientShap(net()), attribute_kwargs={"baselines": X, "return_convergence_delta": True}
    ),
    "A second derivative": lambda _: train((model := net()), bounded(model, model), create_graph=True),
    "A ``memory_budget`` and": lambda _: IntegratedGradients(net()).attribute(
        X, target=1, create_graph=True, memory_budget=1.0, return_convergence_delta=True
    ),
    "Random numbers of neither": lambda _: train((model := net()), bounded(jittered(model), model)),
    "Targets of a regression": lambda _: Fidelity(net())(X, torch.tensor([1.5, 2.5, 0.1, 7.0])),
    "Cross-entropy of outputs": lambda _: ExplanationRegularizedLoss(nn.Linear(6, 1))((X, torch.ones(4, 1))),
    "Guided gradients": lambda _: InsertionDeletion(GuidedBackprop(nn.Linear(6, 1)), baselines=0.0)(X, Y // 2),
    "A regularizer or judge": lambda _: ExplanationRegularizedLoss(
        net(), [InsertionDeletion(Saliency(net()), baselines=0.0)]
    ),
    "Soft masks of token ids": lambda _: insertion(
        lambda ids: ids[:, :3].float(), X.long(), X, target=1, temperature="auto"
    ),
    "Several labels per example": lambda _: Sparsity(Saliency(net()))(X, torch.ones(4, 3).long()),
    "A layer of steps": lambda _: Sparsity(LayerActivation(steps := nn.Sequential(net(), Mean()), steps[0]))(
        torch.randn(4, 5, 6), Y
    ),
    "The mean of series": lambda _: mean_inputs([(torch.randn(4, 5, 6), Y)]),
    "Side inputs": lambda _: Sparsity(Saliency(net()))(X, Y, additional_forward_args=torch.ones(2)),
    "Batches of another form": lambda _: ExplanationRegularizedLoss(net())({"image": X, "label": Y}),
    "A feature mask of booleans": lambda _: insertion(net(), X, X, target=1, feature_mask=X > 0),
    "A mapping": lambda _: insertion(net(), {"x": X}, X, target=1),
    "Attributions in another shape": lambda _: insertion(
        lambda x: x.flatten(1)[:, :3], torch.rand(4, 3, 8, 8), torch.rand(4, 1, 4, 4), target=1
    ),
    "``baselines=": lambda _: InsertionDeletion(Saliency(net()), baselines="mean")(X, Y),
    "``weight=": lambda _: Sparsity(Saliency(net()), weight="auto")(X, Y),
    "Annotations that are missing": lambda _: RightForTheRightReasons(net())(X, Y),
    "A compiled model": lambda _: trainer_of(
        compiled := torch.compile(net(), backend="eager"), [Sparsity(Saliency(compiled))]
    ),
    "LBFGS": lambda _: trainer_of(net(), optimizer=torch.optim.LBFGS),
    "A model whose parameters": lambda _: trainer_of(frozen()),
    "An iterator": lambda _: trainer_of(net()).fit(iter([(X, Y)]), epochs=2),
    "Checkpoints of another run": of_another_run,
    "LRP with": lambda _: with_own_rule(),
}


def rows():
    """Case, error and cure of each line, on one line."""
    for row in PAGE.read_text().split("   * - ")[2:]:
        yield tuple(" ".join(cell.split()) for cell in row.split("\n     - "))


def test_refusals_on_the_page_are_those_raised_here():
    cases = [case for case, _, _ in rows()]
    assert len(cases) == len(RAISED)
    for name in RAISED:
        assert sum(case.startswith(name) for case in cases) == 1, name


@pytest.mark.parametrize("name", RAISED)
@pytest.mark.filterwarnings("ignore")
def test_refusal_raises_the_listed_error_and_names_the_cure(name, tmp_path):
    if name == "A second derivative" and not can_run_eagerly():
        pytest.skip("an older PyTorch raises its own RuntimeError first")
    _, error, cure = next(row for row in rows() if row[0].startswith(name))
    kinds = {**vars(captum_idexpo), "CheckpointError": training.CheckpointError}
    kind = kinds.get(error) or getattr(__import__("builtins"), error)
    with pytest.raises(kind) as raised:
        RAISED[name](tmp_path)
    message = str(raised.value)
    for code in re.findall(r"``(.+?)``", cure):
        assert re.split(r"[=(.\[{]", code.strip())[0].split()[-1] in message, (code, message)


def test_attention_in_a_checkpoint_trains_as_without_one_under_the_cure_that_the_page_names():
    trained = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            trained.append(train_attention(Attending(checkpointed)))
    torch.testing.assert_close(*trained)
