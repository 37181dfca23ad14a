"""The sinks requested by a configuration and the environment."""

from pathlib import Path

from trainer.config import TrainingConfig, given
from trainer.errors import one_line
from trainer.events import EventLog, Sink
from trainer.monitor.trackers import mlflow
from trainer.monitor.trackers.mlflow import MlflowTracker
from trainer.monitor.trackers.sink import Tracker, TrackerSink
from trainer.monitor.trackers.trackio import TrackioTracker
from trainer.monitor.trackers.wandb import WandbTracker
from trainer.timeouts import MonitorTimeouts


def sinks(
    config: TrainingConfig,
    worker: int,
    directory: Path,
    log: EventLog,
    local_rank: int = 0,
    timeouts: MonitorTimeouts | None = None,
) -> list[Sink]:
    """Set up every sink of the configuration. One that cannot be set up is left out, with a warning.

    Args:
        directory: The worker's volume, for an offline run of Weights & Biases.
        log: Receives the reason if a sink is left out or gives up later, and the trackers' links.
        local_rank: The process's rank on its node; each has its own Prometheus port.
    """
    trackers: list[Tracker] = []
    if config.wandb_logging:
        trackers.append(WandbTracker(config, worker, directory, log.warn, timeouts))
    if mlflow.asked_for():
        trackers.append(MlflowTracker(config, worker))
    if config.tracker == "trackio":
        trackers.append(TrackioTracker(config, worker))
    made: list[Sink] = [TrackerSink(tracker, log, timeouts) for tracker in trackers]
    if (port := given(config.metrics_port)) is not None:
        try:
            from trainer.monitor.prometheus import PrometheusSink

            made.append(PrometheusSink(port + local_rank, config.run_id, worker))
        except OSError as error:
            log.warn(f"Prometheus (metrics_port {port + local_rank}) is switched off: {one_line(error)}")
    return made
