"""The connection to etcd v3, and individual requests: JSON values below a prefix, over several endpoints.

`etcd3` supports one endpoint, fetches its token once, and its watcher spins when the server is unreachable. Failover,
token renewal and watching are therefore implemented here, by building new connections.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from trainer.errors import ConfigError
from trainer.etcd.compat import import_etcd3
from trainer.etcd.errors import EtcdError, is_dropped_proposal, is_etcd_failure, translate
from trainer.retry import retrying
from trainer.timeouts import EtcdTimeouts

T = TypeVar("T")
Json = Any

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a web proxy does not forward to etcd
    ("grpc.use_local_subchannel_pool", 1),  # otherwise a new connection inherits the old one's back-off
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True)
class Entry:
    """A key and its value in etcd."""

    key: str  # below the client's prefix
    value: Json
    revision: int  # mod_revision, the token of a compare-and-swap
    lease: int  # id of the key's lease; 0 for none


class EtcdValues:
    """JSON values below one prefix of an etcd, over one of several endpoints.

    Thread-safe. gRPC does not survive a fork: a child process builds its own client.

    Args:
        endpoints: `host:port` of each etcd member. If one does not answer, the next is tried.
        prefix: Prepended to every key; "/" is appended if missing.
        ca: File with the certificate authority (PEM). If given, connections use TLS.
        cert: File with the client certificate (PEM); `key` is the file with its private key.
        password: The password of `user`; by default, ETCD_PASSWORD from the environment.

    Raises:
        ConfigError: An endpoint is not `host:port`; a client certificate has no key or no authority.
        EtcdError: Raised by every method; see its `kind`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str = "",
        *,
        ca: str = "",
        cert: str = "",
        key: str = "",
        user: str = "",
        password: str | None = None,
        timeouts: EtcdTimeouts = EtcdTimeouts(),
    ) -> None:
        for endpoint in endpoints:
            if not re.fullmatch(r"([^/:]+|\[[^/\]]+\]):\d+", endpoint):
                raise ConfigError("etcd.endpoints", endpoint, "must be host:port or [IPv6 address]:port")
        if bool(cert) != bool(key):
            missing = "etcd.key" if cert else "etcd.cert"
            raise ConfigError(missing, "", "must be given too: certificate and key go together")
        if cert and not ca:
            raise ConfigError("etcd.ca", "", "must name the authority: without it, TLS and the certificate are unused")
        self.endpoints, self.prefix, self.timeouts = list(endpoints), prefix.rstrip("/") + "/", timeouts
        secret = os.environ.get("ETCD_PASSWORD", "") if password is None else password
        self._security: dict[str, str | None] = {"user": user, "password": secret} if user else {}
        self._security |= {"ca_cert": ca or None, "cert_cert": cert or None, "cert_key": key or None}
        self._translate = partial(translate, endpoints=self.endpoints, prefix=self.prefix, ca=ca, user=user)
        self._next = 0  # endpoint of the next connection
        self._answered = False  # at least once
        self._connection: Any = None
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Leases stay until they are revoked or expire."""
        with self._lock:
            self._drop(self._connection)

    def get(self, key: str) -> Entry | None:
        """The key's entry; None if it does not exist."""
        value, meta = self._call(lambda etcd: etcd.get(self.prefix + key))
        return None if meta is None else self._entry(value, meta)

    def list(self, prefix: str) -> dict[str, Entry]:
        """The entries of all keys that begin with `prefix`, sorted by key."""
        found = self._call(lambda etcd: list(etcd.get_prefix(self.prefix + prefix)))
        entries = (self._entry(value, meta) for value, meta in found)  # etcd sorts them
        return {entry.key: entry for entry in entries}

    def put(self, key: str, value: Json, lease: int = 0) -> None:
        """Set the key, under a lease if one is given."""
        text = _encode(value)
        self._call(lambda etcd: etcd.put(self.prefix + key, text, lease or None))

    def delete(self, key: str, token: int | None = None) -> bool:
        """Delete the key; if `token` is given, only if it is the key's `revision`. Returns whether it was deleted."""

        def transaction(etcd: Any) -> bool:
            path, parts = self.prefix + key, etcd.transactions
            compare = [] if token is None else [parts.mod(path) == token]
            won, responses = etcd.transaction(compare=compare, success=[parts.delete(path)], failure=[])
            return bool(won and responses[0].response_delete_range.deleted)

        return self._call(transaction)

    def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with `prefix`. Returns their number."""
        return int(self._call(lambda etcd: etcd.delete_prefix(self.prefix + prefix)).deleted)

    def swap(self, key: str, value: Json, token: int | None, lease: int = 0) -> tuple[bool, Entry | None]:
        """Compare and swap: put `value` if the key has not changed since `token`.

        Args:
            key: The key.
            value: Its new value.
            token: The `revision` of the entry that was read; None: only create the key.
            lease: Id of the key's lease; 0 for none.

        Returns:
            Whether it was put, and the resulting entry (None if the key was deleted).
        """
        path, text = self.prefix + key, _encode(value)

        def transaction(etcd: Any) -> tuple[bool, Entry | None]:
            parts = etcd.transactions
            won, responses = etcd.transaction(
                compare=[parts.mod(path) == (token or 0)],
                success=[parts.put(path, text, lease or None), parts.get(path)],
                failure=[parts.get(path)],
            )
            found = responses[-1]
            return won, self._entry(*found[0]) if found else None

        try:
            return self._call(transaction, failover=False)
        except EtcdError as error:
            if not error.stale_connection:
                raise
        # The connection broke before the outcome was known, or its token was no longer valid: read the key over a new
        # connection to find out whether the transaction ran
        entry = self.get(key)
        if (entry.revision if entry else 0) == (token or 0):
            return self._call(transaction)
        return entry is not None and _encode(entry.value) == text and entry.lease == lease, entry

    def grant(self, ttl: float) -> int:
        """The id of a new lease, without a thread that keeps it alive."""
        return int(self._call(lambda etcd: etcd.lease(max(1, round(ttl)))).id)

    def revoke(self, lease: int) -> None:
        """End a lease now and delete its keys. It is not an error if the lease has already ended."""
        try:
            self._call(lambda etcd: etcd.revoke_lease(lease))
        except EtcdError as error:
            if error.kind != "lease":
                raise

    def refresh(self, lease: int) -> bool:
        """Keep a lease alive for another TTL; False if it has ended."""
        replies = self._call(lambda etcd: list(etcd.refresh_lease(lease)))
        return bool(replies) and replies[-1].TTL > 0

    def connection(self) -> Any:
        """The current `etcd3` client; a new one, to the next endpoint, if the last one failed."""
        with self._lock:
            if self._connection is None:
                etcd3 = import_etcd3()
                host, _, port = self.endpoints[self._next % len(self.endpoints)].rpartition(":")
                options = {"timeout": self.timeouts.call, "grpc_options": _CHANNEL_OPTIONS, **self._security}
                self._connection = etcd3.client(host, int(port), **options)
                # Put the token into every request's metadata, because gRPC refuses credentials without TLS
                self._connection.call_credentials = None
            return self._connection

    def report_failure(self, connection: Any, exception: Exception) -> EtcdError | None:
        """Translate an exception, and close the connection if a new one may help. None if it is not from etcd."""
        if not is_etcd_failure(exception):
            return None
        error = self._translate(exception, answered=self._answered)
        if error.stale_connection:
            with self._lock:
                self._drop(connection)
        return error

    def _call(self, operation: Callable[[Any], T], failover: bool = True) -> T:
        """Run `operation` on a connection. If that fails, use the next endpoint or a new token.

        While the members elect a leader, they drop proposals at once, and trying one member after the other would end
        before the election. Therefore dropped proposals are repeated on the same connection, for at most
        `timeouts.call` seconds.
        """
        if os.getpid() != self._pid:
            raise EtcdError("an etcd client was used after a fork, which gRPC does not survive", "request")
        elected, pause = time.monotonic() + self.timeouts.call, self.timeouts.election_pause

        def is_electing(exception: BaseException) -> bool:
            return failover and time.monotonic() < elected and is_dropped_proposal(exception)

        def attempt() -> T:
            connection = None
            try:
                connection = self.connection()
                result = retrying(is_electing, first_pause=pause, longest_pause=pause)(operation, connection)
            except Exception as exception:
                error = self.report_failure(connection, exception)
                if error is None:
                    raise
                raise error from None
            self._answered = True
            return result

        def is_stale(error: BaseException) -> bool:
            return failover and isinstance(error, EtcdError) and error.stale_connection

        return retrying(is_stale, attempts=len(self.endpoints) + 1, first_pause=0.0)(attempt)

    def _drop(self, connection: Any) -> None:
        """Close the connection, unless another thread has replaced it. The next one uses the next endpoint."""
        if connection is self._connection:
            self._next += 1
            self._connection = None
            if connection is not None:
                connection.close()

    def _entry(self, value: bytes, meta: Any) -> Entry:
        return Entry(meta.key.decode().removeprefix(self.prefix), json.loads(value), meta.mod_revision, meta.lease_id)


def _encode(value: Json) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)
