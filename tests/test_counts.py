"""What each call costs in forward passes, rows and rows at a time: counted, since counts do not flake as seconds do.

A change that adds one fails here; one that saves some lowers the number.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from captum_idexpo import ExplanationRegularizedLoss, ExplanationRegularizedTrainer
from captum_idexpo.attr import KernelShap, LayerGradCam, Lime, id_expo_lime
from captum_idexpo.attr.surrogates import BayesianRidge, Ridge
from captum_idexpo.feature_masks import grid
from captum_idexpo.metrics import deletion, insertion, insertion_deletion, sensitivity_n
from captum_idexpo.regularizers import InsertionDeletion

B = 6


class Cost(NamedTuple):
    forwards: int
    rows: int
    peak_rows: int


class Counted:
    """A small CNN, a batch of six images, and the sizes of all batches that go through the model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.model = nn.Sequential(self.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
        self.x, self.y = torch.randn(B, 3, 32, 32), torch.arange(B) % 5
        self.maps = torch.randn(B, 1, 32, 32)
        self.sizes: list[int] = []
        self.model.register_forward_pre_hook(lambda _module, inputs: self.sizes.append(len(inputs[0])))

    @property
    def cost(self) -> Cost:
        return Cost(len(self.sizes), sum(self.sizes), max(self.sizes))

    def lime(self, **arguments) -> Tensor:
        return Lime(self.model, Ridge()).attribute(self.x, **self.samples(**arguments))

    def samples(self, **arguments):
        return {
            "target": self.y,
            "feature_mask": grid(self.x, 4),
            "n_samples": 100,
            "sampling": "independent",
            **arguments,
        }

    def regularizer(self, **settings) -> InsertionDeletion:
        return InsertionDeletion(LayerGradCam(self.model, self.conv), baselines=0.0, **settings)

    def lime_regularizer(self, **settings) -> InsertionDeletion:
        return InsertionDeletion(
            id_expo_lime(self.model),
            baselines=0.0,
            forward_func=self.model,
            feature_mask=lambda x: grid(x, 4),
            attribute_kwargs={"n_samples": 100, "sampling": "independent"},
            **settings,
        )

    def train(self, regularizer: InsertionDeletion) -> None:
        sum(regularizer(self.x, self.y).values()).backward()

    def trainer(self) -> ExplanationRegularizedTrainer:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        return ExplanationRegularizedTrainer(self.model, optimizer, [self.regularizer()], show_progress=False)


LOOK = 2 * B  # two passes: the plain inputs, then half of them twice, to see whether rows influence each other
HALF = 16 * B  # of 32 steps
CHUNK = 20 * B  # 21 copies of the batch have 2^19 values in the first layer's output; a hundred are five times 20

CASES = {
    # 100 copies of 6 images, at most 21 copies at a time.
    "lime": (lambda c: c.lime(), Cost(2 + 5, LOOK + 100 * B, CHUNK)),
    "lime, shared masks": (lambda c: c.lime(share_masks=True), Cost(2 + 5, LOOK + 100 * B, CHUNK)),
    "lime, Captum's stream": (lambda c: c.lime(sampling="captum"), Cost(2 + 5, LOOK + 100 * B, CHUNK)),
    "lime, rows named": (lambda c: c.lime(perturbations_per_eval=50), Cost(2 + 2, LOOK + 100 * B, 50 * B)),
    "lime, with graph": (lambda c: c.lime(create_graph=True).sum().backward(), Cost(2 + 5, LOOK + 100 * B, CHUNK)),
    "lime, with its graph kept in a budget": (
        lambda c: c.lime(create_graph=True, memory_budget=1e9).sum().backward(),
        Cost(2 + 1 + 5, LOOK + B + 100 * B, CHUNK),
    ),
    "lime, in two passes": (
        lambda c: c.lime(create_graph=True, memory_budget=24e6).sum().backward(),
        Cost(2 + 1 + 2 * 5, LOOK + B + 2 * 100 * B, CHUNK),
    ),
    "lime, one example": (
        lambda c: Lime(c.model, Ridge()).attribute(c.x[:1], **c.samples(target=0)),
        Cost(1 + 1, 2 + 100, 100),
    ),
    "lime, orthogonal and Bayesian": (
        lambda c: Lime(c.model, BayesianRidge()).attribute(c.x, **c.samples(sampling="orthogonal")),
        Cost(2 + 5, LOOK + 100 * B, CHUNK),
    ),
    "kernel shap": (
        lambda c: KernelShap(c.model).attribute(c.x, **c.samples()),
        Cost(2 + 5, LOOK + 100 * B, CHUNK),
    ),
    "kernel shap, leverage": (
        lambda c: KernelShap(c.model).attribute(c.x, **c.samples(sampling="leverage")),
        Cost(2 + 5, LOOK + 100 * B, CHUNK),
    ),
    "grad-cam": (lambda c: LayerGradCam(c.model, c.conv).attribute(c.x, target=c.y), Cost(1, B, B)),
    "grad-cam, with graph": (
        lambda c: LayerGradCam(c.model, c.conv).attribute(c.x, target=c.y, create_graph=True).sum().backward(),
        Cost(1, B, B),
    ),
    # 32 steps each way.
    "insertion": (lambda c: insertion(c.model, c.x, c.maps, target=c.y), Cost(2 + 2, LOOK + 32 * B, HALF)),
    "deletion": (lambda c: deletion(c.model, c.x, c.maps, target=c.y), Cost(2 + 2, LOOK + 32 * B, HALF)),
    "insertion and deletion": (
        lambda c: insertion_deletion(c.model, c.x, c.maps, target=c.y),
        Cost(2 + 4, LOOK + 64 * B, HALF),
    ),
    "insertion and deletion, soft": (
        lambda c: insertion_deletion(c.model, c.x, c.maps, target=c.y, temperature="auto"),
        Cost(2 + 4, LOOK + 64 * B, HALF),
    ),
    "insertion and deletion, rows named": (
        lambda c: insertion_deletion(c.model, c.x, c.maps, target=c.y, max_examples_per_batch=4),
        Cost(2 + 2 * (32 + 16), 2 * 4 + 64 * B, 4),  # four images by one copy, two by two
    ),
    # One evaluation of the plain inputs, one a subset.
    "sensitivity-n": (
        lambda c: sensitivity_n(c.model, c.x, c.maps, 10, target=c.y),
        Cost(2 + 1 + 5, LOOK + B + 100 * B, CHUNK),
    ),
    # A look, the explanation, two times k steps.
    "id-expo, grad-cam": (
        lambda c: c.train(c.regularizer()),
        Cost(2 + 1 + 2, LOOK + B + 8 * B, 4 * B),
    ),
    "id-expo, grad-cam, all steps": (
        lambda c: c.train(c.regularizer(steps_per_update=None)),
        Cost(2 + 1 + 4, LOOK + B + 64 * B, HALF),
    ),
    # The ratio also evaluates the plain inputs.
    "id-expo, grad-cam, ratio": (
        lambda c: c.train(c.regularizer(deletion_form="ratio")),
        Cost(2 + 1 + 2 + 1, LOOK + B + 8 * B + B, 4 * B),
    ),
    # A look each by the loss and by LIME, 11 copies to see whether the model reads masks (until that is clear), and one
    # image to see how many columns are explained.
    "id-expo, lime": (
        lambda c: c.train(c.lime_regularizer()),
        Cost(2 * 2 + 2 + 1 + 5 + 2, 2 * LOOK + 11 * B + 1 + 100 * B + 8 * B, CHUNK),
    ),
    "scores of a regularizer": (
        lambda c: c.regularizer().scores(c.x, c.y),
        Cost(2 + 1 + 4, LOOK + B + 64 * B, HALF),
    ),
    "loss module": (
        lambda c: ExplanationRegularizedLoss(c.model, [c.regularizer()], cross_entropy)((c.x, c.y)),
        Cost(2 + 4, B + LOOK + B + 8 * B, 4 * B),
    ),
    # The last line: whether the epoch's last step left a finite loss.
    "trainer": (
        lambda c: c.trainer().fit([(c.x, c.y)] * 3, epochs=1),
        Cost(3 * (2 + 4) + 1, 3 * (B + LOOK + B + 8 * B) + B, 4 * B),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cost_of_a_call_is_the_recorded_one(name):
    call, expected = CASES[name]
    counted = Counted()
    call(counted)
    assert counted.cost == expected


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.n += 1
        return operation(*args, **(kwargs or {}))


# On a CPU each costs some microseconds, next to a small model that has left nothing in the caches.
OPERATIONS = {
    "lime": (lambda c, n: c.lime(n_samples=25 * n, perturbations_per_eval=5), 13),
    "lime, shared masks": (lambda c, n: c.lime(n_samples=25 * n, perturbations_per_eval=5, share_masks=True), 13),
    "insertion": (
        lambda c, n: insertion(c.model, c.x, c.maps, target=c.y, fraction=n / 8, max_examples_per_batch=B, step_size=8),
        14,
    ),
    "deletion, soft": (
        lambda c, n: deletion(
            c.model, c.x, c.maps, target=c.y, fraction=n / 8, max_examples_per_batch=B, step_size=8, temperature="auto"
        ),
        17,
    ),
}
OF_THE_MODEL = 7


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_beside_a_forward_pass_are_few(name):
    """Of many passes that which few passes do not need, at most: newer versions of PyTorch need one less."""
    call, at_most = OPERATIONS[name]
    counts, passes = [], []
    for n in (4, 8):
        counted = Counted()
        with Operations() as operations, torch.no_grad():
            call(counted, n)
        counts.append(operations.n)
        passes.append(counted.cost.forwards)
    assert (counts[1] - counts[0]) / (passes[1] - passes[0]) - OF_THE_MODEL <= at_most
