"""The progress of a training on a cluster, as shown to people: from the workers' events in their pods' logs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.kubernetes import pod_main
from trainer.kubernetes.objects.plan import Plan, WorkerPlan
from trainer.kubernetes.steps.job_follower import Message
from trainer.monitor.dashboard import Dashboard, View
from trainer.monitor.progress import WorkerProgress, fill
from trainer.monitor.worker_log import WorkerEvents


class TrainingView:
    """Writes the workers' events to `directory` (`worker-<i>/metrics.jsonl`), and shows the run's progress."""

    def __init__(self, plan: Plan, directory: Path, dashboard: Dashboard, shown: View) -> None:
        self._plan, self._dashboard, self._shown = plan, dashboard, shown
        self._processes = plan.config.elastic.nproc_per_node
        self._by_pod = {worker.pod: worker for worker in plan.workers}
        self._events = WorkerEvents(directory, self._processes)
        self._progress = [
            WorkerProgress(number, self._events.path(number)) for number in range(len(plan.workers) * self._processes)
        ]

    def keep(self, messages: Sequence[Message]) -> None:
        """Keep the events among the pods' messages."""
        for message in messages:
            worker = self._by_pod.get(message.pod["metadata"]["name"])
            if worker is not None and message.word == pod_main.METRICS:
                self._events.write(worker.index, message.content)

    def refresh(self, silent: Mapping[str, float], running: Sequence[str]) -> None:
        """Show the run's progress by the events. The state of silent workers is outdated: the others determine it.

        Args:
            silent: Pods from which no news arrives: since when, in Unix seconds.
            running: All pods that run.
        """
        for worker in self._plan.workers:
            for progress in self._progress_of(worker):
                progress.silent = worker.pod in silent
        heard = set(running) - silent.keys()
        self._dashboard.silent_since = None if heard or not silent else min(silent.values())
        for progress in self._progress:
            for event in progress.update():
                if event["event"] == "end" and event["status"] == "failed":
                    self._shown.show(f"worker {progress.number} ended: {event['reason']}")
        fill(self._dashboard, self._progress)
        self._shown.refresh()

    def by_checkpoint(self) -> list[WorkerPlan]:
        """The workers, those with the newest checkpoints first."""
        newest = self._events.newest_checkpoints()

        def version(worker: WorkerPlan) -> tuple[int, int]:
            return max(newest.get(progress.number, (-1, -1)) for progress in self._progress_of(worker))

        return sorted(self._plan.workers, key=version, reverse=True)

    def _progress_of(self, worker: WorkerPlan) -> Sequence[WorkerProgress]:
        return self._progress[worker.index * self._processes : (worker.index + 1) * self._processes]
