"""transformers' progress bars."""

import sys


def no_bars_into_logs() -> None:
    """Keep them for terminals."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
