"""State transfer between real sockets: what arrives, for whom, and from offers that come and go."""

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.members import LOCAL, SECRET, wait_for
from tests.network.proxy import Proxy
from tests.unit.transport.donors import (
    CHUNK,
    DTYPES,
    ENCRYPTED,
    PATIENT,
    PLAIN,
    Find,
    Shelf,
    donors,
    fetch,
    numbered,
    same,
    state,
)
from trainer.errors import Interrupted
from trainer.transport import fetch as transfer
from trainer.transport.credentials import credentials
from trainer.transport.donor import CHUNK_BYTES, Donor, Layout, Offer
from trainer.transport.fetch import TransferError
from trainer.transport.link import BULK
from trainer.transport.transport import Transport


@pytest.fixture(scope="module")
def shelf() -> Iterator[Shelf]:
    """What a donor finds, and the donor, as `fetch` takes it."""
    offers: dict[str, Offer] = {}
    with donors(offers.get) as endpoints:
        yield offers, numbered(*endpoints)


# What arrives


@pytest.fixture(scope="module")
def fetcher() -> Iterator[Transport]:
    """One for many fetches."""
    with Transport("fetcher of many", [LOCAL], PLAIN) as transport:
        yield transport


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), st.sampled_from([0, 1, 3, 999, 65_536, 70_001]))
    ),
)
def test_any_buffers_arrive_bit_for_bit(
    shelf: Shelf, fetcher: Transport, layout: dict[str, tuple[torch.dtype, int]]
) -> None:
    offers, donor = shelf
    buffers = {
        name: torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        for name, (dtype, count) in layout.items()
    }
    offers["x"] = Offer({"round": 3, "tail": [[1, 2], None], "name": "é"}, buffers)
    meta, received = transfer.fetch(fetcher, "x", donor, timeout=20, chunk_bytes=CHUNK, timeouts=PATIENT)
    assert meta == {"round": 3, "tail": [[1, 2], None], "name": "é"}
    assert same(received, buffers)


def test_it_is_received_into_the_given_tensors(shelf: Shelf) -> None:
    offers, donor = shelf
    offers["x"] = Offer({"round": 3}, {"a": torch.rand(3, 5), "b": torch.tensor(7)})
    mine = {"a": torch.zeros(3, 5), "b": torch.zeros(1, dtype=torch.int64)}
    asked: list[Any] = []

    def into(meta: Any, layout: Layout) -> dict[str, Tensor]:
        asked.append((meta, layout, threading.current_thread()))
        return mine

    _, received = fetch("x", donor, into=into)
    assert asked == [({"round": 3}, {"a": ("torch.float32", 15), "b": ("torch.int64", 1)}, threading.current_thread())]
    assert received is mine and same(mine, offers["x"].buffers)


def test_tensors_that_do_not_fit_are_refused(shelf: Shelf) -> None:
    offers, donor = shelf
    offers["x"] = Offer({}, {"a": torch.rand(4)})
    for wrong in ({"a": torch.zeros(5)}, {"a": torch.zeros(8)[::2]}, {}):
        with pytest.raises(ValueError):
            fetch("x", donor, into=lambda meta, layout, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="contiguous"):
        Offer({}, {"a": torch.zeros(4, 4).t()})


def test_ipv6() -> None:
    with donors({"x": Offer({}, state(100))}.get, address="::1") as endpoints:
        assert endpoints[0].startswith("[::1]:")
        assert same(fetch("x", numbered(*endpoints))[1], state(100))


def test_many_fetchers_at_once() -> None:
    offer = Offer({}, state())

    def one(number: int) -> dict[str, Tensor]:
        with Transport(f"fetcher {number}", [LOCAL], PLAIN) as transport:
            return transfer.fetch(transport, "x", donor, timeout=60, chunk_bytes=CHUNK, timeouts=PATIENT)[1]

    with donors({"x": offer}.get, {"x": offer}.get) as endpoints, ThreadPoolExecutor(12) as pool:
        donor = numbered(*endpoints)
        assert all(same(received, offer.buffers) for received in pool.map(one, range(24)))


def test_several_transfers_at_once_over_one_link(fetcher: Transport) -> None:
    offers = {name: Offer({"name": name}, state(seed=seed)) for seed, name in enumerate("abc")}
    with donors(offers.get) as endpoints, ThreadPoolExecutor(3) as pool:

        def one(name: str) -> tuple[Any, dict[str, Tensor]]:
            donor = {"several": endpoints}
            return transfer.fetch(fetcher, name, donor, timeout=20, chunk_bytes=CHUNK, timeouts=PATIENT)

        with Transport("several", [LOCAL], PLAIN, handle=Donor(offers.get)) as several:
            endpoints = list(several.endpoints)
            results = list(pool.map(one, "abcabc"))
    assert all(same(received, offers[meta["name"]].buffers) for meta, received in results)


class Recorder(Donor):
    """Notes what is asked for; its first chunk waits for that of the other ones."""

    asked: list[tuple[str, int]]
    together: threading.Barrier

    def _send_chunk(self, link: Any, key: Any, tag: int, offer: str, buffer: str, start: int, stop: int) -> None:
        first, self.mine = not getattr(self, "mine", None), True
        self.asked.append((buffer, start))
        if first:
            self.together.wait(10)  # passes only if both are drawn from at a time
        super()._send_chunk(link, key, tag, offer, buffer, start, stop)


def test_every_chunk_is_asked_for_once_and_of_both_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "asked", [], raising=False)
    monkeypatch.setattr(Recorder, "together", threading.Barrier(2), raising=False)
    offer = Offer({}, state(1_000_000))
    with ExitStack() as stack:
        served = [stack.enter_context(Transport(id, [LOCAL], PLAIN, handle=Recorder({"x": offer}.get))) for id in "01"]
        _, received = fetch("x", {one.id: list(one.endpoints) for one in served})
    assert same(received, offer.buffers)
    starts = range(0, 4_000_000, CHUNK)
    assert sorted(Recorder.asked) == [(name, start) for name in sorted(offer.buffers) for start in starts]


# Who is given nothing


def test_a_fetcher_with_another_secret_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found: list[str] = []
    with donors(lambda what: found.append(what)) as endpoints:
        with pytest.raises(TransferError, match=r"0 cannot be reached: .*refused the connection") as caught:
            fetch("x", numbered(*endpoints), credentials(b"f" * 32))
        assert not found
        assert "refused a connection from 127.0.0.1, which does not have this run's secret" in caplog.text
    for secret in (SECRET.decode(), "ffff"):
        assert secret not in caplog.text + str(caught.value)


def test_an_impostor_is_not_believed_and_the_others_are_used() -> None:
    """An end that dials is given nothing by one without the secret; with TLS, it gives nothing to one either."""
    offer, fake = Offer({}, state()), Offer({}, state(seed=1))
    other = replace(credentials(b"f" * 32), loopback=True)
    with (
        donors({"x": fake}.get, of=other) as (impostor,),
        Transport("1", [LOCAL], ENCRYPTED, handle=Donor({"x": offer}.get)) as donor,
    ):
        assert same(fetch("x", numbered(impostor, *donor.endpoints), ENCRYPTED)[1], offer.buffers)


def test_a_member_at_the_address_of_another_one_is_not_taken_for_it() -> None:
    """An address that was given to another member meanwhile."""
    with donors({"x": Offer({}, state(10))}.get) as (endpoint,), pytest.raises(TransferError, match="refused"):
        fetch("x", {"another": [endpoint]})


def test_chunks_that_are_none_are_refused(shelf: Shelf, fetcher: Transport) -> None:
    offers, donor = shelf
    offers["x"] = Offer({}, {"a": torch.zeros(100), "b": torch.zeros(CHUNK_BYTES)})
    assert not fetcher.connect(donor, 20, BULK)
    link = fetcher.prepare(donor, BULK)["0"]

    def ask(tag: int, request: dict[str, Any]) -> dict[str, Any]:
        pending = link.ask((0, 0, 1 << 20), tag, request, torch.empty(1, dtype=torch.uint8))
        pending.wait(20)
        assert pending.reply is not None
        return pending.reply

    offer = ask(1, {"find": "x"})["offer"]
    asked = [("a", -4, 4), ("a", 0, 401), ("a", 8, 8), ("a", 0, 1 << 40), ("b", 0, CHUNK_BYTES + 1), ("c", 0, 1)]
    for tag, (buffer, start, stop) in enumerate(asked, 2):
        assert "at the donor" in ask(tag, {"offer": offer, "buffer": buffer, "start": start, "stop": stop})["error"]
    assert "TypeError at the donor" in ask(20, {"nonsense": 1})["error"]
    assert ask(21, {"offer": "none", "buffer": "a", "start": 0, "stop": 1}) == {"missing": True}


# Offers that come and go


def test_a_donor_that_does_not_have_it_yet_is_asked_again() -> None:
    offer, asked = Offer({}, state()), [0, 0]

    def later(index: int, when: int) -> Find:
        def find(what: str) -> Offer | None:
            assert what == "state/12"
            asked[index] += 1
            return offer if asked[index] > when else None

        return find

    with donors(later(0, 1 << 30), later(1, 3)) as (one, two):
        _, received = fetch("state/12", numbered(one, two))
        assert same(received, offer.buffers) and asked[1] == 4
        with pytest.raises(TransferError, match="no data for 2 s: 0 does not have it"):
            fetch("state/12", numbered(one), timeout=2)


def test_the_offer_stays_the_same_while_newer_ones_appear() -> None:
    """`find` gives another state every time, and then none; what arrives is one of them, whole."""
    generations: list[Offer] = []

    def find(what: str) -> Offer | None:
        if len(generations) == 3:
            return None
        generations.append(Offer({"generation": len(generations)}, state(1_000_000, seed=len(generations))))
        return generations[-1]

    broken: list[bool] = []

    def break_once(data: bytes) -> bytes:
        if not broken:
            broken.append(True)
            raise ConnectionResetError  # the fetcher comes back, and must get what it had
        return data

    with donors(find) as (endpoint,):
        with Proxy(endpoint, after=1_000_000, then=break_once) as proxy:
            meta, received = fetch("x", numbered(proxy.endpoint))
        assert broken and meta == {"generation": 0} and same(received, generations[0].buffers)
        assert fetch("x", numbered(endpoint))[0] == {"generation": 1}


def test_donors_with_different_states_are_not_mixed() -> None:
    offers = [Offer({"hash": seed}, state(seed=seed)) for seed in (0, 1)]
    with donors({"x": offers[0]}.get, {"x": offers[1]}.get) as endpoints:
        meta, received = fetch("x", numbered(*endpoints))
    assert same(received, offers[meta["hash"]].buffers)


def test_an_offer_that_is_no_longer_used_is_released() -> None:
    shelf = {"x": Offer({}, state(10))}
    known = weakref.ref(shelf["x"])
    with donors(shelf.get, timeouts=replace(PATIENT, hold=1.0)) as (endpoint,):
        fetch("x", numbered(endpoint))
        shelf.clear()
        wait_for(lambda: known() is None)  # there are no more requests

        # So is the next one
        shelf["x"] = Offer({}, state(10))
        known = weakref.ref(shelf["x"])
        fetch("x", numbered(endpoint))
        shelf.clear()
        wait_for(lambda: known() is None)


def test_an_offer_that_was_released_is_looked_up_again() -> None:
    offer = Offer({}, state(1_000_000))
    donor = Donor({"x": offer}.get)
    forgot: list[bool] = []

    def forget(data: bytes) -> bytes:
        if not forgot:
            donor._held.clear()
            forgot.append(True)
        return data

    with (
        Transport("0", [LOCAL], PLAIN, handle=donor) as one,
        Proxy(one.endpoints[0], after=1_000_000, then=forget) as proxy,
    ):
        assert same(fetch("x", numbered(proxy.endpoint))[1], offer.buffers)
    assert forgot


def test_a_buffer_may_change_while_it_is_read() -> None:
    live = torch.zeros(2_000_000, dtype=torch.int32)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            live.add_(1)

    with donors({"moments": Offer({}, {"m": live})}.get, of=ENCRYPTED) as endpoints:
        writer = threading.Thread(target=write)
        writer.start()
        try:
            _, received = fetch("moments", numbered(*endpoints), ENCRYPTED)
        finally:
            done.set()
            writer.join()
    assert int(received["m"].min()) >= 0 and int(received["m"].max()) <= int(live.max())


# Leaving


def test_stopping_ends_it_at_once() -> None:
    stop = threading.Event()

    def freeze(data: bytes) -> bytes:
        stop.set()
        proxy.flows.clear()
        return data

    with donors({"x": Offer({}, state(1_000_000))}.get) as (endpoint,):
        with Proxy(endpoint, after=1_000_000, then=freeze) as proxy, pytest.raises(Interrupted):
            fetch("x", numbered(proxy.endpoint), stopping=stop.is_set, timeout=60)
        wait_for(lambda: not any(thread.name == "fetch" for thread in threading.enumerate()))


def test_stopping_before_any_donor_has_it() -> None:
    asked = threading.Event()

    def find(what: str) -> Offer | None:
        asked.set()
        return None

    with donors(find) as endpoints, pytest.raises(Interrupted):
        fetch("x", numbered(*endpoints), stopping=asked.is_set, timeout=30)


def test_a_closed_donor_is_gone_at_once() -> None:
    donor = Transport("0", [LOCAL], PLAIN, handle=Donor({"x": Offer({}, state(10))}.get))
    fetch("x", numbered(*donor.endpoints))
    donor.close()
    donor.close()
    with pytest.raises(TransferError, match="Connection refused"):
        fetch("x", numbered(*donor.endpoints))
    wait_for(lambda: not any(thread.name.endswith("fetcher") for thread in threading.enumerate()))
