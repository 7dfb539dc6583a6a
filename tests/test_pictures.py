"""The pictures look as they did: each against its baseline image.

``python -m tests.test_pictures`` draws the baselines anew; look at them before they are committed.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import ft2font
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from PIL import Image

from captum_idexpo.metrics import InsertionDeletionScores
from captum_idexpo.visualization import (
    plot_attribution_bars,
    plot_comparison,
    plot_curves,
    plot_explanations,
    plot_fronts,
    plot_history,
    plot_quadrants,
)

BASELINE = Path(__file__).parent / "baseline"
STYLE = {"font.family": "DejaVu Sans", "text.hinting": "none"}  # fonts that come with matplotlib
DRAWN_BY = f"matplotlib {matplotlib.__version__}, FreeType {ft2font.__freetype_version__}"


def scores(rise, n_examples=12, n_steps=16):
    """Curves that saturate, sooner for some examples than for others."""
    fractions = torch.arange(1, n_steps + 1) / n_steps
    speed = torch.linspace(2, 8, n_examples)[:, None] + rise
    inserted, deleted = 1 - torch.exp(-speed * fractions), torch.exp(-1.2 * speed * fractions)
    return InsertionDeletionScores(inserted.mean(1), deleted.mean(1), fractions, inserted, deleted)


def curves():
    return plot_curves({"before": scores(0), "after": scores(6)})


def quadrants():
    after = scores(torch.linspace(-1, 3, 12)[:, None] ** 2 - 2)
    angles = torch.linspace(0, 6, 12)
    return plot_quadrants(scores(0), after._replace(deletion=after.deletion + 0.05 * torch.sin(angles)))


def bars():
    table = torch.tensor([0.1, -0.5, 0.3, 0.05])
    spread = torch.linspace(-0.1, 0.1, 5)[:, None]
    names = ["age", "income (thousands a year)", "debt", "education"]
    return plot_attribution_bars({"plain": table + spread, "RRR": 1.5 * table - 2 * spread}, names, top=3)


def fronts():
    weights = range(5)
    plain = [{"accuracy": 0.9 - 0.02 * w, "insertion": 0.4 + 0.03 * w, "error": 0.01} for w in weights]
    ours = [{"accuracy": 0.92 - 0.02 * w, "insertion": 0.5 + 0.1 * (w % 3), "error": 0.02} for w in weights]
    return plot_fronts({"plain": plain, "ID-ExpO": ours}, y_error="error")


def history():
    return plot_history(
        [
            {"epoch": e, "loss": 1 / e, "task": 0.8 / e, "val_accuracy": 1 - 0.5 / e, "valscore": 2 + 0.1 * e}
            for e in range(1, 6)
        ]
    )


def explanations():
    distance = (torch.linspace(-1, 1, 12)[:, None] ** 2 + torch.linspace(-1, 1, 12) ** 2).expand(2, 1, 12, 12)
    images = (1 - distance).clamp(min=0)
    maps = {"before": images - 0.4, "after": 0.7 - distance.flip(0) * torch.linspace(0, 2, 12)}
    return plot_explanations(images, maps, {"before": ["insertion 0.3", "0.4"], "after": ["insertion 0.6", "0.7"]})


PICTURES = (curves, quadrants, bars, fronts, history, explanations)


def draw(picture, folder):
    path = folder / f"{picture.__name__}.png"
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        picture().savefig(path, dpi=60, metadata={"Software": DRAWN_BY})
    return path


def differing_pixels(image, other):
    """How many pixels of an image differ by more than a quarter of a channel's range from all their neighbours in the
    other: text drawn by another FreeType, or all of an axis a pixel aside, is no difference."""
    reach = 2
    height, width, _ = image.shape
    padded = np.pad(other, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shifted = (padded[i : i + height, j : j + width] for i in range(2 * reach + 1) for j in range(2 * reach + 1))
    return (np.min([abs(image - each).max(axis=2) for each in shifted], axis=0) > 64).sum()


@pytest.mark.parametrize("picture", PICTURES)
def test_picture_looks_like_its_baseline(picture, tmp_path):
    drawn, baseline = draw(picture, tmp_path), BASELINE / f"{picture.__name__}.png"
    with Image.open(baseline) as image:
        same_tools = image.info["Software"] == DRAWN_BY
    if same_tools:  # root mean square over the pixels, of 255; a marker of another shape is 1.5
        assert compare_images(baseline, drawn, tol=0.5) is None
    old, new = (np.asarray(Image.open(path).convert("RGB"), int) for path in (baseline, drawn))
    assert old.shape == new.shape
    assert max(differing_pixels(old, new), differing_pixels(new, old)) <= 90  # 43 between matplotlib 3.7 and 3.11


def seen(text):
    return text.get_visible() and text.get_text().strip()


def crowded_curves():
    return plot_curves({f"model number {i}": scores(i) for i in range(9)})


def crowded_bars():
    names = ["a feature of a very long name that needs lines", "b", "c", "d"]
    return plot_attribution_bars({f"model number {i}": torch.arange(4.0) - i for i in range(8)}, names)


def crowded_explanations():
    maps = {name: torch.rand(1, 1, 4, 4) for name in ("fine-tuned without a regularizer", "fine-tuned with ID-ExpO")}
    return plot_explanations(torch.rand(1, 3, 4, 4), maps, {name: ["insertion 0.62"] for name in maps})


def crowded_comparison():
    metrics = ["masked_accuracy", "insertion_gain", "deletion_gain", "infidelity", "sensitivity"]
    parts = {"explainer": "Integrated Gradients", "baseline": "values of another row", "held_out": False}
    scores = {"difference": 0.1, "difference_standard_error": 0.02}
    models = [f"fine-tuned for so long: {i}" for i in range(3)]
    return plot_comparison(
        [{"metric": m, "model": name, **parts, **scores} for m in metrics for name in models], "plain"
    )


CROWDED = (crowded_curves, crowded_bars, crowded_explanations, crowded_comparison)


@pytest.mark.parametrize("picture", [*PICTURES, *CROWDED])
def test_picture_text_is_neither_cut_nor_overlapping(picture, monkeypatch):
    drawn, draw_text = [], Text.draw
    monkeypatch.setattr(
        Text, "draw", lambda text, *args, **kwargs: (drawn.append(text), draw_text(text, *args, **kwargs))
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = picture()
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if seen(text)]
    width, height = figure.bbox.size
    assert len(boxes) > 4
    for text, box in boxes:
        assert min(box.x0, box.y0) > -1, text
        assert box.x1 < width + 1, text
        assert box.y1 < height + 1, text
    for (text, box), (other, its_box) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(its_box), (text, other)


if __name__ == "__main__":
    for picture in PICTURES:
        draw(picture, BASELINE)
