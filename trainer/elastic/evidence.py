"""The fields of a worker's events with which `python -m trainer verify` judges a run (`trainer.protocol.history`)."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from trainer.diloco import Commit, DiLoCo
from trainer.elastic.progress import Progress
from trainer.protocol.records import Range, State
from trainer.protocol.samples import SampleLedger


class Place(Protocol):
    """The source of a worker's position in the run: a member, or the world of the `ddp` baseline."""

    worker: int
    id: str

    @property
    def members(self) -> tuple[str, ...]: ...
    @property
    def term(self) -> int: ...
    @property
    def base(self) -> State: ...


def process_of(run_id: str, place: Place, diloco: DiLoCo) -> dict[str, Any]:
    """Fields about this process and its training, at its start."""
    return {
        "run_id": run_id,
        "worker": place.worker,
        "member": place.id,
        "world_size": len(place.members),
        "pid": os.getpid(),
        "host": platform.node(),
        "parameters": diloco.state.parameters.numel(),
        "resumed_round": diloco.round or None,
    }


def round_of(diloco: DiLoCo, commit: Commit, losses: Sequence[float], batch_size: int) -> dict[str, Any]:
    """Fields about a round in which the worker took part; `losses` are those of its inner steps."""
    return {
        "round": diloco.round,
        "attempt": commit.attempt,
        "step": diloco.state.step,
        "world_size": len(commit.members),
        "members": commit.members,
        "loss": sum(losses) / len(losses) if losses else math.nan,
        "bytes_sent": commit.bytes_sent,
        "bytes_received": commit.bytes_received,
        "sync_seconds": commit.seconds,
        "exposed_seconds": diloco.exposed_seconds,
        "inner_steps": len(losses),
        "samples": len(losses) * batch_size,
    }


def end_of(diloco: DiLoCo, progress: Progress) -> dict[str, Any]:
    """Fields about a worker's final position."""
    return {
        "round": diloco.round,
        "step": diloco.schedule.step,
        "skipped_steps": progress.skipped,
        "samples": progress.samples,
        "global_hash": diloco.state.hash(),
    }


def held(place: Place, diloco: DiLoCo) -> dict[str, Any]:
    """Fields about the state from which a worker continues, and its progress in the open round."""
    return {
        "term": place.term,
        "cursor": asdict(place.base.cursor),
        "base_step": diloco.state.step,
        "inner_steps": diloco.schedule.inner_steps,
        "carried": list(diloco.contribution.samples),
    }


def assignment(ledger: SampleLedger, diloco: DiLoCo) -> dict[str, Any]:
    """Fields about the samples with which a worker continues."""
    current = ledger.assignment
    return {
        "term": current.term,
        "round": current.round,
        "ranges": current.ranges,
        "used": ledger.used,
        "step_multiplier": diloco.schedule.step_multiplier,
    }


def agreed(commit: Commit, unused: Sequence[Range]) -> dict[str, Any]:
    """Fields about a round's commit and this member's part; `unused` are its unused positions at the end."""
    return {
        "term": commit.term,
        "base_hash": commit.base_hash,
        "hash": commit.reduced.hash,
        "weight": commit.reduced.weight,
        "own_weight": commit.own_weight,
        "cursor": asdict(commit.cursor),
        "unused": unused,
    }


def left(place: Place, ledger: SampleLedger) -> dict[str, Any]:
    """Fields about the samples that a leaving worker returns."""
    rest = ledger.rest()
    return {"term": place.term, "unused": rest.ranges if rest.term == place.term else ()}
