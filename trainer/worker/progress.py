"""What a worker counts about its own training."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from trainer.diloco import Commit, DiLoCo


@dataclass
class Progress:
    """Counters of a worker. All but the skipped steps count for this process only.

    Attributes:
        skipped, skipped_in_a_row: Inner steps whose loss or gradient was not finite.
        steps: Inner steps made.
        samples: Samples consumed, those of skipped steps excluded.
        bytes: Sent and received.
        losses: Of the open round's inner steps.
        last_loss: Of the last inner step.
        held_out: Loss of this worker's part of the held-out samples; None: not known.
        ramp: Inner steps over which the learning rate rises, while the moments of a joiner build up.
        members: The last quorum.
        rank, world_size: This worker's place among them; until it is one of them, as if it was alone.
    """

    skipped: int = 0
    skipped_in_a_row: int = 0
    steps: int = 0
    samples: int = 0
    bytes: int = 0
    losses: list[float] = field(default_factory=list)
    last_loss: float = math.nan
    held_out: float | None = None
    ramp: int = 1
    members: tuple[str, ...] = ()
    rank: int = 0
    world_size: int = 1
    _reported: tuple[int, float] = field(default_factory=lambda: (0, time.time()))  # samples, and when

    def count_step(self, loss: float, finite: bool, samples: int) -> None:
        """Count an inner step; one that is not finite was skipped."""
        self.steps += 1
        self.last_loss = loss
        if finite:
            self.samples += samples
            self.losses.append(loss)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def count_commit(self, commit: Commit, id: str) -> None:
        """Count the bytes of a commit, and take over its members; `id` is this worker's among them."""
        self.bytes += (commit.bytes_sent or 0) + (commit.bytes_received or 0)
        self.enter(commit.members, id)

    def enter(self, members: tuple[str, ...], id: str) -> None:
        """Take over the members of the quorum."""
        self.members = members
        if id in members:
            self.rank, self.world_size = members.index(id), len(members)

    def for_status(self, diloco: DiLoCo) -> dict[str, Any]:
        """What `status` shows of this worker, at the end of a round. The speed is that since the last call."""
        (before, since), now = self._reported, time.time()
        self._reported = self.samples, now
        return {
            "step": diloco.schedule.step,
            "round": diloco.open_round,
            "loss": self.last_loss if math.isfinite(self.last_loss) else None,
            "samples": self.samples,
            "held_out": self.held_out,
            "bytes": self.bytes,
            "speed": (self.samples - before) / (now - since) if now > since else 0.0,
            "time": now,
        }
