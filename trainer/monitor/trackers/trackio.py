"""trackio: https://github.com/gradio-app/trackio"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import TrainingConfig
from trainer.monitor.trackers.sink import numbers, step_of


class TrackioTracker:
    """One trackio run per worker, in the training's group. A resumed worker continues its run.

    It is stored on this machine (see `trackio show`), on the Space of TRACKIO_SPACE_ID or the server of
    TRACKIO_SERVER_URL. x axes are steps of the schedule.
    """

    name = "trackio"
    retried = True

    def __init__(self, config: TrainingConfig, worker: int) -> None:
        self._config, self._worker = config, worker

    def begin(self) -> str:
        import trackio

        self._run = trackio.init(
            project=self._config.wandb_project_name,
            name=f"{self._config.run_id}-{self._worker}",
            group=self._config.run_id,
            config=self._config.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if space := os.environ.get("TRACKIO_SPACE_ID"):
            return f"https://huggingface.co/spaces/{space}"
        return os.environ.get("TRACKIO_SERVER_URL", "").partition("?")[0]  # the query is its write token

    def log(self, events: Sequence[Mapping[str, Any]]) -> None:
        for event in events:
            self._run.log(numbers(event), step=step_of(event))

    def finish(self, status: str) -> None:
        self._run.finish()
