"""The wire's meter: the kernel's counters of the connections that one piece of code opened."""

import os
import socket

import pytest

from trainer.worker import wire_meter
from trainer.worker.wire_meter import WireMeter


def test_what_a_connection_carries_is_counted_to_the_byte() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with WireMeter.watching() as meter:
            client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with client, connection:
            client.sendall(bytes(1000))
            assert len(connection.recv(1000, socket.MSG_WAITALL)) == 1000
            connection.sendall(bytes(10))
            assert len(client.recv(10, socket.MSG_WAITALL)) == 10
            assert meter.read() == (1000, 10)
        read = meter.read()  # also when the connection has been closed meanwhile; the kernel counts its end as a byte
        assert read in [(1000, 10), (1000, 11), (1001, 10), (1001, 11)]
        meter.close()


def test_a_connection_that_another_thread_closes_meanwhile_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing of a process's connections and the look at each, any other thread may close one."""
    listed = wire_meter._connections
    gone = os.dup(0)
    os.close(gone)
    with WireMeter.watching() as meter:
        monkeypatch.setattr(wire_meter, "_connections", lambda: listed() | {(gone, ("127.0.0.1", 1), ("127.0.0.1", 2))})
    assert meter.read() == (0, 0)


def test_a_connection_that_takes_the_number_of_one_that_was_closed_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        reused = socket.create_connection(server.getsockname())
        with WireMeter.watching() as meter, socket.create_connection(server.getsockname()) as later:
            # In one step, so that no other thread takes the number between a close and an open.
            os.dup2(later.fileno(), reused.fileno())
        with reused:
            reused.sendall(bytes(1000))
            assert meter.read() == (1000, 0)
        meter.close()
