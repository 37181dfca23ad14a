"""Whoever does not belong to the run, at its port: gets nothing, costs nothing, and disturbs nobody."""

import json
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from tests.members import LOCAL, PATIENCE, SECRET, connect, link, member, names, reduce, wait_for
from trainer.process import connect as dial
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import DIALLER, Credentials, credentials
from trainer.transport.handshake import HELLO_BYTES, PENDING, Consent, Dialler, Hello, Listener
from trainer.transport.link import BULK, ROUNDS
from trainer.transport.transport import Transport

SHORT = TransportTimeouts(handshake=1.0, dial_back=0.2, relay=0.5)
PLAIN = credentials(SECRET, "none")
TLS = replace(credentials(SECRET), loopback=True)
OTHER = b"the secret of another run"
NO_TLS = bytes(64)  # in place of two certificates
HELLO = Hello(names(1)[0], names(2)[1], ROUNDS, True, "0123")


def strangers(transport: Transport) -> int:
    return len(transport._listener._strangers)


@contextmanager
def run(of: Credentials = TLS) -> Iterator[list[Transport]]:
    """Two members, whose collective works before and afterwards, with what they have of threads and of connections."""
    with ExitStack() as stack:
        transports = [stack.enter_context(member(rank, of=of, timeouts=SHORT)) for rank in range(2)]
        connect(transports)
        reduce(transports, (1, 1, 1))
        wait_for(lambda: not any(thread.name.startswith("dial") for thread in threading.enumerate()))
        ends = [link(*transports), link(*reversed(transports))]
        threads = threading.active_count()
        yield transports
        wait_for(lambda: strangers(transports[1]) == 0)
        wait_for(lambda: threading.active_count() <= threads)
        reduce(transports, (1, 1, 99))
        assert [link(*transports), link(*reversed(transports))] == ends, "a link was lost"


def ended(connection: socket.socket) -> bool:
    """Whether the other end closes the connection, or has; what it says before is read."""
    connection.settimeout(PATIENCE)
    try:
        while connection.recv(1 << 16):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    return True


def challenged(endpoint: str) -> tuple[socket.socket, bytes]:
    """A connection without TLS, and the context of its proofs."""
    connection = dial(endpoint, PATIENCE)
    connection.sendall(b"\x00")
    return connection, NO_TLS + connection.recv(16, socket.MSG_WAITALL)


def introduction(context: bytes) -> bytes:
    """The message of a dialler that belongs to the run."""
    return HELLO.encode(PLAIN, context)[0]


@contextmanager
def acceptor(answer: Callable[[bytes], bytes], dialled: int = 1) -> Iterator[str]:
    """An endpoint that always sends the same challenge, and answers a hello with `answer(hello)`."""
    with socket.create_server((LOCAL, 0)) as server:

        def serve() -> None:
            for _ in range(dialled):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1)
                    connection.sendall(bytes(16))
                    connection.sendall(answer(connection.recv(HELLO_BYTES)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{LOCAL}:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("of", [PLAIN, TLS], ids=["plain", "tls"])
@pytest.mark.parametrize("security", ["none", "tls"])
def test_another_secret_is_refused_on_either_side(
    of: Credentials, security: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = replace(credentials(OTHER, security), loopback=True)
    with run(of) as (_, victim), Transport("intruder", [LOCAL], theirs, timeouts=SHORT, silence=20.0) as intruder:
        missing = intruder.connect({victim.id: victim.endpoints}, PATIENCE)
        assert set(missing) == {victim.id} and victim.endpoints[0] in missing[victim.id]
        missing = victim.connect({intruder.id: intruder.endpoints}, PATIENCE)
        assert set(missing) == {intruder.id}
        assert intruder.id not in {id for id, _ in victim._links}
    assert "refused a connection from 127.0.0.1, which " in caplog.text
    for secret in (SECRET, OTHER):
        assert secret.decode() not in caplog.text + str(missing) and secret.hex() not in caplog.text


@pytest.mark.parametrize(("dialler", "acceptor"), [(PLAIN, TLS), (TLS, PLAIN)])
def test_tls_and_plain_do_not_mix_and_say_so(
    dialler: Credentials, acceptor: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    with member(0, of=dialler, timeouts=SHORT) as one, member(1, of=acceptor, timeouts=SHORT) as other:
        missing = one.connect({other.id: other.endpoints}, PATIENCE)
    assert other.id in missing
    assert "has another transport_security" in caplog.text


def test_one_that_is_not_meant_is_refused() -> None:
    """The address belongs to another member meanwhile."""
    with run() as (one, other):
        missing = one.connect({"another": other.endpoints}, PATIENCE)
        assert "refused the connection" in missing["another"]


@pytest.mark.parametrize("of", [PLAIN, TLS], ids=["plain", "tls"])
def test_garbage_ends_and_hurts_nobody(of: Credentials) -> None:
    """Also what is garbage only after a good beginning."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randint(0, 256, (n,), generator=generator).byte().numpy().tobytes() for n in (1, 2, 7, 500, 9999)]
    garbage = [
        *noise,
        *(b"\x00" + each for each in noise),
        *(b"\x16\x03\x01" + each for each in noise),
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\xff\xff" + bytes(70_000),
    ]
    with run(of) as (_, victim):
        for each in garbage:
            with dial(victim.endpoints[0], PATIENCE) as connection:
                try:
                    connection.sendall(each)
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    continue  # it has been refused already
                assert ended(connection)


def bodies(context: bytes) -> Iterator[bytes]:
    """What somebody says who knows the protocol, and not the secret; or the secret, and not the protocol."""
    for text in ("", "{}", "[]", "null", '{"proof": 1}', "[" * HELLO_BYTES, '{"proof": "é", "hello": "\\ud800"}'):
        yield text.encode()
    yield b"\xff\xfe"
    good = json.loads(introduction(context)[2:])
    yield json.dumps({**good, "proof": "0" * 64}).encode()
    yield json.dumps({**good, "hello": good["hello"].replace(HELLO.by, "me")}).encode()
    hello = good["hello"]
    broken = hello.replace('"0123"', "7"), hello.replace("challenge", "c"), hello[:-1]
    for content in ("[]", "7", "{}", "[" * 900, '{"at": 7}', *broken):
        proof = PLAIN.proof(DIALLER, context, content.encode()).hex()
        yield json.dumps({"proof": proof, "hello": content}).encode()


def test_no_hello_that_is_none_hurts() -> None:
    with run(PLAIN) as (_, victim):
        count = len(list(bodies(NO_TLS + bytes(16))))
        for number in range(count):
            connection, context = challenged(victim.endpoints[0])
            with connection:
                body = list(bodies(context))[number]
                connection.sendall(struct.pack("!H", len(body)) + body)
                assert ended(connection), body
        assert victim._listener._thread.is_alive()


def test_a_length_that_is_too_long_is_refused_before_anything_comes() -> None:
    with run(PLAIN) as (_, victim):
        connection, _ = challenged(victim.endpoints[0])
        with connection:
            connection.sendall(struct.pack("!H", HELLO_BYTES + 1))
            assert ended(connection)


def test_a_proof_is_worth_nothing_on_another_connection() -> None:
    with run(PLAIN) as (_, victim):
        (one, context), (other, another) = (challenged(victim.endpoints[0]) for _ in range(2))
        with one, other:
            assert context != another
            other.sendall(introduction(context))
            assert ended(other)


def reflected(hello: bytes) -> bytes:
    return bytes.fromhex(json.loads(hello[2:])["proof"])


@pytest.mark.parametrize("answer", [reflected, lambda _: bytes(32)], ids=["the dialler's own proof", "anything"])
def test_one_that_consents_without_the_secret_gains_no_link(answer: Callable[[bytes], bytes]) -> None:
    """A stranger that listens on a member's former port, for example."""
    with acceptor(answer) as endpoint, pytest.raises(ConnectionError, match="does not have this run's secret"):
        Dialler(PLAIN, SHORT, 20.0).dial([endpoint], HELLO)


def test_a_consent_is_worth_nothing_on_another_connection() -> None:
    """Even if the hello and the acceptor's challenge are the same."""
    consents: list[bytes] = []

    def answer(message: bytes) -> bytes:
        consents.append(Hello.decode(message[2:], PLAIN, NO_TLS + bytes(16))[1])
        return consents[0]

    dialler = Dialler(PLAIN, SHORT, 20.0)
    with acceptor(answer, dialled=2) as endpoint:
        dialler.dial([endpoint], HELLO)[0].close()
        with pytest.raises(ConnectionError, match="does not have this run's secret"):
            dialler.dial([endpoint], HELLO)
    assert consents[0] != consents[1]


@pytest.mark.parametrize("lane", [ROUNDS, BULK, "another"])
def test_one_with_the_secret_that_then_breaks_the_protocol_loses_its_link(lane: str) -> None:
    with run(PLAIN) as (_, victim):
        connection, context = challenged(victim.endpoints[0])
        message, proof = replace(HELLO, by="intruder", lane=lane).encode(PLAIN, context)
        with connection:
            connection.sendall(message)
            if lane == "another":
                assert ended(connection)
                return
            assert connection.recv(len(proof), socket.MSG_WAITALL) == proof
            connection.sendall(b"\x03" + bytes(24) + b"\x7f\xff\xff\xff")  # a reply of 2 GB
            assert ended(connection)
        wait_for(lambda: ("intruder", lane) not in victim._links)


def test_a_port_scanner_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with run() as (_, victim):
        caplog.clear()
        for _ in range(50):
            dial(victim.endpoints[0], PATIENCE).close()
        wait_for(lambda: strangers(victim) == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x00"])
def test_a_connection_that_is_reset_at_any_time_hurts_nobody(said: bytes) -> None:
    with run() as (_, victim):
        for _ in range(50):
            with dial(victim.endpoints[0], PATIENCE) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if said:
                    connection.sendall(said)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"\x00"], ids=["nothing", "half a ClientHello", "no hello"])
def test_one_that_says_nothing_more_is_dropped(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with run(TLS if said != b"\x00" else PLAIN) as (_, victim), dial(victim.endpoints[0], PATIENCE) as connection:
        connection.sendall(said)
        assert ended(connection)
    assert "which sent nothing" in caplog.text


def test_one_that_drips_is_dropped_too() -> None:
    """A byte at a time does not buy more time."""
    with run(PLAIN) as (_, victim):
        connection, context = challenged(victim.endpoints[0])
        with connection:
            over = threading.Event()

            def drip() -> None:
                for byte in introduction(context):
                    if over.wait(0.1):
                        return
                    try:
                        connection.send(bytes([byte]))
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            assert ended(connection)
            over.set()
            dripping.join()


def test_five_hundred_silent_connections_hold_no_thread_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with run() as transports, ExitStack() as stack:
        victim, threads = transports[1], threading.active_count()
        for _ in range(500):
            connection = stack.enter_context(dial(victim.endpoints[0], PATIENCE))
            connection.sendall(b"\x16")
        assert strangers(victim) <= PENDING
        assert threading.active_count() <= threads
        reduce(transports, (1, 1, 2))
        # One that belongs comes in between them
        with member(2, of=TLS) as late:
            assert not late.connect({victim.id: victim.endpoints}, PATIENCE)
            assert threading.active_count() <= threads + 20
        assert len([record for record in caplog.records if "refused a connection" in record.message]) <= 1


def test_one_that_speaks_while_it_is_dropped_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one pass, the listener finds one connection too many, and data of the oldest one, which it drops for that."""
    looking, go_on = threading.Event(), threading.Event()

    def accept(connection: socket.socket, hello: Hello, consent: Consent) -> None:
        looking.set()
        go_on.wait(PATIENCE)
        connection.close()

    listener = Listener(LOCAL, "", 0, PLAIN, accept, SHORT, 20.0)
    endpoint = f"{LOCAL}:{listener.port}"
    with ExitStack() as stack:
        stack.callback(listener.close)
        stack.callback(go_on.set)
        oldest, _ = challenged(endpoint)
        other, context = challenged(endpoint)
        stack.enter_context(oldest)
        stack.enter_context(other).sendall(introduction(context))
        assert looking.wait(PATIENCE)
        monkeypatch.setattr("trainer.transport.handshake.PENDING", 1)
        late = stack.enter_context(dial(endpoint, PATIENCE))
        late.sendall(b"\x00")
        oldest.sendall(b"\x00")
        go_on.set()
        assert ended(oldest)
        assert len(late.recv(16, socket.MSG_WAITALL)) == 16
    assert "the listener has failed" not in caplog.text
