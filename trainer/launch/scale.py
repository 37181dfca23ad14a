"""Changes the number of nodes of a running `launch`."""

from trainer.config import TrainingConfig
from trainer.elastic.keys import verdict
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.monitor.find_run import find
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs

DESIRED = "desired"  # {nodes}: the desired number of nodes; `launch` deletes the key to acknowledge it


def scale(config: TrainingConfig, nodes: int, timeouts: LaunchTimeouts = LaunchTimeouts()) -> None:
    """Ask a running `launch` for `nodes` nodes.

    The volumes of additional nodes are filled here, from the first node's. If the number decreases, the nodes with the
    highest numbers save and leave, and the others continue.

    Raises:
        ConfigError: `nodes` is outside the run's bounds.
        TrainingError: The run is over or not running, or its `launch` does not respond.
    """
    from trainer.data import precache

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
        workers = worker_configs(with_nodes(config, nodes))
        for own in workers[config.nodes :]:
            precache(own, Volume.of(own), source=Volume.of(workers[0]).datasets)
        client.put(DESIRED, {"nodes": nodes})
        limit = timeouts.scale_answer
        if not client.wait_for(lambda: client.get(DESIRED) is None, limit, DESIRED):
            client.delete(DESIRED)
            raise TrainingError(f"run {config.run_id}: no `launch` responded within {limit:.0f} s")
    print(f"run {config.run_id}: {nodes} node{'s' if nodes > 1 else ''} from now on", flush=True)


def with_nodes(config: TrainingConfig, nodes: int) -> TrainingConfig:
    """The run's configuration with another number of nodes and unchanged bounds."""
    return config.with_values(elastic_min_nodes=config.min_nodes, elastic_max_nodes=config.max_nodes, nodes=nodes)
