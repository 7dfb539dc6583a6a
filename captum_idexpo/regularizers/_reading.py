"""Does a model read masked inputs? LIME, KernelSHAP and Shapley values explain its answers to masked copies."""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH_COPIES = 64
"""Masked copies of a small batch, so that its few examples say as much as they can."""

_FEW_EXAMPLES, _ENOUGH_EXAMPLES = 8, 256
"""Nothing is said of fewer examples; after so many the question is left open."""

_READS = 0.25
"""Agreement beyond chance from which on a model reads masks. Measured with half of the features masked: 0.10 for a
ResNet-20 on CIFAR-10 whose accuracy falls from .91 to .19, 0.13 for a network on 100 plants (.61 to .13); 0.26 to 0.43
for a CNN on digits, 0.47 for a ResNet-18 on Imagenette, 0.34 to 0.67 for networks on four other tables."""

_MOSTLY_KEPT = 2 / 3
"""Where so many predictions stay the same, masks do little harm, even if chance alone would explain it: one class may
be far more frequent than the others. Of several labels most are false anyway, so they are judged by chance alone."""

_ONE_CLASS = 0.1
"""Up to this probability that two examples are decided differently (summed over labels), a batch counts as one of a
single class."""


class MaskReading:
    """The agreement of predictions on masked and on unmasked examples, beyond chance (Cohen's kappa).

    It is 1 where every masked copy is classified as the unmasked example, and 0 where the masked copies are classified
    without regard to the example, as by a model that answers all of them with one class.

    Attributes:
        is_settled: True when there is nothing more to measure.
    """

    def __init__(self) -> None:
        self.is_settled = False
        self._plain: list[Tensor] = []
        self._masked: list[Tensor] = []

    @staticmethod
    def n_copies(n_examples: int) -> int:
        """Return how many masked copies of each example of a batch to evaluate."""
        return max(1, _ENOUGH_COPIES // n_examples)

    def add(self, plain: Tensor, masked: Tensor) -> str | None:
        """Add predictions, and return a warning as soon as it is clear that the model does not read masks.

        Args:
            plain: predicted classes ``(B,)``, or which labels are predicted ``(B, L)``.
            masked: the same for masked copies, ``(B, n, ...)``.
        """
        self._plain.append(plain.long().cpu())
        self._masked.append(masked.long().cpu())
        agreement, plain_shares, masked_shares = self._statistics()
        # Where nearly all examples are of one class, agreement says nothing: it is that of chance.
        is_varied = float((1 - plain_shares.mean(0).square().sum(-1)).sum()) > _ONE_CLASS
        if len(agreement) < _FEW_EXAMPLES or not is_varied:
            self.is_settled = len(agreement) >= _ENOUGH_EXAMPLES
            return None
        kappa, error = _kappa_with_error(agreement, plain_shares, masked_shares)
        self.is_settled = len(agreement) >= _ENOUGH_EXAMPLES or abs(kappa - _READS) > 2 * error
        kept = float(agreement.mean())
        has_one_decision = plain_shares.shape[1] == 1
        if kappa + 2 * error >= _READS or (has_one_decision and kept > _MOSTLY_KEPT):
            return None
        return (
            f"With half of the features masked at random, the prediction stays the same for only {kept:.0%} of the "
            f"copies (by chance: {float(_chance(plain_shares.mean(0), masked_shares.mean(0))):.0%}). The model cannot "
            "read masked inputs, so an explainer that masks features explains arbitrary answers. Train the model on "
            "masks first, or at the same time: captum_idexpo.regularizers.RandomMasking(model, baselines=..., "
            "feature_mask=...). Or choose baselines that the model reads (captum_idexpo.baselines)."
        )

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each example the agreement ``(N,)``, and its decisions ``(N, K, C)`` without and with masks.

        Decisions are shares of the copies. There is one decision (K = 1) of C classes, or one for each label.
        """
        # Only the classes that occur are counted: a model may have very many.
        classes = torch.cat([each.flatten() for each in (*self._plain, *self._masked)]).unique()
        agreements, plains, maskeds = [], [], []
        for plain, masked in zip(self._plain, self._masked, strict=True):
            hot = (plain.reshape(len(plain), 1, -1, 1) == classes).double()
            hot_masked = (masked.reshape(*masked.shape[:2], -1, 1) == classes).double()
            agreements.append((hot * hot_masked).sum(3).mean((1, 2)))
            plains.append(hot[:, 0])
            maskeds.append(hot_masked.mean(1))
        return torch.cat(agreements), torch.cat(plains), torch.cat(maskeds)


def _chance(plain: Tensor, masked: Tensor) -> Tensor:
    """Return the agreement of independent decisions with these frequencies ``(..., K, C)``."""
    return (plain * masked).sum(-1).mean(-1)


def _kappa(agreement: Tensor, plain: Tensor, masked: Tensor) -> Tensor:
    """Return (agreement - chance) / (1 - chance); 1 where chance leaves nothing to be seen."""
    chance = _chance(plain, masked)
    return torch.where(chance < 1 - 1e-9, (agreement - chance) / (1 - chance).clamp_min(1e-9), 1.0)


def _kappa_with_error(agreement: Tensor, plain: Tensor, masked: Tensor) -> tuple[float, float]:
    """Return kappa and its standard error, by the jackknife over examples."""
    n = len(agreement)
    without = [(each.sum(0) - each) / (n - 1) for each in (agreement, plain, masked)]
    left_out = _kappa(*without)
    error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt()
    return float(_kappa(agreement.mean(0), plain.mean(0), masked.mean(0))), float(error)
