"""The public interface: names, the order and kind of arguments, defaults. A change of it is meant, or fails here.

``python -m tests.test_public`` writes the file anew; the CHANGELOG tells users.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import captum_idexpo

FILE = Path(__file__).parent / "baseline" / "public.txt"
MODULES = [
    "captum_idexpo",
    "captum_idexpo.attr",
    "captum_idexpo.attr.local_linear",
    "captum_idexpo.attr.surrogates",
    "captum_idexpo.baselines",
    "captum_idexpo.feature_masks",
    "captum_idexpo.metrics",
    "captum_idexpo.metrics.masks",
    "captum_idexpo.regularizers",
    "captum_idexpo.testing",
    "captum_idexpo.training",
    "captum_idexpo.visualization",
]


def public_names(module) -> list[str]:
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", defined)
    return sorted(name for name in names if not name.startswith("_") and not inspect.ismodule(getattr(module, name)))


def signature(function) -> str:
    """Names, kinds and defaults; annotations are for the type checker to compare."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # an exception's
        return "(...)"
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    written = str(inspect.Signature([parameter for parameter in plain if parameter.name != "self"]))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", written)


def lines() -> Iterator[str]:
    for name in MODULES:
        module = importlib.import_module(name)
        for public in public_names(module):
            value = getattr(module, public)
            if not callable(value):
                yield f"{name}.{public}"
                continue
            yield f"{name}.{public}{signature(value)}"
            if inspect.isclass(value) and value.__module__.startswith("captum_idexpo"):
                for method, function in sorted(vars(value).items()):
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{public}.{method}{signature(function)}"


def test_public_names_and_signatures_equal_the_recorded_ones():
    assert list(lines()) == FILE.read_text().splitlines(), "python -m tests.test_public writes the file anew"


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 1])
def test_submodule_is_an_attribute_of_the_package(name):
    submodule = name.partition(".")[2]
    assert getattr(captum_idexpo, submodule) is importlib.import_module(name)
    assert submodule in dir(captum_idexpo)


def test_private_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'explainers'"):
        _ = captum_idexpo.explainers


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()))
