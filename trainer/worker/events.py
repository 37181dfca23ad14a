"""The worker's event log: `metrics.jsonl`, including the warnings of other rooms."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.monitor.events import Metrics


@contextmanager
def event_log(path: Path) -> Iterator[Metrics]:
    """Open the event log.

    Meanwhile, log records with `extra={"event": True}` become `warning` events: that is how code which knows nothing of
    events tells a person something.
    """
    with Metrics(path) as metrics:
        handler = _WarningEvents(metrics)
        logger = logging.getLogger("trainer")
        logger.addHandler(handler)
        try:
            yield metrics
        finally:
            logger.removeHandler(handler)


class _WarningEvents(logging.Handler):
    def __init__(self, metrics: Metrics) -> None:
        super().__init__(logging.WARNING)
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", False):
            self._metrics.write("warning", message=record.getMessage())
