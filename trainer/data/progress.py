"""How far a long step has come: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time
from types import TracebackType
from typing import Any

from trainer.data.registry import Log

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes of text.

    Args:
        label: What is going on.
        total: Bytes to come, about; 0 if nobody knows.
        log: Prints a line, where there is no terminal.
    """

    def __init__(self, label: str, total: int, log: Log) -> None:
        self._label, self._total, self._log = label, total, log
        self._done = 0
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total or None, unit="B", unit_scale=True, leave=False)

    def update(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            of = f" of about {self._total / 1e6:.0f}" if self._total else ""
            self._log(f"{self._label}: {self._done / 1e6:.0f}{of} MB")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
