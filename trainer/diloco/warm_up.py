"""Compile the kernels of a synchronisation ahead of time."""

import torch

from trainer.diloco.codecs import Codec
from trainer.diloco.collective import Workspace, weighted_sum
from trainer.diloco.outer import OuterOptimizer
from trainer.diloco.state import GlobalState


def warm_up(codec: Codec, outer: OuterOptimizer) -> None:
    """Run a synchronisation's arithmetic once, so that the first real one does not wait for the compiler."""
    rows = codec.encode(torch.zeros(2, codec.block))
    mean = weighted_sum(codec, [(0.5, rows), (0.5, rows)], Workspace())
    codec.mean.decode(codec.mean.encode(mean), mean)
    GlobalState(torch.zeros(mean.numel()), outer).apply(mean.view(-1), 1)
