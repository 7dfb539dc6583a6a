"""Baselines: what masked features are set to, as numbers or as distributions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv1d

from captum_idexpo._core.batch import Unpack, unpacked
from captum_idexpo._core.captum import BaselineType
from captum_idexpo._core.errors import InputError, InputTypeError
from captum_idexpo._core.inputs import Baseline, Tensors, as_baselines, as_batch, as_tuple
from captum_idexpo._core.rng import drawn_for, source

Axes = tuple[int, ...] | None


def mean_inputs(
    loader: Iterable[Any], *, axes: Axes | tuple[Axes, ...] = None, unpack: Unpack | None = None
) -> Tensors:
    """Return the mean of a loader's inputs, as baselines.

    Args:
        loader: yields (inputs, target), with annotations third, or `captum_idexpo.Batch`.
        axes: axes that the mean is taken over, 0 (the examples) among them; for several tensors one tuple, or None, for
            each. None: for rows ``(B, D)`` the examples, for images and volumes ``(B, C, h, w)`` the examples and the
            positions. Of three axes nothing says which one has the channels: pass ``(0, 2)`` for series ``(B, C, T)``
            and ``(0, 1)`` for ``(B, T, F)``.
        unpack: a function that returns the `captum_idexpo.Batch` of what the loader yields, as for the trainer.

    Returns:
        For each tensor its mean, with axes of size 1 in place of those that the mean is taken over: ``(1, D)`` for
        rows, ``(1, C, 1, 1)`` for images. The mean of integers or booleans has the default floating-point dtype. Token
        ids have no mean: an embedding refuses it.

    Raises:
        ValueError: the loader yields no batch; inputs of three axes without ``axes``; axes that the inputs do not have.
        TypeError: the inputs are neither tensors nor tuples of them.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import mean_inputs
        >>> mean_inputs([(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1]))])
        tensor([[2., 4.]])
    """
    sums: list[Tensor] = []
    n_examples, is_tuple = 0, False
    for batch in loader:
        inputs = unpacked(batch, unpack).inputs
        is_tuple = isinstance(inputs, tuple)
        tensors = as_tuple(inputs, "inputs")
        of_each = _axes_of_each(axes, len(tensors))
        means = [_means_per_example(tensor.double(), own) for tensor, own in zip(tensors, of_each, strict=True)]
        totals = [mean.sum(dim=0, keepdim=True) for mean in means]
        sums = [a + b for a, b in zip(sums, totals, strict=True)] if sums else totals
        n_examples += len(tensors[0])
    if not n_examples:
        raise ValueError("The loader yielded no batch to take the mean of.")
    means = [total / n_examples for total in sums]
    baselines = tuple(
        mean.to(tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype())
        for mean, tensor in zip(means, tensors, strict=True)
    )
    return baselines if is_tuple else baselines[0]


class DrawnBaselines:
    """Baselines that depend on the inputs, and may be drawn at random: a callable of the inputs.

    Made by `blurred`, `noise`, `resampled` and `mixture`. Metrics and regularizers take it as ``baselines``. To explain
    with it, call it: ``explainer.attribute(x, baselines=baselines(x))``.

    Args:
        draw: input tensors -> for each a baseline of its shape.
        generators: the random generators that it draws from, beside torch's global one. A resumed run restores them.
    """

    def __init__(
        self, draw: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], generators: Iterable[Generator | None] = ()
    ) -> None:
        self._draw = draw
        self.generators = [generator for generator in generators if generator is not None]

    def __call__(self, inputs: Tensors) -> Tensors:
        """Return a baseline of each example: a tensor of the inputs' shape, or a tuple of them."""
        with torch.no_grad():
            baselines = self._draw(as_batch(inputs))
        return baselines if isinstance(inputs, tuple) else baselines[0]


def generators_of(baselines: object) -> list[Generator]:
    """Return the random generators that baselines are drawn from."""
    return baselines.generators if isinstance(baselines, DrawnBaselines) else []


def blurred(sigma: float, *, axes: Axes | tuple[Axes, ...] = None) -> DrawnBaselines:
    """Return baselines in which each example is blurred by a Gaussian: evidence fades, and no edge of a mask appears.

    Positions outside of the example do not count, so that borders do not darken.

    Args:
        sigma: standard deviation of the Gaussian, in positions (pixels, steps).
        axes: the axes of the positions; for several tensors one tuple, or None, for each. None: for images and volumes
            ``(B, C, h, w)`` all axes after the channels. Of three axes nothing says which one has the steps: pass
            ``(2,)`` for series ``(B, C, T)`` and ``(1,)`` for ``(B, T, F)``.

    Raises:
        ValueError: sigma is not positive. When it is called: rows ``(B, D)``, which have no neighbours; inputs of three
            axes without ``axes``; axes that the inputs do not have.
        TypeError: when it is called: integers, which have no values in between.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import blurred
        >>> baselines = blurred(1.0)
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[0, 0, 2, 2] = 1
        >>> baselines(image)[0, 0, 2].round(decimals=2)
        tensor([0.0300, 0.1000, 0.1600, 0.1000, 0.0300])
    """
    _check_positive("sigma", sigma)

    def draw(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        of_each = _axes_of_each(axes, len(tensors))
        return tuple(_blurred(tensor, sigma, own) for tensor, own in zip(tensors, of_each, strict=True))

    return DrawnBaselines(draw)


def noise(std: BaselineType = 1.0, mean: BaselineType = 0.0, *, generator: Generator | None = None) -> DrawnBaselines:
    """Return baselines of Gaussian noise, drawn at each call.

    Args:
        std: standard deviation, a number or a tensor that broadcasts against the inputs (one for each channel), or a
            tuple with one for each input tensor.
        mean: likewise.
        generator: source of the noise; None: torch's global generator.

    Raises:
        TypeError: when it is called: integers, such as token ids.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import noise
        >>> noise(0.5, mean=1.0)(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def draw(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _require_floats(tensors, "noise")
        scales, centres = (as_baselines(_for_each(given, len(tensors)), tensors) for given in (std, mean))
        return tuple(
            (centre + scale * _normal(tensor, generator)).to(tensor.dtype)
            for tensor, scale, centre in zip(tensors, scales, centres, strict=True)
        )

    return DrawnBaselines(draw, [generator])


def resampled(data: Tensors | None = None, *, generator: Generator | None = None) -> DrawnBaselines:
    """Return baselines that are other examples, drawn at each call: a masked feature has a value that occurs.

    Masking by them is marginal resampling: the masked features keep their distribution and lose their relation to the
    others.

    Args:
        data: the examples to draw from, a tensor ``(N, ...)`` or a tuple of them. None: the other examples of the
            batch, each equally likely. An example's score then depends on its batch, and a last batch of one example
            is refused: pass ``data``, or ``drop_last=True`` to the loader.
        generator: source of the choice; None: torch's global generator.

    Raises:
        ValueError: when it is called: examples of another shape; a batch of one example without ``data``.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import resampled
        >>> resampled()(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 4.],
                [1., 2.]])
    """
    given = None if data is None else as_tuple(data, "data")

    def draw(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n_examples = len(tensors[0])
        if given is None and n_examples == 1:
            raise InputError(
                "resampled() takes the values of another example of the batch, and this batch has one example: pass "
                "the examples to draw from, resampled(data=train_inputs)."
            )
        share = _uniform(n_examples, tensors[0].device, generator)
        if given is None:
            others = 1 + (share * (n_examples - 1)).long()  # so many places further on, never itself
            index = (torch.arange(n_examples, device=share.device) + others) % n_examples
            return tuple(tensor[index] for tensor in tensors)
        _check_shapes(given, tensors)
        return tuple(
            rows[(share * len(rows)).long().to(rows.device)].to(tensor.device, tensor.dtype)
            for rows, tensor in zip(given, tensors, strict=True)
        )

    return DrawnBaselines(draw, [generator])


def mixture(
    *baselines: BaselineType | Callable[[Any], BaselineType],
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> DrawnBaselines:
    """Return baselines of several kinds: for each example one of them, drawn at each call.

    A model that is trained with a mixture cannot adapt to a single baseline.

    Args:
        baselines: what `captum_idexpo.metrics.insertion_deletion` takes: numbers, tensors, tuples for several input
            tensors, or callables of the inputs.
        weights: how likely each one is, up to a common factor; None: all alike.
        generator: source of the choice; None: torch's global generator.

    Raises:
        ValueError: no baselines; weights that are not one positive number for each.

    Example:
        >>> import torch
        >>> from captum_idexpo.baselines import mixture, noise, resampled
        >>> baselines = mixture(0.0, noise(0.5), resampled(), weights=(2, 1, 1))
        >>> baselines(torch.randn(8, 3, 16, 16)).shape
        torch.Size([8, 3, 16, 16])
    """
    if not baselines:
        raise InputError("mixture needs baselines to draw from, such as mixture(0.0, blurred(3.0)).")
    shares = torch.tensor([1.0] * len(baselines) if weights is None else list(weights), device="cpu")
    if shares.shape != (len(baselines),) or not bool(((shares > 0) & shares.isfinite()).all()):
        raise InputError(f"weights must be one positive number for each of the {len(baselines)} baselines: {weights}.")
    bounds = (shares.cumsum(0) / shares.sum())[:-1]

    def draw(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        share = _uniform(len(tensors[0]), tensors[0].device, generator)
        index = torch.bucketize(share, bounds.to(share.device), right=True)
        given = tensors if len(tensors) > 1 else tensors[0]
        kinds = [as_baselines(kind(given) if callable(kind) else kind, tensors) for kind in baselines]
        return tuple(_chosen(tensor, [kind[number] for kind in kinds], index) for number, tensor in enumerate(tensors))

    return DrawnBaselines(draw, [generator, *(each for kind in baselines for each in generators_of(kind))])


def _axes_of_each(axes: Axes | tuple[Axes, ...], n_tensors: int) -> tuple[Axes, ...]:
    if axes is None:
        return (None,) * n_tensors
    if isinstance(axes, int):
        raise InputError(f"axes must be a tuple, given: {axes}. Example: axes=(0, {axes}).")
    flat = all(isinstance(axis, int) for axis in axes)
    if n_tensors == 1 and flat:
        return (cast(Axes, axes),)
    if flat or len(axes) != n_tensors:
        raise InputError(f"axes={axes} for {n_tensors} input tensors: give one tuple of axes, or None, for each.")
    return cast(tuple[Axes, ...], axes)


def _means_per_example(tensor: Tensor, axes: Axes) -> Tensor:
    if axes is None:
        if tensor.dim() == 3 and 1 not in tensor.shape[1:]:
            raise InputError(
                f"The axes of inputs of shape {tuple(tensor.shape)} cannot be told apart, so their mean may mix unlike "
                "columns. Say over which axes it is taken: mean_inputs(loader, axes=(0, 1)) for (B, T, F), axes=(0, 2) "
                "for (B, C, T); pass the result as baselines."
            )
        axes = (0, *range(2, tensor.dim())) if tensor.dim() != 3 or tensor.shape[1] == 1 else (0, 1)
    if 0 not in axes or not all(0 <= axis < tensor.dim() for axis in axes):
        raise InputError(
            f"axes must be those of the inputs {tuple(tensor.shape)} that the mean is taken over, 0 among them; given: "
            f"{axes}."
        )
    others = tuple(axis for axis in axes if axis)
    return tensor.mean(dim=others, keepdim=True) if others else tensor


def _chosen(tensor: Tensor, kinds: list[Baseline], index: Tensor) -> Tensor:
    """Return for each example the baseline of the kind with its number."""
    result = torch.empty_like(tensor)
    for number, kind in enumerate(kinds):
        if not tensor.is_floating_point() and _is_fractional(kind):
            raise InputTypeError(f"mixture was given fractions for inputs of {tensor.dtype}: give whole numbers.")
        rows = (index == number).view(-1, *[1] * (tensor.dim() - 1))
        result = torch.where(rows, torch.as_tensor(kind, device=tensor.device).to(tensor.dtype), result)
    return result


def _is_fractional(value: Baseline) -> bool:
    numbers = torch.as_tensor(value)
    return numbers.is_floating_point() and bool((numbers != numbers.round()).any())


def _normal(tensor: Tensor, generator: Generator | None) -> Tensor:
    at, shape = source(tensor.device, generator), tensor.shape[1:]
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    draw = functools.partial(torch.randn, generator=generator, device=at, dtype=dtype)
    return drawn_for(len(tensor), lambda n: draw(n, *shape)).to(tensor.device)


def _uniform(n_examples: int, device: torch.device, generator: Generator | None) -> Tensor:
    """Return a number in [0, 1) for each example."""
    at = source(device, generator)
    return drawn_for(n_examples, lambda n: torch.rand(n, generator=generator, device=at)).to(device)


def _blurred(tensor: Tensor, sigma: float, axes: Axes) -> Tensor:
    _require_floats((tensor,), "blurred")
    if axes is None:
        if tensor.dim() < 4:
            raise InputError(
                f"blurred(sigma) does not know the positions of inputs of shape {tuple(tensor.shape)}: pass axes=(2,) "
                "for series (B, C, T), axes=(1,) for (B, T, F). Rows (B, D) have no neighbours: take resampled()."
            )
        axes = tuple(range(2, tensor.dim()))
    if not all(0 < axis < tensor.dim() for axis in axes):
        raise InputError(f"axes must be those of the positions of {tuple(tensor.shape)}, 1 or more; given: {axes}.")
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=tensor.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2)).to(torch.promote_types(tensor.dtype, torch.float32))
    result = tensor.to(kernel.dtype)
    for axis in axes:
        rows = result.movedim(axis, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        inside = conv1d(torch.ones_like(flat[:1]), kernel[None, None], padding=radius)
        result = (conv1d(flat, kernel[None, None], padding=radius) / inside).view(rows.shape).movedim(-1, axis)
    return result.to(tensor.dtype).contiguous()


def _for_each(given: BaselineType, n_tensors: int) -> BaselineType:
    return given if isinstance(given, tuple) else (given,) * n_tensors


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{name} must be a positive number, given: {value!r}.")


def _check_shapes(data: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
    shapes, needed = [tuple(rows.shape[1:]) for rows in data], [tuple(tensor.shape[1:]) for tensor in tensors]
    if shapes != needed or len({len(rows) for rows in data}) != 1:
        given = [tuple(rows.shape) for rows in data]
        raise InputError(f"resampled(data) of shapes {given} has no examples of the inputs' shapes {needed}.")
    for rows, tensor in zip(data, tensors, strict=True):
        if rows.is_floating_point() and not tensor.is_floating_point():
            raise InputTypeError(
                f"resampled(data) of {rows.dtype} would lose its fractions, since the inputs are {tensor.dtype}: pass "
                "data of the inputs' dtype."
            )


def _require_floats(tensors: tuple[Tensor, ...], name: str) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise InputTypeError(
                f"{name} needs floating-point inputs, given: {tensor.dtype}. Explain embeddings in place of token ids, "
                "or take resampled(), which keeps integers."
            )
