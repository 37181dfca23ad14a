"""Passing the dataset and the model to a joining machine that cannot obtain them itself.

The joiner writes a request to etcd. Only then do the run's machines open a port and serve their files.
"""

import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from trainer import data, models
from trainer.config import TrainingConfig
from trainer.data.manifest import MANIFEST, READY
from trainer.data.progress import Progress
from trainer.elastic import keys
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.files import require_free_space, sha256
from trainer.retry import retrying
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs

if TYPE_CHECKING:
    from trainer.transport.credentials import Credentials
    from trainer.transport.files import SharedDirectories

DATASET = "dataset"  # {hash, revision}: the run's dataset
_WANTED = "wanted/"  # <id>: a joining machine requests files
_SOURCES = "sources/"  # <id>: {endpoints} of a machine that serves them


class Sharing:
    """Serves this machine's dataset and model from a joiner's request until the end of the block.

    Args:
        warn: Called on a thread with the reason if serving has failed and will be tried again.
    """

    def __init__(
        self,
        client: EtcdClient,
        config: TrainingConfig,
        warn: Callable[[str], None],
        timeouts: LaunchTimeouts = LaunchTimeouts(),
    ) -> None:
        self._client, self._config, self._warn, self._timeouts = client, config, warn, timeouts
        self._reason = ""  # of the last attempt that failed
        self._first = worker_configs(config)[0]
        self._volume = Volume.of(self._first)
        self._dataset = data.directory(self._first, self._volume.datasets)
        self._asked, self._over = threading.Event(), threading.Event()
        self._resources = ExitStack()
        self._thread = threading.Thread(target=self._run, name="sharing", daemon=True)

    def __enter__(self) -> Self:
        manifest = data.require_dataset(self._dataset)
        self._client.swap(DATASET, {"hash": manifest.hash, "revision": manifest.revision}, None)
        self._resources.callback(self._client.watch(_WANTED, self._look).close)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._asked.set()
        self._thread.join()
        self._resources.close()

    def _look(self) -> None:
        if self._client.list(_WANTED):
            self._asked.set()

    def _run(self) -> None:
        self._asked.wait()
        attempt = retrying(
            lambda error: isinstance(error, ConfigError | TrainingError | OSError),  # EtcdError is a TrainingError
            first_pause=self._timeouts.share_retry,
            longest_pause=self._timeouts.longest_share_retry,
            stopping=self._over,
            on_retry=self._report,
        )
        if not self._over.is_set():
            with suppress(ConfigError, TrainingError, OSError):  # it is over
                attempt(self._serve)

    def _report(self, error: BaseException) -> None:
        """Warn of a failed attempt, unless the previous one failed for the same reason."""
        if self._reason != str(error):
            self._reason = str(error)
            self._warn(f"a joining machine needs the dataset, but this one cannot serve it: {error}; trying again")

    def _serve(self) -> None:
        # Importing torch takes seconds, so do it only when there is a request
        from trainer.elastic.joining import addresses_of
        from trainer.transport.donor import Donor
        from trainer.transport.transport import Transport

        shared = self._shared
        id = f"files-{uuid.uuid4().hex[:8]}"
        with ExitStack() as resources:
            transport = Transport(
                id,
                addresses_of(self._config),
                _credentials(self._client, self._config),
                port_range=self._config.port_range,
                handle=Donor(shared.find),
            )
            resources.callback(transport.close)
            lease = self._client.lease(self._config.lease_ttl)
            resources.callback(lease.revoke)
            lease.put(f"{_SOURCES}{id}", {"host": socket.gethostname(), "endpoints": transport.endpoints})
            self._resources.enter_context(resources.pop_all())

    @cached_property  # hashed only once, however often serving is tried
    def _shared(self) -> "SharedDirectories":
        """The files, with their hashes. Raises ConfigError or OSError if they cannot be read."""
        from trainer.transport.files import SharedDirectories, SharedFile

        manifest = data.require_dataset(self._dataset)
        model = models.directory(self._config, manifest.for_model, self._volume.models)
        files = {name: SharedFile(record.bytes, record.sha256) for name, record in manifest.files.items()}
        for path in (self._dataset / MANIFEST, self._dataset / READY):
            files[path.name] = SharedFile(path.stat().st_size, sha256(path))
        parts = {
            path.relative_to(model).as_posix(): SharedFile(path.stat().st_size, sha256(path))
            for path in sorted(model.rglob("*"))
            if path.is_file()
        }
        return SharedDirectories({"dataset": (self._dataset, files), "model": (model, parts)})


@dataclass(frozen=True)
class RunOnOtherMachines:
    """The run's dataset and model on other machines: a `trainer.data.Run`."""

    client: EtcdClient
    config: TrainingConfig
    hash: str
    revision: str
    log: Callable[[str], None]
    timeouts: LaunchTimeouts = LaunchTimeouts()

    @classmethod
    def of(cls, client: EtcdClient, config: TrainingConfig, log: Callable[[str], None] = print) -> "Self | None":
        """None if none of the run's machines serves files (for example, pods of a cluster)."""
        entry = client.get(DATASET)
        return cls(client, config, entry.value["hash"], entry.value["revision"], log) if entry else None

    def fetch(self, what: Literal["dataset", "model"], path: Path) -> None:
        """Fetch the dataset or the model from the machines that have it.

        Raises:
            ConfigError: There is not enough space on the disk.
            TrainingError: No machine serves it, or the connections to all of them failed.
        """
        from trainer.transport.files import fetch_files, list_files, present_bytes
        from trainer.transport.transport import Transport

        id = f"joiner-{uuid.uuid4().hex[:8]}"
        with ExitStack() as resources:
            lease = self.client.lease(self.config.lease_ttl)
            resources.callback(lease.revoke)
            lease.put(f"{_WANTED}{id}", {"host": socket.gethostname()})
            own = _credentials(self.client, self.config)
            transport = resources.enter_context(Transport(id, [], own, streams=self.config.streams))
            donors = self._donors(what)
            files = list_files(transport, what, donors, self.timeouts.share)
            total = sum(file.bytes for file in files.values())
            require_free_space(path.parent, total - present_bytes(path), f"{what}_cache_dir")
            with Progress(f"fetching the {what}", total, self.log) as progress:
                fetch_files(transport, what, donors, files, path, progress.update)
            self.log(f"fetched the {what} from the run: {total / 1e6:.1f} MB")

    def _donors(self, what: str) -> dict[str, list[str]]:
        limit = self.timeouts.share

        def waiting() -> None:
            self.log(f"waiting for a machine of the run to offer the {what}")

        found = self.client.wait_for(lambda: self.client.list(_SOURCES) or None, limit, _SOURCES, waiting)
        if not found:
            raise TrainingError(f"no machine of the run offered the {what} within {limit:.0f} s")
        return {key.removeprefix(_SOURCES): entry.value["endpoints"] for key, entry in found.items()}


def _credentials(client: EtcdClient, config: TrainingConfig) -> "Credentials":
    from trainer.transport.credentials import credentials

    return credentials(keys.run_secret(client), config.transport_security, config.transport_certificates)
