"""Trainable layer-wise relevance propagation, for inputs and for layers.

The first forward pass records the true inputs of each layer. The second forward pass uses the weights that the rules
change. Each layer with a rule gets its true inputs there. Relevance is propagated along the graph of the second pass.
The model's weights are not changed in place, so the attribution is a function of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import captum.attr as captum
import torch
from torch import Tensor, nn
from torch.func import functional_call

from captum_idexpo._core.captum import (
    SUPPORTED_LAYERS_WITH_RULES,
    SUPPORTED_NON_LINEAR_LAYERS,
    Alpha1_Beta0_Rule,
    EpsilonRule,
    GammaRule,
    IdentityRule,
    PropagationRule,
    TargetType,
    format_output,
    run_forward,
)
from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.inputs import Tensors, as_tuple
from captum_idexpo._core.modes import refused_inside_checkpoints
from captum_idexpo.attr._trainable import Trainable, captums_method
from captum_idexpo.attr.gradients import WITH_DELTA
from captum_idexpo.attr.layer import PER_ACTIVATION_WITH_DELTA

_RULES = (EpsilonRule, GammaRule, Alpha1_Beta0_Rule, IdentityRule)


class RelevancePropagation(Trainable):
    """Base class of `LRP` and `LayerLRP`."""

    _modules_only = True
    _of_inputs = True
    model: nn.Module
    gradient_func: Callable[..., tuple[Tensor, ...]]

    def _refuse(self, create_graph: bool) -> None:
        own = self._rules_of_the_users()
        if create_graph and own:
            raise InputTypeError(
                f"create_graph with a rule of your own ({type(own[0]).__name__}), which changes weights in place: use "
                "EpsilonRule, GammaRule, Alpha1_Beta0_Rule or IdentityRule of captum.attr."
            )
        if create_graph and isinstance(self.model, nn.DataParallel):
            raise InputTypeError(f"{type(self).__name__} with create_graph takes no DataParallel: pass model.module.")

    def _is_captums(self) -> bool:
        """Return True if Captum's computation is used: for rules written by users, and for a DataParallel."""
        return bool(self._rules_of_the_users()) or isinstance(self.model, nn.DataParallel)

    def _rules_of_the_users(self) -> list[PropagationRule]:
        rules = [vars(module).get("rule") for module in self.model.modules()]
        return [rule for rule in rules if isinstance(rule, PropagationRule) and type(rule) not in _RULES]

    def _compute(self, inputs: Tensors, arguments: dict[str, Any]) -> Any:
        if self._is_captums():
            with _rules_kept(self.model):
                return captums_method(type(self))(self, inputs, **arguments)
        return self._propagated(inputs, **arguments)

    def _propagated(
        self,
        inputs: Tensors,
        target: TargetType,
        additional_forward_args: object,
        return_convergence_delta: bool,
        verbose: bool,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        tensors = as_tuple(inputs, "inputs")
        passes = Passes(self.model)
        if verbose:
            for layer, rule in passes.rules.items():
                print(f"Applied {rule} on layer {layer}")
        with passes.first():
            output = run_forward(self.forward_func, tensors, target, additional_forward_args)
        with passes.second() as forward:
            shares = self.gradient_func(forward, tensors, target, additional_forward_args)
        if not isinstance(self, LayerLRP):
            relevance: Any = format_output(isinstance(inputs, tuple), tuple(_times(share, output) for share in shares))
        elif isinstance(self.layer, list):
            relevance = [self._of_layer(layer, passes, output, attribute_to_layer_input) for layer in self.layer]
        else:
            relevance = self._of_layer(self.layer, passes, output, attribute_to_layer_input)
        if not return_convergence_delta:
            return relevance
        if isinstance(relevance, list):
            return relevance, [self.compute_convergence_delta(single, output) for single in relevance]  # type: ignore[attr-defined]
        return relevance, self.compute_convergence_delta(relevance, output)  # type: ignore[attr-defined]

    @staticmethod
    def _of_layer(layer: nn.Module, passes: Passes, output: Tensor, of_its_input: bool) -> Any:
        found = (passes.relevance_in if of_its_input else passes.relevance_out).get(layer)
        if found is None:
            raise InputError(
                f"The layer {type(layer).__name__} has no rule, or the forward pass does not use it: choose one of the "
                f"layers that have one: {', '.join(sorted({type(each).__name__ for each in passes.rules}))}."
            )
        return format_output(len(found) > 1, tuple(_times(share, output) for share in found))


class Passes:
    """The two forward passes of one call, and the relevance that they record.

    Args:
        model: the user's model.

    Attributes:
        rules: the rule of each layer that has one.
        relevance_in: per layer, the shares of the output's relevance at its inputs.
        relevance_out: per layer, the share of the output's relevance at its output.

    Raises:
        TypeError: a layer has no rule.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        leaves = [module for module in model.modules() if module is not model and not list(module.children())]
        self._activations = [module for module in leaves if type(module) in SUPPORTED_NON_LINEAR_LAYERS]
        found = {module: _rule_of(module) for module in leaves if module not in self._activations}
        self.rules: dict[nn.Module, EpsilonRule] = {module: rule for module, rule in found.items() if rule is not None}
        self.relevance_in: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.relevance_out: dict[nn.Module, tuple[Tensor]] = {}
        self._true: dict[nn.Module, tuple[Tensor, ...]] = {}
        # Tensors with a hook that replaces the gradient by relevance; each tensor gets one hook only.
        self._entered: dict[int, Tensor] = {}
        self._phase = _Phase()
        self._handles: list[Any] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Record the layers' true inputs during a forward pass inside the context."""

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if module in self._true:
                raise InputError(
                    f"{module} is used more than once in the forward pass, where LRP has no rule: give each use a "
                    "module of its own."
                )
            self._true[module] = tuple(argument.clone() for argument in arguments)

        handles = [module.register_forward_pre_hook(note) for module in self.rules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def second(self) -> Iterator[Callable[..., Any]]:
        """Yield the forward function of the second pass, whose gradients are relevances."""
        weights = self._changed_weights()

        def forward(*arguments: Any) -> Any:
            adjusted = tuple(value + 0 if isinstance(value, Tensor) else value for value in arguments)
            return functional_call(self._model, weights, adjusted, tie_weights=False)

        why = "without what LRP does to its layers: turn checkpointing off while explaining."
        try:
            for module in self._activations:
                self._pass_relevance_on(module)
            for module, rule in self.rules.items():
                self._propagate(module, rule)
            with refused_inside_checkpoints(list(self.rules), why, output_only=False):
                yield forward
        finally:
            self._phase.of_relevance = False
            for handle in self._handles:
                handle.remove()

    def _changed_weights(self) -> dict[str, Tensor]:
        names = {module: name for name, module in self._model.named_modules()}
        weights: dict[str, Tensor] = {}
        for module, rule in self.rules.items():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(weight, Tensor) and isinstance(rule, GammaRule):
                weights[f"{names[module]}.weight"] = weight + rule.gamma * weight.clamp(min=0)
            elif isinstance(weight, Tensor) and isinstance(rule, Alpha1_Beta0_Rule):
                weights[f"{names[module]}.weight"] = weight.clamp(min=0)
            if isinstance(bias, Tensor) and getattr(rule, "set_bias_to_zero", False):
                weights[f"{names[module]}.bias"] = torch.zeros_like(bias)
        return weights

    def _pass_relevance_on(self, module: nn.Module) -> None:
        """Set hooks that pass relevance through an activation unchanged."""
        entered: list[Tensor] = []

        def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered.append(arguments[0])
            return (arguments[0].clone(), *arguments[1:])  # an in-place activation writes into its input

        def leave(_module: nn.Module, _arguments: object, output: Tensor) -> Any:
            return _Carried.apply(entered.pop(), output, self._phase)

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _propagate(self, module: nn.Module, rule: Any) -> None:
        """Set hooks that give a layer its true inputs and turn gradients at its inputs and output into relevances."""

        def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pairs = list(zip(arguments, self._true[module], strict=True))
            for given, true in pairs:
                if given.requires_grad and id(given) not in self._entered:
                    self._entered[id(given)] = given
                    self._handles.append(given.register_hook(at_input(true)))
            return tuple(_Carried.apply(given, true, self._phase) for given, true in pairs)

        def at_input(true: Tensor) -> Callable[[Tensor], Tensor]:
            def relevance(gradient: Tensor) -> Tensor:
                share = (
                    self.relevance_out[module][0]
                    if isinstance(rule, IdentityRule)
                    else (gradient * true).to(gradient.dtype)
                )
                self.relevance_in[module] = (*self.relevance_in.get(module, ()), share)
                return share

            return relevance

        def leave(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
            def quotient(share: Tensor) -> Tensor:
                self.relevance_out[module] = (share,)
                # In half precision the stability factor would be rounded to 0.
                wide = output.to(torch.promote_types(output.dtype, torch.float32))
                stable = wide + rule.STABILITY_FACTOR * torch.where(wide < 0, -1, 1)
                relevance: Tensor = (share / stable).to(share.dtype)
                return relevance

            if output.requires_grad:
                self._handles.append(output.register_hook(quotient))
            return output.clone()

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


class _Phase:
    """A flag: True while relevance is propagated, False in a later backward pass of a loss."""

    of_relevance = True


class _Carried(torch.autograd.Function):
    """A function that replaces a tensor of the second forward pass by the true value.

    Relevance flows to the replaced tensor. The gradient of a loss flows to the true value.
    """

    @staticmethod
    def forward(ctx: Any, _path: Tensor, true: Tensor, phase: _Phase) -> Tensor:
        ctx.phase = phase
        return true.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient, None, None) if ctx.phase.of_relevance else (None, gradient, None)


def _rule_of(module: nn.Module) -> Any:
    if hasattr(module, "rule"):
        return module.rule
    kind = SUPPORTED_LAYERS_WITH_RULES.get(type(module))
    if kind is None:
        raise InputTypeError(
            f"LRP has no rule for {type(module).__name__}. Set one that suits it (module.rule = "
            "captum.attr.EpsilonRule()), or use another attribution."
        )
    return kind()


@contextmanager
def _rules_kept(model: nn.Module) -> Iterator[None]:
    """Restore the `rule` attributes of all modules afterwards, because Captum deletes the user's rules."""
    before = {module: vars(module).get("rule") for module in model.modules()}
    try:
        yield
    finally:
        for module, rule in before.items():
            vars(module).pop("rule", None)
            vars(module).pop("activations", None)
            if rule is not None:
                module.rule = rule


def _times(share: Tensor, output: Tensor) -> Tensor:
    return share * output.reshape(-1, *[1] * (share.dim() - 1))


class LRP(RelevancePropagation, captum.LRP):
    """Layer-wise relevance propagation (Bach et al. 2015, doi 10.1371/journal.pone.0130140), as `captum.attr.LRP`.

    The rules and the values are those of Captum's class. ``module.rule = GammaRule()`` sets the rule of a layer. Captum
    deletes this attribute after a call; this class keeps it. Captum changes weights in place, so its attribution cannot
    have a graph.

    Args:
        model: a module. Each of its layers must have a rule and be used once.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LRP
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> relevance = LRP(model).attribute(torch.randn(5, 3), target=1, create_graph=True)
        >>> relevance.shape
        torch.Size([5, 3])
        >>> relevance.square().sum().backward()
    """

    _summary = "Return the output's relevance, propagated to the inputs."
    _returns = WITH_DELTA


class LayerLRP(RelevancePropagation, captum.LayerLRP):
    """Layer-wise relevance propagation to a layer, as `captum.attr.LayerLRP`.

    Args:
        model: a module. Each of its layers must have a rule and be used once.
        layer: the module with a rule, or list of such modules, whose relevance at the output (or input) is returned.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerLRP
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> relevance = LayerLRP(model, model[0]).attribute(torch.randn(5, 3), target=1, create_graph=True)
        >>> relevance.shape
        torch.Size([5, 4])
        >>> relevance.square().sum().backward()
    """

    _summary = "Return the output's relevance, propagated to the layer."
    _returns = PER_ACTIVATION_WITH_DELTA
