"""A mirror of some of the API's objects that follows them: what client-go calls an informer.

It lists, and watches from the list's version on. A watch ends now and then, breaks, or is refused because its version
is too old (410): then it watches again from the last version, or lists again. What is missing in the new list is gone,
so that no deletion is missed, however long the watch was broken. An API server that does not answer is waited for.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import (
    ANSWER_TIMEOUT,
    API_SILENT,
    BROKEN,
    PASSING,
    RETRY_INTERVAL,
    TIMED_OUT,
    ApiError,
    Client,
    Kind,
    Object,
    Silence,
)

logger = logging.getLogger(__name__)


class Mirror:
    """The objects of one kind that a selector selects, as they are now. Use it as a context manager.

    Args:
        labels: The label selector.
        changed: Called, from a thread, after each change.
        patience: Seconds that the API server may be away.

    Attributes:
        silence: Since when, and why, it is not known how the objects are, if so.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind,
        labels: str,
        changed: Callable[[], None],
        patience: float = math.inf,
    ) -> None:
        self._patience, self._heard = patience, time.monotonic()
        self.silence: Silence | None = None
        self._client, self._kind, self._labels, self._changed = client, kind, labels, changed
        self._objects: dict[str, Object] = {}
        self._departed: list[Object] = []
        self._version = ""
        self._failure: TrainingError | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        self._list()  # here, so that a refusal is the caller's
        threading.Thread(target=self._run, name=f"watch-{self._kind.plural}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()  # the thread ends with its connection, and nobody waits for it

    def objects(self) -> dict[str, Object]:
        """By name, as they are now.

        Raises:
            ApiError: They cannot be followed any more.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return dict(self._objects)

    def departed(self) -> list[Object]:
        """Those that were deleted since the last call, as they were seen last."""
        with self._lock:
            found, self._departed = self._departed, []
            return found

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                if not self._version:
                    self._list(timeout=ANSWER_TIMEOUT)
                    self._changed()
                self._watch()
                self._hear()
            except ApiError as error:
                if error.status == 410:
                    self._version = ""
                elif error.reason == BROKEN:
                    self._hear()  # until now
                elif error.reason != TIMED_OUT and not self._bear(error):
                    self._fail(error)
                    return
                self._closed.wait(RETRY_INTERVAL if error.status != 410 else 0.0)
            except Exception as error:  # whoever waits for this thread must not wait for ever
                self._fail(TrainingError(f"{self._kind.plural} cannot be followed: {error!r}"))
                return

    def _hear(self) -> None:
        self._heard, self.silence = time.monotonic(), None

    def _bear(self, error: ApiError) -> bool:
        """Whether a refusal may pass. A server that comes back may refuse everything before it has read its roles."""
        passing = error.status in PASSING
        starting = self.silence is not None and error.status in (401, 403)
        if not (passing or starting) or time.monotonic() - self._heard > self._patience:
            return False
        logger.debug("watching %s again: %s", self._kind.plural, error)
        self.silence = Silence(self._heard, API_SILENT if passing else str(error))
        return True

    def _watch(self) -> None:
        for event in self._client.watch(self._kind, self._version, self._labels, begun=self._hear):
            if self._closed.is_set():
                return
            self._heard = time.monotonic()
            content = event["object"]
            self._version = content["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            with self._lock:
                if event["type"] == "DELETED":
                    self._objects.pop(content["metadata"]["name"], None)
                    self._departed.append(content)
                else:
                    self._objects[content["metadata"]["name"]] = content
            self._changed()

    def _list(self, timeout: float | None = None) -> None:
        found, version = self._client.list(self._kind, self._labels, timeout=timeout)
        uids = {one["metadata"]["uid"] for one in found}
        with self._lock:
            self._departed += [one for one in self._objects.values() if one["metadata"]["uid"] not in uids]
            self._objects = {one["metadata"]["name"]: one for one in found}
        self._version = version

    def _fail(self, error: TrainingError) -> None:
        with self._lock:
            self._failure = error
        self._changed()
