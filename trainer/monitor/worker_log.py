"""The workers' events received by a pipeline step, in files like the workers' own, for progress and reports."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkerEvents:
    """Writes received events to `<directory>/worker-<i>/metrics.jsonl`. `processes` is the number of workers a node."""

    def __init__(self, directory: Path, processes: int) -> None:
        self._directory, self._processes = directory, processes
        self._lock = threading.Lock()
        self._newest: dict[int, tuple[int, int]] = {}

    def path(self, number: int) -> Path:
        return self._directory / f"worker-{number}" / "metrics.jsonl"

    def write(self, worker: int, received: Mapping[str, Any]) -> None:
        """Keep an event of one of a node's workers, which its `local_rank` identifies."""
        number = worker * self._processes + int(received.get("local_rank", 0))
        event = {name: value for name, value in received.items() if name != "local_rank"}
        with self._lock:
            if event.get("event") == "checkpoint":
                self._newest[number] = (event["round"], event["step"])
            path = self.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def newest_checkpoints(self) -> dict[int, tuple[int, int]]:
        """The round and step of each worker's newest checkpoint, by its number."""
        with self._lock:
            return dict(self._newest)
