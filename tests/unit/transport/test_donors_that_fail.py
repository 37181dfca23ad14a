"""Donors that die, hang, lie or corrupt: they are behind a proxy that makes them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.members import LOCAL, SECRET
from tests.network.proxy import Proxy
from tests.unit.transport.donors import (
    CHUNK,
    ENCRYPTED,
    PATIENT,
    PLAIN,
    donors,
    fetch,
    numbered,
    same,
    state,
)
from trainer.transport import fetch as transfer
from trainer.transport.credentials import Credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.fetch import TransferError
from trainer.transport.transport import Transport

# Donors that fail


def test_a_donor_that_breaks_off_is_replaced_and_nothing_is_fetched_twice() -> None:
    offer = Offer({}, state(1_000_000))
    total = sum(buffer.nbytes for buffer in offer.buffers.values())

    def break_off(data: bytes) -> bytes:
        raise ConnectionResetError

    def find(what: str) -> Offer | None:
        """Not before the other has broken off: alone it would be done before that."""
        return offer if breaking.bytes > 1_000_000 else None

    with (
        donors({"x": offer}.get, find) as (one, two),
        Proxy(one, after=1_000_000, then=break_off) as breaking,
        Proxy(two) as sound,
    ):
        _, received = fetch("x", numbered(breaking.endpoint, sound.endpoint))
        taken = breaking.bytes + sound.bytes
    assert same(received, offer.buffers)
    chunks, headers = total // CHUNK + 2, 400
    failures = transfer.FAILURES * transfer.REQUESTED * CHUNK
    assert total <= taken <= total + chunks * headers + failures + (1 << 17)


@pytest.mark.parametrize("of", [PLAIN, ENCRYPTED], ids=["plain", "tls"])
def test_a_connection_that_breaks_now_and_then_is_taken_up_again(of: Credentials) -> None:
    """A single donor; its connection breaks after every 20 chunks."""
    offer = Offer({}, state(500_000))
    passed = 0

    def break_at_times(data: bytes) -> bytes:
        nonlocal passed
        passed += len(data)
        if passed > 20 * CHUNK:
            passed = 0
            raise ConnectionResetError
        return data

    total = sum(buffer.nbytes for buffer in offer.buffers.values())
    with donors({"x": offer}.get, of=of) as endpoints, Proxy(endpoints[0], then=break_at_times) as proxy:
        assert same(fetch("x", numbered(proxy.endpoint), of)[1], offer.buffers)
        assert proxy.bytes < 1.7 * total  # it was resumed, not started again


def test_a_donor_that_corrupts_bytes_is_dropped() -> None:
    """TLS finds it out."""
    offer = Offer({}, state(1_000_000))

    def corrupt(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    with (
        donors({"x": offer}.get, {"x": offer}.get, of=ENCRYPTED) as (one, two),
        Proxy(one, after=300_000, then=corrupt) as bad,
    ):
        assert same(fetch("x", numbered(bad.endpoint, two), ENCRYPTED)[1], offer.buffers)
        with pytest.raises(TransferError, match="no donor is left: 0 "):
            fetch("x", numbered(bad.endpoint), ENCRYPTED)


def test_a_chunk_of_another_size_is_refused() -> None:
    """By a donor that has the secret, but not its wits about it."""

    class Generous(Donor):
        def _send_chunk(self, link: Any, key: Any, tag: int, offer: str, buffer: str, start: int, stop: int) -> None:
            link.send(key, tag, torch.zeros(stop - start + 1, dtype=torch.uint8))

    with (
        Transport("0", [LOCAL], PLAIN, handle=Generous({"x": Offer({}, state())}.get)) as donor,
        pytest.raises(TransferError, match="a message is longer than expected"),
    ):
        fetch("x", numbered(*donor.endpoints))


def test_all_donors_are_named() -> None:
    def fail(what: str) -> Offer | None:
        raise RuntimeError("no")

    short = replace(PATIENT, handshake=0.5)  # for the silent one, before each of its failures
    with socket.create_server((LOCAL, 0)) as silent, donors(fail) as (failing,):
        closed = socket.create_server((LOCAL, 0))
        ports = [silent.getsockname()[1], closed.getsockname()[1]]
        closed.close()
        with pytest.raises(TransferError) as caught:
            fetch("x", numbered(failing, *(f"{LOCAL}:{port}" for port in ports), "nonsense"), timeouts=short)
    text = str(caught.value)
    assert "0 RuntimeError at the donor" in text
    assert f"1 cannot be reached: {LOCAL}:{ports[0]}: timed out" in text
    assert f"2 cannot be reached: {LOCAL}:{ports[1]}: Connection refused" in text
    assert "3 cannot be reached: nonsense: " in text
    with pytest.raises(TransferError, match="none was known"):
        fetch("x", {})


CHILD = """
import sys, torch
from trainer.transport.credentials import credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.transport import Transport
generator = torch.Generator().manual_seed(0)
state = {name: torch.rand(int(sys.argv[1]), generator=generator) for name in ("parameters", "momentum")}
offers = {"x": Offer({}, state)}
with Transport("0", ["127.0.0.1"], credentials(sys.argv[2].encode()), handle=Donor(offers.get)) as donor:
    print(*donor.endpoints, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A donor that is a process of its own, with `state(1_000_000)`; and its endpoint."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, "1000000", SECRET.decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        try:
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_donor_process_that_is_killed_or_frozen_in_the_middle(
    process: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    child, endpoint = process
    gone: list[float] = []

    def strike(data: bytes) -> bytes:
        if not gone:
            os.kill(child.pid, number)
            gone.append(time.monotonic())
        return data

    def find(what: str) -> Offer | None:
        """Not before the process is gone: alone it would be done before that."""
        return offer if gone else None

    offer, short = Offer({}, state(1_000_000)), replace(PATIENT, stall=2.0)
    with (
        Transport("1", [LOCAL], PLAIN, handle=Donor(find)) as other,
        Proxy(endpoint, after=1_000_000, then=strike) as proxy,
    ):
        _, received = fetch("x", numbered(proxy.endpoint, *other.endpoints), timeout=60, timeouts=short)
    assert gone and same(received, offer.buffers)


def test_a_donor_process_ends_well_in_the_middle_of_a_transfer(process: tuple[subprocess.Popen[str], str]) -> None:
    """Its exit status is 0: none of its threads is caught by the end of the interpreter."""
    child, endpoint = process

    def end(data: bytes) -> bytes:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)  # this piece is held back meanwhile: the transfer cannot end before the process does
        return data

    with Proxy(endpoint, after=1_000_000, then=end) as proxy, pytest.raises(TransferError, match="0 cannot be reached"):
        fetch("x", numbered(proxy.endpoint), timeout=30)
    assert child.wait(20) == 0
