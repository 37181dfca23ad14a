"""The baseline: data parallelism, which averages gradients at every inner step."""

import time
from typing import Any

from trainer.diloco.diloco import DiLoCo
from trainer.diloco.quorum import Commit


class DDP(DiLoCo):
    """Synchronous data parallelism behind DiLoCo's interface, so that the two are compared in one loop.

    `before_optimizer_step` replaces the gradients by their weighted mean over the workers, so that all replicas stay
    equal and the round's end has nothing to exchange. A round is then only the unit of reports and checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._commit: Commit | None = None
        self._exposed = 0.0
        self._sent: int | None = 0
        self._received: int | None = 0

    def before_optimizer_step(self, samples: float = 1.0) -> None:
        """Average the gradients. A worker whose gradients are not finite counts nothing; if that is all of them, the
        gradients become NaN, for the caller to skip the step."""
        started = time.perf_counter()
        gradients = [parameter.grad for parameter in self._layout.parameters if parameter.grad is not None]
        if len(gradients) != len(self._layout.parameters):
            raise ValueError("every trainable parameter needs a gradient")
        flat = self._layout.gather(self._scratch, gradients)
        commit = self.quorum.synchronise(flat, samples, self.codec)
        self._layout.scatter(commit.mean if commit.weight > 0 else commit.mean.fill_(float("nan")), gradients)
        self._commit = commit
        self._sent = None if self._sent is None or commit.bytes_sent is None else self._sent + commit.bytes_sent
        if self._received is not None:
            self._received = None if commit.bytes_received is None else self._received + commit.bytes_received
        self._exposed += time.perf_counter() - started

    def synchronise(self) -> Commit:
        """End the round: the global parameters are the parameters."""
        assert self._commit is not None
        self._layout.gather(self._global)
        self.round += 1
        self.round_start += self.inner_steps
        commit = Commit(
            self.round,
            self._commit.attempt,
            self._commit.members,
            self._global,
            self.samples * self.quorum.world_size,
            self._sent,
            self._received,
            self._exposed,
        )
        self.exposed_seconds = self._exposed
        self.inner_steps, self.samples = 0, 0.0
        self._exposed, self._sent, self._received = 0.0, 0, 0
        return commit
