"""Trainable gradients with another rule for ReLU: guided backpropagation, deconvolution, guided Grad-CAM."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import captum.attr as captum
from torch import Tensor, nn

from captum_idexpo._core.errors import InputError
from captum_idexpo._core.inputs import as_tuple
from captum_idexpo.attr._hooks import change_gradient
from captum_idexpo.attr._trainable import Trainable
from captum_idexpo.attr.layer import LayerGradCam
from captum_idexpo.attr.layouts import ReshapeTransform


class ModifiedRelu(Trainable):
    """Base class of `GuidedBackprop` and `Deconvolution`."""

    _modules_only = True
    _of_inputs = True
    backward_hooks: list[Any]
    use_relu_grad_output: bool

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        with super()._one_call(arguments) as explainer, quietly():
            explainer.backward_hooks = []
            yield explainer

    def _register_hooks(self, module: nn.Module) -> None:
        if isinstance(module, nn.ReLU):
            change_gradient(module, self._rule, self.backward_hooks)

    def _rule(self, _module: nn.Module, grad_input: Tensor, grad_output: Tensor) -> Tensor:
        return (grad_output if self.use_relu_grad_output else grad_input).relu()


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress Captum's warning that it sets hooks; the hooks are removed after the call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Setting (forward, )?backward hooks")
        yield


class GuidedBackprop(ModifiedRelu, captum.GuidedBackprop):
    """Gradient with negative values set to zero at each ReLU (Springenberg et al. 2014, arXiv 1412.6806).

    The counterpart of `captum.attr.GuidedBackprop`. The rule applies to `torch.nn.ReLU` modules.

    Args:
        model: a module with ReLU modules.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import GuidedBackprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> GuidedBackprop(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

    _summary = "Return the guided gradient of the target with respect to the inputs."


class Deconvolution(ModifiedRelu, captum.Deconvolution):
    """Gradient in which each ReLU's backward pass is a ReLU of the gradient (Zeiler, Fergus 2014, arXiv 1311.2901).

    The counterpart of `captum.attr.Deconvolution`. The rule applies to `torch.nn.ReLU` modules.

    Args:
        model: a module with ReLU modules.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Deconvolution
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> Deconvolution(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """

    _summary = "Return the deconvolved gradient of the target with respect to the inputs."


class GuidedGradCam(Trainable, captum.GuidedGradCam):
    """Guided backpropagation times Grad-CAM of a layer (Selvaraju et al. 2017, arXiv 1610.02391).

    The counterpart of `captum.attr.GuidedGradCam`.

    Args:
        model: a module with ReLU modules.
        layer: the convolution whose map is used.
        device_ids: for DataParallel, as in Captum.
        reshape_transform: where the channels of the layer are, see `LayerGradCam`.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import GuidedGradCam
        >>> layers = [torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 2)]
        >>> model = torch.nn.Sequential(*layers)
        >>> map = GuidedGradCam(model, model[0]).attribute(torch.randn(4, 1, 8, 8), target=1, create_graph=True)
        >>> map.shape
        torch.Size([4, 1, 8, 8])
        >>> map.sum().backward()
    """

    _summary = "Return the guided gradient, times the upsampled positive part of Grad-CAM."
    _returns = (
        "Of the inputs' shape, tuple in, tuple out; as in Captum an empty tensor for an input that the map cannot be "
        "brought to."
    )
    _modules_only = True
    _of_inputs = True

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        device_ids: list[int] | None = None,
        *,
        reshape_transform: ReshapeTransform | None = None,
    ) -> None:
        super().__init__(model, layer, device_ids)
        self.grad_cam = LayerGradCam(model, layer, device_ids, reshape_transform=reshape_transform)
        self.guided_backprop = GuidedBackprop(model)

    @contextmanager
    def _one_call(self, arguments: dict[str, Any]) -> Iterator[Any]:
        yield copy.copy(self)  # the two parts copy themselves in their own calls

    def _read(self, arguments: dict[str, Any]) -> None:
        super()._read(arguments)
        tensors = as_tuple(arguments["inputs"], "inputs")
        if self.grad_cam.reshape_transform is not None and any(tensor.dim() == 3 for tensor in tensors):
            raise InputError(
                "GuidedGradCam enlarges the map along the last axis of the input, where the steps of a series may not "
                "be: multiply GuidedBackprop and LayerGradCam(..., reshape_transform=...) on the axis of the steps."
            )
