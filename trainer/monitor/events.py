"""What a worker tells of itself: `metrics.jsonl`, Weights & Biases and Prometheus.

`metrics.jsonl` is the record that everything else reads: one JSON object a line, flushed as it happens. `event` is one
of start, step, round, eval, checkpoint, membership, warning and end, `time` is in Unix seconds. Numbers that JSON does
not have (NaN, infinities) are null.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from trainer.config import TrainingConfig, given
from trainer.errors import one_line

logger = logging.getLogger(__name__)

WANDB_TIMEOUT = 10.0  # seconds for the server of Weights & Biases to let a run begin, and to take the rest at its end
WANDB_CLOSE_TIMEOUT = 25.0  # seconds for all of it, if the training ends before the run could begin


class Sink(Protocol):
    """Something else that takes events."""

    name: str

    def write(self, event: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes events to a file, and to sinks that may fail without harm.

    Attributes:
        sinks: Those that take events; one that fails is taken out, with a warning.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self.sinks: list[Sink] = []
        self._lock = threading.Lock()  # checkpoints report from a thread of their own

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. `time` is added."""
        record = {"event": event, **{key: _plain(value) for key, value in fields.items()}, "time": time.time()}
        with self._lock:
            self._file.write(json.dumps(record, allow_nan=False, default=str) + "\n")
            self._file.flush()
            warnings = [warning for sink in list(self.sinks) if (warning := self._tell(sink, record))]
        for warning in warnings:
            self.warn(warning)

    def warn(self, message: str) -> None:
        """Log a warning, and keep it as an event."""
        logger.warning(message)
        self.write("warning", message=message)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self._file.close()

    def _tell(self, sink: Sink, record: Mapping[str, Any]) -> str:
        """Why the sink is told no more; "" if it took the event."""
        try:
            sink.write(record)
        except Exception as error:
            self.sinks.remove(sink)
            return f"{sink.name} is switched off: {one_line(error)}"
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WandbSink:
    """One Weights & Biases run for a worker, grouped with the others'; resumes under the same id.

    Offline without WANDB_API_KEY: nothing is asked and nothing is sent. (`wandb sync` uploads what was kept.)

    A thread does all of it, so that training never waits for a server; one that does not let the run begin is given up,
    and the run is kept offline.
    """

    name = "Weights & Biases"

    def __init__(self, config: TrainingConfig, worker: int, directory: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._events: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()  # None: there are no more
        self._thread = threading.Thread(target=self._work, args=(config, worker, directory), name="wandb", daemon=True)
        self._thread.start()

    def write(self, event: Mapping[str, Any]) -> None:
        if event["event"] in ("step", "round", "eval") and self._thread.is_alive():
            self._events.put(event)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(WANDB_CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._warn(f"{self.name} does not answer: it is not waited for any longer")
            self._warn = logger.warning  # where the others go is closed by then

    def _work(self, config: TrainingConfig, worker: int, directory: Path) -> None:
        try:
            run = self._begin(config, worker, directory)
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
        """The run, as wandb has it: online if there is a key and the server answers."""
        # wandb's reports of its own errors would go to the same server, and keep a finished process from ending.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.pop("WANDB_SERVICE", None)  # of who started this process: not ours to end, if its server hangs
        import wandb

        def begin(mode: Literal["online", "offline"]) -> Any:
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
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=WANDB_TIMEOUT,
                    finish_timeout=WANDB_TIMEOUT,
                    finish_timeout_raises=True,
                ),
            )

        if not os.environ.get("WANDB_API_KEY"):
            return begin("offline")
        try:
            return begin("online")
        except Exception as error:
            wandb.teardown()  # it would take the same id for a second run
            run = begin("offline")
            self._warn(f"{self.name} is kept offline, in {Path(run.dir).parent}: {one_line(error)}")
            return run


def sinks(
    config: TrainingConfig, worker: int, directory: Path, warn: Callable[[str], None], local_rank: int = 0
) -> list[Sink]:
    """The sinks that the configuration asks for; `warn` is told of one that cannot be set up, and is left out."""
    made: dict[str, Callable[[], Sink]] = {}
    if config.wandb_logging:
        made[WandbSink.name] = lambda: WandbSink(config, worker, directory, warn)
    if port := given(config.metrics_port):
        made[f"Prometheus (metrics_port {port + local_rank})"] = lambda: _prometheus(
            port + local_rank, config.run_id, worker
        )
    found = []
    for name, make in made.items():
        try:
            found.append(make())
        except Exception as error:
            warn(f"{name} is switched off: {one_line(error)}")
    return found


def _prometheus(port: int, run_id: str, worker: int) -> Sink:
    from trainer.monitor.prometheus import PrometheusSink

    return PrometheusSink(port, run_id, worker)


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(path: Path) -> None:
    """A process that was killed may have left half a line: end it, so that the next event has a line of its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
