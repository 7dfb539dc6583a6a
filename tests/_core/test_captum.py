"""One file holds all private names of Captum's."""

from __future__ import annotations

import ast
from importlib.metadata import requires
from pathlib import Path

import captum_idexpo
from captum_idexpo._core import captum

PACKAGE = Path(captum_idexpo.__file__).parent
PUBLIC = {"captum", "captum.attr", "captum.metrics", "captum.log"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if name.name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_captum_private_names_are_imported_in_one_module_only():
    for path in PACKAGE.rglob("*.py"):
        names = {name for name in imported(path) if name.partition(".")[0] == "captum"}
        assert path == Path(captum.__file__) or names <= PUBLIC, path


def test_captum_module_exports_only_names_that_are_used():
    rest = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path != Path(captum.__file__))
    assert [name for name in captum.__all__ if name not in rest] == []


def test_captum_version_has_an_upper_bound():
    assert any(requirement.startswith("captum") and "<0.10" in requirement for requirement in requires("captum-idexpo"))
