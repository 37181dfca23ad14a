"""What a synchronisation costs: bytes on the wire, seconds over slow links, CPU seconds, memory.

    python tests/benchmarks/bench_wire.py [--sections bytes time overlap cpu threads memory] [--methods fp32 int8 ...]
        [--parameters 10000000] [--repetitions 5] [--torchft DIRECTORY] [--quick]

Workers are processes, one thread each, in a network namespace each, with an `eth0` that leads to a bridge. (This needs
root. Where it is not allowed they are on loopback, and what needs an interface or a limited link is left out.) A
synchronisation is what the product does once the others are there: the collective over the transport, with the codec
and, piece by piece, the outer step and the hash of the vote. What it agrees on with etcd is not in here. `gloo` is the
yardstick: one plain all-reduce of the same float32 numbers by torch's gloo, over connections of its own. Codecs are set
as the configuration has them by default; `demo` sends 32 coefficients a tile in 4 bits.

bytes   What a worker sends in a round, for 2, 4 and 8 workers. The parameters are those of a GPT-NeoX with 124M of them
        (12 layers of 768, tied embedding, 50257 tokens), or fewer (see the column) where the machine could not hold
        them or would take long: `MB/round` is then scaled up to all of them (too much, what every message has whatever
        its size: gloo's own headers, 20 % of `sparse` among 8). `meter` is what the product reports: TCP payload, from
        the kernel's `tcp_info`. `eth0` is what the interface has counted meanwhile, less 66 bytes of Ethernet, IP and
        TCP headers for each of its packets. They must agree within 3 % or 256 KB. `/fp32`: how much less than DiLoCo
        in fp32; `/DDP`: than averaging gradients by `gloo` in each of 128 inner steps.
time    Seconds, 2 (or --workers) workers, over links that `tc tbf` limits at both ends, and over one that nothing
        limits: medians of the slowest worker, the methods alternating, after a first round that is not counted; without
        TLS, and with it (`tls`, and its ratio `x-tls` to the seconds without). `limit` is bytes sent / bandwidth,
        payload alone; headers take 4.6 % more, and acknowledgements of what comes the other way 2.2 %, so that 1.07 is
        TCP's best. Targets: `x-limit` 1.10 for dense codecs; unlimited, `x-gloo` 1.5 for fp32. `whole` includes what is
        done with the model, from its parameters to the pseudo-gradient, and back. With --torchft, its DiLoCo does the
        same, quorum and vote included (bench_faults.py says how to install it).
overlap The same over the limited links while inner steps go on (of 20 ms that need no CPU): `exposed` is how long they
        stood still for it, median of the slower worker. Target: 5 % of `limit`.
cpu     CPU seconds to encode and to decode 100M numbers, on one thread.
threads Seconds to encode, sum two members' messages and take the outer step for 200M parameters, on 1 and on 2 threads
        in turn (least of the repetitions: what else the machine does only adds). Target: `gain` 1.7. 1B and 7B: the
        same on paper, on 16 cores of this kind, if the gain goes on as from 1 to 2.
memory  Bytes a parameter on the host, beside the model, from what the kernel says of the process: what stays between
        synchronisations (4 each for the global parameters, the momentum, both again for the next outer step, scratch;
        with error feedback, the residual and the error), and what one of 2 workers takes beyond that at its peak.
        `coded`: a mean as it is kept, for those who are late, of the last rounds; counted once, in the peak.

It prints a table for each, and writes build/wire.json. It needs a quiet machine with 2 cores, and 10 minutes;
with --quick everything is small, and it takes about one.
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
sys.path.insert(0, str(ROOT))  # for what tests share

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
INSIDE = "BENCH_WIRE_INSIDE" in os.environ  # whether this is a worker with a namespace of its own
WORK = "BENCH_WIRE_WORK"  # environment of a worker: its role and that role's arguments, as JSON
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
HELD = 48  # bytes a parameter that a worker holds at its peak, about


def shapes_of(parameters: int) -> list[Size]:
    """Shapes of a GPT-NeoX of about so many parameters: fewer layers and tokens than FULL, and narrower at the end."""
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
    """One of ours, with a model of about so many parameters. What these are asked, all do at the same time."""

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
        """Seconds of a synchronisation, without and with what is done to the model, and bytes sent."""
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
        """How long inner steps stand still for a synchronisation that goes on beside them, and bytes sent by each.

        Args:
            seconds: Of a round's inner steps.
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
        """Bytes sent so far, as the meter has it, and as the interface has it, less headers (0 on loopback)."""
        time.sleep(0.1)  # what the kernel still had to send is gone
        counters = Path("/sys/class/net/eth0/statistics")
        sent, packets = (int((counters / f"tx_{unit}").read_text()) if INSIDE else 0 for unit in ("bytes", "packets"))
        return self.sent(), sent - HEADERS * packets

    def memory(self, method: str) -> tuple[float, float, float]:
        """Bytes a parameter: that stay, that a synchronisation takes beyond that at its peak, and of the coded mean."""
        self.residuals.clear()
        self.workspace = Workspace()
        for _ in range(2):
            self.synchronise(method)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        stays = _status("VmRSS")
        self.synchronise(method)
        numbers = self.layout.size
        return (stays - self.before) / numbers, (_status("VmHWM") - stays) / numbers, self.coded


def _status(field: str) -> int:
    """Bytes, from this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class TorchftWorker:
    """A replica of torchft's DiLoCo, whose rounds are one inner step that is next to nothing."""

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
            init_sync=False,  # all begin alike
            rank=0,
            world_size=1,
            store_addr=address,
            store_port=self.store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"worker-{rank}",
            hostname=address,
        )
        outer = torch.optim.SGD(self.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        self.optimizer.register_step_post_hook(self._begins)  # before torchft's own, which synchronises
        local_sgd.DiLoCo(self.manager, [self.model], self.optimizer, outer, sync_every=1).__enter__()

    def _begins(self, *arguments: Any) -> None:
        self.began = time.perf_counter()

    def synchronise(self, method: str) -> Row:
        for parameter in self.model.parameters():  # torchft throws them away
            parameter.grad = torch.ones_like(parameter)
        before = self.manager.current_step()
        self.optimizer.step()
        seconds = time.perf_counter() - self.began
        if (self.manager.current_step(), self.manager.num_participants()) != (before + 1, self.size):
            raise RuntimeError("torchft has not committed, or not with all")
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
    """Do what comes in, a line of JSON each, and answer likewise."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # gloo prints
    torch.set_num_threads(1)
    work = json.loads(os.environ[WORK])
    worker = roles[work["role"]](**work["arguments"])
    for line in sys.stdin:
        what, arguments = json.loads(line)
        answers.write(json.dumps(getattr(worker, what)(*arguments)) + "\n")
    os._exit(0)  # torchft's threads would take their time


# Those who ask them


class Links(Network):
    """The workers' networks, with limits."""

    def limit(self, count: int, bandwidth: float | None) -> None:
        """Let each of the first `count` send so many bits a second at most."""
        bucket = f"tbf rate {bandwidth:.0f}bit burst 256kb latency 400ms" if bandwidth else "noqueue"
        for number in range(count):
            command = [*self.inside(number), *f"tc qdisc replace dev eth0 root {bucket}".split()]
            subprocess.run(command, check=True)


class Crew:
    """Processes of one role, which are asked together.

    Args:
        network: In whose namespaces they are; None: where everything is.
        torchft: Where it is installed.
        program: What they run: this, or what calls `serve` with roles of its own.
        arguments: Of the role, beyond rank, size and address.
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
        environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as the product's workers have it
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
        """All their answers to `what(*arguments)`."""
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
        raise RuntimeError(f"a worker ({self.role}) has ended at {what}\n{self._log.read().decode(errors='replace')}")


# What is measured


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
                        sent = row.get("sent", plain["sent"])  # torchft sends as much as gloo
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
            blocks = codec.arrange(values)[0].split(max(1, SLICE // codec.block))  # as the product has them
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
        many = one / (one / two) ** 4  # 16 is 2 to the 4
        yield {"method": method, "1-thread": one, "2-threads": two, "gain": one / two, "1B": 5 * many, "7B": 35 * many}


class Arithmetic:
    """What a synchronisation of two members computes, without sending: encode, sum, outer step."""

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


# What is told

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
    "overlap": "seconds for which inner steps stand still, with {parameters:,} parameters; share: of the limit",
    "cpu": "CPU seconds for 100M numbers, on one thread (measured with {parameters:,}); bytes: of each number, coded",
    "threads": "seconds to encode, sum and step 200M parameters (measured with {parameters:,}); 1B, 7B: on 16 cores",
    "memory": "bytes a parameter on the host, of {parameters:,}",
}


def shown(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return ("ok" if value else "NOT ok") if form == "ok" else f"{value:{form}}"


def report(section: str, parameters: int, rows: Iterator[Row]) -> list[Row]:
    """Print a section's rows as they come; returns them."""
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
    parser.add_argument("--torchft", type=Path, help="where torchft is installed (`pip install --target`)")
    parser.add_argument("--quick", action="store_true", help="everything once, and small")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.repetitions = min(arguments.parameters, 1_000_000), 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left running
    torch.set_num_threads(1)
    results: dict[str, list[Row]] = {}
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores; load {load:.1f} before the start")
    with ExitStack() as resources:
        network = None
        try:
            network = resources.enter_context(Links(8))
        except PermissionError as error:
            print(f"no namespaces here, all is on loopback: {error}")
        for section in arguments.sections:
            results[section] = report(section, arguments.parameters, measures[section](arguments, network))
    facts = {"cores": os.cpu_count(), "load": load, "torch": torch.__version__, "parameters": arguments.parameters}
    write_json(OUTPUT, {**facts, "repetitions": arguments.repetitions, **results})


if __name__ == "__main__":
    if WORK in os.environ:
        serve(ROLES)
    else:
        main()
