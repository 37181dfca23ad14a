"""The one retry policy: exponential back-off up to a limit, interruptible (tenacity)."""

import threading
import time
from collections.abc import Callable

import tenacity


def retrying(
    worth_retrying: Callable[[BaseException], bool],
    *,
    patience: float,
    first_pause: float = 1.0,
    longest_pause: float = 10.0,
    stopping: threading.Event | None = None,
    on_retry: Callable[[BaseException], None] = lambda error: None,
) -> tenacity.Retrying:
    """A retry policy to call with an operation: `retrying(...)(operation)`.

    Args:
        worth_retrying: Whether an exception is transient. Any other one is raised at once.
        patience: Seconds from the first attempt after which the last exception is raised.
        first_pause: Seconds before the second attempt; each further pause is twice the one before.
        longest_pause: Seconds at most between two attempts.
        stopping: Set: no further attempt is made, and the last exception is raised.
        on_retry: Called with the exception before each pause, to log it. It may raise.

    Returns:
        The policy. What it calls returns its result, or raises its own exception (never `RetryError`).
    """
    stop: tenacity.stop.stop_base = tenacity.stop_after_delay(patience)
    if stopping is not None:
        stop |= tenacity.stop_when_event_set(stopping)

    def log(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        on_retry(error)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(worth_retrying),
        stop=stop,
        wait=tenacity.wait_exponential(multiplier=first_pause, max=longest_pause),
        sleep=tenacity.sleep_using_event(stopping) if stopping is not None else time.sleep,
        before_sleep=log,
        reraise=True,
    )
