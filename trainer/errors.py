"""Expected failures and their exit codes."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ConfigError(ValueError):
    """Bad input, detected before anything starts. The process exits with status 2.

    Args:
        field: The parameter as the user writes it, for example `elastic.min_nodes`.
        value: The value given.
        allowed: The allowed values, as the end of a sentence: "must be a multiple of …".
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field, self.value, self.allowed = field, value, allowed

    def __str__(self) -> str:
        shown = str(self.value) if isinstance(self.value, int | float) else repr(str(self.value))
        return f"{self.field} = {shown}: {self.allowed}"


class TrainingError(RuntimeError):
    """The run failed for a reason that the user can act on. The process exits with status 1."""


class Interrupted(BaseException):
    """SIGTERM: save everything and leave. The process exits with status 143."""


def raise_on_sigterm() -> None:
    """Make SIGTERM raise `Interrupted` in the main thread. Without a handler, a container's init process ignores it."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)


OUT_OF_MEMORY = "was killed because it needs more memory than it has"


def out_of_memory(limit: str = "", *, in_pod: bool = True) -> str:
    """Describe a process or container that the kernel killed, with advice, as the end of a sentence.

    `limit` is the memory it may use, for example "32Gi"; `in_pod`: whether `memory_gb` sets that limit.
    """
    most = f" (its limit is {limit})" if limit else ""
    lower = "lower per_device_train_batch_size or sequence_length"
    other = "use a smaller model, or raise memory_gb" if in_pod else "or use a smaller model"
    return f"{OUT_OF_MEMORY}{most}: {lower}, {other}"


def one_line(error: BaseException) -> str:
    """A library exception's message on one line, short enough to end a sentence."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else f"{message[:299]}…"


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def run_main(main: Callable[[], int]) -> NoReturn:
    """Call `main` and exit with its status. After an expected failure, print one line and exit with its status.

    If the reader of the output is gone (`… | head`), exit with 141, like a process ended by SIGPIPE, unless
    `outlive_output` was called.
    """
    _write_any_text()
    try:
        try:
            status = main()
        except SystemExit as end:  # argparse's
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
    except (ConfigError, TrainingError) as error:
        status = _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except Interrupted:
        status = 143
    except BrokenPipeError:
        _to_nowhere(1)
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _write_any_text() -> None:
    """Escape characters that the output's encoding lacks (`PYTHONIOENCODING=ascii`) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def outlive_output() -> None:
    """Keep the process working when the reader of its output is gone; further output is discarded."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = _Lasting(stream.fileno(), "w", closefd=False)
            lines = stream.line_buffering or name == "stderr"
            lasting = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=lines)
            setattr(sys, name, lasting)


class _Lasting(io.FileIO):
    """A file descriptor whose failure does not end the process.

    When its reader is gone (a pipe's reader, or a terminal), it is replaced by /dev/null, also for child processes.
    """

    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                _to_nowhere(self.fileno())
            elif error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk loses only these lines
                raise
            return memoryview(data).nbytes


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _fail(message: str, status: int) -> int:
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
