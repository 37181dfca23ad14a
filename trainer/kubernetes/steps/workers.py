"""The workers of a run on a cluster: their progress, how they ended, and which are lost and why."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from trainer.elastic.keys import Verdict
from trainer.kubernetes import pod_main
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.kinds import Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects.plan import WorkerPlan, worker_of
from trainer.kubernetes.steps.job_follower import JobFollower, Message
from trainer.kubernetes.steps.step_context import StepContext
from trainer.launch.agent import MEMORY_KILLS, is_vague
from trainer.monitor.dashboard import Dashboard, View
from trainer.monitor.progress import WorkerProgress, fill
from trainer.monitor.worker_log import WorkerEvents

_FRUITLESS = 6  # consecutive pods that ended before they trained a step; the next ones would do the same


class TrainingView:
    """Writes the workers' events to `directory` (`worker-<i>/metrics.jsonl`) and shows the run's progress."""

    def __init__(self, context: StepContext, directory: Path, dashboard: Dashboard, shown: View) -> None:
        self._workers, self._dashboard, self._shown = context.workers, dashboard, shown
        self._plan = context.plan
        self._processes = context.plan.config.workers_per_node
        self._trained: set[str] = set()  # uids of pods that have trained a step
        self._events = WorkerEvents(directory, self._processes)
        self._progress = [
            WorkerProgress(number, self._events.path(number)) for number in range(len(self._workers) * self._processes)
        ]

    def keep(self, messages: Sequence[Message]) -> None:
        """Keep the events among the pods' messages."""
        for message in messages:
            worker = worker_of(message.pod, self._workers)
            if worker is not None and message.word == pod_main.METRICS:
                self._events.write(worker.index, message.content)
                if message.content.get("event") == "step":
                    self._trained.add(message.pod["metadata"]["uid"])

    def has_trained(self, pod: Object) -> bool:
        """Whether a pod has reported an inner step."""
        return pod["metadata"]["uid"] in self._trained

    def refresh(self, silent: Mapping[int, float], running: Collection[int]) -> None:
        """Show the run's progress by the workers that are not silent; the state of the others is outdated.

        Args:
            silent: Workers (by index) from which no news arrives although they may run, with the start in Unix seconds.
            running: Workers whose pods are running.
        """
        for worker in self._workers:
            for progress in self._progress_of(worker):
                progress.silent = worker.index in silent
        heard = set(running) - silent.keys()
        self._dashboard.silent_since = None if heard or not silent else min(silent.values())
        for progress in self._progress:
            for event in progress.update():
                if event["event"] == "end" and event["status"] == "failed":
                    own = self._workers[progress.number // self._processes]
                    reason = self._plan.places(own).in_words(event["reason"])
                    self._shown.show(f"worker {progress.number} ended: {reason}")
        fill(self._dashboard, self._progress)
        self._shown.refresh()

    def by_checkpoint(self) -> list[WorkerPlan]:
        """The workers in order of checkpoints, newest first."""
        newest = self._events.newest_checkpoints()

        def version(worker: WorkerPlan) -> tuple[int, int]:
            return max(newest.get(progress.number, (-1, -1)) for progress in self._progress_of(worker))

        return sorted(self._workers, key=version, reverse=True)

    def _progress_of(self, worker: WorkerPlan) -> Sequence[WorkerProgress]:
        return self._progress[worker.index * self._processes : (worker.index + 1) * self._processes]


class WorkerEnds:
    """The pods that have ended, and the workers that are permanently lost.

    `jobs` is the follower of the cluster to which a pod or a job belongs.
    """

    def __init__(self, context: StepContext, view: TrainingView, show: Show) -> None:
        self._workers, self._plan, self._config = context.workers, context.plan, context.plan.config
        self._view, self._show = view, show
        self._ended: dict[str, str] = {}  # why pods have ended, by uid
        self._why: dict[int, str] = {}  # why a worker's last pod ended
        self._out_of_memory: Counter[int] = Counter()  # how often a worker ran out of memory
        self._fruitless: Counter[int] = Counter()  # consecutive pods of a worker that ended before they trained
        self.complete = False  # whether a worker has ended after completing the run
        self.lost: dict[int, str] = {}  # why workers have failed permanently, by index

    @property
    def left(self) -> int:
        """The number of workers that are not lost."""
        return len(self._workers) - len(self.lost)

    def has_ended(self, pod: Object) -> bool:
        """Whether a pod's end has already been recorded."""
        return pod["metadata"]["uid"] in self._ended

    def note_pod(self, jobs: JobFollower, pod: Object) -> None:
        """Record how a pod ended. Its log has been read to the end."""
        uid, code = pod["metadata"]["uid"], jobs.exit_status(pod)
        if code == 0:  # the worker has completed the run
            self._ended[uid] = "it is done"
            self.complete = True
            return
        why = self._ended[uid] = jobs.why_ended(pod)
        worker = worker_of(pod, self._workers)
        if worker is None:
            self._show(f"{jobs.called(pod)} has ended: {why}")
            return
        self._why[worker.index] = why
        exhausted = self._is_exhausted(jobs, worker, pod)
        comes_back = not (exhausted or _has_failed(jobs, pod) or worker.index in self.lost)
        outlook = f": {jobs.kind.name} restarts it" if comes_back and jobs.restarts(worker.job) else ""
        self._show(f"{jobs.called(pod)} has ended: {why}{outlook}")
        if exhausted:
            jobs.delete(worker.job)
            self.lose(self.members(worker.job), why)

    def _is_exhausted(self, jobs: JobFollower, worker: WorkerPlan, pod: Object) -> bool:
        """Count a worker's fruitless pods. Returns whether its next pods would also be fruitless."""
        if diagnosis.is_out_of_memory(pod, jobs.container):
            self._out_of_memory[worker.index] += 1
        if self._view.has_trained(pod):
            self._fruitless[worker.index] = 0
        elif jobs.exit_status(pod) != diagnosis.TERMINATED and not diagnosis.why_lost(pod):
            self._fruitless[worker.index] += 1
        most = min(MEMORY_KILLS, self._config.elastic.max_restarts + 1)
        return self._out_of_memory[worker.index] >= most or self._fruitless[worker.index] >= _FRUITLESS

    def note_departed(self, jobs: JobFollower, pod: Object) -> None:
        """Record that a pod was deleted, unless its end has already been recorded."""
        if self.has_ended(pod):
            return
        why = self._ended[pod["metadata"]["uid"]] = diagnosis.why_lost(pod) or "it was deleted"
        self._show(f"the pod of {jobs.called(pod)} is gone: {why}")

    def note_job(self, jobs: JobFollower, name: str) -> None:
        """Record which workers are lost with a job or by its failure, and whether it has succeeded.

        A job that has run for longer than `active_deadline` is deleted.
        """
        job, members = jobs.job(name), self.members(name)
        if job is None:
            if jobs.was_deleted(name):
                self.lose(members, f"{jobs.kind.name} {name} was deleted")
            return
        limit = self._config.active_deadline
        if jobs.kind.has_run(job) > limit and any(worker.index not in self.lost for worker in members):
            jobs.delete(name)
            self.lose(members, f"{jobs.kind.name} {name} has run for longer than active_deadline ({limit} s)")
        for worker in members:
            self._note_worker(jobs, worker, job)
        self.complete |= jobs.kind.has_succeeded(job)

    def lose(self, workers: Sequence[WorkerPlan], why: str) -> None:
        """Record that workers have failed permanently, unless already known."""
        new = [worker for worker in workers if worker.index not in self.lost]
        if not new:
            return
        self.lost |= {worker.index: why for worker in new}
        names = f"worker{'s' if len(new) > 1 else ''} {', '.join(str(worker.index) for worker in new)}"
        others = f": the others continue ({self.left} left)" if self.left >= self._config.min_nodes else ""
        self._show(f"{names} {'have' if len(new) > 1 else 'has'} failed permanently: {why}{others}")

    def members(self, job: str) -> list[WorkerPlan]:
        """The workers of a job."""
        return [worker for worker in self._workers if worker.job == job]

    def explain(self, verdict: Verdict) -> str:
        """Why the run failed: the verdict's reason, unless an observation here is more specific."""
        if verdict.reason and not is_vague(verdict.reason):
            worker = next((worker for worker in self._workers if worker.index == verdict.slot), None)
            return self._plan.places(worker).in_words(verdict.reason) if worker else verdict.reason
        out_of_memory = {index: self._why[index] for index in self._out_of_memory if index in self._why}
        own = {index: why for index, why in self._why.items() if index == verdict.slot}
        for index, why in (*own.items(), *self.lost.items(), *out_of_memory.items()):
            if not diagnosis.is_vague(why):
                return f"worker {index}: {why}"
        return verdict.reason or "the run has failed"

    def _note_worker(self, jobs: JobFollower, worker: WorkerPlan, job: Object) -> None:
        """Record whether a worker is lost: its pod has failed, or it has no pod and its failed job creates none.

        The training operator fails a job when its first pod fails, and leaves the others running.
        """
        kind = jobs.kind
        pods = [pod for pod in jobs.pods_of(worker.job) if worker_of(pod, self._workers) == worker]
        pod = next((pod for pod in pods if jobs.exit_status(pod) is None), pods[-1] if pods else None)
        code = None if pod is None else jobs.exit_status(pod)
        gone = kind.has_failed(job) and code != 0 and (pod is None or code is not None)
        if gone or (pod is not None and _has_failed(jobs, pod)):
            why = self._ended.get(pod["metadata"]["uid"], "") if pod else ""
            self.lose([worker], why or kind.why_failed(job) or "unknown")


def _has_failed(jobs: JobFollower, pod: Object) -> bool:
    """Whether a pod has failed in a way for which its job does not replace it."""
    code = jobs.exit_status(pod)
    disrupted = jobs.kind.retries_disrupted and diagnosis.is_disrupted(pod)
    return code is not None and 0 < code < 128 and not disrupted
