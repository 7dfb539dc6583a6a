r"""Saliency-guided training: features that do not matter may be anything (Ismail, Corrada Bravo, Feizi 2021).

.. math::

    \Omega = \operatorname{mean}_x \operatorname{KL}\big(p(x) \,\|\, p(\tilde x)\big)

where :math:`\tilde x` is x with its features of least gradient replaced by random values of their range
(arXiv 2111.14338).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from captum_idexpo._core.batch import Batch
from captum_idexpo._core.forward import BatchForward
from captum_idexpo._core.inputs import as_batch, require_real
from captum_idexpo._core.modes import no_graph
from captum_idexpo._core.rng import drawn_for, source
from captum_idexpo._core.targets import Outputs
from captum_idexpo.attr import Saliency
from captum_idexpo.metrics._scoring import is_raw, log_probabilities
from captum_idexpo.regularizers.base import Penalty, Weight


class SaliencyGuided(Penalty):
    """Penalises a change of the prediction when the features of least gradient are replaced (Ismail et al. 2021).

    The features are chosen by the gradient of the target's output, which is not trained through, as in the paper. The
    gradient reaches the weights through both predictions. The term is named "saliency_guided".

    Args:
        forward_func: the function that is trained: a module, or a callable of the input tensors.
        model: the module that is held in eval mode; None: the forward function, if it is a module or the method of one.
        weight: of the term (the paper: 1), or "auto": ``ratio`` times the task loss at the start.
        fraction: share of the features that is replaced (the paper: 0.5 for images).
        value_range: (lowest, highest) of the random values, numbers or tensors that broadcast against one example;
            None: each feature's range in the batch, for images ``(B, C, H, W)`` each channel's.
        ratio: of the term to the task loss, for an automatic weight.
        target_transform: a function of the loader's target that returns the target of the gradient, see `Regularizer`.
        outputs: what the model returns: "logits", "log_probabilities", "probabilities" or "multilabel" (the divergences
            of all labels are added).
        eval_mode: evaluate in eval mode (BatchNorm, dropout).
        generator: source of the random values; None: torch's global generator.

    Raises:
        ValueError: an argument out of range; raw outputs, which have no distribution.

    Example:
        >>> import torch
        >>> from captum_idexpo.regularizers import SaliencyGuided
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> regularizer = SaliencyGuided(model, fraction=0.5)
        >>> terms = regularizer(torch.randn(5, 4), torch.randint(3, (5,)))
        >>> bool(terms["saliency_guided"] >= 0)
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        model: nn.Module | None = None,
        weight: Weight = 1.0,
        fraction: float = 0.5,
        value_range: tuple[Any, Any] | None = None,
        ratio: float = 1.0,
        target_transform: Callable[[Any], Any] | None = None,
        outputs: Outputs = "logits",
        eval_mode: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(
            "saliency_guided",
            forward_func,
            model=model,
            weight=weight,
            ratio=ratio,
            outputs=outputs,
            eval_mode=eval_mode,
            explainer=Saliency(forward_func),
            target_transform=target_transform,
            generator=generator,
        )
        if is_raw(outputs):
            raise ValueError("Saliency-guided training compares distributions over classes: raw outputs have none.")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, given: {fraction}.")
        self.fraction = fraction
        self.value_range = value_range

    @property
    def needs_second_derivative(self) -> bool:
        """False: the gradient that chooses the features is not trained through."""
        return False

    def penalty(self, batch: Batch) -> Tensor:
        """Return KL(p(x) || p(x~)), averaged over the batch."""
        tensors = as_batch(batch.inputs)
        require_real(tensors)
        explained, side = self.explained(batch), batch.additional_forward_args
        with no_graph():  # the choice of the features is not trained through
            gradients = self.explain(batch, explained)
        forward = BatchForward(self.forward_func, side, len(tensors[0]))
        plain = tuple(tensor.clone() for tensor in tensors)  # the model may write into its input
        log_p = log_probabilities(forward(plain), self.outputs)
        log_q = log_probabilities(forward(self._replaced(tensors, gradients)), self.outputs)
        divergences = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        return (divergences if explained.contributes is None else explained.contributes * divergences).mean()

    def _replaced(self, tensors: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the inputs with random values in place of the features of least gradient."""
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
        n_replaced = math.floor(self.fraction * flat.shape[1] + 1e-9)
        least = flat.argsort(dim=1, stable=True)[:, :n_replaced]
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, least, True)
        sizes = [gradient[0].numel() for gradient in gradients]
        return tuple(
            torch.where(part.reshape(tensor.shape), self._random(tensor), tensor)
            for part, tensor in zip(chosen.split(sizes, dim=1), tensors, strict=True)
        )

    def _random(self, tensor: Tensor) -> Tensor:
        if self.value_range is None:
            axes = (0, *range(2, tensor.dim())) if tensor.dim() > 3 else (0,)
            low, high = tensor.detach().amin(axes, keepdim=True), tensor.detach().amax(axes, keepdim=True)
        else:
            low, high = (torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device) for value in self.value_range)
        shape, at = tensor.shape[1:], source(tensor.device, self.generator)
        uniform = drawn_for(
            len(tensor), lambda n: torch.rand(n, *shape, generator=self.generator, dtype=tensor.dtype, device=at)
        )
        return low + (high - low) * uniform.to(tensor.device)
