"""Networks for tests and benchmarks, of Linux network namespaces: a bridge, a long and lossy link.

They need root and iproute2. Where these are missing, all of them raise PermissionError with the reason.
"""

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from trainer.process import dying_with_parent

HERE = Path(__file__).parent
QUEUE_KB = 4096  # of a long link: 67 ms at 500 Mbit/s
_letters = itertools.cycle("abcdefgh")  # of networks


def ip(*arguments: str) -> None:
    """Run `ip`.

    Raises:
        PermissionError: Not permitted here; says what was refused.
    """
    _command("ip", *arguments)


def _command(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PermissionError(f"there is no `{command[0]}` command") from None
    if done.returncode:
        if "exec of" in done.stderr:  # by `ip netns exec`
            raise PermissionError(done.stderr.strip())
        said = f"{' '.join(command)}: {done.stderr.strip()}"
        raise PermissionError(said) if "ermi" in done.stderr else RuntimeError(said)


def _allow(congestion: str) -> None:
    """Let namespaces choose a congestion control, as they may on hosts whose default it is. It stays allowed."""
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    if congestion not in (names := allowed.read_text().split()):
        allowed.write_text(" ".join([*names, congestion]))


class Namespaces:
    """Network namespaces, which are deleted in the end. A subclass connects them.

    Args:
        congestion: Congestion control of their TCP, where a socket does not choose: most hosts have cubic.
    """

    def __init__(self, count: int, congestion: str = "cubic") -> None:
        self._own = f"dl{os.getpid()}{next(_letters)}"  # what is deleted vanishes a little later
        self._names = [f"{self._own}{number}" for number in range(count)]
        self._resources = ExitStack()
        try:
            for name in self._names:
                ip("netns", "add", name)
                self._resources.callback(self._quietly, "netns", "del", name)
                ip("-n", name, "link", "set", "lo", "up")
            _allow(congestion)
            for number in range(count):
                self.set(number, "net/ipv4/tcp_congestion_control", congestion)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._resources.close()

    def address_of(self, number: int) -> str:
        """The address of a namespace's `eth0`."""
        raise NotImplementedError

    def inside(self, number: int) -> list[str]:
        """What to run a command with, for it to be in a namespace."""
        return ["ip", "netns", "exec", self._names[number]]

    def set(self, number: int, name: str, value: str) -> None:
        """Set a variable of a namespace's kernel: a path below /proc/sys."""
        _command(*self.inside(number), "sh", "-c", f"echo {value} > /proc/sys/{name}")

    def name(self, number: int, name: str, address: str) -> None:
        """Let a namespace know an address by a name, besides localhost."""
        folder = Path("/etc/netns") / self._names[number]  # `ip netns exec` puts its files in the place of /etc's
        folder.mkdir(parents=True)
        self._resources.callback(shutil.rmtree, folder)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")

    @staticmethod
    def _quietly(*arguments: str) -> None:
        with suppress(PermissionError, RuntimeError):
            ip(*arguments)


class Network(Namespaces):
    """Network namespaces on one bridge, one for each pod, whose links can be cut.

    Args:
        ipv6: Whether they have IPv6 addresses, and no others.
        behind_nat: Pods with a router each, which masquerades: nobody can connect to them. Needs iptables.
    """

    def __init__(
        self, count: int, congestion: str = "cubic", ipv6: bool = False, behind_nat: Collection[int] = ()
    ) -> None:
        super().__init__(count, congestion)
        self._behind_nat = frozenset(behind_nat)
        pid, self._ipv6 = os.getpid(), ipv6
        self._bridge = f"{self._own}b"
        self._net = f"fd{pid % 256:02x}:{pid // 256:x}:" if ipv6 else f"10.{200 + pid % 50}.{pid // 50 % 250}"
        self.address = self._address(1)
        try:
            ip("link", "add", self._bridge, "type", "bridge")
            self._resources.callback(self._quietly, "link", "del", self._bridge)
            ip("addr", "add", *self._with_mask(self.address), "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            for number, name in enumerate(self._names):
                inside = self._router(number) if number in self._behind_nat else name
                ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", inside)
                ip("link", "set", name, "master", self._bridge, "up")
                ip("-n", inside, "addr", "add", *self._with_mask(self._address(10 + number)), "dev", "eth0")
                ip("-n", inside, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def address_of(self, number: int) -> str:
        return f"192.168.{number}.2" if number in self._behind_nat else self._address(10 + number)

    def _router(self, number: int) -> str:
        """Make the router of a pod behind a NAT; returns its namespace."""
        name, router = self._names[number], f"{self._names[number]}r"
        ip("netns", "add", router)
        self._resources.callback(self._quietly, "netns", "del", router)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1", "netns", router)
        for where, device, host in ((name, "eth0", 2), (router, "eth1", 1)):
            ip("-n", where, "addr", "add", f"192.168.{number}.{host}/24", "dev", device)
            ip("-n", where, "link", "set", device, "up")
        ip("-n", name, "route", "add", "default", "via", f"192.168.{number}.1")
        inside = ["ip", "netns", "exec", router]
        _command(*inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        _command(*inside, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
        return router

    def cut(self, number: int) -> float:
        ip("link", "set", self._names[number], "down")
        return time.time()

    def heal(self, number: int) -> float:
        ip("link", "set", self._names[number], "up")
        return time.time()

    def slow(self, number: int, rate: str = "") -> None:
        """Limit what reaches a pod to a rate (`tc`'s units: "4mbit"), or no longer. Needs the kernel's sch_tbf."""
        device = self._names[number]
        if rate:
            _command(
                "tc",
                "qdisc",
                "replace",
                "dev",
                device,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "32kb",
                "latency",
                "200ms",
            )
        else:
            _command("tc", "qdisc", "del", "dev", device, "root")

    def wall(self, one: int, other: int, built: bool = True) -> float:
        """Keep two pods from talking to each other, while both talk to all others; or let them again."""
        for here, there in ((one, other), (other, one)):
            ip("-n", self._names[here], "route", "add" if built else "del", "blackhole", self.address_of(there))
        return time.time()

    def _address(self, host: int) -> str:
        return f"{self._net}:{host:x}" if self._ipv6 else f"{self._net}.{host}"

    def _with_mask(self, address: str) -> Sequence[str]:
        return (f"{address}/64", "nodad") if self._ipv6 else (f"{address}/24",)


class LongLink(Namespaces):
    """Two network namespaces, joined by an emulated link (long_link.c) whose both directions are alike."""

    def __init__(self, congestion: str = "cubic") -> None:
        if not os.access("/dev/net/tun", os.W_OK):
            raise PermissionError("/dev/net/tun may not be used")
        super().__init__(2, congestion)
        try:
            program = Path(self._resources.enter_context(tempfile.TemporaryDirectory())) / "long_link"
            _command("cc", "-O2", "-o", str(program), str(HERE / "long_link.c"))
            self._process = subprocess.Popen(
                dying_with_parent([str(program), *self._names]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._resources.callback(self._stop)
            self.shape()
            for number, name in enumerate(self._names):
                ip("-n", name, "addr", "add", f"{self.address_of(number)}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "mtu", "1500", "txqueuelen", "5000", "up")
        except BaseException:
            self.close()
            raise

    def address_of(self, number: int) -> str:
        return f"10.99.0.{1 + number}"

    def shape(
        self, mbit: float = 0, round_trip: float = 0, loss: float = 0, queue_kb: float = QUEUE_KB
    ) -> tuple[int, int, int]:
        """Change the link.

        Args:
            mbit: Rate of each direction, Mbit/s of IP packets; 0: unlimited.
            round_trip: Seconds, twice the delay.
            loss: Probability that a packet of a direction is lost.
            queue_kb: What a direction queues before it drops packets.

        Returns:
            Packets carried, lost at random and dropped by the queue since the change before.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{mbit} {round_trip / 2 * 1e3} {loss} {queue_kb}\n")
        self._process.stdin.flush()
        carried, lost, dropped = map(int, self._process.stdout.readline().split())
        return carried, lost, dropped

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
