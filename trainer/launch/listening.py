"""The etcd of `launch --listen`: at an address that other machines reach, with TLS and users.

Its secrets are created once and kept in `<run dir>/secrets/`, which only the user may read, so that tokens and members
outlive a launch.
"""

import ipaddress
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from trainer.config import TrainingConfig
from trainer.elastic import keys
from trainer.errors import ConfigError
from trainer.etcd.certificates import DOOR_BYTES, Tls
from trainer.etcd.client import EtcdClient, local_address
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.etcd.errors import EtcdError
from trainer.etcd.users import enable_users
from trainer.files import read_json, write_json, write_text
from trainer.monitor.find_run import PASSWORD, SECRETS
from trainer.process import address_of, endpoint_of, is_loopback, is_own

_FILE = "listen.json"
_OWNER = "launch"  # the etcd user of this machine's workers, and of `status` and `scale`


@dataclass(frozen=True)
class Listening:
    """Where the etcd listens, and its secrets."""

    directory: Path
    hosts: tuple[str, ...]  # as given by the user; a name is followed by its address
    port: int  # 0: any
    door: bytes
    root: str  # password of etcd's root
    password: str  # of the user of this machine

    @property
    def tls(self) -> Tls:
        return Tls(self.directory)

    @property
    def public(self) -> tuple[str, ...]:
        """host:port for other machines."""
        return tuple(endpoint_of(host, self.port) for host in self.hosts)

    @classmethod
    def of(cls, config: TrainingConfig, run_dir: Path, address: str) -> "Listening | None":
        """Where a launch listens: at `address`, or where an earlier launch did; None if it does not listen.

        Raises:
            ConfigError: Other machines cannot reach this one there, or the run cannot be joined.
        """
        if address and config.optim_method == "ddp":
            allowed = "cannot be combined with optim_method = 'ddp', in which torch lets nodes run code on each other"
            raise ConfigError("--listen", address, allowed)
        if config.etcd.endpoints:
            if address:
                _require_reachable(config, address)
            return None
        return cls._at(run_dir, address) if address else cls.read(run_dir)

    @classmethod
    def read(cls, run_dir: Path) -> "Listening | None":
        """The files of an earlier launch; None if it did not listen."""
        directory = run_dir.absolute() / SECRETS
        try:
            kept = read_json(directory / _FILE)
            values = {"hosts": tuple(kept["hosts"]), "door": bytes.fromhex(kept["door"])}
            return cls(directory, **{**kept, **values})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError("run_dir", run_dir, f"its {SECRETS}/{_FILE} cannot be used: {error!r}") from None

    @classmethod
    def _at(cls, run_dir: Path, address: str) -> "Listening":
        """Listen at `address` (host, host:port), with the secrets of earlier launches if there are any.

        Raises:
            ConfigError: Other machines cannot reach this one at the address.
        """
        hosts, port = _parsed(address)
        directory, before = run_dir.absolute() / SECRETS, cls.read(run_dir)
        if before is not None:
            return replace(before, hosts=hosts, port=port or before.port)
        door, words = secrets.token_bytes(DOOR_BYTES), (secrets.token_urlsafe(16) for _ in range(2))
        return cls(directory, hosts, port, door, *words)

    def save(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        values = {**asdict(self), "door": self.door.hex()}
        del values["directory"]
        write_json(self.directory / _FILE, values, private=True)
        write_text(self.directory / PASSWORD, self.password, private=True)

    @contextmanager
    def etcd(self, config: TrainingConfig, run_dir: Path) -> Iterator[tuple[EmbeddedEtcd, TrainingConfig]]:
        """Run the etcd for the duration of the block. Also yields the configuration of the run's local nodes.

        Child processes get their user's password from the environment.

        Raises:
            ConfigError: The port is taken.
        """
        self.save()
        self.tls.make_server(self.hosts)
        self.tls.make_client(self.door)
        embedded = EmbeddedEtcd(run_dir / "etcd", address_of(self.hosts[0]), self.port, config.port_range, tls=self.tls)
        with embedded as etcd:
            replace(self, port=etcd.port).save()
            own = config.with_values(
                etcd_endpoints=[etcd.endpoint],
                etcd_ca=str(self.tls.server),
                etcd_cert=str(self.tls.client),
                etcd_key=str(self.tls.client_key),
                etcd_user=_OWNER,
                advertise_address=config.advertise_address or advertised(self.hosts),
            )
            enable_users(own, self.root, self.password)
            os.environ["ETCD_PASSWORD"] = self.password
            yield etcd, own


def outlast_others(client: EtcdClient, config: TrainingConfig) -> None:
    """Keep etcd running until the other machines of a finished run have ended: a slow one may still be evaluating."""
    with suppress(EtcdError):
        if keys.verdict(client).terminal and (others := client.list("slots/")):
            print(f"keeping etcd until the run's other nodes have ended: {len(others)}", flush=True)
            client.wait_for(lambda: not client.list("slots/"), config.etcd_outage_limit, "slots/")


def hosts_of(address: str) -> tuple[str, ...]:
    """The hosts in `--listen`. Raises ConfigError if other machines could not reach this one there."""
    return _parsed(address)[0]


def advertised(hosts: Sequence[str]) -> str:
    """The `advertise_address` of a machine that others reach at these hosts.

    If the hosts belong to a NAT, the machine's own address is added for its workers among themselves, because few NATs
    route back.
    """
    own = []
    if not is_own(outside := address_of(hosts[-1])):
        with suppress(EtcdError):
            own = [local_address(endpoint_of(outside, 1))]
    return ",".join([*hosts, *own])


def to_forward(config: TrainingConfig, etcd: str) -> str:
    """Which ports must be forwarded to this machine, as a sentence, if it lacks an advertised address; else "".

    Args:
        etcd: host:port of the local etcd, as other machines reach it; empty: etcd runs elsewhere.
    """
    for host in config.addresses:
        with suppress(OSError):
            if not is_own(address_of(host)):
                ports = [f"{etcd.rpartition(':')[2]} (etcd)"] if etcd else []
                ports.append(
                    f"{config.port_range} (workers)" if config.port_range else "any (workers; see --port-range)"
                )
                has = f"{host} is not an address of this machine: its router or cloud must forward to this machine"
                return f"{has}, unchanged, the TCP ports {' and '.join(ports)}"
    return ""


def _require_reachable(config: TrainingConfig, address: str) -> None:
    """Raise ConfigError unless other machines can reach the run's external etcd, and this machine at `address`."""
    hosts, port = _parsed(address)
    endpoints = ", ".join(config.etcd.endpoints)
    if port:
        raise ConfigError("--listen", address, f"must have no port: the etcd at {endpoints} has its own")
    here = any(is_loopback(endpoint_of(host, port)) for host in hosts)
    if not here and all(map(is_loopback, config.etcd.endpoints)):
        meant = "refers to a different machine on each machine: give the address at which the others reach that etcd"
        raise ConfigError("etcd.endpoints", endpoints, meant)


def _parsed(address: str) -> tuple[tuple[str, ...], int]:
    """The hosts and the port of `--listen` (0: no port given)."""

    def refused(reason: str) -> ConfigError:
        return ConfigError("--listen", address, reason)

    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", address)
    host, text = (found[1] or found[2], found[3] or "0") if found else (address, "0")
    if int(text) > 65535:
        raise refused("must have a port from 1 to 65535")
    try:
        own = ipaddress.ip_address(address_of(host))
    except (OSError, ValueError):
        raise refused(
            "must be an address of this machine, or its name: host, host:port or [IPv6 address]:port"
        ) from None
    if own.is_unspecified:
        known = [one.address for ones in psutil.net_if_addrs().values() for one in ones if _reachable(one.address)]
        raise refused(f"must be the address at which other machines reach this one, such as {', '.join(known)}")
    if own.is_link_local and own.version == 6:
        raise refused("must not be a link-local address, which refers to a different machine on each machine")
    if _is_address(host):
        return (str(own),), int(text)
    if own.is_loopback and host != "localhost":
        raise refused(f"is {own} here, which other machines cannot reach: give an address")
    return (host, str(own)), int(text)


def _reachable(text: str) -> bool:
    """Whether text is an IP address that other machines may be able to reach."""
    return _is_address(text) and not (own := ipaddress.ip_address(text)).is_loopback and not own.is_link_local


def _is_address(text: str) -> bool:
    """Whether text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
