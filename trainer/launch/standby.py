"""A standby process with all of a worker's imports done, from which agents and workers are forked.

Nearly all of the ten CPU seconds between a worker's start and its first inner step are imports and compilation. An
agent pays for them once: it does this work and forks its standby before it has threads, a gRPC channel (which does not
survive a fork) or a device. Each incarnation of a worker is then a fork of the standby and shares its memory. `launch`
also has a standby, from which its agents are forked.

The processes form a chain: launch, its standby, an agent, the agent's standby, a worker. Each dies with its
predecessor, even if that is killed with -9.
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
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from trainer.process import dying_with_parent

log = logging.getLogger(__name__)

_NAME = 15  # PR_SET_NAME of prctl
# A driver that has opened one of these devices does not survive a fork (NVML, which only queries GPUs, opens others)
_DEVICES = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/dxg")
_LEFT_TO_OWNER = (signal.SIGTERM, signal.SIGINT)
_KILLED = -signal.SIGKILL


def can_start(command: Sequence[str]) -> bool:
    """Whether the command is a Python program of this interpreter: `python [-u] -m MODULE …`, or a script."""
    program = [word for word in command[1:2] if word != "-u"] + [*command[2:]]
    return command[0] == sys.executable and bool(program) and (program[0] == "-m" or program[0].endswith(".py"))


class Standby:
    """The owner's handle to a standby process.

    Close it when the programs have ended; this kills those that have not.
    """

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self._connection = pid, connection
        self._changed = threading.Condition()  # guards the fields below
        self._is_alive, self._is_ready = True, False
        self._answer: Program | int = 0  # the last started program, or -errno
        self._running: dict[int, Program] = {}  # by process
        # On a thread, because an agent's signal handlers raise: a message must not be lost or half read
        self._listener = threading.Thread(target=self._listen, name="standby", daemon=True)
        self._listener.start()

    @classmethod
    def fork(cls, prepare: Callable[[], None]) -> "Standby | None":
        """Prepare and fork a standby; None if a device is in use, which does not survive a fork.

        Call this before the process has threads or connections. It does not return in processes that the standby
        starts: they run their program and end with it.
        """
        prepare()
        if not _can_be_forked():
            return None
        own, other = Pipe()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            own.close()
            _become(*_serve(other, parent))
        other.close()
        return cls(pid, own)

    @classmethod
    def spawn(cls, config: Path, environment: Mapping[str, str]) -> "Standby":
        """Start a standby as a new interpreter, prepared for a configuration (JSON). For a process with threads."""
        own, other = Pipe()
        command = [sys.executable, "-m", __name__, str(config), str(other.fileno())]
        process = subprocess.Popen(
            dying_with_parent(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # workers would encounter and report the same errors
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C reaches only `launch`
        )
        process.returncode = 0  # `close` waits for it
        other.close()
        return cls(process.pid, own)

    def is_ready(self, timeout: float) -> bool:
        """Whether it is prepared or gone, so that `start` does not wait. Waits up to `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_ready or not self._is_alive, timeout)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], output: Path | None = None
    ) -> "Program | None":
        """Start a program; None if the standby is gone. Not thread-safe.

        Args:
            command: See `can_start`.
            environment: The program's complete environment.
            output: A file to which its output is appended; by default, it shares the standby's output.

        Raises:
            OSError: The system cannot create another process.
        """
        request = {"command": [*command], "environment": {**environment}, "output": output and str(output)}
        with self._changed:
            self._answer = 0
            try:
                self._connection.send_bytes(json.dumps(request).encode())
            except OSError:
                return None
            self._changed.wait_for(lambda: self._answer or not self._is_alive)
            if isinstance(self._answer, Program):
                return self._answer
            if self._answer:
                raise OSError(-self._answer, os.strerror(-self._answer))
            return None

    def wait_for_end(self, program: "Program", timeout: float | None) -> None:
        """Wait up to `timeout` seconds for a program to end. Its `returncode` is then set."""
        with self._changed:
            self._changed.wait_for(lambda: program.returncode is not None or not self._is_alive, timeout)

    def close(self) -> None:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        # A signal handler that raises may have left `_changed` locked: waiting unlocks it, so that the listener ends
        with self._changed:
            self._changed.wait_for(lambda: not self._is_alive)
        self._listener.join()
        self._connection.close()

    def _listen(self) -> None:
        """Receive the standby's messages until it is gone."""
        with suppress(EOFError, OSError):
            while True:
                message: dict[str, int] = json.loads(self._connection.recv_bytes())
                with self._changed:
                    self._is_ready = True
                    pid = message.get("pid", 0)
                    if "code" in message:
                        if program := self._running.pop(pid, None):
                            program.returncode = message["code"]
                    elif pid > 0:
                        self._answer = self._running[pid] = Program(self, pid)
                    else:
                        self._answer = pid
                    self._changed.notify_all()
        with self._changed:
            self._is_alive = False
            for program in self._running.values():  # they die with it
                program.returncode = _KILLED
            self._changed.notify_all()


class Program:
    """A process that the standby has started, with the methods of `subprocess.Popen` that are used."""

    def __init__(self, standby: Standby, pid: int) -> None:
        self._standby, self.pid = standby, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._standby.wait_for_end(self, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, but that is not reported yet
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# In the standby, and in the processes that it starts


def main(arguments: Sequence[str]) -> NoReturn:
    """The program of a standby with its own interpreter (`Standby.spawn`)."""
    from trainer.config import TrainingConfig
    from trainer.files import read_json
    from trainer.worker.preload import preload

    config, descriptor = arguments
    parent = os.getppid()
    preload(TrainingConfig.from_tree(read_json(Path(config))))
    if not _can_be_forked():
        sys.exit(1)
    _become(*_serve(Connection(int(descriptor)), parent))


def _can_be_forked() -> bool:
    """Prepare this process for forks; False if a device is in use."""
    if any(file.startswith(_DEVICES) for file in _open_files()):
        log.warning("no standby: the workers' imports already use a device, which does not survive a fork")
        return False
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, all objects
    sys.stdout.flush()
    sys.stderr.flush()
    return True


def _serve(owner: Connection, parent: int) -> tuple[list[str], dict[str, str]]:
    """Start a process for each request and report when each ends, until the owner is gone.

    Returns only in the processes that it starts: their command and environment variables.
    """
    _die_with(parent)
    _show_as(["diloco-standby"])
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_OWNER)  # a signal that reaches a program early stays pending
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes `wait` below
    own = os.getpid()
    try:
        _tell(owner, ready=1)
        while True:
            ready = wait([owner, woken])
            if woken in ready:
                os.read(woken, 4096)
                _report_ended(owner)
            if owner in ready:
                request = json.loads(owner.recv_bytes())
                try:
                    pid = os.fork()
                except OSError as error:
                    pid = -(error.errno or 1)
                if pid == 0:
                    break
                _tell(owner, pid=pid)
    except (EOFError, OSError):
        os._exit(0)

    # From here on, in a started process
    _die_with(own)
    signal.set_wakeup_fd(-1)
    owner.close()
    os.close(woken)
    os.close(wake)
    if request["output"]:
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    return request["command"], request["environment"]


def _tell(owner: Connection, **message: int) -> None:
    owner.send_bytes(json.dumps(message).encode())


def _report_ended(owner: Connection) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(owner, pid=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run the command in this process as if it had been started directly, then exit."""
    os.setsid()  # like torch's own workers: the agent signals the whole group
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT_TO_OWNER)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and (threads := environment.get("OMP_NUM_THREADS", "")).isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))  # torch has read the standby's variable
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
    """Make the kernel kill this process when its parent ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _show_as(command: Sequence[str]) -> None:
    """Make `ps` show this command instead of the agent's, as far as there is room. Best effort."""
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


if __name__ == "__main__":
    main(sys.argv[1:])
