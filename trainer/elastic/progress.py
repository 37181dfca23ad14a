"""Counters of a worker's own training."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from trainer.diloco import DiLoCo


@dataclass
class Progress:
    """Counters of a worker. All except the skipped steps start at zero in each process."""

    skipped: int = 0  # inner steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    steps: int = 0  # inner steps made
    samples: int = 0  # consumed, without those of skipped steps
    bytes: int = 0  # sent and received
    losses: list[float] = field(default_factory=list)  # of the open round's inner steps
    last_loss: float = math.nan
    held_out: float | None = None  # loss on this worker's part of the held-out samples
    ramp: int = 1  # inner steps over which the learning rate rises, while the moments of a joiner build up
    members: tuple[str, ...] = ()  # the last quorum
    rank: int = 0  # this worker's rank among them; before it is a member, that of a lone worker
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

    def enter(self, members: tuple[str, ...], id: str) -> None:
        """Record the members of the quorum; `id` is this worker's."""
        self.members = members
        if id in members:
            self.rank, self.world_size = members.index(id), len(members)

    def for_status(self, diloco: DiLoCo) -> dict[str, Any]:
        """Values that `status` shows for this worker after a round. The speed is averaged since the last call."""
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
