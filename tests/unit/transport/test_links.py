"""Links between members: who dials whom, and what breaks them."""

import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.members import (
    FIRST,
    PATIENCE,
    SECRET,
    SOON,
    connect,
    connected,
    link,
    member,
    names,
    nowhere,
    reduce,
    silent,
    swap,
    wait_for,
    without_endpoint,
)
from tests.network.proxy import Proxy
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import credentials
from trainer.transport.link import ROUNDS, LinkError
from trainer.transport.transport import Transport

# Who dials


def test_both_dial_and_each_sends_on_its_own_connections() -> None:
    with connected(2) as (one, other):
        assert one.without_link([other.id]) == other.without_link([one.id]) == set()
        assert not one.relayed()
        swap(one, other)
        reduce([one, other], (1, 1, 2))
        assert link(one, other).streams(True) == link(other, one).streams(False) == 1
        wait_for(lambda: one._dialled == {other.id} and other._dialled == {one.id})


def test_any_of_a_pair_begins() -> None:
    """The other one's link is made with it."""
    with member(0) as one, member(1) as other:
        assert not one.connect({other.id: other.endpoints}, PATIENCE)
        wait_for(lambda: not other.without_link([one.id]))
        swap(one, other)


@pytest.mark.parametrize("begins", ["can be dialled", "cannot", "both"])
@pytest.mark.parametrize("how", ["none", "refused", "silent"])
def test_where_one_cannot_be_dialled_it_dials_for_both_directions(how: str, begins: str) -> None:
    hasty = TransportTimeouts(dial_back=0.2, handshake=1.0)
    with ExitStack() as stack:
        endpoint = stack.enter_context({"refused": nowhere, "silent": silent}[how]()) if how != "none" else ""
        hidden = stack.enter_context(without_endpoint(0, endpoint, timeouts=hasty))
        open_ = stack.enter_context(member(1, **{**SOON, "timeouts": hasty}))
        both = {each.id: each.endpoints for each in (hidden, open_)}
        if begins == "can be dialled":  # it cannot begin; when the other does, the link is both's
            assert open_.connect(both, 5.0).keys() == {hidden.id}
        if begins == "both":
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda each: each.connect(both, PATIENCE), (hidden, open_)))
        assert not hidden.connect(both, PATIENCE)
        wait_for(lambda: not open_.without_link([hidden.id]))
        swap(hidden, open_)
        assert (hidden.id in open_._dialled, open_.id in hidden._dialled) == (False, True)
        # And for good
        reduce([hidden, open_], (1, 1, 2))
        assert not hidden.without_link([open_.id]) and not open_.without_link([hidden.id])


def test_one_that_cannot_be_dialled_any_more_can_still_dial() -> None:
    with member(0, **SOON) as one, member(1, **SOON) as other, nowhere() as closed:
        connect([one, other])
        wait_for(lambda: one.id in other._dialled)
        one.endpoints = (closed,)
        link(one, other).fail("for a test")
        wait_for(lambda: bool(other.without_link([one.id])))
        wait_for(lambda: not one.connect({other.id: other.endpoints}, PATIENCE))
        wait_for(lambda: not other.without_link([one.id]))
        swap(one, other)


def test_a_link_that_is_just_failing_is_not_waited_for() -> None:
    with member(0, **SOON) as one, member(1, **SOON) as other:
        connect([one, other])
        failed = link(one, other)
        failed.reason = "failed just now"  # as in `fail`, before the transport has forgotten the link
        assert one.prepare({other.id: other.endpoints})[other.id] is not failed
        wait_for(lambda: not one.connect({other.id: other.endpoints}, PATIENCE))
        swap(one, other)


@pytest.mark.parametrize("loopback", [False, True], ids=["plain", "tls"])
def test_a_pair_of_which_neither_can_dial_the_other_meets_at_a_third(loopback: bool) -> None:
    of = replace(credentials(SECRET), loopback=loopback)
    with nowhere() as closed, ExitStack() as stack:
        hidden = [stack.enter_context(without_endpoint(rank, closed, of)) for rank in (0, 1)]
        third = stack.enter_context(member(2, of=of, **SOON))
        transports = [*hidden, third]
        connect(transports)
        assert hidden[0].relayed() == {hidden[1].id: (third.id,)}
        assert hidden[1].relayed() == {hidden[0].id: (third.id,)} and not third.relayed()
        swap(hidden[0], hidden[1])
        reduce(transports, (1, 1, 2))
        reduce(hidden, (1, 1, 3))

        # Its bytes count once, at the ends
        before = [each.bytes() for each in transports]
        swap(hidden[0], hidden[1], (1, 1, 4))
        after = [each.bytes() for each in transports]
        moved = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True) if a and b]
        assert min(*moved[0], *moved[1]) >= 800_000 and moved[2] == (0, 0)

        # The third one leaves: so does the link
        third.close()
        wait_for(lambda: bool(hidden[0].without_link([hidden[1].id]) and hidden[1].without_link([hidden[0].id])))
        missing = hidden[0].connect({hidden[1].id: hidden[1].endpoints}, PATIENCE)
        assert closed in missing[hidden[1].id] and "Connection refused" in missing[hidden[1].id]
        assert hidden[0].relayed() == {}


def test_they_meet_at_a_member_that_is_there_among_many_that_have_left() -> None:
    with nowhere() as closed, ExitStack() as stack:
        hidden = [stack.enter_context(without_endpoint(rank, closed)) for rank in (10, 11)]
        third = stack.enter_context(member(12, **SOON))
        for each in hidden:
            assert len(each.connect(dict.fromkeys(names(8), (closed,)), PATIENCE)) == 8
            assert not each.connect({third.id: third.endpoints}, PATIENCE)
        connect(hidden)
        assert third.id in hidden[0].relayed()[hidden[1].id]
        swap(hidden[0], hidden[1])


def test_one_that_dials_while_the_other_looks_for_a_third_is_not_turned_away() -> None:
    with nowhere() as closed, ExitStack() as stack:
        short = TransportTimeouts(dial_back=0.2, relay=1.0)
        patient = TransportTimeouts(dial_back=2.0)  # it takes its time until it dials for both directions
        here, third = (stack.enter_context(member(rank, **{**SOON, "timeouts": short})) for rank in (0, 1))
        hidden = stack.enter_context(without_endpoint(2, closed, timeouts=patient))
        connect([here, third])
        first = link(here, hidden)
        wait_for(lambda: any(third._relay._waiting.values()))  # where the other one does not come
        assert not hidden.connect({here.id: here.endpoints}, PATIENCE)
        swap(here, hidden)
        assert link(here, hidden) is first


def test_pairs_that_meet_at_several_survive_one_of_these_at_the_next_attempt() -> None:
    with ExitStack() as stack:
        patient: dict[str, Any] = {**SOON, "silence": 2.0}  # what is lost with the third is missed after a silence
        hidden = [stack.enter_context(without_endpoint(rank, **patient)) for rank in (0, 1)]
        others = [stack.enter_context(member(rank, **patient)) for rank in (2, 3)]
        connect([*hidden, *others])
        wait_for(lambda: hidden[0].relayed() == {hidden[1].id: tuple(each.id for each in others)})
        reduce([*hidden, *others])
        others[0].close()
        rest = [*hidden, others[1]]

        def again() -> bool:
            endpoints = {each.id: each.endpoints for each in rest}
            with ThreadPoolExecutor(3) as pool:
                missing = list(pool.map(lambda each: each.connect(endpoints, PATIENCE), rest))
            return not any(missing) and not any(each.without_link(endpoints) for each in rest)

        def attempt() -> bool:
            wait_for(again)
            with suppress(LinkError):
                return bool(reduce(rest, (1, 1, next(attempts))))
            return False

        attempts = itertools.count(2)
        wait_for(attempt)


# What breaks


def test_a_broken_connection_costs_its_own_link_only_and_is_made_anew() -> None:
    with ExitStack() as stack:
        transports = [stack.enter_context(member(rank)) for rank in range(3)]
        proxy = stack.enter_context(Proxy(transports[2].endpoints[0]))
        behind = {each.id: each.endpoints for each in transports} | {transports[2].id: (proxy.endpoint,)}
        assert not transports[0].connect(behind, PATIENCE)
        connect(transports)
        others = [link(transports[0], transports[1]), link(transports[1], transports[2])]
        broken = link(transports[0], transports[2])
        waiting = link(transports[2], transports[0]).receive(FIRST, 1, torch.empty(1))
        proxy.cut()
        with pytest.raises(LinkError, match=r"worker 0 (is gone|has closed the connection)"):
            waiting.wait(PATIENCE)
        wait_for(lambda: bool(broken.reason))
        assert all(each.up for each in others)
        wait_for(lambda: bool(transports[2].without_link([transports[0].id])))
        connect(transports)
        assert [link(transports[0], transports[1]), link(transports[1], transports[2])] == others
        assert link(transports[0], transports[2]) is not broken
        reduce(transports, (1, 1, 2))


def test_a_link_that_has_carried_much_is_made_anew_before_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(2, streams=2) as (one, other):
        swap(one, other)
        first = link(one, other)
        monkeypatch.setattr("trainer.transport.link.WORN_BYTES", 100_000)
        assert first.worn
        assert link(one, other) is not first and first.reason
        monkeypatch.undo()
        connect([one, other])
        reduce([one, other], (1, 2, 1))


def test_a_link_of_which_something_in_between_closes_one_stream_fails_at_once() -> None:
    """Its frames may be lost, so nothing is gained by waiting for them; the others are still open."""
    with connected(2, streams=3) as (one, other):
        here, there = link(one, other), link(other, one)
        wait_for(lambda: there.streams(False) == here.streams(True) == 3)
        pending = there.receive(FIRST, 1, torch.zeros(10))
        here._out[1].abort()
        with pytest.raises(LinkError, match="has closed the connection"):
            pending.wait(PATIENCE)


def test_links_that_both_ends_break_and_make_at_the_same_time_come_back() -> None:
    with connected(3) as transports:
        endpoints = {each.id: each.endpoints for each in transports}

        def disturb(transport: Transport) -> None:
            for number in range(15):
                for other in endpoints.keys() - {transport.id}:
                    transport.prepare({other: endpoints[other]})[other].fail(f"for a test, {number}")
                transport.connect(endpoints, 1.0)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(disturb, transports))

        def connected_again() -> bool:
            missing = [each.connect(endpoints, PATIENCE) for each in transports]
            return not any(missing) and not any(each.without_link(endpoints) for each in transports)

        attempts = itertools.count(2)

        def exchange() -> bool:
            if connected_again():
                with suppress(LinkError):  # the other end may just be closing what this one takes for a link
                    return bool(reduce(transports, (1, 1, next(attempts))))
            return False

        wait_for(exchange)
        wait_for(lambda: sum("dial" in thread.name for thread in threading.enumerate()) == 0)


CHILD = """
import json, sys, torch
from tests.members import member, names
with member(1, silence=60.0) as transport:
    print(json.dumps(transport.endpoints), flush=True)
    id, *endpoints = json.loads(sys.stdin.readline())
    assert not transport.connect({id: endpoints}, 60)
    print("connected", flush=True)
    sys.stdin.read()
"""


@contextmanager
def process(transport: Transport) -> Iterator[subprocess.Popen[str]]:
    """Another member that is a process of its own, and connected."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as child:
        try:
            assert child.stdin and child.stdout
            endpoints = json.loads(child.stdout.readline())
            child.stdin.write(json.dumps([transport.id, *transport.endpoints]) + "\n")
            child.stdin.flush()
            assert not transport.connect({names(2)[1]: endpoints}, PATIENCE)
            assert child.stdout.readline() == "connected\n"
            transport.others = {names(2)[1]: tuple(endpoints)}  # type: ignore[attr-defined]
            yield child
        finally:
            child.kill()


def test_a_dead_peer_is_noticed_at_once_and_a_frozen_one_after_a_silence() -> None:
    other = names(2)[1]
    with member(0) as here, process(here) as child:
        end = here._links[other, ROUNDS]
        waiting = end.receive(FIRST, 1, torch.empty(1000))
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(LinkError, match="worker 1 was silent for 1 s"):
            waiting.wait(1.0)
        assert here.without_link([other]) == {other}
        assert not here.is_dead(other, here.others[other])  # type: ignore[attr-defined]
        child.send_signal(signal.SIGCONT)
        assert not here.connect(here.others, PATIENCE)  # type: ignore[attr-defined]
        waiting = here._links[other, ROUNDS].receive(FIRST, 2, torch.empty(1000))
        child.kill()
        with pytest.raises(LinkError, match=r"worker 1 (is gone|has closed the connection|can no longer be reached)"):
            waiting.wait(PATIENCE)
        child.wait()
        wait_for(lambda: here.is_dead(other, here.others[other]))  # type: ignore[attr-defined]
        assert "Connection refused" in here.connect(here.others, PATIENCE)[other]  # type: ignore[attr-defined]


def test_a_peer_that_reads_nothing_any_more_is_silent_for_a_sender_too() -> None:
    with member(0) as one, member(1) as other, Proxy(other.endpoints[0]) as proxy:
        assert not one.connect({other.id: (proxy.endpoint,)}, PATIENCE)
        proxy.flows.clear()
        sending = link(one, other).send(FIRST, 1, torch.zeros(1 << 24))
        with pytest.raises(LinkError, match="worker 1 was silent for 1 s"):
            sending.wait(1.0)


def test_one_that_leaves_is_noticed_at_once() -> None:
    with connected(3) as transports:
        waiting = link(transports[0], transports[2]).receive(FIRST, 1, torch.empty(1))
        others = link(transports[0], transports[1])
        transports[2].close()
        with pytest.raises(LinkError, match="worker 2 has closed the connection"):
            waiting.wait(PATIENCE)
        assert others.up
        swap(transports[0], transports[1])


# Attempts


def test_one_that_gives_an_attempt_up_ends_the_others_waits() -> None:
    with connected(3) as transports:
        groups = [each.group(names(3), FIRST) for each in transports[1:]]
        waiting = [group.receive(0, 1, torch.empty(10)) for group in groups]
        transports[0].finish(names(3), FIRST, failed=True)
        for group, pending in zip(groups, waiting, strict=True):
            with pytest.raises(LinkError, match="worker 0 has aborted the attempt"):
                group.wait(pending)
            with pytest.raises(LinkError, match="worker 0 has aborted the attempt"):
                group.wait(group.receive(0, 2, torch.empty(10)))  # and those that come later
        for each in transports[1:]:
            each.finish(names(3), FIRST, failed=True)
        reduce(transports, (1, 1, 2))  # on the same links


def test_a_broken_link_does_not_hide_that_an_attempt_was_given_up() -> None:
    """One fails, and connects anew; the other begins this attempt only then, and must not wait for it in vain."""
    with connected(2) as (one, other):
        link(one, other).fail("for a test")
        one.finish(names(2), (1, 2, 1), failed=True)
        wait_for(lambda: bool(other.without_link([one.id])))
        connect([one, other])
        group = other.group(names(2), (1, 2, 1))
        group.send(0, 1, torch.zeros(1 << 20))
        with pytest.raises(LinkError, match="worker 0 has aborted the attempt"):
            group.wait(group.receive(0, 1, torch.empty(10)))
        other.finish(names(2), (1, 2, 1), failed=True)
        reduce([one, other], (1, 2, 2))


def test_frames_of_a_failed_attempt_are_thrown_away_and_those_of_a_coming_one_wait() -> None:
    with connected(2) as (one, other):
        here, there = link(one, other), link(other, one)
        late = torch.full((300_000,), 1.0)
        for tag in range(4):
            here.send((1, 1, 1), tag, late)  # nobody has posted memory for it
        coming = here.send((1, 1, 2), 1, torch.full((300_000,), 2.0))
        there.finish((1, 1, 1), failed=True)
        into = torch.zeros(300_000)
        there.receive((1, 1, 2), 1, into).wait(PATIENCE)
        coming.wait(PATIENCE)
        assert bool((into == 2).all())


def test_a_send_that_is_given_up_does_not_hold_back_the_next_one() -> None:
    with connected(2) as (one, other):
        here, there = link(one, other), link(other, one)
        stuck = [here.send((1, 1, 1), tag, torch.zeros(1 << 22)) for tag in range(4)]
        here.finish((1, 1, 1), failed=True)
        there.finish((1, 1, 1), failed=True)
        into = torch.zeros(10)
        here.send((1, 1, 2), 1, torch.ones(10))
        there.receive((1, 1, 2), 1, into).wait(PATIENCE)
        assert bool((into == 1).all())
        with pytest.raises(LinkError, match="is no longer awaited"):
            stuck[-1].wait(PATIENCE)


def test_a_group_needs_all_its_links() -> None:
    with connected(2) as (one, other):
        one.prepare({names(3)[2]: ()})
        with pytest.raises(LinkError, match="member 002-member cannot be reached"):
            one.group(names(3), FIRST)
        other.close()
        wait_for(lambda: bool(one.without_link([other.id])))
        with pytest.raises(LinkError, match="member 001-member cannot be reached"):
            one.group(names(2), FIRST)


def test_closing_ends_all_threads() -> None:
    before = set(threading.enumerate())
    with connected(3) as transports:
        reduce(transports)
        waiting = link(transports[0], transports[1]).receive((1, 1, 2), 1, torch.empty(1))
    with pytest.raises(LinkError):
        waiting.wait(PATIENCE)
    wait_for(lambda: set(threading.enumerate()) <= before)
