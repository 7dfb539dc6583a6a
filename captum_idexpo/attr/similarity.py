"""Similarities: the weights of perturbed copies in LIME's surrogate, for a whole batch of masks at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_idexpo._core.captum import get_exp_kernel_similarity_function
from captum_idexpo._core.features import FeatureLayout, as_numbers
from captum_idexpo.attr.surrogates import apply_each


@dataclass(frozen=True)
class MaskSimilarity:
    r"""Similarity of a mask z to the mask of ones, :math:`\exp(-d^2 / 2 \sigma^2)` with d their cosine distance.

    This is the kernel(1, z) of eq. (12) in ID-ExpO (arXiv 2310.12553). It depends only on the masks. Captum's default
    depends on the perturbed inputs. Captum's Lime also accepts this class as ``similarity_func``.

    Args:
        kernel_width: the width :math:`\sigma`; the original LIME uses 0.25 for images.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import MaskSimilarity
        >>> MaskSimilarity(kernel_width=0.5).weights(torch.tensor([[[1, 1, 1, 1], [1, 0, 0, 0]]]))
        tensor([[1.0000, 0.6065]])
    """

    kernel_width: float = 0.25

    def weights(self, masks: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the weights ``(..., M)`` of masks ``(..., M, D)``, in the dtype of float masks, else in float32.

        Args:
            masks: zeros and ones.
            present: booleans ``(..., 1, D)``, False for features that an example does not have, which do not count.
        """
        masks = masks if masks.is_floating_point() else as_numbers(masks, torch.float32)
        share = masks.mean(dim=-1) if present is None else (masks * present).sum(dim=-1) / present.sum(dim=-1)
        cosine = share.sqrt()  # the cosine of a binary z and the vector of ones
        return torch.exp(-((1 - cosine) ** 2) / (2 * self.kernel_width**2))

    def __call__(self, _original: object, _perturbed: object, interpretable: Tensor, **_: Any) -> Tensor:
        """Return the weight of one sample, with the signature that Captum calls."""
        return self.weights(interpretable)


@dataclass(frozen=True)
class InputKernel:
    """Captum's exponential kernel on the distance between an input and its perturbed copy.

    It does not make the masked copies. The distance follows from the masks and the sums of x.x, x.b and b.b over each
    feature, where x is the input and b the baseline.
    """

    distance_mode: str
    kernel_width: float

    @classmethod
    def of(cls, similarity_func: Any) -> InputKernel | None:
        """Return the kernel for a function made by Captum's `get_exp_kernel_similarity_function`; None for others."""
        if getattr(similarity_func, "__qualname__", "") != _CAPTUM_KERNEL:
            return None
        cells = zip(similarity_func.__code__.co_freevars, similarity_func.__closure__ or (), strict=True)
        settings = {name: cell.cell_contents for name, cell in cells}
        mode, width = settings.get("distance_mode"), settings.get("kernel_width")
        return cls(mode, width) if mode in ("cosine", "euclidean") and width is not None else None

    def weights(
        self,
        masks: Tensor,
        layout: FeatureLayout,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        joint: bool = False,
    ) -> Tensor:
        """Return the weights ``(B, M)`` of masks ``(B or 1, M, D)``, in float64 for float64 inputs, else in float32.

        With ``joint`` the whole batch counts as one example, and the weights are ``(1, M)``.
        """
        dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        x = [tensor.to(dtype) for tensor in inputs]
        zero = all(not isinstance(baseline, Tensor) and baseline == 0 for baseline in baselines)
        b = [] if zero else _expanded(baselines, x)
        kept = as_numbers(masks if masks.dtype == torch.bool else masks != 0, dtype)

        def feature_sums(left: list[Tensor], right: list[Tensor]) -> Tensor:
            sums = layout.sums([p * q for p, q in zip(left, right, strict=True)])
            return sums.sum(dim=0, keepdim=True) if joint else sums

        if self.distance_mode == "euclidean":
            difference = x if zero else [p - q for p, q in zip(x, b, strict=True)]
            squared = feature_sums(difference, difference)
            squared_distance = apply_each(1 - kept, squared)
        else:
            # Inner products of the copy with the input and with itself: those of the baseline plus the change from
            # each kept feature.
            xx = feature_sums(x, x)
            if zero:
                product = of_copy = apply_each(kept, xx)
            else:
                xb, bb = feature_sums(x, b), feature_sums(b, b)
                product = xb.sum(dim=1, keepdim=True) + apply_each(kept, xx - xb)
                of_copy = bb.sum(dim=1, keepdim=True) + apply_each(kept, xx - bb)
            # The clamp comes before the square root, because the gradient of the root at 0 is infinite.
            norms = xx.sum(dim=1, keepdim=True).clamp_min(_EPS**2).sqrt() * of_copy.clamp_min(_EPS**2).sqrt()
            squared_distance = (1 - product / norms) ** 2
        return torch.exp(-squared_distance / (2 * self.kernel_width**2))


def _expanded(baselines: tuple[Any, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Return the baselines in the shapes and dtypes of the tensors."""
    return [
        (baseline.to(tensor.dtype) if isinstance(baseline, Tensor) else tensor.new_tensor(baseline)).expand_as(tensor)
        for baseline, tensor in zip(baselines, tensors, strict=True)
    ]


_CAPTUM_KERNEL = get_exp_kernel_similarity_function().__qualname__
_EPS = 1e-8  # torch's cosine similarity divides by norms of at least this
