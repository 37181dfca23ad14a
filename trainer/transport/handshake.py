"""The start of a connection: TLS, a challenge, the dialler's proof and request, and the acceptor's proof.

    dialler   one byte, if there is no TLS: on loopback, or with `transport_security=none`
    acceptor  challenge: 16 random bytes
    dialler   length (u16), and JSON: {"proof": …, "hello": the JSON of a `Hello` and a challenge}
    acceptor  proof: 32 bytes, with which it consents

A proof is an HMAC, with the run's secret, of the role, both ends' certificates, the acceptor's challenge, and the hello
with the dialler's challenge. So no proof can be replayed, or used by a man in the middle with a certificate of the same
authority.

The acceptor does all this on one thread without ever waiting for a stranger. A connection that is not authenticated
within `handshake` seconds is dropped; if there are more than `PENDING`, the oldest is dropped.
"""

import json
import logging
import queue
import secrets
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Self

from trainer.process import connect, listen
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import ACCEPTOR, DIALLER, Credentials
from trainer.transport.stream import prepare

log = logging.getLogger(__name__)

PENDING = 128  # maximum number of strangers
HELLO_BYTES = 2048
_CHALLENGE_BYTES = 16
_LENGTH = struct.Struct("!H")
_PLAIN, _TLS = b"\x00", b"\x16"  # a client's first byte in TLS (RFC 8446, 5.1)

Consent = Callable[[], None]
"""Tells a dialler to begin, and proves that this process belongs to the run. Raises OSError if the dialler is gone."""


@dataclass(frozen=True)
class Hello:
    """A dialler's request: a stream of the link between two members.

    Attributes:
        by, to: Ids of the members.
        lane: Links of different lanes do not disturb each other.
        sends: Whether the dialler sends on this stream; otherwise it receives.
        link: Id of the dialler's end of the link. It changes when the link is re-established.
        relayed: Whether the dialled member is not `to`, but has to relay the bytes to it.
        at: The endpoints at which the dialler can be dialled.
        pair: Id of the other end of the link, if the dialler knows it.
    """

    by: str
    to: str
    lane: str
    sends: bool
    link: str
    relayed: bool = False
    at: tuple[str, ...] = ()
    pair: str = ""

    def encode(self, credentials: Credentials, context: bytes) -> tuple[bytes, bytes]:
        """The message, and the proof with which the acceptor consents to it."""
        content = json.dumps({**asdict(self), "challenge": secrets.token_hex(_CHALLENGE_BYTES)})
        proof = credentials.proof(DIALLER, context, content.encode()).hex()
        body = json.dumps({"proof": proof, "hello": content}).encode()
        return _LENGTH.pack(len(body)) + body, credentials.proof(ACCEPTOR, context, content.encode())

    @classmethod
    def decode(cls, body: bytes, credentials: Credentials, context: bytes) -> tuple[Self, bytes]:
        """Decode and authenticate. Returns the hello, and the proof to consent with.

        Raises:
            ValueError: It is not a hello, or the sender does not have the secret.
        """
        try:
            message = json.loads(body)
            proof, content = str(message["proof"]), str(message["hello"])
            if not secrets.compare_digest(proof, credentials.proof(DIALLER, context, content.encode()).hex()):
                raise ValueError("does not have this run's secret")
            fields = json.loads(content)
            fields = {**fields, "at": tuple(fields["at"])}
            del fields["challenge"]  # only the proofs depend on it
            hello = cls(**fields)
            if not all(
                isinstance(text, str) for text in (hello.by, hello.to, hello.lane, hello.link, hello.pair, *hello.at)
            ):
                raise ValueError("sent no hello")
        except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise ValueError("speaks another protocol") from None
        return hello, credentials.proof(ACCEPTOR, context, content.encode())


@dataclass(frozen=True)
class Dialler:
    """Dials other members.

    Args:
        silence: See `prepare`.
    """

    credentials: Credentials
    timeouts: TransportTimeouts
    silence: float

    def dial(self, endpoints: Sequence[str], hello: Hello, patience: float = 0.0) -> tuple[socket.socket, str]:
        """Connect, and return the connection and the endpoint that was first to answer.

        Args:
            endpoints: One member's endpoints, which are tried at the same time.
            patience: Maximum seconds until the other end consents; 0: the time limit of a handshake.

        Raises:
            OSError: No endpoint answers and consents with a proof, or there is none.
        """
        if not endpoints:
            raise OSError("no address is known")
        results: queue.Queue[tuple[str, socket.socket | OSError, bytes]] = queue.Queue()
        taken = threading.Event()

        def reach(endpoint: str) -> None:
            try:
                found = self._reach(endpoint)
            except OSError as reason:
                results.put((endpoint, reason, b""))
            else:
                results.put((endpoint, *found))
                if taken.is_set():
                    _close_all(results)

        # At the same time, because an address that cannot be reached from here takes until its timeout
        for endpoint in endpoints:
            threading.Thread(target=reach, args=(endpoint,), name="dial", daemon=True).start()
        error = OSError("no address answers")
        try:
            for _ in endpoints:  # send the hello only on the first connection; the others must not be used
                endpoint, connection, challenge = results.get()
                if isinstance(connection, OSError):
                    error = connection
                    continue
                try:
                    self._introduce(connection, challenge, hello, patience)
                except OSError as reason:
                    error = reason
                else:
                    return connection, endpoint
            raise error
        finally:
            # Connections that are still being made are closed by their own threads
            taken.set()
            _close_all(results)

    def _reach(self, endpoint: str) -> tuple[socket.socket, bytes]:
        """A connection, encrypted if required, and the challenge."""
        try:
            connection = connect(endpoint, self.timeouts.connect)
        except ValueError as error:
            raise OSError(f"is not an endpoint ({error})") from None
        try:
            prepare(connection, self.silence)
            connection.settimeout(self.timeouts.handshake)
            if self.credentials.client and self.credentials.encrypts(connection):
                connection = self.credentials.client.wrap_socket(connection)
            else:
                connection.sendall(_PLAIN)
            return connection, _receive(connection, _CHALLENGE_BYTES)
        except BaseException as error:
            connection.close()
            raise _explained(error) from None

    def _introduce(self, connection: socket.socket, challenge: bytes, hello: Hello, patience: float) -> None:
        try:
            message, proof = hello.encode(self.credentials, self.credentials.channel(connection, True) + challenge)
            connection.sendall(message)
            connection.settimeout(patience or self.timeouts.handshake)
            if not secrets.compare_digest(_receive(connection, len(proof)), proof):
                raise ConnectionError("does not have this run's secret")
        except BaseException as error:
            connection.close()
            raise _explained(error) from None


def _explained(error: BaseException) -> BaseException:
    if not isinstance(error, ssl.SSLError):
        return error
    return ConnectionError(f"does not belong to this run, or has another transport_security ({error.reason})")


def _close_all(results: "queue.Queue[tuple[str, socket.socket | OSError, bytes]]") -> None:
    """Close the connections that were established too late."""
    with suppress(queue.Empty):
        while True:
            _, connection, _ = results.get_nowait()
            if isinstance(connection, socket.socket):
                connection.close()


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise ConnectionResetError("refused the connection")
        data += more
    return data


@dataclass(eq=False)
class _Stranger:
    """A connection that is not authenticated yet."""

    connection: socket.socket
    host: str
    challenge: bytes = field(default_factory=lambda: secrets.token_bytes(_CHALLENGE_BYTES))
    since: float = field(default_factory=time.monotonic)
    met: bool = False  # whether it is known if it speaks TLS
    shaken: bool = False  # whether the TLS handshake, if any, is done and the challenge has been sent
    received: bytes = b""


class Listener:
    """Accepts connections, and passes on those whose dialler belongs to the run.

    Args:
        accept: Called with each such connection, its hello and its consent, on the listener's thread; must not block.

    Raises:
        ConfigError: No port is free.
    """

    def __init__(
        self,
        address: str,
        port_range: str,
        port: int,
        credentials: Credentials,
        accept: Callable[[socket.socket, Hello, Consent], None],
        timeouts: TransportTimeouts,
        silence: float,
    ) -> None:
        self._socket = listen(address, port_range, port)
        self.port: int = self._socket.getsockname()[1]
        self._credentials, self._accept, self._timeouts, self._silence = credentials, accept, timeouts, silence
        self._socket.setblocking(False)
        self._strangers: dict[_Stranger, None] = {}  # oldest first
        self._warned: set[str] = set()
        self._closing = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        with suppress(OSError):
            self._waker.send(b"x")
        self._thread.join()
        for one in (self._socket, self._wake, self._waker, *(stranger.connection for stranger in self._strangers)):
            one.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._socket, selectors.EVENT_READ)
            self._selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing.is_set():
                try:
                    self._look()
                except Exception:  # possibly temporary, for example a lack of threads
                    log.exception("the listener failed, and continues")
                    self._closing.wait(self._timeouts.listener_retry)

    def _look(self) -> None:
        """Process what arrives until the next check for silent connections."""
        for key, _ in self._selector.select(self._timeouts.listener):
            if key.fileobj is self._socket:
                self._greet()
            elif key.data in self._strangers:  # otherwise `_greet` has just dropped it
                self._advance(key.data)
        limit = time.monotonic() - self._timeouts.handshake
        for stranger in [one for one in self._strangers if one.since < limit]:
            self._drop(stranger, "sent nothing")

    def _greet(self) -> None:
        """Accept a connection."""
        try:
            connection, (host, *_) = self._socket.accept()
        except OSError:  # it is already gone, or descriptors are (temporarily) exhausted
            self._closing.wait(self._timeouts.accept_retry)
            return
        if len(self._strangers) >= PENDING:
            self._drop(next(iter(self._strangers)), "was one of too many")
        connection.setblocking(False)
        prepare(connection, self._silence)
        stranger = _Stranger(connection, host)
        self._strangers[stranger] = None
        self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _advance(self, stranger: _Stranger) -> None:
        """Process what has arrived from a stranger, without waiting."""
        try:
            # Continue the connection's handshake where the last bytes left it
            if not stranger.met:
                self._meet(stranger)
            connection = stranger.connection
            if not stranger.shaken:
                if isinstance(connection, ssl.SSLSocket):
                    connection.do_handshake()
                connection.send(stranger.challenge)
                stranger.shaken = True
            # Then its hello, which proves that it belongs to the run
            while (missing := self._missing(stranger)) > 0:
                if not (more := connection.recv(missing)):
                    raise ConnectionResetError
                stranger.received += more
            context = self._credentials.channel(connection, False) + stranger.challenge
            hello, proof = Hello.decode(stranger.received[_LENGTH.size :], self._credentials, context)
        except (ssl.SSLWantReadError, BlockingIOError):
            self._selector.modify(stranger.connection, selectors.EVENT_READ, stranger)
        except ssl.SSLWantWriteError:
            self._selector.modify(stranger.connection, selectors.EVENT_WRITE, stranger)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._drop(stranger)  # it only probed the port
        except ssl.SSLError as error:
            self._drop(stranger, f"does not belong to this run, or has another transport_security: {error.reason}")
        except OSError:
            self._drop(stranger)
        except ValueError as error:
            self._drop(stranger, str(error))
        else:
            # It does: its link takes the connection over
            self._selector.unregister(connection)
            del self._strangers[stranger]
            connection.setblocking(True)
            self._accept(connection, hello, partial(connection.sendall, proof))

    def _meet(self, stranger: _Stranger) -> None:
        """Find out whether a stranger speaks TLS. Raises ValueError if it must and does not."""
        plain, context = stranger.connection, self._credentials.server
        first = plain.recv(1, socket.MSG_PEEK)
        if first == _TLS and context:
            self._selector.unregister(plain)
            stranger.connection = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            self._selector.register(stranger.connection, selectors.EVENT_READ, stranger)
        elif first == _PLAIN and not self._credentials.encrypts(plain):
            plain.recv(1)
        elif first:
            raise ValueError("speaks another protocol, or has another transport_security")
        else:
            raise ConnectionResetError
        stranger.met = True

    @staticmethod
    def _missing(stranger: _Stranger) -> int:
        """Number of bytes still missing from the hello. Raises ValueError if it is too long."""
        if len(stranger.received) < _LENGTH.size:
            return _LENGTH.size - len(stranger.received)
        (length,) = _LENGTH.unpack_from(stranger.received)
        if length > HELLO_BYTES:
            raise ValueError("speaks another protocol")
        return _LENGTH.size + length - len(stranger.received)

    def _drop(self, stranger: _Stranger, reason: str = "") -> None:
        with suppress(KeyError, ValueError):  # it is not registered, or already closed
            self._selector.unregister(stranger.connection)
        del self._strangers[stranger]
        stranger.connection.close()
        if reason and stranger.host not in self._warned and len(self._warned) < PENDING:
            self._warned.add(stranger.host)  # warn once, because port scanners keep coming back
            log.warning("refused a connection from %s, which %s", stranger.host, reason)
