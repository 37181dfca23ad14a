"""Addresses of either family."""

import socket

import pytest

from trainer.errors import ConfigError
from trainer.etcd.client import local_address
from trainer.process import address_of, connect, endpoint_of, listen, loopback

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
    with pytest.raises(ConfigError, match="advertise_address = 'no such host': is no address"):
        listen("no such host")


def test_an_endpoint_has_brackets_around_ipv6_only() -> None:
    assert endpoint_of("::1", 7) == "[::1]:7"
    assert endpoint_of("host", 7) == "host:7"
    assert loopback() in ("127.0.0.1", "::1")
