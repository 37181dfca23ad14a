"""A worker's throughput: tokens and model FLOPs per second, model FLOPs utilisation, and memory use.

Model FLOPs are those required by the model, counted as in PaLM's appendix B (`Task.flops`). Recomputation by activation
checkpointing does not count. MFU is their share of the devices' peak.
"""

import resource
from typing import Any

import torch

from trainer.island.processes import Island

# Dense bfloat16 FLOP/s of devices by a part of their name (from data sheets); the first match counts
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI325": 1307e12,
    "MI300": 1307e12,
    "MI250": 383e12,
    "MI210": 181e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 FLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """This process's peak memory in bytes: on its device or, on a CPU, in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memories(device: torch.device, island: Island | None) -> list[int]:
    """The peak memory of a worker's processes, by local rank, in the leader. All processes of an island call this."""
    own = peak_memory(device)
    return [own] if island is None else [int(one) for one in island.collect(str(own).encode())]


class Throughput:
    """The throughput of a worker with `processes` equal devices, round by round."""

    def __init__(self, device: torch.device, processes: int) -> None:
        self._processes, self._peak = processes, peak_flops(device)
        self._tokens, self._flops = 0, 0.0

    def count(self, tokens: int, flops: float) -> None:
        """Count an inner step."""
        self._tokens += tokens
        self._flops += flops

    def end_round(self, seconds: float) -> dict[str, Any]:
        """Fields for the event "round", for a round of `seconds`, including the synchronisation. None: unknown."""
        tokens, flops = self._tokens / seconds, self._flops / seconds
        self._tokens, self._flops = 0, 0.0
        peak = self._peak and self._peak * self._processes
        return {
            "tokens_per_second": tokens,
            "flops_per_second": flops or None,
            "mfu": flops / peak if flops and peak else None,
        }
