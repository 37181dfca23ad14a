"""Addresses of either family."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from trainer.errors import ConfigError
from trainer.etcd.client import local_address
from trainer.process import address_of, congestion, connect, endpoint_of, listen, loopback, prefer_bbr

FAMILIES = [
    pytest.param("127.0.0.1", socket.AF_INET, id="IPv4"),
    pytest.param(
        "::1", socket.AF_INET6, id="IPv6", marks=pytest.mark.skipif(not socket.has_ipv6, reason="this host has no IPv6")
    ),
]


@pytest.mark.parametrize(("address", "family"), FAMILIES)
def test_both_families_listen_and_connect(address: str, family: int) -> None:
    assert address_of(address) == address
    with listen(address) as listener:
        place = endpoint_of(address, listener.getsockname()[1])
        assert listener.family == family
        connect(place, 5.0).close()
        assert local_address(place) == address


def test_a_name_is_resolved_and_an_unknown_one_is_refused() -> None:
    assert address_of("localhost") in ("127.0.0.1", "::1")
    with listen("localhost"):
        pass
    with pytest.raises(ConfigError, match="advertise_address = 'no such host': is not an address"):
        listen("no such host")


def test_an_endpoint_has_brackets_around_ipv6_only() -> None:
    assert endpoint_of("::1", 7) == "[::1]:7"
    assert endpoint_of("host", 7) == "host:7"
    assert loopback() in ("127.0.0.1", "::1")


def test_bbr_controls_connections_to_other_machines_where_the_kernel_permits_it() -> None:
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
    if not available.exists() or "bbr" not in available.read_text().split():
        pytest.skip("this kernel has no bbr")
    here = [one.address for of in psutil.net_if_addrs().values() for one in of if one.family == socket.AF_INET]
    for address in {"127.0.0.1", *(one for one in here if not one.startswith("127."))}:
        with listen(address) as listener, connect(endpoint_of(address, listener.getsockname()[1]), 5.0) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, 13, b"reno")
            prefer_bbr(connection)
            permitted = os.geteuid() == 0 and not address.startswith("127.")
            assert congestion(connection) in (("bbr",) if permitted else ("reno", "bbr"))
            assert not address.startswith("127.") or congestion(connection) == "reno"
    closed = socket.socket()
    closed.close()
    prefer_bbr(closed)
    assert congestion(closed) == ""
