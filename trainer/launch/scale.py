"""Changes the number of nodes of a running `launch`."""

import threading
from pathlib import Path

from trainer.config import TrainingConfig
from trainer.elastic.keys import verdict
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.etcd.watch import Watch
from trainer.launch.run_directory import holder_of
from trainer.monitor.find_run import find, run_directory
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs

# <launch>: {nodes}, the desired number of nodes. That launch deletes the key when its nodes have started, or adds
# `failure`, the reason why they have not
_DESIRED = "desired/"


def scale(config: TrainingConfig, nodes: int, timeouts: LaunchTimeouts = LaunchTimeouts()) -> None:
    """Ask the `launch` that runs in a run directory for `nodes` nodes; other launches of the run keep theirs.

    The volumes of additional nodes are filled here, from the first node's. If the number decreases, the nodes with the
    highest numbers save and leave, and the others continue.

    Raises:
        ConfigError: `nodes` is outside the run's bounds, or no `launch` has run in the directory.
        TrainingError: The run is over or not running, or its `launch` does not respond or cannot start the nodes.
    """
    from trainer.data import precache

    # Check the number against the bounds of the run that is launched here
    directory, config = run_directory(config), find(config)
    if directory is None or not holder_of(directory):
        raise ConfigError("run_dir", directory or "", "must be the directory of a `launch`")
    config = config.with_values(run_dir=str(directory.absolute()))
    low, high = config.min_nodes, config.max_nodes
    if not low <= nodes <= high:
        allowed = f"must be from elastic.min_nodes ({low}) to elastic.max_nodes ({high}), the run's bounds"
        raise ConfigError("nodes", nodes, allowed)
    with EtcdClient.of(config) as client:
        try:
            result = verdict(client)
        except EtcdError as error:
            raise TrainingError(f"run {config.run_id} is not running: {error}") from None
        if result.terminal:
            raise TrainingError(str(result))
        # Fill the volumes before the nodes start, so that a lack of data or space starts none
        workers = worker_configs(with_nodes(config, nodes))
        for own in workers[config.nodes :]:
            precache(own, Volume.of(own), source=Volume.of(workers[0]).datasets)
        # Ask the `launch`, and take the request back if there is no response
        key, limit = request_key(directory), timeouts.scale_answer
        client.put(key, {"nodes": nodes})

        def response() -> str | None:
            """Why it failed; "" if it did not; None if there is no response yet."""
            request = client.get(key)
            return "" if request is None else request.value.get("failure")

        failure = client.wait_for(response, limit, key)
        if failure != "":
            client.delete(key)
            raise TrainingError(f"run {config.run_id}: {failure or f'no `launch` responded within {limit:.0f} s'}")
    print(f"run {config.run_id}: {nodes} node{'s' if nodes > 1 else ''} from now on", flush=True)


def request_key(run_dir: Path) -> str:
    """The key of requests to the launch that uses a run directory."""
    return f"{_DESIRED}{holder_of(run_dir)}"


class ScaleRequests:
    """The requests of `scale`, as the `launch` that uses a run directory sees them."""

    def __init__(self, client: EtcdClient, run_dir: Path) -> None:
        self._client, self._key = client, request_key(run_dir)
        self._arrived = threading.Event()  # there may be a request

    def watch(self) -> Watch:
        """Notice requests, until it is closed."""
        return self._client.watch(self._key, self._arrived.set)

    @property
    def has_arrived(self) -> bool:
        """Whether there may be a request."""
        return self._arrived.is_set()

    def take(self) -> tuple[int, int] | None:
        """The request, as the number of nodes and its revision for `respond`; None if there is none."""
        self._arrived.clear()
        try:
            request = self._client.get(self._key)
        except EtcdError:
            self._arrived.set()  # try again next time
            return None
        if request is None or "failure" in request.value:  # `scale` has not read that response yet
            return None
        return int(request.value["nodes"]), request.revision

    def respond(self, nodes: int, revision: int, failure: str) -> None:
        """Tell `scale` that its request is fulfilled, or why it is not. A newer request stays."""
        try:
            if failure:
                self._client.swap(self._key, {"nodes": nodes, "failure": failure}, revision)
            else:
                self._client.delete(self._key, revision)
        except EtcdError:
            self._arrived.set()  # take it again: fulfilling it twice does no harm


def with_nodes(config: TrainingConfig, nodes: int) -> TrainingConfig:
    """The run's configuration with another number of nodes and unchanged bounds."""
    return config.with_values(elastic_min_nodes=config.min_nodes, elastic_max_nodes=config.max_nodes, nodes=nodes)
