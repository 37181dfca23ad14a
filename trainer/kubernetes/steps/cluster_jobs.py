"""The training jobs of one cluster: the wanted ones, the existing ones, and their display names."""

import threading
from collections.abc import Mapping, Sequence

from trainer.kubernetes.api.kinds import Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import WorkerPlan, worker_of
from trainer.kubernetes.objects.training_jobs import training_jobs
from trainer.kubernetes.steps.cluster import Cluster, refuse_foreign
from trainer.kubernetes.steps.job_deletion import is_leaving
from trainer.kubernetes.steps.job_follower import JobFollower
from trainer.kubernetes.steps.step_context import StepContext


class ClusterJobs:
    """The training jobs of one cluster.

    Args:
        wake: As for `JobFollower`.

    Attributes:
        follower: Observes them.
        begun: Whether they were created or found. If not, the cluster's API server has not answered yet.
    """

    def __init__(self, context: StepContext, cluster: Cluster, show: Show, wake: threading.Event) -> None:
        self.cluster, self.plan, self._show = cluster, cluster.plan, show
        self._several_sites = len({worker.site.name for worker in context.workers}) > 1
        self.wanted = {job.name: job for job in training_jobs(self.plan)}
        self._existing: Mapping[str, Object] = {}
        self.begun = False
        self.follower = JobFollower(
            cluster.client,
            self.plan.kind,
            {self._called(name): job for name, job in self.wanted.items()},
            self.plan.component("train"),
            show,
            patience=self.plan.config.active_deadline,  # workers train without the API server
            wake=wake,
            pod_name=self._pod_name,
        )

    def __str__(self) -> str:
        return _list(self.plan.workers) + f" on {self.cluster}"

    def find(self) -> None:
        """Find the run's jobs. Raises ConfigError if jobs of another run have their names."""
        part_of = names.selector({"app.kubernetes.io/part-of": names.PREFIX})
        jobs = self.cluster.client.list(self.plan.kind, part_of)[0]
        self._existing = {job["metadata"]["name"]: job for job in jobs if job["metadata"]["name"] in self.wanted}
        for name, job in self._existing.items():
            refuse_foreign(self.wanted[name].body, job)

    @property
    def are_under_way(self) -> bool:
        """Whether existing jobs were found that have not failed and will not be deleted."""
        jobs = self._existing.values()
        return any(not (self.plan.kind.has_failed(job) or is_leaving(job)) for job in jobs)

    def create(self, *, anew: bool) -> None:
        """Create missing jobs and keep existing ones. With `anew`, replace those that have ended."""
        self.cluster.prepare()
        kind = self.plan.kind
        if any(map(is_leaving, self._existing.values())):
            self._show(f"{self}: waiting until the workers of the previous training have saved and left")
        for name in self.wanted:
            found = self.follower.create(name, replace=lambda job: anew and kind.has_ended(job))
            if found is None:
                self._show(f"{kind.name} {name} created")
            else:
                self.cluster.adopt(kind, found)
                self._show(f"{kind.name} {name} exists already: following it")
        self.begun = True

    def delete_living(self) -> None:
        """Delete the jobs that have not ended, or whose pods have not: pods of a failed job may still run."""
        self.follower.delete(*(name for name in self.wanted if self._is_alive(name)))

    def _is_alive(self, name: str) -> bool:
        job, pods = self.follower.job(name), self.follower.pods_of(name)
        alive = any(self.follower.exit_status(pod) is None for pod in pods)
        return job is not None and (alive or not self.plan.kind.has_ended(job))

    def why_not_started(self, worker: WorkerPlan, seconds: float) -> str:
        """Why a worker has waited for longer than `seconds`; "" if it has not."""
        pods = [pod for pod in self.follower.pods_of(worker.job) if worker_of(pod, self.plan.workers) == worker]
        return self.follower.why_not_started(worker.job, seconds, pods)

    def _called(self, job: str) -> str:
        """A job's display name, from its workers."""
        members = [worker for worker in self.plan.workers if worker.job == job]
        return self._worker_name(members[0]) if len(members) == 1 else _list(members)

    def _pod_name(self, pod: Object) -> str:
        worker = worker_of(pod, self.plan.workers)
        return self._worker_name(worker) if worker else ""

    def _worker_name(self, worker: WorkerPlan) -> str:
        return f"worker {worker.index}" + (f" at {worker.site.name}" if self._several_sites else "")


def _list(workers: Sequence[WorkerPlan]) -> str:
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(str(worker.index) for worker in workers)}"
