"""The project's etcd v3 client. Nothing else imports `etcd3`.

The released `etcd3` 0.12.0 cannot be imported with protobuf 4 or newer ("Descriptors cannot be created directly"):
its generated modules are rebuilt here from the serialized descriptors they contain (`import_etcd3`). It knows one
endpoint, fetches its token once, and its watcher spins when the server is away: failover, a new token and watching
are therefore done here, by building a new connection.
"""

import ast
import importlib
import importlib.util
import json
import logging
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from trainer.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from trainer.config import TrainingConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
Json = Any
Kind = Literal["unreachable", "certificate", "credentials", "permission", "lease", "request"]

CALL_TIMEOUT = 5.0  # seconds that one request may take on one endpoint, at most
ELECTION_PAUSE = 0.1  # seconds until what a member without a leader has dropped is proposed to it again
POLL_INTERVAL = 1.0  # seconds after which `wait_for` looks again although no watch has told it to

_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for etcd
    ("grpc.use_local_subchannel_pool", 1),  # else a new connection inherits the old one's back-off
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class EtcdError(TrainingError):
    """etcd could not do what it was asked.

    Attributes:
        kind: "unreachable" (nobody answers), "certificate" (TLS failed), "credentials" (user or password is wrong or
            missing), "permission" (the user may not touch the key), "lease" (it has ended), "request" (anything else).
    """

    def __init__(self, message: str, kind: Kind) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Entry:
    """A key's value as etcd has it.

    Attributes:
        key: The key below the client's prefix.
        revision: mod_revision, the token of a compare-and-swap.
        lease: Id of the lease it lives under; 0 for none.
    """

    key: str
    value: Json
    revision: int
    lease: int


class EtcdClient:
    """JSON values below one prefix of an etcd, over one of several endpoints.

    Thread-safe. Not usable after a fork (gRPC is not): a child process builds its own.

    Args:
        endpoints: `host:port` of each etcd member; the next one is tried when one does not answer.
        prefix: Put before every key; "/" is appended if it is missing.
        ca: File with the certificate authority (PEM). Set: TLS.
        cert: File with the client certificate (PEM).
        key: File with its private key (PEM).
        user: etcd user.
        password: Its password; by default the environment's ETCD_PASSWORD.
        patience: Seconds that one request may take on one endpoint.

    Raises (at once):
        ConfigError: An endpoint is not `host:port`; a client certificate without its key, or without the authority.

    Raises (every method):
        EtcdError: See its `kind`.
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
        patience: float = CALL_TIMEOUT,
    ) -> None:
        for endpoint in endpoints:
            host, _, port = endpoint.rpartition(":")
            if not host or "/" in host or not port.isdigit():
                raise ConfigError("etcd.endpoints", endpoint, "must be host:port")
        if bool(cert) != bool(key):
            raise ConfigError(
                "etcd.key" if cert else "etcd.cert", "", "must be given too: certificate and key go together"
            )
        if cert and not ca:
            raise ConfigError("etcd.ca", "", "must name the authority: without it there is no TLS, and no certificate")
        self.endpoints = list(endpoints)
        self.prefix = prefix.rstrip("/") + "/"
        self._tls: dict[str, str | None] = {"ca_cert": ca or None, "cert_cert": cert or None, "cert_key": key or None}
        secret = os.environ.get("ETCD_PASSWORD", "") if password is None else password
        self._credentials = {"user": user, "password": secret} if user else {}
        self._patience = patience
        self._next = 0
        self._answered = False  # ever
        self._connection: Any = None
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @classmethod
    def of(cls, config: "TrainingConfig") -> Self:
        """A client of the run's keys: everything lies below `{elastic.etcd.prefix}/{run_id}/`.

        Raises:
            ConfigError: No endpoint is given.
        """
        etcd = config.etcd
        if not etcd.endpoints:
            raise ConfigError("etcd.endpoints", "[]", "must name an etcd; `python -m trainer launch` starts one")
        prefix = run_prefix(config.elastic.etcd.prefix, config.run_id)
        # A server that has lost its leader keeps requests for 7 s. The others would go on without who waits for that.
        patience = min(CALL_TIMEOUT, max(1.0, config.grace_period / 2))
        who = {"ca": etcd.ca, "cert": etcd.cert, "key": etcd.key, "user": etcd.user}
        return cls(etcd.endpoints, prefix, patience=patience, **who)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Leases stay, until they are revoked or expire."""
        with self._lock:
            self._drop(self._connection)

    # Values

    def get(self, key: str) -> Entry | None:
        value, meta = self._call(lambda etcd: etcd.get(self.prefix + key))
        return None if meta is None else self._entry(value, meta)

    def list(self, prefix: str) -> dict[str, Entry]:
        """Every entry whose key begins with `prefix`, by key, sorted."""
        found = self._call(lambda etcd: list(etcd.get_prefix(self.prefix + prefix)))
        entries = [self._entry(value, meta) for value, meta in found]
        return {entry.key: entry for entry in sorted(entries, key=lambda entry: entry.key)}

    def put(self, key: str, value: Json, lease: int = 0) -> None:
        text = _encode(value)
        self._call(lambda etcd: etcd.put(self.prefix + key, text, lease or None))

    def delete(self, key: str, token: int | None = None) -> bool:
        """Delete the key (if its `revision` is `token`, where one is given); whether it was deleted."""
        path = self.prefix + key

        def transaction(etcd: Any) -> bool:
            etcd_ = etcd.transactions
            compare = [] if token is None else [etcd_.mod(path) == token]
            won, responses = etcd.transaction(compare=compare, success=[etcd_.delete(path)], failure=[])
            return bool(won and responses[0].response_delete_range.deleted)

        return self._call(transaction)

    def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with `prefix`; how many there were."""
        return int(self._call(lambda etcd: etcd.delete_prefix(self.prefix + prefix)).deleted)

    def swap(self, key: str, value: Json, token: int | None, lease: int = 0) -> tuple[bool, Entry | None]:
        """Put `value` if nobody has changed the key since `token`.

        Args:
            token: The `revision` of the entry that was read; None: only create it.

        Returns:
            Whether it was put, and the entry as it is then (None: it was deleted meanwhile). When the connection
            breaks, so that nobody knows whether the transaction ran, the key is read again and the question decided.
        """
        path, text = self.prefix + key, _encode(value)

        def transaction(etcd: Any) -> tuple[bool, Entry | None]:
            etcd_ = etcd.transactions
            won, responses = etcd.transaction(
                compare=[etcd_.mod(path) == (token or 0)],
                success=[etcd_.put(path, text, lease or None), etcd_.get(path)],
                failure=[etcd_.get(path)],
            )
            found = responses[-1]
            return won, self._entry(*found[0]) if found else None

        try:
            return self._call(transaction, retry=False)
        except EtcdError as error:
            if error.kind != "unreachable":
                raise
        entry = self.get(key)
        if (entry.revision if entry else 0) == (token or 0):  # it did not run
            return self._call(transaction)
        return entry is not None and _encode(entry.value) == text and entry.lease == lease, entry

    # Leases

    def lease(self, ttl: float) -> "Lease":
        """A lease that a thread keeps alive until it is revoked."""
        return Lease(self, ttl)

    def grant(self, ttl: float) -> int:
        """The id of a new lease, which nobody keeps alive."""
        return int(self._call(lambda etcd: etcd.lease(max(1, round(ttl)))).id)

    def revoke(self, lease: int) -> None:
        """End a lease now, and delete its keys. One that has ended already is no error."""
        try:
            self._call(lambda etcd: etcd.revoke_lease(lease))
        except EtcdError as error:
            if error.kind != "lease":
                raise

    def refresh(self, lease: int) -> bool:
        """Keep a lease alive for another TTL; False if it has ended."""
        replies = self._call(lambda etcd: list(etcd.refresh_lease(lease)))
        return bool(replies) and replies[-1].TTL > 0

    # Waiting

    def watch(self, prefix: str, notify: Callable[[], None]) -> "Watch":
        """Call `notify`, from a thread, after changes below `prefix`."""
        return Watch(self, prefix, notify)

    def wait_for(
        self,
        predicate: Callable[[], T | None],
        timeout: float,
        prefix: str = "",
        on_wait: Callable[[], None] | None = None,
        every: float = 5.0,
    ) -> T | None:
        """Wait until `predicate()` is neither None nor False, and return that; None when `timeout` seconds are over.

        The predicate is asked again after every change below `prefix`, and each `POLL_INTERVAL` in any case. An etcd
        that cannot be reached meanwhile is waited for, too.

        Args:
            on_wait: Called each `every` seconds of waiting, to say what is being waited for; it may raise.
        """
        deadline, said = time.monotonic() + timeout, time.monotonic()
        changed = threading.Event()
        with self.watch(prefix, changed.set):
            while True:
                changed.clear()
                away: EtcdError | None = None
                try:
                    result = predicate()
                    if result is not None and result is not False:
                        return result
                except EtcdError as error:
                    if error.kind != "unreachable":
                        raise
                    away = error
                now = time.monotonic()
                if now >= deadline:
                    if away:
                        raise away
                    return None
                if on_wait and now - said >= every:
                    said = now
                    on_wait()
                changed.wait(min(POLL_INTERVAL, deadline - now))

    # The connection

    def _call(self, operation: Callable[[Any], T], retry: bool = True) -> T:
        """Run `operation` on a connection; on the next endpoint, or with a new token, if this one fails.

        While the members elect a leader, each drops proposals at once: trying one after the other would be over before
        the election is.
        """
        if os.getpid() != self._pid:
            raise EtcdError("an etcd client was used after a fork, which gRPC does not survive", "request")
        attempts = len(self.endpoints) + 1 if retry else 1
        elected = time.monotonic() + self._patience
        while True:
            attempts -= 1
            connection = None
            try:
                connection = self._connect()
                result = operation(connection)
                self._answered = True
                return result
            except Exception as exception:
                if not _is_etcds(exception):  # a signal's, for one: torch's agent raises it wherever it happens to be
                    raise
                error, stale = self._explain(exception)
                if retry and "proposal dropped" in str(error) and time.monotonic() < elected:
                    attempts += 1
                    time.sleep(ELECTION_PAUSE)
                    continue
                if stale:
                    with self._lock:
                        self._drop(connection)
                if not stale or not attempts:
                    raise error from None

    def _connect(self) -> Any:
        with self._lock:
            if self._connection is None:
                etcd3 = import_etcd3()
                host, _, port = self.endpoints[self._next % len(self.endpoints)].rpartition(":")
                self._connection = etcd3.client(
                    host=host,
                    port=int(port),
                    timeout=self._patience,
                    grpc_options=_CHANNEL_OPTIONS,
                    **self._tls,
                    **self._credentials,
                )
                # The token is in every request's metadata; gRPC refuses to send it as a credential without TLS.
                self._connection.call_credentials = None
            return self._connection

    def _drop(self, connection: Any) -> None:
        """Close the connection, unless another thread has replaced it already; the next one goes elsewhere."""
        if connection is self._connection:
            self._next += 1
            self._connection = None
            if connection is not None:
                connection.close()

    def _failed(self, connection: Any, exception: Exception) -> None:
        """Take note of what befell a connection outside of `_call`."""
        if _is_etcds(exception) and self._explain(exception)[1]:
            with self._lock:
                self._drop(connection)

    def _explain(self, exception: Exception) -> tuple[EtcdError, bool]:
        """What went wrong, in words, and whether a new connection may help."""
        import grpc

        if isinstance(exception, EtcdError):
            return exception, False
        # etcd3 raises exceptions without a message; what gRPC said is their context.
        origin = exception if isinstance(exception, grpc.RpcError) else exception.__context__
        code = origin.code() if isinstance(origin, grpc.Call) else None
        details = (origin.details() if isinstance(origin, grpc.Call) else str(exception)) or str(exception)
        where = ", ".join(self.endpoints)
        lower = details.lower()
        if isinstance(exception, FileNotFoundError | PermissionError):
            return EtcdError(f"cannot read the certificate {exception.filename}", "certificate"), False
        if any(word in lower for word in ("socket closed", "connection reset")) and "ssl_error" not in lower:
            # An etcd that has just died, or the one speaks TLS and the other does not.
            hint = " (does it speak TLS, as etcd.ca says?)"
            if not self._tls["ca_cert"]:
                hint = " (does it want TLS? no etcd.ca is set)"
            if self._answered:
                hint = ""
            return EtcdError(f"cannot reach etcd at {where}{hint}: {details}", "unreachable"), True
        if any(word in lower for word in ("ssl", "tls", "certificate", "handshake")):
            hint = "" if self._tls["ca_cert"] else " (no etcd.ca is set)"
            return EtcdError(f"etcd at {where}: the TLS certificates do not fit{hint}: {details}", "certificate"), False
        if "authentication failed" in lower:
            user = self._credentials.get("user")
            return EtcdError(
                f"etcd at {where} refuses user {user!r}: wrong user or ETCD_PASSWORD", "credentials"
            ), False
        if "user name is empty" in lower:
            return EtcdError(f"etcd at {where} asks for a user: set etcd.user, and ETCD_PASSWORD", "credentials"), False
        if "requested lease not found" in lower:
            return EtcdError(f"etcd at {where}: the lease has ended", "lease"), False
        # The token is too old, or of a server that was restarted, or of a time when users had other rights.
        if code == grpc.StatusCode.UNAUTHENTICATED or "revision of auth store is old" in lower:
            return EtcdError(f"etcd at {where}: {details}", "credentials"), True
        if code == grpc.StatusCode.PERMISSION_DENIED:
            return EtcdError(f"etcd at {where} denies access below {self.prefix}: {details}", "permission"), False
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return EtcdError(f"cannot reach etcd at {where}: {details}", "unreachable"), True
        # It is there, but overburdened, or changes its leader, or what stands in between has cut the connection.
        passing = code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
        if passing and any(
            words in lower
            for words in ("too many requests", "proposal dropped", "raft: stopped", "stream removed", "rst_stream")
        ):
            return EtcdError(f"cannot reach etcd at {where}: {details}", "unreachable"), True
        # Another thread has just dropped it; gRPC has several words for that.
        if isinstance(exception, ValueError) and "channel" in lower and "closed" in lower:
            return EtcdError(f"cannot reach etcd at {where}: {details}", "unreachable"), True
        return EtcdError(f"etcd at {where}: {details or repr(exception)}", "request"), False

    def _entry(self, value: bytes, meta: Any) -> Entry:
        key = meta.key.decode().removeprefix(self.prefix)
        return Entry(key, json.loads(value), meta.mod_revision, meta.lease_id)


class Lease:
    """Keys that live as long as this process does: a thread keeps their lease alive.

    If the lease is lost all the same (this process or etcd stood still for longer than the TTL), a new one is taken and
    the keys are registered again. An exclusive key that another process has taken meanwhile stays that one's:
    `lost` is set then.

    Args:
        client: Its client; close it after the lease.
        ttl: Seconds that the keys outlive the last sign of life.
    """

    def __init__(self, client: EtcdClient, ttl: float) -> None:
        self._client, self._ttl = client, ttl
        self._keys: dict[str, tuple[Json, bool]] = {}
        self._complete = True
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self.lost = threading.Event()
        self.id = client.grant(ttl)
        self._thread = threading.Thread(target=self._keep_alive, name="etcd-lease", daemon=True)
        self._thread.start()

    def put(self, key: str, value: Json) -> None:
        """Put a key under the lease, whoever had it before."""
        with self._lock:
            self._under_lease(lambda: self._client.put(key, value, self.id))
            self._keys[key] = (value, False)

    def create(self, key: str, value: Json) -> bool:
        """Create a key under the lease; False if somebody has it."""
        with self._lock:
            won, _ = self._under_lease(lambda: self._client.swap(key, value, None, self.id))
            if won:
                self._keys[key] = (value, True)
            return won

    def revoke(self) -> None:
        """Give the keys back at once. An etcd that is away is no error: the lease then runs out."""
        self._ended.set()
        with self._lock, suppress(EtcdError):
            self._client.revoke(self.id)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _under_lease(self, operation: Callable[[], T]) -> T:
        """Do it; once more with a new lease if ours turns out to be lost, before its thread has noticed."""
        try:
            return operation()
        except EtcdError as error:
            if error.kind != "lease":
                raise
        self._register_again()
        return operation()

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._ttl / 3):
            try:
                if not self._client.refresh(self.id) or not self._complete:
                    self._register_again()
            except EtcdError as error:  # etcd is away: the next turn tries again
                log.debug("lease: %s", error)
            except Exception:
                log.exception("a lease could not be kept alive; trying again")

    def _register_again(self) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            if not self._client.refresh(self.id):
                self.id = self._client.grant(self._ttl)
            self._complete = False  # until all keys are there: etcd may go away in the middle
            for key, (value, exclusive) in self._keys.items():
                if not exclusive:
                    self._client.put(key, value, self.id)
                    continue
                won, entry = self._client.swap(key, value, None, self.id)
                if not won and (entry is None or entry.lease != self.id):
                    self.lost.set()
            self._complete = True


class Watch:
    """Calls `notify` after changes below a prefix, and whenever some may have been missed: then look at what there is.

    It is made anew when its connection, its member of etcd or that one's leader is lost. Each begins with what is to
    come, so no compaction of the past can end it.
    """

    def __init__(self, client: EtcdClient, prefix: str, notify: Callable[[], None]) -> None:
        self._client, self._prefix, self._notify = client, (client.prefix + prefix).encode(), notify
        self._ended = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="etcd-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.cancel()

    def _run(self) -> None:
        while not self._ended.is_set():
            connection = None
            try:
                connection = self._client._connect()
                self._follow(connection)
            except Exception as exception:
                if not self._ended.is_set():  # else it was us who ended it
                    self._client._failed(connection, exception)
            self._tell()
            self._ended.wait(POLL_INTERVAL)

    def _tell(self) -> None:
        try:
            self._notify()
        except Exception as error:  # whoever is told asks etcd, perhaps, which may be away: the watch must not end
            log.debug("after a change below %s: %s", self._prefix, error)

    def _follow(self, connection: Any) -> None:
        rpc = importlib.import_module("etcd3.etcdrpc")
        end = self._prefix[:-1] + bytes([self._prefix[-1] + 1])
        request = rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key=self._prefix, range_end=end))
        stream_ended = threading.Event()

        def requests() -> Iterator[Any]:
            yield request
            stream_ended.wait()  # the server ends the watch when the requests end

        # A member that is cut off from the others says nothing for ever, unless it is told to need a leader.
        metadata = (*(connection.metadata or ()), ("hasleader", "true"))
        stream = rpc.WatchStub(connection.channel).Watch(requests(), metadata=metadata)
        self._stream = stream
        stream.add_callback(stream_ended.set)
        if self._ended.is_set():
            stream.cancel()
        for answer in stream:  # the first one says that the watch stands: what came before it must be looked at
            if answer.canceled:  # we may not read this, or no longer; the stream itself would stay open
                stream.cancel()
                return
            self._tell()


def run_prefix(prefix: str, run_id: str) -> str:
    """Where a run's keys lie."""
    return f"{prefix.rstrip('/')}/{run_id}/"


def local_address(endpoint: str) -> str:
    """The address of this machine on the way to `endpoint` (host:port): what others can reach it at, most likely."""
    host, _, port = endpoint.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # UDP: connecting sends nothing
        try:
            probe.connect((host, int(port)))
            return str(probe.getsockname()[0])
        except OSError as error:
            raise EtcdError(f"cannot reach etcd at {endpoint}: {error.strerror or error}", "unreachable") from None


def _is_etcds(exception: Exception) -> bool:
    """Whether it is etcd's, or the connection's, and not some other code's."""
    import grpc

    known = (EtcdError, grpc.RpcError, import_etcd3().exceptions.Etcd3Exception, OSError, ValueError)
    return isinstance(exception, known)


def _encode(value: Json) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


_import_lock = threading.Lock()


def import_etcd3() -> types.ModuleType:
    """Import `etcd3` under any protobuf: build its message modules from the descriptors that they carry."""
    with _import_lock:
        if "etcd3" not in sys.modules:
            from google.protobuf import descriptor_pool
            from google.protobuf.internal import builder

            spec = importlib.util.find_spec("etcd3")
            if spec is None or spec.origin is None:
                raise EtcdError("the package etcd3 is not installed", "request")
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC has to say, our exceptions say
            for name in ("kv", "auth", "rpc"):  # rpc imports the other two
                source = (Path(spec.origin).parent / "etcdrpc" / f"{name}_pb2.py").read_text(encoding="utf-8")
                descriptor = descriptor_pool.Default().AddSerializedFile(_serialized_pb(source))
                module = types.ModuleType(f"etcd3.etcdrpc.{name}_pb2")
                builder.BuildMessageAndEnumDescriptors(descriptor, vars(module))
                builder.BuildTopDescriptorsAndMessages(descriptor, module.__name__, vars(module))
                sys.modules[module.__name__] = module
        return importlib.import_module("etcd3")


def _serialized_pb(source: str) -> bytes:
    """The serialized file descriptor inside the source of a generated `*_pb2` module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            return str(ast.literal_eval(node.value.args[0])).encode("latin1")
    raise EtcdError("the installed etcd3 is not the release 0.12.0 that this project knows", "request")
