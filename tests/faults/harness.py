"""Runs of the real parts, to be hurt: an etcd, torchrun agents and their workers as processes, tiny models.

    run = Run(tmp_path, source, etcd.endpoint, total_steps=400)
    pods = [run.start(slot) for slot in range(3)]
    run.until(lambda: run.rounds(0) >= 3, "three rounds")
    pods[1].kill_worker()
    ...
    run.finish(pods)
    run.check(faulted={1})

What happened is read from what a run tells anyway: its workers' `metrics.jsonl`, and etcd with its history.
"""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from trainer import data
from trainer.config import TrainingConfig
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import etcd_binary
from trainer.etcd.errors import EtcdError
from trainer.events import EventReader
from trainer.files import write_json, write_text
from trainer.monitor.verify import verify
from trainer.process import dying_with_parent, listen
from trainer.volume import Volume

Event = dict[str, Any]

WORKER = Path(__file__).with_name("worker.py")
HURRY = "hurry"  # a file in the run's directory: see the worker
PATIENCE = 180.0  # seconds for what takes a second or two on a machine with nothing else to do
_pause = threading.Event()  # never set: what is polled here tells nobody of its changes

BASE: dict[str, Any] = {
    "model": "gpt-neo-x:test",
    "dataset": "stdlib",
    "max_samples": 60,
    "tokenizer": "bytes",
    "sequence_length": 64,
    "validation_fraction": 0.1,
    "device": "cpu",
    "wandb_logging": False,
    "batch_size": 8,
    "per_device_train_batch_size": 8,
    "local_steps": 8,
    "warmup_steps": 0,
    "eval_interval": 0,
    "eval_samples": 8,
    "checkpoint_interval": 16,
    "collective_timeout": 1.0,
    "grace_period": 2.0,
    "lease_ttl": 4.0,
    "etcd_outage_limit": 20.0,
    "elastic_rdzv_timeout": 60.0,
    "elastic_max_restarts": 100,
    "elastic_min_nodes": 1,
}


def precache(directory: Path, **values: Any) -> Path:
    """The dataset and the model that runs share; `values` as in `Run`, where they are about these."""
    config = _config(directory, directory, **{"run_id": "precache", "nodes": 1, "elastic_max_nodes": 1, **values})
    data.precache(config, Volume.of(config), lambda line: None)
    return directory


def _config(root: Path, source: Path, **values: Any) -> TrainingConfig:
    own = {
        "run_dir": str(root),
        "checkpoint_path": str(root / "checkpoints"),
        "model_cache_dir": str(source / "models"),
        "dataset_cache_dir": str(source / "datasets"),
    }
    return TrainingConfig.from_flat({**BASE, "total_steps": 8, **own, **values})


class Pod:
    """A torchrun agent with one worker, and the volume that outlives both."""

    def __init__(self, run: "Run", slot: int, inside: Sequence[str], worker: Path, values: dict[str, Any]) -> None:
        self.run, self.slot, self.root, self._worker = run, slot, run.directory / f"worker-{slot}", worker
        self._before = len(run.lives(slot))  # processes that another pod has had on this volume
        config = _config(self.root, run.source, **run.values, etcd_endpoints=run.endpoints, **values)
        write_json(self.root / "config.json", config.model_dump(mode="json"))
        command = [sys.executable, "-m", "trainer.launch.agent"]
        command += ["--config", str(self.root / "config.json"), "--slot", str(slot)]
        command += ["--", sys.executable, str(worker), str(self.root / "config.json")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DILOCO_", "PYTEST_"))}
        with (self.root / "log").open("ab") as log:
            self.agent = subprocess.Popen(
                dying_with_parent([*inside, *command]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"},
                start_new_session=True,
            )

    @property
    def events(self) -> list[Event]:
        return self.run.events(self.slot)

    @property
    def pid(self) -> int:
        """Of the worker that runs now, or ran last."""
        return int(self.life[0]["pid"])

    @property
    def life(self) -> list[Event]:
        """The events of the worker's last process."""
        lives = self.run.lives(self.slot)
        assert len(lives) > self._before, f"worker {self.slot} has not started"
        return lives[-1]

    @property
    def started(self) -> bool:
        return len(self.run.lives(self.slot)) > self._before

    @property
    def member(self) -> str:
        return str(self.life[0]["member"])

    @property
    def alive(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def pause(self, seconds: float) -> None:
        """From now on, this worker's inner steps take so much longer."""
        write_text(self.root / "pause", f"{seconds}")

    def kill_worker(self) -> float:
        """kill -9; returns when."""
        return self.signal(signal.SIGKILL)

    @property
    def followers(self) -> list[psutil.Process]:
        """The other processes of an island."""
        processes = psutil.Process(self.agent.pid).children(recursive=True)
        return [one for one in processes if str(self._worker) in one.cmdline() and one.pid != self.pid]

    def signal(self, number: signal.Signals) -> float:
        os.kill(self.pid, number)
        return time.time()

    def kill(self) -> float:
        """kill -9 of everything that the pod runs, at once."""
        try:
            processes = [psutil.Process(self.agent.pid), *psutil.Process(self.agent.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return time.time()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        killed = time.time()
        self.agent.wait()
        psutil.wait_procs(processes[1:])
        return killed

    def log(self, lines: int = 25) -> str:
        return "\n".join((self.root / "log").read_text(errors="replace").splitlines()[-lines:])


class Run:
    """One run, and what is known of it.

    Args:
        directory: Its volumes.
        source: What `precache` has made.
        values: Parameters, by flat name, that differ from `BASE`.
    """

    def __init__(self, directory: Path, source: Path, endpoints: Sequence[str], **values: Any) -> None:
        self.directory, self.source, self.endpoints = directory, source, list(endpoints)
        # One node is wanted: the first pod starts alone, instead of waiting for the others for a while.
        self.values = {"run_id": directory.name, "nodes": 1, "elastic_max_nodes": 3, "total_steps": 400, **values}
        self.config = _config(directory, source, **self.values, etcd_endpoints=self.endpoints)
        self.client = EtcdClient.of(self.config)
        self.pods: list[Pod] = []
        self.settled = 0.0  # when the first quorum that a test has waited for stood: faults come after it
        self.joined = 0.0  # when the last one stood: a worker that a fault has ended before has joined again
        self._read: dict[int, tuple[EventReader, list[Event]]] = {}

    def start(self, slot: int, inside: Sequence[str] = (), worker: Path = WORKER, **values: Any) -> Pod:
        """Start a pod on the volume `slot`, which may have been used before.

        Args:
            inside: A command to run it with.
            worker: The program of its workers.
            values: Its own parameters.
        """
        (self.directory / f"worker-{slot}").mkdir(parents=True, exist_ok=True)
        pod = Pod(self, slot, inside, worker, values)
        self.pods.append(pod)
        return pod

    def close(self) -> None:
        for pod in self.pods:
            pod.kill()
        self.client.close()

    # What workers tell

    def events(self, slot: int) -> list[Event]:
        """Everything in a worker's metrics.jsonl."""
        if slot not in self._read:
            self._read[slot] = EventReader(self.directory / f"worker-{slot}" / "metrics.jsonl"), []
        reader, events = self._read[slot]
        events += reader.read()
        return events

    def lives(self, slot: int) -> list[list[Event]]:
        """A worker's events, by process."""
        lives: list[list[Event]] = []
        for event in self.events(slot):
            if event["event"] == "start":
                lives.append([])
            if lives:
                lives[-1].append(event)
        return lives

    def committed(self) -> int:
        """The last round that a worker has taken part in, and told of."""
        slots = {pod.slot for pod in self.pods}
        return max((event["round"] for slot in slots for event in of("round", self.events(slot))), default=0)

    # Waiting

    def until(self, ready: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """Wait until `ready()` is true, and return it. Fails with all logs when that takes too long."""
        deadline = time.monotonic() + patience
        while not (result := ready()):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {patience:.0f} s for {what}\n{self.story()}")
            _pause.wait(0.01)
        return result

    def until_etcd(self, ready: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """Wait until `ready()` is true; it is asked after every change in etcd."""
        result = self.client.wait_for(lambda: ready() or None, patience)
        assert result, f"waited {patience:.0f} s for {what}\n{self.story()}"
        return result

    def until_quorum(
        self, pods: Collection[Pod], after: int | None = None, unless: Callable[[], bool] = lambda: False
    ) -> int:
        """Wait until each of these workers has reported a round after `after` of exactly them.

        Returns the last of these rounds; 0 if `unless()` became true before.
        """
        after = self.committed() if after is None else after

        def formed() -> int:
            if not all(pod.started for pod in pods):
                return 0
            members = sorted(pod.member for pod in pods)
            rounds = (
                (event["round"] for event in of("round", pod.life) if sorted(event["members"]) == members)
                for pod in pods
            )
            # Each of them: the report of one does not say that another has caught up.
            first = [next((int(round) for round in own if round > after), 0) for own in rounds]
            return max(first) if all(first) else 0

        what = f"a quorum of workers {[pod.slot for pod in pods]}"
        round = int(self.until(lambda: formed() or (unless() and -1), what))
        if round < 0:
            return 0
        self.joined = time.time()
        self.settled = self.settled or self.joined
        return round

    def until_committed(self, round: int, pods: Collection[Pod]) -> None:
        """Wait until all these workers have committed the round, or a later one."""
        self.until(
            lambda: all(any(event["round"] >= round for event in of("round", pod.events)) for pod in pods),
            f"round {round}",
        )

    def finish(
        self, pods: Collection[Pod], patience: float = 2 * PATIENCE, meanwhile: Callable[[], Any] = lambda: None
    ) -> None:
        """Wait, calling `meanwhile`, until all of these agents report that the run is complete."""
        (self.directory / HURRY).touch()

        def ended() -> bool:
            over = all(pod.agent.poll() is not None for pod in pods)
            meanwhile()  # it may start one of them again
            return over and all(pod.agent.poll() is not None for pod in pods)

        self.until(ended, "the end of the run", patience)
        statuses = {pod.slot: pod.agent.returncode for pod in pods}
        assert not any(statuses.values()), f"exit statuses {statuses}\n{self.story()}"

    def story(self) -> str:
        """Of a failed test: what everybody said last, and the record."""
        parts = []
        for pod in self.pods:
            state = "running" if pod.agent.poll() is None else f"ended with {pod.agent.returncode}"
            last = [
                {key: event[key] for key in event if key not in ("config", "versions")} for event in pod.events[-4:]
            ]
            parts += [f"== worker {pod.slot}, agent {state}", pod.log(), *map(str, last)]
        with suppress(EtcdError):
            for key, entry in self.client.list("").items():
                if key.startswith(("commits/", "secret")):
                    continue
                parts.append(f"{key} = {json.dumps(entry.value)[:600]}")
        return "\n".join(parts)

    # What must hold

    def report(self, fault: str, at: float, survivors: Collection[Pod], gone: Collection[Pod] = ()) -> Event:
        """How a fault was borne: waits for the survivors' first commit without those that are `gone`.

        Returns:
            For the table: `seconds` from the fault to the next committed outer step; `without`: to the first one
            without those that are gone; `exposed`: the longest that a survivor's inner loop stood still up to then;
            `attempt`: the attempts that it took at most; `lost_steps`: inner steps that survivors have lost or made
            again.
        """
        members = {pod.member for pod in gone}

        def rounds(pod: Pod) -> list[Event]:
            """The survivor's rounds from the fault to the first one without those that are gone."""
            found: list[Event] = []
            for event in of("round", pod.events):
                if event["time"] > at:
                    found.append(event)
                    if not members & set(event["members"]):
                        return found
            return []

        self.until(lambda: all(rounds(pod) for pod in survivors), f"a commit of every survivor after: {fault}")
        told = [rounds(pod) for pod in survivors]
        return {
            "fault": fault,
            "seconds": min(events[0]["time"] for events in told) - at,
            "without": max(events[-1]["time"] for events in told) - at,
            "exposed": max(event["exposed_seconds"] for events in told for event in events),
            "attempt": max(event["attempt"] for events in told for event in events),
            "lost_steps": sum(lost_steps(pod.life, self.joined) for pod in survivors),
        }

    def check(self, survivors: Collection[Pod] = (), *, reset: bool = False) -> None:
        """Everything that must hold of any run, whatever has happened to it.

        Args:
            survivors: Workers that nothing has been done to: one process each, no inner step lost or repeated.
            reset: Whether everybody has died in between, and work after the last checkpoint was done again.
        """
        for pod in survivors:
            check_survivor(self.lives(pod.slot), pod.slot, self.settled)
        slots = sorted({pod.slot for pod in self.pods})
        ends = {
            slot: event for slot in slots for event in of("end", self.events(slot)) if event["status"] == "complete"
        }
        assert ends, self.story()
        assert len({event["global_hash"] for event in ends.values()}) == 1, ends
        assert {event["step"] for event in ends.values()} == {self.config.total_steps}
        history = self.history("")
        check_quorums(history)
        check_states(history)
        (judgement,) = verify([self.directory])
        assert not judgement.refuted, f"{judgement}\n{self.story()}"
        assert not judgement.without, judgement.without  # etcd's record is among the evidence
        if not reset:
            check_samples([event for slot in slots for event in of("step", self.events(slot))])

    def history(self, prefix: str) -> list[tuple[str, Any]]:
        """Every value that etcd has ever had below a prefix: (key, value), in order; deletions are left out."""
        self.client.put(f"{prefix}~", "the end")
        rpc = importlib.import_module("etcd3.etcdrpc")  # as the client has made it
        begin = (self.client.prefix + prefix).encode()
        end = begin[:-1] + bytes([begin[-1] + 1])
        create = rpc.WatchCreateRequest(key=begin, range_end=end, start_revision=1)
        done = threading.Event()

        def requests() -> Iterator[Any]:
            yield rpc.WatchRequest(create_request=create)
            done.wait()

        connection = self.client.connection()
        found: list[tuple[str, Any]] = []
        stream = rpc.WatchStub(connection.channel).Watch(requests(), metadata=connection.metadata, timeout=30)
        for answer in stream:
            for event in answer.events:
                key = event.kv.key.decode().removeprefix(self.client.prefix)
                if key == f"{prefix}~":
                    done.set()
                    stream.cancel()
                    self.client.delete(key)
                    return found
                if event.kv.value:
                    found.append((key, json.loads(event.kv.value)))
        raise AssertionError("the watch ended before the whole history was read")


def of(kind: str, events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def lost_steps(life: list[Event], since: float) -> int:
    """Inner steps of a process that are missing, or were made again."""
    steps = [event["step"] for event in of("step", life) if event["time"] > since]
    return sum(abs(after - before - 1) for before, after in itertools.pairwise(steps))


def check_survivor(lives: list[list[Event]], slot: int, since: float) -> None:
    """One process from its start to the end, and since then every inner step once and every round."""
    assert len(lives) == 1, f"worker {slot} was started {len(lives)} times"
    life = [event for event in lives[0] if event["time"] > since]
    caught_up = [event for event in of("membership", life) if event["change"] == "caught up"]
    assert caught_up == [], f"worker {slot}: {caught_up}"
    for kind in ("step", "round"):
        numbers = [event[kind] for event in of(kind, life)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"worker {slot}: {kind}s {numbers}"


def check_quorums(records: list[tuple[str, Any]]) -> None:
    """Never two quorums for one (term, round, attempt), nor two outcomes of a round."""
    quorums: dict[tuple[int, ...], set[tuple[str, ...]]] = defaultdict(set)
    outcomes: dict[tuple[int, int], set[tuple[Any, ...]]] = defaultdict(set)
    for key, record in records:
        if key != "round":
            continue
        if record["phase"] == "reduce":
            quorums[record["term"], record["round"], record["attempt"]].add(tuple(record["members"]))
        if committed := record["committed"]:
            found = committed["attempt"], tuple(committed["members"]), committed["hash"]
            outcomes[committed["term"], committed["round"]].add(found)
    assert quorums
    assert {place: found for place, found in quorums.items() if len(found) > 1} == {}
    assert {place: found for place, found in outcomes.items() if len(found) > 1} == {}


def check_states(history: list[tuple[str, Any]]) -> None:
    """All members that report the state of a round, of the same term, report the same hash.

    The term is the member's own: one that starts reports its checkpoint, which may be from an earlier term.
    """
    hashes: dict[tuple[int, int], set[str]] = defaultdict(set)
    for key, value in history:
        if key.startswith("members/"):
            hashes[value["term"], value["holds"]["round"]].add(value["holds"]["hash"])
    assert len(hashes) > 1
    assert {place: found for place, found in hashes.items() if len(found) > 1} == {}


def check_samples(steps: list[Event]) -> None:
    """No sample position was consumed twice. Within an epoch, a position is a sample."""
    ranges = sorted((start, stop) for step in steps for start, stop in step["positions"])
    twice = [(one, other) for one, other in itertools.pairwise(ranges) if one[1] > other[0]]
    assert twice == [], twice[:5]


class EtcdCluster:
    """An etcd of three members on this machine: whatever has happened to one of them, the others go on."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        ports = _free_ports(2 * count)
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:count]]
        peers = {f"etcd{number}": f"http://127.0.0.1:{port}" for number, port in enumerate(ports[count:])}
        self.processes: list[subprocess.Popen[bytes]] = []
        for endpoint, (name, peer) in zip(self.endpoints, peers.items(), strict=True):
            own = directory / name
            own.mkdir(parents=True)
            command = [str(etcd_binary()), "--name", name, "--data-dir", str(own / "data"), "--log-level", "warn"]
            command += ["--listen-client-urls", f"http://{endpoint}", "--advertise-client-urls", f"http://{endpoint}"]
            command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            command += ["--initial-cluster", ",".join(f"{key}={value}" for key, value in peers.items())]
            with (own / "log").open("ab") as log:
                self.processes.append(subprocess.Popen(dying_with_parent(command), stdout=log, stderr=log))

    def __enter__(self) -> Self:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with EtcdClient(self.endpoints) as client:
                    client.put("health", "")
                    return self
            except EtcdError:
                assert time.monotonic() < deadline, "the etcd members found no leader"
                _pause.wait(0.1)

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def kill(self, member: int) -> float:
        self.processes[member].kill()
        self.processes[member].wait()
        return time.time()


def _free_ports(count: int) -> list[int]:
    listeners = [listen("127.0.0.1") for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
