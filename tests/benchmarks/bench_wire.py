"""The cost of a synchronisation: bytes on the wire, seconds over slow links, CPU seconds, memory.

    python tests/benchmarks/bench_wire.py [--sections bytes time overlap cpu threads memory] [--methods fp32 int8 ...]
        [--parameters 10000000] [--repetitions 5] [--torchft DIRECTORY] [--quick]

Workers are processes with one thread each. Each is in its own network namespace, with an `eth0` that leads to a bridge.
(This needs root. Without it, workers use loopback, and measurements that need an interface or a limited link are
skipped.) A synchronisation is what the product does once all members have arrived: the collective over the transport,
with the codec and, piece by piece, the outer step and the hash for the vote. The agreement through etcd is excluded.
`gloo` is the reference: one plain all-reduce of the same float32 numbers by torch's gloo, over its own connections.
Codecs have the configuration's defaults; `demo` sends 32 coefficients per tile in 4 bits.

bytes   The bytes that a worker sends in a round, for 2, 4 and 8 workers. The parameters are those of a GPT-NeoX with
        124M parameters (12 layers of 768, tied embedding, 50257 tokens). If the machine lacks memory for them, or they
        take too long, there are fewer (see the column), and `MB/round` is scaled up to 124M; this also scales what
        each message has regardless of size (gloo's headers; 20 % of `sparse` with 8 workers). `meter` is the product's
        number: TCP payload, from the kernel's `tcp_info`. `eth0` is the interface's count for the same time, less 66
        bytes of Ethernet, IP and TCP headers for each of its packets. The two must agree within 3 % or 256 KB. `/fp32`:
        the reduction compared with DiLoCo in fp32; `/DDP`: compared with averaging gradients by `gloo` in each of 128
        inner steps.
time    Seconds, for 2 (or --workers) workers, over links limited by `tc tbf` at both ends, and over an unlimited one:
        medians of the slowest worker, with alternating methods, after a first round that is not counted; without TLS,
        and with it (`tls`, and its ratio `x-tls` to the seconds without). `limit` is bytes sent / bandwidth, for the
        payload alone; headers take 4.6 % more, and acknowledgements for the other direction 2.2 %, so TCP reaches 1.07
        at best. Targets: `x-limit` 1.10 for dense codecs; without a limit, `x-gloo` 1.5 for fp32. `whole` includes the
        work on the model, from its parameters to the pseudo-gradient and back. With --torchft, torchft's DiLoCo does
        the same, including its quorum and vote (bench_faults.py explains how to install it).
overlap The same over the limited links during inner steps (of 20 ms that use no CPU): `exposed` is how long they wait
        for the synchronisation, median of the slower worker. Target: 5 % of `limit`.
cpu     CPU seconds to encode and to decode 100M numbers, on one thread.
threads Seconds to encode, sum two members' messages and take the outer step for 200M parameters, alternately on 1 and
        on 2 threads (minimum of the repetitions, since other load can only add time). Target: `gain` 1.7. 1B and 7B:
        an estimate for 16 cores of this kind, if the gain continues as from 1 to 2.
memory  Bytes per parameter on the host, without the model, from the kernel's numbers for the process: what stays
        allocated between synchronisations (4 each for the global parameters, the momentum, both again for the next
        outer step, scratch; with error feedback, the residual and the error), and what one of 2 workers needs beyond
        that at its peak. `coded`: an encoded mean as kept for late members, one for each of the last rounds; the peak
        includes it once.

It prints a table for each section, and writes build/wire.json. It needs an idle machine with 2 cores, and 10 minutes;
with --quick everything is small, and it takes about one minute.
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
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE
from typing import Any, Self

import psutil
import torch
from torch import Size, Tensor, nn
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "wire.json"
sys.path.insert(0, str(ROOT))  # for shared test code

from tests.benchmarks.mesh import Members, Mesh, Plain  # noqa: E402
from tests.network.namespaces import Namespaces, Network  # noqa: E402
from trainer.diloco import DiLoCo, Overlap, codecs  # noqa: E402
from trainer.diloco.codecs import Codec  # noqa: E402
from trainer.diloco.collective import (  # noqa: E402
    SLICE,
    Workspace,
    warm_up,
    weighted_sum,
)
from trainer.diloco.flat import FlatLayout  # noqa: E402
from trainer.diloco.outer import Nesterov  # noqa: E402
from trainer.diloco.state import GlobalState  # noqa: E402
from trainer.diloco.threads import Threads  # noqa: E402
from trainer.files import write_json  # noqa: E402
from trainer.process import dying_with_parent, listen  # noqa: E402

Row = dict[str, Any]
INSIDE = "BENCH_WIRE_INSIDE" in os.environ  # whether this is a worker in its own namespace
WORK = "BENCH_WIRE_WORK"  # environment variable of a worker: its role and arguments, as JSON
RAW, TORCHFT = "gloo", "torchft"
DENSE = ["fp32", "bf16", "int8", "int4", "ternary", "sign"]
METHODS = [*DENSE, "sparse", "demo"]
SETTINGS: dict[str, Any] = {"ternary": {"feedback": 0.5}, "sign": {"feedback": 0.5}, "sparse": {"feedback": 0.5}}
SETTINGS["demo"] = {"feedback": 0.9, "topk": 32, "values": "int4"}
LINKS: dict[str, float | None] = {"100 Mbit/s": 100e6, "1 Gbit/s": 1e9, "unlimited": None}
FULL, HIDDEN, LAYERS = 123_653_376, 768, 12
LOCAL_STEPS = 128
STEP_SECONDS = 0.02
HEADERS = 66  # bytes: Ethernet 14, IP 20, TCP 20 and its timestamps 12
TIMEOUT = timedelta(seconds=60)
HELD = 48  # approximate peak memory of a worker, in bytes per parameter


def shapes_of(parameters: int) -> list[Size]:
    """Shapes of a GPT-NeoX of about this size, with fewer layers and tokens than FULL; the smallest are narrower."""
    hidden = HIDDEN if parameters >= FULL // 16 else HIDDEN // 8
    layer = [[hidden]] * 4 + [[3 * hidden, hidden], [3 * hidden], [hidden, hidden], [hidden]]
    layer += [[4 * hidden, hidden], [4 * hidden], [hidden, 4 * hidden], [hidden]]
    layers = min(LAYERS, max(1, round(LAYERS * parameters / FULL)))
    rest = parameters - layers * (12 * hidden**2 + 13 * hidden) - 2 * hidden
    return [Size(shape) for shape in ([max(1, rest // hidden), hidden], *layer * layers, [hidden], [hidden])]


def codec_of(method: str, shapes: list[Size]) -> Codec:
    return codecs.make(method, **SETTINGS.get(method, {})).of(shapes)


# The workers


class Worker:
    """A worker of this project, with about `parameters` parameters. All get the same requests at the same time."""

    def __init__(self, rank: int, size: int, address: str, store: str, parameters: int) -> None:
        host, _, port = store.rpartition(":")
        self.store = TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False)
        self.plain = Plain(self.store, rank, size, address)
        self.meshes = {tls: Mesh(self.store, f"tls-{tls}", rank, size, address, tls=tls) for tls in (False, True)}
        for mesh in self.meshes.values():
            mesh.connect()
        self.shapes = shapes_of(parameters)
        self.layout = FlatLayout(nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in self.shapes]))
        self.drift = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(rank)).mul_(1e-3)
        for method in METHODS:
            warm_up(codec_of(method, self.shapes), Nesterov())  # before memory is measured
        self.before = _status("VmRSS")
        self.state = GlobalState(self.layout.gather(self.layout.empty()), Nesterov())
        self.scratch = torch.zeros(self.layout.size)
        self.codecs: dict[str, Codec] = {}
        self.workspace = Workspace()
        self.residuals: dict[str, Tensor] = {}

    def parameters(self) -> int:
        return self.layout.size

    def synchronise(self, method: str, tls: bool = False) -> Row:
        """Seconds of a synchronisation, without and with the work on the model, and bytes sent."""
        if method not in self.codecs and method != RAW:
            self.codecs[method] = codec_of(method, self.shapes)
        theta = self.state.parameters
        self.layout.scatter(torch.sub(theta, self.drift, out=self.scratch))  # as if inner steps had been made
        self.plain.sum(torch.zeros(1))
        before, marks = self.sent(), [time.perf_counter()]
        torch.sub(theta, self.layout.gather(self.scratch), out=self.scratch)
        if method in self.residuals:
            self.scratch.add_(self.residuals[method], alpha=self.codecs[method].feedback)
        marks.append(time.perf_counter())
        if method == RAW:
            self.plain.sum(self.scratch)
            marks += 2 * [time.perf_counter()]
        else:
            made, codec = self.state.begin(self.state.full_model), self.codecs[method]
            reduced = self.meshes[tls].reduce(self.scratch, 1.0, codec, made.add, self.workspace)
            self.state.commit(made, LOCAL_STEPS)
            marks.append(time.perf_counter())
            if reduced.error is not None:
                self.residuals.setdefault(method, torch.empty_like(theta)).copy_(reduced.error)
            self.layout.scatter(self.state.parameters)
            marks.append(time.perf_counter())
            self.coded = sum(rows.nbytes for _, rows in reduced.coded) / self.layout.size
        return {"seconds": marks[2] - marks[1], "whole": marks[3] - marks[0], "sent": self.sent() - before}

    def overlap(self, method: str, seconds: float, rounds: int) -> Row:
        """The seconds for which inner steps wait for a synchronisation that runs during them, and bytes sent by each.

        Args:
            seconds: Duration of a round's inner steps.
        """
        model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in self.shapes])
        steps = max(1, round(seconds / STEP_SECONDS))
        diloco = DiLoCo(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            codec=codecs.make(method, **SETTINGS.get(method, {})),
            sync_every=steps,
            quorum=Members(self.meshes[False]),
            overlap=Overlap(),
        )
        exposed: list[float] = []
        before = self.sent()
        while len(exposed) < rounds:
            time.sleep(STEP_SECONDS)
            if diloco.after_inner_step():
                exposed.append(diloco.exposed_seconds)
        if diloco.pending:
            diloco.finish()
        return {"exposed": statistics.median(exposed), "sent": (self.sent() - before) / diloco.round}

    def sent(self) -> int:
        """Bytes sent so far, as the product counts them."""
        return self.plain.sent() + sum(mesh.sent() for mesh in self.meshes.values())

    def counters(self) -> tuple[int, int]:
        """Bytes sent so far: the meter's count, and the interface's without headers (0 on loopback)."""
        time.sleep(0.1)  # lets the kernel send its remaining data
        counters = Path("/sys/class/net/eth0/statistics")
        sent, packets = (int((counters / f"tx_{unit}").read_text()) if INSIDE else 0 for unit in ("bytes", "packets"))
        return self.sent(), sent - HEADERS * packets

    def memory(self, method: str) -> tuple[float, float, float]:
        """Bytes per parameter: permanent, at a synchronisation's peak beyond that, and of the encoded mean."""
        self.residuals.clear()
        self.workspace = Workspace()
        for _ in range(2):
            self.synchronise(method)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        stays = _status("VmRSS")
        self.synchronise(method)
        numbers = self.layout.size
        return (stays - self.before) / numbers, (_status("VmHWM") - stays) / numbers, self.coded


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class TorchftWorker:
    """A replica of torchft's DiLoCo whose rounds have one inner step of negligible duration."""

    def __init__(self, rank: int, size: int, address: str, parameters: int, lighthouse: str) -> None:
        torchft: Any = importlib.import_module("torchft")
        local_sgd: Any = importlib.import_module("torchft.local_sgd")
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes_of(parameters)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.size, self.store = size, TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=lambda state: self.model.load_state_dict(state["model"]),
            state_dict=lambda: {"model": self.model.state_dict()},
            min_replica_size=size,
            use_async_quorum=False,
            init_sync=False,  # all start with the same values
            rank=0,
            world_size=1,
            store_addr=address,
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"worker-{rank}",
            hostname=address,
        )
        outer = torch.optim.SGD(self.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        self.optimizer.register_step_post_hook(self._begins)  # before torchft's hook, which synchronises
        local_sgd.DiLoCo(self.manager, [self.model], self.optimizer, outer, sync_every=1).__enter__()

    def _begins(self, *arguments: Any) -> None:
        self.began = time.perf_counter()

    def synchronise(self, method: str) -> Row:
        for parameter in self.model.parameters():  # torchft discards them
            parameter.grad = torch.ones_like(parameter)
        before = self.manager.current_step()
        self.optimizer.step()
        seconds = time.perf_counter() - self.began
        if (self.manager.current_step(), self.manager.num_participants()) != (before + 1, self.size):
            raise RuntimeError("torchft did not commit, or not with all workers")
        return {"seconds": seconds, "whole": seconds}


class Lighthouse:
    """torchft's coordinator."""

    def __init__(self, rank: int, size: int, address: str) -> None:
        coordination: Any = importlib.import_module("torchft.coordination")
        self.server = coordination.LighthouseServer(bind="0.0.0.0:0", min_replicas=2, join_timeout_ms=10_000)

    def port(self) -> str:
        return str(self.server.address().rpartition(":")[2])


ROLES: dict[str, type] = {"ours": Worker, TORCHFT: TorchftWorker, "lighthouse": Lighthouse}


def serve(roles: dict[str, type]) -> None:
    """Execute requests, each a line of JSON, and answer in the same form."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # gloo prints to stdout
    torch.set_num_threads(1)
    work = json.loads(os.environ[WORK])
    worker = roles[work["role"]](**work["arguments"])
    for line in sys.stdin:
        what, arguments = json.loads(line)
        answers.write(json.dumps(getattr(worker, what)(*arguments)) + "\n")
    os._exit(0)  # without waiting for torchft's threads


# The main process


class Links(Network):
    """The workers' networks, with rate limits."""

    def limit(self, count: int, bandwidth: float | None) -> None:
        """Limit each of the first `count` workers to `bandwidth` bits per second; None: no limit."""
        bucket = f"tbf rate {bandwidth:.0f}bit burst 256kb latency 400ms" if bandwidth else "noqueue"
        for number in range(count):
            command = [*self.inside(number), *f"tc qdisc replace dev eth0 root {bucket}".split()]
            subprocess.run(command, check=True)


class Crew:
    """Processes of one role, which get the same requests.

    Args:
        network: The network whose namespaces they use; None: this process's.
        torchft: The directory in which it is installed.
        program: The program they run: this one, or one that calls `serve` with its own roles.
        arguments: Arguments of the role after rank, size and address.
    """

    def __init__(
        self,
        role: str,
        size: int,
        network: Namespaces | None,
        torchft: Path | None = None,
        program: str = __file__,
        **arguments: Any,
    ) -> None:
        self.role = role
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._processes: list[subprocess.Popen[bytes]] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as in the product's workers
        environment |= {"BENCH_WIRE_INSIDE": "1", "GLOO_SOCKET_IFNAME": "eth0"} if network else {}
        environment |= {"PYTHONPATH": str(torchft)} if torchft else {}
        addresses = [network.address_of(rank) if network else "127.0.0.1" for rank in range(size)]
        if role == "ours":
            with listen("127.0.0.1") as free:
                arguments["store"] = f"{addresses[0]}:{free.getsockname()[1]}"
        for rank, address in enumerate(addresses):
            work = {"role": role, "arguments": {"rank": rank, "size": size, "address": address, **arguments}}
            command = dying_with_parent([*(network.inside(rank) if network else []), sys.executable, program])
            own = {**environment, WORK: json.dumps(work)}
            process = subprocess.Popen(command, env=own, stdin=PIPE, stdout=PIPE, stderr=self._log)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """The results of `what(*arguments)` in all processes."""
        question = (json.dumps([what, arguments]) + "\n").encode()
        with suppress(BrokenPipeError):
            for process in self._processes:
                assert process.stdin
                process.stdin.write(question)
                process.stdin.flush()
        return [self._answer(process, what) for process in self._processes]

    def _answer(self, process: subprocess.Popen[bytes], what: str) -> Any:
        assert process.stdout
        if line := process.stdout.readline():
            return json.loads(line)
        for other in self._processes:
            other.kill()
        self._log.seek(0)
        raise RuntimeError(f"a worker ({self.role}) ended during {what}\n{self._log.read().decode(errors='replace')}")


# The measurements


def measure_bytes(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    for size, share in {2: 1, 4: 4, 8: 16}.items() if not arguments.quick else {2: 32, 4: 128}.items():
        room = int(0.6 * psutil.virtual_memory().available / HELD / size)
        with Crew("ours", size, network, parameters=min(FULL // share, room)) as crew:
            parameters, sent = crew.ask("parameters")[0], {}
            for method in dict.fromkeys([RAW, "fp32", *arguments.methods]):
                before = crew.ask("counters")
                crew.ask("synchronise", method)
                both = zip(crew.ask("counters"), before, strict=True)
                meter, eth0 = zip(*((now[0] - then[0], now[1] - then[1]) for now, then in both), strict=True)
                agree = all(abs(e - m) <= max(0.03 * m, 256e3) for e, m in zip(eth0, meter, strict=True))
                sent[method] = statistics.mean(meter)
                row = {"workers": size, "method": method, "parameters": parameters, "meter": sent[method]}
                row |= {"eth0": statistics.mean(eth0), "agree": agree} if network else {}
                row |= {"/fp32": sent["fp32"] / sent[method]} if "fp32" in sent else {}
                row |= {"/DDP": LOCAL_STEPS * sent[RAW] / sent[method]}
                yield {**row, "MB/round": sent[method] / 1e6 * FULL / parameters}


def measure_time(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    for size in arguments.workers:
        yield from _times(arguments, network, size)


def _times(arguments: argparse.Namespace, network: Links | None, size: int) -> Iterator[Row]:
    with ExitStack() as resources:
        common = {"size": size, "network": network, "parameters": arguments.parameters}
        crew = resources.enter_context(Crew("ours", **common))
        crews = dict.fromkeys([(RAW, False), *itertools.product(arguments.methods, (False, True))], crew)
        if torchft := arguments.torchft:
            port = resources.enter_context(Crew("lighthouse", 1, None, torchft)).ask("port")[0]
            lighthouse = f"http://{network.address if network else '127.0.0.1'}:{port}"
            replicas = Crew(TORCHFT, torchft=torchft, lighthouse=lighthouse, **common)
            crews[TORCHFT, False] = resources.enter_context(replicas)
        for link in arguments.links if network else ["loopback"]:
            bandwidth = LINKS.get(link)
            if network:
                network.limit(size, bandwidth)
            taken: dict[tuple[str, bool], list[Row]] = {way: [] for way in crews}
            for repetition in range(arguments.repetitions + 1):
                for way, asked in crews.items():
                    slowest = max(asked.ask("synchronise", *way), key=lambda answer: float(answer["seconds"]))
                    taken[way] += [slowest] if repetition else []
            plain = _median(taken[RAW, False])
            for method, tls in taken:
                if not tls:
                    rows = taken[method, False]
                    row = {"workers": size, "link": link, "method": method, **_median(rows)}
                    row["x-gloo"] = row["seconds"] / plain["seconds"]
                    if encrypted := taken.get((method, True)):
                        row["tls"] = _median(encrypted)["seconds"]
                        row["x-tls"] = row["tls"] / row["seconds"]
                        row["all-tls"] = [each["seconds"] for each in encrypted]
                    if bandwidth:
                        sent = row.get("sent", plain["sent"])  # torchft sends as many bytes as gloo
                        row["limit"] = 8 * sent / bandwidth
                        row["x-limit"] = row["seconds"] / row["limit"]
                        row["target"] = row["x-limit"] <= 1.1 if method in DENSE else None
                    elif method == "fp32":
                        row["target"] = row["x-gloo"] <= 1.5
                    every = [each["seconds"] for each in rows]
                    yield {**row, "from": min(every), "to": max(every), "all": every}


def _median(rows: list[Row]) -> Row:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure_overlap(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    if network is None:
        return
    with Crew("ours", 2, network, parameters=arguments.parameters) as crew:
        for link, bandwidth in LINKS.items():
            for method in arguments.methods if bandwidth else ():
                network.limit(2, None)
                size = crew.ask("synchronise", method)[0]["sent"]
                network.limit(2, bandwidth)
                assert bandwidth
                seconds = 1.5 * 8 * size / bandwidth + 1
                answers = crew.ask("overlap", method, seconds, arguments.repetitions)
                exposed, sent = max(answer["exposed"] for answer in answers), answers[0]["sent"]
                limit = 8 * sent / bandwidth
                row = {"link": link, "method": method, "sent": sent, "limit": limit, "exposed": exposed}
                yield {**row, "share": exposed / limit, "target": exposed <= 0.05 * limit}


def measure_cpu(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    shapes = shapes_of(arguments.parameters)
    size = sum(shape.numel() for shape in shapes)
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for method in arguments.methods:
        codec, encode, decode = codec_of(method, shapes), [], []
        out = torch.empty_like(codec.arrange(values)[0])
        for _ in range(arguments.repetitions + 1):
            marks = [time.process_time()]
            blocks = codec.arrange(values)[0].split(max(1, SLICE // codec.block))  # as in the product
            rows = [codec.encode(part) for part in blocks]
            marks.append(time.process_time())
            for coded, part in zip(rows, out.split(len(blocks[0])), strict=True):
                codec.decode(coded, part)
            codec.restore(out, min(size, out.numel()))
            marks.append(time.process_time())
            encode.append((marks[1] - marks[0]) * 100e6 / size)
            decode.append((marks[2] - marks[1]) * 100e6 / size)
        least = {"encode": statistics.median(encode[1:]), "decode": statistics.median(decode[1:])}
        yield {"method": method, "bytes": sum(part.nbytes for part in rows) / size, **least}


def measure_threads(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    shapes = shapes_of(arguments.parameters)
    size = sum(shape.numel() for shape in shapes)
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    workspaces = {count: Workspace(Threads(count)) for count in (1, 2)}
    for method in arguments.methods:
        work = Arithmetic(codec_of(method, shapes), values, plain=method == "fp32")
        times: dict[int, list[float]] = {1: [], 2: []}
        for repetition in range(2 * (arguments.repetitions + 1)):
            for count in (1, 2) if repetition % 2 else (2, 1):
                times[count].append(work.seconds(workspaces[count]) * 200e6 / size)
        one, two = min(times[1]), min(times[2])
        many = one / (one / two) ** 4  # 16 is 2 to the power of 4
        yield {"method": method, "1-thread": one, "2-threads": two, "gain": one / two, "1B": 5 * many, "7B": 35 * many}


class Arithmetic:
    """The arithmetic of a synchronisation of two members, without sending: encode, sum, outer step."""

    def __init__(self, codec: Codec, values: Tensor, plain: bool) -> None:
        self.codec, self.plain, self.blocks = codec, plain, codec.arrange(values)[0]
        self.state = GlobalState(torch.zeros(self.blocks.numel()), Nesterov(0.7, 0.9))
        coded = torch.empty(len(self.blocks), codec.row, dtype=torch.uint8)
        self.rows = self.blocks.view(torch.uint8) if plain else coded
        step, count = max(1, SLICE // codec.block), len(self.blocks)
        self.slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def seconds(self, workspace: Workspace) -> float:
        outer_step = self.state.begin(self.state.full_model)

        def encode(now: slice) -> None:
            self.rows[now].copy_(self.codec.encode(self.blocks[now]))

        def join(now: slice) -> None:
            mean = weighted_sum(self.codec, [(0.5, self.rows[now]), (0.5, self.rows[now])], workspace)
            outer_step.add(now.start * self.codec.block, mean.view(-1))

        started = time.perf_counter()
        if not self.plain:
            workspace.threads.run(encode, self.slices)
        workspace.threads.run(join, self.slices)
        return time.perf_counter() - started


def measure_memory(arguments: argparse.Namespace, network: Links | None) -> Iterator[Row]:
    with Crew("ours", 2, network, parameters=arguments.parameters) as crew:
        for method in arguments.methods:
            stays, peak, coded = crew.ask("memory", method)[0]
            yield {"method": method, "stays": stays, "peak": peak, "together": stays + peak, "coded": coded}


# The output

COLUMNS = {
    "bytes": "workers:d method:s parameters:,d meter:,.0f eth0:,.0f agree:ok MB/round:,.2f /fp32:.1f /DDP:,.0f",
    "time": "workers:d link:s method:s seconds:.3f from:.3f to:.3f whole:.3f tls:.3f x-tls:.2f sent:,.0f limit:.3f "
    "x-limit:.2f x-gloo:.2f target:ok",
    "overlap": "link:s method:s sent:,.0f limit:.3f exposed:.3f share:.1% target:ok",
    "cpu": "method:s bytes:.3f encode:.2f decode:.2f",
    "threads": "method:s 1-thread:.2f 2-threads:.2f gain:.2f 1B:.2f 7B:.2f",
    "memory": "method:s stays:.1f peak:.1f together:.1f coded:.2f",
}


NOTES = {
    "bytes": f"bytes a worker sends in a synchronisation; MB/round: scaled up to {FULL:,} parameters",
    "time": "seconds of a synchronisation with {parameters:,} parameters; sent: bytes",
    "overlap": "seconds for which inner steps wait, with {parameters:,} parameters; share: relative to the limit",
    "cpu": "CPU seconds for 100M numbers, on one thread (measured with {parameters:,}); bytes: encoded size per number",
    "threads": "seconds to encode, sum and step 200M parameters (measured with {parameters:,}); 1B, 7B: on 16 cores",
    "memory": "bytes per parameter on the host, measured with {parameters:,}",
}


def shown(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return ("ok" if value else "NOT ok") if form == "ok" else f"{value:{form}}"


def report(section: str, parameters: int, rows: Iterator[Row]) -> list[Row]:
    """Print a section's rows as they arrive; returns them."""
    columns = dict(column.split(":") for column in COLUMNS[section].split())
    print(f"\n{section}: {NOTES[section].format(parameters=parameters)}")
    print("".join(f"{name:>12}" for name in columns), flush=True)
    told = []
    for row in rows:
        print("".join(f"{shown(row.get(name), form):>12}" for name, form in columns.items()), flush=True)
        told.append(row)
    return told


def main() -> None:
    measures = {"bytes": measure_bytes, "time": measure_time, "overlap": measure_overlap}
    measures |= {"cpu": measure_cpu, "threads": measure_threads, "memory": measure_memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=measures, default=list(measures))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--parameters", type=int, default=10_000_000, help="for time, cpu, threads and memory")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="for time")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS), help="for time")
    parser.add_argument("--torchft", type=Path, help="directory in which torchft is installed (`pip install --target`)")
    parser.add_argument("--quick", action="store_true", help="a single small measurement of everything")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.repetitions = min(arguments.parameters, 1_000_000), 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all child processes end
    torch.set_num_threads(1)
    results: dict[str, list[Row]] = {}
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores; load {load:.1f} before the start")
    with ExitStack() as resources:
        network = None
        try:
            network = resources.enter_context(Links(8))
        except PermissionError as error:
            print(f"no network namespaces, using loopback: {error}")
        for section in arguments.sections:
            results[section] = report(section, arguments.parameters, measures[section](arguments, network))
    facts = {"cores": os.cpu_count(), "load": load, "torch": torch.__version__, "parameters": arguments.parameters}
    write_json(OUTPUT, {**facts, "repetitions": arguments.repetitions, **results})


if __name__ == "__main__":
    if WORK in os.environ:
        serve(ROLES)
    else:
        main()
