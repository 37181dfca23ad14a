"""A local copy of some of the API's objects that follows their changes, like client-go's informers.

It lists the objects, then watches them from the list's version on. When a watch ends (after a minute), breaks, or is
rejected because its version is too old (410), the informer resumes from the last version, or lists again. Objects that
are missing from the new list were deleted, so no deletion is missed, however long the watch was down.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Self

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import BROKEN, TIMED_OUT, ApiError, Client
from trainer.kubernetes.api.kinds import Kind, Object
from trainer.kubernetes.api.notices import Silence
from trainer.retry import retrying

logger = logging.getLogger(__name__)


class Informer:
    """The current objects of one kind that match a selector. Use it as a context manager.

    Args:
        labels: The label selector.
        changed: Called after each change, from the informer's thread.
        patience: Seconds for which the API server may fail to answer.
    """

    def __init__(
        self, client: Client, kind: Kind, labels: str, changed: Callable[[], None], patience: float = math.inf
    ) -> None:
        self._client, self._kind, self._labels, self._changed = client, kind, labels, changed
        self._patience, self._heard = patience, time.monotonic()
        self.silence: Silence | None = None  # since when and why the objects' state is unknown
        self._objects: dict[str, Object] = {}
        self._departed: list[Object] = []
        self._version = ""
        self._failure: TrainingError | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        try:
            self._list()  # in the caller's thread, so that a rejection raises there
        except ApiError as error:
            if not (
                self._client.cluster and error.is_transient and self._may_pass(error)
            ):  # another cluster may be unreachable
                raise
        threading.Thread(target=self._run, name=f"watch-{self._kind.plural}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()  # the thread ends with its connection and need not be joined

    def objects(self) -> dict[str, Object]:
        """The current objects by name. Raises ApiError if they can no longer be followed."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return dict(self._objects)

    def departed(self) -> list[Object]:
        """The objects deleted since the last call, in their last known state."""
        with self._lock:
            found, self._departed = self._departed, []
            return found

    def _run(self) -> None:
        pause = self._client.timeouts.retry
        policy = retrying(
            self._may_pass,
            patience=math.inf,  # `_may_pass` counts from the last news, not from the first attempt
            first_pause=pause,
            longest_pause=pause,
            stopping=self._closed,
        )
        try:
            while not self._closed.is_set():
                policy(self._follow)
        except Exception as error:  # re-raised in the reader, which waits for news
            unknown = f"{self._kind.plural} cannot be followed: {error!r}"
            with self._lock:
                self._failure = error if isinstance(error, ApiError) else TrainingError(unknown)
            self._changed()

    def _follow(self) -> None:
        """One watch, after a list if the version is unknown."""
        if not self._version:
            self._list(timeout=self._client.timeouts.answer)
            self._changed()
        try:
            self._watch()
        except ApiError as error:
            if error.status != 410:
                raise
            self._version = ""
        else:
            self._note_news()

    def _note_news(self) -> None:
        self._heard, self.silence = time.monotonic(), None

    def _may_pass(self, error: BaseException) -> bool:
        """Whether to try again after this error."""
        if not isinstance(error, ApiError):
            return False
        if error.reason == BROKEN:  # until now, the connection could have delivered news
            self._note_news()
        if error.reason in (BROKEN, TIMED_OUT):
            return True
        # A server that has just started may reject everything until it has loaded its roles. Another cluster's server
        # may do so for long, while its workers keep training.
        starting = (self.silence is not None or self._client.cluster) and error.status in (401, 403)
        if not (error.is_transient or starting) or time.monotonic() - self._heard > self._patience:
            return False
        logger.debug("watching %s again: %s", self._kind.plural, error)
        self.silence = Silence(self._heard, self._client.why_silent(error))
        return True

    def _watch(self) -> None:
        for event in self._client.watch(self._kind, self._version, self._labels, begun=self._note_news):
            if self._closed.is_set():
                return
            self._heard = time.monotonic()
            content = event["object"]
            self._version = content["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            with self._lock:
                self._objects[content["metadata"]["name"]] = content
                if event["type"] == "DELETED":
                    self._departed.append(self._objects.pop(content["metadata"]["name"]))
            self._changed()

    def _list(self, timeout: float | None = None) -> None:
        found, version = self._client.list(self._kind, self._labels, timeout=timeout)
        uids = {one["metadata"]["uid"] for one in found}
        with self._lock:
            self._departed += [one for one in self._objects.values() if one["metadata"]["uid"] not in uids]
            self._objects = {one["metadata"]["name"]: one for one in found}
        self._version = version
