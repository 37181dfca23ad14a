"""DiLoCo as a library: five lines make a worker of a training loop of your own (see `DiLoCo`)."""

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.ddp import DDP
from trainer.diloco.diloco import DiLoCo, Overlap
from trainer.diloco.outer import Averaged, Nesterov, OuterOptimizer
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum, Reduced, Superseded
from trainer.diloco.state import Fragment, GlobalState

__all__ = [
    "DDP",
    "Averaged",
    "Codec",
    "Commit",
    "DiLoCo",
    "Fp32",
    "Fragment",
    "GlobalState",
    "LocalQuorum",
    "Nesterov",
    "OuterOptimizer",
    "Overlap",
    "Quorum",
    "Reduced",
    "Superseded",
]
