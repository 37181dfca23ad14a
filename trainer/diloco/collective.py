"""The collective of a synchronisation: the weighted mean over a process group, in chunks, several in flight."""

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, ProcessGroup, ReduceOp, Work

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.quorum import is_finite

CHUNK_BYTES = 4 << 20
IN_FLIGHT = 4


def weighted_mean(
    group: ProcessGroup, values: Tensor, weight: float, codec: Codec, timeout: timedelta
) -> tuple[Tensor, float]:
    """The mean of the members' `values`, weighted by their weights; the same bits in every member.

    Values that are not finite are sent as zeros with weight 0, since 0 × NaN is NaN.

    Args:
        values: float32 (n,), on the host, contiguous. Not changed: the mean is formed in memory of its own, so that an
            attempt that fails can be made again.
        weight: At least 0.
        timeout: How long any one chunk may take.

    Returns:
        The mean, float32 (n,) (zeros if all weights are 0), and the sum of the weights.

    Raises:
        RuntimeError: A member is gone, or a chunk took too long.
    """
    if not isinstance(codec, Fp32):
        raise TypeError(f"no collective for codec {codec.name}")
    if not is_finite(values):
        weight = 0.0
    total = torch.tensor([weight], dtype=torch.float64)
    _sum(group, [total], timeout)
    if total.item() == 0:
        return torch.zeros_like(values), 0.0
    # Weights are applied before the sum, so that what comes out is the mean and no further pass is needed.
    mean = values * (weight / total.item()) if weight else torch.zeros_like(values)
    _sum(group, list(mean.split(CHUNK_BYTES // mean.element_size())), timeout)
    return mean, total.item()


def _sum(group: ProcessGroup, chunks: list[Tensor], timeout: timedelta) -> None:
    """All-reduce each chunk in place, at most `IN_FLIGHT` at a time."""
    options = AllreduceOptions()
    options.reduceOp = ReduceOp(ReduceOp.SUM)
    options.timeout = timeout
    works: list[Work] = []
    for index, chunk in enumerate(chunks):
        if index >= IN_FLIGHT:
            works[index - IN_FLIGHT].wait(timeout)
        works.append(group.allreduce([chunk], options))
    for work in works[-IN_FLIGHT:]:
        work.wait(timeout)
