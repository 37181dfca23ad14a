"""How the processes of an island share a model: torch's DistributedDataParallel, or FSDP2, block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated parts, as transformers name them (`_no_split_modules`); none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(model: nn.Module, device: torch.device, name: str) -> None:
    """Shard a model over the processes of the island, in place: each block by itself, then the rest.

    Parameters stay float32; on GPUs, blocks compute in bfloat16, and gradients are averaged in float32.

    Args:
        name: The model's, for the error.

    Raises:
        ConfigError: The model has no blocks.
    """
    chosen = blocks(model)
    if not chosen:
        raise ConfigError("inner_parallel", "fsdp", f"cannot shard {name}, which has no blocks: use ddp")
    options: dict[str, Any] = {"mesh": DeviceMesh.from_group(_world(), device.type)}
    if device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*chosen, model]:
        fully_shard(module, **options)


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """At the end, give up whole parameters that passes without a backward pass have left: a change makes them stale."""
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(value: Tensor) -> Tensor:
    """A result over sharded tensors, such as a norm, as a plain tensor; all processes call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _world() -> Any:
    return torch.distributed.group.WORLD
