"""Notices about a run's pods, without flooding the log: which cannot be observed, and why others are waiting."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import CLAIM, EVENT, Object
from trainer.timeouts import KubernetesTimeouts

Show = Callable[[str], None]  # prints a line

_NAMED = 4  # number of pods that a notice names; it counts the others


@dataclass(frozen=True)
class Silence:
    """No news arrives from a pod, or about the API's objects."""

    since: float  # when the last news arrived, in seconds of `time.monotonic`
    why: str  # which process does not answer


class SilenceNotices:
    """Prints which pods are silent and why, and when they respond again.

    A notice is repeated whenever the silence has doubled, at least every `longest_silence` seconds.
    """

    def __init__(self, show: Show, timeouts: KubernetesTimeouts) -> None:
        self._show, self._timeouts = show, timeouts
        self._printed: dict[tuple[str, str], None] = {}  # pod and reason, in the order of printing
        self._last, self._next = -math.inf, -math.inf  # when the last notice was printed, and when the next one is due

    def update(self, silences: Mapping[str, Silence]) -> None:
        """Print the notices that are due for these silences, by the pods' display names."""
        now = time.monotonic()

        # Pods that respond again
        again = list(dict.fromkeys(name for name, _ in self._printed if name not in silences))
        if again:
            self._show(f"{_list(again)} {'is' if len(again) == 1 else 'are'} responding again")
        self._printed = {one: None for one in self._printed if one[0] in silences}

        # Pods that have been silent for long: new ones, or the same ones once more
        long = {name: one for name, one in silences.items() if now - one.since >= self._timeouts.silence}
        new = any((name, one.why) not in self._printed for name, one in long.items())
        if not long or now < (self._last + self._timeouts.silence if new else self._next):
            return
        longest = 0.0
        for why in dict.fromkeys(one.why for one in long.values()):
            names = [name for name, one in silences.items() if one.why == why]
            seconds = max(now - silences[name].since for name in names)
            self._show(f"no news of {_list(names)} for {max(1, round(seconds / 60))} min: {why}")
            self._printed |= dict.fromkeys((name, why) for name in names)
            longest = max(longest, seconds)
        self._last, self._next = now, now + min(longest, self._timeouts.longest_silence)


def _list(names: Sequence[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return " and ".join([", ".join(names[:_NAMED]), *more])


class WaitReasons:
    """How long pods and jobs have been waiting, and why."""

    def __init__(self, client: Client, show: Show) -> None:
        self._client, self._timeouts, self._show = client, client.timeouts, show
        self._since: dict[str, float] = {}  # by name; shifted by the API server's outages
        self._asked: dict[str, float] = {}  # when the reason was looked up
        self._why: dict[str, str] = {}  # the reason
        self._lines: dict[str, str] = {}  # the last line about a pod or a job
        self._observed = time.monotonic()

    def observe(self, *, api_is_silent: bool) -> None:
        """Start an observation. Outages of the API server do not count as waiting."""
        before, self._observed = self._observed, time.monotonic()
        if api_is_silent:
            self._since = {name: since + self._observed - before for name, since in self._since.items()}

    def waited(self, name: str) -> float:
        """Seconds since the first call for this name."""
        return time.monotonic() - self._since.setdefault(name, time.monotonic())

    def forget(self, name: str) -> None:
        """Record that this name no longer waits."""
        self._since.pop(name, None)
        self._why.pop(name, None)

    def why(self, name: str, seconds: float) -> str:
        """Why a pod or a job has waited for longer than `seconds`; "" if it has not."""
        if name not in self._since or self.waited(name) < seconds:
            return ""
        return self._why.get(name) or "no reason is known"

    def show_once(self, name: str, text: str) -> None:
        """Print a line about a pod or a job, unless it was the last one about it."""
        if self._lines.get(name) != text:
            self._lines[name] = text
            self._show(text)

    def explain_pod(self, pod: Object, called: str) -> None:
        """Print why a pod does not start, if it has waited for `explain_after`. `called` is its display name."""
        name = pod["metadata"]["name"]
        self._explain(name, called, lambda: diagnosis.why_pending(pod, self._events(name), self._waiting_claims(pod)))

    def explain_job(self, name: str, called: str, children: Sequence[str] = ()) -> None:
        """Print why a job has no pod, if it has waited for `explain_after`.

        Args:
            children: Names of the job's child objects, whose events are also considered.
        """
        self._explain(
            name,
            called,
            lambda: diagnosis.why_no_pod(event for one in (name, *children) for event in self._events(one)),
        )

    def _explain(self, name: str, called: str, find: Callable[[], str]) -> None:
        now = time.monotonic()
        interval = self._timeouts.explain_interval
        if self.waited(name) < self._timeouts.explain_after or now - self._asked.get(name, -interval) < interval:
            return
        self._asked[name] = now
        try:
            found = find()
        except ApiError as error:
            if not error.is_transient:
                raise
            return  # the next observation retries
        if found:
            self._why[name] = found
            self.show_once(name, f"{called} waits: {found}")

    def _waiting_claims(self, pod: Object) -> dict[str, str]:
        """The pod's claims that have no volume, and why."""
        found = {}
        for volume in pod["spec"].get("volumes") or []:
            if "persistentVolumeClaim" not in volume:
                continue
            name = volume["persistentVolumeClaim"]["claimName"]
            claim = self._client.get(CLAIM, name, timeout=self._timeouts.answer)
            if claim is None:
                found[name] = "is missing"
            elif why := diagnosis.why_claim_waits(claim, self._events(name)):
                found[name] = why
        return found

    def _events(self, name: str) -> list[Object]:
        """Kubernetes' events about an object, oldest first."""
        found, _ = self._client.list(EVENT, fields=f"involvedObject.name={name}", timeout=self._timeouts.answer)
        return sorted(
            found,
            key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or one["metadata"]["creationTimestamp"],
        )
