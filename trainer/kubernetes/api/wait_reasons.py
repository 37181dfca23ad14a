"""Why pods and jobs wait: looked up in the API once they have waited for a while, and printed."""

import time
from collections.abc import Callable

from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import CLAIM, EVENT, Object
from trainer.kubernetes.api.silence import Say


class WaitReasons:
    """How long pods and jobs have been waiting, and why.

    Args:
        say: Prints a line.
    """

    def __init__(self, client: Client, say: Say) -> None:
        self._client, self._timeouts, self._print = client, client.timeouts, say
        self._since: dict[str, float] = {}  # by name; later by as long as the API server was away
        self._asked: dict[str, float] = {}  # when the reason was looked up
        self._why: dict[str, str] = {}  # the reason
        self._said: dict[str, str] = {}  # the last line about a pod or a job
        self._looked = time.monotonic()

    def look(self, *, api_is_silent: bool) -> None:
        """Begin a look at everything. Time in which the API server is away does not count as waiting."""
        before, self._looked = self._looked, time.monotonic()
        if api_is_silent:
            self._since = {name: since + self._looked - before for name, since in self._since.items()}

    def waited(self, name: str) -> float:
        """Seconds since the first call for this name."""
        return time.monotonic() - self._since.setdefault(name, time.monotonic())

    def forget(self, name: str) -> None:
        """Note that it does not wait any more."""
        self._since.pop(name, None)
        self._why.pop(name, None)

    def why(self, name: str, seconds: float) -> str:
        """Why a pod or a job has waited for longer than `seconds`; "" if it has not."""
        if name not in self._since or self.waited(name) < seconds:
            return ""
        return self._why.get(name) or "no reason is known"

    def say_once(self, name: str, text: str) -> None:
        """Print a line about a pod or a job, unless it was the last one about it."""
        if self._said.get(name) != text:
            self._said[name] = text
            self._print(text)

    def explain_pod(self, pod: Object, called: str) -> None:
        """Print why a pod does not start, if it has had time to.

        Args:
            called: The pod's name for people.
        """
        name = pod["metadata"]["name"]
        self._explain(name, called, lambda: diagnosis.why_pending(pod, self._events(name), self._waiting_claims(pod)))

    def explain_job(self, name: str, called: str) -> None:
        """Print why a job has no pod, if it has had time to get one."""
        self._explain(name, called, lambda: diagnosis.why_no_pod(self._events(name)))

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
            return  # the next look asks again
        if found:
            self._why[name] = found
            self.say_once(name, f"{called} waits: {found}")

    def _waiting_claims(self, pod: Object) -> dict[str, str]:
        """Those of a pod's claims that have no volume, and why."""
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

        def moment(event: Object) -> str:
            return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])

        return sorted(found, key=moment)
