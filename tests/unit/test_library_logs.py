"""Which log records a command prints."""

import subprocess
import sys

CODE = """
import logging
from trainer.library_logs import set_up_logging

set_up_logging()
logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
logging.getLogger("httpx").info("HTTP Request: GET")
logging.getLogger("datasets").warning("no such split")
logging.getLogger("trainer.worker.worker").info("resuming")
logging.getLogger("trainer.worker.worker").debug("too much")
"""


def test_libraries_log_from_warning_and_we_from_info() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "no such split\nresuming\n")


def test_every_command_sets_up_logging() -> None:
    """Tried with the one that needs nothing."""
    code = (
        "import logging, sys; from trainer.__main__ import main; main(['schema']); "
        "sys.exit(logging.getLogger().level != logging.WARNING or logging.getLogger('trainer').level != logging.INFO)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
