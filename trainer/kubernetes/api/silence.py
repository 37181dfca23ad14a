"""What cannot be observed at the moment, and notices about it that do not flood a log."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.timeouts import KubernetesTimeouts

Say = Callable[[str], None]  # prints a line

API_SILENT = "the API server does not answer"
_NAMED = 4  # pods that a notice names; it counts the others


@dataclass(frozen=True)
class Silence:
    """No news arrives from a pod, or of the API's objects.

    Attributes:
        since: When the last news arrived, in seconds of `time.monotonic`.
        why: Which process does not answer.
    """

    since: float
    why: str


class SilenceNotices:
    """Prints which pods are silent and why, and when they are heard again.

    A notice is repeated whenever the silence has become twice as long, at least every `longest_silence` seconds.
    """

    def __init__(self, say: Say, timeouts: KubernetesTimeouts) -> None:
        self._say, self._timeouts = say, timeouts
        self._printed: dict[tuple[str, str], None] = {}  # pod and reason, in the order in which they were printed
        self._last, self._next = -math.inf, -math.inf  # when the last notice was printed, and when the next one is due

    def update(self, silences: Mapping[str, Silence]) -> None:
        """Print what there is to say about these silences, by the pods' names for people."""
        now = time.monotonic()

        # Pods that are heard again
        again = list(dict.fromkeys(name for name, _ in self._printed if name not in silences))
        if again:
            self._say(f"{_list(again)} {'is' if len(again) == 1 else 'are'} heard again")
        self._printed = {one: None for one in self._printed if one[0] in silences}

        # Pods that have been silent for long: a new one, or the same ones once more
        long = {name: one for name, one in silences.items() if now - one.since >= self._timeouts.silence}
        new = any((name, one.why) not in self._printed for name, one in long.items())
        if not long or now < (self._last + self._timeouts.silence if new else self._next):
            return
        longest = 0.0
        for why in dict.fromkeys(one.why for one in long.values()):
            names = [name for name, one in silences.items() if one.why == why]
            seconds = max(now - silences[name].since for name in names)
            self._say(f"no news of {_list(names)} for {max(1, round(seconds / 60))} min: {why}")
            self._printed |= dict.fromkeys((name, why) for name in names)
            longest = max(longest, seconds)
        self._last, self._next = now, now + min(longest, self._timeouts.longest_silence)


def _list(names: Sequence[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return " and ".join([", ".join(names[:_NAMED]), *more])
