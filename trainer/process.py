"""Child processes that never outlive their parent, and the ports that processes listen on."""

import ctypes
import errno
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from trainer.errors import ConfigError

T = TypeVar("T")

_NICENESS = 5
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_CONGESTION = 13  # Linux's TCP_CONGESTION, which not every Python's `socket` defines

# Runs in the child before the program. PR_SET_PDEATHSIG (1) survives exec; if the parent died before it was set, the
# parent's pid has changed. A `preexec_fn` would be unsafe: it runs after the fork of a process with gRPC's threads.
_PRELUDE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def dying_with_parent(command: list[str]) -> list[str]:
    """Wrap `command` so that the kernel kills it when this process ends, even by kill -9.

    The kernel acts when the *thread* that started the child ends: use a thread that lives as long as the child.
    """
    return [sys.executable, "-I", "-S", "-c", _PRELUDE, str(os.getpid()), *command]


def listen(address: str, port_range: str = "", port: int = 0) -> socket.socket:
    """A listening TCP socket on `port`, or on the first free port of `port_range` ("low-high"), or on any.

    For a name, the IPv4 address is preferred. If the address is empty, or no interface of this machine has it (it
    belongs to a NAT or a service), the socket listens on all interfaces.

    Raises:
        ConfigError: The port, or every port of the range, is taken, or the address is invalid.
    """
    try:
        own = address_of(address) if address else ""
    except OSError as error:
        raise ConfigError("advertise_address", address, f"is not an address: {error.strerror}") from None
    low, high = map(int, port_range.split("-")) if port_range and not port else (port, port)
    for candidate in range(low, high + 1):
        for host in dict.fromkeys((own, "")):
            try:
                return _bound(host, candidate)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # the address is not this machine's
                    break
    if port_range and not port:
        raise ConfigError("port_range", port_range, "has no free port left")
    raise ConfigError("port", port, "is used by another process, or may not be used")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; if it is empty, on all IPv4 and IPv6 addresses."""
    both = not host and socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if both or ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def return_freed_memory(least: int = 1 << 20) -> None:
    """From now on, return freed blocks of at least `least` bytes to the kernel. Only has an effect with glibc.

    By default, glibc raises this threshold up to 32 MB as such blocks are freed, and keeps them in a fragmented heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, least)
        mallopt(_M_TRIM_THRESHOLD, least)


def number_from(variable: str) -> int:
    """The number in an environment variable that the agent sets for its workers; 0 if unset."""
    text = os.environ.get(variable, "0")
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(variable, text, "must be a number, as set by torchrun or `launch`")
    return int(text)


def endpoint_of(host: str, port: int) -> str:
    """`host:port`, or `[host]:port` for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(host: str) -> str:
    """The IP address of a name or an address; IPv4 is preferred. Raises OSError if there is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # a part of the name is empty or longer than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])


def loopback() -> str:
    """This machine's loopback address; the IPv6 one only if it has no IPv4."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError:
        return "::1"
    return "127.0.0.1"


def is_own(address: str) -> bool:
    """Whether an IP address belongs to an interface of this machine, so that a socket can listen there."""
    try:
        _bound(address, 0).close()
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def is_loopback(endpoint: str) -> bool:
    """Whether `endpoint` (host:port) is a loopback address, which is useless to other machines."""
    host = endpoint.rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def connect(endpoint: str, timeout: float) -> socket.socket:
    """A TCP connection to `endpoint` (host:port or [IPv6 address]:port)."""
    host, _, port = endpoint.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout)


def prefer_bbr(connection: socket.socket) -> None:
    """Use BBR congestion control for a connection to another machine, where the kernel permits it.

    cubic, the default of most hosts, takes every lost packet for congestion. Over a long link that loses one packet in
    a thousand, it uses a hundredth of the bandwidth (docs/guide/slow-links.md).
    """
    with suppress(OSError):  # the kernel lacks or reserves BBR, or the connection is already closed
        if not ipaddress.ip_address(connection.getpeername()[0].partition("%")[0]).is_loopback:
            connection.setsockopt(socket.IPPROTO_TCP, _CONGESTION, b"bbr")


def congestion(connection: socket.socket) -> str:
    """The name of a connection's congestion control; empty if unknown."""
    with suppress(OSError):
        return connection.getsockopt(socket.IPPROTO_TCP, _CONGESTION, 16).partition(b"\0")[0].decode()
    return ""


def at_once(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `work` for all items, each on its own thread, and return when all are done.

    Unlike an executor's, the threads do not delay the end of the process.
    """
    threads = [threading.Thread(target=work, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def lower_priority() -> None:
    """Lower the priority of the calling thread below that of training. Only Linux has thread priorities."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def refused(endpoint: str, timeout: float = 1.0) -> bool:
    """Whether `endpoint` refuses connections: its machine is up, but its process is not."""
    try:
        connect(endpoint, timeout).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False
