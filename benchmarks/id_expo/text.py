"""Text: are explanations of sentences by KernelSHAP and LIME more faithful after training with ID-ExpO?

Text is future work in the paper of ID-ExpO (arXiv 2310.12553). Here a small LSTM with its own word vectors reads the
10,662 sentences of film reviews of Pang and Lee (2005), at most 32 words of each, and is fine-tuned plainly (CE-only)
or with insertion and deletion of its explanations; validation data choose the epoch by eq. (15). Controls: the same
masks without their gradient (masking augmentation along the explanation), and as many words masked at random.

* A feature is a word; masked, it has the vector of padding, which is zero. The inputs that the loss masks are word
  vectors, since soft masks mix a word with padding and ids cannot be mixed. Hard masks agree with ids and padding's id.
* Padding is never a feature: batches hold sentences of one length, so that there is none. As features, padded places
  would have Shapley values of 0, ranked above all words that speak against the class.

    python -m benchmarks.id_expo.text run --data-root FOLDER     with text/rt_polarity.csv, columns "label" and "text"
    python -m benchmarks.id_expo.text report

A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from captum.attr import Attribution
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.id_expo.experiment import SCORES, Judge, Results, Row, fine_tune, markdown, means, with_error
from captum_idexpo.attr import KernelShap, id_expo_lime
from captum_idexpo.attr.lime import Probabilities
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS

FILE = Path("text") / "rt_polarity.csv"
SOURCE = "the sentence polarity data v1.0 of Pang and Lee (2005), www.cs.cornell.edu/people/pabo/movie-review-data"
CLASSES = ("negative", "positive")
PAD, UNKNOWN = 0, 1
LENGTHS = range(4, 33)  # in words; longer sentences are cut, shorter ones left out
EXPLAINERS = ("KernelSHAP", "LIME")
FRACTION, ETA, SENSITIVITY_N = 0.5, 2.0, 4
SEEDS = range(3)

Batch = tuple[Tensor, Tensor]
"""Token ids ``(B, T)`` of sentences of one length, and classes ``(B,)``."""


class Sizes(NamedTuple):
    """How much is trained and judged."""

    n_tuned: int = 768
    n_val: int = 200
    n_explained: int = 300
    n_pictured: int = 3
    pretraining_epochs: int = 8
    epochs: int = 4
    n_samples: tuple[int, int, int] = (40, 60, 120)  # M in training, selection and test


class Setting(NamedTuple):
    """One fine-tuning; temperature None: hard masks, through which the explanation gets no gradient."""

    title: str
    explainer: str | None = None
    weight: float = 0.0
    temperature: str | None = "auto"


SETTINGS = {
    "plain": Setting("CE-only"),
    "shap_0.1": Setting("ID-ExpO, KernelSHAP, 0.1", "KernelSHAP", 0.1),
    "shap_0.3": Setting("ID-ExpO, KernelSHAP, 0.3", "KernelSHAP", 0.3),
    "hard_0.3": Setting("hard masks, KernelSHAP, 0.3", "KernelSHAP", 0.3, None),
    "random_0.3": Setting("random words masked, 0.3", "random", 0.3, None),
    "lime_0.3": Setting("ID-ExpO, LIME, 0.3", "LIME", 0.3),
}
PICTURED, CONTROL = "shap_0.3", "hard_0.3"


# --- data ----------------------------------------------------------------------------------------------------------


class Sentences(NamedTuple):
    """Words of each sentence, and classes ``(n,)``."""

    words: list[list[str]]
    labels: Tensor

    def at(self, rows: Sequence[int]) -> Sentences:
        """Those of these rows."""
        return Sentences([self.words[row] for row in rows], self.labels[torch.tensor(rows, dtype=torch.long)])

    def batches(self, vocabulary: dict[str, int], size: int) -> list[Batch]:
        """Batches of sentences of one length, at most so many in each, about as many in all of a length."""
        of_length = defaultdict(list)
        for row, words in enumerate(self.words):
            of_length[len(words)].append(row)
        result = []
        for rows in of_length.values():
            for part in torch.tensor(rows).chunk(-(-len(rows) // size)):
                ids = [[vocabulary.get(word, UNKNOWN) for word in self.words[row]] for row in part]
                result.append((torch.tensor(ids), self.labels[part]))
        return result


@cache
def load(root: Path | None) -> Sentences:
    if root is None or not (root / FILE).exists():
        raise SystemExit(
            f"The sentences are needed: pass --data-root, a folder with {FILE} (columns label, 1 where positive, and "
            f"text, words separated by spaces). They are {SOURCE}."
        )
    table = pd.read_csv(root / FILE, keep_default_na=False)
    words = [text.split()[: LENGTHS[-1]] for text in table["text"]]
    kept = [row for row, sentence in enumerate(words) if len(sentence) in LENGTHS]
    return Sentences(words, torch.tensor(table["label"].to_numpy())).at(kept)


class Split(NamedTuple):
    """70 % of the sentences to train on, 10 % to select by, 20 % to test, in batches; the vocabulary is of the first.

    The vocabulary: all words that occur twice. `tuned`, `selected` and `explained` are parts of the three.
    """

    vocabulary: dict[str, int]
    train: list[Batch]
    tuned: list[Batch]
    val: list[Batch]
    selected: list[Batch]
    test: list[Batch]
    explained: list[Batch]
    pictured: Sentences

    @classmethod
    def of_seed(cls, sentences: Sentences, seed: int, sizes: Sizes) -> Split:
        """A random split."""
        n = len(sentences.words)
        order = torch.randperm(n, generator=Generator().manual_seed(seed)).tolist()
        train, val, test = order[: int(0.7 * n)], order[int(0.7 * n) : int(0.8 * n)], order[int(0.8 * n) :]
        counts = Counter(chain.from_iterable(sentences.at(train).words))
        words = sorted(word for word, count in counts.items() if count > 1)
        vocabulary = {word: number for number, word in enumerate(words, UNKNOWN + 1)}

        def batches(rows: list[int], size: int = 500) -> list[Batch]:
            return sentences.at(rows).batches(vocabulary, size)

        short = [row for row in test if 8 <= len(sentences.words[row]) <= 14]
        return cls(
            vocabulary,
            batches(train, 64),
            batches(train[: sizes.n_tuned], 32),
            batches(val),
            batches(val[: sizes.n_val]),
            batches(test),
            batches(test[: sizes.n_explained]),
            sentences.at(short[: sizes.n_pictured]),
        )


# --- model ---------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Logits of word vectors ``(B, T, 32)``: an LSTM, and the maximum of its states over the words."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.lstm, self.dropout = nn.LSTM(size, size, batch_first=True), nn.Dropout(0.5)
        self.linear = nn.Linear(size, len(CLASSES))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits ``(B, 2)``."""
        states, _ = self.lstm(self.dropout(vectors))
        return self.linear(self.dropout(states.amax(dim=1)))


def make_model(n_words: int) -> nn.Sequential:
    """Word vectors, that of padding zero; then the reader."""
    reader = Reader()
    return nn.Sequential(nn.Embedding(n_words, reader.lstm.input_size, padding_idx=PAD), reader)


def pretrain(split: Split, epochs: int, seed: int) -> nn.Sequential:
    """A network trained for the epochs that its validation loss likes best."""
    torch.manual_seed(seed)
    model = make_model(len(split.vocabulary) + 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    lowest, weights = float("inf"), {}
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(split.train)):
            tokens, y = split.train[index]
            optimizer.zero_grad()
            cross_entropy(model(tokens), y).backward()
            optimizer.step()
        with torch.no_grad():
            loss = sum(float(cross_entropy(model.eval()(tokens), y, reduction="sum")) for tokens, y in split.val)
        if loss < lowest:
            lowest, weights = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return model


# --- explanations --------------------------------------------------------------------------------------------------


class RandomOrder(Attribution):
    """No explanation at all."""

    def attribute(self, inputs: Tensor, *, create_graph: bool = False) -> Tensor:
        """Noise, the same for all coordinates of a word's vector."""
        return torch.rand_like(inputs[..., :1]).expand_as(inputs)


class OverTokens(nn.Module):
    """A regularizer of word vectors that is called with token ids; its gradient reaches the vectors too."""

    def __init__(self, regularizer: nn.Module, embedding: nn.Embedding) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.__dict__["embedding"] = embedding  # the model's

    def forward(self, tokens: Tensor, target: Tensor, annotations: Any = None) -> dict[str, Tensor]:
        """The regularizer's terms."""
        return self.regularizer(self.embedding(tokens), target, annotations)


class TokenJudge(NamedTuple):
    """A judge of readers, given models that begin with token ids."""

    reader_judge: Judge

    def scores(self, model: nn.Sequential, data: list[Batch], n: int | None = None) -> dict[float, dict[str, Tensor]]:
        """As `Judge.scores`."""
        embedding, reader = model.eval()
        with torch.no_grad():
            vectors = [(embedding(tokens), y) for tokens, y in data]
        return self.reader_judge.scores(reader, vectors, n, word_mask)


def word_mask(vectors: Tensor) -> Tensor:
    """A feature mask ``(1, T, 32)``: a word's vector is one feature."""
    return torch.arange(vectors.shape[1])[None, :, None].expand(1, *vectors.shape[1:])


def make_insertion_deletion(
    reader: nn.Module, explainer: str, n_samples: int, seed: int, **arguments: Any
) -> InsertionDeletion:
    """Of an explanation of the class's probability by words."""
    makers = {
        "KernelSHAP": lambda: KernelShap(Probabilities(reader)),
        "LIME": lambda: id_expo_lime(reader),
        "random": lambda: RandomOrder(reader),
    }
    sampled = {"n_samples": n_samples, "sampling": "independent"} if explainer in EXPLAINERS else {}
    return InsertionDeletion(
        makers[explainer](),
        baselines=0.0,
        forward_func=reader,
        model=reader,
        feature_mask=word_mask,
        fraction=FRACTION,
        step_size=1,
        deletion_form="ratio",
        attribute_kwargs=sampled,
        generator=Generator().manual_seed(seed),
        **arguments,
    )


def make_judge(explainer: str, n_samples: int) -> TokenJudge:
    return TokenJudge(Judge(lambda reader: make_insertion_deletion(reader, explainer, n_samples, 0), (FRACTION,)))


def make_regularizers(setting: Setting, model: nn.Sequential, sizes: Sizes, seed: int) -> list[nn.Module]:
    if setting.explainer is None:
        return []
    embedding, reader = model
    regularizer = make_insertion_deletion(
        reader,
        setting.explainer,
        sizes.n_samples[0],
        seed,
        insertion_weight=setting.weight,
        deletion_weight=setting.weight,
        temperature=setting.temperature,
        steps_per_update=2,
    )
    return [OverTokens(regularizer, embedding)]


# --- running -------------------------------------------------------------------------------------------------------


def run(sentences: Sentences, out: Path, sizes: Sizes, seeds: Iterable[int] = SEEDS) -> None:
    """All fine-tunings that are not yet done, seed by seed."""
    results = Results(out / "text.jsonl")
    for seed in seeds:
        missing = [name for name in ("before", *SETTINGS) if not results.has(seed=seed, setting=name)]
        if not missing:
            continue
        split = Split.of_seed(sentences, seed, sizes)
        pretrained = pretrain(split, sizes.pretraining_epochs, seed)
        for name in missing:
            start = time.process_time()
            judged = (
                {explainer: test(pretrained, split, explainer, sizes) for explainer in EXPLAINERS}
                if name == "before"
                else measure(SETTINGS[name], pretrained, split, sizes, seed)
            )
            row = {"seed": seed, "setting": name, "seconds": round(time.process_time() - start, 1), "judged": judged}
            results.add(row)
            shown = {key: {k: v for k, v in scores.items() if k != "pictured"} for key, scores in judged.items()}
            print(seed, name, row["seconds"], shown, flush=True)


def measure(setting: Setting, pretrained: nn.Sequential, split: Split, sizes: Sizes, seed: int) -> dict[str, Row]:
    """Fine-tunes, and tests what the validation data chose for each explainer that the setting is judged by."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pretrained)
    explainers = {None: EXPLAINERS, "LIME": ("LIME",)}.get(setting.explainer, ("KernelSHAP",))
    best, _ = fine_tune(
        model,
        make_regularizers(setting, model, sizes, seed),
        split.tuned,
        {name: (make_judge(name, sizes.n_samples[1]), split.selected) for name in explainers},
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        epochs=sizes.epochs,
        batch_size=None,
        seed=seed,
    )
    judged = {}
    for name in explainers:
        chosen = best[name, FRACTION, ETA]
        model.load_state_dict(chosen.weights)
        judged[name] = {"epoch": chosen.epoch, **test(model, split, name, sizes)}
    return judged


@torch.no_grad()
def test(model: nn.Sequential, split: Split, explainer: str, sizes: Sizes) -> Row:
    """Scores of the explanations of some test sentences; accuracy on all of them, whole and with half their words."""
    judge = make_judge(explainer, sizes.n_samples[2])
    scores = means(judge.scores(model, split.explained, SENSITIVITY_N)[FRACTION])
    return {
        **scores,
        "accuracy": accuracy(model, split.test, kept=1.0),
        "masked_accuracy": accuracy(model, split.test, kept=0.5, n_copies=5),
        "pictured": [explained(model, words, split.vocabulary, judge) for words in split.pictured.words],
    }


def accuracy(model: nn.Sequential, data: list[Batch], kept: float, n_copies: int = 1) -> float:
    """Where each word was kept with this probability, and is padding otherwise."""
    generator = Generator().manual_seed(0)
    n_right = n = 0
    for tokens, y in data:
        copies = tokens.repeat(n_copies, 1)
        masked = torch.rand(copies.shape, generator=generator) >= kept
        n_right += int((model.eval()(copies.masked_fill(masked, PAD)).argmax(dim=1) == y.repeat(n_copies)).sum())
        n += len(copies)
    return round(n_right / n, 5)


def explained(model: nn.Sequential, words: list[str], vocabulary: dict[str, int], judge: TokenJudge) -> Row:
    """A sentence, its class, and how much each word speaks for it."""
    embedding, reader = model.eval()
    vectors = embedding(torch.tensor([[vocabulary.get(word, UNKNOWN) for word in words]]))
    p = reader(vectors).softmax(dim=1)
    predicted = p.argmax(dim=1)
    regularizer = judge.reader_judge.make(reader)
    (map,) = regularizer.attribution(vectors, predicted)
    scores = regularizer.scores(vectors, predicted)
    numbers = {"p": p.max(), "insertion": scores.insertion, "one_minus_deletion": 1 - scores.deletion}
    return {
        "words": [word if word in vocabulary else f"({word})" for word in words],
        "class": CLASSES[int(predicted)],
        "attributions": [round(value, 4) for value in map[0, :, 0].tolist()],
        **{name: round(float(value), 3) for name, value in numbers.items()},
    }


# --- the report ----------------------------------------------------------------------------------------------------


def report(out: Path) -> str:
    """For each explainer the means over the seeds and the paired difference to CE-only, as Markdown."""
    results = Results(out / "text.jsonl")
    seeds = [seed for seed in SEEDS if all(results.has(seed=seed, setting=name) for name in ("before", *SETTINGS))]
    columns = {**SCORES, "masked_accuracy": "accuracy, half the words"}

    def judged(name: str, explainer: str, score: str) -> list[float]:
        rows = [results.where(seed=seed, setting=name)[0]["judged"] for seed in seeds]
        return [row[explainer][score] for row in rows if explainer in row]

    def difference(name: str, other: str, explainer: str, score: str) -> str:
        pairs = zip(judged(name, explainer, score), judged(other, explainer, score), strict=True)
        return with_error([a - b for a, b in pairs], "+.3f")

    titles = {"before": "before", **{name: setting.title for name, setting in SETTINGS.items()}}
    parts = [
        f"Means and standard errors over {len(seeds)} random splits; in brackets the paired difference to CE-only. The "
        "number in a fine-tuning's name is the weight of both terms. Test sentences, the predicted class explained, "
        f"up to {FRACTION:.0%} of a sentence's words inserted or deleted; sensitivity-n with n = {SENSITIVITY_N}."
    ]
    for explainer in EXPLAINERS:
        lines = []
        for name, title in titles.items():
            if not judged(name, explainer, "accuracy"):
                continue
            line = [title]
            for score in columns:
                beside = "" if name == "plain" else f" ({difference(name, 'plain', explainer, score)})"
                line.append(with_error(judged(name, explainer, score)) + beside)
            lines.append(line)
        parts += [f"Explained by {explainer}:", markdown(["fine-tuning", *columns.values()], lines)]
    compared = [f"{title} {difference(PICTURED, CONTROL, 'KernelSHAP', score)}" for score, title in columns.items()]
    parts.append(
        f"What the gradient through the masks adds (weight 0.3, ID-ExpO less hard masks): {', '.join(compared)}."
    )
    return "\n\n".join(parts) + "\n"


def plot(out: Path) -> Figure:
    """The first short test sentences, their words coloured by KernelSHAP before and after."""
    results = Results(out / "text.jsonl")
    titles = {"before": "before", "plain": "CE-only", PICTURED: "ID-ExpO"}
    pictured = {
        title: results.where(seed=SEEDS[0], setting=name)[0]["judged"]["KernelSHAP"]["pictured"]
        for name, title in titles.items()
    }
    n_sentences = len(pictured["before"])
    figure = Figure(figsize=(9.5, 0.4 + n_sentences), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 135), ylim=(-4 * n_sentences, 0.6))
    axis.axis("off")
    axis.set_title(
        "KernelSHAP: blue words speak for the predicted class, orange ones against it (in brackets: unknown words)",
        fontsize=9,
    )
    for index in range(n_sentences):
        for line, (title, sentences) in enumerate(pictured.items()):
            draw_sentence(axis, title, sentences[index], y=-4 * index - line - 0.4)
    return figure


def draw_sentence(axis: Axes, title: str, sentence: Row, y: float) -> None:
    """One line: what model, its prediction, the words, the scores of the explanation."""
    colors = LinearSegmentedColormap.from_list("against and for", [COLORS[2], "white", COLORS[1]])
    style = {"family": "monospace", "fontsize": 7.5, "va": "center"}
    axis.text(0, y, f"{title:8}{sentence['class']} {sentence['p']:.2f}", **style)
    largest = max(map(abs, sentence["attributions"])) or 1.0
    x = 24.0
    for word, value in zip(sentence["words"], sentence["attributions"], strict=True):
        box = {"facecolor": colors(0.5 + 0.5 * value / largest), "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
        axis.text(x, y, word, bbox=box, **style)
        x += len(word) + 1
    scores = f"insertion {sentence['insertion']:.2f}  1 - deletion {sentence['one_minus_deletion']:.2f}"
    axis.text(135, y, scores, ha="right", **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--data-root", type=Path, help=f"folder with {FILE}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        run(load(arguments.data_root), arguments.out, Sizes())
    (arguments.out / "text.md").write_text(report(arguments.out))
    plot(arguments.out).savefig(arguments.out / "text.png", dpi=130)


if __name__ == "__main__":
    main()
