"""Copies of what training moves, parameters and buffers, for when a step has to be undone."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn


class Buffers:
    """A module's buffers as they were, to be put back, also where the module has assigned others since."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.modules())
        self._kept: dict[tuple[nn.Module, str], tuple[Tensor | None, Tensor | None]] = {}
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Copies them as they are now."""
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                kept, saved = self._kept.get((owner, name), (None, None))
                if buffer is not None and saved is not None and kept is buffer and saved.shape == buffer.shape:
                    saved.copy_(buffer)
                else:
                    self._kept[owner, name] = buffer, None if buffer is None else buffer.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies back."""
        for (owner, name), (kept, saved) in self._kept.items():
            owner._buffers[name] = kept
            if kept is None or saved is None:
                continue
            if kept.shape != saved.shape:
                owner._buffers[name] = saved.clone()
            else:
                with suppress(RuntimeError):  # an expanded one, which nobody else could write into either
                    kept.copy_(saved)


class Weights:
    """A copy of what training moves of a module, parameters and buffers, that can be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._copies = [parameter.detach().clone() for parameter in self._parameters]
        self.buffers = Buffers(module)

    @torch.no_grad()
    def keep(self) -> None:
        """Copies them as they are now."""
        for parameter, saved in zip(self._parameters, self._copies, strict=True):
            saved.copy_(parameter)
        self.buffers.keep()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copies back."""
        for parameter, saved in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(saved)
        self.buffers.restore()
