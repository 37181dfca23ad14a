"""The inner loop: a worker's training from its start to the run's final checkpoint."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeVar

from torch.nn.parallel import DistributedDataParallel

from trainer.config import TrainingConfig
from trainer.device import device_of
from trainer.diloco import Commit, RoundReport, Superseded
from trainer.elastic import evidence
from trainer.elastic.progress import Progress
from trainer.errors import Interrupted, TrainingError
from trainer.events import EventLog
from trainer.island.processes import Island
from trainer.monitor.sinks import sinks
from trainer.process import number_from
from trainer.protocol.records import Range
from trainer.timeouts import WorkerTimeouts
from trainer.volume import Volume
from trainer.worker.ddp import PeerLeft
from trainer.worker.follower import follow
from trainer.worker.optimizer import learning_rate
from trainer.worker.passes import Passes
from trainer.worker.resume import join, offered_moments
from trainer.worker.saving import Saving
from trainer.worker.setup import Parts, build, versions
from trainer.worker.throughput import Throughput, peak_memories

T = TypeVar("T")


def train(config: TrainingConfig) -> int:
    """Train as a worker, or one process of it, under a torchrun agent until the run ends. Returns the exit status.

    Args:
        config: The worker's own (see `trainer.volume.worker_configs`). The data and the model are precached.

    Raises:
        ConfigError: This worker cannot take part with this configuration.
        TrainingError: The run failed, or this worker has to be restarted.
        Interrupted: The process has to end (SIGTERM, SIGINT); everything is saved.
    """
    stopping = threading.Event()
    with _island(config) as island:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        if island and not island.leads:
            return follow(config, island, stopping)
        with Worker.open(config, stopping, island) as worker:
            return worker.run()


@contextmanager
def _island(config: TrainingConfig) -> Iterator[Island | None]:
    """The island that is this worker; None if the worker is this process alone."""
    if not config.island:
        yield None
        return
    with Island.form(config, device_of(config, number_from("LOCAL_RANK"))) as island:
        yield island


class Worker:
    """One worker of a run. `open` builds it; `run` trains to the end."""

    def __init__(
        self, parts: Parts, metrics: EventLog, stopping: threading.Event, timeouts: WorkerTimeouts = WorkerTimeouts()
    ) -> None:
        self.parts, self.metrics, self._stopping, self._timeouts = parts, metrics, stopping, timeouts
        self.process, self.quorum, self.world = parts.process, parts.quorum, parts.world
        self.config, self.samples, self.diloco = self.process.config, self.process.samples, parts.diloco
        self.progress = Progress()
        self.saving = Saving(parts, self.progress, metrics)
        self.passes = Passes(self.process, stopping, self.world)
        self.throughput = Throughput(self.process.device, max(1, self.config.island))
        self._saved_for: tuple[bool, frozenset[str]] = False, frozenset()
        self._round_began, self._unused = time.perf_counter(), tuple[Range, ...]()  # for the open synchronisation
        self._asking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ask the quorum")

    @classmethod
    @contextmanager
    def open(
        cls, config: TrainingConfig, stopping: threading.Event, island: Island | None = None
    ) -> Iterator["Worker"]:
        """Build a worker, in its leading process. At the end, leave the run and close everything."""
        local_rank = number_from("LOCAL_RANK")
        with EventLog(Volume.of(config, local_rank).metrics) as metrics:
            metrics.capture_warnings()
            parts = build(config, stopping, metrics.warn, island)
            samples, root = parts.process.samples, parts.process.volume.root
            metrics.sinks += sinks(config, parts.quorum.worker, root, metrics, local_rank)
            failed = True
            try:
                worker = cls(parts, metrics, stopping)
                with closing(worker.saving):
                    yield worker
                failed = False
            except Interrupted:
                failed = False
                raise
            finally:
                samples.close()
                parts.quorum.leave(samples.ledger.rest())
                if parts.kept:  # after a failure, the agent may restart this worker
                    parts.kept.close(remove=not failed)

    def run(self) -> int:
        """Join the run, train to its end, and return the exit status. Raises the same errors as `train`."""
        self._join()
        try:
            # Train, round by round
            if self.diloco.schedule.step == 0 and self.config.eval_interval:
                self._validate()
            while not self.diloco.complete or not self._final_state_is_agreed():
                self._train_round()

            # The run has succeeded once the final checkpoint is durable
            self.saving.save(complete=True, wait=True)
            self.quorum.wait_for_others()
            self.quorum.finish("succeeded")
        except (Interrupted, PeerLeft):
            # Save the progress. A synchronisation that fails now counts as not started
            if self.diloco.pending:
                with suppress(Interrupted, TrainingError):
                    self._write_round(self._take_result())
            self.saving.save(wait=True)
            self._write_end("stopped", "asked to leave")
            raise
        except Exception as error:
            self._write_end("failed", str(error) or type(error).__name__)
            raise
        self._write_end("complete")
        return 0

    def _join(self) -> None:
        """Become a member of the run, and continue from the run's state."""
        self.metrics.write("membership", change="joining", run_id=self.config.run_id, member=self.quorum.id)
        changes = join(self.parts, self.progress, self.metrics.warn)
        self.progress.enter(self.quorum.members, self.quorum.id)
        self.saving.last_step = self.diloco.schedule.step
        process = self.process
        if self.world is not None:
            process.loss = DistributedDataParallel(process.loss, broadcast_buffers=False)
        self.moments = offered_moments(self.parts)
        self.quorum.offer("moments", self.moments)

        self.metrics.write(
            "start",
            **evidence.process_of(self.config.run_id, self.quorum, self.diloco),
            device=str(process.device),
            processes=process.island.size if process.island else 1,
            dataset=process.dataset.manifest.hash,
            config=self.config.model_dump(mode="json"),
            versions=versions(),
            ramp=self.progress.ramp,
            links=dict(self.metrics.links),
            **evidence.held(self.quorum, self.diloco),
        )
        if self.samples.ledger.assignment.ranges:
            self.metrics.write("assignment", **evidence.assignment(self.samples.ledger, self.diloco))
        for change in changes:
            self.metrics.write("membership", change=change, round=self.diloco.round)
        self.metrics.write("membership", change="joined", members=self.quorum.members, round=self.diloco.round)

    def _train_round(self) -> None:
        """Make a round's inner steps, synchronise, and then validate and save if due."""
        diloco, self._round_began = self.diloco, time.perf_counter()
        self.progress.losses.clear()
        commit = None
        while commit is None and not diloco.complete:  # do whatever can be done next
            if diloco.blocked or (diloco.pending and self.samples.exhausted):
                commit = self._finish_synchronisation()
            elif not diloco.pending and self.quorum.superseded():
                self._catch_up()
            elif diloco.schedule.due:
                # The round ends here: report to the other members
                unused, speed = self.samples.ledger.close_round(), self.parts.speed.end_round()
                self._unused = unused
                self.saving.make_room()
                diloco.start(RoundReport(unused, speed, self.progress.for_status(diloco)))
            elif self.samples.exhausted:
                self._take_assignment()
            else:
                if self.world is not None:
                    self.world.check_stopping()
                elif self._stopping.is_set():
                    raise Interrupted
                self._attend()
                with self.parts.speed.timing():
                    self._inner_step()
        self._write_round(commit)

        # Validate and save at their intervals
        last = diloco.complete
        interval = self.config.eval_interval * self.config.fragments
        if interval and (last or diloco.round % interval == 0):
            self._validate()
        if not last and self.saving.due:
            self.saving.save()

    def _inner_step(self) -> None:
        """Make one inner step, over batches that add up to `batch_size`."""
        started, diloco = time.perf_counter(), self.diloco
        round, step = diloco.open_round, diloco.schedule.position(1)

        # The learning rate follows the schedule; a joiner's ramps up while its moments build up
        ramp = min(1.0, (self.progress.steps + 1) / self.progress.ramp)
        lr = learning_rate(diloco.schedule.position(), self.config) * ramp
        made = self.passes.step(lr)

        # Account for the step and report it
        samples = self.config.batch_size if made.finite else 0
        positions = self.samples.consume()
        self.progress.count_step(made.loss, made.finite, samples)
        self.throughput.count(made.tokens, made.flops)
        self.metrics.write(
            "step",
            term=self.quorum.term,
            round=round,
            step=step,
            loss=made.loss,
            lr=lr,
            gradient_norm=made.gradient_norm,
            samples=samples,
            positions=positions,
            tokens=made.tokens,
            seconds=time.perf_counter() - started,
        )
        if not made.finite:
            self._on_skipped(step)
        diloco.count_step(samples)

    def _on_skipped(self, step: float) -> None:
        """Warn about a skipped step; end the run if there were too many in a row."""
        self.metrics.warn(f"step {step:g} is skipped: its loss or gradient is not finite")
        in_a_row, limit = self.progress.skipped_in_a_row, self.config.max_skipped_steps
        if in_a_row > limit:
            reason = (
                f"{in_a_row} inner steps in a row had a loss or gradient that is not finite "
                f"(max_skipped_steps = {limit}): try a lower lr or a longer warm-up"
            )
            if self.world is not None or len(self.quorum.members) <= 1:  # otherwise the others' losses may be finite
                self.quorum.finish("failed", reason)  # a restart would end the same way
            raise TrainingError(reason)

    # Rounds

    def _finish_synchronisation(self) -> Commit | None:
        """Wait for the pending synchronisation, and continue after its outer step."""
        while not self.diloco.wait(self._timeouts.poll):
            self._attend()
        commit = self._take_result()
        self._accept()
        return commit

    def _take_result(self) -> Commit | None:
        """Take the outer step of the finished synchronisation; None if the worker caught up instead."""
        before = self.diloco.round
        self.saving.make_room()
        commit = self.diloco.finish()
        if commit is None:
            self._write_caught_up(before)
        return commit

    def _catch_up(self) -> None:
        """Continue after a round that was committed without this worker."""
        before = self.diloco.round
        self.saving.make_room()
        self.diloco.catch_up()
        self._write_caught_up(before)
        self._accept()

    def _accept(self) -> None:
        """Adopt the quorum's last assignment."""
        if self.samples.accept(self.diloco.assignment, self.quorum.term):
            self.metrics.write("assignment", **evidence.assignment(self.samples.ledger, self.diloco))

    def _take_assignment(self) -> None:
        """Wait until this worker has samples to train on."""
        try:
            self.diloco.accept(self._ask(self.quorum.assign, self.samples.ledger.assignment.round_id))
        except Superseded:
            self._catch_up()
        else:
            self._accept()

    def _final_state_is_agreed(self) -> bool:
        """Whether most members hold the same final state as this worker; if not, this worker has now caught up."""
        try:
            self._ask(self.quorum.reconcile, self.diloco.state)
        except Superseded:
            self._catch_up()
            return False
        return True

    def _ask(self, request: Callable[..., T], argument: Any) -> T:
        """Ask the quorum on another thread, and meanwhile save if the answer has to wait for missing members."""
        answer = self._asking.submit(request, argument)
        while not wait_for([answer], self._timeouts.poll).done:
            self._attend()
        return answer.result()

    def _attend(self) -> None:
        """Serve joiners, and save if workers leave. Called between two steps and while waiting.

        Save once when too few workers are left to continue, because the run may end before the next save; and when some
        leave, because they may hold the only copy of the newest state.
        """
        self.moments.refresh()
        reasons = self.quorum.shortage, self.quorum.departing
        if (reasons[0] and not self._saved_for[0]) or reasons[1] - self._saved_for[1]:
            self.saving.save()
        self._saved_for = reasons

    def _validate(self) -> None:
        """Score the global parameters on this worker's part of the held-out samples."""
        diloco, progress, started = self.diloco, self.progress, time.perf_counter()
        with diloco.global_parameters():
            sums, samples = self.passes.score(progress.rank, progress.world_size)
        if sums:  # not if there are more workers than samples
            scores, place = self.process.task.metrics(sums), {"round": diloco.round, "step": diloco.schedule.step}
            progress.held_out = scores["loss"] if math.isfinite(scores["loss"]) else None
            seconds = time.perf_counter() - started
            self.metrics.write("eval", **place, samples=samples, seconds=seconds, **scores)

    # Events

    def _write_caught_up(self, before: int) -> None:
        """Report that this worker has adopted the others' state; `before` is the round of its previous one."""
        self.parts.keep_state()
        missed = max(0, self.diloco.round - before)
        held = evidence.held(self.quorum, self.diloco)
        self.metrics.write("membership", change="caught up", round=self.diloco.round, missed=missed, **held)

    def _write_round(self, commit: Commit | None) -> None:
        """Report a round, if this worker took part in it."""
        if commit is None:
            return
        self.parts.keep_state()
        progress, round, seconds = self.progress, self.diloco.round, time.perf_counter() - self._round_began
        if commit.reduced.weight == 0:
            self.metrics.warn(f"round {round} changed nothing: no worker's pseudo-gradient was finite")
        if commit.members != progress.members:
            if set(progress.members) - set(commit.members):
                # A member that is gone may have had the newest checkpoint, so make one due
                self.saving.last_step = -self.config.checkpoint_interval
            self.metrics.write("membership", change="quorum", members=commit.members, round=round)
        progress.bytes += (commit.bytes_sent or 0) + (commit.bytes_received or 0)
        progress.enter(commit.members, self.quorum.id)
        island, device = self.process.island, self.process.device
        memories = island.run("memory") if island else peak_memories(device, None)
        self.metrics.write(
            "round",
            seconds=seconds,
            peak_memory=max(memories),
            peak_memories=memories,
            **evidence.round_of(self.diloco, commit, progress.losses, self.config.batch_size),
            **self.throughput.end_round(seconds),
            **evidence.agreed(commit, self._unused),
        )

    def _write_end(self, status: str, reason: str = "") -> None:
        self.metrics.write(
            "end",
            status=status,
            reason=reason,
            **evidence.end_of(self.diloco, self.progress),
            **evidence.left(self.quorum, self.samples.ledger),
        )
