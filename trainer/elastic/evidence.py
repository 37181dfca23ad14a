"""The fields of a worker's events: `python -m trainer verify` judges a run by them (`trainer.protocol.history`)."""

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
    """What tells where a worker is: a member, or the world of the `ddp` baseline."""

    worker: int
    id: str

    @property
    def members(self) -> tuple[str, ...]: ...
    @property
    def term(self) -> int: ...
    @property
    def base(self) -> State: ...


def process_of(run_id: str, place: Place, diloco: DiLoCo) -> dict[str, Any]:
    """This process, and what it trains, at its start."""
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
    """A round that a worker has taken part in; `losses` are those of its inner steps."""
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
    """Where a worker ends."""
    return {
        "round": diloco.round,
        "step": diloco.schedule.step,
        "skipped_steps": progress.skipped,
        "samples": progress.samples,
        "global_hash": diloco.state.hash(),
    }


def held(place: Place, diloco: DiLoCo) -> dict[str, Any]:
    """The state that a worker goes on from, and what it has done towards the open round already."""
    return {
        "term": place.term,
        "cursor": asdict(place.base.cursor),
        "base_step": diloco.state.step,
        "inner_steps": diloco.schedule.inner_steps,
        "carried": list(diloco.contribution.samples),
    }


def assignment(ledger: SampleLedger, diloco: DiLoCo) -> dict[str, Any]:
    """The samples that a worker goes on with."""
    current = ledger.assignment
    return {
        "term": current.term,
        "round": current.round,
        "ranges": current.ranges,
        "used": ledger.used,
        "step_multiplier": diloco.schedule.step_multiplier,
    }


def agreed(commit: Commit, unused: Sequence[Range]) -> dict[str, Any]:
    """What the members of a round have agreed on, and this one's part; `unused` is what it had left when it ended."""
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
    """What a worker returns when it leaves."""
    rest = ledger.rest()
    return {"term": place.term, "unused": rest.ranges if rest.term == place.term else ()}
