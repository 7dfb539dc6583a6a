"""Modes in which a user's model runs, and snapshots of its buffers and weights: changed for a while, then restored."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import dropwhile

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from captum_idexpo._core.errors import calling_modules

Buffers = dict[str, Tensor | None]
_CHECKPOINT = "torch.utils.checkpoint"
_IN_TRAINING_MODE = (
    "when the model is in training mode again: turn checkpointing off where it is in eval mode (`if self.training`), "
    "or pass eval_mode=False."
)

# --- what kind of module it is ---------------------------------------------------------------------------------------


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for a module that keeps running statistics of its batches (BatchNorm, InstanceNorm)."""
    return isinstance(module, _NormBase)


def has_new_statistics(module: nn.Module) -> bool:
    """Return True for BatchNorm whose running statistics are still those of a new layer, means 0 and variances 1."""
    if not isinstance(module, _NormBase) or module.running_mean is None or module.running_var is None:
        return False
    return not bool(module.running_mean.any()) and bool((module.running_var == 1).all())


def depends_on_mode(module: nn.Module) -> bool:
    """Return True for PyTorch's layers that compute something else in training mode: BatchNorm, dropout with p > 0."""
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    chance = getattr(module, "p" if isinstance(module, _DropoutNd) else "dropout", 0)
    random = isinstance(chance, (int, float)) and chance > 0
    return random or isinstance(module, nn.RReLU)


def depends_on_batch(module: nn.Module) -> bool:
    """Return True for a module in training mode whose output is random, or depends on the other rows of a pass."""
    return module.training and (is_batch_norm(module) or depends_on_mode(module))


def module_of(function: object) -> nn.Module | None:
    """Return the module behind a forward function: itself, or the one whose bound method it is."""
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def belong_together(modules: Iterable[nn.Module], model: nn.Module) -> bool:
    """Return False if modules have parameters of which none is the model's: they are another model, or a copy."""
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return not parameters or bool(parameters & {*model.parameters()})


# --- eval and training mode ------------------------------------------------------------------------------------------


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Hold models in eval mode; afterwards each module has its own mode again, also after an exception.

    Raises:
        RuntimeError: under enabled gradients, BatchNorm or dropout in training mode is called by
            `torch.utils.checkpoint`.
    """
    cudnn = torch.backends.cudnn
    cudnn_enabled = cudnn.enabled
    with ExitStack() as stack:
        modules = stack.enter_context(_restored_modes(models))
        if torch.is_grad_enabled():  # the backward pass may come when the mode has been restored
            changed = [module for module in modules if module.training and depends_on_mode(module)]
            stack.enter_context(refused_inside_checkpoints(changed, _IN_TRAINING_MODE))
        for module in modules:
            _set_mode(module, False)
            # A graph refers to BatchNorm's statistics, which a later forward pass in training mode moves. It gets
            # copies.
            if is_batch_norm(module) and torch.is_grad_enabled():
                module._buffers = copied_buffers(module)
        # cuDNN's recurrent layers have no backward pass in eval mode.
        if any(isinstance(module, nn.RNNBase) for module in modules):
            cudnn.enabled = False
        try:
            yield
        finally:
            cudnn.enabled = cudnn_enabled


@contextmanager
def training_mode(model: nn.Module, *, freeze_batch_norm: bool) -> Iterator[None]:
    """Hold a model in training mode, with BatchNorm's statistics frozen if asked for.

    A module's own `train` decides what that is: it may keep a part, such as a frozen backbone, in eval mode.
    """
    with _restored_modes([model]) as modules:
        for module in modules:
            _set_mode(module, True)
        for module in modules:
            if type(module).train is not nn.Module.train and "mode" in inspect.signature(module.train).parameters:
                module.train(True)
        for module in modules:
            if freeze_batch_norm and is_batch_norm(module):
                _set_mode(module, False)
        yield


@contextmanager
def _restored_modes(models: Iterable[nn.Module | None]) -> Iterator[list[nn.Module]]:
    modules = [module for model in models if model is not None for module in model.modules()]
    before = [(module, module.training, module._buffers) for module in modules]
    try:
        yield modules
    finally:
        for module, mode, buffers in before:
            _set_mode(module, mode)
            if module._buffers is not buffers:
                module._buffers = buffers


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:  # setting an attribute of a module takes longer than all else here
        module.training = training


# --- parts that are computed again in the backward pass --------------------------------------------------------------


@contextmanager
def refused_inside_checkpoints(modules: Iterable[nn.Module], why: str, *, output_only: bool = False) -> Iterator[None]:
    """Refuse modules inside a part of a model that `torch.utils.checkpoint` runs.

    The backward pass computes such a part again, under its own conditions. What held for the forward pass alone (a
    mode, another tensor in place of a layer's) is gone by then, and the gradient would silently be wrong.

    Args:
        modules: the modules.
        why: what is wrong with it and what to do; follows the words that say that the part is computed again.
        output_only: a module's output matters, not its input, so the module may be the whole checkpointed part.

    Raises:
        RuntimeError: inside, one of the modules is called by `torch.utils.checkpoint`.
    """

    def refuse(module: nn.Module, _args: object) -> None:
        if torch.compiler.is_compiling():  # a compiled graph keeps the conditions that it was traced under
            return
        callers: Iterable[str] = calling_modules()
        if output_only:  # leave out a checkpoint that calls this module itself
            callers = dropwhile(lambda name: name == "torch.nn.modules.module", callers)
            callers = dropwhile(lambda name: name == _CHECKPOINT, callers)
        if _CHECKPOINT in callers:
            raise RuntimeError(
                f"{type(module).__name__} is run by {_CHECKPOINT}, which computes it again in the backward pass, {why}"
            )

    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- passes without a graph ------------------------------------------------------------------------------------------


@contextmanager
def no_weights_left() -> Iterator[None]:
    """Clear weights that are cached inside, so that later forward passes build a graph.

    Weights computed under `torch.no_grad` may be kept, and would be handed without a graph to whatever follows in the
    same context: parametrized ones in `parametrize.cached`, up to PyTorch 2.10 also those that autocast casts.
    """
    parametrized = dict(parametrize._cache)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for name in parametrize._cache.keys() - parametrized.keys():
            del parametrize._cache[name]


@contextmanager
def no_graph() -> Iterator[None]:
    """Run under `torch.no_grad` and leave no cached weights behind."""
    with torch.no_grad(), no_weights_left():
        yield


def precision(device: torch.device) -> torch.dtype:
    """Return the type in which matrices of single precision are multiplied: autocast's, if it is on."""
    if hasattr(torch.amp, "is_autocast_available"):
        known = torch.amp.is_autocast_available(device.type)
        enabled = known and torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if enabled else torch.float32
    # An older torch.
    if device.type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else torch.float32
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else torch.float32


# --- snapshots -------------------------------------------------------------------------------------------------------


def copied_buffers(module: nn.Module) -> Buffers:
    """Return copies of a module's own buffers, not of those of its submodules."""
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in module._buffers.items()}


def put_back(module: nn.Module, copies: Buffers) -> None:
    """Write copies into a module's own buffers, unseen by graphs that refer to the buffers."""
    for name, copy in copies.items():
        buffer = module._buffers[name]
        if copy is None or buffer is None:
            continue
        if buffer.shape != copy.shape:
            module._buffers[name] = copy.clone()
        elif not torch.equal(buffer, copy):  # one that was not changed may be an expanded one, which has no room
            buffer.data.copy_(copy)


class Snapshot:
    """Copies of a module's buffers, and of its trainable parameters if asked for, that can be put back.

    Restoring also brings back buffers in whose place the module has assigned others.

    Args:
        module: the module.
        parameters: copy the parameters that require gradient, too.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = False) -> None:
        self._modules = list(module.modules())
        self._parameters = [p for p in module.parameters() if p.requires_grad] if parameters else []
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        self._keep_buffers()

    @torch.no_grad()
    def keep(self) -> None:
        """Replace the copies by the values of this moment."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            copy.copy_(parameter)
        self._keep_buffers()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)
        self.restore_buffers()

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the copies of the buffers back, not those of the parameters."""
        for module, (buffers, copies) in self._buffers.items():
            module._buffers.update(buffers)
            put_back(module, copies)

    def _keep_buffers(self) -> None:
        self._buffers = {
            module: (dict(module._buffers), copied_buffers(module)) for module in self._modules if module._buffers
        }
