"""A step of the pipeline on its cluster: who it is, what the training is called, and what all steps do alike."""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.kubernetes import names
from trainer.kubernetes.client import (
    CLAIM,
    JOB,
    KINDS,
    POD,
    PYTORCH_JOB,
    SECRET,
    ApiError,
    Client,
    Kind,
    Object,
)
from trainer.kubernetes.network import network_policy
from trainer.kubernetes.plan import Owner, Plan, plan
from trainer.kubernetes.settings import config_map, run_secret

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_STEP_CONTAINER = "main"  # Argo's name of it

Say = Callable[[str], None]


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


@dataclass(frozen=True)
class Session:
    """What a step has in hand.

    Attributes:
        client: Speaks to the training's namespace.
        plan: The training on the cluster.
        say: Prints a line.
    """

    client: Client
    plan: Plan
    say: Say

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
        owner, own_image = _own_pod(config.deployment_namespace, say)
        return cls(client, plan(config, namespace=client.namespace, image=own_image or image, owner=owner), say)

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
        for body in (run_secret(self.plan, ""), config_map(self.plan), network_policy(self.plan)):
            self.client.delete(KINDS[body["kind"]], body["metadata"]["name"])
        for worker in self.plan.claimants if claims else ():
            self.client.delete(CLAIM, worker.claim)

    def adopt(self, kind: Kind, there: Object) -> None:
        """Have an object of the run that another workflow has made end with this one."""
        if self._other_owner(there):
            assert self.plan.owner is not None
            change = {"metadata": {"ownerReferences": [self.plan.owner.reference()]}}
            self.client.patch(kind, there["metadata"]["name"], change)

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


def _own_pod(namespace: str, say: Say) -> tuple[Owner | None, str]:
    """The workflow that this pod is a step of, if it is in `namespace`, and the pod's image; (None, "") elsewhere."""
    own, name = own_namespace(), os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    if not own:
        return None, ""
    try:
        pod = Client(own).get(POD, name)
    except ApiError as error:
        say(f"warning: what this step makes does not end with its workflow: {error}")
        return None, ""
    if pod is None:
        return None, ""
    containers = {container["name"]: container["image"] for container in pod["spec"]["containers"]}
    image = containers.get(_STEP_CONTAINER) or next(iter(containers.values()))
    owners = [one for one in pod["metadata"].get("ownerReferences") or [] if one["kind"] == "Workflow"]
    if not owners or own != namespace:
        return None, image
    workflow = owners[0]
    return Owner(workflow["apiVersion"], workflow["kind"], workflow["name"], workflow["uid"]), image
