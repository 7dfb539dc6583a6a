"""The base class of Captum's classes with a graph to the model's weights, and its helpers.

A subclass of `Trainable` and of a class of Captum gets a generated ``attribute`` method. The method has Captum's
arguments and the keyword-only ``create_graph``. It runs Captum's computation on a copy of the explainer that exists
for one call. The copy wraps the forward function in a `ForwardFunction`, and each layer in a `Tap`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar, cast

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.inputs import Tensors, as_tuple
from captum_idexpo._core.memory import MemoryBudget
from captum_idexpo._core.modes import module_of
from captum_idexpo._core.targets import captum_target, require_tensor
from captum_idexpo.attr._bounded import in_bounded_memory
from captum_idexpo.attr._graph import asks_for_graph, by_gradients, by_outputs, keeps_graph, on_its_own

TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, ...])
"""A tensor or a tuple of tensors; the result has the same form as the input."""

Method = TypeVar("Method", bound=Callable[..., Any])
Self = TypeVar("Self", bound="Trainable")

PARAMETERS = {
    "inputs": "a tensor ``(B, ...)`` or a tuple of them.",
    "baselines": "where the path starts: None (zero), a number, a tensor of the inputs' shape or with a batch axis of "
    "size 1, or a tuple of these.",
    "target": "int, tensor ``(B,)`` or list: the output index to explain; None if there is one output per row.",
    "additional_forward_args": "passed to the forward function after the inputs.",
    "abs": "return absolute values.",
    "n_steps": "gradients taken of each example.",
    "method": 'the quadrature: "gausslegendre", "riemann_left", "riemann_right", "riemann_middle" or '
    '"riemann_trapezoid".',
    "internal_batch_size": "rows of a forward pass; None: all at once.",
    "return_convergence_delta": "also return by how much the attributions miss the outputs' difference, ``(B,)``, "
    "detached.",
    "n_samples": "points drawn for each example.",
    "stdevs": "standard deviation of the noise added to the inputs, a number or one for each tensor.",
    "nt_type": 'how copies are summarised: "smoothgrad" (mean), "smoothgrad_sq" (mean of squares) or "vargrad" '
    "(variance).",
    "nt_samples": "noisy copies of each example.",
    "nt_samples_batch_size": "copies at a time; None: all.",
    "draw_baseline_from_distrib": "draw the baseline of each copy from the baselines given.",
    "kwargs": "arguments of the attribution method (target, baselines, ...).",
    "custom_attribution_func": "(multipliers, inputs, baselines) -> attributions, tuples of tensors; with a "
    "memory_budget of a few examples at a time.",
    "attribute_to_layer_input": "explain the layer's input instead of its output.",
    "attribute_to_neuron_input": "the neuron is one of the layer's input.",
    "neuron_selector": "an index, a tuple of indices or slices (summed over), or a callable that picks one value per "
    "example from the layer's output.",
    "relu_attributions": "keep the positive part only, eq. (13) of ID-ExpO (arXiv 2310.12553).",
    "attr_dim_summation": "sum over the channels; else return ``(B, C, ...)``.",
    "grad_kwargs": 'further arguments of `torch.autograd.grad`; ``{"create_graph": True}`` counts as create_graph.',
    "interpolate_mode": "how the map is upsampled, see `torch.nn.functional.interpolate`.",
    "verbose": "print what rule each layer has.",
    "create_graph": "attach the attribution to the model's graph; else it is detached.",
    "memory_budget": "bytes of activations that the graph may keep until the backward pass, which else computes the "
    "attribution again, a few examples at a time; None: no bound.",
}
"""Descriptions of the arguments of ``attribute``, unless a class has its own in `_parameters`."""

_ANNOTATIONS = {
    "create_graph": bool,
    "internal_batch_size": int | None,
    "memory_budget": float | MemoryBudget | None,
}
"""Annotations of the arguments that Captum's methods lack."""

_RAISES = """RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
ValueError: an empty batch; inputs and baselines that do not fit each other.
TypeError: inputs, target or outputs of a type that has no gradient.
AssertionError, IndexError: as Captum, on arguments that do not fit."""


class Trainable:
    """Base class that adds ``create_graph`` to a class of Captum.

    Subclasses set these attributes:

    Attributes:
        _summary: the first lines of the docstring of ``attribute``: what it returns.
        _returns: the shape and type of the result.
        _parameters: descriptions of arguments that differ from `PARAMETERS`.
        _defaults: defaults of arguments that differ from Captum's.
        _more: keyword-only arguments that Captum's method lacks, with their defaults.
        _modules_only: True if the class changes modules; it then accepts only a `torch.nn.Module`.
        _by_gradients: True if the class takes gradients; False if it uses only outputs.
        _of_inputs: True if gradients are taken with respect to the inputs themselves.
        _takes_distribution: True if baselines are a distribution for all examples, not one for each.
        _between_inputs: True if gradients are taken at points between the inputs and other points, which needs inputs
            that are not integers.
    """

    _summary: ClassVar[str] = ""
    _returns: ClassVar[str] = "Of the inputs' shape, tuple in, tuple out."
    _parameters: ClassVar[dict[str, str]] = {}
    _defaults: ClassVar[dict[str, Any]] = {}
    _more: ClassVar[dict[str, Any]] = {}
    _modules_only: ClassVar[bool] = False
    _by_gradients: ClassVar[bool] = True
    _of_inputs: ClassVar[bool] = False
    _takes_distribution: ClassVar[bool] = False
    _between_inputs: ClassVar[bool] = False

    forward_func: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_summary" not in vars(cls):
            return  # a base class of several classes, or a user's class
        cls.__init__ = _checking(cls.__init__, cls._modules_only)  # type: ignore[method-assign]
        if "attribute" not in vars(cls):
            cls.attribute = _written(cls)  # type: ignore[attr-defined]

    def _explain(self, inputs: Tensors, create_graph: bool, arguments: dict[str, Any]) -> Any:
        """Return the attribution, attached or detached, for arguments that `_read` has converted."""
        create_graph = asks_for_graph(create_graph, arguments.get("grad_kwargs"))
        self._refuse(create_graph)

        if not self._by_gradients:
            return by_outputs(self, lambda inputs: self._computed(inputs, arguments), inputs, create_graph)
        arguments = dict(arguments)
        memory = MemoryBudget.of(arguments.pop("memory_budget", None), create_graph, module_of(self.forward_func))
        if memory is None:
            return self._explain_by_gradients(inputs, create_graph, arguments)
        explain, of_examples = self._explain_by_gradients, self._arguments_of_examples(arguments)
        return in_bounded_memory(explain, self.forward_func, inputs, arguments, of_examples, memory)

    def _explain_by_gradients(
        self,
        inputs: Tensors,
        create_graph: bool,
        arguments: dict[str, Any],
        made_leaves: list[Tensor] | None = None,
    ) -> Any:
        delta = bool(arguments.get("return_convergence_delta"))

        def compute(inputs: Tensors) -> Any:
            return self._computed(inputs, arguments)

        return by_gradients(
            self,
            compute,
            inputs,
            create_graph,
            of_inputs=self._of_inputs,
            with_delta=delta,
            made_leaves=made_leaves,
        )

    def _computed(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        """Return what a copy of this explainer that exists for one call computes."""
        with self._one_call(arguments) as explainer:
            try:
                return explainer._compute(inputs, arguments)
            except (RuntimeError, TypeError) as error:
                if not self._between_inputs or isinstance(error, InputError) or _are_numbers(inputs):
                    raise
                raise self._no_gradient(inputs) from error

    def _arguments_of_examples(self, arguments: dict[str, Any]) -> set[str]:
        """Return the names of the arguments that may have an entry for each example."""
        baselines = set() if self._takes_distribution else {"baselines"}
        return {"target", "additional_forward_args"} | baselines

    def _read(self, arguments: dict[str, Any]) -> None:
        """Check the arguments and convert them in place to the forms that Captum accepts."""
        tensors = read_inputs(arguments["inputs"])
        if self._of_inputs and not _are_numbers(tensors):
            raise self._no_gradient(tensors)
        if "target" in arguments:
            arguments["target"] = captum_target(arguments["target"])
        additional = arguments.get("additional_forward_args")
        if additional is not None and not isinstance(additional, tuple):
            arguments["additional_forward_args"] = (additional,)  # Captum's DeepLiftShap takes a tensor for a tuple

    def _no_gradient(self, inputs: Tensors) -> InputTypeError:
        dtypes = [str(tensor.dtype) for tensor in as_tuple(inputs, "inputs")]
        return InputTypeError(
            f"{type(self).__name__} takes gradients with respect to the inputs, which integers do not have; given: "
            f"{', '.join(dtypes)}. Pass embeddings to a forward function that takes them, explain an embedding layer "
            "(LayerIntegratedGradients), or pass what is not explained as additional_forward_args."
        )

    def _refuse(self, create_graph: bool) -> None:
        """Raise an error if a graph is asked for and this explainer cannot have one."""

    @contextmanager
    def _one_call(self: Self, arguments: dict[str, Any]) -> Iterator[Self]:
        """Yield a copy of this explainer that exists for one call."""
        explainer = copy.copy(self)
        taps = explainer._tapped(arguments)
        explainer.forward_func = ForwardFunction.of(self.forward_func, *taps, check=self._output_check(arguments))
        yield explainer

    def _output_check(self, arguments: dict[str, Any]) -> Callable[[Any], None]:
        """Return a function that raises an error for an output that does not fit these arguments."""
        if "target" not in arguments:
            return lambda _output: None
        chooses = arguments["target"] is not None or not self._by_gradients
        return require_tensor if chooses else require_number_per_row

    def _tapped(self, arguments: dict[str, Any]) -> tuple[Tap, ...]:
        """Replace this explainer's layers, if it has any, by taps, and return the taps."""
        return ()

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        """Run Captum's computation."""
        return captums_method(type(self))(self, inputs, **arguments)


def _checking(init: Callable[..., None], modules_only: bool) -> Callable[..., None]:
    """Wrap a constructor: check that the layer and, if ``modules_only``, the model are modules."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        if modules_only:
            require_module(list(bound.arguments.values())[1], type(self).__name__)
        if "layer" in bound.arguments:
            require_layer(bound.arguments["layer"])
        init(self, *args, **kwargs)

    return checked


def captums_method(cls: type) -> Callable[..., Any]:
    """Return Captum's ``attribute`` of a class, without its usage log."""
    owner = next(base for base in cls.__mro__ if base.__module__.startswith("captum.") and "attribute" in vars(base))
    return cast(Callable[..., Any], inspect.unwrap(vars(owner)["attribute"]))


def _are_numbers(inputs: Tensors) -> bool:
    """Return True if all inputs are floating point or complex, so that they can have gradients."""
    return all(tensor.is_floating_point() or tensor.is_complex() for tensor in as_tuple(inputs, "inputs"))


def require_number_per_row(output: object) -> None:
    """Raise an error unless each row of the output is a single number, which is necessary without a target."""
    require_tensor(output)
    if isinstance(output, Tensor) and output.dim() and len(output) and output[0].numel() != 1:
        raise InputError(
            f"target is missing: the forward function returns {tuple(output.shape[1:])} values per example. Pass "
            "target= (labels, or predictions: model(inputs).argmax(1)), or aggregate the output in the forward "
            "function."
        )


def _written(cls: type[Trainable]) -> Callable[..., Any]:
    """Return the ``attribute`` method of a class: Captum's arguments, the arguments in `_more`, ``create_graph``."""
    captums = inspect.signature(captums_method(cls))
    budget = {"memory_budget": None} if cls._by_gradients else {}
    keyword_only = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_ANNOTATIONS[name])
        for name, default in {**cls._more, "create_graph": False, **budget}.items()
    ]
    positional = [
        each.replace(default=cls._defaults[name]) if name in cls._defaults else each
        for name, each in captums.parameters.items()
    ]
    variable = [positional.pop()] if positional[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    signature = inspect.Signature([*positional, *keyword_only, *variable])

    def attribute(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["self"]
        self._read(arguments)
        create_graph, inputs = arguments.pop("create_graph"), arguments.pop("inputs")
        return self._explain(inputs, create_graph, arguments)

    attribute.__signature__ = signature  # type: ignore[attr-defined]
    attribute.__annotations__ = {
        name: each.annotation for name, each in signature.parameters.items() if each.annotation is not each.empty
    }
    attribute.__qualname__ = f"{cls.__qualname__}.attribute"
    attribute.__module__ = cls.__module__
    attribute.__doc__ = documented(cls._summary, signature, cls._parameters, cls._returns)
    return logged(attribute)


def documented(summary: str, signature: inspect.Signature, parameters: dict[str, str], returns: str) -> str:
    """Return the docstring of a method with this signature."""
    texts = {**PARAMETERS, **parameters}
    lines = [f"{name}: {texts[name]}" for name in signature.parameters if name != "self"]

    def block(title: str, text: str) -> str:
        wrapped = textwrap.fill(text, 108, subsequent_indent="    ", break_long_words=False)
        return textwrap.indent(wrapped, "    ") if title else wrapped

    parts = [
        summary.strip(),
        "Args:\n" + "\n".join(block("Args", line) for line in lines),
        "Returns:\n" + block("Returns", returns),
        "Raises:\n" + "\n".join(block("Raises", line) for line in _RAISES.splitlines()),
    ]
    return "\n\n".join(parts) + "\n"


def logged(method: Method) -> Method:
    """Return a public ``attribute`` method that logs its calls like Captum's and is an independent attribution.

    An attribution that is a part of another one is called through ``__wrapped__``, as in Captum; see `part`.
    """
    log: Any = log_usage(part_of_slo=True)(method)

    @functools.wraps(method)
    def attribute(*args: Any, **kwargs: Any) -> Any:
        with on_its_own():
            return log(*args, **kwargs)

    return cast(Method, attribute)


def part(explainer: type) -> Callable[..., Any]:
    """Return the ``attribute`` of a class for use in another attribution: (explainer, inputs, ...) -> attribution."""
    attribute: Callable[..., Any] = explainer.attribute.__wrapped__  # type: ignore[attr-defined]
    return attribute


def require_trainable(explainer: Attribution) -> set[str]:
    """Return the argument names of ``explainer.attribute``; raise TypeError if ``create_graph`` is not one of them."""
    names = set(inspect.signature(explainer.attribute).parameters)
    if "create_graph" not in names:
        name = type(explainer).__name__
        raise TypeError(
            f"{type(explainer).__module__}.{name} has no create_graph, so nothing can be trained through it: "
            f"import it with `from captum_idexpo.attr import {name}`."
        )
    return names


def read_inputs(inputs: Tensors) -> tuple[Tensor, ...]:
    """Return the inputs as a tuple of tensors.

    Raises:
        InputTypeError: an input is not a tensor.
        InputError: the batch is empty.
    """
    tensors = as_tuple(inputs, "inputs")
    if not tensors or not tensors[0].dim() or not len(tensors[0]):
        raise InputError("The batch is empty: there is nothing to explain.")
    return tensors


class ForwardFunction:
    """A wrapper of the user's forward function for one call of an explainer.

    It passes copies of the inputs, because the function may write into them. If a graph is needed, it enables
    gradients, also where Captum disables them.

    Args:
        forward_func: the user's forward function.
        taps: replace layers. Each of these layers must be called exactly once in a forward pass.
        check: raises an error for an invalid output.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        taps: tuple[Tap, ...] = (),
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self._forward_func = forward_func
        self._taps = taps
        self._check = check
        if hasattr(forward_func, "device_ids"):  # Captum reads this attribute of a DataParallel
            self.device_ids = forward_func.device_ids

    @classmethod
    def of(cls, forward_func: Callable[..., Any], *taps: Tap, check: Callable[[Any], None]) -> Callable[..., Any]:
        """Wrap a forward function; return an instance of this class unchanged."""
        if isinstance(forward_func, cls):
            return forward_func
        return cls(forward_func, taps, check)

    def __call__(self, *arguments: Any) -> Any:
        """Return the output of the forward function."""
        with ExitStack() as stack:
            if keeps_graph():
                stack.enter_context(torch.enable_grad())
            copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
            for tap in self._taps:
                stack.enter_context(tap.in_place())
                stack.enter_context(tap.called_once())
            output = self._forward_func(*copies)
        if self._check is not None:
            self._check(output)
        return output


class Tap(nn.Module):
    """A module that replaces a layer during one call: the tensors of the layer's output or input pass through it.

    Captum hooks this module instead of the layer. The layer's output or input may be a tensor, or a flat tuple or list
    of tensors, numbers, strings and None. Only its tensors are explained.

    Args:
        layer: the user's module.
        its_input: use the layer's input instead of its output.
        hands_on_copies: pass copies on to the rest of the model, because the next operation may work in place.
    """

    def __init__(self, layer: nn.Module, its_input: bool, hands_on_copies: bool = False) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # an assignment would register the layer as a submodule
        self._its_input = its_input
        self._hands_on_copies = hands_on_copies
        self._calls = Counter[torch.device]()
        self.replacement: tuple[Tensor, ...] | None = None
        """Tensors that replace the layer's tensors; None: the layer's tensors are kept."""

    def forward(self, *tensors: Tensor) -> Any:
        """Return the tensors as a tuple, or a single tensor."""
        return tensors if len(tensors) > 1 else tensors[0]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Hook the layer, so that its tensors pass through this module inside the context."""
        layer: nn.Module = self.__dict__["layer"]
        if self._its_input:
            handle = layer.register_forward_pre_hook(lambda _module, arguments: self._through(arguments))
        else:
            handle = layer.register_forward_hook(lambda _module, _arguments, output: self._through(output))
        try:
            yield
        finally:
            handle.remove()

    def _through(self, value: Any) -> Any:
        entries = list(value) if isinstance(value, (tuple, list)) else [value]
        self._require_flat(entries)
        places = [place for place, entry in enumerate(entries) if isinstance(entry, Tensor)]
        self._calls[entries[places[0]].device] += 1  # a DataParallel calls the layer once on each device
        passed = self(*(entries[place] for place in places)) if self.replacement is None else self.replacement
        passed = passed if isinstance(passed, (tuple, list)) else (passed,)
        for place, tensor in zip(places, passed, strict=True):
            entries[place] = tensor.clone() if self._hands_on_copies else tensor
        if not isinstance(value, (tuple, list)):
            return entries[0]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)

    def _require_flat(self, entries: list[Any]) -> None:
        flat = all(entry is None or isinstance(entry, (Tensor, bool, int, float, str)) for entry in entries)
        if flat and any(isinstance(entry, Tensor) for entry in entries):
            return
        layer: nn.Module = self.__dict__["layer"]
        what = "input" if self._its_input else "output"
        parts = [name for name, _ in layer.named_children()]
        choice = f"one of its submodules ({', '.join(parts)})" if parts else "a module before or behind it"
        raise InputTypeError(
            f"The {what} of the layer {type(layer).__name__} is no tensor and no flat tuple or list of tensors and "
            f"None; given: {', '.join(type(entry).__name__ for entry in entries)}. Explain {choice}, for example an "
            "nn.Identity through which the model passes the tensor."
        )

    @contextmanager
    def called_once(self) -> Iterator[None]:
        """Raise InputError unless the layer is called exactly once on each device inside the context."""
        self._calls.clear()
        yield
        layer = type(self.__dict__["layer"]).__name__
        n_calls = max(self._calls.values(), default=0)
        if not n_calls:
            raise InputError(
                f"The layer {layer} is never called in the forward pass: choose one that the forward function uses, "
                "or call the module itself instead of its forward method."
            )
        if n_calls > 1:
            raise InputError(
                f"The layer {layer} has {n_calls} calls in one forward pass, and there is no one attribution of all. "
                "Give each call a module of its own to explain: pass its result through an nn.Identity."
            )


def require_layer(layer: object) -> None:
    """Raise InputTypeError if the layer, or one layer of a list, is not a module."""
    for single in layer if isinstance(layer, list) else [layer]:
        if not isinstance(single, nn.Module):
            given = f"the name {single!r}" if isinstance(single, str) else type(single).__name__
            raise InputTypeError(
                f"layer must be a torch.nn.Module of the model, given: {given}; model.get_submodule(name) finds it."
            )


def require_module(model: object, name: str) -> None:
    """Raise InputTypeError if the model of an explainer that changes modules is not a module."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"{name} changes the gradients of a model's modules, so it needs a torch.nn.Module, given: "
            f"{type(model).__name__}. Put a function into the forward method of a module."
        )
