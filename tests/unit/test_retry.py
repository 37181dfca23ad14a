"""The one retry policy."""

import threading

import pytest

from trainer.retry import retrying


def transient(error: BaseException) -> bool:
    return isinstance(error, OSError)


class Flaky:
    """Fails a number of times, then returns its argument."""

    def __init__(self, failures: int, error: BaseException) -> None:
        self.calls, self._failures, self._error = 0, failures, error

    def __call__(self, value: str) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return value


def test_transient_errors_are_retried_and_reported() -> None:
    operation, reported = Flaky(2, OSError("away")), []
    assert retrying(transient, first_pause=0.0, on_retry=reported.append)(operation, "done") == "done"
    assert operation.calls == 3 and [str(error) for error in reported] == ["away", "away"]


def test_other_errors_are_raised_at_once() -> None:
    operation = Flaky(1, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retrying(transient)(operation, "done")
    assert operation.calls == 1


@pytest.mark.parametrize(("limit", "calls"), [({"attempts": 3}, 3), ({"patience": 0.0}, 1)])
def test_the_last_error_is_raised_at_the_limit(limit: dict[str, float], calls: int) -> None:
    operation = Flaky(9, OSError("away"))
    with pytest.raises(OSError, match="away"):
        retrying(transient, first_pause=0.0, **limit)(operation, "done")
    assert operation.calls == calls


def test_stopping_ends_a_pause() -> None:
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(OSError, match="away"):
        retrying(transient, first_pause=600.0, longest_pause=600.0, stopping=stopping)(
            Flaky(9, OSError("away")), "done"
        )
