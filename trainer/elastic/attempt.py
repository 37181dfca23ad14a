"""An attempt at a round: probing its members, forming their process group, and running the collective."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.diloco.collective import Workspace, weighted_mean
from trainer.diloco.quorum import OnChunk, Reduced
from trainer.diloco.state import Fragment
from trainer.elastic.mesh import MeshStore, form_group, gloo_device
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import TrainingError
from trainer.etcd.client import EtcdClient, Json
from trainer.etcd.errors import EtcdError
from trainer.protocol.records import RoundState, Vote
from trainer.timeouts import MemberTimeouts, TransportTimeouts
from trainer.transport.reachability import ReachabilityProbe
from trainer.transport.wire_meter import WireMeter

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)

QUICK_ATTEMPTS = 5  # at a round; later ones are paused before: etcd keeps the history of all that is written


@dataclass
class Exchange:
    """What a member contributes to a round, in all attempts at it, and what it gets.

    Attributes:
        reduced: The result of the last collective that did not fail.
        bytes_sent, bytes_received: Of those collectives; None: the kernel does not count them.
        failing_since: When the first of the attempts failed, on the monotonic clock.
    """

    pseudo_gradient: Tensor
    weight: float
    fragment: Fragment
    on_chunk: OnChunk
    reduced: Reduced | None = None
    bytes_sent: int | None = 0
    bytes_received: int | None = 0
    failing_since: float | None = None

    def count(self, wire: tuple[int, int] | None) -> None:
        """Add the bytes of a collective."""
        if wire is None or self.bytes_sent is None or self.bytes_received is None:
            self.bytes_sent = self.bytes_received = None
        else:
            self.bytes_sent, self.bytes_received = self.bytes_sent + wire[0], self.bytes_received + wire[1]


@dataclass
class _Group:
    """A process group and its members."""

    members: tuple[str, ...]
    group: Any = None  # a ProcessGroupGloo, whose stubs do not make it a ProcessGroup; None: a member alone
    meter: WireMeter | None = None


class Attempts:
    """Runs the collectives of attempts, and remembers which members cannot be reached.

    Args:
        address: The address that gloo listens on, unless `network_interface` names one.
        put_mesh: Writes `meshes/<id>` under the member's lease.

    Raises:
        ConfigError: This machine has no such interface or address.
    """

    def __init__(
        self,
        client: EtcdClient,
        config: "TrainingConfig",
        id: str,
        address: str,
        put_mesh: Callable[[Json], None],
        watch: RoundWatch,
        timeouts: MemberTimeouts,
    ) -> None:
        self._client, self._config, self._id = client, config, id
        self._put_mesh, self._watch, self._timeouts = put_mesh, watch, timeouts
        self._device = gloo_device(config.network_interface, address)
        self._reach = ReachabilityProbe(lambda message: log.warning("%s", message, extra={"event": True}))
        self._workspace = Workspace()
        self._group: _Group | None = None

    def reduce(self, record: RoundState, exchange: Exchange) -> Vote | None:
        """Run the collective of an attempt; None: it failed, and its group is gone.

        Raises:
            TrainingError: All attempts at the round have failed for `elastic.rdzv_timeout`; etcd refuses a request.
        """
        try:
            exchange.reduced, wire = self._collective(record, exchange)
        except (RuntimeError, OSError) as error:
            if isinstance(error, TrainingError) and getattr(error, "kind", "") != "lease":
                raise  # etcd was away for too long, or refuses the request
            reason = str(error).partition("\n")[0] or type(error).__name__
            error.with_traceback(None)  # it holds the group: the others must notice at once that it is gone
        else:
            exchange.count(wire)
            return Vote(*record.attempt_id, exchange.reduced.hash, exchange.reduced.weight)

        # Let go of the group, and give up or slow down if attempts keep failing
        log.warning("attempt %d at round %d failed: %s", record.attempt, record.round, reason)
        self.drop_group()
        exchange.failing_since = exchange.failing_since or time.monotonic()
        limit = self._config.elastic.rdzv_timeout
        if time.monotonic() - exchange.failing_since > limit:
            raise TrainingError(
                f"all attempts at round {record.round} have failed for {limit:.0f} s (elastic.rdzv_timeout): {reason}"
            )
        if record.attempt > QUICK_ATTEMPTS:
            self._watch.pause(self._timeouts.retry)
        return None

    def suspects(self, probe: Iterable[str]) -> tuple[str, ...]:
        """Probe members; returns all members that cannot be reached."""
        self._probe(probe, self._timeouts.probe)
        return tuple(sorted(self._reach.unreachable))

    def probe_new(self) -> None:
        """Probe in the background the members of the open round that have not been probed yet."""
        if (record := self._watch.record) is not None:
            unprobed = self._reach.unprobed({*record.expected, *record.assignments} - {self._id})
            if unprobed:
                self._reach.probe(self._registered(unprobed))

    def drop_group(self) -> None:
        if self._group is not None and self._group.meter is not None:
            self._group.meter.close()
        self._group = None

    def close(self) -> None:
        self.drop_group()
        self._reach.close()

    def _collective(self, record: RoundState, exchange: Exchange) -> tuple[Reduced, tuple[int, int] | None]:
        """The result, and the bytes sent and received (None: not counted).

        Raises:
            RuntimeError, OSError: A member is gone or silent.
        """
        same_as_before = record.committed is not None and record.committed.members == record.members
        if self._group is None or self._group.members != record.members or record.attempt > 1 or not same_as_before:
            self.drop_group()
            self._group = self._form_group(record)

        # Reduce, and count the bytes as the kernel does
        group, values, on_chunk = self._group, exchange.pseudo_gradient, exchange.on_chunk
        if group.group is None:
            return Reduced.alone(values, exchange.weight, on_chunk), (0, 0)
        before = group.meter.read() if group.meter else None
        timeout = timedelta(seconds=self._config.collective_timeout)
        codec = exchange.fragment.codec
        reduced = weighted_mean(group.group, values, exchange.weight, codec, timeout, on_chunk, self._workspace)
        after = group.meter.read() if group.meter else None
        return reduced, (after[0] - before[0], after[1] - before[1]) if before and after else None

    def _form_group(self, record: RoundState) -> _Group:
        """Connect to the other members of the attempt, all of which are doing the same now."""
        if len(record.members) == 1:
            return _Group(record.members)
        seconds, attempt = self._config.collective_timeout, "/".join(map(str, record.attempt_id))
        # If two members cannot connect, gloo would block all the others for the whole timeout.
        self._probe(record.members, min(TransportTimeouts().probe, seconds))
        if missing := sorted(self._reach.unreachable & set(record.members)):
            named = ", ".join(f"{int(id.partition('-')[0])}" for id in missing)
            raise RuntimeError(f"worker {named} cannot be reached")
        rank, size = record.members.index(self._id), len(record.members)

        def over() -> bool:
            return self._watch.record is not None and self._watch.record.attempt_id != record.attempt_id

        members, put, timeouts = record.members, self._put_mesh, self._timeouts
        with MeshStore(self._client, put, members, attempt, seconds, over, timeouts) as store:
            store.gather()  # connections that open before all members are here are not gloo's
            return _Group(members, *form_group(store, rank, size, self._device, timedelta(seconds=seconds)))

    def _probe(self, ids: Iterable[str], timeout: float) -> None:
        if others := set(ids) - {self._id}:
            with suppress(EtcdError):
                self._reach.check(self._registered(others), timeout)

    def _registered(self, ids: Iterable[str]) -> dict[str, dict[str, Json]]:
        """The values of `members/<id>` of the live ones of `ids`."""
        found = {key.partition("/")[2]: entry.value for key, entry in self._client.list("members/").items()}
        return {id: found[id] for id in ids if id in found}
