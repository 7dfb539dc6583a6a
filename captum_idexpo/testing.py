"""Checks for tests of your own attributions, regularizers and models.

`assert_trainable` compares the gradient of an attribution with finite differences. An attribution that requires grad
can still have the wrong gradient: autograd may treat part of its computation as constant. `assert_complete` and
`assert_rows_independent` check values, not gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from captum_idexpo._core.captum import BaselineType
from captum_idexpo._core.errors import InputError
from captum_idexpo._core.inputs import check_inputs
from captum_idexpo._core.modes import Snapshot
from captum_idexpo._core.rng import seeded

_STEPS = (1e-5, 1e-6, 1e-7)
"""Steps of the central differences, relative to a parameter's size. A smaller step may avoid a kink nearby."""
_EPS = 2 * torch.finfo(torch.float64).eps
_NEGLIGIBLE = 1e-3
"""The error of a derivative below this share of the largest one is relative to that share."""


class _Derivative(NamedTuple):
    """Derivative of the loss along a direction in one parameter, by autograd and by finite differences."""

    parameter: str
    claimed: float | None
    measured: tuple[float, ...]

    def error(self, scale: float, loss: float) -> float:
        """Return the relative error against the nearest finite difference, less the rounding error of the loss."""
        claimed = self.claimed or 0.0
        noises = (_EPS * loss / step for step in _STEPS)
        return min(
            max(0.0, abs(claimed - value) - noise) / max(abs(value), _NEGLIGIBLE * scale)
            for value, noise in zip(self.measured, noises, strict=True)
        )


def assert_trainable(
    attribute: Callable[[], Any],
    model: nn.Module,
    *,
    rtol: float = 1e-5,
    n_directions: int = 2,
    seed: int = 0,
) -> None:
    """Check that a loss on an attribution has the correct gradient with respect to the model's weights.

    The loss is a random projection of the attribution plus its squares. Its gradient by autograd is compared with
    central differences along random directions in each parameter that requires gradient. Afterwards the parameters,
    their ``grad``, the model's buffers and the global random state are unchanged.

    Args:
        attribute: takes no arguments and returns an attribution in double precision, a tensor or tuples and lists of
            them: ``lambda: Saliency(model).attribute(x, target=0, create_graph=True)``. It is called many times, always
            with the same global seeds; it has to seed its own generators. It may also return a regularizer's terms.
            Those of soft insertion and deletion fail, since no gradient flows through their temperature and
            thresholds: check the explainer instead.
        model: owns the parameters, in double precision. Finite differences are meaningless near the kinks of ReLU:
            prefer smooth activations, or inputs away from the kinks. LIME's default surrogate stops at its tolerance,
            short of the minimum that its gradient belongs to: pass ``Lasso(tol=1e-12)``, or another surrogate.
        rtol: tolerated relative error of a directional derivative. For derivatives below a thousandth of the largest
            one, the error is relative to that thousandth.
        n_directions: random directions per parameter.
        seed: seed of the directions, of the projection, and of torch's and NumPy's global generators at each call.

    Raises:
        AssertionError: there is no graph, or the gradient is wrong (the message says by how much and in which
            parameter), or no parameter changes the attribution, so that nothing can be checked.
        TypeError: something is not in double precision.
        ValueError: n_directions is below 1.

    Example:
        >>> import torch, captum.attr
        >>> from captum_idexpo.attr import InputXGradient
        >>> from captum_idexpo.testing import assert_trainable
        >>> layers = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)]
        >>> model, x = torch.nn.Sequential(*layers).double(), torch.randn(5, 3, dtype=torch.float64)
        >>> assert_trainable(lambda: InputXGradient(model).attribute(x, target=1, create_graph=True), model)

        Captum's own attribution also requires gradient, but the check fails:

        >>> assert_trainable(lambda: captum.attr.InputXGradient(model).attribute(x.requires_grad_(), target=1), model)
        Traceback (most recent call last):
            ...
        AssertionError: The attribution has no graph into the parameters...
    """
    if n_directions < 1:
        raise ValueError(f"n_directions must be at least 1, given: {n_directions}: nothing would be checked.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_parameters(parameters)
    device, before = next(iter(parameters.values())).device, Snapshot(model)

    def loss() -> Tensor:
        with seeded(seed, device):
            total = _loss(attribute(), seed)
        before.restore()
        return total

    total = loss()
    gradients = _gradients(total, parameters)
    derivatives = []
    generator = Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        for _ in range(n_directions):
            direction = _direction(parameter, generator)
            gradient = gradients[name]
            claimed = None if gradient is None else float((gradient * direction).sum())
            measured = tuple(_difference(loss, parameter, direction, step) for step in _STEPS)
            derivatives.append(_Derivative(name, claimed, measured))
    _judge(derivatives, rtol, abs(float(total.detach())))


def assert_complete(
    attribute: Callable[[], Any],
    forward_func: Callable[..., Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    baselines: BaselineType = None,
    *,
    rtol: float = 1e-5,
) -> None:
    """Check that attributions add up to the output on the inputs minus the output on the baselines.

    Completeness (Sundararajan et al. 2017, arXiv 1703.01365) holds for integrated gradients, DeepLIFT without softmax,
    Shapley values, KernelSHAP, and the layer forms of the first two.

    Args:
        attribute: takes no arguments and returns an attribution of the inputs or of a layer: a tensor ``(B, ...)``, or
            tuples and lists of them.
        forward_func: takes the inputs and returns the explained output, one number per example, ``(B,)``.
        inputs: a tensor ``(B, ...)`` or a tuple of them.
        baselines: None (zero), numbers, or tensors that broadcast to the inputs.
        rtol: tolerated error, relative to the largest difference of outputs in the batch. Integrated gradients need
            ``n_steps`` to match.

    Raises:
        AssertionError: the attributions do not add up. The message says for how many examples, and names the worst one.
        ValueError: the output is not one number per example, or the baselines do not fit.

    Example:
        >>> import torch
        >>> from captum_idexpo.attr import IntegratedGradients, Saliency
        >>> from captum_idexpo.testing import assert_complete
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> assert_complete(lambda: IntegratedGradients(model).attribute(x, target=1), lambda x: model(x)[:, 1], x)
        >>> assert_complete(lambda: Saliency(model).attribute(x, target=1), lambda x: model(x)[:, 1], x)
        Traceback (most recent call last):
            ...
        AssertionError: The attributions of 5 of 5 examples do not add up...
    """
    tensors, aligned = check_inputs(inputs, baselines, check_finite=False)
    plain = tuple(tensor.clone() for tensor in tensors)
    empty = tuple(
        torch.as_tensor(baseline, device=tensor.device).to(tensor.dtype).expand_as(tensor).clone()
        for baseline, tensor in zip(aligned, tensors, strict=True)
    )
    with torch.no_grad():
        differences = _one_per_example(forward_func(*plain)) - _one_per_example(forward_func(*empty))
    parts = [tensor.detach().to(differences.dtype).flatten(1).sum(dim=1) for tensor in _tensors(attribute())]
    sums = torch.stack(parts).sum(dim=0)
    if sums.shape != differences.shape:
        raise InputError(
            f"The attribution has {len(sums)} rows and the output {len(differences)}: both need one per example."
        )
    errors = (sums - differences).abs()
    scale = float(differences.abs().max())
    wrong = ~(errors <= rtol * scale)
    if bool(wrong.any()):
        worst = int(errors.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"The attributions of {int(wrong.sum())} of {len(errors)} examples do not add up to the outputs' "
            f"differences. The worst is example {worst}: the sum is {float(sums[worst]):.6g}, the difference "
            f"{float(differences[worst]):.6g} (tolerance {rtol:g} of {scale:.6g})."
        )


def _one_per_example(output: Tensor) -> Tensor:
    if not output.dim() or output[0].numel() != 1:
        raise InputError(
            f"forward_func must return one number per example, the explained output; given: {tuple(output.shape)}. "
            "Choose the class in it: lambda x: model(x)[:, target]."
        )
    return output.flatten()


def assert_rows_independent(
    forward_func: Callable[..., Any], inputs: Tensor | tuple[Tensor, ...], *, rtol: float = 1e-5
) -> None:
    """Check that a row's output is the same alone and in any batch.

    LIME, KernelSHAP, the metrics and the regularizers mask each row of a forward pass differently. They need a model
    whose rows are independent. To check an explainer, pass ``lambda x: explainer.attribute(x, target=1)``.

    Args:
        forward_func: takes the inputs and returns one row per example: a tensor, or tuples and lists of them.
        inputs: a tensor ``(B, ...)`` or a tuple of them, with at least two examples that differ.
        rtol: tolerated error, relative to the largest output.

    Raises:
        AssertionError: a row's output depends on the other rows. The message says which row, and by how much.
        ValueError: there are fewer than two examples, or the output does not have one row per example.

    Example:
        >>> import torch
        >>> from captum_idexpo.testing import assert_rows_independent
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> assert_rows_independent(model, x)
        >>> assert_rows_independent(lambda x: model(x - x.mean(dim=0)), x)
        Traceback (most recent call last):
            ...
        AssertionError: The output of row 0 depends on the other rows...
    """
    tensors, _ = check_inputs(inputs, None, check_finite=False)
    n_examples = len(tensors[0])
    if n_examples < 2:
        raise InputError("Give at least two examples that differ: nothing would be checked.")
    every_row = list(range(n_examples))
    batches = [[row] for row in every_row] + [every_row[::-1], every_row[: n_examples // 2] * 2, [0, *every_row]]
    whole = _rows_of(forward_func, tensors, every_row)
    scale = max(float(output.abs().max()) for output in whole)
    for rows in batches:
        for some, output in zip(_rows_of(forward_func, tensors, rows), whole, strict=True):
            errors = (some - output[rows]).abs().flatten(1).amax(dim=1)
            wrong = (~(errors <= rtol * scale)).nonzero().flatten().tolist()
            if wrong:
                row = rows[wrong[0]]
                raise AssertionError(
                    f"The output of row {row} depends on the other rows: in a batch of rows {rows[:8]} it differs by "
                    f"{float(errors[wrong[0]]):.3g} from that in the whole batch (the largest output is {scale:.3g})."
                )


def _rows_of(forward_func: Callable[..., Any], tensors: tuple[Tensor, ...], rows: list[int]) -> list[Tensor]:
    outputs = [output.detach() for output in _tensors(forward_func(*(tensor[rows] for tensor in tensors)))]
    for output in outputs:
        if output.shape[:1] != (len(rows),):
            raise InputError(
                f"forward_func must return one row per example; given: shape {tuple(output.shape)} for {len(rows)}."
            )
    return [output if output.is_floating_point() else output.double() for output in outputs]


def _check_parameters(parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise AssertionError("No parameter of the model requires gradient: call `model.requires_grad_(True)`.")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float64:
            raise TypeError(
                f"Finite differences need double precision, but {name} is {parameter.dtype}: call `model.double()` and "
                "pass the attribution inputs of dtype torch.float64."
            )


def _loss(attribution: Any, seed: int) -> Tensor:
    """Return a random projection of all tensors plus the sum of their squares."""
    generator = Generator().manual_seed(seed)
    total: Tensor | None = None
    for tensor in _tensors(attribution):
        if tensor.dtype != torch.float64:
            raise TypeError(
                f"Finite differences need double precision, but the attribution is {tensor.dtype}: pass inputs of "
                "dtype torch.float64."
            )
        projection = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)
        term = (projection * tensor).sum() + tensor.square().sum()
        total = term if total is None else total + term
    if total is None:
        raise TypeError("attribute() returned no tensor: it must return an attribution.")
    return total


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _gradients(total: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    if not total.requires_grad:
        raise AssertionError(
            "The attribution has no graph: it was computed with gradients disabled, or detached. Call attribute with "
            "create_graph=True."
        )
    try:
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    except RuntimeError as error:
        raise AssertionError(f"The backward pass through the attribution fails: {error}") from error
    if all(gradient is None for gradient in gradients):
        raise AssertionError(
            "The attribution has no graph into the parameters, though it requires gradient: what it does depend on "
            "(its inputs, say) is no parameter of the model. Call attribute with create_graph=True."
        )
    named: dict[str, Tensor | None] = dict(zip(parameters, gradients, strict=True))
    not_finite = [name for name, each in named.items() if each is not None and not bool(each.isfinite().all())]
    if not_finite:
        raise AssertionError(
            f"The gradient is NaN or infinite in {not_finite}: look for a division by 0, a square root of 0, or "
            "torch.where of a value that is not finite."
        )
    return named


def _direction(parameter: nn.Parameter, generator: Generator) -> Tensor:
    """Return a random direction, scaled by the parameter's root mean square."""
    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        parameter.device
    )
    size = float(parameter.detach().square().mean().sqrt())
    return direction * (size or 1.0)


def _difference(loss: Callable[[], Tensor], parameter: nn.Parameter, direction: Tensor, step: float) -> float:
    original = parameter.detach().clone()
    values = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(original + sign * step * direction)
            values.append(float(loss().detach()))
    finally:
        with torch.no_grad():
            parameter.copy_(original)
    return (values[0] - values[1]) / (2 * step)


def _judge(derivatives: list[_Derivative], rtol: float, loss: float) -> None:
    scale = max(abs(value) for derivative in derivatives for value in derivative.measured)
    if scale <= 1e-8 * max(loss, 1e-8):
        raise AssertionError(
            "No parameter moves the attribution, so there is nothing to check: take another input, or a model whose "
            "gradient is not constant."
        )
    wrong = sorted((d for d in derivatives if not d.error(scale, loss) <= rtol), key=lambda d: -d.error(scale, loss))
    if not wrong:
        return
    worst = {derivative.parameter: derivative for derivative in reversed(wrong)}
    lines = [_explained(derivative, derivative.error(scale, loss)) for derivative in reversed(worst.values())]
    n_parameters = len({derivative.parameter for derivative in derivatives})
    raise AssertionError(
        f"The gradient is wrong in {len(worst)} of {n_parameters} parameters (tolerance {rtol:g}):\n"
        + "\n".join(lines)
        + "\nA part of what moves the attribution was taken for a constant, or hooks changed the gradient; or, where "
        "all are off by little, a solver stops before its minimum (LIME's default: pass Lasso(tol=1e-12))."
    )


def _explained(derivative: _Derivative, error: float) -> str:
    measured = derivative.measured[0]
    if derivative.claimed is None:
        return (
            f"  {derivative.parameter}: gets no gradient, though along it the loss changes at a rate of {measured:.6g}"
        )
    return (
        f"  {derivative.parameter}: {derivative.claimed:.6g} along a random direction, where finite differences give "
        f"{measured:.6g} (off by {error:.2g})"
    )
