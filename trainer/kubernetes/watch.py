"""A mirror of some of the API's objects that follows them: what client-go calls an informer.

One lists, and watches from the list's version on. A watch ends now and then, breaks, or is told that its version is too
old (410): then one watches again from the last version, or lists again. What the list has no more is gone, so that no
deletion is missed however long nobody watched.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from trainer.errors import TrainingError
from trainer.kubernetes.client import LIVED, PASSING, RETRY_INTERVAL, ApiError, Client, Kind, Object

logger = logging.getLogger(__name__)


class Mirror:
    """The objects of one kind that a selector selects, as they are now. Use it as a context manager.

    Args:
        labels: The label selector.
        changed: Called, from a thread, after each change.
    """

    def __init__(self, client: Client, kind: Kind, labels: str, changed: Callable[[], None]) -> None:
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
        answered = time.monotonic()
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                if not self._version:
                    self._list()
                    self._changed()
                began = time.monotonic()
                self._watch()
                answered = time.monotonic()
            except ApiError as error:
                if time.monotonic() - began > LIVED:  # it was watching until now
                    answered = time.monotonic()
                if error.status == 410:
                    self._version = ""
                elif error.status not in PASSING or time.monotonic() - answered > self._client.patience:
                    self._fail(error)
                    return
                else:
                    logger.debug("watching %s again: %s", self._kind.plural, error)
                    self._closed.wait(RETRY_INTERVAL)
            except Exception as error:  # whoever waits for this thread must not wait for ever
                self._fail(TrainingError(f"{self._kind.plural} cannot be followed: {error!r}"))
                return

    def _watch(self) -> None:
        for event in self._client.watch(self._kind, self._version, self._labels):
            if self._closed.is_set():
                return
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

    def _list(self) -> None:
        found, version = self._client.list(self._kind, self._labels)
        uids = {one["metadata"]["uid"] for one in found}
        with self._lock:
            self._departed += [one for one in self._objects.values() if one["metadata"]["uid"] not in uids]
            self._objects = {one["metadata"]["name"]: one for one in found}
        self._version = version

    def _fail(self, error: TrainingError) -> None:
        with self._lock:
            self._failure = error
        self._changed()
