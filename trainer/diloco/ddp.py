"""The baseline: data parallelism, which averages gradients at every inner step."""

import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from trainer.diloco.diloco import DiLoCo
from trainer.diloco.quorum import Commit


class DDP(DiLoCo):
    """Synchronous data parallelism behind DiLoCo's interface, so that the two are compared in one loop.

    `before_optimizer_step` replaces the gradients by their weighted mean over the workers, so that all replicas stay
    equal and the round's end has nothing to exchange. A round is then only the unit of reports and checkpoints.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mean = self._layout.empty()
        self._total: Commit | None = None  # what the open round's synchronisations have summed up to

    def before_optimizer_step(self, samples: float = 1.0) -> None:
        """Average the gradients. A worker whose gradients are not finite counts nothing; if that is all of them, the
        gradients become NaN, for the caller to skip the step."""
        started = time.perf_counter()
        gradients = [parameter.grad for parameter in self._layout.parameters if parameter.grad is not None]
        if len(gradients) != len(self._layout.parameters):
            raise ValueError("every trainable parameter needs a gradient")
        flat, mean = self._layout.gather(self._scratch, gradients), self._mean

        def take(start: int, piece: Tensor) -> None:
            mean[start : start + len(piece)] = piece

        commit = self.quorum.synchronise(flat, samples, self.state.fragments[-1], take)
        self._layout.scatter(mean if commit.reduced.weight > 0 else mean.fill_(float("nan")), gradients)
        last = self._total
        self._total = replace(
            commit,
            reduced=replace(commit.reduced, weight=commit.reduced.weight + (last.reduced.weight if last else 0)),
            bytes_sent=_sum(commit.bytes_sent, last.bytes_sent if last else 0),
            bytes_received=_sum(commit.bytes_received, last.bytes_received if last else 0),
            seconds=time.perf_counter() - started + (last.seconds if last else 0),
        )

    def synchronise(self) -> Commit:
        """End the round: the global parameters are the parameters."""
        assert self._total is not None
        parameters = self._layout.gather(self._scratch)
        tensors = {**self.state.tensors, "model": parameters}
        self.state.load(self.state.round + 1, self.state.step + self.inner_steps, tensors)
        commit = replace(self._total, round=self.state.round)
        self.exposed_seconds = commit.seconds
        self._total = None
        self.inner_steps = 0
        self.quorum.applied(commit, self.state)
        return commit


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
