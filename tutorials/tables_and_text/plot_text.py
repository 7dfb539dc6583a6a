"""
Text: which words speak for a class
===================================

Token ids are whole numbers: half a token does not exist, and no gradient reaches one. A small transformer reads
sentences of the documentation of NumPy, scikit-learn and PyTorch and says whose they are; ``KernelShap`` tells by which
words, and ``InsertionDeletion`` trains the classifier so that these are the words which count.
"""

import ast
import copy
import html
import random
import re
from collections import Counter
from pathlib import Path

import numpy
import sklearn
import torch
from captum.attr import visualization
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy

from captum_idexpo.attr import KernelShap  # Captum's class, trainable
from captum_idexpo.regularizers import InsertionDeletion
from captum_idexpo.visualization import COLORS, plot_curves

# %%
# Sentences
# ---------
#
# The docstrings of the three libraries lie on this disk. They are read as text, nothing is imported. Sentences that
# name a library are left out, as they would be no task. The split is by file, since sentences of one module resemble
# each other: of each library's files three fifths are for training, the rest for test, and what occurs in both parts
# goes to training. (Docstrings have templates, so that some likeness between the parts remains.) The numbers below
# change with the versions installed.

LENGTH = 20
NAMES = {"numpy", "np", "scikit", "sklearn", "torch", "pytorch"}
LIBRARIES = {numpy: "*", sklearn: "*", torch: "nn optim distributions utils"}


def sentences(path):
    """The sentences of a file's docstrings, as tuples of words in lower case."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    docs = [ast.get_docstring(node) for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(filter(None, docs))):
        if re.search(r">>>|::|[-=~]{3}", paragraph):  # code, headings
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            words = re.findall(r"[a-z_]+", sentence.lower())
            if sentence.endswith(".") and 6 <= len(words) <= LENGTH and not NAMES & set(words):
                yield tuple(words)


parts = {"train": [], "test": []}
for label, (library, folders) in enumerate(LIBRARIES.items()):
    root = Path(library.__file__).parent
    files = [path for folder in folders.split() for path in sorted(root.glob(f"{folder}/**/*.py"))]
    files = [path for path in files if not {"tests", "externals", "f2py"} & set(path.parts)]
    random.Random(0).shuffle(files)
    cut = len(files) * 3 // 5
    for part, own in (("train", files[:cut]), ("test", files[cut:])):
        found = sorted({words for path in own for words in sentences(path)})
        parts[part].append([(words, label) for words in found])

known = {words for group in parts["train"] for words, _ in group}
parts["test"] = [[row for row in group if row[0] not in known] for group in parts["test"]]
for part, groups in parts.items():  # as many of each library
    size = min(map(len, groups))
    parts[part] = [row for group in groups for row in random.Random(0).sample(group, size)]
    print(f"{part}: {size} sentences of each library")

# %%
# A vocabulary of the words that training sentences use three times or more; 0 is padding, 1 any other word.

counts = Counter(word for words, _ in parts["train"] for word in words)
vocabulary = ["<pad>", "<other>", *sorted(word for word, count in counts.items() if count >= 3)]
number = {word: i for i, word in enumerate(vocabulary)}


def encode(rows):
    ids = [[number.get(word, 1) for word in words] + [0] * (LENGTH - len(words)) for words, _ in rows]
    return torch.tensor(ids), torch.tensor([label for _, label in rows])


(x, y), (x_test, y_test) = encode(parts["train"]), encode(parts["test"])

# %%
# The classifier
# --------------
#
# Padding's embedding is zero (``padding_idx=0``) and padding is attended to like any word. The model so has seen what a
# masked word looks like, and no copy, not even the one without words, leaves the attention with nothing to look at.
# The second entrance, from embeddings on, is for the explanation.


class Classifier(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(len(vocabulary), width, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, len(LIBRARIES))

    def forward(self, ids):
        return self.from_embeddings(self.embedding(ids))

    def from_embeddings(self, embedded):
        return self.head(self.encoder(embedded + self.positions).mean(1))


@torch.no_grad()
def accuracy(model):
    return float((model(x_test).argmax(1) == y_test).float().mean())


torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(5):
    for rows in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
print(f"accuracy on other files' sentences: {accuracy(model):.3f} (guessing: 0.333)")

# %%
# Words as features
# -----------------
#
# Perturbation methods need no gradient of the input, so that KernelShap takes token ids as they are, with padding as
# the baseline: ``KernelShap(model).attribute(ids, baselines=0, ...)``. To be trained, insertion and deletion mask
# *softly*, and what lies half way between a word and padding is not a token id. Hence the explanation starts at the
# embeddings, where half way is half the vector. Two things then say what one location is:
#
# * the feature mask gives all numbers of one word's vector one feature, and counts the padding at the end to the last
#   word, as masking it changes nothing;
# * the baseline 0.0 is padding's embedding.


def words_as_features(embedded):
    """A feature a word ``(B, T, 1)``, of embeddings ``(B, T, E)``."""
    last = (embedded != 0).any(dim=2, keepdim=True).sum(dim=1, keepdim=True) - 1
    return torch.arange(LENGTH).view(1, -1, 1).minimum(last)


def make_regularizer(model, weight=0.1, n_samples=48, **settings):
    return InsertionDeletion(
        KernelShap(model.from_embeddings),
        baselines=0.0,
        feature_mask=words_as_features,
        insertion_weight=weight,
        deletion_weight=weight,
        step_size=1,
        attribute_kwargs={"sampling": "paired", "n_samples": n_samples},
        generator=torch.Generator().manual_seed(0),
        **settings,
    )


# %%
# Fine-tuning
# -----------
#
# A loop of our own, in which the regularizer is called with embeddings, so that gradients reach the embedding as well.
# ``"paired"`` draws each coalition of words with its complement, which spares half of KernelShap's noise and more. The
# control is the same model, fine-tuned on the same batches without the term.


def fine_tune(model, weight):
    model = copy.deepcopy(model)
    regularizer = make_regularizer(model, weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    for rows in torch.randperm(len(x)).split(32)[:80]:
        loss = cross_entropy(model(x[rows]), y[rows])
        if weight:
            loss = loss + sum(regularizer(model.embedding(x[rows]), y[rows]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


models = {
    "before": model,
    "plainly": fine_tune(model, 0.0),
    "with the term": fine_tune(model, 0.1),
}

# %%
# What it did, on 200 test sentences, beside the accuracy on all of them and the certainty, the probability of the
# predicted class: words are inserted into nothing but padding, or replaced by padding, up to half of
# each sentence, for the class that the model predicts.

torch.manual_seed(2)
chosen = torch.randperm(len(x_test))[:200]
scores = {}
for name, net in models.items():
    embedded = net.embedding(x_test[chosen]).detach()
    scores[name] = make_regularizer(net, n_samples=256).scores(embedded)
    insertion, deletion = scores[name].insertion.mean(), scores[name].deletion.mean()
    certainty = net(x_test[chosen]).softmax(1).amax(1).mean()
    measured = f"accuracy {accuracy(net):.3f}  certainty {certainty:.3f}  insertion {insertion:.3f}"
    print(f"{name:14} {measured}  deletion {deletion:.3f}")

figure = plot_curves(scores)

# %%
# The words that KernelShap names now decide more, at no cost in accuracy: the first of them alone, a tenth of a
# sentence or less, nearly fixes the prediction, and without the first half of them little of it is left. What the term
# asks for is a model that goes by few words, and this is what it gets. It did not become a better judge of sentences:
# accuracy is the control's, and its certainty rose still further above it. The term rewards certainty, so that some of
# what insertion gained is just that; think of calibration before you use such probabilities. Deletion cannot be gained
# so: a model that is more certain of the whole sentence falls from higher up, and this one lands lower all the same.
#
# Before and after
# ----------------
#
# Captum colours words by their attribution, green for the class that is predicted, red against it: the first test
# sentences of each library, before and after. Attributions are divided by the sentence's largest. The colours hardly
# change: it is the model that has come to go by the words that were named.


class Html(str):
    """A text that notebooks, and this page, show as HTML."""

    def _repr_html_(self):
        return str(self)


@torch.no_grad()
def rows_of(net, i):
    """A table's row: what the model says, and the sentence's words in colours."""
    embedded = net.embedding(x_test[i : i + 1])
    predicted = net.from_embeddings(embedded).argmax(1)
    (attribution,) = make_regularizer(net, n_samples=256).attribution(embedded, predicted)
    values = attribution[0].mean(-1)
    words = [html.escape(vocabulary[k]) for k in x_test[i] if k]
    return f"<td>{names[predicted]}</td>" + visualization.format_word_importances(words, values / values.abs().max())


names = [library.__name__ for library in LIBRARIES]
table = "<tr><th>written by</th><th>model</th><th>says</th><th>because</th></tr>"
for i in [int((y_test == label).nonzero()[k]) for label in range(3) for k in range(2)]:
    for name in ("before", "with the term"):
        table += f"<tr><td>{names[y_test[i]]}</td><td>{name}</td>{rows_of(models[name], i)}</tr>"
Html(f"<table>{table}</table>".replace("<td>", '<td style="text-align: left">'))

# %%
# Words
# -----
#
# The attribution of a word, averaged over the sentences (of the 200) in which it occurs at least four times and which
# are given to a library: what the fine-tuned model takes that library's language to be.


def typical_words(net, label, n=8):
    ids = x_test[chosen]
    with torch.no_grad():
        embedded = net.embedding(ids)
        predicted = net.from_embeddings(embedded).argmax(1)
        (attribution,) = make_regularizer(net, n_samples=256).attribution(embedded, predicted)
    of_class = predicted == label
    words, values = ids[of_class].flatten(), attribution.mean(-1)[of_class].flatten()
    means = {
        vocabulary[k]: float(values[words == k].mean()) for k in words.unique() if k > 1 and (words == k).sum() > 3
    }
    return sorted(means.items(), key=lambda item: -item[1])[:n]


figure = Figure(figsize=(9, 2.6), layout="constrained")
for label, axis in enumerate(figure.subplots(1, 3)):
    words, values = zip(*typical_words(models["with the term"], label), strict=True)
    axis.barh(words, values, color=COLORS[1 + label])
    axis.invert_yaxis()
    axis.set_title(names[label], fontsize=10)
    axis.set_xlabel("mean attribution (logit)")
