"""The docs say what is true: every public name has its entry, floors import downwards, and README's code runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from captum_idexpo.attr import LayerGradCam, tokens_to_map
from captum_idexpo.regularizers import InsertionDeletion

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captum_idexpo"
FLOORS = [
    {"_core", "_version"},
    {"attr", "feature_masks", "baselines", "keyword_model"},
    {"metrics", "testing"},
    {"regularizers", "visualization"},
    {"training", "jury"},
    {"__init__", "__main__"},
]
MODULES = ["captum_idexpo", *(f"captum_idexpo.{name}" for name in ("attr", "metrics", "regularizers", "training"))]
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_reference_has_an_entry_for_every_public_name(name):
    entries = set()
    for page in (ROOT / "docs" / "api").glob("*.rst"):
        directives = re.findall(r"\.\. auto(?:class|function|exception):: (\S+)", page.read_text())
        entries |= {name.rpartition(".")[2] for name in directives}
    module = importlib.import_module(name)
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert not public - entries - {"__version__"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """The modules of the package that a file imports from, also inside functions; not those that only types need."""
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types and node.module.startswith("captum_idexpo"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from {name if module_path(name).exists() else node.module for name in names}


def module_path(name):
    return PACKAGE.parent / (name.replace(".", "/") + ".py")


def imported_rooms(path):
    for name in imports_of(path):
        parts = name.split(".")
        yield parts[1] if len(parts) > 1 else "__init__"


def files_imported(path):
    return {module_path(name) for name in imports_of(path)} & set(FILES)


def test_floors_name_every_module_of_the_package():
    assert {room_of(path) for path in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors_import_only_from_lower_floors(path):
    floor = next(number for number, rooms in enumerate(FLOORS) if room_of(path) in rooms)
    beside = {"__init__"} if room_of(path) == "__main__" else {room_of(path)}
    assert set(imported_rooms(path)) <= set().union(*FLOORS[:floor], beside)


def test_modules_do_not_import_each_other_in_a_cycle():
    graph = {path: files_imported(path) for path in FILES if path.name != "__init__.py"}
    assert sum(map(len, graph.values())) > 150
    while free := [path for path, needed in graph.items() if not needed & graph.keys()]:
        for path in free:
            del graph[path]
    assert not graph


def test_error_page_quotes_the_messages_about_missing_extras():
    """The page's other messages are raised where they stand; these would need something not to be installed."""
    rows = re.findall(
        r"   \* - (.*needs? .*)\n     - ``'captum-idexpo\[(\w+)\]'``", (ROOT / "docs" / "errors.rst").read_text()
    )
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals over several lines
    assert len(rows) == 6
    for message, extra in rows:
        line = next(line for line in source.splitlines() if message in line)
        assert "pip install" in line
        assert f"captum-idexpo[{extra}]" in line


README_CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
FIRST_PAGE = (ROOT / "docs" / "index.rst").read_text()
FIRST_PAGE_CODE = [
    textwrap.dedent(code) for code in re.findall(r"code-block:: python\n\n((?:   .*\n|\n)+)", FIRST_PAGE)
]


@pytest.mark.parametrize("blocks", [README_CODE, FIRST_PAGE_CODE], ids=["README", "first page"])
def test_code_that_a_visitor_sees_first_trains_a_model(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential()
    model.layer2 = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    model.layer4 = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU())
    model.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 36, 10))
    loader = [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,)))]
    given = {name: loader for name in ("loader", "train_loader", "val_loader", "test_loader")}
    given |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "cross_entropy": cross_entropy}
    before = model.head[1].weight.clone()
    for block in blocks:
        exec(block.replace("epochs=20", "epochs=1"), given)
    assert blocks
    assert not torch.equal(model.head[1].weight, before)


LAYERS = re.findall(
    r"\* - ``(\w+)``\n     - ``(model\.[^`]+)``\n     -(?: ``(.+)``)?", (ROOT / "docs" / "choose.rst").read_text()
)


@pytest.mark.parametrize(("network", "layer", "transform"), LAYERS, ids=[network for network, *_ in LAYERS])
def test_layers_named_for_networks_give_maps_to_rank(network, layer, transform):
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, network)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.01)  # the head of an untrained vision transformer
    size = 224 if transform else 96  # a vision transformer has one size
    layer = eval(layer, {"model": model})
    settings = {"reshape_transform": eval(transform, {"tokens_to_map": tokens_to_map})} if transform else {}
    x, y = torch.rand(1, 3, size, size), torch.tensor([3])
    explainer = LayerGradCam(model, layer, **settings)
    with torch.no_grad():
        maps = explainer.attribute(x, target=y)
        terms = InsertionDeletion(explainer, baselines=0.0, step_size=size**2 // 2)(x, y)
    assert maps.shape[:2] == (1, 1)
    assert min(maps.shape[2:]) > 1
    assert set(terms) == {"insertion", "deletion"}
