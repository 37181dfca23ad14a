"""The train step: creates or finds the training jobs, and follows the training until it ends.

The training ends with the workers' verdict in etcd (`trainer.elastic.keys`), or when a worker ends with status 0, which
means that its final checkpoint is committed. While enough workers are left, failures of pods, jobs or nodes are only
logged.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from trainer.elastic import keys
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.kubernetes.api.client import ApiError
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects.plan import WorkerPlan, worker_of
from trainer.kubernetes.objects.pod_template import GRACE_PERIOD
from trainer.kubernetes.steps.cluster_jobs import ClusterJobs
from trainer.kubernetes.steps.credentials import reachable_etcd
from trainer.kubernetes.steps.job_follower import Message, observations
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.workers import TrainingView, WorkerEnds
from trainer.monitor.dashboard import Dashboard, view


def train(context: StepContext, directory: Path) -> list[WorkerPlan]:
    """Train on the cluster until the run is complete. Returns the workers, those with the newest checkpoints first.

    If this run is already training, it is followed rather than started again. If the step is interrupted because
    its workflow was terminated (`StepContext.workflow_has_ended`), it deletes everything, and the workers save and
    leave. Otherwise it leaves the training to the step's next pod.

    Args:
        directory: Receives the workers' events as they arrive (`worker-<i>/metrics.jsonl`), and at the end the last
            lines of each of their pods (`logs/worker-<i>.<incarnation>.log`).

    Raises:
        TrainingError: The training failed or cannot continue, with the reason.
    """
    dashboard = Dashboard(context.plan.config.total_steps)
    with reachable_etcd(context) as etcd, view(dashboard, context.show) as shown:
        run_view = TrainingView(context, directory, dashboard, shown)
        for cluster in context.others:  # one that does not answer is retried later, while the others are followed
            cluster.client.patience = 0.0
        training = _Training(context, etcd, run_view, directory / "logs", shown.show)
        try:
            training.begin()
            # From here on, the workers train without the API server, so this step can wait for it
            context.client.patience = max(context.client.patience, context.timeouts.outage_in_training)
            return training.follow()
        except (Interrupted, KeyboardInterrupt):
            if context.workflow_has_ended:
                context.clean_up()  # first, because there may be less than a second
                context.show("cancelled: the training's jobs are deleted; their workers save and leave")
            else:
                context.show("this step's pod is stopped, and the training continues: the step's next pod follows it")
            raise


class _Training:
    """A run's training on one or several clusters, and its verdict."""

    def __init__(self, context: StepContext, etcd: EtcdClient, view: TrainingView, logs: Path, show: Show) -> None:
        self._context, self._etcd, self._view, self._logs, self._show = context, etcd, view, logs, show
        self._config, self._wake = context.plan.config, threading.Event()
        self._parts = [ClusterJobs(context, cluster, show, self._wake) for cluster in context.clusters]
        self._ends = WorkerEnds(context, view, show)
        self._anew = False  # whether all jobs had failed before this step
        self._verdict = keys.Verdict("open")
        self._asked_etcd, self._etcd_is_away = 0.0, False

    def begin(self) -> None:
        """Create missing jobs and keep existing ones, because the step may have been restarted."""
        # Find the run's jobs and its verdict
        parts = [part for part in self._parts if self._reaches(part, part.find)]
        self._verdict = keys.verdict(self._etcd)
        if self._verdict.status == "succeeded":
            for part in parts:
                part.begun = True  # `follow` reads the logs of existing jobs once more
            return

        # Start, or restart after a failure of all jobs
        self._anew = not any(part.are_under_way for part in parts)
        parts = [part for part in parts if self._reaches(part, part.cluster.refuse_claims_in_use)]
        if self._anew:
            keys.reopen(self._etcd)
            self._verdict = keys.Verdict("open")
        for part in parts:
            self._reaches(part, partial(part.create, anew=self._anew))

    def _reaches(self, part: ClusterJobs, action: Callable[[], None]) -> bool:
        """Do something on a cluster. Returns False if it is not the steps' own and does not answer."""
        try:
            action()
            return True
        except ApiError as error:
            if not (part.cluster.name and error.is_transient):
                raise
            self._show(f"{part} waits: {error}; it is followed once it answers")
            return False

    def _begin_late(self, part: ClusterJobs) -> None:
        """Start on a cluster that answers again, while the others train."""
        try:
            if self._reaches(part, part.find) and self._reaches(part, part.cluster.refuse_claims_in_use):
                self._reaches(part, partial(part.create, anew=self._anew))
        except (ConfigError, TrainingError) as error:
            part.begun = True
            self._ends.lose(part.plan.workers, str(error))

    def follow(self) -> list[WorkerPlan]:
        """Follow the training until it ends. Raises TrainingError if it fails."""
        run = f"run {self._config.run_id}"
        with ExitStack() as resources:
            for part in self._parts:
                resources.enter_context(part.follower)
            if self._verdict.terminal:
                self._show(f"{run} has ended already: it has {self._verdict.status}")
            else:
                self._show(f"{run}: {self._config.attendance}")
                for part in self._parts:
                    self._show(part.cluster.kubectl("get", part.plan.kind.name.lower(), part.plan.selector))
            for messages in self._observations():
                self._view.keep(messages)
                self._update()
                if not self._verdict.terminal:
                    self._fail_if_too_few()
                if self._verdict.terminal:
                    break
            self._wind_up()
            for part in self._parts:
                part.follower.write_tails(self._logs)
        if self._verdict.status == "failed":
            raise TrainingError(self._ends.explain(self._verdict))
        self._show(f"{run} is complete")
        return self._view.by_checkpoint()

    def _observations(self) -> Iterator[list[Message]]:
        return observations([part.follower for part in self._parts], self._wake, self._context.timeouts.look)

    def _update(self) -> None:
        """Read and show the state of pods, jobs and etcd."""
        for part in self._parts:
            if part.begun:
                self._update_part(part)
            elif not self._is_over() and not part.follower.is_silent:
                self._begin_late(part)
        if not self._is_over() and time.monotonic() - self._asked_etcd > self._context.timeouts.etcd:
            self._ask_etcd()
        if self._ends.complete and not self._verdict.terminal:
            self._verdict = keys.Verdict("succeeded")
        self._refresh()

    def _update_part(self, part: ClusterJobs) -> None:
        jobs, ends = part.follower, self._ends
        for pod in (*jobs.departed, *jobs.pods.values()):
            if not ends.has_ended(pod) and jobs.exit_status(pod) is not None:
                self._view.keep(jobs.finish_reading([pod]))  # its last error is more specific than its status
                ends.note_pod(jobs, pod)
        for pod in jobs.departed if not self._is_over() else ():
            ends.note_departed(jobs, pod)
        for name in part.wanted:
            if jobs.job(name) is not None or not self._is_over():
                ends.note_job(jobs, name)

    def _is_over(self) -> bool:
        return self._verdict.terminal or self._ends.complete

    def _refresh(self) -> None:
        silent: dict[int, float] = {}
        running: list[int] = []
        for jobs in (part.follower for part in self._parts):
            workers = {name: worker_of(pod, self._context.workers) for name, pod in jobs.pods.items()}
            running += [it.index for name, it in workers.items() if it and jobs.is_running(jobs.pods[name])]
            silent |= {it.index: since for name, since in jobs.silent().items() if (it := workers.get(name))}
        self._view.refresh(silent, running)

    def _fail_if_too_few(self) -> None:
        """End the run if it has too few workers left, or never had enough."""
        least = self._config.min_nodes
        if self._ends.left < least:
            # If the run ends because an agent gives up, the agent writes the reason to etcd
            self._ask_etcd()
            if not self._verdict.terminal:
                why = next(iter(self._ends.lost.values()))
                self._fail(f"{self._ends.left} of at least {least} workers are left: {why}")
            return
        timeout = self._config.elastic.rdzv_timeout
        workers = ((part, worker) for part in self._parts if part.begun for worker in part.plan.workers)
        reasons = ((worker.index, part.why_not_started(worker, timeout)) for part, worker in workers)
        waiting = [f"worker {index}: {why}" for index, why in reasons if why]
        if len(self._context.workers) - len(waiting) < least:
            self._fail(f"too few workers have started in {timeout:.0f} s: {waiting[0]}")

    def _fail(self, reason: str) -> None:
        """Write the run's verdict to etcd. The remaining workers then save and leave."""
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
                self._show(f"etcd does not answer; the workers continue without it: {error}")

    def _wind_up(self) -> None:
        """Wait until the workers have saved and left: on their own if they are done, otherwise with their jobs."""
        followers = [part.follower for part in self._parts]
        if self._verdict.status == "failed":
            for part in self._parts:
                part.delete_living()
        deadline = time.monotonic() + GRACE_PERIOD
        for messages in self._observations():
            self._view.keep(messages)
            self._update()
            left = any(jobs.is_deleting or any(map(jobs.is_running, jobs.pods.values())) for jobs in followers)
            if not left or time.monotonic() > deadline:
                break
        for jobs in followers:
            self._view.keep(jobs.finish_reading(list(jobs.pods.values())))
        self._refresh()
