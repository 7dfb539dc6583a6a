"""Modes in which a user's model runs, changed for a while and always restored."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from captum_idexpo._core.checkpointing import depends_on_mode, refused_inside

_IN_TRAINING_MODE = (
    "when the model is in training mode again: turn checkpointing off where it is in eval mode (`if self.training`), "
    "or pass eval_mode=False."
)


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Holds models in eval mode; each module's own mode returns afterwards, also after an exception.

    cuDNN's recurrent layers have no backward in eval mode: where there are some, cuDNN is left aside meanwhile. A graph
    keeps BatchNorm's statistics by reference and would silently follow when a later forward pass moves them: it is made
    with copies.

    Raises:
        RuntimeError: under enabled gradients, a module that computes something else in its own mode is called by
            `torch.utils.checkpoint`.
    """
    cudnn = torch.backends.cudnn
    cudnn_enabled = cudnn.enabled
    with ExitStack() as stack:
        modules = stack.enter_context(_restored_modes(models))
        if torch.is_grad_enabled():  # a graph that may be used after the mode has returned
            changed = [module for module in modules if module.training and depends_on_mode(module)]
            stack.enter_context(refused_inside(changed, _IN_TRAINING_MODE))
        for module in modules:
            _set_mode(module, False)
            if is_batch_norm(module) and torch.is_grad_enabled():
                module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        if any(isinstance(module, nn.RNNBase) for module in modules):
            cudnn.enabled = False
        try:
            yield
        finally:
            cudnn.enabled = cudnn_enabled


@contextmanager
def training_mode(model: nn.Module, *, freeze_batch_norm: bool) -> Iterator[None]:
    """Holds a model in training mode, with BatchNorm's statistics frozen if asked for.

    A module's own `train` decides what that is: it may keep a part, a frozen backbone, in eval mode.
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
def no_weights_left() -> Iterator[None]:
    """Forward passes without a graph that others with one may follow.

    Weights computed under `torch.no_grad` may be kept, and handed without a graph to whatever follows in the same
    context: parametrized ones in `parametrize.cached`, up to PyTorch 2.10 also those that autocast casts.
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
    """`torch.no_grad`, no weights left."""
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


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of its batches (BatchNorm, InstanceNorm)."""
    return isinstance(module, _NormBase)


def depends_on_batch(module: nn.Module) -> bool:
    """Return True for a module in training mode whose output is random, or depends on the other rows of a pass."""
    if not module.training:
        return False
    chance = getattr(module, "p" if isinstance(module, _DropoutNd) else "dropout", 0)
    random = isinstance(chance, (int, float)) and chance > 0
    return is_batch_norm(module) or random or isinstance(module, nn.RReLU)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made the module, or its own `compile` method has been called."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def module_of(function: Any) -> nn.Module | None:
    """The module behind a forward function: itself, or the one whose bound method it is."""
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


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
