"""The device that a process computes on."""

from typing import TYPE_CHECKING

from trainer.config import TrainingConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch


def device_of(config: TrainingConfig, local_rank: int = 0) -> "torch.device":
    """The device of a node's worker. Raises ConfigError if this machine does not have it."""
    import torch

    if not config.device.startswith("cuda"):
        return torch.device(config.device)
    if not torch.cuda.is_available():
        allowed = "torch finds no usable GPU on this machine; to train on the CPU, use --device cpu"
        raise ConfigError("device", config.device, allowed)
    device = torch.device(config.device if ":" in config.device else f"cuda:{local_rank}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("device", str(device), f"this machine has {torch.cuda.device_count()} GPUs")
    return device
