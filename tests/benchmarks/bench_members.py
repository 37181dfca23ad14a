"""What the protocol costs with many members: simulated ones, without tensors, on one real etcd.

    python tests/benchmarks/bench_members.py [--members 1000] [--rounds 10] [--churn 0.01]

Each simulated member has its own keys and lease and makes the same etcd requests as a real one, by the same `action`;
a real `Decider` decides. All of one process's members share a connection and one watch of the record, because one
machine has to play them all. Each round, `churn` of the members die (their leases are revoked, as an agent does)
and as many join. Printed: the seconds from the last arrival until the quorum is decided, from the last vote until it is
committed, and the etcd requests of a member in a round, which must not grow with the number of members.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.elastic.coordinator import Decider
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import write_json
from trainer.process import listen
from trainer.protocol.rounds import Arrival, Outcome, Progress, Ready, Record, Rules, State, Vote, action

ROOT = Path(__file__).parents[2]
PREFIX = "/bench/run"
TTL = 60.0


class Member:
    """A member without tensors: its inner steps take no time, its collective always succeeds."""

    def __init__(self, client: EtcdClient, address: str, number: int) -> None:
        self.id = f"{number:06d}-{os.urandom(4).hex()}"
        self.client, self.number = client, number
        self.lease = client.grant(TTL)
        self.requests = 0
        self.place = {"slot": number, "local_rank": 0, "node": str(number), "address": address}
        self._hold(State(hash="0"))
        self.progress: Progress | None = None

    def react(self, record: Record) -> None:
        """Do what `action` says, until it says wait."""
        if self.progress is None:
            if self.id in record.shares:
                self.progress = Progress(record.term, record.round, _hash(record.base))
            else:
                self._put(f"ready/{self.id}", asdict(Ready(record.term, record.round - 1)))
                return
        while (what := action(self.id, self.progress, record, _outcome(record, self.progress.round))) != "wait":
            if what == "arrive":
                arrival = Arrival(self.progress.term, self.progress.round, record.attempt, self.progress.state)
                self._put(f"arrivals/{self.id}", asdict(arrival))
                self.progress = replace(self.progress, arrived=record.attempt)
            elif what == "reduce":
                self._put(f"votes/{self.id}", asdict(Vote(*record.place, f"mean {record.round}", 1.0)))
                self.progress = replace(self.progress, voted=record.attempt)
            else:  # applied, or caught up
                self.progress = Progress(record.term, record.round, _hash(record.base))
                self._hold(record.base)

    def die(self) -> None:
        self.client.revoke(self.lease)

    def _hold(self, state: State) -> None:
        self._put(f"members/{self.id}", {**self.place, "holds": asdict(state), "speed": 0.0}, self.lease)

    def _put(self, key: str, value: dict[str, Any], lease: int = 0) -> None:
        self.requests += 1
        self.client.put(key, value, lease)


def _hash(base: State) -> str:
    return f"state {base.round}" if base.round else "0"


def _outcome(record: Record, round: int) -> Outcome | None:
    return record.committed if record.committed and record.committed.round == round else None


def host(endpoint: str, store: str, first: int, count: int, churn: float, ended: Any, results: Any) -> None:
    """A process that plays `count` members."""
    client = EtcdClient([endpoint], PREFIX)
    members = {number: Member(client, store, number) for number in range(first, first + count)}
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
            revision, record = entry.revision, Record.from_json(entry.value)
            if record.round > last_round and record.round > 1:
                requests.append(statistics.fmean(member.requests for member in members.values()))
                for member in members.values():
                    member.requests = 0
                for _ in range(dying):
                    members[victim].die()
                    members[victim] = Member(client, store, victim)
                    victim = first + (victim - first + 7) % count
            last_round = record.round
            for member in members.values():
                member.react(record)
    results.put(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--churn", type=float, default=0.01, help="share of the members that die, and join, each round")
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
        answering = listen("127.0.0.1")  # all of them live
        store = f"127.0.0.1:{answering.getsockname()[1]}"
        share = arguments.members // arguments.processes
        rest = (share, arguments.churn, ended, results)
        hosts = [
            context.Process(target=host, args=(etcd.endpoint, store, number * share, *rest))
            for number in range(arguments.processes)
        ]
        for process in hosts:
            process.start()
        client = EtcdClient([etcd.endpoint], PREFIX)
        decider = Decider(EtcdClient([etcd.endpoint], PREFIX), "decider", rules, TTL)
        phases = follow(client, arguments.rounds)
        ended.set()
        requests = [count for _ in hosts for count in results.get()[1:]]
        for process in hosts:
            process.join()
        decider.close()
        answering.close()
    print(f"{'round':>6}{'members':>9}{'gathered (s)':>14}{'reduced (s)':>13}{'round (s)':>11}")
    for row in phases:
        print(f"{row['round']:>6}{row['members']:>9}{row['gather']:>14.2f}{row['reduce']:>13.2f}{row['total']:>11.2f}")
    total = statistics.median(row["total"] for row in phases)
    per_round = statistics.fmean(requests) if requests else 0.0
    print(
        f"median round {total:.2f} s with {arguments.members} members, {arguments.churn:.1%} dying and joining each "
        f"round; {per_round:.2f} etcd requests of a member in a round"
    )
    write_json(ROOT / "build" / f"members-{arguments.members}.json", {"rounds": phases, "requests": per_round})


def follow(client: EtcdClient, rounds: int) -> list[dict[str, float]]:
    """When the record changed: for each round, how long it gathered and how long it reduced."""
    seen: dict[tuple[int, str], float] = {}
    sizes: dict[int, int] = {}
    changed = threading.Event()
    with client.watch("round", changed.set):
        while True:
            entry = client.get("round")
            if entry is not None:
                record = Record.from_json(entry.value)
                seen.setdefault((record.round, record.phase), time.perf_counter())
                if record.committed:
                    sizes[record.committed.round] = len(record.committed.members)
                if record.round > rounds + 1:
                    break
            changed.wait(0.02)
            changed.clear()
    rows = []
    for round in range(2, rounds + 2):  # the first one waits for everybody to start
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
