"""Which log lines a command prints: our own from INFO on, libraries' only from WARNING on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = ("trainer", "components", "pipelines")


def set_up_logging() -> None:
    """For a process of its own: plain lines on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """For a stretch of a process whose root logger is already set up, as by kfp's executor."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in _OURS)]
    before = [logger.level for logger in loggers]
    for logger, level in zip(loggers, (logging.WARNING, *(logging.INFO for _ in _OURS)), strict=True):
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
