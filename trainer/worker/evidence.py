"""The fields of events that `python -m trainer verify` judges a run by (`trainer.protocol.history`)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.diloco import Commit
from trainer.protocol.records import Range
from trainer.worker.setup import Parts


def held(parts: Parts) -> dict[str, Any]:
    """The state that a worker goes on from, and what it has done towards the open round already."""
    return {
        "term": parts.quorum.term,
        "cursor": asdict(parts.quorum.base.cursor),
        "base_step": parts.diloco.state.step,
        "inner_steps": parts.diloco.schedule.inner_steps,
        "carried": list(parts.diloco.contribution.samples),
    }


def assignment(parts: Parts) -> dict[str, Any]:
    """The samples that a worker goes on with."""
    ledger = parts.process.samples.ledger
    current = ledger.assignment
    return {
        "term": current.term,
        "round": current.round,
        "ranges": current.ranges,
        "used": ledger.used,
        "step_multiplier": parts.diloco.schedule.step_multiplier,
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


def left(parts: Parts) -> dict[str, Any]:
    """What a worker returns when it leaves."""
    rest = parts.process.samples.ledger.rest()
    return {"term": parts.quorum.term, "unused": rest.ranges if rest.term == parts.quorum.term else ()}
