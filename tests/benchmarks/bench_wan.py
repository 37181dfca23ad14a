"""The share of a long, lossy link that a synchronisation and a joiner's state transfer use.

    python tests/benchmarks/bench_wan.py [--parameters 15000000] [--rounds 3] [--loss 0 0.0001 0.001] [--kinds ...]

Two workers, each in its own network namespace with cubic congestion control, the default of most hosts. An emulated
link (tests/network/long_link.c) of 500 Mbit/s with a round trip of 100 ms connects them and loses packets at random. A
synchronisation is the product's collective in fp32: each sends the other all numbers, both at the same time. Seconds
are the slower worker's, from the call to the return, so they include half a round trip. Kinds:

ours            the product's defaults: TLS, as many streams as it chooses, BBR
ours-N          with N streams
plain           as `ours`, but without TLS
cubic, cubic-N  as `ours`, but the kernel does not permit BBR
sockets-N       the link's limit: N plain sockets with BBR, used in both directions, and nothing else
sockets-cubic-N the same with cubic
gloo            gloo's all-reduce of the same numbers, over its single connection; with loss, where it takes minutes, a
                part of them is reduced once, and the time is extrapolated
state           a joiner's transfer of as many bytes from a donor, one way, with defaults; the first opens connections
state-cubic     the same without BBR

`cold` is the first transfer over new connections, which are opened before it; `warm` are the later ones. All are
medians, minima and maxima. `of the link` has a target for each loss rate: 80 % without loss, 70 % with 0.01 %, 50 %
with 0.1 %. The link's rate is that of IP packets, whose headers take 3.5 %, and the last byte takes half a round trip
to arrive, so at most 91 % is possible with 60 MB.

It needs root, /dev/net/tun, iproute2 and a C compiler, and some minutes.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import Store, TCPStore

sys.path.insert(0, str(Path(__file__).parents[2]))  # for shared test code

from tests.benchmarks.bench_wire import WORK, Crew, serve
from tests.benchmarks.mesh import Mesh, Plain
from tests.network.namespaces import LongLink
from trainer.diloco.codecs import Fp32
from trainer.diloco.threads import Workspace
from trainer.process import prefer_bbr
from trainer.transport import stream
from trainer.transport.donor import Offer
from trainer.transport.fetch import fetch
from trainer.transport.link import BULK

MBIT, ROUND_TRIP = 500.0, 0.1
TARGETS = {0.0: 0.8, 0.0001: 0.7, 0.001: 0.5}
KINDS = ["ours", "plain", "ours-1", "ours-8", "ours-16", "cubic", "cubic-16", "sockets-4", "gloo", "state"]
FEWER = {0.0001: 0.3, 0.001: 0.1}  # by loss: the fraction of the numbers that gloo sends
PIECE = 256 << 10


@contextmanager
def bbr(permitted: bool) -> Iterator[None]:
    """Permit or forbid BBR for sockets that are created inside this context."""
    if permitted:
        yield
    else:
        with mock.patch.object(stream, "prefer_bbr"):
            yield


class Ours:
    """A collective over the product's transport."""

    def __init__(
        self, store: Store, name: str, rank: int, address: str, values: Tensor, number: int, tls: bool
    ) -> None:
        self._values, self._workspace = values, Workspace()
        self.mesh = Mesh(store, name, rank, 2, address, tls=tls, streams=number)
        self.mesh.connect()
        self.close, self.streams = self.mesh.transport.close, 0

    def move(self) -> None:
        self.mesh.reduce(self._values, 1.0, Fp32(), lambda start, mean: None, self._workspace)
        self.streams = self.mesh.streams()


class State:
    """A joiner (the second worker) that fetches from a donor."""

    def __init__(self, store: Store, name: str, rank: int, address: str, values: Tensor) -> None:
        half = len(values) // 2
        offer = Offer({"round": 1}, {"parameters": values[:half], "momentum": values[half:]})
        self._fetches, self.streams = rank == 1, 0
        self.mesh = Mesh(store, name, rank, 2, address, offers={"state": offer})
        self.close = self.mesh.transport.close

    def move(self) -> None:
        if self._fetches:
            fetch(self.mesh.transport, "state", self.mesh.donors(), timeout=60)
            self.streams = self.mesh.streams(BULK)


class Sockets:
    """Pieces over plain sockets; each socket that is ready takes the next piece."""

    def __init__(
        self, store: Store, name: str, rank: int, address: str, values: Tensor, number: int, fast: bool
    ) -> None:
        self._bytes, self.streams = memoryview(values.numpy()).cast("B"), number
        self._into = memoryview(torch.empty_like(values).numpy()).cast("B")
        if rank == 0:
            with socket.create_server((address, 0)) as server:
                store.set(name, json.dumps([address, server.getsockname()[1]]))
                self._sockets = [server.accept()[0] for _ in range(number)]
        else:
            where = tuple(json.loads(store.get(name)))
            self._sockets = [socket.create_connection(where) for _ in range(number)]
        for each in self._sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            if fast:
                prefer_bbr(each)

    def move(self) -> None:
        size = len(self._bytes)
        starts, arrived, lock = iter(range(0, size, PIECE)), [0], threading.Lock()

        def send(each: socket.socket) -> None:
            for start in starts:
                piece = self._bytes[start : start + PIECE]
                each.sendall(len(piece).to_bytes(4))
                each.sendall(piece)
            each.sendall(bytes(4))

        def receive(each: socket.socket) -> None:
            while length := int.from_bytes(each.recv(4, socket.MSG_WAITALL)):
                each.recv_into(self._into[:length], length, socket.MSG_WAITALL)
                with lock:
                    arrived[0] += length

        threads = [threading.Thread(target=work, args=(each,)) for each in self._sockets for work in (send, receive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert arrived[0] == size

    def close(self) -> None:
        for each in self._sockets:
            each.close()


class Gloo:
    def __init__(self, store: Store, name: str, rank: int, address: str, values: Tensor) -> None:
        self._values, self.streams = values.clone(), 1
        self.plain: Plain | None = Plain(store_of(store, name), rank, 2, address)

    def move(self) -> None:
        assert self.plain
        self.plain.sum(self._values)

    def close(self) -> None:
        self.plain = None


def store_of(store: Store, name: str) -> Store:
    return torch.distributed.PrefixStore(name, store)


class Worker:
    """One of two workers, with connections of one kind at a time."""

    def __init__(self, rank: int, size: int, address: str, store: str, parameters: int) -> None:
        host, _, port = store.rpartition(":")
        self._store = TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False)
        self._rank, self._address, self._values = rank, address, torch.ones(parameters)
        self._open: Ours | State | Sockets | Gloo | None = None

    def open(self, kind: str, name: str, share: float) -> None:
        """Open new connections of a kind, for a fraction `share` of the numbers."""
        values = self._values[: int(share * len(self._values))]
        common = self._store, name, self._rank, self._address, values
        what, _, rest = kind.partition("-")
        with bbr("cubic" not in kind):
            if what == "state":
                self._open = State(*common)
            elif what == "gloo":
                self._open = Gloo(*common)
            elif what == "sockets":
                self._open = Sockets(*common, int(rest.removeprefix("cubic-")), "cubic" not in kind)
            else:
                self._open = Ours(*common, int(rest or 0), what != "plain")

    def move(self, permitted: bool) -> float:
        """Seconds of one transfer."""
        assert self._open
        with bbr(permitted):
            started = time.perf_counter()
            self._open.move()
            return time.perf_counter() - started

    def streams(self) -> int:
        assert self._open
        return self._open.streams

    def close(self) -> None:
        assert self._open
        self._open.close()


def measure(
    crew: Crew, kind: str, loss: float, times: int, rounds: int, wait: float
) -> tuple[list[float], list[float], int]:
    """Seconds of cold and of warm transfers of all numbers, and the number of streams."""
    cold: list[float] = []
    warm: list[float] = []
    share = FEWER.get(loss, 1.0) if kind == "gloo" else 1.0
    slow, streams = share < 1, 0
    for number in range(1 if slow else times):
        crew.ask("open", kind, f"{kind}-{number}", share)
        for each in range(1 if slow else 1 + rounds):
            time.sleep(wait if each else 0)
            seconds = max(crew.ask("move", "cubic" not in kind)) / share
            (warm if each else cold).append(seconds)
        streams = max(crew.ask("streams"))
        crew.ask("close")
    return cold, warm or cold, streams


def spread(values: list[float], form: str) -> str:
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=15_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds after each first one")
    parser.add_argument("--times", type=int, default=2, help="how many times connections are opened")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds of pause before each round except the first")
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.0001, 0.001], help="lost fraction of packets")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--quick", action="store_true", help="a single small measurement of everything")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.times, arguments.rounds = 1_000_000, 1, 1
    mbit = arguments.parameters * 32 / 1e6
    print(f"{os.cpu_count()} cores; {MBIT:.0f} Mbit/s, {ROUND_TRIP * 1e3:.0f} ms; {mbit:.0f} Mbit each way")
    print(f"{'loss':>7} {'kind':16}{'streams':>8}{'cold (s)':>22}{'warm (s)':>22}{'of the link, warm':>22}")
    for loss in arguments.loss:
        with ExitStack() as stack:
            link = stack.enter_context(LongLink())
            program = {"program": __file__, "parameters": arguments.parameters}
            crew = stack.enter_context(Crew("ours", 2, link, **program))
            link.shape(MBIT, ROUND_TRIP, loss)
            for kind in arguments.kinds:
                cold, warm, streams = measure(crew, kind, loss, arguments.times, arguments.rounds, arguments.wait)
                shares = [mbit / seconds / MBIT for seconds in warm]
                reached = "" if statistics.median(shares) >= TARGETS.get(loss, 0) else "  below"
                row = f"{loss:>7.2%} {kind:16}{streams:>8}{spread(cold, '.2f'):>22}{spread(warm, '.2f'):>22}"
                print(f"{row}{spread(shares, '.0%'):>22}{reached}", flush=True)


if __name__ == "__main__":
    if WORK in os.environ:
        serve({"ours": Worker})
    else:
        main()
