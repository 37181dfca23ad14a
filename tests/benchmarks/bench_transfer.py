"""State transfer on loopback: its speed, and its cost for a donor's training thread.

    python tests/benchmarks/bench_transfer.py [--parameters 100000000] [--repeats 5] [--tls]

Donor processes serve a global state like DiLoCo's: parameters and outer momentum, float32. Each trains at the same
time, in a loop of small matrix products on its main thread. Windows with and without a transfer alternate, and their
steps are compared. The last row is a control: its donor does not train, and the steps are those of a bystander, a
process without a state to serve. The bystander's slowdown comes from busy cores, which also run the fetcher. In a real
run, that is on another machine. Only a donor's additional slowdown is the cost of serving.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from trainer.transport.credentials import Credentials, credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.fetch import fetch
from trainer.transport.transport import Transport

SECRET = b"a secret of this benchmark alone"
WINDOW = 1.0  # seconds without a transfer, before each transfer


def membership(tls: bool) -> Credentials:
    return replace(credentials(SECRET, "tls" if tls else "none"), loopback=True)


def worker(parent: Connection, parameters: int, tls: bool, id: str, serves: bool, trains: bool) -> None:
    """Serve or train until a stop message; then report (start, duration) of every step, on the system's clock."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(parameters if serves else 0, generator=generator) for name in ("parameters", "momentum")}
    weights, steps = torch.rand(192, 192, generator=generator), []
    donor = Donor({"state/1": Offer({"round": 1}, state)}.get)
    with Transport(id, ["127.0.0.1"], membership(tls), handle=donor) as transport:
        parent.send((id, transport.endpoints) if serves else None)
        while not parent.poll(None if not trains else 0):
            started = time.monotonic()
            x = weights
            for _ in range(30):
                x = torch.tanh(x @ weights)
            steps.append((started, time.monotonic() - started))
    parent.send(steps)


Role = tuple[bool, bool]  # serves, trains


def measure(
    roles: list[Role], parameters: int, repeats: int, tls: bool
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each transfer, and of each step without and with a transfer."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in roles]
    processes = [
        context.Process(target=worker, args=(theirs, parameters, tls, f"{number:03}", *role), daemon=True)
        for number, ((_, theirs), role) in enumerate(zip(pipes, roles, strict=True))
    ]
    for process in processes:
        process.start()
    donors = dict(donor for ours, _ in pipes if (donor := ours.recv()))
    target = {name: torch.zeros(parameters) for name in ("parameters", "momentum")}  # its pages are already allocated

    def into(meta: object, layout: object) -> dict[str, Tensor]:
        return target

    idle, busy = [], []
    with Transport("joiner", ["127.0.0.1"], membership(tls)) as transport:
        fetch(transport, "state/1", donors, into=into, timeout=120)  # warms caches and buffers
        for _ in range(repeats):
            started = time.monotonic()
            time.sleep(WINDOW)
            between = time.monotonic()
            fetch(transport, "state/1", donors, into=into, timeout=120)
            idle.append((started, between))
            busy.append((between, time.monotonic()))
    for ours, _ in pipes:
        ours.send("stop")
    steps = [step for ours, _ in pipes for step in ours.recv()]
    for process in processes:
        process.join()

    def inside(windows: list[tuple[float, float]]) -> list[float]:
        return [d for at, d in steps if any(low <= at and at + d <= high for low, high in windows)]

    return [high - low for low, high in busy], inside(idle), inside(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tls", action="store_true", help="encrypt")
    parser.add_argument("--quick", action="store_true", help="a single small measurement of everything")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.repeats = 4_000_000, 1
    torch.set_num_threads(1)
    size = 2 * 4 * arguments.parameters / 1e9
    print(f"{size:.2f} GB of state, {arguments.repeats} transfers each, {os.cpu_count()} processors; medians")
    print("donors             seconds    GB/s   step, alone   step, during   ratio   ratio of means")
    rows: dict[str, list[Role]] = {
        "1": [(True, True)],
        "2": [(True, True)] * 2,
        "1, and bystander": [(True, False), (False, True)],
    }
    for name, roles in rows.items():
        seconds, idle, busy = measure(roles, arguments.parameters, arguments.repeats, arguments.tls)
        took, alone, during = (statistics.median(values) for values in (seconds, idle, busy))
        means = statistics.mean(busy) / statistics.mean(idle)
        print(
            f"{name:<17} {took:>8.2f} {size / took:>7.2f} {alone * 1e3:>10.2f} ms {during * 1e3:>11.2f} ms "
            f"{during / alone:>7.2f} {means:>16.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
