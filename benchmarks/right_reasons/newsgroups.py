"""20 Newsgroups: how many ways are there to tell atheism from Christianity (Ross, Hughes, Doshi-Velez 2017)?

Posts of alt.atheism and soc.religion.christian as TF-IDF of 5,000 words, classified by logistic regression. The search
for other explanations forbids each model the words that those before it leaned on. The first goes by headers and names
of posters as much as by the subject; those after it do with less telling words and lose accuracy slowly.

    python benchmarks/right_reasons/newsgroups.py --data-root FOLDER     with text/newsgroups_atheism_christian.csv
    python benchmarks/right_reasons/newsgroups.py                        with scikit-learn's, downloaded
"""

from __future__ import annotations

import statistics
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from experiment import Results, Row, accuracy, markdown, parse_arguments, train, with_error, write_table
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from captum_idexpo.attr import Saliency
from captum_idexpo.regularizers import RightForTheRightReasons, find_another_explanation
from captum_idexpo.visualization import COLORS

GROUPS = ("alt.atheism", "soc.religion.christian")
SEEDS = range(3)
N_WORDS = 5000
N_TOP = 5
EPOCHS = 30
WEIGHT = 0.01
MAX_MODELS = 10
AUTHORS = ".947"
CHANCE = 398 / 717
PREFACE = f"""Each line is a model that may not use the words of those before it, in the posts where these mattered.
Accuracy on the 717 test posts ({CHANCE:.3f} are of the larger group), mean ± standard error over {len(SEEDS)} seeds.
RRR's weight: {WEIGHT:g}. Words: the {N_TOP} that speak most for a group. The authors' {AUTHORS} is their network's,
from their notebook.
"""


class Posts(NamedTuple):
    """Bags of words of both parts, labels, and the words."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    words: list[str]


def load_posts(root: Path | None) -> Posts:
    """TF-IDF as the authors': no word is lower-cased or left out."""
    table = (
        fetched() if root is None else pd.read_csv(root / "text" / "newsgroups_atheism_christian.csv", na_filter=False)
    )
    parts = [table[table["split"] == part] for part in ("train", "test")]
    vectorizer = TfidfVectorizer(lowercase=False, max_features=N_WORDS).fit(parts[0]["text"])
    x, test_x = (torch.tensor(vectorizer.transform(part["text"]).toarray(), dtype=torch.float32) for part in parts)
    y, test_y = (torch.tensor(part["label"].to_numpy()) for part in parts)
    return Posts(x, y, test_x, test_y, list(vectorizer.get_feature_names_out()))


def fetched() -> pd.DataFrame:
    """scikit-learn's copy, as a table of split, label and text."""
    from sklearn.datasets import fetch_20newsgroups

    parts = {part: fetch_20newsgroups(subset=part, categories=list(GROUPS)) for part in ("train", "test")}
    frames = [pd.DataFrame({"split": part, "label": posts.target, "text": posts.data}) for part, posts in parts.items()]
    return pd.concat(frames)


def fit(posts: Posts, annotations: Tensor, seed: int) -> nn.Module:
    """The network that may not use the words that are annotated."""
    torch.manual_seed(seed)
    model = nn.Linear(N_WORDS, len(GROUPS))
    regularizers = [RightForTheRightReasons(model, weight=WEIGHT)] if bool(annotations.any()) else []
    # Not Adam: its steps are of one size for all words, so that rare ones would matter as much as telling ones.
    make_optimizer = partial(torch.optim.SGD, lr=10.0, momentum=0.9)
    data = (posts.x, posts.y, annotations)
    return train(model, data, regularizers, epochs=EPOCHS, seed=seed, make_optimizer=make_optimizer)


def search(posts: Posts, seed: int) -> Row:
    """The models of a search, each with the words it leans on and how many were forbidden to it."""
    found = find_another_explanation(
        partial(fit, posts, seed=seed),
        lambda model: accuracy(model, posts.test_x, posts.test_y),
        posts.x,
        max_explanations=MAX_MODELS,
    )
    return {
        "models": [
            {
                "accuracy": explanation.accuracy,
                "forbidden": round(float(explanation.annotations.sum(dim=1).mean()), 2),
                **top_words(explanation.model, posts),
            }
            for explanation in found
        ]
    }


def top_words(model: nn.Module, posts: Posts) -> dict[str, list[str]]:
    """For each group the words that speak for it most, by the mean gradient of its log odds over test posts."""
    odds = Saliency(lambda x: model(x).diff(dim=1)[:, 0]).attribute(posts.test_x, abs=False).mean(dim=0)
    return {
        group: [posts.words[word] for word in (sign * odds).topk(N_TOP).indices]
        for group, sign in zip(GROUPS, (-1, 1), strict=True)
    }


def table(searches: list[list[Row]]) -> str:
    """A line a model: means over seeds; the words are the first seed's."""
    rows = []
    for place, first in enumerate(searches[0]):
        models = [models[place] for models in searches if place < len(models)]
        measured = [with_error([model["accuracy"] for model in models]), AUTHORS if place == 0 else ""]
        forbidden = f"{statistics.fmean(model['forbidden'] for model in models):.0f}"
        rows.append([str(place + 1), forbidden, *measured, *(" ".join(first[group]) for group in GROUPS)])
    head = ["model", "forbidden words", "accuracy", "accuracy, authors", *(f"for {group}" for group in GROUPS)]
    return markdown(head, rows)


def report(results: Results, out: Path) -> None:
    """The table, and accuracy against the number of forbidden words."""
    searches = results.column("search", "models")
    write_table(out / "newsgroups.md", PREFACE, table(searches))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for seed, (color, models) in enumerate(zip(COLORS[1:], searches, strict=False)):
        columns = ([model[name] for model in models] for name in ("forbidden", "accuracy"))
        axis.plot(*columns, "o-", color=color, label=f"seed {seed}")
    axis.axhline(CHANCE, color=COLORS[0], linestyle="--", label="larger group")
    axis.set(xlabel="forbidden words, mean over posts", ylabel="accuracy on test posts", ylim=(CHANCE - 0.05, 1))
    axis.legend(frameon=False)
    figure.savefig(out / "newsgroups.png", dpi=110)


def main() -> None:
    arguments = parse_arguments(__doc__)
    out = arguments.out
    results = Results(out / "newsgroups.json")
    posts = cache(load_posts)
    for seed in SEEDS:
        results.measure("search", seed, lambda seed=seed: search(posts(arguments.data_root), seed))
    report(results, out)


if __name__ == "__main__":
    main()
