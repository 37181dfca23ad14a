"""The project's etcd v3 client: values, leases, watches and waiting."""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Self, TypeVar

from trainer.errors import ConfigError
from trainer.etcd.errors import EtcdError
from trainer.etcd.lease import Lease
from trainer.etcd.values import Entry, EtcdValues, Json
from trainer.etcd.watch import Watch
from trainer.timeouts import EtcdTimeouts

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

__all__ = ["Entry", "EtcdClient", "Json", "local_address", "run_prefix"]

T = TypeVar("T")


class EtcdClient(EtcdValues):
    """Values (see `EtcdValues`), and the threads that keep leases alive and watch for changes."""

    @classmethod
    def of(cls, config: "TrainingConfig", timeouts: EtcdTimeouts = EtcdTimeouts()) -> Self:
        """A client of the run's keys, below `{elastic.etcd.prefix}/{run_id}/`."""
        if not config.etcd.endpoints:
            raise ConfigError("etcd.endpoints", "[]", "must name an etcd; `python -m trainer launch` starts one")
        # A member that has lost its leader holds requests for 7 s; by then, the others would have moved on without us
        call = min(timeouts.call, max(1.0, config.grace_period / 2))
        security = config.etcd.model_dump(include={"ca", "cert", "key", "user"})
        prefix = run_prefix(config.elastic.etcd.prefix, config.run_id)
        return cls(config.etcd.endpoints, prefix, **security, timeouts=replace(timeouts, call=call))

    def lease(self, ttl: float) -> Lease:
        """A lease that a thread keeps alive until it is revoked."""
        return Lease(self, ttl)

    def watch(self, prefix: str, notify: Callable[[], None]) -> Watch:
        """Call `notify`, on a thread, after changes below `prefix`."""
        return Watch(self, prefix, notify)

    def wait_for(
        self,
        predicate: Callable[[], T | None],
        timeout: float,
        prefix: str = "",
        on_wait: Callable[[], None] | None = None,
    ) -> T | None:
        """Wait until `predicate()` is neither None nor False, and return its result; None after `timeout` seconds.

        Args:
            predicate: Evaluated after every change below `prefix`, and at least every `timeouts.poll` seconds. May
                raise EtcdError: an unreachable etcd counts as "not yet", until time is up.
            timeout: Seconds to wait.
            prefix: The keys on which the predicate depends.
            on_wait: Called every `timeouts.log` seconds, to log what is being waited for; it may raise.
        """
        deadline, logged = time.monotonic() + timeout, time.monotonic()
        changed = threading.Event()
        with self.watch(prefix, changed.set):
            while True:
                # Before the evaluation, so that a change during it causes another one
                changed.clear()
                try:
                    result = predicate()
                    if result is not None and result is not False:
                        return result
                except EtcdError as error:
                    if error.kind != "unreachable" or time.monotonic() >= deadline:
                        raise
                now = time.monotonic()
                if now >= deadline:
                    return None
                if on_wait and now - logged >= self.timeouts.log:
                    logged = now
                    on_wait()
                changed.wait(min(self.timeouts.poll, deadline - now))


def run_prefix(prefix: str, run_id: str) -> str:
    """The prefix of a run's keys."""
    return f"{prefix.rstrip('/')}/{run_id}/"


def local_address(endpoint: str) -> str:
    """This machine's address on the route to `endpoint` (host:port), which other machines can most likely reach.

    Raises EtcdError if there is no route.
    """
    host, _, port = endpoint.rpartition(":")
    failure: OSError | None = None
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except OSError as error:
        found, failure = [], error
    for family, kind, _, _, address in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind) as probe:  # connecting a UDP socket sends nothing
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError as error:  # a name may have addresses of both families, and this machine only one
            failure = failure or error
    reason = failure.strerror or failure if failure else "it has no address"
    raise EtcdError(f"cannot reach etcd at {endpoint}: {reason}", "unreachable")
