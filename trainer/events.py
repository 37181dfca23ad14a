"""The events of a worker, `metrics.jsonl`: one writer (`EventLog`) and one reader (`EventReader`).

Every other view of a run is derived from this file, which has one JSON object per line, flushed at once. `event` is one
of start, assignment, step, round, eval, checkpoint, membership, link, warning and end; `time` is in Unix seconds. NaN
and infinities, which JSON does not have, are written as null.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from trainer.errors import one_line

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_PIECE = 4 << 20  # bytes
POSITIONS = {"step": "step", "round": "round", "eval": "round"}  # by kind: the field in which repeated events agree


class Sink(Protocol):
    """Another destination of events."""

    name: str

    def write(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class EventLog:
    """Appends events to a file and forwards them to sinks. A sink that fails is removed, with a warning."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self.sinks: list[Sink] = []
        self.links: dict[str, str] = {}  # this worker's URLs by tracker
        self._lock = threading.Lock()  # checkpoints and trackers have their own threads
        self._handler = _WarningHandler(lambda message: self.write("warning", message=message))

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; its `time` is now."""
        record = {"event": event, **{key: _json_number(value) for key, value in fields.items()}, "time": time.time()}
        failures = []
        with self._lock:
            self._file.write(json.dumps(record, allow_nan=False, default=str) + "\n")
            self._file.flush()
            for sink in list(self.sinks):
                try:
                    sink.write(record)
                except Exception as error:
                    self.sinks.remove(sink)
                    failures.append(f"{sink.name} is switched off: {one_line(error)}")
        for failure in failures:  # outside the lock, because a warning is also an event
            self.warn(failure)

    def warn(self, message: str) -> None:
        """Log a warning and record it as an event."""
        logger.warning(message)
        self.write("warning", message=message)

    def link(self, name: str, url: str) -> None:
        """Record a tracker's URL of this worker. `start` contains those known by then; later ones are `link` events."""
        self.links[name] = url
        self.write("link", links={name: url})

    def capture_warnings(self) -> None:
        """Record log messages marked with `extra={"event": True}` as `warning` events, until the log is closed.

        Lower-level code reports to the event log in this way, without a reference to it.
        """
        logging.getLogger("trainer").addHandler(self._handler)

    def close(self) -> None:
        logging.getLogger("trainer").removeHandler(self._handler)
        for sink in self.sinks:
            sink.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _WarningHandler(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", False) is True:
            try:
                self._write(record.getMessage())
            except Exception:
                self.handleError(record)


class EventReader:
    """Reads events as they are appended. The file need not exist yet.

    A last line without a newline is still being written and is left for the next call. Other lines that are not events
    (torn by a kill) are skipped. `last` starts that many bytes before the file's current end.
    """

    def __init__(self, path: Path, last: int | None = None) -> None:
        self._path = path
        size = path.stat().st_size if path.exists() else 0
        self._offset = 0 if last is None else max(0, size - last)

    def pieces(self) -> Iterator[list[Event]]:
        """Like `read`, but in pieces, so that long files need little memory."""
        before = None
        while self._offset != before:
            before = self._offset
            yield self.read(_PIECE)

    def read(self, most: int = -1) -> list[Event]:
        """The events since the last call, in the file's order; at most about `most` bytes, unless that is negative."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read(most) + file.readline()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [event for line in complete.splitlines() if (event := parse_event(line)) is not None]


def parse_event(line: bytes) -> Event | None:
    """The event in a complete line of `metrics.jsonl`; None if it is not an event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def number(value: object) -> float:
    """A JSON value as a float; NaN if it is not a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _json_number(value: Any) -> Any:
    """The value, or None for a float that JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(path: Path) -> None:
    """End an incomplete line of a killed process, so that the next event starts a new line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
