"""A watch that survives connection losses."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from trainer.etcd.compat import import_etcd3
from trainer.etcd.values import EtcdValues

log = logging.getLogger(__name__)


class Watch:
    """Calls `notify`, on a thread, after changes below a prefix and whenever changes may have been missed.

    `notify` gets no event and reads the current values. When a watch loses its connection, its etcd member or that
    member's leader, a new one replaces it. Each starts at the current revision, so compaction cannot break it.
    """

    def __init__(self, client: EtcdValues, prefix: str, notify: Callable[[], None]) -> None:
        self._client, self._prefix, self._notify = client, (client.prefix + prefix).encode(), notify
        self._ended = threading.Event()
        self._stream: Any = None
        self._thread = threading.Thread(target=self._run, name="etcd-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._ended.set()
        if self._stream is not None:
            self._stream.cancel()

    def _run(self) -> None:
        while not self._ended.is_set():
            connection = None
            try:
                connection = self._client.connection()
                self._follow(connection)
            except Exception as exception:
                if not self._ended.is_set():  # `close` also causes an exception
                    self._client.report_failure(connection, exception)
            self._call_notify()
            self._ended.wait(self._client.timeouts.poll)

    def _call_notify(self) -> None:
        try:
            self._notify()
        except Exception as error:  # `notify` may fail while etcd is unreachable, which must not end the watch
            log.debug("after a change below %s: %s", self._prefix, error)

    def _follow(self, connection: Any) -> None:
        """Watch on one connection until the stream ends."""
        rpc = import_etcd3().etcdrpc
        end = self._prefix[:-1] + bytes([self._prefix[-1] + 1])
        request = rpc.WatchRequest(create_request=rpc.WatchCreateRequest(key=self._prefix, range_end=end))
        stream_ended = threading.Event()

        def requests() -> Iterator[Any]:
            yield request
            stream_ended.wait()  # the server ends the watch when the requests end

        # Without `hasleader`, a member that is cut off from the others keeps the watch open but silent
        metadata = (*(connection.metadata or ()), ("hasleader", "true"))
        self._stream = stream = rpc.WatchStub(connection.channel).Watch(requests(), metadata=metadata)
        stream.add_callback(stream_ended.set)
        if self._ended.is_set():
            stream.cancel()
        # The first response confirms that the watch is active; earlier changes have to be read
        for response in stream:
            if response.canceled:  # permission to read was denied or withdrawn; the stream itself would stay open
                stream.cancel()
                return
            self._call_notify()
