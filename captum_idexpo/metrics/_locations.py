"""Locations: the pixels, elements or feature-mask groups that an attribution ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_idexpo._core.features import FeatureLayout
from captum_idexpo._core.inputs import as_tuple

NOTICEABLE = 0.05
"""Share of a batch's examples from which on maps that say nothing are reported: a single one among many is no news."""


@dataclass(frozen=True)
class Locations:
    """The D locations of a batch and their attributions.

    Attributes:
        layout: positions of the locations in the inputs.
        values: attributions ``(B, D)``.
        present: ``(B, D)``, False where an example does not have the location (a group of the feature mask that occurs
            in other examples only). None: every example has all locations.
    """

    layout: FeatureLayout
    values: Tensor
    present: Tensor | None

    @classmethod
    def of(
        cls,
        attributions: object,
        inputs: tuple[Tensor, ...],
        groups: FeatureLayout | None,
        group_reduction: Literal["mean", "sum"] = "mean",
    ) -> Locations:
        """Return the groups of a feature mask as locations; without a mask, the positions of the attributions.

        Raises:
            ValueError: an attribution's shape fits neither the inputs nor their locations; an unknown reduction.
            TypeError: the attributions are not floating-point tensors.
        """
        check_group_reduction(group_reduction)
        maps = as_tuple(attributions, "attributions")
        if len(maps) != len(inputs):
            raise ValueError(f"There are {len(maps)} attributions for {len(inputs)} input tensors: give one a tensor.")
        # In single precision at least: sums of halves overflow.
        maps = tuple(_aligned(map, tensor) for map, tensor in zip(maps, inputs, strict=True))
        maps = tuple(map.to(torch.promote_types(map.dtype, torch.float32)) for map in maps)
        if groups is None:
            layout = FeatureLayout.of_positions([map.shape[1:] for map in maps])
            return cls(layout, layout.sums(maps), None)
        # Mask and map may each have one channel or all channels: expand both to a common shape, then average. The sum
        # is in double precision, since a GPU adds in no fixed order and rounding must not change ranks.
        wide = maps if inputs[0].device.type == "mps" else [map.double() for map in maps]
        spread = [
            map.expand(torch.broadcast_shapes(map.shape, (1, *shape)))
            for map, shape in zip(wide, groups.shapes, strict=True)
        ]
        values = groups.sums(spread)
        if group_reduction == "mean":
            values = values / groups.sums([torch.ones_like(map) for map in spread]).clamp_min(1)
        values = values.to(maps[0].dtype)
        present = groups.present()
        return cls(groups, values, present if present is None else present.expand(values.shape))

    @property
    def counts(self) -> Tensor:
        """Number of locations per example, on the CPU: ``(B,)``, or ``(1,)`` if all examples have equally many."""
        if self.present is None:
            return torch.tensor([self.values.shape[1]], device="cpu")
        counts = self.present.sum(dim=1).cpu()
        return counts[:1] if bool((counts == counts[0]).all()) else counts


def constant_maps_message(values: Tensor, present: Tensor | None = None, *, counted: bool = True) -> str | None:
    """Return a warning if a noticeable share of the maps ``(B, D)`` ranks no location, else None.

    Without the counts the text is the same for each batch, so that Python shows it once per line of code.
    """
    lowest = values if present is None else values.masked_fill(~present, torch.inf)
    highest = values if present is None else values.masked_fill(~present, -torch.inf)
    counts = values.shape[1] if present is None else present.sum(dim=1)
    constant = (lowest.amin(dim=1) == highest.amax(dim=1)) & torch.as_tensor(counts > 1, device=values.device)
    n_constant = int(constant.sum())
    if not n_constant or n_constant < NOTICEABLE * len(values):
        return None
    level = "one value" if bool(values[constant].any()) else "0"
    which = f"{n_constant} of {len(values)} examples" if counted else "some examples"
    return (
        f"The attribution of {which} is {level} everywhere, so it ranks no location. "
        "Causes: the output does not depend on what is explained, as in a network whose last layer is still 0 (timm's "
        "new heads), or behind the last block of a vision transformer, where only the class token is read (take "
        "blocks[-1].norm1); Grad-CAM's ReLU has removed evidence that is all negative (relu_attributions=False keeps "
        "it); Lime's Lasso has set all coefficients to 0 (id_expo_lime has another surrogate). "
        "A small share of such maps does no harm."
    )


def check_group_reduction(group_reduction: Literal["mean", "sum"]) -> Literal["mean", "sum"]:
    """Return a reduction; ValueError for an unknown one."""
    if group_reduction not in ("mean", "sum"):
        raise ValueError(f"group_reduction must be 'mean' or 'sum', given: {group_reduction!r}.")
    return group_reduction


def groups_of(feature_mask: object, inputs: tuple[Tensor, ...]) -> FeatureLayout | None:
    """Return the groups of a feature mask; None without a mask. It raises the errors of `FeatureLayout.of_mask`."""
    return None if feature_mask is None else FeatureLayout.of_mask(feature_mask, inputs)


def _aligned(map: Tensor, tensor: Tensor) -> Tensor:
    """Return an attribution with as many axes as its input: of the input's shape, or with one channel.

    A series ``(B, T, F)`` may also have one value per step, ``(B, T, 1)``.
    """
    if not map.is_floating_point():
        raise TypeError(f"attributions must be floating point, given: {map.dtype}.")
    if map.device != tensor.device:
        raise ValueError(f"attributions lie on {map.device}, the inputs on {tensor.device}: move one of them.")
    per_location = (*tensor.shape[:1], 1, *tensor.shape[2:]) if tensor.dim() > 2 else None
    per_step = (*tensor.shape[:2], 1) if tensor.dim() == 3 else None
    if map.shape in (tensor.shape, per_location, per_step):
        return map
    if per_location is not None and map.shape == (*tensor.shape[:1], *tensor.shape[2:]):
        return map.unsqueeze(1)
    fitting = [tuple(tensor.shape)] + ([per_location, (*tensor.shape[:1], *tensor.shape[2:])] if per_location else [])
    raise ValueError(
        f"Attributions of shape {tuple(map.shape)} fit neither the input of shape {tuple(tensor.shape)} nor its "
        f"locations: give {' or '.join(str(shape) for shape in fitting)} (a layer's map is brought to the input's size "
        "by captum.attr.LayerAttribution.interpolate)."
    )
