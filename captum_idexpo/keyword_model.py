"""Models that take keyword arguments or return structured outputs, as a module from tensors to a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from captum_idexpo._core.errors import InputError, InputTypeError


class KeywordModel(nn.Module):
    """A model that is called with positional tensors and passes them to a model of keyword arguments.

    Explainers, metrics and regularizers call a model as ``model(*inputs, *additional_forward_args)`` and need a tensor.
    Hugging Face's models take keyword arguments and return a ModelOutput, MONAI's return dictionaries or tuples.

    Args:
        model: called as ``model(**{name: tensor})``.
        names: names of the keyword arguments, in the order of the positional ones.
        output: which part of the model's output is returned: a name (of a mapping, a ModelOutput or a named tuple), or
            the index of a tuple or list. It is not used if the model returns a tensor.

    Raises:
        ValueError: no names, or the same name twice; when called, another number of arguments than names, or an output
            without the part that is asked for.
        TypeError: a part of the output that is no tensor.

    Example:
        >>> import torch
        >>> from captum_idexpo import KeywordModel
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(5, 3)
        ...     def forward(self, *, embeddings, mask):
        ...         return {"logits": self.linear(embeddings * mask), "loss": None}
        >>> model = KeywordModel(Classifier(), "embeddings", "mask")
        >>> model(torch.randn(2, 5), torch.ones(2, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, *names: str, output: str | int = "logits") -> None:
        super().__init__()
        if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"names must be the keyword arguments of the model, each once, given: {names}. Example: "
                "KeywordModel(model, 'inputs_embeds', 'attention_mask')."
            )
        if not isinstance(output, (str, int)):
            raise InputTypeError(f"output must be a name or an index, given: {output!r}. Example: output='logits'.")
        self.model = model
        self.names = names
        self.output = output

    def forward(self, *arguments: Any) -> Tensor:
        """Return the chosen part of the model's output."""
        if len(arguments) != len(self.names):
            raise InputError(
                f"KeywordModel was called with {len(arguments)} arguments for the names {list(self.names)}: give one "
                "for each, the inputs first, then additional_forward_args."
            )
        return self._chosen(self.model(**dict(zip(self.names, arguments, strict=True))))

    def _chosen(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        part: Any = None
        if isinstance(self.output, str):
            part = output.get(self.output) if isinstance(output, Mapping) else getattr(output, self.output, None)
        elif isinstance(output, (tuple, list)) and -len(output) <= self.output < len(output):
            part = output[self.output]
        if isinstance(part, Tensor):
            return part
        if part is not None:
            raise InputTypeError(
                f"The model's output {self.output!r} must be a tensor, given: {type(part).__name__}. Choose another "
                f"part by output=: {_parts(output)}."
            )
        raise InputError(f"The model's output has no {self.output!r}. Choose a part by output=: {_parts(output)}.")


def _parts(output: object) -> str:
    """Return the names or indices of the tensors in a structured output."""
    if isinstance(output, Mapping):
        found = [repr(name) for name, part in output.items() if isinstance(part, Tensor)]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        found = [repr(name) for name in output._fields if isinstance(getattr(output, name), Tensor)]
    elif isinstance(output, (tuple, list)):
        found = [str(index) for index, part in enumerate(output) if isinstance(part, Tensor)]
    else:
        found = [repr(name) for name, part in getattr(output, "__dict__", {}).items() if isinstance(part, Tensor)]
    return ", ".join(found) or "none is a tensor"
