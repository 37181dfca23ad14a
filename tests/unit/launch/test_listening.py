"""Where `launch --listen` listens, and what it keeps."""

import socket
from pathlib import Path

import pytest

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.launch.listening import Listening, advertised, to_forward


def at(address: str, run_dir: Path, **values: object) -> Listening:
    found = Listening.of(TrainingConfig.from_flat({"nodes": 1, **values}), run_dir, address)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that knows some names."""
    real = socket.getaddrinfo
    known = {"node.example": "192.0.2.7", "six.example": "2001:db8::7", "wrong.example": "127.0.1.1"}

    def look_up(host: str, *rest: object, **options: object) -> object:
        if "." in host and not host.replace(".", "").isdigit() and host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(known.get(host, host), *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("address", "hosts", "port"),
    [
        ("192.0.2.7", ("192.0.2.7",), 0),
        ("192.0.2.7:2379", ("192.0.2.7",), 2379),
        ("2001:db8::7", ("2001:db8::7",), 0),
        ("[2001:0db8:0::7]:2379", ("2001:db8::7",), 2379),  # as certificates write it
        ("[::1]", ("::1",), 0),
        ("node.example", ("node.example", "192.0.2.7"), 0),
        ("six.example:7", ("six.example", "2001:db8::7"), 7),
        ("localhost", ("localhost", "127.0.0.1"), 0),
    ],
)
def test_addresses(address: str, hosts: tuple[str, ...], port: int, tmp_path: Path) -> None:
    found = at(address, tmp_path)
    assert (found.hosts, found.port) == (hosts, port)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("0.0.0.0", "must be the address at which other machines reach this one"),
        ("[::]:2379", "must be the address at which other machines reach this one"),
        ("nowhere.invalid", "must be an address of this machine, or its name"),
        ("192.0.2.7:99999", "must have a port from 1 to 65535"),
        ("192.0.2.7:x", "must be an address of this machine, or its name"),
        ("http://192.0.2.7:1", "must be an address of this machine, or its name"),
        ("wrong.example", "is 127.0.1.1 here, which other machines cannot reach"),
        ("fe80::1", "must not be a link-local address"),
    ],
)
def test_what_no_other_machine_could_reach(address: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--listen = '.*{reason}") as caught:
        at(address, tmp_path)
    assert "Traceback" not in str(caught.value)


def test_it_does_not_go_with_ddp(tmp_path: Path) -> None:
    for values in ({}, {"etcd_endpoints": ["h:1"]}):
        with pytest.raises(ConfigError, match=r"--listen.*cannot be combined with optim_method = 'ddp'"):
            at("192.0.2.7", tmp_path, optim_method="ddp", **values)


def test_with_an_etcd_of_its_own_others_must_reach_that_one_too(tmp_path: Path) -> None:
    config = TrainingConfig.from_flat({"nodes": 1, "etcd_endpoints": ["192.0.2.9:1"]})
    assert Listening.of(config, tmp_path, "192.0.2.7") is None  # it starts no etcd
    assert not any(tmp_path.iterdir())
    here = config.with_values(etcd_endpoints=["127.0.0.1:1", "localhost:2"])
    assert Listening.of(here, tmp_path, "localhost") is None
    with pytest.raises(
        ConfigError, match=r"etcd\.endpoints = '127.0.0.1:1, localhost:2': refers to a different machine on each"
    ):
        Listening.of(here, tmp_path, "192.0.2.7")
    with pytest.raises(ConfigError, match=r"--listen = '192.0.2.7:3': must have no port: .* 192.0.2.9:1 has its own"):
        Listening.of(config, tmp_path, "192.0.2.7:3")


def test_at_an_address_of_a_router_the_own_one_is_told_too_and_the_ports_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert advertised(["localhost", "127.0.0.1"]) == "localhost,127.0.0.1"
    assert to_forward(TrainingConfig.from_flat({"advertise_address": "localhost,127.0.0.1"}), "127.0.0.1:7") == ""
    monkeypatch.setattr("trainer.launch.listening.local_address", lambda endpoint: f"here to {endpoint}")
    assert advertised(["node.example", "192.0.2.7"]) == "node.example,192.0.2.7,here to 192.0.2.7:1"
    config = TrainingConfig.from_flat({"advertise_address": "127.0.0.1,192.0.2.7", "port_range": "20-29"})
    ports = to_forward(config, "node.example:7")
    assert ports.startswith("192.0.2.7 is not an address of this machine")
    assert "must forward to this machine, unchanged, the TCP ports 7 (etcd) and 20-29 (workers)" in ports
    assert "the TCP ports any (workers; see --port-range)" in to_forward(config.with_values(port_range=""), "")


def test_a_later_launch_listens_as_the_one_before(tmp_path: Path) -> None:
    config = TrainingConfig.from_flat({"nodes": 1})
    assert Listening.of(config, tmp_path, "") is None
    first = at("192.0.2.7:77", tmp_path)
    first.save()
    assert Listening.of(config, tmp_path, "") == first
    moved = at("192.0.2.8", tmp_path)
    assert (moved.door, moved.root, moved.port) == (first.door, first.root, 77)  # so that tokens stay valid
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "secrets").iterdir()} == {0o600}


def test_what_it_has_kept_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "listen.json").write_text('{"hosts": 3')
    with pytest.raises(ConfigError, match=r"secrets/listen\.json cannot be used"):
        Listening.read(tmp_path)
