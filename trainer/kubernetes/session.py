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
        own = names.training_labels(self.plan.config, "")[names.RUN_LABEL]
        jobs, _ = self.client.list(PYTORCH_JOB, names.selector(deployment))
        for job in jobs:
            if job["metadata"]["labels"].get(names.RUN_LABEL) != own and not has_ended(job):
                other = job["metadata"].get("annotations", {}).get(f"{names.PREFIX}/run-id", job["metadata"]["name"])
                allowed = f"its claims are in use by run {other}: wait for it, or choose another deployment_name"
                raise ConfigError("deployment_name", self.plan.config.deployment_name, allowed)

    def clean_up(self, *, jobs: bool = True, claims: bool = False) -> None:
        """Delete what the run has made.

        Args:
            jobs: Its jobs, too, with their pods: workers that still train save and leave.
            claims: Its claims, too, with all that lies on them.
        """
        for kind in (PYTORCH_JOB, JOB) if jobs else ():
            for one in self.client.list(kind, self.plan.selector)[0]:
                self.client.delete(kind, one["metadata"]["name"])
        for body in (run_secret(self.plan, ""), config_map(self.plan), network_policy(self.plan)):
            self.client.delete(KINDS[body["kind"]], body["metadata"]["name"])
        for worker in self.plan.claimants if claims else ():
            self.client.delete(CLAIM, worker.claim)


def condition(job: Object, kind: str) -> bool:
    """Whether a PyTorchJob's condition of this kind holds."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(one["type"] == kind and one["status"] == "True" for one in conditions)


def has_ended(job: Object) -> bool:
    """Whether a PyTorchJob is over, well or not."""
    return condition(job, "Succeeded") or condition(job, "Failed")


def _own_pod(namespace: str, say: Say) -> tuple[Owner | None, str]:
    """The workflow that this pod is a step of, if it is in `namespace`, and the pod's image; (None, "") elsewhere."""
    try:
        own = (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:  # not in a pod
        return None, ""
    name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
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
