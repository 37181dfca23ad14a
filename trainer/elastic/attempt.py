"""An attempt at a round: probing its members, forming their process group, and running the collective."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor

from trainer.diloco.collective import Workspace, weighted_mean
from trainer.diloco.quorum import OnChunk, Reduced
from trainer.diloco.state import Fragment
from trainer.diloco.threads import Threads, usable
from trainer.elastic.mesh import MeshStore, form_group, gloo_device
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import TrainingError
from trainer.etcd.client import Json
from trainer.etcd.errors import EtcdError
from trainer.protocol.records import RoundState, Vote
from trainer.timeouts import TransportTimeouts
from trainer.transport.channel import lower_priority
from trainer.transport.reachability import ReachabilityProbe
from trainer.transport.wire_meter import WireMeter

log = logging.getLogger(__name__)

QUICK_ATTEMPTS = 5  # at a round; a pause precedes each later one, because etcd keeps the history of all keys


@dataclass
class Exchange:
    """A member's contribution to a round, the same in all attempts, and the result."""

    pseudo_gradient: Tensor
    weight: float
    fragment: Fragment
    on_chunk: OnChunk
    reduced: Reduced | None = None  # by the last collective that did not fail
    wire: tuple[int, int] | None = (0, 0)  # bytes sent and received by those; None: the kernel does not count them
    failing_since: float | None = None  # when the first attempt failed, on the monotonic clock


class Attempts:
    """Runs the collectives of attempts, and remembers which members cannot be reached.

    Args:
        address: The address that gloo listens on, unless `network_interface` names an interface.
        put_mesh: Writes `meshes/<id>` under the member's lease.

    Raises:
        ConfigError: This machine has no such interface or address.
    """

    def __init__(self, watch: RoundWatch, id: str, address: str, put_mesh: Callable[[Json], None]) -> None:
        self._watch, self._id, self._put_mesh = watch, id, put_mesh
        self._client, self._config, self._timeouts = watch.client, watch.config, watch.timeouts
        self._device = gloo_device(self._config.network_interface, address)
        self._reach = ReachabilityProbe(lambda message: log.warning("%s", message, extra={"event": True}))
        self._workspace = Workspace(Threads(usable(self._config.sync_threads), lower_priority))
        self._members: tuple[str, ...] = ()  # of the present group
        self._group: tuple[Any, WireMeter] | None = None  # None: no group, or a member alone

    def reduce(self, record: RoundState, exchange: Exchange) -> Vote | None:
        """Run the collective of an attempt; None: it failed, and its group is gone.

        Raises:
            TrainingError: All attempts at the round have failed for `elastic.rdzv_timeout`; etcd refuses a request.
        """
        # Run it, and vote for its result
        try:
            exchange.reduced, wire = self._collective(record, exchange)
        except (RuntimeError, OSError) as error:
            if isinstance(error, TrainingError) and getattr(error, "kind", "") != "lease":
                raise  # etcd was away for too long, or refuses the request
            reason = str(error).partition("\n")[0] or type(error).__name__
            error.with_traceback(None)  # it holds the group: the others must notice at once that it is gone
        else:
            before = exchange.wire
            exchange.wire = (before[0] + wire[0], before[1] + wire[1]) if before and wire else None
            return Vote(*record.attempt_id, exchange.reduced.hash, exchange.reduced.weight)

        # Drop the group, and give up or slow down if attempts fail repeatedly
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
        if (record := self._watch.record) is not None and (
            unprobed := self._reach.unprobed({*record.expected, *record.assignments} - {self._id})
        ):
            self._reach.probe(self._registered(unprobed))

    def drop_group(self) -> None:
        if self._group is not None:
            self._group[1].close()
        self._members, self._group = (), None

    def close(self) -> None:
        self.drop_group()
        self._reach.close()

    def _collective(self, record: RoundState, exchange: Exchange) -> tuple[Reduced, tuple[int, int] | None]:
        """The result, and the bytes sent and received. Raises RuntimeError or OSError if a member is gone or silent."""
        # Form a new group, unless the last round's is intact and has these members
        same_as_before = record.committed is not None and record.committed.members == record.members
        if self._members != record.members or record.attempt > 1 or not same_as_before:
            self.drop_group()
            self._group, self._members = self._form_group(record), record.members

        # Reduce, and count the bytes on the wire
        values, on_chunk = exchange.pseudo_gradient, exchange.on_chunk
        if self._group is None:
            return Reduced.alone(values, exchange.weight, on_chunk), (0, 0)
        group, meter = self._group
        before = meter.read()
        timeout, codec = timedelta(seconds=self._config.collective_timeout), exchange.fragment.codec
        reduced = weighted_mean(group, values, exchange.weight, codec, timeout, on_chunk, self._workspace)
        after = meter.read()
        return reduced, (after[0] - before[0], after[1] - before[1]) if before and after else None

    def _form_group(self, record: RoundState) -> tuple[Any, WireMeter] | None:
        """Connect to the other members of the attempt, if any; all of them are doing the same now."""
        if len(record.members) == 1:
            return None

        # Fail early if a member is unreachable: gloo would block all the others for the whole timeout
        seconds, attempt = self._config.collective_timeout, "/".join(map(str, record.attempt_id))
        self._probe(record.members, min(TransportTimeouts().probe, seconds))
        if missing := sorted(self._reach.unreachable & set(record.members)):
            named = ", ".join(f"{int(id.partition('-')[0])}" for id in missing)
            raise RuntimeError(f"worker {named} cannot be reached")

        # Wait for all members, so that the meter sees no other connections, and connect
        def over() -> bool:
            return self._watch.record is not None and self._watch.record.attempt_id != record.attempt_id

        members, put, timeouts = record.members, self._put_mesh, self._timeouts
        with MeshStore(self._client, put, members, attempt, seconds, over, timeouts) as store:
            store.gather()
            rank, limit = members.index(self._id), timedelta(seconds=seconds)
            return form_group(store, rank, len(members), self._device, limit)

    def _probe(self, ids: Iterable[str], timeout: float) -> None:
        if others := set(ids) - {self._id}:
            with suppress(EtcdError):
                self._reach.check(self._registered(others), timeout)

    def _registered(self, ids: Iterable[str]) -> dict[str, dict[str, Json]]:
        """The values of `members/<id>` of those `ids` that are live."""
        found = {key.partition("/")[2]: entry.value for key, entry in self._client.list("members/").items()}
        return {id: found[id] for id in ids if id in found}
