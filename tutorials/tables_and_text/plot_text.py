"""
Text: which words are evidence for a class
==========================================

After this tutorial you can explain a text classifier by its words, and train it so that its predictions depend on the
words that the explanation names.

A token id is a whole number. Half a token does not exist, and a token id has no gradient. A small transformer reads
sentences of the documentation of NumPy, scikit-learn and PyTorch, and predicts which library a sentence is from.
``KernelShap`` finds the words that are evidence for the prediction. ``InsertionDeletion`` trains the classifier so that
these words decide.
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
# The docstrings of the three libraries are on this disk. They are read as text and not imported. Sentences that name a
# library are left out, because they would make the task trivial. The data are split by file, because sentences of one
# module resemble each other. Three fifths of each library's files are for training, the rest is for test. A sentence
# that occurs in both parts goes to training. (Docstrings follow templates, so the two parts are still somewhat alike.)
# The numbers below change with the installed versions.

LENGTH = 20
NAMES = {"numpy", "np", "scikit", "sklearn", "torch", "pytorch"}
LIBRARIES = {numpy: "*", sklearn: "*", torch: "nn optim distributions utils"}


def sentences(path):
    """Yield the sentences of a file's docstrings, as tuples of words in lower case."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    docs = [ast.get_docstring(node) for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(filter(None, docs))):
        if re.search(r">>>|::|[-=~]{3}", paragraph):  # skip code and headings
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
for part, groups in parts.items():  # take equally many sentences of each library
    size = min(map(len, groups))
    parts[part] = [row for group in groups for row in random.Random(0).sample(group, size)]
    print(f"{part}: {size} sentences of each library")

# %%
# The vocabulary has the words that occur three times or more in the training sentences. Id 0 is padding, id 1 is any
# other word.

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
# The embedding of padding is zero (``padding_idx=0``). The model attends to padding as to any word. So the model has
# already seen what a masked word looks like. The attention also has tokens to attend to in every masked copy, even in
# the copy without words. The method ``from_embeddings`` starts at the embeddings. The explanation uses it.


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
# Perturbation methods need no gradient with respect to the input. KernelShap therefore takes token ids directly, with
# padding as the baseline: ``KernelShap(model).attribute(ids, baselines=0, ...)``. In training, insertion and deletion
# mask *softly*: a value can lie half way between a word and padding. There is no token id half way. So the explanation
# starts at the embeddings, where half way is half the vector. Two arguments then define the features and the masked
# value:
#
# * The feature mask groups all numbers of one word's vector into one feature. Padding at the end belongs to the feature
#   of the last word, because masking padding changes nothing.
# * The baseline 0.0 is the embedding of padding.


def words_as_features(embedded):
    """Return a feature mask ``(B, T, 1)`` with one feature per word, for embeddings ``(B, T, E)``."""
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
# We write our own training loop. It calls the regularizer with embeddings, so that gradients reach the embedding as
# well. ``"paired"`` draws each coalition of words together with its complement. This removes half of KernelShap's noise
# or more. The control is the same model, fine-tuned on the same batches without the term.


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
# The accuracy is measured on all test sentences. The other numbers are measured on 200 of them. The certainty is the
# probability of the predicted class. Insertion adds words to a sentence that is only padding. Deletion replaces words
# by padding. Both go up to half of each sentence, and score the class that the model predicts.

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
# The words that KernelShap names now decide more, at no cost in accuracy. The first word alone, a tenth of a sentence
# or less, nearly determines the prediction. Without the first half of the words, little of the prediction is left. The
# term asks for a model that depends on few words, and this is the result.
#
# The model did not become a better classifier. Its accuracy is that of the control, and its certainty rose still
# further above the accuracy. The term rewards certainty, so a part of the gain in insertion is only certainty. Check
# the calibration before you use such probabilities. More certainty cannot improve deletion: a model that is more
# certain of the whole sentence starts from a higher probability. This model still ends at a lower one.
#
# Before and after
# ----------------
#
# Captum colours words by their attribution. Green words are evidence for the predicted class, red words are evidence
# against it. The table shows the first test sentences of each library, before and after the fine-tuning. Attributions
# are divided by the largest one of the sentence. The colours hardly change. The model has changed: it now depends on
# the words that were already named.


class Html(str):
    """Hold a text that notebooks and this page show as HTML."""

    def _repr_html_(self):
        return str(self)


@torch.no_grad()
def rows_of(net, i):
    """Return cells of the table: what the model predicts, and the sentence's words in colours."""
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
# The figure shows the words with the highest mean attribution for each library. The mean is over those of the 200
# sentences that the fine-tuned model assigns to the library. A word must occur at least four times in these sentences.
# The words show what the model takes to be the language of a library.


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
