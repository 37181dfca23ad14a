"""A run's pods as they are seen from a step: what they say, why they wait, how they end."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import (
    ANSWER_TIMEOUT,
    CLAIM,
    EVENT,
    PASSING,
    POD,
    ApiError,
    Client,
    Kind,
    Object,
    Silence,
)
from trainer.kubernetes.api.informer import Mirror
from trainer.kubernetes.api.logs import LogFollower

EXPLAIN_AFTER = 10.0  # seconds that a pod may wait before one says why
EXPLAIN_INTERVAL = 10.0  # seconds between two looks at why
SILENCE = 60.0  # seconds without news after which that is printed, and then
LONGEST_SILENCE = 30 * SILENCE  # whenever the silence has become twice as long, but at least so often
_NAMED = 4  # pods of one silence that are named

Say = Callable[[str], None]
OnLine = Callable[[Object, str], None]  # a pod, and a line that it has said


class Pods:
    """Follows the pods that a selector selects, and the objects (Jobs or PyTorchJobs) that they are of.

    `look` is to be called after `wake` is set, and now and then. Use it as a context manager.

    Args:
        kind: Of the objects that the pods are of.
        labels: Selector of these objects and of their pods.
        container: The container that is followed.
        called: What a person calls a pod: "worker 0".
        say: Prints a line.
        on_line: Takes what the pods say, from threads.
        patience: Seconds that the API server may be away.

    Attributes:
        pods: As they were at the last `look`, by name.
        departed: Those that were deleted between the last two looks, as they were seen last.
        owners: The Jobs or PyTorchJobs, by name.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind,
        labels: str,
        container: str,
        called: Callable[[Object], str],
        say: Say,
        on_line: OnLine,
        patience: float = math.inf,
    ) -> None:
        self._client, self._container, self._called, self._say, self._on_line = client, container, called, say, on_line
        self.wake = threading.Event()
        self._pods = Mirror(client, POD, labels, self.wake.set, patience)
        self._owners = Mirror(client, kind, labels, self.wake.set, patience)
        self._resources = ExitStack()
        self._followers: dict[str, LogFollower] = {}  # by the pod's uid
        self._names: dict[str, str] = {}  # of their pods, as a person calls them
        self._silent = _Silent(say)
        self._said: dict[str, str] = {}  # what was last said of a pod, or of an owner
        self._waiting: dict[str, float] = {}  # since when, by name; later by how long the API server was silent
        self._looked = time.monotonic()
        self._asked: dict[str, float] = {}  # when it was asked why, and
        self._why: dict[str, str] = {}  # what was found
        self.departed: list[Object] = []
        self.pods: dict[str, Object] = {}
        self.owners: dict[str, Object] = {}

    def __enter__(self) -> Self:
        self._resources.enter_context(self._owners)
        self._resources.enter_context(self._pods)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
        for follower in self._followers.values():
            follower.close()

    def silent(self) -> dict[str, float]:
        """Since when nothing is heard of pods that run, by name, in Unix seconds."""
        passed = time.time() - time.monotonic()
        running = {pod["metadata"]["uid"]: name for name, pod in self.pods.items()}
        return {
            running[uid]: passed + silence.since
            for uid, follower in self._followers.items()
            if uid in running and (silence := follower.silence) is not None
        }

    def look(self) -> None:
        """Take in how things are now: begin to read logs, say what has changed, and why something waits."""
        self.wake.clear()
        self._let_outages_pass()
        self.owners, self.pods, self.departed = self._owners.objects(), self._pods.objects(), self._pods.departed()
        for name, pod in self.pods.items():
            self._read(name, pod)
            if lost := diagnosis.why_lost(pod):
                self.say_once(name, f"{self._called(pod)}: {lost}")
            elif diagnosis.has_started(pod, self._container):
                self._running(name, pod)
            else:
                self._explain(name, partial(self._why_waits, name, pod), self._called(pod))
        self._silent.take(self._silences())

    def _let_outages_pass(self) -> None:
        """What waits may have started where the API server does not answer: that time does not count as waiting."""
        before, self._looked = self._looked, time.monotonic()
        if self._pods.silence or self._owners.silence:
            self._waiting = {name: since + self._looked - before for name, since in self._waiting.items()}

    def explain_missing(self, owner: str, what: str) -> None:
        """Say why a Job or PyTorchJob has no pod, if it has had time to get one."""
        self._explain(owner, lambda: diagnosis.why_no_pod(self._events(owner)), what)

    def waited(self, name: str) -> float:
        """For how many seconds a pod or an owner has been waiting, as far as was seen; asking begins it."""
        return time.monotonic() - self._waiting.setdefault(name, time.monotonic())

    def why_not_started(self, name: str, seconds: float) -> str:
        """Why a pod, or an owner's, has been waiting for longer than `seconds`; "" if it has not."""
        if name not in self._waiting or self.waited(name) < seconds:
            return ""
        return self._why.get(name) or "no reason is known"

    def finish_reading(self, names: Iterable[str], seconds: float = 10.0) -> None:
        """Return when all that was said by those of these pods that have ended has been handed on."""
        deadline = time.monotonic() + seconds
        for name in names:
            pod = self.pods.get(name)
            if pod is None or diagnosis.exit_status(pod, self._container) is None:
                continue
            if follower := self._followers.get(pod["metadata"]["uid"]):
                follower.end()
                follower.done.wait(max(0.0, deadline - time.monotonic()))

    def say_once(self, name: str, text: str) -> None:
        """Say something of a pod or an owner, unless it was said last."""
        if self._said.get(name) != text:
            self._said[name] = text
            self._say(text)

    def _running(self, name: str, pod: Object) -> None:
        self._forget(name)
        for owner in pod["metadata"].get("ownerReferences") or []:
            self._forget(owner["name"])
        node = pod["spec"].get("nodeName", "")
        if diagnosis.exit_status(pod, self._container) is None:
            self.say_once(name, f"{self._called(pod)} runs" + (f" on node {node}" if node else ""))

    def _read(self, name: str, pod: Object) -> None:
        """Follow the log of each pod that has begun, and end where it has ended."""
        uid = pod["metadata"]["uid"]
        if uid not in self._followers and diagnosis.has_started(pod, self._container):
            self._names[uid] = self._called(pod)
            node = pod["spec"].get("nodeName") or "its node"
            self._followers[uid] = LogFollower(
                self._client, name, uid, self._container, node, lambda line: self._on_line(pod, line)
            )
        if uid in self._followers and diagnosis.exit_status(pod, self._container) is not None:
            self._followers[uid].end()

    def _silences(self) -> dict[str, Silence]:
        """What cannot be heard now, and why. If the API server does not answer, followed pods are named for it."""
        found = {
            self._names[uid]: silence for uid, one in self._followers.items() if (silence := one.silence) is not None
        }
        reasons_given = {silence.why for silence in found.values()}
        for mirror in (self._pods, self._owners):
            silence = mirror.silence
            if silence is not None and silence.why not in reasons_given:
                found["the cluster"] = silence
        return found

    def _forget(self, name: str) -> None:
        """It does not wait any more."""
        self._waiting.pop(name, None)
        self._why.pop(name, None)

    def _explain(self, name: str, why: Callable[[], str], what: str) -> None:
        """Say why something waits once it has waited for a while; look again now and then."""
        if self.waited(name) < EXPLAIN_AFTER or self._pods.silence or self._owners.silence:
            return
        now = time.monotonic()
        if now - self._asked.get(name, -EXPLAIN_INTERVAL) < EXPLAIN_INTERVAL:
            return
        self._asked[name] = now
        try:
            found = why()
        except ApiError as error:
            if error.status not in PASSING:
                raise
            return  # it is asked again; what does not answer is no reason to wait for
        if found:
            self._why[name] = found
            self.say_once(name, f"{what} waits: {found}")

    def _why_waits(self, name: str, pod: Object) -> str:
        claims = {}
        for volume in pod["spec"].get("volumes") or []:
            if "persistentVolumeClaim" not in volume:
                continue
            claim_name = volume["persistentVolumeClaim"]["claimName"]
            claim = self._client.get(CLAIM, claim_name, timeout=ANSWER_TIMEOUT)
            if claim is None:
                claims[claim_name] = "is missing"
            elif why := diagnosis.why_claim_waits(claim, self._events(claim_name)):
                claims[claim_name] = why
        return diagnosis.why_pending(pod, self._events(name), claims)

    def _events(self, name: str) -> list[Object]:
        """What Kubernetes has told about an object, oldest first."""
        found, _ = self._client.list(EVENT, fields=f"involvedObject.name={name}", timeout=ANSWER_TIMEOUT)

        def moment(event: Object) -> str:
            return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])

        return sorted(found, key=moment)


class _Silent:
    """Prints which pods cannot be heard, and why, and that they can be heard again; not too often."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._printed: dict[tuple[str, str], None] = {}  # pods, and why; in the order in which they were printed
        self._last, self._next = -math.inf, -math.inf  # when it was printed, and is to be again

    def take(self, silences: Mapping[str, Silence]) -> None:
        """Take in what cannot be heard now."""
        now = time.monotonic()
        again = list(dict.fromkeys(name for name, _ in self._printed if name not in silences))
        if again:
            self._say(f"{_list(again)} {'is' if len(again) == 1 else 'are'} heard again")
        self._printed = {one: None for one in self._printed if one[0] in silences}
        long = {name: one for name, one in silences.items() if now - one.since >= SILENCE}
        new = any((name, one.why) not in self._printed for name, one in long.items())
        if not long or now < (self._last + SILENCE if new else self._next):
            return
        longest = 0.0
        for why in dict.fromkeys(one.why for one in long.values()):
            names = [name for name, one in silences.items() if one.why == why]
            seconds = max(now - silences[name].since for name in names)
            self._say(f"no news of {_list(names)} for {max(1, round(seconds / 60))} min: {why}")
            self._printed |= dict.fromkeys((name, why) for name in names)
            longest = max(longest, seconds)
        self._last, self._next = now, now + min(longest, LONGEST_SILENCE)


def _list(names: Sequence[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return " and ".join([", ".join(names[:_NAMED]), *more])
