"""Layer-wise relevance propagation, of inputs and of layers, trainable.

A true forward pass gives each layer's inputs. A second one, with the weights that the rules change, gives the graph
along which relevance is propagated: each layer with a rule computes on its true inputs there. The model's own weights
stay as they are, so the attribution is a function of them.
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
    """What `LRP` and `LayerLRP` share."""

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
        """Return True for what Captum's own computation is for: rules of users, and models on several devices."""
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
    """The two forward passes of one call, and what is seen on the way.

    Args:
        model: the user's.

    Attributes:
        rules: of each layer that has one.
        relevance_in: shares of the output's relevance at the layer's inputs.
        relevance_out: those at its output.

    Raises:
        TypeError: a layer without a rule.
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
        self._entered: dict[int, Tensor] = {}  # tensors whose gradient is made relevance, once each
        self._phase = _Phase()
        self._handles: list[Any] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, a forward pass of the model notes the layers' true inputs."""

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
        """Yield the model's function for `torch.autograd.grad`, whose gradients are relevances."""
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
        """Let relevance pass an activation as it is."""
        entered: list[Tensor] = []

        def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered.append(arguments[0])
            return (arguments[0].clone(), *arguments[1:])  # which the activation may write into

        def leave(_module: nn.Module, _arguments: object, output: Tensor) -> Any:
            return _Carried.apply(entered.pop(), output, self._phase)

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _propagate(self, module: nn.Module, rule: Any) -> None:
        """Give a layer its true inputs, and make the gradients at its inputs and output relevances."""

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
                # In half precision the factor would be 0.
                wide = output.to(torch.promote_types(output.dtype, torch.float32))
                stable = wide + rule.STABILITY_FACTOR * torch.where(wide < 0, -1, 1)
                relevance: Tensor = (share / stable).to(share.dtype)
                return relevance

            if output.requires_grad:
                self._handles.append(output.register_hook(quotient))
            return output.clone()

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


class _Phase:
    """Whether relevance is being propagated; afterwards a backward pass of a loss may come."""

    of_relevance = True


class _Carried(torch.autograd.Function):
    """The true value in place of another: relevance goes to the other one, a loss's gradient to the true value."""

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
    """Leave the user's rules where they are, and nothing beside them; Captum deletes them."""
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
    """Layer-wise relevance propagation (Bach et al. 2015, doi 10.1371/journal.pone.0130140), `captum.attr.LRP`.

    Same rules and numbers as Captum's: ``module.rule = GammaRule()`` chooses one, which stays in place here. Captum
    changes weights in place, so that its attribution can have no graph.

    Args:
        model: a module whose layers have rules and are used once each.

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
    """Layer-wise relevance propagation to a layer, `captum.attr.LayerLRP`.

    Args:
        model: a module whose layers have rules and are used once each.
        layer: the module, or list of modules, at whose output (or input) relevance is read; with a rule.

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
