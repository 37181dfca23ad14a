"""The inner loop: what one worker does from its start to the run's final checkpoint."""

import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.diloco import Commit, RoundReport, Superseded
from trainer.errors import Interrupted, TrainingError
from trainer.monitor.events import EventLog
from trainer.monitor.sinks import sinks
from trainer.process import number_from
from trainer.tasks import scoring
from trainer.volume import Volume
from trainer.worker.ddp import Loss, PeerLeft
from trainer.worker.optimizer import learning_rate
from trainer.worker.progress import Progress
from trainer.worker.resume import Moments, find_checkpoint, join
from trainer.worker.saving import Saving
from trainer.worker.setup import Parts, build, versions
from trainer.worker.validation import score

CLIP_NORM = 1.0
POLL_INTERVAL = 0.25  # seconds between two looks at the quorum while a synchronisation blocks the loop


def train(config: TrainingConfig) -> int:
    """Train as one worker, under a torchrun agent, until the run's final checkpoint is committed.

    Args:
        config: The worker's own (see `trainer.volume.worker_configs`); the data and the model are precached.

    Returns:
        0, the exit status: the run is complete.

    Raises:
        ConfigError: This worker cannot take part with this configuration.
        TrainingError: The run failed, or this worker has to be started again.
        Interrupted: The process was told to end (SIGTERM, SIGINT), and everything is saved.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Worker.open(config, stopping) as worker:
        return worker.run()


class Worker:
    """One worker of a run. `open` builds it; `run` is the whole story."""

    def __init__(self, parts: Parts, metrics: EventLog, stopping: threading.Event) -> None:
        self.parts, self.metrics, self._stopping = parts, metrics, stopping
        self.config, self.quorum, self.world = parts.config, parts.quorum, parts.world
        self.diloco, self.samples = parts.diloco, parts.samples
        self.progress = Progress()
        self.saving = Saving(parts, self.progress, metrics)
        self.loss: nn.Module = Loss(parts.task, parts.model)
        self._shortage_saved = False

    @classmethod
    @contextmanager
    def open(cls, config: TrainingConfig, stopping: threading.Event) -> Iterator["Worker"]:
        """Build a worker; at the end, leave the run and close everything."""
        local_rank = number_from("LOCAL_RANK")
        with EventLog(Volume.of(config, local_rank).metrics) as metrics:
            metrics.capture_warnings()
            parts = build(config, stopping, metrics.warn)
            metrics.sinks += sinks(config, parts.quorum.worker, parts.volume.root, metrics.warn, local_rank)
            try:
                worker = cls(parts, metrics, stopping)
                with worker.saving:
                    yield worker
            finally:
                parts.samples.close()
                parts.quorum.leave(parts.samples.ledger.rest())

    def run(self) -> int:
        """Join the run, train to its end, and return the exit status.

        Raises:
            As `train`.
        """
        self._join()
        try:
            # Train, round by round
            if self.diloco.schedule.step == 0 and self.config.eval_interval:
                self._validate()
            while not self.diloco.complete or not self._final_state_is_agreed():
                self._train_round()

            # The run has succeeded when the final checkpoint is durable
            self.saving.save(complete=True)
            self.saving.wait()
            self.quorum.wait_for_others()
            self.quorum.finish("succeeded")
        except (Interrupted, PeerLeft):
            # Save what there is; a synchronisation that fails now counts as not started
            if self.diloco.pending:
                with suppress(Interrupted, TrainingError):
                    self.diloco.finish()
            self.saving.save()
            self.saving.wait()
            self._write_end("stopped", "told to leave")
            raise
        except Exception as error:
            self._write_end("failed", str(error) or type(error).__name__)
            raise
        self._write_end("complete")
        return 0

    def _join(self) -> None:
        """Become a member of the run, and go on where the run is."""
        found = find_checkpoint(self.config, self.parts.volume.checkpoints, self.metrics.warn)
        resumed = join(self.parts, found)
        self.progress.skipped, self.progress.skipped_in_a_row = resumed.skipped
        self.progress.ramp = resumed.ramp
        self.progress.enter(self.quorum.members, self.quorum.id)
        self.saving.begin()
        if self.world is not None:
            self.loss = self.world.data_parallel(self.loss)
        self.quorum.offer("moments", Moments(self.parts.optimizer))

        self.metrics.write(
            "start",
            run_id=self.config.run_id,
            worker=self.quorum.worker,
            member=self.quorum.id,
            world_size=len(self.quorum.members),
            pid=os.getpid(),
            host=platform.node(),
            device=str(self.parts.device),
            parameters=sum(parameter.numel() for parameter in self.parts.parameters),
            dataset=self.parts.dataset.manifest.hash,
            resumed_round=self.diloco.round or None,
            config=self.config.model_dump(mode="json"),
            versions=versions(),
        )
        if resumed.moments_from_donor:
            self.metrics.write("membership", change="took moments", round=self.diloco.round)
        self.metrics.write("membership", change="joined", members=self.quorum.members, round=self.diloco.round)

    def _train_round(self) -> None:
        """Make the inner steps of a round, synchronise, and do what is due afterwards."""
        diloco, started, before = self.diloco, time.perf_counter(), self.diloco.round
        self.progress.losses.clear()
        commit = None
        while commit is None and not diloco.complete:  # do the next thing that can be done
            if diloco.blocked or (diloco.pending and self.samples.exhausted):
                commit = self._finish_synchronisation()
            elif not diloco.pending and self.quorum.superseded():
                self._catch_up()
            elif diloco.schedule.due:
                diloco.start(self._report())
            elif self.samples.exhausted:
                self._take_assignment()
            else:
                self._check_stopping()
                self._save_on_shortage()
                with self.parts.speed.timing():
                    self._inner_step()
        self._write_round(commit, before, time.perf_counter() - started)

        # Validate and save at their intervals
        last = diloco.complete
        interval = self.config.eval_interval * self.config.fragments
        if interval and (last or diloco.round % interval == 0):
            self._validate()
        if not last and self.saving.due:
            self.saving.save()

    def _inner_step(self) -> None:
        """Make one inner step, over as many batches as `batch_size` takes."""
        started, diloco, optimizer = time.perf_counter(), self.diloco, self.parts.optimizer
        round, step = diloco.open_round, diloco.schedule.position(1)

        # The learning rate is a function of the schedule; a joiner's rises while its moments build up.
        ramp = min(1.0, (self.progress.steps + 1) / self.progress.ramp)
        lr = learning_rate(diloco.schedule.position(), self.config) * ramp
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        # Forward and backward; on a GPU, reading the loss and the norm waits once for both.
        total, tokens = self._accumulate_gradients()
        norm = nn.utils.clip_grad_norm_(self.parts.parameters, CLIP_NORM)
        loss, gradient_norm = torch.stack([total, norm.to(total.dtype)]).tolist()
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Account for the step, and report it.
        samples = self.config.batch_size if finite else 0
        positions = self.samples.consume()
        self.progress.count_step(loss, finite, samples)
        self.metrics.write(
            "step",
            round=round,
            step=step,
            loss=loss,
            lr=lr,
            gradient_norm=gradient_norm,
            samples=samples,
            positions=positions,
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )
        if not finite:
            self._on_skipped(step)
        diloco.count_step(samples)

    def _accumulate_gradients(self) -> tuple[Tensor, int]:
        """Run the batches of an inner step forward and backward; their mean loss, a scalar, and their tokens."""
        parts, tokens = self.parts, 0
        batches = self.config.batch_size // self.samples.per_device
        total = torch.zeros((), device=parts.device)
        with self.world.lost_ranks() if self.world else nullcontext():
            for number in range(batches):
                batch = scoring.on_device(self.samples.next_batch(), parts.shared, parts.device)
                # Data parallelism averages the gradients in the last backward pass.
                last = self.world is None or number == batches - 1
                with nullcontext() if last else self.loss.no_sync():  # type: ignore[operator]
                    with scoring.autocast(parts.device):
                        loss = self.loss(batch) / batches
                    loss.backward()
                total += loss.detach()
                tokens += parts.task.tokens(batch)
            return (self.world.mean_loss(total) if self.world else total), tokens

    def _on_skipped(self, step: float) -> None:
        """Warn of a step that was skipped; end the run if there were too many in a row."""
        self.metrics.warn(f"step {step:g} is skipped: its loss or gradient is not finite")
        in_a_row, limit = self.progress.skipped_in_a_row, self.config.max_skipped_steps
        if in_a_row > limit:
            reason = (
                f"{in_a_row} inner steps in a row had a loss or gradient that is not finite "
                f"(max_skipped_steps = {limit}): try a lower lr or a longer warm-up"
            )
            self.quorum.finish("failed", reason)  # another start would end the same way
            raise TrainingError(reason)

    # Rounds

    def _report(self) -> RoundReport:
        """End the round here, and report what the others have to know."""
        unused, speed = self.samples.ledger.close_round(), self.parts.speed.end_round()
        return RoundReport(unused, speed, self.progress.for_status(self.diloco))

    def _finish_synchronisation(self) -> Commit | None:
        """Wait for the pending synchronisation, and go on from its outer step."""
        while not self.diloco.wait(POLL_INTERVAL):
            self._save_on_shortage()
        commit = self.diloco.finish()
        self.samples.accept(self.diloco.assignment, self.quorum.term)
        return commit

    def _catch_up(self) -> None:
        """Go on from the round that was committed without this worker."""
        self.diloco.catch_up()
        self.samples.accept(self.diloco.assignment, self.quorum.term)

    def _take_assignment(self) -> None:
        """Wait until this worker has samples to train on."""
        try:
            self.diloco.accept(self.quorum.assign(after=self.samples.ledger.assignment.round_id))
        except Superseded:
            self.diloco.catch_up()
        self.samples.accept(self.diloco.assignment, self.quorum.term)

    def _final_state_is_agreed(self) -> bool:
        """Whether this worker's final state is the one that most members hold; if not, it has caught up."""
        try:
            self.quorum.reconcile(self.diloco.state)
        except Superseded:
            self._catch_up()
            return False
        return True

    def _check_stopping(self) -> None:
        if self.world is not None:
            self.world.check_stopping()
        elif self._stopping.is_set():
            raise Interrupted

    def _save_on_shortage(self) -> None:
        """Save once when too few workers are left to go on: the run may end while it waits for others."""
        if self.quorum.shortage and not self._shortage_saved:
            self.saving.save()
        self._shortage_saved = self.quorum.shortage

    def _validate(self) -> None:
        """Score the global parameters on this worker's part of the held-out samples."""
        started = time.perf_counter()
        scores, samples = score(self.parts, self.progress.rank, self.progress.world_size, self._stopping)
        if scores:
            self.progress.held_out = scores["loss"] if math.isfinite(scores["loss"]) else None
            seconds = time.perf_counter() - started
            self.metrics.write(
                "eval",
                round=self.diloco.round,
                step=self.diloco.schedule.step,
                samples=samples,
                seconds=seconds,
                **scores,
            )

    # Events

    def _write_round(self, commit: Commit | None, before: int, seconds: float) -> None:
        """Report the round that this worker has taken part in, and the ones that were committed without it."""
        progress, round = self.progress, self.diloco.round
        own = round - (commit is not None)
        if own > before:
            self.metrics.write("membership", change="caught up", round=own, missed=own - before)
        if commit is None:
            return
        if commit.reduced.weight == 0:
            self.metrics.warn(f"round {round} moved nothing: no worker's pseudo-gradient was finite")
        if commit.members != progress.members:
            if set(progress.members) - set(commit.members):
                self.saving.hasten()
            self.metrics.write("membership", change="quorum", members=commit.members, round=round)
        progress.count_commit(commit, self.quorum.id)
        losses = progress.losses
        self.metrics.write(
            "round",
            round=round,
            attempt=commit.attempt,
            step=self.diloco.state.step,
            world_size=len(commit.members),
            members=commit.members,
            loss=sum(losses) / len(losses) if losses else math.nan,
            bytes_sent=commit.bytes_sent,
            bytes_received=commit.bytes_received,
            sync_seconds=commit.seconds,
            exposed_seconds=self.diloco.exposed_seconds,
            seconds=seconds,
            inner_steps=len(losses),
            samples=len(losses) * self.config.batch_size,
        )

    def _write_end(self, status: str, reason: str = "") -> None:
        self.metrics.write(
            "end",
            status=status,
            reason=reason,
            round=self.diloco.round,
            step=self.diloco.schedule.step,
            skipped_steps=self.progress.skipped,
            samples=self.progress.samples,
            global_hash=self.diloco.state.hash(),
        )
