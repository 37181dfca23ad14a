"""Members of a run without etcd: each has a transport, and all are connected.

`connected(3)` are transports of threads of this process, `groups(3)` their groups for one collective.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import weighted_mean
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import Credentials, credentials
from trainer.transport.group import Group
from trainer.transport.link import Link
from trainer.transport.stream import Key
from trainer.transport.transport import Transport

LOCAL = "127.0.0.1"
SECRET = b"the secret of the tests' run"
PATIENCE = 60.0  # seconds: for a busy machine
FIRST: Key = (1, 1, 1)
SOON: dict[str, Any] = {"timeouts": TransportTimeouts(dial_back=0.2, relay=20.0), "silence": 20.0}


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Return when a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def names(size: int) -> list[str]:
    """The members' ids, in rank order."""
    return [f"{rank:03d}-member" for rank in range(size)]


def member(rank: int, address: str = LOCAL, of: Credentials | None = None, **options: Any) -> Transport:
    """A member that is connected to nobody yet. By default it waits for long: no test is about silence by accident."""
    options = {"silence": PATIENCE, **options}
    return Transport(names(rank + 1)[rank], [address], of or credentials(SECRET), **options)


def connect(transports: Sequence[Transport]) -> None:
    """Connect all with all."""
    endpoints = {each.id: each.endpoints for each in transports}
    with ThreadPoolExecutor(len(transports)) as pool:
        for missing in pool.map(lambda each: each.connect(endpoints, PATIENCE), transports):
            assert not missing, missing


@contextmanager
def connected(size: int, address: str = LOCAL, **options: Any) -> Iterator[list[Transport]]:
    """So many members, all in this process. `options` are `member`'s."""
    with ExitStack() as stack:
        transports = [stack.enter_context(member(rank, address, **options)) for rank in range(size)]
        connect(transports)
        yield transports


@contextmanager
def groups(size: int, attempt: Key = FIRST, **options: Any) -> Iterator[list[Group]]:
    """The members' groups of one attempt, in rank order."""
    with connected(size, **options) as transports:
        yield [each.group(names(size), attempt) for each in transports]


def link(here: Transport, there: Transport) -> Link:
    return here.prepare({there.id: there.endpoints})[there.id]


def reduce(transports: list[Transport], attempt: Key = FIRST, size: int = 50_000) -> list[Tensor]:
    """A collective of all; each one's mean, which is 1 everywhere."""
    ids = [each.id for each in transports]

    def one(transport: Transport) -> Tensor:
        mean, failed = torch.zeros(size), True

        def on_chunk(start: int, piece: Tensor) -> None:
            mean[start : start + len(piece)] = piece

        values = torch.full((size,), 2.0 * ids.index(transport.id) / (len(ids) - 1))
        try:
            weighted_mean(transport.group(ids, attempt), values, 1.0, Fp32(), on_chunk)
            failed = False
        finally:
            transport.finish(ids, attempt, failed)
        return mean

    with ThreadPoolExecutor(len(transports)) as pool:
        means = list(pool.map(one, transports))
    assert all(torch.allclose(mean, torch.ones(size)) for mean in means)
    return means


def swap(one: Transport, other: Transport, attempt: Key = FIRST) -> None:
    """A message in either direction arrives."""
    sent = [torch.arange(100_000), torch.arange(100_000) + 7]
    came = [torch.zeros(100_000, dtype=torch.int64) for _ in sent]
    ends = [link(one, other), link(other, one)]
    pending = [end.receive(attempt, 1, into) for end, into in zip(ends, came, strict=True)]
    pending += [end.send(attempt, 1, message) for end, message in zip(ends, sent, strict=True)]
    for each in pending:
        each.wait(PATIENCE)
    assert torch.equal(came[0], sent[1]) and torch.equal(came[1], sent[0])


@contextmanager
def nowhere() -> Iterator[str]:
    """An endpoint that refuses connections."""
    with socket.socket() as taken:
        taken.bind((LOCAL, 0))  # and does not listen
        yield f"{LOCAL}:{taken.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """An endpoint at which connections are accepted, and nothing is said."""
    with socket.create_server((LOCAL, 0)) as server:
        yield f"{LOCAL}:{server.getsockname()[1]}"


def without_endpoint(rank: int, endpoint: str = "", of: Credentials | None = None, **options: Any) -> Transport:
    """A member that nobody can dial."""
    transport = Transport(names(rank + 1)[rank], [], of or credentials(SECRET), **{**SOON, **options})
    transport.endpoints = (endpoint,) if endpoint else ()
    return transport
