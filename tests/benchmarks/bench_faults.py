"""The cost of a fault for the surviving workers: this project, a torchrun restart, and torchft's DiLoCo, on equal work.

    python tests/benchmarks/bench_faults.py [--repetitions 3] [--workers 3] [--local-steps 20]
        [--systems ours torchrun torchft] [--torchft DIRECTORY] [--defaults] [--directory DIRECTORY]

torchft is not a dependency. To measure it, install it in a separate directory and pass that; otherwise it is skipped:

    pip install --no-deps --target DIRECTORY torchft==0.2.0     # it needs opentelemetry-exporter-otlp-proto-http too

All systems do the same work: `gpt-neo-x:tiny` (0.9M parameters), inner steps with AdamW, each followed by an idle pause
(without it, on a machine with few cores, a starting worker would compete with those that train, and the benchmark would
measure that), outer steps with Nesterov momentum, fp32 over gloo, one process per worker, one thread per process.

- ours: pods as in `tests/faults/harness.py`, the real worker, and a checkpoint every round.
- torchrun: a plain torch.distributed script that checkpoints every round and resumes from it, one agent per worker,
  with `torchrun --rdzv-backend etcd3` (this project's backend instead of the v2 ones; the restarts are torch's own).
- torchft: `torchft.DiLoCo`, a lighthouse, and one worker per replica under a torchrun agent, as in its README.

Timeouts that all systems have are equal: a dead node counts as alive for 5 s (`lease_ttl`; `keep_alive_interval` x
`keep_alive_max_attempt`; the lighthouse's heartbeat timeout), and the others wait for late nodes for 3 s
(`grace_period`; `last_call_timeout`; `join_timeout_ms`). Everything else has the library's default: gloo's 30 minutes
and torchft's 60 s for an operation, torchrun's monitor interval of 0.1 s, torchft's heartbeats and ticks of 0.1 s. A
dead process closes its connections, which all three systems see immediately; only this project also has a timeout
inside a collective, of 2 s. With `--defaults` each system also has its own defaults for these timeouts (15 and 10, 15
and 30, 5 and 60 s).

The faults happen in the middle of a round, one after the other in the same run, to another worker in each repetition:
no fault (the normal cost of a round), kill -9 of a worker whose agent restarts it, kill -9 of a worker and its agent,
and a new worker in its place. The columns come from the survivors' records (one line per step and outer step):

    next commit   seconds from the fault to the next outer step that a survivor committed
    whole again   seconds from the fault to the first outer step of the new worker
    exposed       seconds until then in which the inner loop of a survivor (the worst) waited: the excess over a usual
                  step, summed over gaps of more than two usual steps
    a round       the same per round of that time; compare with the first row, which is normal
    longest       the longest such gap; unlike a sum, it does not accumulate a busy machine's noise
    lost steps    total of inner steps that survivors repeated or skipped

It prints one table (median and range), and writes build/faults-comparison.json. It needs an idle machine (about ten
minutes on two cores): other load mainly delays process starts, each of which imports torch. `load` is the machine's
mean number of runnable processes during the benchmark; about 2 of them belong to the benchmark.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "faults-comparison.json"
sys.path.insert(0, str(ROOT))  # for the harness of the fault tests

from trainer.errors import run_main  # noqa: E402
from trainer.files import read_json, write_json  # noqa: E402
from trainer.process import dying_with_parent  # noqa: E402

Event = dict[str, Any]
WORK = "BENCH_FAULTS_WORK"  # environment variable of a worker: its `Work`, as JSON
PATIENCE = 300.0  # seconds for operations that take ten on an idle machine
FAULTS = ("no fault", "kill -9 of a worker", "kill -9 of its agent too", "a new worker joins")
_pause = threading.Event()  # never set: files are polled


@dataclass(frozen=True)
class Work:
    """The work of every worker, in all systems."""

    system: str
    model: str = ""  # the precached model's directory
    local_steps: int = 20
    batch: int = 2
    sequence: int = 64
    pause: float = 0.025  # seconds after each inner step
    lr: float = 1e-3
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    lighthouse: str = ""


@dataclass(frozen=True)
class Timeouts:
    """Seconds. `dead`: how long a silent node counts as alive; `late`: how long others wait for a late node."""

    collective: float
    late: float
    dead: float


EQUAL = Timeouts(2.0, 3.0, 5.0)
DEFAULTS = {"ours": Timeouts(5.0, 10.0, 15.0), "torchrun": Timeouts(1800.0, 30.0, 15.0)}
DEFAULTS["torchft"] = Timeouts(60.0, 60.0, 5.0)  # defaults of the command `torchft_lighthouse`


# The workers


class Record:
    """The events of a worker of the other two systems, in the format of our metrics.jsonl."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / "metrics.jsonl").open("a", buffering=1)
        self.write("start", pid=os.getpid())

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")


def work_as_ours(work: Work, config: str) -> None:
    """The real worker, with the pause."""
    from trainer.config import TrainingConfig
    from trainer.worker import worker

    inner_step = worker.Worker._inner_step

    def step_and_pause(worker: worker.Worker, *arguments: Any) -> Any:
        time.sleep(work.pause)
        return inner_step(worker, *arguments)

    worker.Worker._inner_step = step_and_pause  # type: ignore[method-assign, assignment]
    run_main(lambda: worker.train(TrainingConfig.model_validate(read_json(Path(config)))))


class Inner:
    """The inner loop of the other two: model, AdamW and steps on random tokens."""

    def __init__(self, work: Work) -> None:
        import torch

        from trainer import models

        self.work = work
        self.model: Any = models.build(Path(work.model), seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=work.lr)

    def step(self) -> None:
        import torch

        time.sleep(self.work.pause)
        tokens = torch.randint(self.model.config.vocab_size, (self.work.batch, self.work.sequence))
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        self.optimizer.step()  # its hooks contain all of torchft
        self.optimizer.zero_grad()

    def outer_optimizer(self, parameters: Any) -> Any:
        import torch

        return torch.optim.SGD(parameters, lr=self.work.outer_lr, momentum=self.work.outer_momentum, nesterov=True)


def work_under_torchrun(work: Work, directory: str) -> None:
    """A plain torch.distributed DiLoCo: if one worker fails, all restart from the checkpoint."""
    import torch
    import torch.distributed as dist
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    record, checkpoint = Record(Path(directory)), Path(directory).parent / "checkpoint.pt"
    dist.init_process_group("gloo")
    inner = Inner(work)
    parameters = list(inner.model.parameters())
    anchor = torch.nn.Parameter(parameters_to_vector(parameters).detach().clone())
    outer = inner.outer_optimizer([anchor])
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["round"]
        anchor.data.copy_(state["parameters"])
        outer.load_state_dict(state["outer"])
        inner.optimizer.load_state_dict(state["inner"])
        vector_to_parameters(anchor.data, parameters)
    while True:
        for step in range(work.local_steps):
            inner.step()
            record.write("step", step=done * work.local_steps + step + 1)
        anchor.grad = anchor.detach() - parameters_to_vector(parameters).detach()
        dist.all_reduce(anchor.grad)
        anchor.grad /= dist.get_world_size()
        outer.step()
        vector_to_parameters(anchor.data, parameters)
        done += 1
        record.write("round", round=done, world_size=dist.get_world_size())
        if dist.get_rank() == 0:
            state = {"round": done, "parameters": anchor.data, "outer": outer.state_dict()}
            torch.save({**state, "inner": inner.optimizer.state_dict()}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)


def work_with_torchft(work: Work, directory: str) -> None:
    """torchft's DiLoCo as in its example: one replica, which hosts its own store."""
    from torch.distributed import TCPStore

    torchft: Any = importlib.import_module("torchft")
    local_sgd: Any = importlib.import_module("torchft.local_sgd")
    record, inner = Record(Path(directory)), Inner(work)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        inner.model.load_state_dict(state["model"])
        inner.optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(),
        load_state_dict=load,
        state_dict=lambda: {"model": inner.model.state_dict(), "optimizer": inner.optimizer.state_dict()},
        min_replica_size=1,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=work.lighthouse,
        replica_id=Path(directory).name,
        hostname="127.0.0.1",
    )
    made = 0
    # Before torchft's hook, which synchronises.
    inner.optimizer.register_step_post_hook(
        lambda *_: record.write("step", step=manager.current_step() * work.local_steps + made + 1)
    )
    outer = inner.outer_optimizer(inner.model.parameters())
    with local_sgd.DiLoCo(manager, [inner.model], inner.optimizer, outer, sync_every=work.local_steps):
        while True:
            before = manager.current_step()
            inner.step()
            made = (made + 1) % work.local_steps
            if manager.current_step() > before:
                record.write("round", round=manager.current_step(), world_size=manager.num_participants())


def lighthouse(work: Work, path: str) -> None:
    """torchft's coordinator; writes its address to a file. `work.lighthouse`: join and heartbeat timeout, in ms."""
    join, heartbeat = map(int, work.lighthouse.split())
    coordination: Any = importlib.import_module("torchft.coordination")
    server = coordination.LighthouseServer(
        bind="0.0.0.0:0", min_replicas=1, join_timeout_ms=join, heartbeat_timeout_ms=heartbeat
    )
    write_json(Path(path), server.address())
    signal.pause()


ROLES: dict[str, Callable[[Work, str], None]] = {
    "ours": work_as_ours,
    "torchrun": work_under_torchrun,
    "torchft": work_with_torchft,
    "lighthouse": lighthouse,
}


# The systems


class System(ABC):
    """A run of one system: workers by slot, and their events.

    Args:
        directory: The run's; each worker has `worker-<slot>` in it.
        torchft: The directory of torchft, if it is installed separately.
    """

    name: ClassVar[str]

    def __init__(self, directory: Path, workers: int, work: Work, timeouts: Timeouts, torchft: Path | None) -> None:
        self.directory, self.workers, self.work, self.timeouts = directory, workers, work, timeouts
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("DILOCO_")}
        self.environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": _path(torchft)}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._read: dict[int, tuple[int, list[Event]]] = {}

    @abstractmethod
    def start(self, slot: int) -> None:
        """Start a worker, with the process that restarts it."""

    @abstractmethod
    def close(self) -> None:
        """End everything."""

    def kill_worker(self, slot: int) -> float:
        """kill -9 of the worker alone, which is then restarted; returns the time."""
        os.kill([event["pid"] for event in self.events(slot) if event["event"] == "start"][-1], signal.SIGKILL)
        return time.time()

    def kill_node(self, slot: int) -> float:
        """kill -9 of the worker and the processes that would restart it; returns the time."""
        return _kill(self.processes[slot])

    def events(self, slot: int) -> list[Event]:
        """The worker's events: `start`, `step`, and `round` for each committed outer step."""
        offset, events = self._read.get(slot, (0, []))
        path = self.directory / f"worker-{slot}" / "metrics.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # incomplete: being written, or cut off by a kill
                    offset += len(line)
                    with suppress(ValueError):
                        events.append(json.loads(line))
        self._read[slot] = offset, events
        return events

    def of(self, kind: str, slot: int, after: float = 0.0) -> list[Event]:
        return [event for event in self.events(slot) if event["event"] == kind and event["time"] > after]

    def until(self, ready: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (result := ready()):
            if time.monotonic() > deadline:
                logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.directory.rglob("log"))]
                raise TimeoutError(f"{self.name}: waited {PATIENCE:.0f} s for {what}\n" + "\n==\n".join(logs))
            _pause.wait(0.01)
        return result

    def until_whole(self, slot: int, after: float) -> float:
        """Wait for the first outer step of this worker with all others; returns its time."""

        def whole() -> list[Event]:
            return [event for event in self.of("round", slot, after) if event["world_size"] == self.workers]

        return float(self.until(whole, f"worker {slot} to take part")[0]["time"])

    def until_middle(self, slot: int) -> None:
        """Wait until the worker has made half the inner steps of a round."""

        def made() -> int:
            kinds = [event["event"] for event in self.events(slot) if event["event"] in ("step", "round")]
            return len(kinds) - 1 - max(place for place, kind in enumerate(kinds) if kind == "round")

        self.until(lambda: made() == self.work.local_steps // 2, "the middle of a round")

    def _spawn(self, command: list[str], work: Work, log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = self.environment | {WORK: json.dumps(asdict(work))}
        with log.open("ab") as file:
            return subprocess.Popen(
                dying_with_parent(command), env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )


class Ours(System):
    name = "ours"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from tests.faults import harness
        from trainer.etcd.embedded import EmbeddedEtcd

        self._etcd = EmbeddedEtcd(self.directory / "etcd")
        self._etcd.__enter__()
        values = {
            "elastic_max_nodes": self.workers,
            "total_steps": 10**6,
            "lease_ttl": self.timeouts.dead,
            "grace_period": self.timeouts.late,
            "collective_timeout": self.timeouts.collective,
            "checkpoint_interval": self.work.local_steps,
            "lr": self.work.lr,
            "outer_lr": self.work.outer_lr,
            "outer_momentum": self.work.outer_momentum,
        }
        source = Path(self.work.model).parents[1]
        self._run = harness.Run(self.directory, source, [self._etcd.endpoint], **values)
        self._pods: dict[int, harness.Pod] = {}

    def start(self, slot: int) -> None:
        os.environ[WORK] = json.dumps(asdict(self.work))
        self._pods[slot] = self._run.start(slot, worker=Path(__file__))

    def kill_node(self, slot: int) -> float:
        return self._pods[slot].kill()

    def close(self) -> None:
        self._run.close()
        self._etcd.__exit__(None, None, None)


class Torchrun(System):
    name = "torchrun"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from trainer.etcd.embedded import EmbeddedEtcd

        self._etcd = EmbeddedEtcd(self.directory / "etcd")
        self._etcd.__enter__()

    def start(self, slot: int) -> None:
        settings = {"last_call_timeout": int(self.timeouts.late)}
        if self.timeouts != DEFAULTS[self.name]:
            settings |= {"keep_alive_interval": 1, "keep_alive_max_attempt": int(self.timeouts.dead)}
        own = self.directory / f"worker-{slot}"
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "etcd3"]
        command += ["--rdzv-endpoint", self._etcd.endpoint, "--rdzv-id", "bench", "--max-restarts", "100"]
        command += ["--nnodes", f"1:{self.workers}", "--nproc-per-node", "1"]
        command += ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in settings.items())]
        self.processes[slot] = self._spawn([*command, __file__, str(own)], self.work, own / "log")

    def close(self) -> None:
        for process in self.processes.values():
            _kill(process)
        self._etcd.__exit__(None, None, None)


class Torchft(System):
    name = "torchft"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        path, late = self.directory / "lighthouse.json", int(1000 * self.timeouts.late)
        settings = Work("lighthouse", lighthouse=f"{late} {int(1000 * self.timeouts.dead)}")
        command = [sys.executable, __file__, str(path)]
        self._lighthouse = self._spawn(command, settings, self.directory / "lighthouse" / "log")
        self.until(path.exists, "the lighthouse")
        address = read_json(path).rpartition(":")[2]
        self.work = replace(self.work, lighthouse=f"http://127.0.0.1:{address}")

    def start(self, slot: int) -> None:
        own = self.directory / f"worker-{slot}"
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "100", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        self.processes[slot] = self._spawn([*command, __file__, str(own)], self.work, own / "log")

    def close(self) -> None:
        for process in [*self.processes.values(), self._lighthouse]:
            _kill(process)


SYSTEMS: dict[str, type[System]] = {system.name: system for system in (Ours, Torchrun, Torchft)}


def _kill(process: subprocess.Popen[bytes]) -> float:
    """kill -9 of a process and its descendants; returns the time."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    killed = time.time()
    process.wait()
    psutil.wait_procs(family[1:])
    return killed


def _path(torchft: Path | None) -> str:
    """PYTHONPATH, with `torchft` last, so that all systems use the same torch."""
    return os.pathsep.join(map(str, [ROOT, *([torchft] if torchft else [])]))


# The measurement


def measure(system: System, at: float, end: float, survivors: Collection[int]) -> dict[str, float]:
    """The cost of a fault at `at` for the survivors, up to `end` (Unix seconds); see the table's columns."""
    exposed, longest, lost = [], [], 0
    for slot in survivors:
        system.until(lambda slot=slot: system.of("step", slot, end), "a step after it")  # type: ignore[misc]
        steps = system.of("step", slot)
        times = [event["time"] for event in steps]
        before = [gap for when, gap in _gaps(times) if when <= at]
        usual = statistics.median(before[-3 * system.work.local_steps :])
        first_after = min(when for when in times if when > end)
        during = [gap for when, gap in _gaps(times) if at < when <= first_after]
        exposed.append(sum(gap - usual for gap in during if gap > 2 * usual))
        longest.append(max(during) - usual)
        highest = max(event["step"] for event in steps if event["time"] <= at)
        for event in steps:
            if at < event["time"] <= end:
                expected, highest = highest + 1, max(highest, event["step"])
                lost += 1 if event["step"] < expected else event["step"] - expected
    commit = min(system.of("round", slot, at)[0]["time"] for slot in survivors)
    rounds = max(sum(event["time"] <= end for event in system.of("round", slot, at)) for slot in survivors)
    cost = {"exposed": max(exposed), "a round": max(exposed) / rounds, "longest": max(longest)}
    return {"next commit": commit - at, **cost, "lost steps": lost}


def _gaps(times: list[float]) -> Iterator[tuple[float, float]]:
    """(end, seconds) of the gaps between neighbouring times."""
    return ((after, after - before) for before, after in itertools.pairwise(times))


def faults(system: System, victim: int) -> Iterator[dict[str, Any]]:
    """All faults, one after the other, in one run."""
    slots = range(system.workers)
    survivors = [slot for slot in slots if slot != victim]

    def settle(rounds: int = 2) -> None:
        """Wait for this number of rounds with all workers, and then for the middle of a round."""
        for _ in range(rounds):
            now = time.time()
            for slot in slots:
                system.until_whole(slot, now)
        system.until_middle(victim)

    for slot in slots:
        system.start(slot)
    settle(4)
    at = time.time()
    end = max(system.until_whole(slot, at) for slot in survivors)
    yield {"fault": FAULTS[0], **measure(system, at, end, survivors)}

    settle()
    at = system.kill_worker(victim)
    end = system.until_whole(victim, at)
    yield {"fault": FAULTS[1], **measure(system, at, end, survivors), "whole again": end - at}

    settle()
    at = system.kill_node(victim)

    def without() -> list[float]:
        """The time at which each survivor committed the first round of the survivors alone."""
        told = [system.of("round", slot, at) for slot in survivors]
        own = [[event["time"] for event in events if event["world_size"] == len(survivors)] for events in told]
        return [times[0] for times in own] if all(own) else []

    end = max(system.until(without, "a round of the survivors"))
    yield {"fault": FAULTS[2], **measure(system, at, end, survivors)}

    system.until_middle(survivors[0])
    at = time.time()
    system.start(victim)
    end = system.until_whole(victim, at)
    yield {"fault": FAULTS[3], **measure(system, at, end, survivors), "whole again": end - at}


COLUMNS = {"next commit": "s", "whole again": "s", "exposed": "s", "a round": "s", "longest": "s", "lost steps": ""}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Median and range of each system and fault; then the advantage of ours."""
    cells: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for column in COLUMNS:
            if column in row:
                cells.setdefault((row["fault"], row["system"], column), []).append(row[column])
    systems = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
    yield f"{'fault':<25} {'system':<9}" + "".join(f"{column:>24}" for column in COLUMNS)
    for fault in FAULTS:
        for system in systems:
            shown = [_shown(cells.get((fault, system, column), []), unit) for column, unit in COLUMNS.items()]
            yield f"{fault:<25} {system:<9}" + "".join(f"{text:>24}" for text in shown)
    medians = {place: statistics.median(values) for place, values in cells.items()}
    for other in [name for name in systems if name != "ours" and "ours" in systems]:
        for fault in FAULTS[1:]:
            by = [
                f"{column} {medians[fault, other, column] - medians[fault, 'ours', column]:+.1f} {unit or 'steps'}"
                for column, unit in COLUMNS.items()
                if (fault, other, column) in medians
            ]
            yield f"{other} compared with ours, {fault}: {', '.join(by)}"


def _shown(values: list[float], unit: str) -> str:
    if not values:
        return "-"
    low, middle, high = (
        f"{value:.{2 if unit else 0}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} {unit} ({low}-{high})".replace("  ", " ")


def why_not_torchft(torchft: Path | None) -> str | None:
    """The reason why torchft cannot be measured, or None."""
    environment = {**os.environ, "PYTHONPATH": _path(torchft)}
    code = "import torchft.coordination, torchft.local_sgd"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def precache(directory: Path, work: Work) -> Path:
    """Precache the data and the model for all systems; returns the model's directory."""
    from tests.faults import harness

    harness.BASE |= {"model": "gpt-neo-x:tiny", "sequence_length": work.sequence, "local_steps": work.local_steps}
    harness.BASE |= {"batch_size": work.batch, "per_device_train_batch_size": work.batch}
    harness.precache(directory)
    (ready,) = (directory / "models").glob("*/model.json")
    return ready.parent


@contextmanager
def watching_load() -> Iterator[list[float]]:
    """The machine's load, once a second."""
    over, loads = threading.Event(), [os.getloadavg()[0]]

    def watch() -> None:
        while not over.wait(1.0):
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
            loads.append(float(running) - 1)  # without this process

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield loads
    finally:
        over.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--local-steps", type=int, default=20, help="inner steps in a round")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--torchft", type=Path, help="directory in which torchft is installed (`pip install --target`)")
    parser.add_argument("--directory", type=Path, help="keep the runs and their records in this new directory")
    parser.add_argument("--defaults", action="store_true", help="default timeouts of each system, not equal ones")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all child processes end
    systems = [name for name in SYSTEMS if name in arguments.systems]
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    if "torchft" in systems and (reason := why_not_torchft(arguments.torchft)):
        skipped["torchft"] = reason
        systems.remove("torchft")
        print(f"torchft is skipped: {reason}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        common = Work("", local_steps=arguments.local_steps)
        common = replace(common, model=str(precache(directory, common)))
        for repetition in range(arguments.repetitions):
            for name in systems:
                timeouts = DEFAULTS[name] if arguments.defaults else EQUAL
                own = directory / f"{name}-{repetition}"
                own.mkdir(parents=True)
                victim = arguments.workers - 1 - repetition % arguments.workers
                with ExitStack() as resources:
                    loads = resources.enter_context(watching_load())
                    work = replace(common, system=name)
                    system = SYSTEMS[name](own, arguments.workers, work, timeouts, arguments.torchft)
                    resources.callback(system.close)
                    for row in faults(system, victim):
                        load = statistics.mean(loads)
                        rows.append({"system": name, "repetition": repetition, "victim": victim, "load": load, **row})
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    load = statistics.mean(row["load"] for row in rows)
    print(f"median (range); {arguments.workers} workers; load {load:.1f} on {os.cpu_count()} cores")
    chosen = {name: asdict(DEFAULTS[name] if arguments.defaults else EQUAL) for name in systems}
    OUTPUT.parent.mkdir(exist_ok=True)
    facts = {"workers": arguments.workers, "load": load, "cores": os.cpu_count(), "timeouts": chosen}
    write_json(OUTPUT, {**facts, "work": asdict(common), "skipped": skipped, "rows": rows})


if __name__ == "__main__":
    if WORK in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: torchrun's workers would outlive their agent
        worker = Work(**json.loads(os.environ[WORK]))
        ROLES[worker.system](worker, sys.argv[1])
    else:
        main()
