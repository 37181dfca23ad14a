"""A run that somebody else has started, as seen and asked from outside: where its etcd is, how it ended, `scale`."""

from trainer.config import TrainingConfig
from trainer.elastic.keys import verdict
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient, EtcdError
from trainer.monitor.find_run import find
from trainer.volume import Volume, worker_configs

WANTED = "wanted"  # {nodes}: how many nodes `launch` shall run; it deletes the key when it has taken it in
ANSWER_TIMEOUT = 15.0  # seconds in which a launch that runs has taken it in


def scale(config: TrainingConfig, nodes: int) -> None:
    """Ask a running `launch` for `nodes` nodes. The volumes of new ones are precached here, from the first one's.

    Fewer: those with the highest numbers are told to leave; they save, and the others go on.

    Raises:
        ConfigError: The run does not allow as many, or as few.
        TrainingError: The run is not running, or over; or its `launch` does not answer.
    """
    config = find(config)
    low, high = config.min_nodes, config.max_nodes
    if not low <= nodes <= high:
        allowed = f"must be from elastic.min_nodes ({low}) to elastic.max_nodes ({high}), as the run was started with"
        raise ConfigError("nodes", nodes, allowed)
    with EtcdClient.of(config) as client:
        try:
            result = verdict(client)
        except EtcdError as error:
            raise TrainingError(f"run {config.run_id} is not running: {error}") from None
        if result.terminal:
            raise TrainingError(str(result))
        _precache(config, nodes)
        client.put(WANTED, {"nodes": nodes})
        if not client.wait_for(lambda: client.get(WANTED) is None, ANSWER_TIMEOUT, WANTED):
            client.delete(WANTED)
            raise TrainingError(f"run {config.run_id}: no `launch` has answered within {ANSWER_TIMEOUT:.0f} s")
    print(f"run {config.run_id}: {nodes} node{'s' if nodes > 1 else ''} from now on", flush=True)


def with_nodes(config: TrainingConfig, nodes: int) -> TrainingConfig:
    """The run's configuration with another number of nodes, within the bounds that it was started with."""
    return config.with_values(elastic_min_nodes=config.min_nodes, elastic_max_nodes=config.max_nodes, nodes=nodes)


def _precache(config: TrainingConfig, nodes: int) -> None:
    from trainer.data import precache

    workers = worker_configs(with_nodes(config, nodes))
    for own in workers[config.nodes :]:
        precache(own, Volume.of(own), source=Volume.of(workers[0]).datasets)
