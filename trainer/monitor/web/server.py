"""The server of a live page: `GET /`, the files that it loads, and `GET /events`, a stream of server-sent events.

Only the loopback address is accessible without a secret. On other addresses, every path begins with a random token. A
page of another site cannot read anything: there are no CORS headers, and without a token the Host header must name this
machine's loopback, so that a foreign name that resolves to it (DNS rebinding) is rejected.
"""

import contextlib
import errno
import hmac
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from trainer.errors import ConfigError
from trainer.monitor.web.feed import Feed
from trainer.monitor.web.looks import View
from trainer.process import address_of, endpoint_of, loopback
from trainer.timeouts import MonitorTimeouts

MOST_CONNECTIONS = 64
_METHODS = ("GET", "HEAD")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LivePage:
    """Serves a view's page until it is closed; see `serve` for its address."""

    def __init__(self, view: View, address: str, timeouts: MonitorTimeouts | None = None) -> None:
        """Bind the address (host:port).

        Raises:
            ConfigError: It is not an address of this machine, or is in use.
        """
        self._timeouts = timeouts or MonitorTimeouts()
        self._server = _Server(*host_and_port(address))
        self._feed = self._server.feed = Feed(view, self._timeouts)
        self._server.timeouts = self._timeouts
        self._thread = threading.Thread(target=self._server.serve_forever, name="live page server", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The page's URL, with its token if it has one."""
        host, port = self._server.server_address[:2]
        return f"http://{endpoint_of(str(host), int(port))}/{self._server.token + '/' if self._server.token else ''}"

    def close(self, over: bool = True) -> None:
        """Stop serving. If the run is over, viewers keep its last state."""
        self._feed.close(over)
        self._server.drained.wait(self._timeouts.drain)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(over=kind is None or issubclass(kind, Exception))  # otherwise it was interrupted, and may continue


def require_address(address: str) -> None:
    """Raise ConfigError unless a page can be served at the address (host:port) now."""
    _Server(*host_and_port(address)).server_close()


def host_and_port(address: str) -> tuple[str, int]:
    """Split `host:port`, `[host]:port` or `port`. Port 0 means any free one."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError("dashboard", address, "must be host:port")
    return host or loopback(), int(port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    feed: Feed
    timeouts: MonitorTimeouts

    def __init__(self, host: str, port: int) -> None:
        try:
            own = address_of(host)
            self.address_family = socket.AF_INET6 if ":" in own else socket.AF_INET
            super().__init__((own, port), _Handler)
        except OSError as error:
            taken = "the port is used by another process: choose another one, or 0 for any"
            reason = taken if error.errno == errno.EADDRINUSE else f"cannot be served there: {error.strerror}"
            raise ConfigError("dashboard", endpoint_of(host, port), reason) from None
        self.token = "" if ipaddress.ip_address(own).is_loopback else secrets.token_urlsafe(24)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._streams, self._lock = 0, threading.Lock()
        self.drained = threading.Event()  # set while no stream is open
        self.drained.set()

    def process_request(self, request: socket.socket, client_address: Any) -> None:  # type: ignore[override]
        if not self._connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:  # type: ignore[override]
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        with self._lock:
            self._streams += 1
            self.drained.clear()
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1
                if not self._streams:
                    self.drained.set()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors, because a viewer may disconnect at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "diloco", ""

    def setup(self) -> None:
        super().setup()
        self.request.settimeout(self.server.timeouts.viewer)

    def do_GET(self) -> None:
        if not self._host_is_ours():
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, "the page has no such host\n")
        url = urlsplit(self.path)
        name = self._within(url.path)
        if name is None:
            return self._answer(HTTPStatus.NOT_FOUND, "no such page\n")
        from trainer.monitor.web import parts

        if name == "":
            feed = self.server.feed
            return self._answer(HTTPStatus.OK, parts.page(feed.name, feed.parts()), "text/html; charset=utf-8")
        if name == "events" and self.command == "HEAD":
            return self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream"})
        if name == "events":
            return self._stream("narrow" if url.query == "narrow" else "wide")
        for file, kind, content in parts.files():
            if file == name:
                return self._answer(HTTPStatus.OK, content, kind)
        return self._answer(HTTPStatus.NOT_FOUND, "no such page\n")

    do_HEAD = do_GET  # noqa: N815

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):  # any other method
            return self._refuse_method
        raise AttributeError(name)

    def _refuse_method(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n", headers={"Allow": ", ".join(_METHODS)})

    def _within(self, path: str) -> str | None:
        """The path after the token; None if the token is missing."""
        token = self.server.token
        if not token:
            return path.removeprefix("/") if path.startswith("/") else None
        given, slash, name = path.removeprefix("/").partition("/")
        right = hmac.compare_digest(given.encode(), token.encode())
        return name if right and slash else None

    def _host_is_ours(self) -> bool:
        """Whether the Host header names this machine's loopback; with a token, any name is allowed."""
        if self.server.token:
            return True
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return False

    def _answer(
        self,
        status: HTTPStatus,
        content: str | bytes,
        kind: str = "text/plain; charset=utf-8",
        headers: dict[str, str] | None = None,
    ) -> None:
        body = content.encode() if isinstance(content, str) else content
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, width: str) -> None:
        """Send the parts and then their changes, until the viewer disconnects."""
        self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream"})
        feed, revision = self.server.feed, 0
        with self.server.streaming(), feed.watched(width):
            self.wfile.write(b"retry: 2000\n\n")
            while True:
                closed = feed.closed
                revision, parts = feed.newer(revision, width)
                for name, html in parts.items():
                    self._event("part", json.dumps({"id": name, "html": html}))
                self._event("clock", f"{time.time():.1f}")  # also detects whether the viewer is still connected
                if closed:
                    if feed.over:
                        self._event("over", "")
                    return

    def _event(self, kind: str, data: str) -> None:
        self.wfile.write(f"event: {kind}\ndata: {data}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Do not log, because paths contain the token."""
