"""A step of the pipeline on its cluster: who it is, what the training is called, and what all steps do alike."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.client import (
    CLAIM,
    JOB,
    KINDS,
    POD,
    PYTORCH_JOB,
    SECRET,
    WORKFLOW,
    ApiError,
    Client,
    Kind,
    Object,
)
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.network import network_policy
from trainer.kubernetes.objects.plan import Owner, Plan, plan
from trainer.kubernetes.objects.settings import config_map, run_secret

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_STEP_CONTAINER = "main"  # Argo's name of it
_ASKING = 1.0  # seconds for the workflow to be read: a step that is terminated has about two until it is killed
_OVER = ("Succeeded", "Failed", "Error")  # Argo's phases of a workflow that has ended
_STOPPED = ("Terminate", "Stop")  # `spec.shutdown` of one that Argo's own commands end

Say = Callable[[str], None]


def say(line: str) -> None:
    """Print a line at once; or not at all, if its reader is gone: SIGTERM ends KFP's launcher, through which a step
    prints, before the step, which must still clean up."""
    with suppress(BrokenPipeError):
        print(line, flush=True)


@dataclass(frozen=True)
class Workflow:
    """The Argo workflow that a step belongs to; it may be in another namespace than what the step makes.

    Attributes:
        name, uid: Empty if the step's pod, which refers to it, could not be read.
    """

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class Session:
    """What a step has in hand.

    Attributes:
        client: Speaks to the training's namespace.
        plan: The training on the cluster.
        say: Prints a line.
        workflow: That the step belongs to; None: it is a person's own, in a pod or not.
    """

    client: Client
    plan: Plan
    say: Say
    workflow: Workflow | None = None

    @classmethod
    def open(cls, config: TrainingConfig, image: str, say: Say = say) -> Self:
        """Find the cluster, the step's own pod and so the workflow that owns everything, and plan the training.

        Args:
            config: Resolved.
            image: The project's, where neither the configuration nor the step's own pod has one.

        Raises:
            ConfigError: The configuration does not fit a cluster.
            TrainingError: There is no cluster, or it refuses us.
        """
        client = Client(config.deployment_namespace)
        owner, workflow, own_image = _own_pod(config.deployment_namespace, say)
        made = plan(config, namespace=client.namespace, image=own_image or image, owner=owner)
        return cls(client, made, say, workflow)

    def apply(self, body: Object) -> None:
        """Create an object of the run, or bring it up to date."""
        try:
            self.client.create(body)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            self.client.patch(KINDS[body["kind"]], body["metadata"]["name"], body)

    def prepare(self) -> None:
        """What pods need before they start: their configuration, and leave to speak to each other."""
        self.apply(config_map(self.plan))
        self.apply(network_policy(self.plan))

    def new_token(self) -> str:
        """A new secret for whoever takes a result. It is known here and to the pods, and read back by nobody."""
        token = secrets.token_urlsafe(32)
        body = run_secret(self.plan, token)
        self.client.delete(SECRET, body["metadata"]["name"])
        self.client.create(body)
        return token

    def refuse_claims_in_use(self) -> None:
        """Raise ConfigError if another run of the same deployment trains on the claims."""
        deployment = {names.DEPLOYMENT_LABEL: self.plan.config.deployment_name}
        own = self.plan.own_labels[names.RUN_LABEL]
        jobs, _ = self.client.list(PYTORCH_JOB, names.selector(deployment))
        for job in jobs:
            if job["metadata"]["labels"].get(names.RUN_LABEL) != own and not has_ended(job):
                other = job["metadata"].get("annotations", {}).get(f"{names.PREFIX}/run-id", job["metadata"]["name"])
                allowed = f"its claims are in use by run {other}: wait for it, or choose another deployment_name"
                raise ConfigError("deployment_name", self.plan.config.deployment_name, allowed)

    def workflow_has_ended(self) -> bool:
        """Whether the workflow that this step belongs to was terminated, or is over: what a step that is interrupted
        must know. Else only its pod goes away (a drain, an eviction), and the next one goes on with the work.

        KFP terminates a workflow by `spec.activeDeadlineSeconds: 0`, which is set before the step gets its SIGTERM.
        A step without a workflow is a person's, who has just ended it. Where asking fails the answer is no, and that is
        printed: the exit handler and the owner references clean up what is left of a workflow that is over.
        """
        return self._workflow_has_ended

    @cached_property
    def _workflow_has_ended(self) -> bool:  # asked once: there may be no time for more
        own = self.workflow
        if own is None:
            return True
        if not own.name:
            self.say("warning: it cannot be found out whether the workflow of this step was terminated")
            return False
        try:
            client = self.client if own.namespace == self.client.namespace else Client(own.namespace)
            workflow = client.get(WORKFLOW, own.name, timeout=_ASKING)
        except TrainingError as error:
            self.say(f"warning: it cannot be found out whether workflow {own.name} was terminated: {error}")
            return False
        if workflow is None or workflow["metadata"]["uid"] != own.uid:
            return True
        spec, status = workflow.get("spec") or {}, workflow.get("status") or {}
        return bool(
            workflow["metadata"].get("deletionTimestamp")
            or spec.get("activeDeadlineSeconds") == 0
            or spec.get("shutdown") in _STOPPED
            or status.get("phase") in _OVER
        )

    def clean_up_jobs(self, *, finished: bool) -> None:
        """Delete the run's Jobs, and what only they need: unless a training of the run is under way, as one of an
        earlier workflow's may be, that is all but the claims.

        Args:
            finished: Also those that have ended, or are another workflow's.
        """
        if finished:
            self.client.delete_all(JOB, self.plan.selector)
        else:
            for job in self.client.list(JOB, self.plan.selector)[0]:
                if not has_ended(job) and not self._other_owner(job):
                    self.client.delete(JOB, job["metadata"]["name"])
        if all(has_ended(job) for job in self.client.list(PYTORCH_JOB, self.plan.selector)[0]):
            self._delete_settings()

    def clean_up(self, *, finished: bool = True, claims: bool = False) -> None:
        """Delete what the run has made; workers that still train save and leave.

        Args:
            finished: Also jobs that have ended, with their pods and logs; these go by themselves after `finished_ttl`.
                Else nothing is deleted while another workflow goes on with the run.
            claims: Its claims, too, with all that lies on them, unless another run uses them. A claim is gone only when
                all pods are that have mounted it: jobs that have ended are deleted then, too.
        """
        running: list[tuple[Kind, str]] = []
        for kind in (PYTORCH_JOB, JOB) if not finished else ():
            for one in self.client.list(kind, self.plan.selector)[0]:
                if has_ended(one):
                    continue
                if other := self._other_owner(one):
                    self.say(f"workflow {other} goes on with run {self.plan.run_id}: nothing is deleted")
                    return
                running.append((kind, one["metadata"]["name"]))
        if claims:
            try:
                self.refuse_claims_in_use()
            except ConfigError as error:
                self.say(f"warning: the claims are kept: {error}")
                claims = False
        if finished or claims:  # the jobs first, at once: a step that is cancelled may have a second
            for kind in (PYTORCH_JOB, JOB):
                self.client.delete_all(kind, self.plan.selector)
        else:
            for kind, job in running:
                self.client.delete(kind, job)
        self._delete_settings()
        for worker in self.plan.claimants if claims else ():
            self.client.delete(CLAIM, worker.claim)

    def adopt(self, kind: Kind, there: Object) -> None:
        """Have an object of the run that another workflow has made end with this one."""
        if self._other_owner(there):
            assert self.plan.owner is not None
            change = {"metadata": {"ownerReferences": [self.plan.owner.reference()]}}
            self.client.patch(kind, there["metadata"]["name"], change)

    def _delete_settings(self) -> None:
        for body in (run_secret(self.plan, ""), config_map(self.plan), network_policy(self.plan)):
            self.client.delete(KINDS[body["kind"]], body["metadata"]["name"])

    def _other_owner(self, one: Object) -> str:
        """The name of the workflow that owns it, if that is another one than this step's."""
        if self.plan.owner is None:
            return ""
        owners = one["metadata"].get("ownerReferences") or []
        others = (o["name"] for o in owners if o["kind"] == self.plan.owner.kind and o["uid"] != self.plan.owner.uid)
        return next(others, "")


def refuse_foreign(wanted: Object, there: Object) -> None:
    """Raise ConfigError if the object that has the name of a wanted one is of another deployment, or another run.

    Names can meet: those of deployment `llm` at a site `eu-west`, and of deployment `llm-eu` at a site `west`.
    """
    ours, theirs = (one["metadata"].get("labels") or {} for one in (wanted, there))
    labels = {names.DEPLOYMENT_LABEL: "deployment", names.RUN_LABEL: "run"}
    if all(theirs.get(label, ours.get(label)) == ours.get(label) for label in labels):
        return

    def whose(has: Object) -> str:
        return " of ".join(f"{what} {has[label]}" for label, what in reversed(labels.items()) if label in has)

    name = f"{wanted['kind']} {wanted['metadata']['name']}"
    allowed = f"{name} would be that of {whose(ours)}, and is that of {whose(theirs)}: choose another name"
    raise ConfigError("deployment_name", ours[names.DEPLOYMENT_LABEL], allowed)


def condition(job: Object, kind: str) -> bool:
    """Whether a Job's or PyTorchJob's condition of this kind holds."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(one["type"] == kind and one["status"] == "True" for one in conditions)


def has_ended(job: Object) -> bool:
    """Whether a Job or PyTorchJob is over, well or not."""
    return any(condition(job, kind) for kind in ("Complete", "Succeeded", "Failed"))


def own_namespace() -> str:
    """The namespace of the pod that this runs in; "" elsewhere."""
    if "KFP_POD_NAME" in os.environ and (given := os.environ.get("NAMESPACE")):  # the newest backends set it
        return given
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:  # not in a pod
        return ""


def _own_pod(namespace: str, say: Say) -> tuple[Owner | None, Workflow | None, str]:
    """The workflow that this pod is a step of, as an owner if it is in `namespace`; and the pod's image, or ""."""
    own, name = own_namespace(), os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    if not own:
        return None, None, ""
    try:
        pod = Client(own).get(POD, name)
    except ApiError as error:
        say(f"warning: what this step makes does not end with its workflow: {error}")
        pod = None
    if pod is None:  # of a workflow it is all the same, if KFP has started it
        return None, Workflow(own, "", "") if "KFP_POD_NAME" in os.environ else None, ""
    containers = {container["name"]: container["image"] for container in pod["spec"]["containers"]}
    image = containers.get(_STEP_CONTAINER) or next(iter(containers.values()))
    owners = [one for one in pod["metadata"].get("ownerReferences") or [] if one["kind"] == "Workflow"]
    if not owners:
        return None, None, image
    one = owners[0]
    workflow = Workflow(own, one["name"], one["uid"])
    owner = Owner(one["apiVersion"], one["kind"], one["name"], one["uid"]) if own == namespace else None
    return owner, workflow, image
