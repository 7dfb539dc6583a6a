"""The stub that gives type checkers the signatures which `Trainable` writes.

Type checkers see Captum's methods without it, which have no create_graph. ``python -m tests.attr.test_stub`` makes it.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import captum_idexpo.attr as attr
from captum_idexpo.attr._trainable import Trainable

FILE = Path(attr.__file__).with_suffix(".pyi")
HEAD = '''"""Signatures for type checkers, made by ``python -m tests.attr.test_stub``."""

from collections.abc import Callable
from typing import Any, TypeVar

import captum.attr
from captum._utils.typing import BaselineType, TargetType
from torch import Tensor

'''
TYPES = {
    "inputs": "Tensor | tuple[Tensor, ...]",
    "baselines": "BaselineType",
    "target": "TargetType",
    "additional_forward_args": "object | None",
    "stdevs": "float | tuple[float, ...]",
    "internal_batch_size": "int | None",
    "memory_budget": "float | None",
    "nt_samples_batch_size": "int | None",
    "perturbations_per_eval": "int | None",
    "neuron_selector": "Any",
    "grad_kwargs": "dict[str, Any] | None",
    "custom_attribution_func": "Callable[..., tuple[Tensor, ...]] | None",
    "layer_baselines": "BaselineType",
    "layer_mask": "Tensor | tuple[Tensor, ...] | None",
    "feature_mask": "Tensor | tuple[Tensor, ...] | None",
    "kwargs": "Any",
}
"""Of arguments whose default does not tell it."""
OF_A_DISTRIBUTION = "Tensor | tuple[Tensor, ...] | Callable[..., Any]"


def parameter(each: inspect.Parameter, of_inputs: bool) -> str:
    if each.name == "self":
        return "self"
    kind = TYPES.get(each.name) or type(each.default).__name__
    default = repr(each.default).replace("'", '"')
    if each.name == "baselines" and each.default is inspect.Parameter.empty:
        kind = OF_A_DISTRIBUTION
    if each.name == "inputs" and of_inputs:
        kind = "TensorOrTensors"
    if each.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{each.name}: {kind}"
    return f"{each.name}: {kind}" + ("" if each.default is inspect.Parameter.empty else f" = {default}")


def declaration(name: str) -> str:
    kind = getattr(attr, name)
    of_inputs = kind._returns == Trainable._returns
    lines, keyword_only = [], False
    for each in inspect.signature(kind.attribute).parameters.values():
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        lines.append(parameter(each, of_inputs))
    arguments = "".join(f"        {line},\n" for line in lines)
    returns = "TensorOrTensors" if of_inputs else "Any"
    head = f"class {name}(captum.attr.{name}):\n    def attribute(\n"
    return f"{head}{arguments}    ) -> {returns}: ...\n"


def stub() -> str:
    written = [name for name in attr.__all__ if isinstance(getattr(attr, name), type)]
    written = [name for name in written if issubclass(getattr(attr, name), Trainable)]
    others = [name for name in attr.__all__ if name not in written]
    others.sort(key=lambda name: (getattr(attr, name).__module__, name[0].islower(), name.lower()))
    imports = "".join(f"from {getattr(attr, name).__module__} import {name} as {name}\n" for name in others)
    variable = 'TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, ...])\n'
    every = "__all__ = [\n" + "".join(f'    "{name}",\n' for name in attr.__all__) + "]\n"
    return "\n".join([HEAD + imports, every, variable, *map(declaration, written)])


def test_stub_has_the_signatures_of_the_classes():
    assert FILE.read_text() == stub(), "make it anew: python -m tests.attr.test_stub"


if __name__ == "__main__":
    FILE.write_text(stub())
