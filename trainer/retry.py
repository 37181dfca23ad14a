"""The project's only retry policy: interruptible exponential back-off up to a limit (tenacity)."""

import math
import sys
import threading
from collections.abc import Callable

import tenacity


def retrying(
    worth_retrying: Callable[[BaseException], bool],
    *,
    patience: float = math.inf,
    attempts: int = sys.maxsize,
    first_pause: float = 1.0,
    longest_pause: float = 10.0,
    stopping: threading.Event | None = None,
    on_retry: Callable[[BaseException], None] = lambda error: None,
) -> tenacity.Retrying:
    """A retry policy to call with an operation: `retrying(...)(operation, *arguments)`.

    It returns the operation's result or raises the operation's own exception, never `RetryError`.

    Args:
        worth_retrying: Whether an exception is transient. Any other one is raised at once.
        patience: Seconds from the first attempt after which the last exception is raised.
        attempts: Attempts after which the last exception is raised.
        first_pause: Seconds before the second attempt; each further pause is twice as long as the one before.
        longest_pause: Maximum seconds between two attempts.
        stopping: Once set, no further attempt is made, and the last exception is raised.
        on_retry: Called with the exception before each pause, to log it. It may raise.
    """
    stopping = stopping or threading.Event()
    stop = tenacity.stop_any(
        tenacity.stop_after_delay(patience),
        tenacity.stop_after_attempt(attempts),
        tenacity.stop_when_event_set(stopping),
    )

    def before_pause(state: tenacity.RetryCallState) -> None:
        if state.outcome is not None and (error := state.outcome.exception()) is not None:
            on_retry(error)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(worth_retrying),
        stop=stop,
        wait=tenacity.wait_exponential(multiplier=first_pause, max=longest_pause),
        sleep=tenacity.sleep_using_event(stopping),
        before_sleep=before_pause,
        reraise=True,
    )
