"""The cost of the protocol with many members: simulated members without tensors, on one real etcd.

    python tests/benchmarks/bench_members.py [--members 1000] [--rounds 10] [--churn 0.01]

Each simulated member runs the shipped `MemberMachine`, has its own keys and lease, and makes the same etcd requests as
a real one; a real `Coordinator` decides. All members in a process share a connection and one watch of the record,
because one machine has to simulate them all. In each round, a fraction `churn` of the members die (their leases are
revoked, as an agent does) and the same number join. Printed: the seconds from the opening of a round until its quorum
is decided and until it is committed, and the etcd requests per member and round, which must not grow with the number of
members.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.elastic.coordinator import Coordinator
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import write_json
from trainer.process import listen
from trainer.protocol.effects import Announce, AwaitRound, Effect, HashState, Machine, Put, Reduce, Suspects
from trainer.protocol.member import MemberMachine
from trainer.protocol.records import Member, RoundState, Rules, State, Vote, decode, encoded

ROOT = Path(__file__).parents[2]
PREFIX = "/bench/run"
TTL = 60.0


class SimulatedMember:
    """A member without tensors: its inner steps take no time, its collective always succeeds."""

    def __init__(self, client: EtcdClient, rules: Rules, address: str, number: int) -> None:
        self.client = client
        self.lease = client.grant(TTL)
        self.requests = 0
        self.me = Member(str(number), number, 0, (address,), State(hash="0"))
        self.machine = MemberMachine(f"{number:06d}-{os.urandom(4).hex()}", rules)
        self.record: RoundState | None = None
        self.life = self.live()
        registration = next(self.life)
        assert isinstance(registration, Put)
        self._put(registration.key, registration.record, registration.leased)
        self.effect: Effect = self.life.send(None)

    def live(self) -> Machine[None]:
        """Join without catching up (there is no state), then synchronise round after round."""
        yield from self.machine.register(self.me, 0)
        record: RoundState = yield AwaitRound("the run to start")
        self.machine.term, self.machine.base = record.term, record.base
        while True:
            yield from self.machine.assign((0, 0))
            if (yield from self.machine.synchronise((), 0.0)) is None:  # the round was committed without it
                assert self.record is not None
                self.machine.term, self.machine.base = self.record.term, self.record.base
            yield Announce(self.machine.base)

    def react(self, record: RoundState) -> None:
        """Perform effects until the member waits for another record."""
        self.record, fresh = record, True
        while True:
            result: Any = None
            match self.effect:
                case AwaitRound(_, again):
                    if again and not fresh:
                        return
                    result, fresh = record, False
                case Put(key, value, leased):
                    self._put(key, value, leased)
                case Announce(base):
                    self._put(
                        f"members/{self.machine.id}", replace(self.me, holds=replace(base, hash=_hash(base))), True
                    )
                case HashState():
                    result = _hash(self.machine.base)
                case Suspects():
                    result = ()
                case Reduce(reduced):
                    result = Vote(*reduced.attempt_id, f"mean {reduced.round}", 1.0)
                case effect:
                    raise AssertionError(effect)
            self.effect = self.life.send(result)

    def die(self) -> None:
        self.client.revoke(self.lease)

    def _put(self, key: str, value: Any, leased: bool) -> None:
        self.requests += 1
        self.client.put(key, encoded(value), self.lease if leased else 0)


def _hash(base: State) -> str:
    return f"state {base.round}" if base.round else "0"


def host(
    endpoint: str, rules: Rules, address: str, first: int, count: int, churn: float, ended: Any, results: Any
) -> None:
    """A process that simulates `count` members."""
    client = EtcdClient([endpoint], PREFIX)
    members = {number: SimulatedMember(client, rules, address, number) for number in range(first, first + count)}
    changed = threading.Event()
    dying = max(1, round(count * churn)) if churn else 0
    revision, last_round, victim = 0, 0, first
    requests: list[float] = []
    with client.watch("round", changed.set):
        while not ended.is_set():
            changed.wait(1.0)
            changed.clear()
            entry = client.get("round")
            if entry is None or entry.revision == revision:
                continue
            revision, record = entry.revision, decode(RoundState, entry.value)
            if record.round > last_round and record.round > 1:
                requests.append(statistics.fmean(member.requests for member in members.values()))
                for member in members.values():
                    member.requests = 0
                for _ in range(dying):
                    members[victim].die()
                    members[victim] = SimulatedMember(client, rules, address, victim)
                    victim = first + (victim - first + 7) % count
            last_round = record.round
            for member in members.values():
                member.react(record)
    results.put(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--churn", type=float, default=0.01, help="fraction of the members that die and join each round"
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rules = Rules(
        min_nodes=max(1, arguments.members // 2),
        max_members=arguments.members,
        grace_period=10.0,
        retry_period=5.0,
        forget_period=60.0,
        stall_limit=600.0,
        local_steps=1,
        total_steps=None,
        batch_size=1,
    )
    with tempfile.TemporaryDirectory() as directory, EmbeddedEtcd(Path(directory)) as etcd:
        ended, results = context.Event(), context.Queue()
        answering = listen("127.0.0.1")  # the port of all members
        address = f"127.0.0.1:{answering.getsockname()[1]}"
        size = arguments.members // arguments.processes
        rest = (size, arguments.churn, ended, results)
        hosts = [
            context.Process(target=host, args=(etcd.endpoint, rules, address, number * size, *rest))
            for number in range(arguments.processes)
        ]
        for process in hosts:
            process.start()
        client = EtcdClient([etcd.endpoint], PREFIX)
        coordinator = Coordinator(EtcdClient([etcd.endpoint], PREFIX), "coordinator", rules, TTL)
        phases = follow(client, arguments.rounds)
        ended.set()
        requests = [count for _ in hosts for count in results.get()[1:]]
        for process in hosts:
            process.join()
        coordinator.close()
        answering.close()
    print(f"{'round':>6}{'members':>9}{'gathered (s)':>14}{'reduced (s)':>13}{'round (s)':>11}")
    for row in phases:
        print(f"{row['round']:>6}{row['members']:>9}{row['gather']:>14.2f}{row['reduce']:>13.2f}{row['total']:>11.2f}")
    total = statistics.median(row["total"] for row in phases)
    per_round = statistics.fmean(requests) if requests else 0.0
    print(
        f"median round {total:.2f} s with {arguments.members} members, {arguments.churn:.1%} dying and joining each "
        f"round; {per_round:.2f} etcd requests per member and round"
    )
    write_json(ROOT / "build" / f"members-{arguments.members}.json", {"rounds": phases, "requests": per_round})


def follow(client: EtcdClient, rounds: int) -> list[dict[str, float]]:
    """For each round, the seconds of its gather and of its reduce."""
    seen: dict[tuple[int, str], float] = {}
    sizes: dict[int, int] = {}
    changed = threading.Event()
    with client.watch("round", changed.set):
        while True:
            entry = client.get("round")
            if entry is not None:
                record = decode(RoundState, entry.value)
                seen.setdefault((record.round, record.phase), time.perf_counter())
                if record.committed:
                    sizes[record.committed.round] = len(record.committed.members)
                if record.round > rounds + 1:
                    break
            changed.wait(0.02)
            changed.clear()
    rows = []
    for round in range(2, rounds + 2):  # the first one waits for all members to start
        marks = (seen.get((round, "gather")), seen.get((round, "reduce")), seen.get((round + 1, "gather")))
        if all(mark is not None for mark in marks):
            opened, reduced, committed = marks
            gather, reduce = reduced - opened, committed - reduced  # type: ignore[operator]
            rows.append(
                {"round": round, "members": sizes[round], "gather": gather, "reduce": reduce, "total": gather + reduce}
            )
    return rows


if __name__ == "__main__":
    main()
