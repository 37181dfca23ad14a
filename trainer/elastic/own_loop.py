"""A user's own training loop as a worker of a run. `trainer.elastic.join` returns its quorum."""

import atexit
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch.distributed as dist
from torch import Tensor

from trainer.data import SampleOrder
from trainer.diloco.quorum import CatchUp, Commit, OnChunk, RoundReport, Superseded
from trainer.diloco.state import Fragment, GlobalState
from trainer.elastic import evidence
from trainer.elastic.joining import rules_of
from trainer.elastic.keys import SLOT_VARIABLE, verdict
from trainer.elastic.member import ElasticQuorum
from trainer.elastic.moments import Handover, take_over
from trainer.elastic.own_config import config_of, fingerprint_of, recorded
from trainer.elastic.own_samples import Positions, TakenSamples
from trainer.elastic.progress import Progress
from trainer.elastic.slots import register_node, take_slot
from trainer.errors import ConfigError, Interrupted, TrainingError, one_line
from trainer.etcd.client import EtcdClient
from trainer.events import EventLog
from trainer.protocol.records import Cursor, decode
from trainer.timeouts import MemberTimeouts

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.diloco.diloco import DiLoCo

log = logging.getLogger(__name__)

MOST_WORKERS = 64  # of a run; also the limit of `nodes`
ASKED_TO_END = 128 + signal.SIGTERM  # the exit status


class LoopMember:
    """The quorum (`LoopQuorum`) of a user's own loop. See `trainer.elastic.join`.

    On SIGTERM, the process raises SystemExit with status 143 at its next inner step or while it waits for others,
    unless it already has a handler. However the context ends, the worker leaves at once and returns its unused samples.

    Attributes:
        config: The membership's parameters.
        worker: This worker's number in the run.
    """

    def __init__(self, config: "TrainingConfig", slot: int | None, resources: ExitStack) -> None:
        self.config, self._slot, self._resources = config, slot, resources
        self._stopping = threading.Event()
        self._member = ElasticQuorum(config, {}, slot=slot)  # until `enter` knows the loop
        self.worker = self._member.worker
        self._diloco: DiLoCo | None = None
        self._events: EventLog | None = None
        self._end: dict[str, str] = {"status": "stopped", "reason": "asked to leave"}
        self._progress, self._loss = Progress(), math.nan
        self._samples = TakenSamples(config.batch_size)
        self._unused: Positions = ()  # at the end of the last round
        self._before: int | None = None  # the round from which the worker caught up, until that is recorded
        self._round_began = self._step_began = time.perf_counter()
        self._cursor, self._term, self._resumed = Cursor(), 0, False  # from a checkpoint

    @classmethod
    def join(cls, address: str, config: "TrainingConfig | None", parameters: Mapping[str, Any]) -> Self:
        """See `trainer.elastic.join`."""
        config = config_of(address, config, parameters)
        with ExitStack() as resources:
            client = resources.enter_context(EtcdClient.of(config))
            if (result := verdict(client)).terminal:
                raise TrainingError(f"run {config.run_id} is over ({result}): choose another run in {address}")
            slot = None
            if SLOT_VARIABLE not in os.environ:  # otherwise the agent holds it
                lease, node = client.lease(config.lease_ttl), uuid.uuid4().hex
                resources.callback(lease.revoke)
                if (slot := take_slot(client, lease, node, range(MOST_WORKERS))) is None:
                    raise TrainingError(f"run {config.run_id} already has {MOST_WORKERS} workers")
                register_node(lease, node, slot)
            joined = cls(config, slot, resources.pop_all())
        atexit.register(joined.leave)  # for loops that never exit the context, such as a callback's after an error
        return joined

    # For the loop

    @property
    def members(self) -> tuple[str, ...]:
        """The members of the last round, in rank order."""
        return self._member.members

    def report(self, loss: float) -> None:
        """Record the current inner step's loss, for `status` and the event log."""
        self._loss = loss

    def samples(self, n: int) -> Iterator[list[int]]:
        """Batches of `batch_size` indices below `n`, in a random order that all workers share, epoch after epoch.

        No index is used twice in an epoch, no matter which workers join, leave or die. A batch is for one inner step; a
        loop that accumulates gradients splits it. The batches end with the run. As the `batch_sampler` of a
        `DataLoader`, they may be read ahead by fewer than `sync_every` batches.

        Raises:
            ConfigError: `n` is less than 1.
            TrainingError: The loop takes more batches than it makes steps.
        """
        if n < 1:
            raise ConfigError("n", n, "must be the number of samples, at least 1")
        order = SampleOrder(n, self.config.seed)

        def batches() -> Iterator[list[int]]:
            while ranges := self._take():
                positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
                yield order.indices(positions).tolist()

        return batches()

    def leave(self) -> None:
        """Leave the run, unless already done. The end of the context or of the process also does this."""
        atexit.unregister(self.leave)
        self._resources.close()

    # For DiLoCo's context (trainer.diloco.quorum.LoopQuorum)

    def enter(self, diloco: "DiLoCo") -> None:
        if self._diloco is not None:
            raise ValueError("a quorum serves one context: call trainer.elastic.join again for another context")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            world = dist.get_world_size()
            allowed = "the processes of a process group cannot be separate workers: start one process per worker"
            raise ConfigError("WORLD_SIZE", world, allowed)
        self._diloco = diloco
        try:
            with _asked_to_end():
                self._enter(diloco)
        except BaseException:
            self.leave()
            raise

    def _enter(self, diloco: "DiLoCo") -> None:
        # Prepare resources that are released with the membership
        schedule, resources = diloco.schedule, self._resources
        self._catch_sigterm()
        if self.config.run_dir:
            path = Path(self.config.run_dir) / f"worker-{self.worker}" / "metrics.jsonl"
            self._events = resources.enter_context(EventLog(path))
            self._events.capture_warnings()

        # Become a member. Samples are assigned one round ahead, because a data loader may read ahead
        rules = replace(
            rules_of(self.config, MemberTimeouts()), local_steps=schedule.round_steps, total_steps=schedule.total_steps
        )
        rules, fingerprint = replace(rules, prefetch=2), fingerprint_of(self.config, diloco)
        member = ElasticQuorum(self.config, fingerprint, self._stopping, slot=self._slot, rules=rules)
        self._member = member
        resources.callback(lambda: member.leave(self._samples.ledger.rest()))
        self._write("membership", change="joining", run_id=self.config.run_id, member=member.id)
        report = RoundReport(progress={"time": time.time()})
        caught_up = member.join(diloco.state, self._cursor, self._term, report)
        diloco.begin_round()
        diloco.accept(caught_up.assignment)

        # Adopt another member's optimizer state and buffers, unless this worker has its own
        handover = Handover(diloco.inner_optimizer, diloco.model)
        took = diloco.round > 0 and not self._resumed and self._take_over(diloco)
        member.offer("moments", handover)
        self._progress.enter(member.members, member.id)
        self._write_start(diloco)
        if took:
            self._write("membership", change="took moments", round=diloco.round)
        resources.callback(self._write_end)
        self._follow(diloco)
        log.info("worker %d of run %s begins at step %d", self.worker, self.config.run_id, schedule.step)
        self._round_began = self._step_began = time.perf_counter()

    def stepped(self, diloco: "DiLoCo") -> None:
        with _asked_to_end():
            if self._stopping.is_set():
                raise Interrupted
            self._count_step(diloco)
            commit = diloco.after_inner_step(self.config.batch_size)
            self._synchronised(diloco, commit)
            if diloco.schedule.due and not diloco.pending:  # it has caught up, and the round's steps are done
                self._synchronised(diloco, diloco.synchronise())
            self._step_began = time.perf_counter()

    def exit(self, diloco: "DiLoCo", error: BaseException | None) -> None:
        try:
            if error is None and diloco.complete:
                with _asked_to_end():
                    self._finish(diloco)
            elif error is None:
                self._end["reason"] = "the loop ended"
            elif isinstance(error, Exception):
                self._end = {"status": "failed", "reason": one_line(error)}
        finally:
            self.leave()

    def state_dict(self) -> dict[str, Any]:
        joined = self._member.term > 0
        cursor, term = (self._member.base.cursor, self._member.term) if joined else (self._cursor, self._term)
        return {"term": term, "cursor": asdict(cursor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._cursor, self._term, self._resumed = decode(Cursor, state["cursor"]), state["term"], True

    # For DiLoCo (trainer.diloco.quorum.Quorum)

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        """See `trainer.diloco.quorum.Quorum`. This method makes the report."""
        diloco, self._unused = self._attended(), self._samples.close_round()
        progress = {**self._progress.for_status(diloco), "round": diloco.round + 1}
        return self._member.synchronise(
            pseudo_gradient, weight, replace(report, unused=self._unused, progress=progress), fragment, on_chunk
        )

    def superseded(self) -> bool:
        self._attended()
        return self._member.superseded()

    def catch_up(self, state: GlobalState) -> CatchUp:
        self._before = state.round
        return self._member.catch_up(state)

    def announce(self, commit: Commit, state: GlobalState) -> None:
        self._member.announce(commit, state)

    # The loop's course

    def _attended(self) -> "DiLoCo":
        if self._diloco is None:
            raise ValueError("the worker is not a member yet: `with DiLoCo(…, quorum=quorum):` makes it one")
        return self._diloco

    def _take_over(self, diloco: "DiLoCo") -> bool:
        """Adopt another member's inner optimizer and buffers. Returns whether a member offers them."""
        if (found := self._member.fetch_moments()) is None:
            return False
        try:
            take_over(found, diloco.inner_optimizer, diloco.model)
        except (LookupError, RuntimeError, ValueError) as error:
            log.warning("another member's optimizer state does not fit: %s", one_line(error), extra={"event": True})
            return False
        return True

    def _take(self) -> Positions:
        """The positions of the next batch; () if the run is complete, or will be after the batches already taken."""
        diloco = self._attended()
        with _asked_to_end():
            while not diloco.complete:
                if ranges := self._samples.take():
                    return ranges
                total = diloco.schedule.total_steps
                if total is not None and total - diloco.schedule.step <= self._samples.ahead:
                    break
                self._await_samples(diloco)
        return ()

    def _await_samples(self, diloco: "DiLoCo") -> None:
        """Wait until the assignment changes."""
        member, after = self._member, self._samples.ledger.assignment.round_id
        if diloco.pending:
            self._synchronised(diloco, diloco.finish())
            return
        if after == (member.term, diloco.open_round):
            raise TrainingError(
                f"the loop has taken {self._samples.ahead} batches more than it has made inner steps: each step takes "
                "one batch, and a data loader may read ahead (num_workers x prefetch_factor) by fewer than sync_every"
            )
        try:
            diloco.accept(member.assign(after))
        except Superseded:
            diloco.catch_up()
        self._synchronised(diloco, None)

    def _count_step(self, diloco: "DiLoCo") -> None:
        """Record an inner step of the optimizer; `diloco` counts it next."""
        loss, self._loss = self._loss, math.nan
        self._progress.count_step(loss, True, self.config.batch_size)
        positions = self._samples.consume()
        if self._events is not None:
            self._write(
                "step",
                term=self._member.term,
                round=diloco.open_round,
                step=diloco.schedule.position(1),
                loss=loss,
                lr=float(diloco.inner_optimizer.param_groups[0]["lr"]),
                samples=self.config.batch_size,
                positions=positions,
                seconds=time.perf_counter() - self._step_began,
            )

    def _synchronised(self, diloco: "DiLoCo", commit: Commit | None) -> None:
        """Record what has changed, whether or not a round was committed."""
        if self._before is not None:
            before, self._before = self._before, None
            missed, held = max(0, diloco.round - before), evidence.held(self._member, diloco)
            self._write("membership", change="caught up", round=diloco.round, missed=missed, **held)
        self._follow(diloco)
        if commit is not None:
            self._write_round(diloco, commit)

    def _follow(self, diloco: "DiLoCo") -> None:
        """Adopt the last assignment."""
        if self._samples.follow(diloco.assignment, self._member.term):
            self._write("assignment", **evidence.assignment(self._samples.ledger, diloco))

    def _finish(self, diloco: "DiLoCo") -> None:
        """At the end of the run, agree on the final state with the other members."""
        while diloco.complete:
            try:
                self._member.reconcile(diloco.state)
            except Superseded:
                diloco.catch_up()
                self._synchronised(diloco, None)
            else:
                self._member.wait_for_others(saving=False)
                self._member.finish("succeeded")
                self._end = {"status": "complete", "reason": ""}
                return
        log.warning("the run went back to step %d: this worker leaves before the end", diloco.schedule.step)

    def _catch_sigterm(self) -> None:
        """Make SIGTERM end the loop between two steps, unless the loop has its own handler."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: self._stopping.set())
            self._resources.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)

    # Events

    def _write(self, event: str, **fields: Any) -> None:
        if self._events is not None:
            self._events.write(event, **fields)

    def _write_start(self, diloco: "DiLoCo") -> None:
        self._write(
            "start",
            **evidence.process_of(self.config.run_id, self._member, diloco),
            device=str(next(diloco.model.parameters()).device),
            processes=1,
            config=recorded(self.config, diloco),
            ramp=1,
            **evidence.held(self._member, diloco),
        )

    def _write_round(self, diloco: "DiLoCo", commit: Commit) -> None:
        """Record a round in which this worker took part."""
        progress, now = self._progress, time.perf_counter()
        if commit.members != progress.members:
            self._write("membership", change="quorum", members=commit.members, round=diloco.round)
        progress.bytes += (commit.bytes_sent or 0) + (commit.bytes_received or 0)
        progress.enter(commit.members, self._member.id)
        self._write(
            "round",
            seconds=now - self._round_began,
            **evidence.round_of(diloco, commit, progress.losses, self.config.batch_size),
            **evidence.agreed(commit, self._unused),
        )
        progress.losses.clear()
        self._round_began = now

    def _write_end(self) -> None:
        diloco = self._attended()
        self._write(
            "end",
            **self._end,
            **evidence.end_of(diloco, self._progress),
            **evidence.left(self._member, self._samples.ledger),
        )


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """End the process with the exit status of SIGTERM if it was asked to end."""
    try:
        yield
    except Interrupted:
        raise SystemExit(ASKED_TO_END) from None
