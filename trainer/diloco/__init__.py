"""DiLoCo as a library: five lines make a worker of a training loop of your own (see `DiLoCo`)."""

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.ddp import DDP
from trainer.diloco.diloco import DiLoCo
from trainer.diloco.outer import Nesterov, OuterOptimizer
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum, Superseded
from trainer.diloco.state import GlobalState

__all__ = [
    "DDP",
    "Codec",
    "Commit",
    "DiLoCo",
    "Fp32",
    "GlobalState",
    "LocalQuorum",
    "Nesterov",
    "OuterOptimizer",
    "Quorum",
    "Superseded",
]
