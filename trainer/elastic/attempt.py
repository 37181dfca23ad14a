"""An attempt at a round: connecting its members, and running the collective."""

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from trainer.diloco.collective import reduce
from trainer.diloco.prepared import Prepared
from trainer.diloco.quorum import OnChunk, Reduced
from trainer.diloco.state import Fragment
from trainer.diloco.threads import Threads, Workspace, usable
from trainer.elastic.round_watch import RoundWatch
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.errors import EtcdError
from trainer.process import lower_priority
from trainer.protocol.records import RoundState, Vote
from trainer.timeouts import TransportTimeouts
from trainer.transport.transport import Transport

log = logging.getLogger(__name__)

QUICK_ATTEMPTS = 5  # at a round; later ones follow a pause, because etcd keeps the history of all keys


@dataclass
class Exchange:
    """A member's contribution to a round, which is the same in all attempts, and the result."""

    pseudo_gradient: Tensor
    weight: float
    fragment: Fragment
    on_chunk: OnChunk
    prepared: Prepared | None = None  # for the next collective
    reduced: Reduced | None = None  # the result of the last successful collective
    failing_since: float | None = None  # when the first attempt failed, on the monotonic clock


class Attempts:
    """Runs the collectives of attempts, and remembers which members cannot be reached."""

    def __init__(self, watch: RoundWatch, transport: Transport) -> None:
        self._watch, self._transport = watch, transport
        self._client, self._config, self._timeouts = watch.client, watch.config, watch.timeouts
        self._workspace = Workspace(Threads(usable(self._config.sync_threads), lower_priority))
        self._lock = threading.Lock()
        self._unreachable: dict[str, str] = {}  # reasons by id; replaced, never modified
        self._warned: set[str] = set()
        self._connecting = threading.Thread()  # a daemon: the process does not wait for it to end

    def prepare(self, exchange: Exchange) -> Prepared:
        """Do all computation that precedes the first message, once: other members time out on a silent one."""
        if exchange.prepared is None or exchange.prepared.spent:
            values, fragment = exchange.pseudo_gradient, exchange.fragment
            exchange.prepared = Prepared(values, exchange.weight, fragment.codec, self._workspace, fragment.merge)
        return exchange.prepared

    def reduce(self, record: RoundState, exchange: Exchange) -> Vote | None:
        """Run the collective of an attempt. Returns None if it failed.

        Raises:
            TrainingError: All attempts at the round have failed for `elastic.rdzv_timeout`, or etcd denies a request.
            Interrupted: This process has to end. The other members also fail this attempt, and continue without it.
        """
        # Run it, and vote for its result
        try:
            exchange.reduced = self._collective(record, exchange)
        except Interrupted:
            self._transport.finish(record.members, record.attempt_id, failed=True)
            raise
        except (RuntimeError, OSError, ValueError) as error:  # ValueError: a member's message cannot be decoded
            self._transport.finish(record.members, record.attempt_id, failed=True)
            if isinstance(error, TrainingError) and getattr(error, "kind", "") != "lease":
                raise  # etcd was down for too long, or denies the request
            reason = str(error).partition("\n")[0] or type(error).__name__
        else:
            self._transport.finish(record.members, record.attempt_id)
            return Vote(*record.attempt_id, exchange.reduced.hash, exchange.reduced.weight)

        # Give up or slow down if attempts fail repeatedly
        log.warning("attempt %d at round %d failed: %s", record.attempt, record.round, reason)
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
        """Reconnect to members whose links are broken. Returns all members that cannot be reached."""
        self._connect(probe, self._timeouts.probe)
        return tuple(sorted(self._unreachable))

    def connect_new(self) -> None:
        """Establish missing or worn links to the members of the open round, in the background. Thread-safe.

        During a collective, worn links are in use and are kept.
        """
        if (record := self._watch.record) is not None:
            members = {*record.expected, *record.assignments}
            with self._lock:
                self._unreachable = {id: why for id, why in self._unreachable.items() if id in members}
                self._warned &= members
            needed = self._needed(members, worn=(worn := record.phase != "reduce"))
            if needed and not self._connecting.is_alive():
                self._connecting = threading.Thread(target=self._connect_patiently, args=(members, worn), daemon=True)
                self._connecting.start()

    def relayed(self) -> dict[str, list[int]]:
        """Workers that are reached through relays, with the relaying workers, for `status`."""
        return {f"{_worker(id)}": [_worker(relay) for relay in via] for id, via in self._transport.relayed().items()}

    def _collective(self, record: RoundState, exchange: Exchange) -> Reduced:
        """Connect to the attempt's members and reduce. Raises OSError if one is gone or silent."""
        if len(record.members) == 1:
            return Reduced.alone(exchange.pseudo_gradient, exchange.weight, exchange.on_chunk)
        prepared = self.prepare(exchange)
        self._connect(record.members, self._config.collective_timeout)
        if missing := [f"{_worker(id)} ({why})" for id, why in self._unreachable.items() if id in record.members]:
            raise ConnectionError(f"worker {', '.join(missing)} cannot be reached")
        group = self._transport.group(record.members, record.attempt_id, self._watch.ended)
        return reduce(group, prepared, exchange.on_chunk, self._workspace)

    def _needed(self, ids: Iterable[str], worn: bool) -> set[str]:
        """The members to which a link must be established: those without one, and perhaps those with a worn one."""
        return self._transport.lacking(ids) if worn else self._transport.without_link(ids)

    def _connect(self, ids: Iterable[str], timeout: float, worn: bool = True) -> dict[str, str]:
        """Establish missing links, and perhaps worn ones anew. Returns the unreachable members with the reasons."""
        ids = set(ids)
        missing: dict[str, str] = {}
        if needed := self._needed(ids, worn):
            try:
                missing = self._transport.connect(self._endpoints(needed), timeout)
            except EtcdError as error:
                if error.kind != "unreachable":
                    raise
                return {}  # nothing new is known
        with self._lock:
            kept = {id: why for id, why in self._unreachable.items() if id not in ids}
            self._unreachable = {**kept, **missing}
        return missing

    def _connect_patiently(self, ids: Iterable[str], worn: bool) -> None:
        """Connect, and warn once about each live member that cannot be reached at all."""
        with suppress(EtcdError):
            missing = self._connect(ids, TransportTimeouts().in_any_way, worn)
            for id in self._endpoints(missing):
                if id not in self._warned:
                    self._warned.add(id)
                    log.warning(
                        "worker %d cannot be reached from here (%s), it cannot reach this one, and no third worker "
                        "reaches both: see advertise_address, port_range, and firewalls",
                        *(_worker(id), missing[id]),
                        extra={"event": True},
                    )

    def _endpoints(self, ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The endpoints of those `ids` that are live."""
        found = {key.partition("/")[2]: entry.value for key, entry in self._client.list("members/").items()}
        return {id: tuple(found[id]["endpoints"]) for id in ids if id in found}


def _worker(id: str) -> int:
    return int(id.partition("-")[0])
