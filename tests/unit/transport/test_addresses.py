"""Where a member can be dialled: IPv4, IPv6, names, several addresses of which not all answer."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.members import (
    LOCAL,
    PATIENCE,
    SECRET,
    SOON,
    connect,
    connected,
    link,
    member,
    nowhere,
    reduce,
    silent,
    swap,
    wait_for,
)
from tests.network.proxy import Proxy
from trainer.errors import ConfigError
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import credentials
from trainer.transport.transport import Transport


def ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_ipv6() -> None:
    if not ipv6():
        pytest.skip("there is no IPv6 here")
    tls = replace(credentials(SECRET), loopback=True)
    for of in (None, tls):
        with connected(2, "::1", of=of) as transports:
            assert all(one.endpoints[0].startswith("[::1]:") for one in transports)
            reduce(transports)


def test_a_name() -> None:
    with connected(2, "localhost") as transports:
        assert all(one.endpoints[0].startswith("localhost:") for one in transports)
        reduce(transports)


def test_with_several_addresses_it_listens_on_all_interfaces_and_each_works() -> None:
    with Transport("several", [LOCAL, "localhost", "192.0.2.1"], credentials(SECRET)) as several:
        assert [one.rpartition(":")[0] for one in several.endpoints] == [LOCAL, "localhost", "192.0.2.1"]
        hosts = [LOCAL, "::1"] if socket.has_dualstack_ipv6() and ipv6() else [LOCAL]
        for number, host in enumerate(hosts):
            with member(number) as one:
                endpoint = f"[{host}]:{several.port}" if ":" in host else f"{host}:{several.port}"
                assert not one.connect({several.id: [endpoint]}, PATIENCE)


@pytest.mark.parametrize("first", [nowhere, silent])
def test_the_first_address_does_not_answer(first: type) -> None:
    """The others are not kept waiting: a silent one would cost a handshake's time."""
    timeouts = TransportTimeouts(handshake=PATIENCE)
    with first() as dead, member(0, timeouts=timeouts) as one, member(1, timeouts=timeouts) as other:
        other.endpoints = (dead, *other.endpoints)
        connect([one, other])
        swap(one, other)


def test_the_address_belongs_to_another_member_of_the_run() -> None:
    """A private address means another machine elsewhere; that one refuses, and the next address is used."""
    with ExitStack() as stack:
        one, other, third = (stack.enter_context(member(rank)) for rank in range(3))
        other.endpoints = (*third.endpoints, *other.endpoints)
        connect([one, other])
        swap(one, other)


@pytest.mark.parametrize("hidden", [False, True], ids=["both dial", "one dials for both directions"])
def test_all_addresses_work_and_one_is_used(hidden: bool) -> None:
    """The connections to the others end at once, and the link goes on."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(member(rank, **SOON)) for rank in range(2))
        proxies = [stack.enter_context(Proxy(other.endpoints[0])) for _ in range(3)]
        other.endpoints = (*other.endpoints, *(proxy.endpoint for proxy in proxies))
        if hidden:
            one.endpoints = ()
        assert not one.connect({other.id: other.endpoints}, PATIENCE)
        wait_for(lambda: not other.without_link([one.id]))
        wait_for(lambda: not any(thread.name.startswith("dial") for thread in threading.enumerate()))
        for number in range(2, 6):
            reduce([one, other], (1, 1, number))
        assert link(one, other).streams(True) == link(other, one).streams(False) == 1
        assert link(one, other).streams(False) == link(other, one).streams(True) == 1


def test_no_address_works_and_the_reason_names_them() -> None:
    with nowhere() as dead, nowhere() as gone, member(0, **SOON) as one:
        missing = one.connect({"it": (dead, gone)}, PATIENCE)
        assert missing["it"].startswith(f"{dead}, {gone}: Connection refused")
        assert "no address is known" in one.connect({"that": ()}, PATIENCE)["that"]
        for nonsense in ("", "nonsense", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999999", "nowhere.invalid:1"):
            assert "it" in one.connect({"it": (nonsense,)}, PATIENCE)


def test_ports() -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"port_range.*has no free port left"):
            member(0, port_range=f"{port}-{port}")
        with pytest.raises(ConfigError, match="port"):
            member(0, port=port)
        with member(0, port_range=f"{port}-{port + 20}") as one:
            assert port < one.port <= port + 20 and one.endpoints == (f"{LOCAL}:{one.port}",)


def test_many_members_at_once() -> None:
    with connected(8) as transports:
        reduce(transports)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(Transport.close, transports))
