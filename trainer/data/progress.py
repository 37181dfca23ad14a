"""Progress of a long step: a bar on a terminal, otherwise a plain line every ten seconds."""

import sys
import time
from contextlib import ExitStack
from typing import Self

from trainer.data.registry import Log

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts the amount that a step has read.

    Args:
        label: The step's action.
        total: The approximate amount to read; 0: unknown.
        log: Prints a line if there is no terminal.
        unit: "bytes", or another noun in the plural.
    """

    def __init__(self, label: str, total: int, log: Log, unit: str = "bytes") -> None:
        self._label, self._total, self._log, self._unit = label, total, log, unit
        self._done = 0
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._terminal = ExitStack()
        self._bar = None
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            amount = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
            columns = ("{task.description}", progress.BarColumn(), amount, progress.TimeRemainingColumn())
            bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar = self._terminal.enter_context(bar)
            self._task = self._bar.add_task(label, total=total or None)

    def update(self, amount: int) -> None:
        """Count `amount` more."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            of = f" of about {self._in_words(self._total)}" if self._total else ""
            unit = "MB" if self._unit == "bytes" else self._unit
            self._log(f"{self._label}: {self._in_words(self._done)}{of} {unit}")

    def _in_words(self, amount: int) -> str:
        return f"{amount / 1e6:.0f}" if self._unit == "bytes" else f"{amount:,}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.close()
