"""Child processes that never outlive their parent, and where they listen."""

import os
import socket
import sys

from trainer.errors import ConfigError

# Runs in the child before the program proper. PR_SET_PDEATHSIG (1) survives exec; a parent that died before it was
# set is noticed by its pid. A `preexec_fn` would do the same after a fork of a process with gRPC's threads: a hazard.
_PRELUDE = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def dying_with_parent(command: list[str]) -> list[str]:
    """`command`, to be started by this process, such that the kernel kills it when this process (kill -9 too) ends.

    Strictly, when the *thread* that starts it ends: start it from a thread that lives as long as it is needed.
    """
    return [sys.executable, "-I", "-S", "-c", _PRELUDE, str(os.getpid()), *command]


def listen(address: str, port_range: str = "", port: int = 0) -> socket.socket:
    """A listening TCP socket on `port`, or on the first free port of `port_range` ("low-high"), or on any.

    IPv6 for an IPv6 address, else IPv4.
    An address that no interface of this machine has (a NAT's, a service's) is bound as any address.

    Raises:
        ConfigError: The port is taken, or all of the range.
    """
    low, high = map(int, port_range.split("-")) if port_range and not port else (port, port)
    for candidate in range(low, high + 1):
        for host in (address, ""):
            listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, candidate))
                listener.listen(128)
                return listener
            except OSError as error:
                listener.close()
                if error.errno != 99:  # EADDRNOTAVAIL: not an address of ours
                    break
    if port_range and not port:
        raise ConfigError("port_range", port_range, "has no free port left")
    raise ConfigError("port", port, "is taken by another process, or may not be used")


def number_from(variable: str) -> int:
    """What the agent tells its workers by an environment variable; 0 without one. Raises ConfigError for no number."""
    text = os.environ.get(variable, "0")
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(variable, text, "must be a number: torchrun, or `launch`, sets it")
    return int(text)


def refused(endpoint: str, timeout: float = 1.0) -> bool:
    """Whether the machine of `endpoint` (host:port) answers that nobody listens there. Silence is no answer."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
