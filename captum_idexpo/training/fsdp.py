"""Models whose parameters FSDP2 shards over processes (`torch.distributed.fsdp.fully_shard`).

A regularizer runs the model several times in a step, with backward passes in between. FSDP2 frees parameters after each
pass, but the last backward pass still needs them. `gathered` keeps them until the step ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from captum_idexpo._core.modes import is_batch_norm
from captum_idexpo.training.loss import ExplanationRegularizedLoss

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the parameters that FSDP2 shards whole, from their first use until the end of the ``with`` statement.

    Put it around all forward and backward passes of a step, and not around the optimizer's step, which works on the
    shards. Afterwards the model frees its parameters after each pass again, which is FSDP2's default. A model that is
    not sharded is left alone.

    Example:
        >>> import torch
        >>> from captum_idexpo.training import gathered
        >>> model = torch.nn.Linear(3, 2)  # or after fully_shard(model)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with gathered(model):
        ...     loss = model(torch.randn(4, 3)).square().sum()
        ...     loss.backward()
        >>> optimizer.step()
    """
    modules = _sharded_modules(model)
    try:
        for module in modules:
            module.reshard()  # what an evaluation left whole may be older than the shards
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 shards a model or a part of it."""
    return bool(_sharded_modules(model))


def prepare(accelerator: Accelerator, loss: ExplanationRegularizedLoss, optimizer: Optimizer) -> tuple[Any, Any]:
    """Return loss and optimizer as the accelerator trains them; under FSDP2 the model is sharded, not the loss.

    If the loss were sharded, it would be FSDP's root, through which every pass has to go. But explainers, evaluation
    and users call the model.

    Raises:
        ValueError: FSDP1, or a precision that has no effect on a model that is sharded already.
    """
    fsdp2 = getattr(accelerator, "is_fsdp2", False)
    fsdp1 = accelerator.distributed_type.value == "FSDP" and not fsdp2
    if fsdp1 or any(type(module).__name__ == "FullyShardedDataParallel" for module in loss.model.modules()):
        raise ValueError(
            "The trainer takes FSDP2, not FSDP1, where explanations and evaluations would have to go through the one "
            "module that is wrapped: use FullyShardedDataParallelPlugin(fsdp_version=2), or fully_shard(model) before "
            "the optimizer is made."
        )
    if fsdp2:
        _, optimizer = accelerator.prepare(loss.model, optimizer)
    elif is_sharded(loss.model):
        optimizer = accelerator.prepare(optimizer)
        if accelerator.mixed_precision != "no":
            raise ValueError(
                f"Accelerator(mixed_precision={accelerator.mixed_precision!r}) has no effect on a model that is "
                "sharded already: call fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))."
            )
    else:
        loss, optimizer = accelerator.prepare(loss, optimizer)
        return loss, optimizer
    for part in (loss.regularizers, loss.loss_fn):
        if isinstance(part, nn.Module):
            part.to(accelerator.device)
            sharded = {id(parameter) for parameter in loss.model.parameters()}  # it may hold the model
            if any(parameter.requires_grad and id(parameter) not in sharded for parameter in part.parameters()):
                raise ValueError(
                    "The loss_fn or a regularizer has parameters of its own, whose gradients would not be averaged "
                    "beside a sharded model: train them without FSDP, or freeze them."
                )
    return loss, optimizer


def check_sharding(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Refuse, before training starts, a sharded model whose training would fail or be wrong.

    Raises:
        ValueError: a part of the model that is not sharded, whose gradients would not be averaged; BatchNorm
            statistics that every process would keep for itself.
    """
    if not is_sharded(model):
        return
    whole = [name for name, p in model.named_parameters() if p.requires_grad and not _is_shard(p)]
    if whole:
        raise ValueError(
            f"Some layers are sharded, but not the parameters {whole[:5]}, whose gradients would be each process's "
            "own: call fully_shard(model) on the model itself after its layers, before the optimizer is made."
        )
    own = [
        name
        for name, module in model.named_modules()
        if is_batch_norm(module) and module.track_running_stats and not isinstance(module, nn.SyncBatchNorm)
    ]
    if own and not freeze_batch_norm:
        raise ValueError(
            f"With freeze_batch_norm=False each process would keep statistics of its own in {own[:5]} of the sharded "
            "model: leave freeze_batch_norm=True, or use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)."
        )


def local(tensor: Tensor) -> Tensor:
    """Return a tensor, or this process's part of a sharded one."""
    part: Any = tensor
    return cast(Tensor, part.to_local()) if _is_shard(tensor) else tensor


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of a model's state; of a sharded model the whole state in the first process, else nothing.

    All processes have to call this and the functions below.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(model, options=_options(cpu_offload=True)))
    state: dict[str, Any] = model.state_dict()  # its own dictionary, with versions of its modules beside the items
    state.update({name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)})
    return state


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Put a state back, for a sharded model that of the first process; RuntimeError for another model's state."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(model, weights, options=_options(broadcast_from_rank0=True))
    else:
        model.load_state_dict(weights)


def optimizer_state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state; of a sharded model the whole state in the first process, else nothing."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(model, optimizer.optimizer, options=_options(cpu_offload=True)))
    state: dict[str, Any] = optimizer.state_dict()
    return state


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Put an optimizer's state back."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer.optimizer, state, options=_options(broadcast_from_rank0=True))
    else:
        optimizer.load_state_dict(state)


def _options(**settings: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, **settings)


def _sharded_modules(model: nn.Module) -> list[Any]:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # as below
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_shard(tensor: Any) -> bool:
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # before FSDP2, or without torch.distributed
        return False
    return isinstance(tensor, DTensor)
