"""The guides run, teach what they say, and warn of nothing."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

GUIDES = sorted((Path(__file__).parents[1] / "tutorials" / "guides").glob("plot_*.py"))
# In the extra `guides`. Without them the guides that need them are skipped.
LIBRARIES = ("lightning", "peft", "timm", "transformers")

# The groups "more" and "less" are compared: how far training gets differs from one processor to the next.
SAYS = {
    "averaged_weights": r"memory: 20 updates, one epoch: 20 updates",
    "hugging_face": r"accuracy 1\.00, insertion 0\.\d+, deletion 0\.\d+\nwithout the mask the maps change by \d{2,}%",
    "image_with_metadata": r"accuracy 0\.[89]\d.*attribution is ranked for one input.*additional_forward_args",
    "lightning": r"'val_accuracy': 0\.9\d*.*forbids: use torch\.no_grad\(\).*inference_mode=False",
    "lora": r"before insertion (?P<less>0\.\d+).*after  insertion (?P<more>0\.\d+).*the two maps differ by \d{2}%",
    "multilabel": r"trained: labels right 0\.9\d.*insertion_gain[^\n]*\(\+0\.0[2-9]\d* ± .*labels \[\d.*'multilabel'",
    "segmentation": r"pixels right 0\.9\d.*0\.0000",
    "time_series": r"accuracy 0\.9\d.*axes=\(1,\) for \(B, T, F\).*'smoothness'.*Size\(\[1, 24, 3\]\)",
    "timm_checkpointing": r"before.* deletion (?P<more>0\.\d+)\nafter .* deletion (?P<less>0\.\d+)\n.*SDPBackend\.MATH",
    "vision_transformer": r"plain.* deletion (?P<more>0\.\d+)\nID-ExpO .* deletion (?P<less>0\.\d+)\n.*4 of 4 examples",
}


def libraries_of(guide):
    imported = re.findall(r"^(?:import|from) (\w+)", guide.read_text(), re.MULTILINE)
    return [name for name in LIBRARIES if name in imported]


def case(guide):
    """The guide, marked if it needs the libraries."""
    marks = [pytest.mark.libraries] if libraries_of(guide) else []
    return pytest.param(guide, id=name_of(guide), marks=marks)


def name_of(guide):
    return guide.stem.removeprefix("plot_")


def test_guides_are_all_checked():
    assert {name_of(guide) for guide in GUIDES} == set(SAYS)


@pytest.mark.filterwarnings("default")
@pytest.mark.filterwarnings("error:.*:UserWarning:captum_idexpo")
@pytest.mark.parametrize("guide", [case(guide) for guide in GUIDES])
def test_guide_runs_and_shows_what_it_says(guide, capsys, tmp_path, monkeypatch):
    missing = [name for name in libraries_of(guide) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"pip install 'captum-idexpo[guides]' for {missing}")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(guide), run_name="guide")
    said = re.search(SAYS[name_of(guide)], capsys.readouterr().out, re.DOTALL)
    assert said
    if compared := said.groupdict():
        assert float(compared["more"]) > float(compared["less"])
    names["figure"].savefig(tmp_path / "figure.png")
    assert not sorted(path.name for path in tmp_path.iterdir() if path.name != "figure.png")
