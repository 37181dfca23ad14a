"""Sharing a model among the processes of an island: torch's DistributedDataParallel, or FSDP2, block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from trainer.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """A transformer's layers: the `ModuleList` with the most parameters; empty if there is no such list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=()))


def checkpoint_blocks(model: nn.Module, name: str) -> None:
    """Make each block keep only its inputs and recompute the rest in the backward pass.

    Raises:
        ConfigError: The model has no blocks. `name` is the model's, for the message.
    """
    chosen = blocks(model)
    if not chosen:
        raise ConfigError("activation_checkpointing", "block", f"needs a transformer; {name} has no blocks")
    for block in chosen:
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)


def shard(model: nn.Module, device: torch.device, name: str, value: Callable[[Tensor], Tensor] | None = None) -> None:
    """Shard a model over the processes of the island, in place: each block by itself, then the rest.

    The values are the leader's, which creates those on the meta device one tensor at a time. So no device, and no
    process, ever holds more than its shards, one block, and the parameters outside the blocks. Parameters stay float32;
    on GPUs, blocks compute in bfloat16, and gradients are averaged in float32.

    Args:
        name: The model's name, for the error message.
        value: Returns the content of a tensor that is on the meta device in the leader.

    Raises:
        ConfigError: The model has no blocks.
    """
    chosen = blocks(model)
    if not chosen:
        raise ConfigError(
            "inner_parallel", "fsdp", f"needs a model with blocks, a transformer; {name} has none: use ddp"
        )
    options: dict[str, Any] = {"mesh": DeviceMesh.from_group(_world(), device.type)}
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*chosen, model]:
        _share(module, device, value)
        fully_shard(module, **options)


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """At the end, free the unsharded parameters that forward-only passes leave: they may become stale."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(value: Tensor) -> Tensor:
    """A result over sharded tensors, such as a norm, as a plain tensor. All processes call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _share(module: nn.Module, device: torch.device, value: Callable[[Tensor], Tensor] | None) -> None:
    """Set a module's parameters and buffers that are not sharded yet to the leader's values, on the device.

    Args:
        value: Returns the content of a tensor on the meta device; None: it comes from the leader.
    """
    made: dict[Tensor, Tensor] = {}  # tied parameters stay tied
    for part in module.modules():
        owned: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for tensors in owned:
            for key, old in tensors.items():
                if old is None or not old.is_meta:
                    continue
                if old not in made:
                    new = value(old).to(device) if value else torch.empty_like(old, device=device)
                    made[old] = nn.Parameter(new, old.requires_grad) if tensors is part._parameters else new
                tensors[key] = made[old]
    module.to(device)
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, DTensor) and tensor.numel():
            values = tensor.detach().contiguous()
            torch.distributed.broadcast(values.view(-1).view(torch.uint8), 0)
            tensor.detach().copy_(values)


def _world() -> Any:
    return torch.distributed.group.WORLD
