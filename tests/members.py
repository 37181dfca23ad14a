"""Members of a run without etcd: each has a transport, and all are connected.

`connected(3)` are transports of threads of this process, `groups(3)` their groups for one collective. Processes `meet`
over a torch store that all of them share; `Members` is the quorum of a `DiLoCo` in each.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import Store

from trainer.diloco import Commit, LocalQuorum, RoundReport
from trainer.diloco.collective import Workspace, weighted_mean
from trainer.diloco.quorum import OnChunk
from trainer.diloco.state import Fragment
from trainer.transport.credentials import Credentials, credentials
from trainer.transport.group import Group
from trainer.transport.stream import Key
from trainer.transport.transport import Transport

LOCAL = "127.0.0.1"
SECRET = b"the secret of the tests' run"
PATIENCE = 60.0  # seconds: for a busy machine
FIRST: Key = (1, 1, 1)


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


def meet(store: Store, rank: int, size: int, address: str = LOCAL, **options: Any) -> Transport:
    """The transport of a member that is a process of its own, connected with the others', which do the same.

    Args:
        store: Shared by all; each pair of a store (a prefix) and a transport is used once.
    """
    transport = member(rank, address, **options)
    ids = names(size)
    store.set(ids[rank], json.dumps(transport.endpoints))
    store.wait(ids, timedelta(seconds=PATIENCE))
    missing = transport.connect({id: json.loads(store.get(id)) for id in ids}, PATIENCE)
    assert not missing, missing
    return transport


class Members(LocalQuorum):
    """A quorum whose members are fixed: all of them, always. Each collective is an attempt of its own.

    Args:
        term: Of the keys; a second quorum on the same links needs a higher one.
    """

    def __init__(self, transport: Transport, size: int, term: int = 1) -> None:
        super().__init__()
        self.transport, self.names, self.term = transport, tuple(names(size)), term
        self.workspace = Workspace()

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self._round += 1
        attempt = (self.term, self._round, 1)
        group = self.transport.group(self.names, attempt)
        reduced = weighted_mean(group, pseudo_gradient, weight, fragment.codec, on_chunk, self.workspace)
        self.transport.finish(self.names, attempt)
        return Commit(self._round, 1, self.names, fragment, reduced, None, None, 0.0)
