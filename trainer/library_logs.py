"""Log levels of a command: INFO for this project, WARNING for libraries."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LEVELS = {"": logging.WARNING} | dict.fromkeys(("trainer", "components", "pipelines"), logging.INFO)  # by logger


def set_up_logging() -> None:
    """Configure this process's logging: plain lines on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Apply the same levels temporarily where another program (kfp's executor) has configured the root logger."""
    before = {name: logging.getLogger(name).level for name in _LEVELS}
    try:
        for name, level in _LEVELS.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
