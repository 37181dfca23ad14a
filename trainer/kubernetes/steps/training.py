"""The train step: makes the PyTorchJobs, or finds them, and follows the training until it has ended.

The training ends as its workers say in etcd (`trainer.elastic.keys`), or as one of them ends with status 0, which
means that the final checkpoint is committed. That a pod, a job or a node fails is a line in the log as long as enough
workers are left.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.elastic import keys
from trainer.errors import Interrupted, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.kubernetes import pod_main
from trainer.kubernetes.api import diagnosis
from trainer.kubernetes.api.client import PYTORCH_JOB, ApiError, Object
from trainer.kubernetes.api.pods import Pods
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.objects.pod_template import CONTAINER, GRACE_PERIOD
from trainer.kubernetes.objects.pytorchjob import training_jobs
from trainer.kubernetes.steps.credentials import reachable_etcd
from trainer.kubernetes.steps.session import Session, condition, has_ended, refuse_foreign
from trainer.launch.agent import MEMORY_KILLS, is_vague
from trainer.monitor.dashboard import Board, View, view
from trainer.monitor.progress import WorkerProgress, fill
from trainer.monitor.worker_log import WorkerEvents

LOOK_INTERVAL = 1.0  # seconds between two looks, if nothing wakes us
ETCD_INTERVAL = 2.0  # seconds between two looks at etcd
OPERATOR_TIMEOUT = 45.0  # seconds after which an operator has said something about a job, if there is one
PATIENCE = 900.0  # seconds that a request is tried for; what is followed is waited for longer, see `follow`
SEEN_TIMEOUT = 10.0  # seconds for a job that was made to be seen
_GONE_TIMEOUT = 2.0 * GRACE_PERIOD  # seconds for a job that was deleted to be gone


@dataclass(frozen=True)
class Trained:
    """What the train step knows of a training that is complete.

    Attributes:
        workers: By index, those whose claims have the newest checkpoints first.
    """

    workers: tuple[int, ...]


def train(session: Session, directory: Path) -> Trained:
    """Train on the cluster until the run is complete.

    A training of this run that is under way is followed, not begun again. A step that is interrupted deletes everything
    if its workflow was terminated (`Session.workflow_has_ended`), and the workers save and leave; else it leaves the
    training to its successor.

    Args:
        directory: Where the workers' events are written as the pods tell them: `worker-<i>/metrics.jsonl`.

    Raises:
        TrainingError: The training has failed, or cannot go on, with the reason.
    """
    with reachable_etcd(session) as etcd:
        training = _Training(session, etcd, directory)
        try:
            training.begin()
            session.client.patience = max(session.client.patience, PATIENCE)
            return training.follow()
        except (Interrupted, KeyboardInterrupt):
            if session.workflow_has_ended():
                session.clean_up()  # before anything else: there may be less than a second
                session.say("cancelled: the training's jobs are deleted, their workers save and leave")
            else:
                session.say("this step goes away, and the training goes on: the step's next pod follows it")
            raise


class _Training:
    """A training on the cluster, and what is seen of it."""

    def __init__(self, session: Session, etcd: EtcdClient, directory: Path) -> None:
        self._session, self._etcd, self._directory = session, etcd, directory
        self._client, self._plan = session.client, session.plan
        self._config = session.plan.config
        self._workers = {worker.pod: worker for worker in self._plan.workers}
        self._log = WorkerEvents(directory, self._config.elastic.nproc_per_node)
        self._progress = [
            WorkerProgress(number, self._log.path(number))
            for number in range(len(self._workers) * self._config.elastic.nproc_per_node)
        ]
        self._board = Board(self._config.total_steps)
        self._ended: dict[str, str] = {}  # pods that have ended, by uid: how, in words
        self._last_words: dict[str, str] = {}  # of a pod, by uid: its last error
        self._out_of_memory: Counter[int] = Counter()  # how often a worker was
        self._why_ended: dict[int, str] = {}  # how a worker's last pod has
        self._lost: dict[int, str] = {}  # workers that have failed for good: why
        self._asked_etcd, self._etcd_away = 0.0, False
        self._verdict = keys.Verdict("open")
        self._shown: View | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Make what is missing. What is there is kept: a step that was started again goes on with it."""
        bodies = {body["metadata"]["name"]: body for body in training_jobs(self._plan)}
        jobs = self._client.list(PYTORCH_JOB, names.selector({"app.kubernetes.io/part-of": names.PREFIX}))[0]
        there = {job["metadata"]["name"]: job for job in jobs if job["metadata"]["name"] in bodies}
        for name, job in there.items():
            refuse_foreign(bodies[name], job)
        under_way = any(not has_ended(job) or condition(job, "Succeeded") for job in there.values())
        self._verdict = keys.verdict(self._etcd)
        if self._verdict.status == "succeeded":
            return  # what there is of its jobs is read once more
        self._session.refuse_claims_in_use()
        self._session.prepare()
        if not under_way:
            keys.reopen(self._etcd)
            self._verdict = keys.Verdict("open")
        for name, body in bodies.items():
            if name in there and has_ended(there[name]) and not under_way:
                self._client.delete(PYTORCH_JOB, name)  # of an earlier attempt, which has failed
            if self._create(body):
                self._session.say(f"PyTorchJob {name} made")
            else:
                self._session.say(f"PyTorchJob {name} is there already: following it")

    def _create(self, body: Object) -> bool:
        """Whether it was made; else it is there. One that is being deleted is waited for."""
        name, deadline = body["metadata"]["name"], time.monotonic() + _GONE_TIMEOUT
        while True:
            try:
                self._client.create(body)
                return True
            except ApiError as error:
                if error.reason != "AlreadyExists" or time.monotonic() > deadline:
                    raise
            there = self._client.get(PYTORCH_JOB, name)
            if there is not None and not there["metadata"].get("deletionTimestamp"):
                refuse_foreign(body, there)
                self._session.adopt(PYTORCH_JOB, there)
                return False
            time.sleep(0.2)

    def follow(self) -> Trained:
        """Until the training has ended. The workers train on without the API server, and so they are waited for as long
        as they may train."""
        plan = self._plan
        selector = names.selector({"app.kubernetes.io/component": "train"})
        with (
            Pods(
                self._client,
                PYTORCH_JOB,
                f"{plan.selector},{selector}",
                CONTAINER,
                self._called,
                self._say,
                self._hear,
                patience=self._config.active_deadline,
            ) as pods,
            view(self._board, self._session.say) as self._shown,
        ):
            if self._over():
                self._say(f"run {plan.run_id} has ended already: it has {self._verdict.status}")
            else:
                self._say(f"run {plan.run_id}: {self._config.attendance}")
                self._say(f"kubectl get pytorchjob -n {plan.namespace} -l {plan.selector}")
            self._look(pods)
            while not self._over():
                pods.wake.wait(LOOK_INTERVAL)
                self._look(pods)
                self._refuse_what_cannot_go_on(pods)
            self._wind_up(pods)
        if self._verdict.status == "failed":
            raise TrainingError(self._why_failed())
        self._session.say(f"run {plan.run_id} is complete")
        return Trained(self._by_checkpoint())

    def _why_failed(self) -> str:
        """The verdict's reason; or, where that only says that a worker has ended, why that was, as seen from here."""
        reason = self._verdict.reason
        if reason and not is_vague(reason):
            return reason
        out_of_memory = {index: self._why_ended[index] for index in self._out_of_memory if index in self._why_ended}
        own = {index: why for index, why in self._why_ended.items() if index == self._verdict.slot}
        for index, why in (*own.items(), *self._lost.items(), *out_of_memory.items()):
            if not diagnosis.is_vague(why):
                return f"worker {index}: {why}"
        return reason or "the run has failed"

    def _over(self) -> bool:
        return self._verdict.terminal

    def _look(self, pods: Pods) -> None:
        """Take in how things are."""
        pods.look()
        for pod in (*pods.departed, *pods.pods.values()):
            self._look_at_pod(pod, pods)
        for pod in pods.departed:
            if pod["metadata"]["uid"] not in self._ended and not self._over():
                why = diagnosis.why_lost(pod) or "somebody has deleted it"
                self._ended[pod["metadata"]["uid"]] = why
                self._say(f"the pod of {self._called(pod)} is gone: {why}")
        for name in {worker.job for worker in self._plan.workers}:
            self._look_at_job(name, pods)
        if not self._over() and time.monotonic() - self._asked_etcd > ETCD_INTERVAL:
            self._ask_etcd()
        self._note_silence(pods)
        self._update()

    def _note_silence(self, pods: Pods) -> None:
        """What is known of workers that cannot be heard is old: the others tell where the run is, if there are any."""
        silent = pods.silent()
        for worker in self._plan.workers:
            for progress in self._progress_of(worker):
                progress.silent = worker.pod in silent
        heard = [pod for name, pod in pods.pods.items() if name not in silent and self._is_running(pod)]
        self._board.silent_since = None if heard or not silent else min(silent.values())

    def _progress_of(self, worker: WorkerPlan) -> list[WorkerProgress]:
        processes = self._config.elastic.nproc_per_node
        return self._progress[worker.index * processes : (worker.index + 1) * processes]

    @staticmethod
    def _is_running(pod: Object) -> bool:
        return diagnosis.has_started(pod, CONTAINER) and diagnosis.exit_status(pod, CONTAINER) is None

    def _look_at_pod(self, pod: Object, pods: Pods) -> None:
        uid, code = pod["metadata"]["uid"], diagnosis.exit_status(pod, CONTAINER)
        if uid in self._ended or code is None:
            return
        if code == 0:  # only a worker whose run is complete ends so
            self._ended[uid] = "it is done"
            self._verdict = keys.Verdict("succeeded")
            return
        memory = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "")
        why = diagnosis.why_ended(pod, CONTAINER, memory)
        pods.finish_reading([pod["metadata"]["name"]])  # its last words say it better
        worker = self._workers.get(pod["metadata"]["name"])
        # A container that has ended by itself has said why, also where one of its processes was short of memory once.
        said = self._last_words.get(uid) if code not in _FROM_OUTSIDE and not diagnosis.why_lost(pod) else ""
        self._ended[uid] = said or why
        if worker:
            self._why_ended[worker.index] = self._ended[uid]
        hopeless = False
        if worker and diagnosis.is_out_of_memory(pod, CONTAINER):
            self._out_of_memory[worker.index] += 1
            most = min(MEMORY_KILLS, self._config.elastic.max_restarts + 1)
            hopeless = self._out_of_memory[worker.index] >= most  # it would end so for ever
        again = ": the training operator starts it again" if code >= 128 and not hopeless else ""
        self._say(f"{self._called(pod)} has ended: {self._ended[uid]}{again}")
        if worker and hopeless:
            self._client.delete(PYTORCH_JOB, worker.job)
            self._lose(self._members(worker.job), self._ended[uid])

    def _look_at_job(self, name: str, pods: Pods) -> None:
        job, members = pods.owners.get(name), self._members(name)
        if job is None:
            if pods.waited(f"missing {name}") > SEEN_TIMEOUT:
                self._lose(members, f"somebody has deleted PyTorchJob {name}")
            return
        for worker in members:
            self._look_at_worker(worker, job, pods)
        if condition(job, "Failed"):
            return
        if condition(job, "Succeeded"):
            self._verdict = keys.Verdict("succeeded")
            return
        if not any(pod["metadata"]["name"] in {one.pod for one in members} for pod in pods.pods.values()):
            pods.explain_missing(name, self._names(members))
            if not (job.get("status") or {}).get("conditions") and pods.waited(name) > OPERATOR_TIMEOUT:
                pods.say_once(name, f"nobody acts on PyTorchJob {name}: {_NO_OPERATOR}")

    def _look_at_worker(self, worker: WorkerPlan, job: Object, pods: Pods) -> None:
        """Whether it is lost: its own pod has failed; or its job has, which makes no new pods then, and it has none.

        The operator fails a job at the first pod of it that fails, and lets its others run.
        """
        pod = pods.pods.get(worker.pod)
        if pod is not None and not _is_of(pod, job):
            pod = None  # an earlier job's
        code = None if pod is None else diagnosis.exit_status(pod, CONTAINER)
        failed = code is not None and 0 < code < 128
        if not failed and (code == 0 or not condition(job, "Failed") or (pod is not None and code is None)):
            return
        conditions = (job.get("status") or {}).get("conditions") or []
        message = next((one.get("message") for one in conditions if one["type"] == "Failed"), "")
        self._lose([worker], self._ended.get(pod["metadata"]["uid"] if pod else "") or str(message or "unknown"))

    def _lose(self, workers: Sequence[WorkerPlan], why: str) -> None:
        """These have failed for good; those of them of which that is known already have no part in it."""
        new = [worker for worker in workers if worker.index not in self._lost]
        if not new:
            return
        self._lost |= {worker.index: why for worker in new}
        left = self._left()
        goes_on = f": the others go on ({left} left)" if left >= self._config.min_nodes else ""
        self._say(f"{self._names(new)} has failed for good: {why}{goes_on}")

    def _left(self) -> int:
        """How many nodes are not lost for good."""
        return len(self._plan.workers) - len(self._lost)

    def _refuse_what_cannot_go_on(self, pods: Pods) -> None:
        """End a training that has too few workers left, or never gets them."""
        if self._over():
            return
        if self._left() < self._config.min_nodes:
            # An agent that ends for good has told etcd why, if the run ends by it: better than what is seen from here.
            self._ask_etcd()
            if not self._over():
                why = next(iter(self._lost.values()))
                few = f"{self._left()} of at least {self._config.min_nodes} workers are left"
                self._end(f"{few}: {why}")
            return
        timeout = self._config.elastic.rdzv_timeout
        waiting = [why for worker in self._plan.workers if (why := self._why_not_started(worker, pods, timeout))]
        if len(self._plan.workers) - len(waiting) < self._config.min_nodes:
            self._end(f"too few workers have started in {timeout:.0f} s: {waiting[0]}")

    def _why_not_started(self, worker: WorkerPlan, pods: Pods, seconds: float) -> str:
        for name in (worker.pod, worker.job):
            if why := pods.why_not_started(name, seconds):
                job = pods.owners.get(worker.job, {})
                silent = not (job.get("status") or {}).get("conditions")
                return f"worker {worker.index}: {_NO_OPERATOR if silent else why}"
        return ""

    def _end(self, reason: str) -> None:
        """Give the run its verdict, which tells the workers that are left to save and leave."""
        self._verdict = keys.Verdict("failed", reason)
        try:
            keys.finish(self._etcd, "failed", reason)
        except EtcdError as error:
            self._say(f"warning: etcd does not know that the run has failed: {error}")

    def _ask_etcd(self) -> None:
        self._asked_etcd = time.monotonic()
        try:
            self._verdict = keys.verdict(self._etcd)
        except EtcdError as error:
            if self._shown is not None:
                self._say_of_etcd(f"etcd does not answer, the workers go on by themselves: {error}")
        else:
            self._say_of_etcd("")

    def _say_of_etcd(self, text: str) -> None:
        if text and not self._etcd_away:
            self._say(text)
        elif not text and self._etcd_away:
            self._say("etcd answers again")
        self._etcd_away = bool(text)

    def _wind_up(self, pods: Pods) -> None:
        """Let the workers end: by themselves when they are done, else with their jobs. They save, and leave."""
        if self._verdict.status == "failed":
            for name, job in pods.owners.items():
                alive = (pod for pod in pods.pods.values() if diagnosis.exit_status(pod, CONTAINER) is None)
                if not has_ended(job) or any(_is_of(pod, job) for pod in alive):  # a failed job may have pods that run
                    self._client.delete(PYTORCH_JOB, name)
        deadline = time.monotonic() + GRACE_PERIOD
        while (
            any(diagnosis.exit_status(pod, CONTAINER) is None for pod in _started(pods)) and time.monotonic() < deadline
        ):
            pods.wake.wait(LOOK_INTERVAL)
            self._look(pods)
        pods.finish_reading(list(pods.pods))
        self._update()

    def _by_checkpoint(self) -> tuple[int, ...]:
        newest = self._log.newest_checkpoints()
        processes = self._config.elastic.nproc_per_node
        places = {
            worker.index: max(newest.get(worker.index * processes + rank, (-1, -1)) for rank in range(processes))
            for worker in self._plan.workers
        }
        return tuple(sorted(places, key=lambda index: places[index], reverse=True))

    def _hear(self, pod: Object, line: str) -> None:
        """Take a line that a pod has said; from its log's thread."""
        worker = self._workers.get(pod["metadata"]["name"])
        if worker is None:
            return
        told = pod_main.parse(line)
        if told is not None and told[0] == pod_main.METRICS:
            self._log.write(worker.index, told[1])
        elif line.strip():
            if line.startswith("error: "):
                self._last_words[pod["metadata"]["uid"]] = line.removeprefix("error: ")
            self._say(f"worker {worker.index} | {line}")

    def _update(self) -> None:
        """Show what the workers' events say."""
        for progress in self._progress:
            for event in progress.update():
                if event["event"] == "end" and event["status"] == "failed":
                    self._say(f"worker {progress.number} ended: {event['reason']}")
        fill(self._board, self._progress)
        if self._shown is not None:
            self._shown.refresh()

    def _say(self, text: str) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.show(text)
            else:
                self._session.say(text)

    def _called(self, pod: Object) -> str:
        worker = self._workers.get(pod["metadata"]["name"])
        if worker is None:
            return str(pod["metadata"]["name"])
        return f"worker {worker.index}" + (f" at {worker.site.name}" if len(self._plan.sites) > 1 else "")

    def _members(self, job: str) -> list[WorkerPlan]:
        return [worker for worker in self._plan.workers if worker.job == job]

    def _names(self, workers: Sequence[WorkerPlan]) -> str:
        numbers = ", ".join(str(worker.index) for worker in workers)
        return f"worker{'s' if len(workers) > 1 else ''} {numbers}"


_FROM_OUTSIDE = (diagnosis.KILLED, diagnosis.TOLD_TO_LEAVE)  # ends of which a container knows nothing
_NO_OPERATOR = "is Kubeflow's training operator installed, and running?"


def _is_of(pod: Object, job: Object) -> bool:
    """Whether the pod is this job's, and not one's that had its name before."""
    return any(one["uid"] == job["metadata"]["uid"] for one in pod["metadata"].get("ownerReferences") or [])


def _started(pods: Pods) -> Iterator[Object]:
    return (pod for pod in pods.pods.values() if diagnosis.has_started(pod, CONTAINER))
