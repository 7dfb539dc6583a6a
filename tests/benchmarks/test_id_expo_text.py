"""The experiment on text, reduced: sentences of a toy grammar, of which one word decides the class."""

import random
from itertools import chain
from pathlib import Path

import pytest
import torch

from captum_idexpo.attr import KernelShap
from captum_idexpo.attr.lime import Probabilities
from captum_idexpo.testing import assert_trainable

SIGNS = {"good": 1, "fine": 1, "great": 1, "bad": 0, "dull": 0, "poor": 0}


@pytest.fixture
def text(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.id_expo import text

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does
    yield text
    torch.set_num_threads(n_threads)


@pytest.fixture
def sizes(text):
    return text.Sizes(
        n_tuned=200, n_val=24, n_explained=40, n_pictured=2, pretraining_epochs=8, epochs=4, n_samples=(24, 32, 48)
    )


@pytest.fixture
def sentences(text):
    draw = random.Random(0)
    words, labels = [], []
    for _ in range(320):
        sign = draw.choice(list(SIGNS))
        start = [draw.choice(["the", "a", "this"]), *draw.sample(["old", "new", "long", "short", "red"], 2)]
        middle = [draw.choice(["film", "play", "tale"]), draw.choice(["is", "was"])]
        words.append(start[: draw.randint(1, 3)] + middle + [sign] + ["today", "again", "here"][: draw.randint(0, 3)])
        labels.append(SIGNS[sign])
    return text.Sentences(words, torch.tensor(labels)).at([i for i, s in enumerate(words) if len(s) >= 4])


def test_sentences_batches_hold_each_sentence_once_without_padding(text, sentences):
    vocabulary = {word: number for number, word in enumerate(sorted(set(chain(*sentences.words))), 2)}
    batches = sentences.batches(vocabulary, 16)
    ids = [[vocabulary[word] for word in words] for words in sentences.words]
    found = [(row, int(label)) for tokens, y in batches for row, label in zip(tokens.tolist(), y, strict=True)]
    assert sorted(found) == sorted(zip(ids, sentences.labels.tolist(), strict=True))
    assert max(len(y) for _, y in batches) <= 16
    assert all(bool((tokens != text.PAD).all()) for tokens, _ in batches)


def test_kernel_shap_of_word_vectors_equals_that_of_word_ids(text):
    torch.manual_seed(0)
    model, tokens = text.make_model(20).eval(), torch.randint(1, 20, (3, 7))
    vectors = model[0](tokens)
    explanations = []
    for forward, inputs, mask in ((model, tokens, None), (model[1], vectors, text.word_mask(vectors))):
        torch.manual_seed(1)
        shap = KernelShap(Probabilities(forward))
        explanations.append(shap.attribute(inputs, baselines=0, target=1, feature_mask=mask, n_samples=40))
    torch.testing.assert_close(explanations[1], explanations[0][..., None].expand_as(vectors))


def test_text_gradient_reaches_the_reader_and_the_word_vectors(text):
    torch.manual_seed(0)
    model, tokens = text.make_model(9).double().eval(), torch.randint(1, 9, (2, 5))

    def attribute():
        vectors = model[0](tokens)
        regularizer = text.make_insertion_deletion(model[1], "KernelSHAP", 16, 0)
        arguments = {"baselines": 0.0, "target": 1, "feature_mask": text.word_mask(vectors), "create_graph": True}
        arguments |= {**regularizer.attribute_kwargs, "generator": torch.Generator().manual_seed(0)}
        return regularizer.explainer.attribute(vectors, **arguments)

    assert_trainable(attribute, model, n_directions=1)
    regularizer = text.OverTokens(text.make_insertion_deletion(model[1], "KernelSHAP", 16, 0), model[0])
    sum(regularizer(tokens, torch.tensor([0, 1])).values()).backward()
    assert model[0].weight.grad[tokens.unique()].abs().sum(dim=1).gt(0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model[1].parameters())


def test_text_training_makes_explanations_faithful_and_a_run_resumes(text, sentences, sizes, tmp_path, monkeypatch):
    kept = {name: text.SETTINGS[name] for name in ("plain", text.PICTURED, text.CONTROL, "random_0.3", "lime_0.3")}
    monkeypatch.setattr(text, "SETTINGS", kept)
    monkeypatch.setattr(text, "SEEDS", range(1))
    text.run(sentences, tmp_path, sizes, text.SEEDS)
    path = tmp_path / "text.jsonl"
    rows = {row["setting"]: row["judged"] for row in text.Results(path).rows}
    assert list(rows) == ["before", *kept]
    for name, explainer in ((text.PICTURED, "KernelSHAP"), ("lime_0.3", "LIME")):
        judged, plain = rows[name][explainer], rows["plain"][explainer]
        both = ("insertion", "one_minus_deletion")
        assert sum(judged[score] for score in both) > sum(plain[score] for score in both)
        assert judged["accuracy"] > 0.9

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    text.run(sentences, tmp_path, sizes, text.SEEDS)
    again = {row["setting"]: row["judged"] for row in text.Results(path).rows}
    assert again == rows

    table = text.report(tmp_path)
    assert all(setting.title in table for setting in kept.values())
    text.plot(tmp_path).savefig(tmp_path / "text.png")
    assert (tmp_path / "text.png").stat().st_size


@pytest.mark.parametrize("root", [None, Path("nowhere")])
def test_text_load_without_sentences_names_their_source(text, root):
    with pytest.raises(SystemExit, match=r"--data-root.*rt_polarity\.csv.*Pang and Lee"):
        text.load(root)
