"""A worker's checkpoints: what they contain, and when they are written."""

from dataclasses import asdict
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint import Checkpointer
from trainer.elastic.progress import Progress
from trainer.events import EventLog
from trainer.files import read_json
from trainer.worker.setup import Parts, versions


class Saving:
    """Saves a worker's checkpoints. Close it to end its thread."""

    def __init__(self, parts: Parts, progress: Progress, metrics: EventLog) -> None:
        self._parts, self._progress, self._metrics = parts, progress, metrics
        self._checkpointer = Checkpointer(
            parts.process.volume.checkpoints,
            parts.process.config.keep_checkpoints,
            self._on_saved,
            lasts=parts.memory.holds if parts.memory else lambda tensor: False,
        )
        self._last: tuple[int, int, float] | None = None  # term, round and position of the last checkpoint
        self.last_step = 0  # the schedule position from which `checkpoint_interval` counts

    @property
    def due(self) -> bool:
        """Whether `checkpoint_interval` steps have passed since the last one, or the run has gone back to before it."""
        passed = self._parts.diloco.schedule.step - self.last_step
        return passed < 0 or passed >= self._parts.process.config.checkpoint_interval

    def save(self, *, complete: bool = False, wait: bool = False) -> None:
        """Save a checkpoint on another thread, unless nothing has changed since the last one.

        Args:
            complete: Whether it is the run's final one.
            wait: Whether to wait until all checkpoints are durable.

        Raises:
            TrainingError: A checkpoint could not be written.
        """
        parts, diloco, base = self._parts, self._parts.diloco, self._parts.quorum.base
        version = parts.quorum.term, diloco.round, diloco.schedule.position()
        # A worker that was interrupted while catching up holds an older state, which is already on the disk
        if complete or (version != self._last and base.round == diloco.round):
            self._checkpointer.wait()  # until the previous one's memory is free
            self._last, self.last_step = version, diloco.schedule.step
            worker = {
                "diloco": diloco.worker_state(),
                **parts.process.own_state.save(),
            }
            state = {
                "round": diloco.round,
                "step": diloco.schedule.step,
                "base_step": diloco.state.step,
                "term": parts.quorum.term,
                "cursor": asdict(base.cursor),
                "assignment": parts.process.samples.ledger.assignment.ranges,
                "used": parts.process.samples.ledger.used,
                "speed": parts.speed.value,
                "skipped": [self._progress.skipped, self._progress.skipped_in_a_row],
                "run_id": parts.process.config.run_id,
                "worker": parts.quorum.worker,
                "global_hash": diloco.state.hash(),
                "config": parts.process.config.model_dump(mode="json"),
                "dataset": parts.process.dataset.manifest.hash,
                "versions": versions(),
            }
            # It is written while training goes on, so the global state must keep its tensors
            release = diloco.state.hold()
            self._checkpointer.save(diloco.global_tensors(), worker, state, complete=complete, release=release)
        if wait:
            self._checkpointer.wait()

    def make_room(self) -> None:
        """Wait for the checkpoint that is being written if an island has no memory for another state."""
        memory = self._parts.memory
        if memory and not memory.has_room(len(self._parts.diloco.state.tensors)):
            self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()

    def _on_saved(self, path: Path, seconds: float, size: int) -> None:
        round, step = checkpoint.version_of(path)
        self._metrics.write("checkpoint", round=round, step=step, path=str(path), seconds=seconds, bytes=size)
        self._parts.quorum.durable(round, int(read_json(path / "state.json")["term"]))
