"""`python -m trainer launch`: a whole run on this machine, with an etcd, a torchrun agent per node, and a dashboard."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.config import UNSET, TrainingConfig
from trainer.elastic import keys
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.files import require_writable, write_json
from trainer.launch.admission import admitting
from trainer.launch.agents import Agents
from trainer.launch.listening import Listening, outlast_others
from trainer.launch.run_directory import locked, say, summarise
from trainer.launch.scale import request_key
from trainer.launch.sharing import Sharing
from trainer.launch.token import DEFAULT_TTL
from trainer.monitor.find_run import LAUNCHED
from trainer.process import loopback
from trainer.timeouts import LaunchTimeouts
from trainer.volume import Volume, worker_configs

MOST_NODES = 64  # the limit of `elastic.max_nodes`, and its default for a launch that listens


def launch(
    config: TrainingConfig,
    command: list[str] | None = None,
    timeouts: LaunchTimeouts = LaunchTimeouts(),
    *,
    listen: str = "",
    ttl: int = DEFAULT_TTL,
    joins: bool = False,
    dashboard: str | None = None,
    log: Callable[[str], None] = say,
) -> int:
    """Run `config.nodes` nodes on this machine until the run is complete. Must run on the main thread (signals).

    On SIGTERM or Ctrl-C the workers save and leave; a second signal kills them.

    Args:
        config: The run's configuration. The run resumes if its run id has checkpoints.
        command: The worker's command; None for this package's training.
        listen: Address (host, host:port) at which other machines reach the run's etcd and workers; empty: that of an
            earlier launch of the run, if there was one. With `etcd.endpoints`, it is for the workers only.
        ttl: For how long the printed token is valid, in seconds.
        joins: Whether the run started elsewhere, and this machine is one of several.
        dashboard: host:port at which to serve the run's live page; None: do not serve it.
        log: Prints a line if standard output is not a terminal.

    Returns:
        0: the run is complete.

    Raises:
        ConfigError: Bad input; nothing has been started.
        TrainingError: The run has failed; with the reason.
        KeyboardInterrupt, Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    # Check everything before anything starts
    config, listening = _resolved(config, listen)
    run_dir = Path(config.run_dir)
    if command is None and _has_final_checkpoint(config):
        log(f"run {config.run_id} is already complete: {run_dir}")
        return 0
    config = _checked(config, command)
    with ExitStack() as resources:
        resources.enter_context(locked(run_dir))
        resources.enter_context(_live_page(run_dir, dashboard, log))
        etcd, config = _etcd(config, listening, resources)
        client = resources.enter_context(EtcdClient.of(config))
        if etcd is None and keys.verdict(client).status == "succeeded":
            log(f"run {config.run_id} is already complete, on other machines")
            return 0
        if not joins:
            _reset(client, etcd, listening)
        write_json(run_dir / LAUNCHED, config.model_dump(mode="json"))  # `status` and `scale` find the run by it
        if command is None and (listening or etcd is None):
            _admit_others(config, client, resources, None if joins else ttl, log)
        # Run the agents
        client.delete(request_key(run_dir))  # left over from an earlier launch whose process had the same id
        agents = Agents(config, client, etcd, command, timeouts, joins=joins, log=log)
        resources.callback(summarise, run_dir, log)
        if listening:
            resources.callback(outlast_others, client, config)
        return agents.follow()


def _resolved(config: TrainingConfig, listen: str) -> tuple[TrainingConfig, Listening | None]:
    """The completed configuration, and where the launch listens. Raises ConfigError."""
    config = config.resolved()
    run_dir = Path(config.run_dir).absolute()
    config = config.with_values(run_dir=str(run_dir))
    listening = Listening.of(config, run_dir, listen)
    if (listen or listening) and config.elastic.max_nodes == UNSET:
        config = config.with_values(elastic_max_nodes=MOST_NODES)
    if not listening and not config.etcd.endpoints and config.nodes < config.min_nodes:
        allowed = f"must be at least elastic.min_nodes ({config.min_nodes}), unless others can join (--listen, --etcd)"
        raise ConfigError("nodes", config.nodes, allowed)
    return config, listening


def _has_final_checkpoint(config: TrainingConfig) -> bool:
    """Whether a worker of this machine has reached the end. One suffices: no worker writes it before all are there."""
    from trainer import checkpoint

    return any(checkpoint.is_complete(Volume.of(worker).checkpoints) for worker in worker_configs(config))


def _checked(config: TrainingConfig, command: list[str] | None) -> TrainingConfig:
    """Check that the run can start here; a relative path of the model becomes absolute. Raises ConfigError."""
    from trainer import models
    from trainer.launch import preflight

    if command is not None:
        preflight.check_network(config)
    else:
        preflight.check(config, precached=True)
        config = models.with_absolute_model(config)
    require_writable(Path(config.run_dir), "run_dir")
    return config


@contextmanager
def _live_page(run_dir: Path, address: str | None, log: Callable[[str], None]) -> Iterator[None]:
    """Serve the run's live page at this address; None: do not serve it."""
    if address is None:
        yield
        return
    from trainer.monitor.web.looks import DirectoryView
    from trainer.monitor.web.server import LivePage

    with LivePage(DirectoryView(run_dir), address) as page:
        log(f"dashboard: {page.url}")
        yield


def _etcd(
    config: TrainingConfig, listening: Listening | None, resources: ExitStack
) -> tuple[EmbeddedEtcd | None, TrainingConfig]:
    """Start an etcd unless one is given. Returns it, and the configuration with its endpoint."""
    if listening:
        return resources.enter_context(listening.etcd(config, Path(config.run_dir)))
    if config.etcd.endpoints:
        return None, config
    directory = Path(config.run_dir) / "etcd"
    etcd = resources.enter_context(EmbeddedEtcd(directory, loopback(), port_range=config.port_range))
    return etcd, config.with_values(etcd_endpoints=[etcd.endpoint])


def _reset(client: EtcdClient, etcd: EmbeddedEtcd | None, listening: Listening | None) -> None:
    """Remove a previous launch's keys from etcd, and open the run."""
    if listening:
        keys.free_dead_slots(client)
    if etcd is not None and not (listening and client.list("slots/")):
        keys.forget_processes(client)  # only this run uses this etcd, so its live keys belong to dead processes
    keys.reopen(client)


def _admit_others(
    config: TrainingConfig, client: EtcdClient, resources: ExitStack, ttl: int | None, log: Callable[[str], None]
) -> None:
    """Share the run with other machines, and print how one joins; `ttl` is None if the run started elsewhere."""
    keys.record_config(client, config)
    resources.enter_context(Sharing(client, config, lambda reason: log(f"warning: {reason}")))
    if ttl is not None and config.max_nodes > config.nodes:
        resources.enter_context(admitting(config, Path(config.run_dir), ttl, log))
