"""Changes the number of nodes of a running `launch`; finds a run from outside."""

import json
from contextlib import suppress
from pathlib import Path

from trainer.config import TrainingConfig
from trainer.elastic.keys import verdict
from trainer.errors import ConfigError, TrainingError, one_line
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.files import read_json
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs, worker_roots

LAUNCHED = "launch.json"  # in the run directory: the run's configuration, with the etcd that `launch` has started
DESIRED = "desired"  # {nodes}: the desired number of nodes; `launch` deletes the key to acknowledge it
_TAIL = 65536  # bytes at the end of a metrics file in which the last event lies


def find(config: TrainingConfig) -> TrainingConfig:
    """A configuration with run id and etcd: `config` itself, completed by what `launch` has left in the run directory.

    Raises:
        ConfigError: There is neither; or the directory is not a run's.
    """
    directory = run_directory(config)
    found = _left_behind(directory) if directory else None
    if config.etcd.endpoints:
        if not config.run_id and found is None:
            raise ConfigError("run_id", "", "must name the run (or run_dir its directory)")
        return config if config.run_id or found is None else config.with_values(run_id=found.run_id)
    if directory is None:
        raise ConfigError("run_id", "", "must name the run, with its etcd (etcd.endpoints) or its directory (run_dir)")
    if found is None:
        raise ConfigError("run_dir", directory, "is no directory in which `launch` has run; or name an etcd: --etcd")
    return found.with_values(run_dir=str(directory.absolute()))


def run_directory(config: TrainingConfig) -> Path | None:
    """Where `launch` keeps the run, if that was said."""
    if config.run_dir:
        return Path(config.run_dir)
    return Path("runs") / config.run_id if config.run_id else None


def has_completed(directory: Path) -> bool:
    """Whether a worker below the run directory has ended because the run is complete."""
    for root in worker_roots(directory):
        path = root / "metrics.jsonl"
        if not path.exists():
            continue
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "warning":  # of what has been closed since
                    continue
                if (event["event"], event.get("status")) == ("end", "complete"):
                    return True
            break
    return False


def scale(config: TrainingConfig, nodes: int, timeouts: LaunchTimeouts = LaunchTimeouts()) -> None:
    """Ask a running `launch` for `nodes` nodes.

    The volumes of additional nodes are filled here, from the first node's. If there are to be fewer, those with the
    highest numbers save and leave, and the others continue.

    Args:
        config: Locates the run.
        nodes: The desired number.
        timeouts: `scale_answer` limits the wait for `launch`.

    Raises:
        ConfigError: `nodes` is outside of the run's bounds.
        TrainingError: The run is over or not running, or its `launch` does not answer.
    """
    config = find(config)
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
        _precache(config, nodes)
        client.put(DESIRED, {"nodes": nodes})
        limit = timeouts.scale_answer
        if not client.wait_for(lambda: client.get(DESIRED) is None, limit, DESIRED):
            client.delete(DESIRED)
            raise TrainingError(f"run {config.run_id}: no `launch` answered within {limit:.0f} s")
    print(f"run {config.run_id}: {nodes} node{'s' if nodes > 1 else ''} from now on", flush=True)


def with_nodes(config: TrainingConfig, nodes: int) -> TrainingConfig:
    """The run's configuration with another number of nodes and unchanged bounds."""
    return config.with_values(elastic_min_nodes=config.min_nodes, elastic_max_nodes=config.max_nodes, nodes=nodes)


def _precache(config: TrainingConfig, nodes: int) -> None:
    from trainer.data import precache

    workers = worker_configs(with_nodes(config, nodes))
    for own in workers[config.nodes :]:
        precache(own, Volume.of(own), source=Volume.of(workers[0]).datasets)


def _left_behind(directory: Path) -> TrainingConfig | None:
    path = directory / LAUNCHED
    if not path.exists():
        return None
    try:
        return TrainingConfig.from_tree(read_json(path))
    except (OSError, ValueError) as error:
        raise ConfigError("run_dir", directory, f"its {LAUNCHED} cannot be used: {one_line(error)}") from None
