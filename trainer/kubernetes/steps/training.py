"""The train step: creates the training jobs, or finds them, and follows the training until it has ended.

The training ends by its workers' verdict in etcd (`trainer.elastic.keys`), or when a worker ends with status 0: its
final checkpoint is committed. While enough workers are left, the failure of a pod, a job or a node is only logged.
"""

import time
from pathlib import Path

from trainer.elastic import keys
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.kubernetes.api.kinds import Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.objects.pod_template import GRACE_PERIOD
from trainer.kubernetes.objects.training_jobs import training_jobs
from trainer.kubernetes.steps.credentials import reachable_etcd
from trainer.kubernetes.steps.job_follower import JobFollower
from trainer.kubernetes.steps.step_context import StepContext, refuse_foreign
from trainer.kubernetes.steps.workers import TrainingView, WorkerEnds
from trainer.monitor.dashboard import Dashboard, view


def train(context: StepContext, directory: Path) -> list[WorkerPlan]:
    """Train on the cluster until the run is complete. Returns the workers with the newest checkpoints first.

    A training of this run that is under way is followed, and not started again. If the step is interrupted because its
    workflow was terminated (`StepContext.workflow_has_ended`), it deletes everything, and the workers save and leave.
    Otherwise it leaves the training to the step's next pod.

    Args:
        directory: Takes the workers' events as they arrive (`worker-<i>/metrics.jsonl`), and at the end the last lines
            of each of their pods (`logs/worker-<i>.<incarnation>.log`).

    Raises:
        TrainingError: The training has failed, or cannot continue, with the reason.
    """
    dashboard = Dashboard(context.plan.config.total_steps)
    with reachable_etcd(context) as etcd, view(dashboard, context.show) as shown:
        run_view = TrainingView(context.plan, directory, dashboard, shown)
        training = _Training(context, etcd, run_view, directory / "logs", shown.show)
        try:
            training.begin()
            context.client.patience = max(context.client.patience, context.timeouts.outage_in_training)
            return training.follow()
        except (Interrupted, KeyboardInterrupt):
            if context.workflow_has_ended:
                context.clean_up()  # before anything else: there may be less than a second
                context.show("cancelled: the training's jobs are deleted, their workers save and leave")
            else:
                context.show("this step's pod is stopped, and the training continues: the step's next pod follows it")
            raise


class _Training:
    """A training on the cluster, and its verdict."""

    def __init__(self, context: StepContext, etcd: EtcdClient, view: TrainingView, logs: Path, show: Show) -> None:
        self._context, self._etcd, self._view, self._logs, self._show = context, etcd, view, logs, show
        self._plan, self._config, self._kind = context.plan, context.plan.config, context.plan.kind
        self._wanted = {job.name: job for job in training_jobs(self._plan)}
        self._jobs = JobFollower(
            context,
            self._kind,
            {self._called(name): job for name, job in self._wanted.items()},
            self._plan.component("train"),
            show,
            pod_name=self._pod_name,
            patience=self._config.active_deadline,  # workers need no API server to train
        )
        self._ends = WorkerEnds(self._plan, self._jobs, view, show)
        self._verdict = keys.Verdict("open")
        self._asked_etcd, self._etcd_is_away = 0.0, False

    def begin(self) -> None:
        """Create the jobs that are missing, and keep those that exist: the step may have been restarted."""
        # Find the run's jobs, and its verdict
        part_of = names.selector({"app.kubernetes.io/part-of": names.PREFIX})
        kind = self._kind
        jobs = self._context.client.list(kind, part_of)[0]
        existing = {job["metadata"]["name"]: job for job in jobs if job["metadata"]["name"] in self._wanted}
        for name, job in existing.items():
            refuse_foreign(self._wanted[name].body, job)
        under_way = any(not kind.has_failed(job) for job in existing.values())
        self._verdict = keys.verdict(self._etcd)
        if self._verdict.status == "succeeded":
            return  # `follow` reads the logs of its jobs, if any exist, once more

        # Begin, or begin again after a failure of all jobs
        self._context.refuse_claims_in_use()
        self._context.prepare()
        if not under_way:
            keys.reopen(self._etcd)
            self._verdict = keys.Verdict("open")
        for name in self._wanted:
            found = self._jobs.create(name, replace=lambda job: kind.has_ended(job) and not under_way)
            if found is None:
                self._show(f"{kind.name} {name} created")
            else:
                self._context.adopt(kind, found)
                self._show(f"{kind.name} {name} exists already: following it")

    def follow(self) -> list[WorkerPlan]:
        """Follow the training until it has ended. Raises TrainingError if it has failed."""
        run = f"run {self._config.run_id}"
        with self._jobs:
            if self._verdict.terminal:
                self._show(f"{run} has ended already: it has {self._verdict.status}")
            else:
                self._show(f"{run}: {self._config.attendance}")
                self._show(f"kubectl get {self._kind.name.lower()} -n {self._plan.namespace} -l {self._plan.selector}")
            for messages in self._jobs.observations():
                self._view.keep(messages)
                self._update()
                if not self._verdict.terminal:
                    self._fail_if_too_few()
                if self._verdict.terminal:
                    break
            self._wind_up()
            self._jobs.write_tails(self._logs)
        if self._verdict.status == "failed":
            raise TrainingError(self._ends.explain(self._verdict))
        self._show(f"{run} is complete")
        return self._view.by_checkpoint()

    def _update(self) -> None:
        """Read the state of pods, jobs and etcd, and show it."""
        jobs, ends = self._jobs, self._ends
        for pod in (*jobs.departed, *jobs.pods.values()):
            if not ends.has_ended(pod) and jobs.exit_status(pod) is not None:
                self._view.keep(jobs.finish_reading([pod]))  # its last error is more specific than its status
                ends.note_pod(pod)
        for pod in jobs.departed if not self._is_over() else ():
            ends.note_departed(pod)
        for name in self._wanted:
            if jobs.job(name) is not None or not self._is_over():
                ends.note_job(name)
        if not self._is_over() and time.monotonic() - self._asked_etcd > self._context.timeouts.etcd:
            self._ask_etcd()
        if ends.complete and not self._verdict.terminal:
            self._verdict = keys.Verdict("succeeded")
        self._refresh()

    def _is_over(self) -> bool:
        return self._verdict.terminal or self._ends.complete

    def _refresh(self) -> None:
        by_pod = {name: worker.index for name, pod in self._jobs.pods.items() if (worker := self._plan.worker_of(pod))}
        running = [index for name, index in by_pod.items() if self._jobs.is_running(self._jobs.pods[name])]
        silent = {by_pod[name]: since for name, since in self._jobs.silent().items() if name in by_pod}
        self._view.refresh(silent, running)

    def _fail_if_too_few(self) -> None:
        """End a training that has too few workers left, or never had enough."""
        least = self._config.min_nodes
        if self._ends.left < least:
            # If the run ends because an agent gives up, the agent writes why into etcd
            self._ask_etcd()
            if not self._verdict.terminal:
                why = next(iter(self._ends.lost.values()))
                self._fail(f"{self._ends.left} of at least {least} workers are left: {why}")
            return
        timeout = self._config.elastic.rdzv_timeout
        workers = self._plan.workers
        reasons = (self._jobs.why_not_started(worker.job, timeout, self._pods_of(worker)) for worker in workers)
        waiting = [f"worker {index}: {why}" for index, why in enumerate(reasons) if why]
        if len(workers) - len(waiting) < least:
            self._fail(f"too few workers have started in {timeout:.0f} s: {waiting[0]}")

    def _fail(self, reason: str) -> None:
        """Write the run's verdict to etcd; the workers that are left then save and leave."""
        self._verdict = keys.Verdict("failed", reason)
        try:
            keys.finish(self._etcd, "failed", reason)
        except EtcdError as error:
            self._show(f"warning: the failure of the run could not be written to etcd: {error}")

    def _ask_etcd(self) -> None:
        self._asked_etcd = time.monotonic()
        was_away, self._etcd_is_away = self._etcd_is_away, False
        try:
            self._verdict = keys.verdict(self._etcd)
            if was_away:
                self._show("etcd answers again")
        except EtcdError as error:
            self._etcd_is_away = True
            if not was_away:
                self._show(f"etcd does not answer, the workers continue without it: {error}")

    def _wind_up(self) -> None:
        """Wait until the workers have saved and left: by themselves if they are done, otherwise with their jobs."""
        jobs = self._jobs
        if self._verdict.status == "failed":
            jobs.delete(*(name for name in self._wanted if self._is_alive(name)))
        deadline = time.monotonic() + GRACE_PERIOD
        for messages in jobs.observations():
            self._view.keep(messages)
            self._update()
            left = jobs.is_deleting or any(jobs.is_running(pod) for pod in jobs.pods.values())
            if not left or time.monotonic() > deadline:
                break
        self._view.keep(jobs.finish_reading(list(jobs.pods.values())))
        self._refresh()

    def _is_alive(self, name: str) -> bool:
        """Whether a job has not ended, or its pods have not: a failed job's may still run."""
        job, pods = self._jobs.job(name), self._jobs.pods_of(name)
        alive = any(self._jobs.exit_status(pod) is None for pod in pods)
        return job is not None and (alive or not self._kind.has_ended(job))

    def _pods_of(self, worker: WorkerPlan) -> list[Object]:
        return [pod for pod in self._jobs.pods_of(worker.job) if self._plan.worker_of(pod) == worker]

    def _called(self, job: str) -> str:
        """A job's display name: that of its workers."""
        members = [worker for worker in self._plan.workers if worker.job == job]
        several = f"workers {', '.join(str(worker.index) for worker in members)}"
        return self._worker_name(members[0]) if len(members) == 1 else several

    def _pod_name(self, pod: Object) -> str:
        worker = self._plan.worker_of(pod)
        return self._worker_name(worker) if worker else ""

    def _worker_name(self, worker: WorkerPlan) -> str:
        return f"worker {worker.index}" + (f" at {worker.site.name}" if len(self._plan.sites) > 1 else "")
