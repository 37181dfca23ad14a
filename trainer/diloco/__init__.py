"""DiLoCo as a library: five lines turn a training loop into a DiLoCo worker (see `DiLoCo`)."""

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.diloco import DiLoCo
from trainer.diloco.outer import Averaged, Nesterov, OuterOptimizer
from trainer.diloco.overlap import Overlap
from trainer.diloco.quorum import CatchUp, Commit, LocalQuorum, LoopQuorum, Quorum, Reduced, RoundReport, Superseded
from trainer.diloco.state import Fragment, GlobalState

__all__ = [
    "Averaged",
    "CatchUp",
    "Codec",
    "Commit",
    "DiLoCo",
    "Fp32",
    "Fragment",
    "GlobalState",
    "LocalQuorum",
    "LoopQuorum",
    "Nesterov",
    "OuterOptimizer",
    "Overlap",
    "Quorum",
    "Reduced",
    "RoundReport",
    "Superseded",
]
