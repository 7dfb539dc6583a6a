"""Models that take keyword arguments or return structured outputs, as explainers need them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from captum_idexpo import InsertionDeletion, KeywordModel
from captum_idexpo.attr import IntegratedGradients, KernelShap
from captum_idexpo.testing import assert_trainable

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).double()
Named = namedtuple("Named", ["hidden", "logits"])


@dataclass
class ModelOutput:
    logits: Tensor
    loss: Tensor | None = None


FORMS = {
    "mapping": (lambda hidden, logits: {"hidden": hidden, "logits": logits, "loss": None}, "logits"),
    "object": (lambda hidden, logits: ModelOutput(logits), "logits"),
    "named tuple": (Named, "logits"),
    "tuple": (lambda hidden, logits: (hidden, logits), 1),
    "list from the end": (lambda hidden, logits: [hidden, logits], -1),
    "tensor": (lambda hidden, logits: logits, "logits"),
}


class Masked(nn.Module):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.form = nn.Linear(4, 5).double(), nn.Linear(5, 2).double(), form

    def forward(self, *, attention_mask, embeddings):
        hidden = self.first(embeddings * attention_mask).tanh()
        return self.form(hidden, self.last(hidden))


def model_of(name):
    form, output = FORMS[name]
    return KeywordModel(Masked(form), "embeddings", "attention_mask", output=output)


@pytest.mark.parametrize("name", FORMS)
def test_keyword_model_picks_its_output_from_any_form(name):
    model = model_of(name)
    hidden = model.model.first(X * MASK).tanh()
    assert torch.equal(model(X, MASK), model.model.last(hidden))
    assert {key.partition(".")[0] for key in model.state_dict()} == {"model"}


def test_keyword_model_is_explained_and_trained_with_its_side_inputs():
    model = model_of("mapping")
    attribution = IntegratedGradients(model).attribute(X, target=1, additional_forward_args=MASK, n_steps=30)
    assert bool((attribution[MASK == 0] == 0).all())
    regularizer = InsertionDeletion(
        KernelShap(model), baselines=0.0, temperature=None, attribute_kwargs={"n_samples": 20}
    )
    target = torch.tensor([0, 1, 1])
    assert_trainable(
        lambda: tuple(regularizer(X, target, additional_forward_args=MASK).values()), model, n_directions=1
    )


@pytest.mark.parametrize("arguments", [(X,), (X, MASK, MASK)])
def test_keyword_model_refuses_another_number_of_arguments_than_names(arguments):
    with pytest.raises(
        ValueError, match=rf"{len(arguments)} arguments for the names \['embeddings', 'attention_mask'\]"
    ):
        model_of("mapping")(*arguments)


@pytest.mark.parametrize(
    ("name", "output", "error", "message"),
    [
        ("mapping", "scores", ValueError, "no 'scores'.*'hidden', 'logits'"),
        ("mapping", "loss", ValueError, "no 'loss'.*'hidden', 'logits'"),
        ("object", "scores", ValueError, "no 'scores'.*'logits'"),
        ("named tuple", "scores", ValueError, "no 'scores'.*'hidden', 'logits'"),
        ("tuple", 2, ValueError, "no 2.*0, 1"),
        ("tuple", "logits", ValueError, "no 'logits'.*0, 1"),
    ],
)
def test_keyword_model_that_picks_nothing_names_what_there_is(name, output, error, message):
    model = KeywordModel(Masked(FORMS[name][0]), "embeddings", "attention_mask", output=output)
    with pytest.raises(error, match=message):
        model(X, MASK)


def test_keyword_model_refuses_parts_that_are_no_tensors_and_bad_names():
    nested = KeywordModel(Masked(lambda hidden, logits: {"logits": [logits]}), "embeddings", "attention_mask")
    with pytest.raises(TypeError, match=r"'logits' must be a tensor, given: list.*none is a tensor"):
        nested(X, MASK)
    for names in ((), ("a", "a"), ("a", 1)):
        with pytest.raises(ValueError, match="each once"):
            KeywordModel(nn.Identity(), *names)
    with pytest.raises(TypeError, match="a name or an index, given: None"):
        KeywordModel(nn.Identity(), "x", output=None)
