"""A stand-in for a cluster to run the steps of the pipeline on, and what they have printed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.apiserver import ApiServer, Object
from tests.cluster.nodes import Cluster
from tests.cluster.story import Story
from trainer.config import TrainingConfig
from trainer.errors import Interrupted
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.kinds import KINDS, TRAINING_KINDS, WORKFLOW
from trainer.kubernetes.steps.step_context import StepContext
from trainer.kubernetes.steps.workflow import Workflow
from trainer.timeouts import KubernetesTimeouts

ANOTHER_OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "diloco-training-b2c3d",
    "uid": "00000000-0000-4000-8000-000000000001",
}


OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "diloco-training-x7k2p",
    "uid": "7b1c0e9e-0000-4000-8000-000000000000",
}

# Of the chart: it runs the whole pipeline in one pod
JOB_OWNER = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "name": "my-training-1a2b3c4d",
    "uid": "7b1c0e9e-0000-4000-8000-000000000002",
}


# On every pod of a KFP step (backend/src/v2/compiler/argocompiler in kubeflow/pipelines).
STEP_LABELS = {"pipelines.kubeflow.org/v2_component": "true"}


QUICK = KubernetesTimeouts(
    outage=2.0,
    retry=0.05,
    longest_log_retry=0.2,
    look=0.1,
    etcd=0.1,
    seen=1.0,
    poll=0.05,
    explain_after=0.1,
    explain_interval=0.2,
)


class Place:
    """A cluster to run steps on, and what they said.

    Attributes:
        kind: Of the training's jobs.
        timeouts: Of the steps.
        apart: Whether the workflow is in another namespace, where no owner reference can name it.
        lines: What the steps have said.
        on_line: Called with each line, in the step's thread: what it raises happens to the step.
    """

    def __init__(self, server: ApiServer, etcd: str, run_id: str, launcher: str = "pytorchjob") -> None:
        self.server, self.story, self.run_id = server, Story(), run_id
        self.launcher, self.kind = launcher, TRAINING_KINDS[launcher]
        self.owner: Object | None = OWNER
        self.apart = False
        for owner in (OWNER, ANOTHER_OWNER):
            metadata = {"name": owner["name"], "uid": owner["uid"]}
            server.put("workflows", {"metadata": metadata, "spec": {}, "status": {"phase": "Running"}})
        self.cluster = Cluster(server, self.story)
        self.timeouts = QUICK
        self.lines: list[str] = []
        self.on_line: Callable[[str], None] = lambda line: None
        self._etcd = etcd
        self._said = threading.Condition()

    def context(self, **values: Any) -> StepContext:
        quick = {
            "collective_timeout": 0.1,
            "grace_period": 0.2,
            "lease_ttl": 1.0,
            "etcd_outage_limit": 1.0,
            "elastic_rdzv_timeout": 30.0,
        }
        base = {"launcher": self.launcher, "run_id": self.run_id, "device": "cpu", "etcd_endpoints": [self._etcd]}
        config = TrainingConfig.from_flat({**base, **quick, **values}).resolved()
        workflow = None
        if self.owner:
            kind = KINDS.get(self.owner["kind"], WORKFLOW)
            workflow = Workflow("default", self.owner["name"], self.owner["uid"], kind)
        client = Client(config.deployment_namespace, self.timeouts)
        return StepContext.of(client, config, "python:1", self.say, None if self.apart else self.owner, workflow)

    def jobs(self) -> dict[str, Object]:
        """The training's jobs, by name."""
        return self.server.all(self.kind.plural)

    def terminate(self) -> None:
        """Terminate the workflow, as KFP does: before the step hears of it."""
        assert self.owner is not None
        self.server.update("workflows", self.owner["name"], lambda one: one["spec"].update(activeDeadlineSeconds=0))

    def say(self, line: str) -> None:
        with self._said:
            self.lines.append(line)
            self._said.notify_all()
        self.on_line(line)

    def wait_for(self, *words: str, seconds: float = 300.0) -> str:
        """Return the line with these words, once it has been said."""

        def found() -> str:
            return next((line for line in self.lines if all(word in line for word in words)), "")

        with self._said:
            assert self._said.wait_for(found, seconds), f"{words} were never said in {self.lines}"
            return found()

    def said(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self.lines)

    def etcd(self) -> EtcdClient:
        """The run's keys, with more patience than the run's short limits allow its own clients."""
        config = self.context().plan.config
        return EtcdClient([self._etcd], run_prefix(config.elastic.etcd.prefix, config.run_id))


# Of the tests of what differs between the kinds of training jobs: fixture `launcher`.
both_kinds = pytest.mark.parametrize("launcher", ["pytorchjob", "trainjob"])


def worker_of(pod: Object) -> int:
    """The worker whose own pod this is."""
    return int(pod["metadata"]["labels"]["diloco-pipelines/worker"])


def never(*_: Any) -> None:
    """A pod that nothing is heard of."""


def started_once_said(place: Place, *words: str) -> Callable[[Cluster, Object], None]:
    """Precaches when the step has said these words."""

    def go_on(cluster: Cluster, pod: Object) -> None:
        place.wait_for(*words)
        place.story.precache(cluster, pod)

    return go_on


def interrupt_at(words: str, first: Callable[[], None] = lambda: None) -> Callable[[str], None]:
    """SIGTERM when the step prints these words, after what happens first; once."""
    done: list[str] = []

    def interrupt(line: str) -> None:
        if words in line and not done:
            done.append(line)
            first()
            raise Interrupted

    return interrupt


def delete(place: Place, owner: Object) -> None:
    """The workflow is deleted, by a finalizer's leave only later: the garbage collector has not begun yet."""
    place.server.update(
        "workflows", owner["name"], lambda one: one["metadata"].update(deletionTimestamp="2026-11-28T00:00:00Z")
    )


class Died(BaseException):
    """The step's pod is gone, without a signal."""


def die_at(words: str) -> Callable[[str], None]:
    def die(line: str) -> None:
        if words in line:
            raise Died

    return die


def events(directory: Path, worker: int) -> list[str]:
    """A worker's events, as the step keeps them."""
    return (directory / f"worker-{worker}" / "metrics.jsonl").read_text().splitlines()
