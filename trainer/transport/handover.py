"""Transfer of a result (files) from a pod to the pipeline's step, over a transport with a shared token as secret."""

import mmap
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import TrainingError
from trainer.files import whole_directory
from trainer.process import endpoint_of
from trainer.transport.credentials import credentials
from trainer.transport.donor import Donor, Json, Layout, Offer
from trainer.transport.fetch import TransferError
from trainer.transport.fetch import fetch as fetch_buffers
from trainer.transport.files import inside, mapped
from trainer.transport.link import BULK, Link, LinkError
from trainer.transport.stream import Key
from trainer.transport.transport import Transport

TOKEN_VARIABLE = "RESULT_TOKEN"  # in the environment of a pod that serves a result
PATIENCE = 120.0  # seconds for which a fetch retries a server that does not answer
_RESULT, _DONE = "result", "done"  # requests: fetch the result, and confirm that it has arrived
_POD, _STEP = "the pod", "the step"  # ids
_NO_KEY: Key = (0, 0, 0)


class ResultServer:
    """Serves files, by their names in the result, to a client with the token, until it confirms that all arrived.

    It listens on `port` of all interfaces; 0 means any port. A context manager.
    """

    def __init__(self, files: Mapping[str, Path], token: str, port: int) -> None:
        names = {str(index): name for index, name in enumerate(files)}
        self._offer = Offer(names, {index: mapped(files[name]) for index, name in names.items()})
        self._donor = Donor(lambda name: self._offer if name == _RESULT else None)
        self._delivered = threading.Event()
        self._active = time.monotonic()  # time of the last request
        self._transport = Transport(_POD, [], credentials(token.encode()), port=port, handle=self._handle)
        self.port = self._transport.port

    def __enter__(self) -> "ResultServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._transport.close()

    @property
    def delivered(self) -> bool:
        return self._delivered.is_set()

    def wait(self, seconds: float) -> None:
        """Serve until a client confirms that it has everything.

        Raises:
            TrainingError: No client started or continued to fetch it for `seconds`.
        """
        self._active = time.monotonic()
        while not self._delivered.wait(0.2):
            if time.monotonic() > self._active + seconds:
                raise TrainingError(f"no client fetched the result within {seconds:.0f} s")

    def _handle(self, link: Link, key: Key, tag: int, request: dict[str, Any]) -> None:
        self._active = time.monotonic()
        if request.get("find") == _DONE:
            link.reply(key, tag, {})
            self._delivered.set()
        else:
            self._donor(link, key, tag, request)


def fetch(host: str, port: int, token: str, directory: Path, patience: float = PATIENCE) -> None:
    """Fetch all files of a `ResultServer` into a directory, atomically, and confirm. Resumes broken connections.

    Raises:
        TrainingError: The server does not answer, or has another token.
    """
    pod = {_POD: [endpoint_of(host, port)]}
    with Transport(_STEP, [], credentials(token.encode())) as transport, whole_directory(directory) as temporary:

        def files(meta: Json, layout: Layout) -> dict[str, memoryview]:
            """Create the files to receive into."""
            return {index: _created(inside(temporary, name), layout[index][1]) for index, name in meta.items()}

        try:
            fetch_buffers(transport, _RESULT, pod, into=files, timeout=patience)
        except TransferError as error:
            raise TrainingError(f"the result cannot be fetched from {host}: {error}") from None
        with suppress(LinkError, KeyError):  # everything has arrived, even if the confirmation is lost
            transport.prepare(pod, BULK)[_POD].ask(_NO_KEY, 0, {"find": _DONE}).wait(transport.silence)


def _created(path: Path, size: int) -> memoryview:
    """The memory of a new file. Raises OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x+b") as file:
        if not size:
            return memoryview(bytearray())
        os.posix_fallocate(file.fileno(), 0, size)
        return memoryview(mmap.mmap(file.fileno(), size))
