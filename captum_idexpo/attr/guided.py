"""Gradients with another rule for ReLU, trainable: guided backpropagation, deconvolution, guided Grad-CAM."""

from __future__ import annotations

from functools import partial
from typing import Any

import captum.attr as captum
from captum._utils.typing import TargetType
from torch import Tensor, nn

from captum_idexpo.attr._graph import by_gradients
from captum_idexpo.attr._hooks import HookedOnce
from captum_idexpo.attr._usage import TensorOrTensors, logged
from captum_idexpo.attr.layer import LayerGradCam


class ModifiedRelu(HookedOnce):
    """What `GuidedBackprop` and `Deconvolution` share."""

    def _forget(self) -> None:
        self.backward_hooks: list[Any] = []

    @logged
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        create_graph: bool = False,
    ) -> TensorOrTensors:
        """The changed gradient of the target in the inputs; arguments, result and errors as for `Saliency`."""
        with self.for_one_call() as explainer:
            compute = partial(
                super().attribute.__wrapped__,  # type: ignore[misc]
                explainer,
                target=target,
                additional_forward_args=additional_forward_args,
            )
            attribution: TensorOrTensors = by_gradients(self, compute, inputs, create_graph, of_inputs=True)
            return attribution


class GuidedBackprop(ModifiedRelu, captum.GuidedBackprop):
    """The gradient, cut at each ReLU where it is negative (Springenberg et al. 2014, arXiv 1412.6806).

    `captum.attr.GuidedBackprop`. The rule applies to `torch.nn.ReLU` modules.

    Args:
        model: a module with ReLU modules.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import GuidedBackprop
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> GuidedBackprop(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """


class Deconvolution(ModifiedRelu, captum.Deconvolution):
    """The gradient with ReLU applied to it in place of ReLU's own (Zeiler, Fergus 2014, arXiv 1311.2901).

    `captum.attr.Deconvolution`. The rule applies to `torch.nn.ReLU` modules.

    Args:
        model: a module with ReLU modules.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import Deconvolution
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> Deconvolution(model).attribute(torch.randn(5, 3), target=1, create_graph=True).sum().backward()
    """


class GuidedGradCam(captum.GuidedGradCam):
    """Guided backpropagation times Grad-CAM of a layer (Selvaraju et al. 2017, arXiv 1610.02391).

    `captum.attr.GuidedGradCam`.

    Args:
        model: a module with ReLU modules.
        layer: the convolution whose map is used.
        device_ids: for DataParallel, as in Captum.

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

    def __init__(self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__(model, layer, device_ids)
        self.grad_cam = LayerGradCam(model, layer, device_ids)
        self.guided_backprop = GuidedBackprop(model)

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        interpolate_mode: str = "nearest",
        attribute_to_layer_input: bool = False,
        *,
        create_graph: bool = False,
    ) -> Any:
        """The guided gradient of the target in the inputs, times the upsampled positive part of Grad-CAM.

        Args:
            inputs: a tensor ``(B, C, ...)`` or a tuple of them.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            interpolate_mode: how the map is upsampled, see `torch.nn.functional.interpolate`.
            attribute_to_layer_input: take the map of the layer's input.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            Of the inputs' shape, tuple in, tuple out; as in Captum an empty tensor for an input that the map cannot be
            brought to.

        Raises:
            RuntimeError, AssertionError, IndexError: as for `Saliency`.
        """
        compute = partial(
            super().attribute.__wrapped__,
            self,
            target=target,
            additional_forward_args=additional_forward_args,
            interpolate_mode=interpolate_mode,
            attribute_to_layer_input=attribute_to_layer_input,
        )
        return by_gradients(self, compute, inputs, create_graph, of_inputs=True)
