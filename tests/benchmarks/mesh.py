"""Shared code of the benchmarks' workers: the product's links to all other workers, and a plain gloo group."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store

from trainer.diloco.codecs import Codec
from trainer.diloco.collective import weighted_mean
from trainer.diloco.merge import MEAN, Merge
from trainer.diloco.quorum import Commit, LocalQuorum, OnChunk, Reduced, RoundReport
from trainer.diloco.state import Fragment
from trainer.diloco.threads import Workspace
from trainer.transport.credentials import credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.link import BULK, ROUNDS
from trainer.transport.transport import Transport
from trainer.worker.wire_meter import WireMeter

SECRET = b"a secret of these benchmarks alone"
TIMEOUT = timedelta(seconds=300)


class Mesh:
    """A worker's links to all others. The first transfer of each kind opens them.

    Args:
        store: The store through which workers exchange their endpoints.
        name: The name of this mesh in the store.
        tls: Whether to encrypt, even on loopback.
        streams: See the parameter.
        offers: The contents that this worker serves, by name.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        address: str,
        *,
        tls: bool = True,
        streams: int = 0,
        offers: Mapping[str, Offer] | None = None,
    ) -> None:
        self.ids = [f"{number:03}-{name}" for number in range(size)]
        self._others = [number for number in range(size) if number != rank]
        who = replace(credentials(SECRET, "tls" if tls else "none"), loopback=True)
        donor = Donor((offers or {}).get)
        seconds = TIMEOUT.total_seconds()
        self.transport = Transport(self.ids[rank], [address], who, streams=streams, silence=seconds, handle=donor)
        store.set(f"{name}/{rank}", json.dumps(self.transport.endpoints))
        self._at = {self.ids[number]: json.loads(store.get(f"{name}/{number}")) for number in range(size)}
        self._round = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.transport.close()

    def connect(self, lane: str = ROUNDS) -> None:
        """Open the missing links. Raises ConnectionError: A link cannot be opened."""
        if missing := self.transport.connect(self._at, 30.0, lane):
            raise ConnectionError(f"no links to {missing}")

    def reduce(
        self,
        values: Tensor,
        weight: float,
        codec: Codec,
        on_chunk: OnChunk,
        workspace: Workspace | None = None,
        merge: Merge = MEAN,
    ) -> Reduced:
        """The collective of a round's attempt, as in the product."""
        self._round += 1
        attempt = 1, self._round, 1
        group = self.transport.group(self.ids, attempt)
        try:
            return weighted_mean(group, values, weight, codec, on_chunk, workspace, merge)
        finally:
            self.transport.finish(self.ids, attempt)

    def donors(self) -> dict[str, tuple[str, ...]]:
        """The other workers' endpoints, by id."""
        return {self.ids[number]: tuple(self._at[self.ids[number]]) for number in self._others}

    def streams(self, lane: str = ROUNDS) -> int:
        """The number of streams in each direction to the other worker, if there is only one."""
        (link,) = self.transport.prepare(self.donors(), lane).values()
        return link.streams(sends=lane == ROUNDS)

    def bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far, as the product counts them."""
        both = [self.transport.bytes(lane) for lane in (ROUNDS, BULK)]
        assert both[0]
        assert both[1]
        return both[0][0] + both[1][0], both[0][1] + both[1][1]

    def sent(self) -> int:
        """Bytes sent so far."""
        return self.bytes()[0]


class Members(LocalQuorum):
    """A quorum that always consists of all members of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        self._round += 1
        reduced = self._mesh.reduce(pseudo_gradient, weight, fragment.codec, on_chunk, merge=fragment.merge)
        return Commit(self._round, 1, tuple(self._mesh.ids), fragment, reduced, None, None, 0.0)


class Plain:
    """A gloo group with torch's defaults: one connection per pair, with the hosts' congestion control."""

    def __init__(self, store: Store, rank: int, size: int, address: str) -> None:
        gloo: Any = ProcessGroupGloo  # its stubs are incomplete
        options = gloo._Options()
        options._devices, options._timeout, options._threads = [gloo.create_device(hostname=address)], TIMEOUT, 2
        with WireMeter.watching() as self._meter:
            self.group = gloo(store, rank, size, options)

    def sum(self, values: Tensor) -> None:
        """All-reduce, in place."""
        self.group.allreduce([values]).wait()

    def bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        wire = self._meter.read()
        assert wire, "this system does not count the bytes of a connection"
        return wire

    def sent(self) -> int:
        """Bytes sent so far."""
        return self.bytes()[0]
