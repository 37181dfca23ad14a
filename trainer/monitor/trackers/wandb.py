"""Weights & Biases."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.config import TrainingConfig
from trainer.errors import one_line
from trainer.monitor.trackers.sink import numbers, without_secrets
from trainer.timeouts import MonitorTimeouts

Mode = Literal["online", "offline", "disabled"]


class WandbTracker:
    """One Weights & Biases run per worker, in a group with the other workers' runs. A resumed worker continues its run.

    Without WANDB_API_KEY, or with WANDB_MODE=offline, the run is offline: nothing is sent, and `wandb sync` uploads it
    later. With WANDB_MODE=disabled, nothing is stored. If the server does not start the run in time, the run is kept
    offline.
    """

    name = "Weights & Biases"
    retried = False  # its client retries, and keeps everything on disk

    def __init__(
        self,
        config: TrainingConfig,
        worker: int,
        directory: Path,
        warn: Callable[[str], None],
        timeouts: MonitorTimeouts | None = None,
    ) -> None:
        self._config, self._worker, self._directory, self._warn = config, worker, directory, warn
        self._timeouts = timeouts or MonitorTimeouts()

    def begin(self) -> str:
        """Start the run: online if there is a key and the server answers, else offline."""
        self._run = self._begin()
        for unit in ("step", "round"):
            self._run.define_metric(f"{unit}/*", step_metric=f"{unit}/{unit}")
        return "" if self._run.offline or self._run.disabled else str(self._run.url)

    def log(self, events: Sequence[Mapping[str, Any]]) -> None:
        for event in events:
            self._run.log(numbers(event))

    def finish(self, status: str) -> None:
        try:
            self._run.finish(exit_code=int(status == "failed"))
        except TimeoutError:
            directory = Path(self._run.dir).parent
            self._warn(f"{self.name} did not receive everything: `wandb sync {directory}` uploads the rest")

    def _begin(self) -> Any:
        # wandb also reports its own errors to a server, which could keep a finished process from ending
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Do not use the parent process's service, which we could not end if its server hangs
        os.environ.pop("WANDB_SERVICE", None)
        import wandb

        config, limit = self._config, self._timeouts.wandb
        limits: dict[str, Any] = {"init_timeout": limit, "finish_timeout": limit, "finish_timeout_raises": True}
        settings = wandb.Settings(silent=True, console="off", **limits)

        def begin(mode: Mode | None) -> Any:  # None: by wandb's own settings
            return wandb.init(
                project=config.wandb_project_name,
                group=config.wandb_group,
                id=f"{config.wandb_run_id or config.run_id}-{self._worker}",
                name=f"{config.run_id} worker {self._worker}",
                notes=config.experiment_description,
                tags=config.experiment_tags,
                config=config.model_dump(mode="json"),
                dir=str(self._directory),
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
            wandb.teardown()  # otherwise it would reject a second run with the same id
            run = begin("offline")
            reason = without_secrets(one_line(error))
            self._warn(f"{self.name} is kept offline, in {Path(run.dir).parent}: {reason}")
            return run


def _users_mode() -> Mode | None:
    """The mode set by wandb's own environment variables; None if they set none."""
    mode = os.environ.get("WANDB_MODE", "").lower()
    off = any(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in ("WANDB_DISABLED", "WANDB_OFFLINE"))
    if mode in ("disabled", "dryrun", "offline"):
        return "disabled" if mode == "disabled" else "offline"
    return ("disabled" if os.environ.get("WANDB_DISABLED") else "offline") if off else None
