"""The two ways in which a command fails on purpose, and how each ends the process."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class ConfigError(ValueError):
    """Bad input, found before anything has started. The process exits with status 2.

    Args:
        field: The parameter as a user writes it, for example `elastic.min_nodes`.
        value: What it was.
        allowed: What is allowed, as the rest of a sentence: "must be a multiple of …".
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field, self.value, self.allowed = field, value, allowed

    def __str__(self) -> str:
        shown = str(self.value) if isinstance(self.value, int | float) else repr(str(self.value))
        return f"{self.field} = {shown}: {self.allowed}"


class TrainingError(RuntimeError):
    """A run that failed for a reason which a person can read and act on. The process exits with status 1."""


class Interrupted(BaseException):
    """SIGTERM: leave now, with everything saved. The process exits with status 143."""


def raise_on_sigterm() -> None:
    """Have SIGTERM raise `Interrupted` in the main thread. Without a handler a container's first process ignores it."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)


OUT_OF_MEMORY = "was killed because it needs more memory than it has"


def out_of_memory(limit: str = "", *, in_pod: bool = True) -> str:
    """How a process, or a container, was killed by the kernel, and what to do about it: the rest of a sentence.

    Args:
        limit: What it may take at most, for example "32Gi"; "": not known.
        in_pod: Whether `memory_gb` is what limits it.
    """
    most = f" (it may take {limit})" if limit else ""
    lower = "lower per_device_train_batch_size or sequence_length"
    other = "take a smaller model, or raise memory_gb" if in_pod else "or take a smaller model"
    return f"{OUT_OF_MEMORY}{most}: {lower}, {other}"


def one_line(error: BaseException) -> str:
    """What an exception of somebody else's code says, short enough for the end of a sentence."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:299]}…"


def run_main(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its status, or with an error's one line and status."""
    try:
        status = main()
    except ConfigError as error:
        status = _fail(str(error), 2)
    except TrainingError as error:
        status = _fail(str(error), 1)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except Interrupted:
        status = 143
    except BrokenPipeError:  # `… | head` closed the pipe: not worth a word
        sys.stderr.close()
        status = 0
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
