"""State transfer between real sockets; donors that die, hang, lie or corrupt are behind a proxy that makes them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.errors import Interrupted
from trainer.timeouts import TransportTimeouts
from trainer.transport import channel, donor
from trainer.transport import fetch as transfer
from trainer.transport.channel import Layout, Offer, TransferError

PATIENT = TransportTimeouts(stall=20.0, retry=0.05)  # shorter where a test is about silence
CHUNK = 1 << 16
SECRET = b"0123456789abcdef0123456789abcdef"
LOCAL = "127.0.0.1"
Shelf = tuple[dict[str, Offer], str]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def state(count: int = 300_001, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator) for name in ("parameters", "momentum")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, whatever the shapes."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8))
        for name in left
    )


class Donor(donor.Donor):
    """With limits that a busy machine can meet."""

    def __init__(self, *arguments: Any, timeouts: TransportTimeouts = PATIENT, **options: Any) -> None:
        super().__init__(*arguments, timeouts=timeouts, **options)


def fetch(*arguments: Any, timeouts: TransportTimeouts = PATIENT, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    return transfer.fetch(*arguments, chunk_bytes=CHUNK, timeouts=timeouts, **options)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


class Proxy:
    """In front of a donor: counts what it sends, and once `after` bytes have passed, calls `then` on every piece."""

    def __init__(self, target: str, after: int = 0, then: Callable[[bytes], bytes] = lambda data: data) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._after, self._then = (host, int(port)), after, then
        self.bytes = 0
        self._listener = socket.create_server((LOCAL, 0))
        self.endpoint = f"{LOCAL}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                threading.Thread(target=self._pump, args=(near, far, lambda data: data), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, self._tamper), daemon=True).start()

    def _tamper(self, data: bytes) -> bytes:
        self.bytes += len(data)
        return self._then(data) if self.bytes > self._after else data

    def _pump(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(change(data))
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    """A donor's endpoint, and what it finds."""
    offers: dict[str, Offer] = {}
    with Donor(offers.get, SECRET, LOCAL) as donor:
        yield offers, donor.endpoint


# What arrives


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), st.sampled_from([0, 1, 3, 999, 65_536, 70_001]))
    ),
)
def test_any_buffers_arrive_bit_for_bit(shelf: Shelf, layout: dict[str, tuple[torch.dtype, int]]) -> None:
    offers, endpoint = shelf
    buffers = {
        name: torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        for name, (dtype, count) in layout.items()
    }
    offers["x"] = Offer({"round": 3, "tail": [[1, 2], None], "name": "é"}, buffers)
    meta, received = fetch("x", [endpoint], SECRET, timeout=20)
    assert meta == {"round": 3, "tail": [[1, 2], None], "name": "é"}
    assert same(received, buffers)


def test_it_is_received_into_the_given_tensors(shelf: Shelf) -> None:
    offers, endpoint = shelf
    offers["x"] = Offer({"round": 3}, {"a": torch.rand(3, 5), "b": torch.tensor(7)})
    mine = {"a": torch.zeros(3, 5), "b": torch.zeros(1, dtype=torch.int64)}
    asked: list[Any] = []

    def into(meta: Any, layout: Layout) -> dict[str, Tensor]:
        asked.append((meta, layout, threading.current_thread()))
        return mine

    _, received = fetch("x", [endpoint], SECRET, into=into, timeout=20)
    assert asked == [({"round": 3}, {"a": (torch.float32, 15), "b": (torch.int64, 1)}, threading.current_thread())]
    assert received is mine and same(mine, offers["x"].buffers)


def test_tensors_that_do_not_fit_are_refused(shelf: Shelf) -> None:
    offers, endpoint = shelf
    offers["x"] = Offer({}, {"a": torch.rand(4)})
    for wrong in ({"a": torch.zeros(5)}, {"a": torch.zeros(8)[::2]}, {}):
        with pytest.raises(ValueError):
            fetch("x", [endpoint], SECRET, into=lambda meta, layout, wrong=wrong: wrong, timeout=20)
    with pytest.raises(ValueError, match="contiguous"):
        Offer({}, {"a": torch.zeros(4, 4).t()})


def test_ipv6() -> None:
    with Donor({"x": Offer({}, state(100))}.get, SECRET, "::1") as donor:
        assert donor.endpoint.startswith("[::1]:")
        assert same(fetch("x", [donor.endpoint], SECRET, timeout=20)[1], state(100))


def test_many_fetchers_at_once() -> None:
    offer = Offer({}, state())
    with Donor({"x": offer}.get, SECRET, LOCAL) as one, Donor({"x": offer}.get, SECRET, LOCAL) as two:
        with ThreadPoolExecutor(16) as pool:
            results = list(
                pool.map(lambda _: fetch("x", [one.endpoint, two.endpoint], SECRET, timeout=60)[1], range(32))
            )
        assert all(same(received, offer.buffers) for received in results)
        wait_for(lambda: not one._serving and not two._serving)  # no thread stays behind


def test_more_connections_than_the_donor_serves_at_a_time() -> None:
    offer = Offer({}, state(30_000))
    with Donor({"x": offer}.get, SECRET, LOCAL, max_connections=2) as donor, ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: fetch("x", [donor.endpoint], SECRET, timeout=60)[1], range(6)))
    assert all(same(received, offer.buffers) for received in results)


def test_every_chunk_is_asked_for_once_and_of_both_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, asked, together = Donor._chunk, [], threading.Barrier(2)

    def chunk(self: Donor, offer: str, buffer: str, start: int, stop: int) -> tuple[dict[str, Any], Any]:
        first = all(other is not self for other, *_ in asked)
        asked.append((self, buffer, start))
        if first:
            together.wait(10)  # passes only if both are drawn from at a time
        return honest(self, offer, buffer, start, stop)

    monkeypatch.setattr(Donor, "_chunk", chunk)
    offer = Offer({}, state(1_000_000))
    with Donor({"x": offer}.get, SECRET, LOCAL) as one, Donor({"x": offer}.get, SECRET, LOCAL) as two:
        _, received = fetch("x", [one.endpoint, two.endpoint], SECRET, timeout=20)
    assert same(received, offer.buffers)
    assert {donor for donor, *_ in asked} == {one, two}
    starts = range(0, 4_000_000, CHUNK)
    assert sorted(chunk[1:] for chunk in asked) == [(name, start) for name in sorted(offer.buffers) for start in starts]


# Authentication


def test_a_fetcher_with_another_secret_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found: list[str] = []
    caplog.set_level(logging.DEBUG)
    with Donor(lambda what: found.append(what), SECRET, LOCAL) as donor:
        expected = f"{donor.endpoint} sent a message that was not made with this run's secret"
        with pytest.raises(TransferError, match=expected) as caught:
            fetch("x", [donor.endpoint], b"f" * 32, timeout=20)
    assert not found
    assert "refused 127.0.0.1" in caplog.text
    for secret in ("0123456789", "ffff"):
        assert secret not in caplog.text + str(caught.value)


def test_an_impostor_is_not_believed_and_the_others_are_used() -> None:
    offer, fake = Offer({}, state()), Offer({}, state(seed=1))
    with Donor({"x": offer}.get, SECRET, LOCAL) as donor, Donor({"x": fake}.get, b"f" * 32, LOCAL) as impostor:
        assert same(fetch("x", [impostor.endpoint, donor.endpoint], SECRET, timeout=20)[1], offer.buffers)


def test_replies_cannot_be_replayed(shelf: Shelf) -> None:
    offers, endpoint = shelf
    offers["x"] = Offer({}, state(1000))
    recorded: list[bytes] = []

    def record(data: bytes) -> bytes:
        recorded.append(data)
        return data

    fetch("x", [Proxy(endpoint, then=record).endpoint], SECRET, timeout=20)
    with socket.create_server((LOCAL, 0)) as listener:

        def replay() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(b"".join(recorded))

        threading.Thread(target=replay, daemon=True).start()
        with pytest.raises(TransferError, match="sent a message that was not made with this run's secret"):
            fetch("x", [f"{LOCAL}:{listener.getsockname()[1]}"], SECRET, timeout=20)


def test_a_secret_must_not_be_trivial() -> None:
    with pytest.raises(ValueError):
        fetch("x", [], b"", timeout=1)
    with pytest.raises(ValueError):
        Donor({}.get, b"short", LOCAL)


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"diloco-1" + bytes(32) + b"\xff" * 100])
def test_a_donor_survives_garbage(garbage: bytes) -> None:
    short = replace(PATIENT, stall=2.0)
    with Donor({"x": Offer({}, state(10))}.get, SECRET, LOCAL, timeouts=short) as donor:
        host, _, port = donor.endpoint.rpartition(":")
        with socket.create_connection((host, int(port)), 20) as connection:  # sends something, or nothing, and stays
            assert connection.recv(1 << 16)
            connection.sendall(garbage)
            assert same(fetch("x", [donor.endpoint], SECRET, timeout=20)[1], state(10))
            with suppress(ConnectionResetError):
                while connection.recv(1 << 16):  # the donor hangs up, after the timeout at the latest
                    pass


def test_chunks_that_are_none_are_refused(shelf: Shelf) -> None:
    offers, endpoint = shelf
    offers["x"] = Offer({}, {"a": torch.zeros(100)})
    host, _, port = endpoint.rpartition(":")
    for start, stop in ((-4, 4), (0, 401), (8, 8), (0, 1 << 40)):
        with socket.create_connection((host, int(port)), 20) as connection:
            fetcher = channel.Channel(connection, SECRET, channel.FETCHER, PATIENT)
            fetcher.send({"find": "x"})
            offer = fetcher.receive_reply()["offer"]
            fetcher.send({"offer": offer, "buffer": "a", "start": start, "stop": stop})
            with pytest.raises(channel.Failure, match="ValueError at the donor"):
                fetcher.receive_reply()


# Donors that fail


def test_a_donor_that_breaks_off_is_replaced_and_nothing_is_fetched_twice() -> None:
    offer = Offer({}, state(1_000_000))
    total = sum(buffer.nbytes for buffer in offer.buffers.values())

    def break_off(data: bytes) -> bytes:
        raise ConnectionResetError

    def find(what: str) -> Offer | None:
        """Not before the other has broken off: alone it would be done before that."""
        return offer if breaking.bytes > 1_000_000 else None

    with Donor({"x": offer}.get, SECRET, LOCAL) as one, Donor(find, SECRET, LOCAL) as two:
        breaking, sound = Proxy(one.endpoint, after=1_000_000, then=break_off), Proxy(two.endpoint)
        _, received = fetch("x", [breaking.endpoint, sound.endpoint], SECRET, timeout=20)
    assert same(received, offer.buffers)
    chunks, headers = total // CHUNK + 2, 200
    failures = transfer.FAILURES * transfer.REQUESTED * CHUNK
    assert breaking.bytes > 1_000_000
    assert total <= breaking.bytes + sound.bytes <= total + chunks * headers + failures + (1 << 17)


def test_a_connection_that_breaks_now_and_then_is_taken_up_again() -> None:
    """A single donor; its connection breaks after every 20 chunks."""
    offer = Offer({}, state(1_000_000))
    passed = 0

    def break_at_times(data: bytes) -> bytes:
        nonlocal passed
        passed += len(data)
        if passed > 20 * CHUNK:
            passed = 0
            raise ConnectionResetError
        return data

    with Donor({"x": offer}.get, SECRET, LOCAL) as donor:
        proxy = Proxy(donor.endpoint, then=break_at_times)
        assert same(fetch("x", [proxy.endpoint], SECRET, timeout=20)[1], offer.buffers)
        total = sum(buffer.nbytes for buffer in offer.buffers.values())
        assert proxy.bytes < 1.3 * total  # it was resumed, not started again


def test_a_donor_that_corrupts_bytes_is_dropped() -> None:
    offer = Offer({}, state(1_000_000))

    def corrupt(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    with Donor({"x": offer}.get, SECRET, LOCAL) as donor:
        bad = Proxy(donor.endpoint, after=300_000, then=corrupt)
        assert same(fetch("x", [bad.endpoint, donor.endpoint], SECRET, timeout=20)[1], offer.buffers)
        with pytest.raises(TransferError, match=f"no donor is left: {bad.endpoint} sent"):
            fetch("x", [bad.endpoint], SECRET, timeout=20)


def test_the_checksum_is_what_finds_a_corrupt_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a chunk are wrong, but the donor.s message about them is authentic."""
    honest = Donor._chunk

    def corrupt(self: Donor, **request: Any) -> tuple[dict[str, Any], Any]:
        reply, chunk = honest(self, **request)
        chunk[7] ^= 1
        return reply, chunk

    with Donor({"x": Offer({}, state())}.get, SECRET, LOCAL) as donor:
        monkeypatch.setattr(Donor, "_chunk", corrupt)
        with pytest.raises(TransferError, match="sent a chunk that does not match its checksum"):
            fetch("x", [donor.endpoint], SECRET, timeout=20)


def test_all_donors_are_named() -> None:
    def fail(what: str) -> Offer | None:
        raise RuntimeError("no")

    short = replace(PATIENT, stall=2.0)  # for the silent one, before each of its failures
    with socket.create_server((LOCAL, 0)) as silent, Donor(fail, SECRET, LOCAL) as failing:
        closed = socket.create_server((LOCAL, 0))
        ports = [silent.getsockname()[1], closed.getsockname()[1]]
        closed.close()
        with pytest.raises(TransferError) as caught:
            donors = [*(f"{LOCAL}:{port}" for port in ports), failing.endpoint, "nonsense"]
            fetch("x", donors, SECRET, timeout=20, timeouts=short)
    text = str(caught.value)
    assert f"{LOCAL}:{ports[0]} does not answer" in text
    assert f"{LOCAL}:{ports[1]} connection refused" in text
    assert f"{failing.endpoint} RuntimeError at the donor" in text and "nonsense" in text
    with pytest.raises(TransferError, match="none was known"):
        fetch("x", [], SECRET, timeout=20)


CHILD = """
import sys, torch
from trainer.transport.channel import Offer
from trainer.transport.donor import Donor
generator = torch.Generator().manual_seed(0)
state = {name: torch.rand(int(sys.argv[1]), generator=generator) for name in ("parameters", "momentum")}
with Donor({"x": Offer({}, state)}.get, sys.argv[2].encode(), "127.0.0.1") as donor:
    print(donor.endpoint, flush=True)
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

    offer = Offer({}, state(1_000_000))
    with Donor(find, SECRET, LOCAL) as other:
        proxy = Proxy(endpoint, after=1_000_000, then=strike)
        _, received = fetch(
            "x", [proxy.endpoint, other.endpoint], SECRET, timeout=30, timeouts=replace(PATIENT, stall=3.0)
        )
        assert gone and time.monotonic() - gone[0] < 15
    assert same(received, offer.buffers)


def test_a_donor_process_ends_well_in_the_middle_of_a_transfer(process: tuple[subprocess.Popen[str], str]) -> None:
    """Its exit status is 0: none of its threads is caught by the end of the interpreter."""
    child, endpoint = process

    def end(data: bytes) -> bytes:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)  # this piece is held back meanwhile: the transfer cannot end before the process does
        return data

    with pytest.raises(TransferError, match="connection"):
        fetch("x", [Proxy(endpoint, after=1_000_000, then=end).endpoint], SECRET, timeout=30)
    assert child.wait(20) == 0


# Offers that come and go


def test_a_donor_that_does_not_have_it_yet_is_asked_again() -> None:
    offer, asked = Offer({}, state()), [0, 0]

    def later(index: int, when: int) -> Callable[[str], Offer | None]:
        def find(what: str) -> Offer | None:
            assert what == "state/12"
            asked[index] += 1
            return offer if asked[index] > when else None

        return find

    with Donor(later(0, 3), SECRET, LOCAL) as one, Donor(later(1, 1000), SECRET, LOCAL) as two:
        _, received = fetch("state/12", [two.endpoint, one.endpoint], SECRET, timeout=20)
        assert same(received, offer.buffers) and asked[0] == 4
        with pytest.raises(TransferError, match=f"no data for 2 s: {two.endpoint} does not have it"):
            fetch("state/12", [two.endpoint], SECRET, timeout=2)


def test_the_offer_stays_the_same_while_newer_ones_appear() -> None:
    """`find` gives another state every time, and then none; what arrives is one of them, whole."""
    generations: list[Offer] = []

    def find(what: str) -> Offer | None:
        if len(generations) == 3:
            return None
        generations.append(Offer({"generation": len(generations)}, state(1_000_000, seed=len(generations))))
        return generations[-1]

    with Donor(find, SECRET, LOCAL) as donor:
        broken: list[bool] = []

        def break_once(data: bytes) -> bytes:
            if not broken:
                broken.append(True)
                raise ConnectionResetError  # the fetcher comes back, and must get what it had
            return data

        proxy = Proxy(donor.endpoint, after=1_000_000, then=break_once)
        meta, received = fetch("x", [proxy.endpoint], SECRET, timeout=20)
        assert broken and meta == {"generation": 0} and same(received, generations[0].buffers)
        assert fetch("x", [donor.endpoint], SECRET, timeout=20)[0] == {"generation": 1}


def test_donors_with_different_states_are_not_mixed(caplog: pytest.LogCaptureFixture) -> None:
    offers = [Offer({"hash": seed}, state(seed=seed)) for seed in (0, 1)]
    with Donor({"x": offers[0]}.get, SECRET, LOCAL) as one, Donor({"x": offers[1]}.get, SECRET, LOCAL) as two:
        meta, received = fetch("x", [one.endpoint, two.endpoint], SECRET, timeout=20)
    assert same(received, offers[meta["hash"]].buffers)


def test_an_offer_that_is_no_longer_used_is_released() -> None:
    shelf = {"x": Offer({}, state(10))}
    known = weakref.ref(shelf["x"])
    with Donor(shelf.get, SECRET, LOCAL, timeouts=replace(PATIENT, hold=3.0)) as donor:
        fetch("x", [donor.endpoint], SECRET, timeout=20)
        shelf.clear()
        assert known() is not None
        wait_for(lambda: known() is None)


def test_an_offer_that_was_released_is_looked_up_again() -> None:
    offer = Offer({}, state(1_000_000))
    with Donor({"x": offer}.get, SECRET, LOCAL) as donor:
        forgot: list[bool] = []

        def forget(data: bytes) -> bytes:
            if not forgot:
                donor._held.clear()
                forgot.append(True)
            return data

        proxy = Proxy(donor.endpoint, after=1_000_000, then=forget)
        assert same(fetch("x", [proxy.endpoint], SECRET, timeout=20)[1], offer.buffers)


def test_a_buffer_may_change_while_it_is_read() -> None:
    """Each chunk is checked against the bytes that were sent, whatever its memory holds by then."""
    live = torch.zeros(2_000_000, dtype=torch.int32)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            live.add_(1)

    with Donor({"moments": Offer({}, {"m": live})}.get, SECRET, LOCAL) as donor:
        writer = threading.Thread(target=write)
        writer.start()
        try:
            _, received = fetch("moments", [donor.endpoint], SECRET, timeout=20)
        finally:
            done.set()
            writer.join()
    assert int(received["m"].min()) >= 0 and int(received["m"].max()) <= int(live.max())


# Leaving


def test_stopping_ends_it_at_once_and_nothing_is_written_afterwards() -> None:
    stop, target = threading.Event(), {name: torch.zeros(1_000_000) for name in ("parameters", "momentum")}

    def freeze(data: bytes) -> bytes:
        stop.set()
        threading.Event().wait(30)
        return data

    with Donor({"x": Offer({}, state(1_000_000))}.get, SECRET, LOCAL) as donor:
        proxy = Proxy(donor.endpoint, after=1_000_000, then=freeze)
        with pytest.raises(Interrupted):
            fetch("x", [proxy.endpoint], SECRET, into=lambda meta, layout: target, stopping=stop.is_set, timeout=30)
        before = {name: tensor.clone() for name, tensor in target.items()}
        wait_for(lambda: not any(thread.name == "fetch" for thread in threading.enumerate()))
        assert same(before, target)


def test_stopping_before_any_donor_has_it() -> None:
    asked = threading.Event()

    def find(what: str) -> Offer | None:
        asked.set()
        return None

    with Donor(find, SECRET, LOCAL) as donor, pytest.raises(Interrupted):
        fetch("x", [donor.endpoint], SECRET, stopping=asked.is_set, timeout=30)


def test_a_closed_donor_is_gone_at_once() -> None:
    donor = Donor({"x": Offer({}, state(10))}.get, SECRET, LOCAL)
    fetch("x", [donor.endpoint], SECRET, timeout=20)
    donor.close()
    donor.close()
    with pytest.raises(TransferError, match="connection refused"):
        fetch("x", [donor.endpoint], SECRET, timeout=20)
    assert not any(thread.name == "donor" and thread is donor._accepting for thread in threading.enumerate())
