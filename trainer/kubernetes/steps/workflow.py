"""The step's own pod and its owner: an Argo workflow, or a Job that runs the whole pipeline in one pod."""

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import JOB, POD, WORKFLOW, JobKind, Kind, Object
from trainer.kubernetes.api.mounts import places_of
from trainer.kubernetes.api.notices import Show
from trainer.places import Places
from trainer.timeouts import KubernetesTimeouts

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_STEP_CONTAINER = "main"  # Argo's name for a step's container
KINDS = {kind.name: kind for kind in (WORKFLOW, JOB)}


@dataclass(frozen=True)
class Workflow:
    """A step's Argo workflow, or its Job. Its namespace may differ from the training's."""

    namespace: str
    name: str  # empty, like `uid`, if the step's pod, which refers to the workflow, cannot be read
    uid: str
    kind: Kind = WORKFLOW

    @property
    def mark(self) -> str:
        """The value of the annotation that names it in other namespaces and clusters, or ""."""
        return f"{self.kind.name}/{self.name}/{self.uid}" if self.name else ""

    def marked(self, mark: str) -> "Workflow":
        """The workflow with this mark, which does not contain a namespace: assumed to be this workflow's."""
        kind, name, uid = mark.split("/")
        return Workflow(self.namespace, name, uid, KINDS[kind])

    def has_ended(self, client: Client) -> bool:
        """Whether it was terminated or is over. Raises TrainingError if it cannot be read.

        KFP terminates a workflow with `spec.activeDeadlineSeconds: 0`, which is set before the step gets its SIGTERM. A
        Job is terminated by deleting it, for example with `helm uninstall`.
        """
        if self.namespace != client.namespace:
            client = Client(self.namespace, client.timeouts)
        workflow = client.get(self.kind, self.name, timeout=client.timeouts.workflow)
        if workflow is None or workflow["metadata"]["uid"] != self.uid:
            return True
        if workflow["metadata"].get("deletionTimestamp"):
            return True
        if isinstance(self.kind, JobKind):
            return self.kind.has_ended(workflow)
        spec, status = workflow.get("spec") or {}, workflow.get("status") or {}
        return bool(
            spec.get("activeDeadlineSeconds") == 0
            or spec.get("shutdown") in ("Terminate", "Stop")  # by Argo's own commands
            or status.get("phase") in ("Succeeded", "Failed", "Error")
        )


def own_namespace() -> str:
    """The namespace of this process's pod; "" outside a pod."""
    if "KFP_POD_NAME" in os.environ and (given := os.environ.get("NAMESPACE")):  # the newest backends set it
        return given
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except OSError:  # not in a pod
        return ""


def _own_name() -> str:
    return os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")


def own_places() -> Places:
    """The volumes of the step's own pod; none if the pod cannot be read."""
    try:
        pod = Client(own_namespace()).get(POD, _own_name())
    except TrainingError:
        return Places()
    return places_of(pod, _STEP_CONTAINER) if pod else Places()


def own_pod(namespace: str, show: Show, timeouts: KubernetesTimeouts) -> tuple[Object | None, Workflow | None, str]:
    """An owner reference to the step's workflow if it is in `namespace`, the workflow, and its pod's image (or "")."""
    own, name = own_namespace(), _own_name()
    if not own:
        return None, None, ""
    try:
        pod = Client(own, timeouts).get(POD, name)
    except ApiError as error:
        show(f"warning: the objects of this step do not end with its workflow: {error}")
        pod = None
    if pod is None:  # a step started by KFP still has a workflow
        return None, Workflow(own, "", "") if "KFP_POD_NAME" in os.environ else None, ""
    containers = {container["name"]: container["image"] for container in pod["spec"]["containers"]}
    image = containers.get(_STEP_CONTAINER) or next(iter(containers.values()))
    for one in pod["metadata"].get("ownerReferences") or []:
        if kind := KINDS.get(one["kind"]):
            owner = {key: one[key] for key in ("apiVersion", "kind", "name", "uid")}
            return owner if own == namespace else None, Workflow(own, one["name"], one["uid"], kind), image
    return None, None, image
