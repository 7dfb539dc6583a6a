"""Attributions of a layer, trainable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from captum._utils.typing import TargetType
from captum.attr import LayerGradCam as CaptumLayerGradCam
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_idexpo.attr._graph import depends_on_leaf, no_graph_error, require_gradients_enabled
from captum_idexpo.attr._usage import logged


class LayerGradCam(CaptumLayerGradCam):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), `captum.attr.LayerGradCam` with its true gradient.

    Same arguments and same numbers as Captum's class. With ``create_graph=True`` the channel weights keep their graph:
    a loss on the map has its second-order term in the weights, which Captum's default silently leaves out.

    Args:
        forward_func: takes the inputs and the additional arguments, returns outputs ``(B, ...)``.
        layer: the module whose output (or input) is explained.
        device_ids: for DataParallel, as in Captum.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import LayerGradCam
        >>> conv, head = torch.nn.Conv2d(1, 2, 3), torch.nn.Linear(2, 3)
        >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
        >>> map = LayerGradCam(model, conv).attribute(torch.randn(4, 1, 8, 8), target=0, create_graph=True)
        >>> map.shape
        torch.Size([4, 1, 6, 6])
        >>> map.square().sum().backward()  # reaches the head through the channel weights
        >>> bool(head.weight.grad[0].ne(0).all())
        True
    """

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """The layer's activations, weighted by the mean gradient of the target over each channel.

        Args:
            inputs: a tensor ``(B, ...)`` or a tuple of them.
            target: which output is explained, as everywhere in Captum.
            additional_forward_args: passed to the forward function after the inputs.
            attribute_to_layer_input: explain the layer's input instead of its output.
            relu_attributions: keep the positive part only, eq. (13) of ID-ExpO (arXiv 2310.12553).
            attr_dim_summation: sum over the channels; else return ``(B, C, ...)``.
            grad_kwargs: further arguments of `torch.autograd.grad`; ``{"create_graph": True}`` counts as create_graph.
            create_graph: attach the attribution to the model's graph; else it is detached.

        Returns:
            ``(B, 1, h, w)`` for a layer of ``(B, C, h, w)``, a tuple where the layer's output is one.

        Raises:
            RuntimeError: create_graph where no graph can exist; any call under `torch.inference_mode`.
            AssertionError, IndexError: as Captum, on a target that does not fit.
        """
        name = type(self).__name__
        grad_kwargs = dict(grad_kwargs or {})
        create_graph = grad_kwargs.pop("create_graph", False) or create_graph
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} takes gradients inside, which torch.inference_mode() forbids: use torch.no_grad() instead."
            )
        if create_graph:
            require_gradients_enabled(name)
        # The fused attention kernels have no double backward.
        attention = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
        with attention, self._without_gradient(attribute_to_layer_input) as made_leaves:
            attribution: Any = super().attribute.__wrapped__(
                self,
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                relu_attributions,
                attr_dim_summation,
                {**grad_kwargs, "create_graph": create_graph},
            )
        maps = attribution if isinstance(attribution, tuple) else (attribution,)
        if not create_graph:
            maps = tuple(map.detach() for map in maps)
        elif not any(depends_on_leaf(map, except_for=made_leaves) for map in maps):
            raise no_graph_error(name)
        return maps if isinstance(attribution, tuple) else maps[0]

    @contextmanager
    def _without_gradient(self, attribute_to_layer_input: bool) -> Iterator[list[Tensor]]:
        """Collects the layer's tensors that nothing trainable reaches, which Captum is about to make leaves."""
        found: list[Tensor] = []

        def collect(tensors: Any) -> None:
            tensors = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
            found.extend(t for t in tensors if isinstance(t, Tensor) and not t.requires_grad)

        if attribute_to_layer_input:
            handle = self.layer.register_forward_pre_hook(lambda _module, args: collect(args))
        else:
            handle = self.layer.register_forward_hook(lambda _module, _args, output: collect(output))
        try:
            yield found
        finally:
            handle.remove()
