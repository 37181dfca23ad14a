"""A whole run in simulated time, and the promises that must hold; see `test_model`."""

import heapq
import itertools
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tests.unit.protocol.model_etcd import FAULTS_END, PATIENCE, POLL, Etcd, Fault, Tensors, Thread, positions_of
from tests.unit.protocol.model_process import Checkpoint, Process
from trainer.protocol.history import History, Life
from trainer.protocol.proof import judge
from trainer.protocol.records import (
    Assignment,
    Outcome,
    RoundState,
    Rules,
    View,
    decode,
    encoded,
    view_of,
)


@dataclass
class World:
    """The run: its etcd, its processes, its faults, and what must hold."""

    seed: int
    faults: tuple[Fault, ...]
    rules: Rules
    nodes: int
    carry: bool
    speeds: tuple[float, ...]
    now: float = 0.0
    calm: bool = False
    shaky_until: float = 0.0
    processes: dict[str, Process] = field(default_factory=dict)
    volumes: dict[int, Checkpoint] = field(default_factory=dict)
    trace: list[tuple[float, str, Any]] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self.queue: list[Any] = []
        self.count = itertools.count()
        self.random = random.Random(f"{self.seed}/world")
        self.etcd = Etcd(self)
        self.meetings: dict[tuple[int, int, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
        self.quorums: dict[tuple[int, int, int], tuple[str, ...]] = {}
        self.commits: dict[tuple[int, int], Outcome] = {}
        self.states: dict[tuple[int, int], Tensors] = {}
        self.known: dict[str, Tensors] = {"initial": Tensors()}
        self.consumed: dict[int, dict[int, str]] = defaultdict(dict)
        self.assigned: dict[int, list[tuple[str, Assignment]]] = defaultdict(list)
        self.given_up: set[int] = set()
        self.walls: dict[frozenset[int], float] = {}  # workers that cannot talk to each other, and until when
        self.lease_lost: set[str] = set()
        self.left: set[str] = set()  # processes that have returned their samples
        for fault in self.faults:
            self.at(fault.at, fault)
        self.at(FAULTS_END, self.make_calm)

    # Time

    def at(self, when: float, what: Any) -> None:
        heapq.heappush(self.queue, (when, next(self.count), what))

    def start(self, process: Process, name: str, thread: Thread) -> None:
        self.at(self.now, (process, name, thread))

    def run(self) -> None:
        """Until all are in the quorum, or have completed the run."""
        looked = 0.0
        while True:
            when, _, what = heapq.heappop(self.queue)
            self.now = max(self.now, when)
            if self.calm and self.now > looked + POLL:
                looked = self.now
                if self.at_rest():
                    return
            assert self.now < FAULTS_END + PATIENCE, f"no progress: {self.describe()}"
            if isinstance(what, Fault):
                self.strike(what)
            elif callable(what):
                what()
            else:
                self.resume(*what)

    def resume(self, process: Process, name: str, thread: Thread) -> None:
        if process.dead or (process.leaving and name != "main"):
            return
        if process.frozen_until > self.now:
            self.at(process.frozen_until, (process, name, thread))
            return
        self.events += 1
        try:
            yielded = next(thread)
        except StopIteration:
            return
        if isinstance(yielded, str):
            delay = self.delay(process.random)
            for fault in process.armed:
                if fault.where == yielded and not self.calm:
                    process.armed.remove(fault)
                    self.strike(replace(fault, where=""))
                    break
        else:
            delay = yielded * (0.8 + 0.4 * process.random.random())
        self.at(self.now + delay, (process, name, thread))

    def delay(self, random: random.Random) -> float:
        chance = random.random()
        if self.calm or chance < 0.85:
            return 0.05 * random.random()
        return (0.6 if chance < 0.97 else 5.0) * random.random()

    # Faults

    def of(self, worker: int) -> Process | None:
        alive = [process for process in self.processes.values() if process.worker == worker and not process.dead]
        return alive[-1] if alive else None

    def strike(self, fault: Fault) -> None:
        if self.calm:
            return
        process, until = self.of(fault.worker), min(self.now + fault.seconds, FAULTS_END)
        if fault.what == "etcd away":
            self.etcd.away = True
            self.at(until, self.etcd.back)
        elif fault.what == "shaky collectives":
            self.shaky_until = until
        elif fault.what == "wall":
            self.walls[frozenset((fault.worker, (fault.worker + 1) % self.nodes))] = until
        elif fault.what == "start":
            if process is None:
                self.launch(fault.worker)
        elif fault.what == "launch again":  # an etcd of its own: what belonged to the processes is deleted
            for other in self.live():
                other.dead = True
            self.etcd.forget()
            for worker in range(self.nodes):
                self.at(self.now + 1, partial(self.launch_if_gone, worker))
        elif process is None:
            return
        elif fault.where:
            process.armed.append(fault)
            return
        elif fault.what == "kill":
            process.dead = True
        elif fault.what == "lose volume":
            process.dead = True
            self.volumes.pop(fault.worker, None)
        elif fault.what == "kill all":
            for other in self.live():
                other.dead = True
        elif fault.what == "freeze":
            process.frozen_until = until
        elif fault.what == "cut":
            process.cut_until = until
        elif fault.what == "slow":
            process.slow_until = until
        elif fault.what == "leave":
            process.stopping = True
        elif fault.what == "lose lease":
            if process.lease:
                self.etcd.lose(process.lease)
        elif fault.what == "flip":
            process.flip = True
        else:
            raise AssertionError(fault)
        self.trace.append((self.now, "fault", (str(fault),)))

    def launch(self, worker: int) -> None:
        incarnation = sum(process.worker == worker for process in self.processes.values())
        process = Process(self, worker, incarnation)
        self.processes[process.id] = process

    def launch_if_gone(self, worker: int) -> None:
        if self.of(worker) is None:
            self.launch(worker)

    def died(self, process: Process) -> None:
        """Its agent revokes its lease, and starts it again."""
        process.dead = True
        self.etcd.lose(process.lease)
        self.at(self.now + 1, partial(self.launch_if_gone, process.worker))

    def make_calm(self) -> None:
        """No more faults; agents start again what has died or left."""
        self.calm = True
        for worker in sorted({*range(self.nodes), *self.volumes}):
            self.launch_if_gone(worker)
        self.at(self.now + 1, self.make_calm)

    def history(self) -> History:
        """What the processes have recorded: the same evidence as the files of a real run."""
        return History(tuple(Life(f"{one.worker}", one.id, tuple(one.events)) for one in self.processes.values()))

    # What processes know of each other

    def live(self) -> list[Process]:
        return [process for process in self.processes.values() if not process.dead]

    def connected(self, one: str, other: str) -> bool:
        pair = frozenset((self.processes[one].worker, self.processes[other].worker))
        return self.walls.get(pair, 0.0) <= self.now

    def answers(self, id: str) -> bool:
        process = self.processes[id]
        return not process.dead and max(process.frozen_until, process.cut_until) <= self.now

    def holding(self, record: RoundState, other: Process) -> list[Process]:
        return [
            process
            for process in self.live()
            if process is not other
            and self.answers(process.id)
            and (process.machine.term, process.state.round) == (record.term, record.base.round)
        ]

    def mean(self, term: int, round: int) -> tuple[Any, int] | None:
        for process in self.live():
            for mean in process.means if self.answers(process.id) else ():
                if mean[:2] == (term, round):
                    return mean[2:]
        return None

    # What must hold

    def transition(self, process: Process, old: RoundState | None, new: RoundState) -> None:
        view = view_of(process.listed)
        process.log("decides", new.attempt_id, new.phase, new.members or new.expected, new.assignments)
        if self.random.random() < 0.02:
            assert decode(RoundState, json.loads(json.dumps(encoded(new)))) == new
        if new.phase == "reduce":
            assert old is not None
            if old.phase == "gather":
                assert len({view.members[id].node for id in new.members}) >= self.rules.min_nodes
            assert self.quorums.setdefault(new.attempt_id, new.members) == new.members, "two quorums for one attempt"
        if old is None or new.term != old.term:
            newest = max(member.held for member in view.members.values())
            assert new.lost or newest >= view.durable, "what was durable is given up"
            assert old is None or new.term == old.term + 1
            assert not {term for term, _ in self.states if term >= new.term}
            state = self.known[new.base.hash]
            assert (state.round, state.step) == (new.base.round, new.base.step)
            self.states[new.term, new.base.round] = state
            self.consumed[new.term] = dict.fromkeys(state.positions, "the base")
        else:
            assert new.attempt_id >= old.attempt_id
            if new.round != old.round:
                self.committed(old, new)
        self.check_ledger(old if old and old.term == new.term else None, new, view)

    def committed(self, old: RoundState, new: RoundState) -> None:
        outcome = new.committed
        assert outcome is not None and (outcome.term, outcome.round, outcome.attempt) == old.attempt_id
        assert outcome.members == self.quorums[old.attempt_id]
        assert (new.term, outcome.round) not in self.commits, "a round is committed twice"
        self.commits[new.term, outcome.round] = outcome
        contributions = tuple(self.meetings[old.attempt_id].get(id, ()) for id in outcome.members)
        assert outcome.hash == repr(contributions), "members that have not reduced are counted"
        state = self.states[new.term, old.base.round].apply(contributions, old.length)
        assert (state.round, state.step) == (new.base.round, new.base.step)
        self.states[new.term, state.round] = state

    def check_ledger(self, old: RoundState | None, new: RoundState, view: View) -> None:
        assigned = [part for assignment in new.assignments.values() for part in assignment.ranges]
        ranges = sorted([*assigned, *new.cursor.returned, (new.cursor.position, 1 << 60)])
        for (_, stop), (start, _) in itertools.pairwise(ranges):
            assert stop <= start, f"samples are assigned twice: {ranges}"
        counted = self.states[new.term, new.base.round].positions
        free = set(positions_of(new.cursor.returned))
        for id, assignment in new.assignments.items():
            if old is None or old.assignments.get(id) != assignment:
                self.assigned[new.term].append((id, assignment))
                # With overlap, a member goes on using what its arrival called unused.
                arrival = view.arrivals.get(id) if self.rules.prefetch > 1 else None
                kept = set(positions_of(arrival.unused if arrival else ()))
                free.update(set(positions_of(assignment.ranges)) - kept)
        assert not free & counted, f"samples {sorted(free & counted)} are assigned again although they are counted"
        twice = free & self.consumed[new.term].keys()
        assert not twice, f"samples {sorted(twice)} are assigned again although they have been consumed"

    def consume(self, process: Process, positions: list[int]) -> None:
        consumed = self.consumed[process.machine.term]
        for position in positions:
            consumed[position] = process.id

    def committing(self, process: Process, outcome: Outcome) -> None:
        assert outcome == self.commits[outcome.term, outcome.round]

    def holds_right_state(self, process: Process) -> None:
        right = self.states[process.machine.term, process.state.round]
        assert process.state.positions == right.positions, f"{process.id} holds another state than the others"

    def at_rest(self) -> bool:
        live = self.live()
        if self.rules.total_steps is not None:
            done = [process for process in live if process.done]
            # A process that cannot get the final state from those that are done ends, because the run is complete.
            if not done or (len(done) < len(live) and self.now < FAULTS_END + PATIENCE / 2):
                return False
            live = done
            assert len({process.state.positions for process in live}) == 1, "states differ at the end"
        else:
            newest = self.etcd.records[-1].committed if self.etcd.records else None
            if newest is None or {process.id for process in live} != set(newest.members):
                return False
            record = self.etcd.records[-1]
            if any(process.machine.superseded(record) for process in live) or record.assignments.keys() & self.left:
                return False  # the check below needs all ledgers in one state
        self.check_losses()
        self.prove()
        return True

    def prove(self) -> None:
        """The recorded events prove what `python -m trainer verify` claims of real runs, by the same code."""
        found = [(claim.name, claim.findings[0]) for claim in judge(self.history()) if claim.findings]
        assert not found, f"refuted: {found[0][0]}: {found[0][1].text} {found[0][1].where}"

    def check_losses(self) -> None:
        """Every sample is counted, or can still be, or was lost with a process that died, left, or dropped it."""
        record = self.etcd.records[-1]
        live = {process.id: process for process in self.live()}
        there = set(self.states[record.term, record.base.round].positions) | set(positions_of(record.cursor.returned))
        if record.length == 0:  # the ledger is closed
            there.update(p for assignment in record.assignments.values() for p in positions_of(assignment.ranges))
        for process in live.values():
            there.update(process.work, process.carried)
            if process.ledger.assignment.term == process.machine.term:
                there.update(positions_of(process.ledger.unused()))
            if process.pending:
                there.update(process.pending.work, process.pending.carried)
            assignment = record.assignments.get(process.id)
            if assignment is not None and assignment.round_id > process.ledger.assignment.round_id:
                there.update(positions_of(assignment.ranges))
        owners = {
            position: id
            for id, assignment in self.assigned[record.term]
            for position in positions_of(assignment.ranges)
        }
        for position, id in owners.items():
            if position in there or position in self.given_up:
                continue
            consumed = position in self.consumed[record.term]
            returned = id in self.left and id not in self.lease_lost
            excused = (id not in live and (consumed or not returned)) or (not consumed and id in self.lease_lost)
            assert excused, f"sample {position}, assigned to {id}, is lost"

    def describe(self) -> str:
        record = self.etcd.records[-1] if self.etcd.records else None
        members = [
            f"{process.id}: term {process.machine.term} round {process.state.round} inner steps {process.inner_steps} "
            f"{process.ledger} {'done' if process.done else ''}"
            for process in self.live()
        ]
        return "\n".join([str(record), *members])
