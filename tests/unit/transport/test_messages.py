"""Messages on a link: of any size, in any order, over any number of streams; on both sides of TLS."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.members import FIRST, LOCAL, PATIENCE, SECRET, connect, connected, link, member, names, reduce, wait_for
from tests.network.proxy import Proxy
from trainer.transport.credentials import credentials
from trainer.transport.link import BULK, FRAME_BYTES, Link, LinkError
from trainer.transport.stream import DATA, HEADER, Header, Key
from trainer.transport.transport import Transport

PLAIN = credentials(SECRET)
TLS = replace(PLAIN, loopback=True)
SIZES = [0, 1, 2, 33, 4096, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES + 7]
WAYS = [(PLAIN, 1), (PLAIN, 4), (TLS, 1), (TLS, 3)]


@pytest.fixture(scope="module", params=WAYS, ids=["plain", "plain, 4 streams", "tls", "tls, 3 streams"])
def ends(request: pytest.FixtureRequest) -> Iterator[list[Link]]:
    """Both ends of a link."""
    of, streams = request.param
    with connected(2, of=of, streams=streams) as (one, other):
        found = [link(one, other), link(other, one)]
        for end in found:
            wait_for(lambda end=end: end.streams(True) == end.streams(False) == streams)  # type: ignore[misc]
        yield found


def message(seed: int, size: int) -> Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed)).byte()


attempts = iter(range(1, 1 << 30))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_messages_in_any_order_arrive_intact(ends: list[Link], data: st.DataObject) -> None:
    """They are sent and expected in any order, in both directions, some before the other end expects them."""
    key: Key = (1, next(attempts), 1)
    for way, (source, target) in enumerate((ends, ends[::-1])):
        sizes = data.draw(st.lists(st.sampled_from(SIZES), max_size=8))
        tags = list(range(len(sizes)))
        order = data.draw(st.permutations(tags))
        early = data.draw(st.integers(0, len(tags)))
        sent = {tag: message(way * 100 + tag, size) for tag, size in enumerate(sizes)}
        into = {tag: torch.zeros(size, dtype=torch.uint8) for tag, size in enumerate(sizes)}
        pending = [target.receive(key, tag, into[tag]) for tag in order[:early]]
        pending += [source.send(key, tag, sent[tag]) for tag in data.draw(st.permutations(tags))]
        pending += [target.receive(key, tag, into[tag]) for tag in order[early:]]
        for each in pending:
            each.wait(PATIENCE)
        assert all(torch.equal(into[tag], sent[tag]) for tag in tags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int64])
def test_tensors_of_any_dtype_and_shape(ends: list[Link], dtype: torch.dtype) -> None:
    source, target = ends
    values, key = torch.arange(999).to(dtype).view(3, 333), (2, next(attempts), 1)
    into = torch.zeros(3, 333, dtype=dtype)
    pending = target.receive(key, 5, into)
    source.send(key, 5, values).wait(PATIENCE)
    pending.wait(PATIENCE)
    assert torch.equal(into, values)


def test_the_memory_of_a_message_that_has_left_may_change(ends: list[Link]) -> None:
    source, target = ends
    key = (3, next(attempts), 1)
    values = torch.ones(1 << 20)
    into = torch.zeros(1 << 20)
    received, left = target.receive(key, 1, into), source.send(key, 1, values)
    left.wait(PATIENCE)
    values.zero_()
    received.wait(PATIENCE)
    assert bool((into == 1).all())


def test_both_directions_at_the_same_time_do_not_wait_for_each_other(ends: list[Link]) -> None:
    """More than the kernel's buffers hold: a thread that had to send before it may receive would never end."""
    key, size = (4, next(attempts), 1), 8 << 20
    into = [torch.zeros(size) for _ in ends]
    pending = [end.send(key, 1, torch.full((size,), float(number + 1))) for number, end in enumerate(ends)]
    pending += [end.receive(key, 1, memory) for end, memory in zip(ends, into, strict=True)]
    for each in pending:
        each.wait(PATIENCE)
    assert bool((into[0] == 2).all()) and bool((into[1] == 1).all())


# Several streams


def test_frames_overtake_each_other_where_a_stream_is_slow() -> None:
    """One of the streams stands still; the others carry everything but the frame in it, and then the rest arrives."""
    with member(0, streams=3) as one, member(1, streams=3) as other, Proxy(other.endpoints[0]) as proxy:
        assert not one.connect({other.id: (proxy.endpoint,)}, PATIENCE)
        here, there = link(one, other), link(other, one)
        wait_for(lambda: here.streams(True) == there.streams(False) == 3)
        slow, frames = here._out[1], 64
        stuck, go_on = threading.Event(), threading.Event()
        send = slow.send

        def slowly(header: bytes, body: Any = b"") -> None:
            stuck.set()
            assert go_on.wait(PATIENCE)
            send(header, body)

        slow.send = slowly  # type: ignore[method-assign]
        values = message(1, frames * FRAME_BYTES)
        into = torch.zeros_like(values)
        received = there.receive(FIRST, 1, into)
        left = here.send(FIRST, 1, values)
        assert stuck.wait(PATIENCE)
        wait_for(lambda: received.missing == FRAME_BYTES)  # all but one frame
        assert not received.done and not left.done
        later = message(2, 100)
        small = torch.zeros_like(later)
        here.send(FIRST, 2, later)
        there.receive(FIRST, 2, small).wait(PATIENCE)  # a later message overtakes it, too
        assert torch.equal(small, later)
        go_on.set()
        received.wait(PATIENCE)
        left.wait(PATIENCE)
        assert torch.equal(into, values)


class Measured:
    """A stream whose round trip and congestion control are known."""

    def __init__(self, trip: float, bbr: bool) -> None:
        self._trip, self._bbr = trip, bbr

    def round_trip(self) -> float:
        return self._trip

    def has_bbr(self) -> bool:
        return self._bbr


@pytest.mark.parametrize(
    ("trip", "bbr", "expected"), [(0.0, True, 1), (0.0002, False, 1), (0.1, True, 4), (3.0, True, 4)]
)
def test_the_number_of_streams_follows_from_the_round_trip(trip: float, bbr: bool, expected: int) -> None:
    first: Any = Measured(trip, bbr)
    with member(0) as here, member(1, streams=5) as fixed:
        assert here._streams_for(first) == expected
        assert here._streams_for(Measured(3.0, False)) > 4  # type: ignore[arg-type]
        assert fixed._streams_for(first) == 5


def test_members_with_different_numbers_of_streams() -> None:
    with member(0, streams=1) as one, member(1, streams=4) as other:
        connect([one, other])
        here, there = link(one, other), link(other, one)
        wait_for(lambda: (here.streams(True), here.streams(False)) == (1, 4))
        wait_for(lambda: (there.streams(True), there.streams(False)) == (4, 1))
        reduce([one, other])


def test_a_collective_over_many_streams_and_tls() -> None:
    with connected(3, of=TLS, streams=4) as transports:
        reduce(transports, size=2_000_000)


# What is not a message


@pytest.fixture
def pair() -> Iterator[list[Transport]]:
    with connected(2) as transports:
        yield transports


def frame(end: Link, header: bytes) -> None:
    """Send a frame that `Link` would not."""
    end._out[0].send(header)


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(DATA, *FIRST, 1, 0, 101),  # longer than the memory
        HEADER.pack(DATA, *FIRST, 1, 1, 100),
        HEADER.pack(DATA, *FIRST, 1, 1 << 63, 1),
        HEADER.pack(2, *FIRST, 1, 0, 2) + b"{}",  # a request to one that answers none
        HEADER.pack(3, *FIRST, 1, 0, 2) + b"[]",
        HEADER.pack(3, *FIRST, 1, 0, 9) + b"[" * 9,
        HEADER.pack(3, *FIRST, 1, 0, (1 << 20) + 1),
        HEADER.pack(3, *FIRST, 1, 0, 5000) + b"[" * 5000,
        HEADER.pack(9, *FIRST, 1, 0, 2) + b"{}",
        b"\xff" * HEADER.size,
    ],
)
def test_frames_that_make_no_sense_end_the_link_and_touch_no_memory(pair: list[Transport], header: bytes) -> None:
    here, there = link(*pair), link(*reversed(pair))
    beside = torch.zeros(300, dtype=torch.uint8)
    pending = there.receive(FIRST, 1, beside[100:200])
    frame(here, header)
    with pytest.raises(LinkError, match="worker 0 sent invalid data"):
        pending.wait(PATIENCE)
    assert not beside.any()
    wait_for(lambda: bool(here.reason))
    connect(pair)
    reduce(pair, (1, 1, 2))


def test_a_header_survives() -> None:
    header = Header(DATA, (7, 8, (1 << 32) - 1), 1 << 31, 1 << 40, 99)
    assert Header.unpack(header.pack()) == header


# Requests and their answers


def test_requests_and_answers_of_many_threads_do_not_mix() -> None:
    def answer(link: Link, key: Key, tag: int, request: dict[str, Any]) -> None:
        if request["size"]:
            link.send(key, tag, message(request["seed"], request["size"]))
        else:
            link.reply(key, tag, {"seed": request["seed"]})

    with (
        Transport("asking", [LOCAL], TLS) as asking,
        Transport("answering", [LOCAL], TLS, handle=answer, streams=2) as answering,
    ):
        assert not asking.connect({answering.id: answering.endpoints}, PATIENCE, BULK)
        end = asking.prepare({answering.id: answering.endpoints}, BULK)[answering.id]

        def ask(seed: int) -> None:
            size = [0, 1, 70_000, FRAME_BYTES + 5][seed % 4]
            into = torch.zeros(max(1, size), dtype=torch.uint8)
            pending = end.ask((0, 0, seed), seed, {"seed": seed, "size": size}, into)
            pending.wait(PATIENCE)
            if size:
                assert pending.reply is None and torch.equal(into, message(seed, size))
            else:
                assert pending.reply == {"seed": seed} and not into.any()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(1, 80)))


def test_an_answer_that_nobody_waits_for_any_more_is_thrown_away() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def answer(link: Link, key: Key, tag: int, request: dict[str, Any]) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)
        link.send(key, tag, torch.ones(1 << 20))

    with Transport("asking", [LOCAL], PLAIN) as asking, Transport("slow", [LOCAL], PLAIN, handle=answer) as slow:
        assert not asking.connect({slow.id: slow.endpoints}, PATIENCE, BULK)
        end = asking.prepare({slow.id: slow.endpoints}, BULK)[slow.id]
        given_up, into = torch.zeros(1 << 20), torch.zeros(1 << 20)
        waiting = end.ask((0, 0, 1), 1, {}, given_up)
        assert begun.wait(PATIENCE)
        end.forget((0, 0, 1))
        with pytest.raises(LinkError, match="is no longer awaited"):
            waiting.wait(PATIENCE)
        later = end.ask((0, 0, 2), 1, {}, into)
        go_on.set()
        later.wait(PATIENCE)
        assert bool((into == 1).all()) and not given_up.any()


def test_the_lanes_do_not_disturb_each_other() -> None:
    """A bulk transfer that nobody reads, and whose link breaks, and a collective."""
    with member(0) as one, member(1) as other:
        connect([one, other])
        for here, there in ((one, other), (other, one)):
            assert not here.connect({there.id: there.endpoints}, PATIENCE, BULK)
        before = one.bytes()
        bulk = one.prepare({other.id: other.endpoints}, BULK)[other.id]
        assert bulk is not link(one, other)
        bulk.send((0, 0, 1), 1, torch.zeros(4 << 20))
        wait_for(lambda: (one.bytes(BULK) or (0, 0))[0] > 1 << 20)
        assert one.bytes() == before
        bulk.fail("for a test")
        reduce([one, other])
        assert names(2) == [one.id, other.id]
