"""The sinks that a configuration asks for, and Weights & Biases as one of them."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from trainer.config import TrainingConfig, given
from trainer.errors import one_line
from trainer.events import EventLog, Sink
from trainer.timeouts import MonitorTimeouts

logger = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]


class WandbSink:
    """One Weights & Biases run for a worker, in a group with the other workers'. A resumed worker continues its run.

    Without WANDB_API_KEY, or with WANDB_MODE=offline, the run is offline: nothing is sent, and `wandb sync` uploads it
    later. With WANDB_MODE=disabled nothing is kept.

    A thread does all the work, so that training never waits for a server. If the server does not let the run begin in
    time, the run is kept offline.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        config: TrainingConfig,
        worker: int,
        directory: Path,
        log: EventLog,
        timeouts: MonitorTimeouts | None = None,
    ) -> None:
        self._log, self._warn = log, log.warn
        self._timeouts = timeouts or MonitorTimeouts()
        self._events: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()  # None: the log is closed
        self._thread = threading.Thread(target=self._work, args=(config, worker, directory), name="wandb", daemon=True)
        self._thread.start()

    def write(self, event: Mapping[str, Any]) -> None:
        if event["event"] in ("step", "round", "eval") and self._thread.is_alive():
            self._events.put(event)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(self._timeouts.wandb_close)
        if self._thread.is_alive():
            self._warn(f"{self.name} does not answer: the worker no longer waits for it")
            self._warn = logger.warning  # the event log is about to close

    def _work(self, config: TrainingConfig, worker: int, directory: Path) -> None:
        try:
            run = self._begin(config, worker, directory)
            if not (run.offline or run.disabled):
                self._log.link(self.name, run.url)
            for unit in ("step", "round"):
                run.define_metric(f"{unit}/*", step_metric=f"{unit}/{unit}")
            for event in iter(self._events.get, None):
                kind = event["event"]
                run.log({f"{kind}/{key}": value for key, value in event.items() if isinstance(value, int | float)})
            try:
                run.finish()
            except TimeoutError:
                self._warn(f"{self.name} did not take everything: `wandb sync {Path(run.dir).parent}` uploads the rest")
        except Exception as error:
            self._warn(f"{self.name} is switched off: {one_line(error)}")

    def _begin(self, config: TrainingConfig, worker: int, directory: Path) -> Any:
        """Return the wandb run: online if there is a key and the server answers, else offline."""
        # wandb reports its own errors to the same server, which would keep a finished process from ending.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # The service of the process that started this one: it is not ours to end if its server hangs.
        os.environ.pop("WANDB_SERVICE", None)
        import wandb

        limit = self._timeouts.wandb
        limits: dict[str, Any] = {"init_timeout": limit, "finish_timeout": limit, "finish_timeout_raises": True}
        settings = wandb.Settings(silent=True, console="off", **limits)

        def begin(mode: Mode | None) -> Any:  # None: as wandb's own settings say
            return wandb.init(
                project=config.wandb_project_name,
                group=config.wandb_group,
                id=f"{config.wandb_run_id or config.run_id}-{worker}",
                name=f"{config.run_id} worker {worker}",
                notes=config.experiment_description,
                tags=config.experiment_tags,
                config=config.model_dump(mode="json"),
                dir=str(directory),
                resume="allow",
                mode=mode,
                settings=settings,
            )

        chosen = _users_mode()
        if chosen in ("offline", "disabled") or not os.environ.get("WANDB_API_KEY"):
            return begin("disabled" if chosen == "disabled" else "offline")
        try:
            return begin(None)  # not "online": it would override `wandb offline` and wandb's settings files
        except Exception as error:
            wandb.teardown()  # it would refuse a second run with the same id
            run = begin("offline")
            self._warn(f"{self.name} is kept offline, in {Path(run.dir).parent}: {one_line(error)}")
            return run


def _users_mode() -> Mode | None:
    """The mode that wandb's own environment variables demand; None if they do not."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    off = any(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in ("WANDB_DISABLED", "WANDB_OFFLINE"))
    if mode in ("disabled", "dryrun", "offline"):
        return "disabled" if mode == "disabled" else "offline"
    return ("disabled" if os.environ.get("WANDB_DISABLED") else "offline") if off else None


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
        directory: The worker's volume, where an offline run of Weights & Biases is kept.
        log: Takes the reason why a sink is left out, or gives up later, and the trackers' links.
        local_rank: The process of the node: each has a Prometheus port of its own.
    """

    def prometheus(port: int) -> Sink:
        from trainer.monitor.prometheus import PrometheusSink

        return PrometheusSink(port, config.run_id, worker)

    wanted: dict[str, Callable[[], Sink]] = {}
    if config.wandb_logging:
        wanted[WandbSink.name] = lambda: WandbSink(config, worker, directory, log, timeouts)
    if port := given(config.metrics_port):
        port += local_rank
        wanted[f"Prometheus (metrics_port {port})"] = lambda: prometheus(port)

    made = []
    for name, make in wanted.items():
        try:
            made.append(make())
        except Exception as error:
            log.warn(f"{name} is switched off: {one_line(error)}")
    return made
