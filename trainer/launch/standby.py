"""A process that has imported all that a worker needs, and from which workers are forked.

Nearly all of the ten CPU seconds between a worker's start and its first inner step are imports and compilation. The
agent pays for them once: it prepares, and forks its standby before it has threads, a gRPC channel (which does not
survive a fork) or a device. Each incarnation of a worker is then a fork of the standby, and shares its memory.

The processes form a chain, in which each dies with the one before it, even by kill -9: agent, standby, workers.
"""

import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)

_NAME = 15  # PR_SET_NAME of prctl
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dxg")  # a driver that has opened one of these does not survive a fork
_NOT_INHERITED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_KILLED = -signal.SIGKILL


def can_start(command: Sequence[str]) -> bool:
    """Whether the command is a Python program of this interpreter: `python [-u] -m MODULE …`, or a script."""
    program = [word for word in command[1:2] if word != "-u"] + [*command[2:]]
    known = program[:1] == ["-m"] or (bool(program) and program[0].endswith(".py"))
    return sys.platform.startswith("linux") and command[0] == sys.executable and known


class Standby:
    """The agent's end. For one thread. Close it when the workers have ended; it kills those that have not."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self._connection = pid, connection
        self._is_alive = True
        self._ended: dict[int, int] = {}  # exit codes by process

    @classmethod
    def fork(cls, command: Sequence[str], prepare: Callable[[], None]) -> "Standby | None":
        """Prepare, and fork a standby that starts the command; None: a device is in use, which does not survive a fork.

        Call it before this process has threads or connections. In a process that the standby starts it does not
        return: there the program runs, and the process ends with it.
        """
        prepare()
        if any(file.startswith(_DEVICES) for file in _open_files()):
            log.warning("no standby: what workers import uses a device already, which does not survive a fork")
            return None
        gc.collect()
        gc.freeze()  # a collection in a fork would write to all objects, and so copy them
        sys.stdout.flush()
        sys.stderr.flush()
        own, other = Pipe()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            own.close()
            _become(command, _serve(other, parent))
        other.close()
        return cls(pid, own)

    def start(self, environment: Mapping[str, str]) -> "Worker | None":
        """Start the command with these environment variables; None: the standby is gone. Raises OSError as a fork."""
        try:
            self._connection.send_bytes(json.dumps({**environment}).encode())
        except OSError:
            return None
        while self._is_alive:
            if (answer := self._read(None)) is not None:
                if answer < 0:
                    raise OSError(-answer, os.strerror(-answer))
                return Worker(self, answer)
        return None

    def exit_code(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a worker; None: it has not ended within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self._ended and self._is_alive:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._read(left)
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._ended.get(pid, None if self._is_alive else _KILLED)  # its workers die with it

    def close(self) -> None:
        self._is_alive = False
        self._connection.close()  # it ends
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _read(self, timeout: float | None) -> int | None:
        """Read one message, if it comes in time; returns the answer to a request to start, if it is one."""
        try:
            if not self._connection.poll(timeout):
                return None
            message: list[int] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._is_alive = False
            return None
        if len(message) == 1:
            return message[0]
        pid, code = message
        self._ended[pid] = code
        return None


class Worker:
    """A process that the standby has started: as much of `subprocess.Popen` as torch's agent uses."""

    def __init__(self, standby: Standby, pid: int) -> None:
        self._standby, self.pid = standby, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._standby.exit_code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
        return self.returncode


# In the standby, and in the processes that it starts


def _serve(agent: Connection, parent: int) -> dict[str, str]:
    """Start a process for each request, and report the end of each, until the agent is gone.

    Returns in the processes that it starts only: with their environment variables.
    """
    _die_with(parent)
    _show_as(["diloco-standby"])
    for number in _NOT_INHERITED[:2]:
        signal.signal(number, signal.SIG_IGN)  # the agent decides
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes `wait` below
    own = os.getpid()
    try:
        while True:
            ready = wait([agent, woken])
            if woken in ready:
                os.read(woken, 4096)
                _report_ended(agent)
            if agent in ready:
                environment: dict[str, str] = json.loads(agent.recv_bytes())
                try:
                    pid = os.fork()
                except OSError as error:
                    pid = -(error.errno or 1)
                if pid == 0:
                    break
                agent.send_bytes(json.dumps([pid]).encode())
    except (EOFError, OSError):
        os._exit(0)

    # In a process that was started
    _die_with(own)
    signal.set_wakeup_fd(-1)
    agent.close()
    os.close(woken)
    os.close(wake)
    return environment


def _report_ended(agent: Connection) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            agent.send_bytes(json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]).encode())


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run the command in this process, as if it had been started by itself, and end."""
    os.setsid()  # as torch's own workers: the agent signals the whole group
    for number in _NOT_INHERITED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it has read the agent's
    _show_as(command)

    # What `python` does with its command line
    words = [*command[1:]]
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del words[0]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _show_as(command: Sequence[str]) -> None:
    """Let `ps` show this command, as far as there is room for it, instead of the agent's. Best effort."""
    with suppress(OSError, ValueError, IndexError):
        ctypes.CDLL(None).prctl(_NAME, Path(command[0]).name.encode())
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: proc(5) counts from 1, and the name
        text = "\0".join(command).encode()[: end - begin - 1]
        if end > begin:
            ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _open_files() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(link.readlink()))
    return found
