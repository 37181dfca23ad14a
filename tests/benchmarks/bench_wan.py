"""What lost packets cost a synchronisation over a long link: with cubic, the default of hosts, and with BBR.

    python tests/benchmarks/bench_wan.py [--parameters 5000000] [--rounds 3] [--loss 0 0.0001 0.001]

Two workers, in a network namespace each, whose congestion control is cubic, as most hosts have it. Between them lies an
emulated link (tests/network/long_link.c) of 500 Mbit/s and 100 ms round trip, which loses packets at random. A
synchronisation is the product's collective over gloo, in fp32: each sends the other all numbers. It is made over two
process groups in turn: one as the product forms it (`bbr`), and one without what it sets (`cubic`). `cold` is the first
of each, the others are given as the least and the most.

It needs root, /dev/net/tun, iproute2 and a C compiler, and five minutes, most of them for cubic.
"""

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from torch.distributed import PrefixStore, TCPStore

sys.path.insert(0, str(Path(__file__).parents[2]))  # for what tests share

from tests.benchmarks.bench_wire import WORK, Crew, serve
from tests.network.namespaces import LongLink
from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import Workspace, weighted_mean
from trainer.elastic.mesh import form_group, gloo_device
from trainer.transport.wire_meter import WireMeter

MBIT, ROUND_TRIP = 500.0, 0.1
TIMEOUT = timedelta(seconds=300)


class Worker:
    """One of two members, with a process group of each kind."""

    def __init__(self, rank: int, size: int, address: str, store: str, parameters: int) -> None:
        host, _, port = store.rpartition(":")
        base = TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False)
        with mock.patch.object(WireMeter, "prefer_bbr"):
            self.groups = {
                "cubic": form_group(PrefixStore("cubic", base), rank, size, gloo_device("", address), TIMEOUT)
            }
        self.groups["bbr"] = form_group(PrefixStore("bbr", base), rank, size, gloo_device("", address), TIMEOUT)
        self.values, self.workspace = torch.ones(parameters), Workspace()

    def synchronise(self, kind: str) -> float:
        """Seconds of one synchronisation."""
        group, _ = self.groups[kind]
        started = time.perf_counter()
        weighted_mean(group, self.values, 1.0, Fp32(), TIMEOUT, lambda start, mean: None, self.workspace)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="after the first")
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.0001, 0.001], help="of packets, each way")
    arguments = parser.parse_args()
    mbit = arguments.parameters * 32 / 1e6
    print(f"{os.cpu_count()} cores; {MBIT:.0f} Mbit/s, {ROUND_TRIP * 1e3:.0f} ms; {mbit:.0f} Mbit each way")
    print(f"{'loss':>8}{'hosts have':>12}{'cold (s)':>10}{'others (s)':>14}{'Mbit/s':>12}{'of the link':>14}")
    for loss in arguments.loss:
        with LongLink() as link, Crew("ours", 2, link, program=__file__, parameters=arguments.parameters) as crew:
            link.shape(MBIT, ROUND_TRIP, loss)
            kinds = ["cubic", "bbr"]
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for number in range(arguments.rounds + 1):
                for kind in kinds if number % 2 else reversed(kinds):
                    times[kind].append(max(crew.ask("synchronise", kind)))
            for kind, (cold, *others) in times.items():
                least, most = min(others), max(others)
                speeds = [mbit / seconds for seconds in (most, least)]
                share = f"{speeds[0] / MBIT:.0%} to {speeds[1] / MBIT:.0%}"
                seconds, rate = f"{least:.2f} to {most:.2f}", f"{speeds[0]:.0f} to {speeds[1]:.0f}"
                print(f"{loss:>8.2%}{kind:>12}{cold:>10.2f}{seconds:>14}{rate:>12}{share:>14}", flush=True)


if __name__ == "__main__":
    if WORK in os.environ:
        serve({"ours": Worker})
    else:
        main()
