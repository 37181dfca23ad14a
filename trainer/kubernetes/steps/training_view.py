"""The progress of a training on a cluster, as shown to people: from the workers' events in their pods' logs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from trainer.kubernetes import pod_main
from trainer.kubernetes.objects.plan import Plan, WorkerPlan
from trainer.kubernetes.steps.job_follower import Message, Say
from trainer.monitor.dashboard import Board, View, view
from trainer.monitor.progress import WorkerProgress, fill
from trainer.monitor.worker_log import WorkerEvents


class TrainingView:
    """Keeps the workers' events and shows where the run is. As a context manager it owns the terminal.

    Args:
        directory: Takes the events: `worker-<i>/metrics.jsonl`.
        say: Prints a line.
    """

    def __init__(self, plan: Plan, directory: Path, say: Say) -> None:
        self._plan, self._say = plan, say
        self._processes = plan.config.elastic.nproc_per_node
        self._by_pod = {worker.pod: worker for worker in plan.workers}
        self._events = WorkerEvents(directory, self._processes)
        self._progress = [
            WorkerProgress(number, self._events.path(number)) for number in range(len(plan.workers) * self._processes)
        ]
        self._board = Board(plan.config.total_steps)
        self._view: View | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self._view = self._resources.enter_context(view(self._board, self._say))
        return self

    def __exit__(self, *exception: object) -> None:
        self._view = None
        self._resources.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._view is not None:
            self._view.show(text)
        else:
            self._say(text)

    def keep(self, messages: Sequence[Message]) -> None:
        """Keep the events among the pods' messages."""
        for message in messages:
            worker = self._by_pod.get(message.pod["metadata"]["name"])
            if worker is not None and message.word == pod_main.METRICS:
                self._events.write(worker.index, message.content)

    def refresh(self, silent: Mapping[str, float], running: Sequence[str]) -> None:
        """Show what the events say. The state of silent workers is outdated: the others tell where the run is.

        Args:
            silent: Pods from which no news arrives: since when, in Unix seconds.
            running: All pods that run.
        """
        for worker in self._plan.workers:
            for progress in self._progress_of(worker):
                progress.silent = worker.pod in silent
        heard = set(running) - silent.keys()
        self._board.silent_since = None if heard or not silent else min(silent.values())
        for progress in self._progress:
            for event in progress.update():
                if event["event"] == "end" and event["status"] == "failed":
                    self.say(f"worker {progress.number} ended: {event['reason']}")
        fill(self._board, self._progress)
        if self._view is not None:
            self._view.refresh()

    def by_checkpoint(self) -> tuple[int, ...]:
        """The workers' indices, those with the newest checkpoints first."""
        newest = self._events.newest_checkpoints()
        versions = {
            worker.index: max(newest.get(progress.number, (-1, -1)) for progress in self._progress_of(worker))
            for worker in self._plan.workers
        }
        return tuple(sorted(versions, key=lambda index: versions[index], reverse=True))

    def _progress_of(self, worker: WorkerPlan) -> Sequence[WorkerProgress]:
        return self._progress[worker.index * self._processes : (worker.index + 1) * self._processes]
