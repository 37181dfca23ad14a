"""The sinks that a configuration asks for."""

from collections.abc import Callable
from pathlib import Path

from trainer.config import TrainingConfig, given
from trainer.errors import one_line
from trainer.monitor.events import Sink
from trainer.monitor.wandb_sink import WandbSink
from trainer.timeouts import MonitorTimeouts


def sinks(
    config: TrainingConfig,
    worker: int,
    directory: Path,
    warn: Callable[[str], None],
    local_rank: int = 0,
    timeouts: MonitorTimeouts | None = None,
) -> list[Sink]:
    """Set up every sink of the configuration. One that cannot be set up is left out, with a warning.

    Args:
        directory: The worker's volume, where an offline run of Weights & Biases is kept.
        warn: Called with the reason why a sink is left out, or gives up later.
        local_rank: The process of the node: each has a Prometheus port of its own.
    """
    timeouts = timeouts or MonitorTimeouts()

    def prometheus(port: int) -> Sink:
        from trainer.monitor.prometheus import PrometheusSink

        return PrometheusSink(port, config.run_id, worker)

    wanted: dict[str, Callable[[], Sink]] = {}
    if config.wandb_logging:
        wanted[WandbSink.name] = lambda: WandbSink(config, worker, directory, warn, timeouts)
    if port := given(config.metrics_port):
        port += local_rank
        wanted[f"Prometheus (metrics_port {port})"] = lambda: prometheus(port)

    made = []
    for name, make in wanted.items():
        try:
            made.append(make())
        except Exception as error:
            warn(f"{name} is switched off: {one_line(error)}")
    return made
