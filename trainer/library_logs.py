"""Which log records a command prints: ours from INFO, libraries' from WARNING."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("trainer", "components", "pipelines")


def set_up_logging() -> None:
    """Configure logging of a process of its own: plain lines on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Apply the same levels temporarily, where another program (kfp's executor) has configured the root logger."""
    levels = {logging.getLogger(): logging.WARNING} | {logging.getLogger(name): logging.INFO for name in _OURS}
    before = {logger: logger.level for logger in levels}
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
