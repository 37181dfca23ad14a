"""Hands a result over from a pod to the pipeline's step: files over HTTP, authenticated by a shared token.

The token itself is never sent. It signs each request (HMAC-SHA256 over method, path and a fresh nonce) and the list of
files with their hashes, which authenticates the server; each file is compared with its hash. The files are
authenticated and complete but not encrypted, like all traffic between pods here.
"""

import hashlib
import hmac
import http.client
import json
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from trainer.errors import TrainingError, one_line
from trainer.files import sha256, whole_directory
from trainer.retry import retrying

TOKEN_VARIABLE = "RESULT_TOKEN"  # in the environment of a pod that serves a result
PATIENCE = 120.0  # seconds for which a fetch retries a server that does not answer
_LIST, _DONE, _FILE = "/files", "/done", "/file/"
_NONCE, _SIGNATURE = "X-Nonce", "X-Signature"
_CHUNK = 1 << 20
_T = TypeVar("_T")


class ResultServer(ThreadingHTTPServer):
    """Serves files, by their names in the result, to clients that have the token, until one confirms that all arrived.

    It listens on `port`; 0 takes any.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, Path], token: str, port: int) -> None:
        self.files, self.token = dict(files), token.encode()
        entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        self.listing = json.dumps(entries).encode()
        self.delivered = False
        self.active = time.monotonic()  # time of the last authenticated request or sent chunk
        # A cluster's pods may have IPv6 addresses only. "::" accepts IPv4, too, with IPV6_V6ONLY off.
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def wait(self, seconds: float) -> None:
        """Serve until a client confirms that it has everything.

        Raises:
            TrainingError: No client has started or continued to fetch it for `seconds`.
        """
        self.timeout, self.active = 0.2, time.monotonic()
        while not self.delivered:
            if time.monotonic() > self.active + seconds:
                raise TrainingError(f"no client fetched the result within {seconds:.0f} s")
            self.handle_request()


class _Handler(BaseHTTPRequestHandler):
    server: ResultServer
    timeout = 60  # seconds of silence of the client

    def do_GET(self) -> None:
        if not self._signed():
            return None
        if self.path == _LIST:
            return self._answer(200, self.server.listing)
        path = self.server.files.get(unquote(self.path.removeprefix(_FILE)))
        if path is None or not self.path.startswith(_FILE):
            return self._answer(404, b"")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        with path.open("rb") as file:
            file.seek(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(path.stat().st_size - start))
            self.end_headers()
            while part := file.read(_CHUNK):
                self.wfile.write(part)
                self.server.active = time.monotonic()
        return None

    def do_POST(self) -> None:
        if self._signed():
            self._answer(200, b"")
            self.server.delivered = self.path == _DONE  # after the answer, because the process may end now

    def _signed(self) -> bool:
        """Whether the client has the token; sends a refusal if not."""
        given, nonce = self.headers.get(_SIGNATURE, ""), self.headers.get(_NONCE, "")
        ours = _sign(self.server.token, self.command, self.path, nonce)
        if nonce and hmac.compare_digest(given.encode(), ours.encode()):
            self.server.active = time.monotonic()
            return True
        self._answer(403, b"")
        return False

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(_SIGNATURE, _sign(self.server.token, str(status), self.headers.get(_NONCE, ""), body.decode()))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def fetch(host: str, port: int, token: str, directory: Path, patience: float = PATIENCE) -> None:
    """Fetch all files of a `ResultServer` into a directory, atomically, and confirm it. Broken connections resume.

    Raises:
        TrainingError: The server does not answer or has another token, or a file does not match its hash.
    """
    remote = _Remote(host, port, token.encode(), patience)
    listing = json.loads(remote.read("GET", _LIST))
    with whole_directory(directory) as temporary:
        for name, entry in listing.items():
            path = temporary / name
            if not path.resolve().is_relative_to(temporary.resolve()):
                raise TrainingError(f"the pod at {host} offers a file outside of the result: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            remote.download(name, path, entry["bytes"])
            if sha256(path) != entry["sha256"]:
                raise TrainingError(f"{name} differs from the file of the pod at {host}: its hash does not match")
    with suppress(TrainingError):  # everything has arrived, whether or not the server learns of it
        _Remote(host, port, token.encode(), 0).read("POST", _DONE)


class _Remote:
    """The server, which may be unreachable for a while."""

    def __init__(self, host: str, port: int, token: bytes, patience: float) -> None:
        self._host, self._port, self._token, self._patience = host, port, token, patience

    def read(self, method: str, path: str) -> bytes:
        """A complete, signed answer."""

        def read() -> bytes:
            nonce = secrets.token_hex(16)
            with self._ask(method, path, nonce) as response:
                body = response.read()
            signature = _sign(self._token, str(response.status), nonce, body.decode())
            if not hmac.compare_digest(response.headers.get(_SIGNATURE, ""), signature):
                raise TrainingError(f"the server at {self._host} is not the run's pod: its signature is wrong")
            return body

        return self._trying(read)

    def download(self, name: str, path: Path, size: int) -> None:
        """Append to `path` what is missing."""

        def download() -> None:
            path.touch()
            if (have := path.stat().st_size) == size:
                return
            with (
                self._ask("GET", _FILE + quote(name), secrets.token_hex(16), have) as response,
                path.open("ab") as file,
            ):
                shutil.copyfileobj(response, file, _CHUNK)
            if path.stat().st_size < size:
                raise OSError(f"{name} is incomplete")

        self._trying(download)

    @contextmanager
    def _ask(self, method: str, path: str, nonce: str, start: int = 0) -> Iterator[http.client.HTTPResponse]:
        headers = {_NONCE: nonce, _SIGNATURE: _sign(self._token, method, path, nonce)}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        with closing(http.client.HTTPConnection(self._host, self._port, timeout=30)) as connection:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            if response.status == 403:
                raise TrainingError(f"the pod at {self._host} refuses this run's token: it belongs to another attempt")
            if response.status >= 400:
                raise TrainingError(f"the pod at {self._host} has no {path} ({response.status})")
            yield response

    def _trying(self, operation: Callable[[], _T]) -> _T:
        def is_transient(error: BaseException) -> bool:
            return isinstance(error, OSError | http.client.HTTPException)

        try:
            return retrying(is_transient, patience=self._patience, longest_pause=1.0)(operation)
        except (OSError, http.client.HTTPException) as error:
            raise TrainingError(f"the result cannot be fetched from {self._host}: {one_line(error)}") from None


def _sign(token: bytes, *parts: str) -> str:
    return hmac.new(token, "\n".join(parts).encode(), hashlib.sha256).hexdigest()
