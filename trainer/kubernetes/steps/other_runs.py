"""Other runs of a deployment, which use the same claims: a run must be over before the next one starts.

A run is under way from its first step, which creates its ConfigMap, until its workflow ends; between two steps, it has
no job by which it could be recognised. If two start at the same time, for example missed runs of a schedule, the one
with the older ConfigMap continues. A run without a workflow in the namespace is recognised by its jobs.
"""

from trainer.errors import TrainingError
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.kinds import CONFIG_MAP, Object
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import Plan
from trainer.kubernetes.steps.workflow import KINDS, Workflow


def other_run(client: Client, plan: Plan, *, later: bool = False) -> str:
    """The id of another run of the plan's deployment that is under way; "" if there is none.

    Args:
        later: Whether to consider runs that started after this one.
    """
    labels = {names.DEPLOYMENT_LABEL: plan.config.deployment_name, names.COMPONENT_LABEL: "config"}
    found = sorted(client.list(CONFIG_MAP, names.selector(labels))[0], key=_age)
    own = next((place for place, one in enumerate(found) if _is_own(plan, one)), len(found))
    others = [one for one in (found if later else found[:own]) if not _is_own(plan, one)]
    # A run whose workflow is unknown is recognised by its jobs
    running = (one for one in others if is_under_way(client, one))
    return next((str(one["metadata"]["annotations"][names.RUN_ID]) for one in running), "")


def is_under_way(client: Client, one: Object, *, unknown: bool = False) -> bool:
    """Whether the workflow that an object belongs to is under way.

    Args:
        unknown: The result if it belongs to no workflow of the client's cluster, or the workflow cannot be read.
    """
    for owner in one["metadata"].get("ownerReferences") or []:
        if kind := KINDS.get(owner["kind"]):
            try:
                return not Workflow(client.namespace, owner["name"], owner["uid"], kind).has_ended(client)
            except TrainingError:
                return unknown
    return unknown


def _age(one: Object) -> tuple[str, str]:
    """A sort key that orders objects by age, deterministically."""
    return one["metadata"]["creationTimestamp"], one["metadata"]["uid"]


def _is_own(plan: Plan, one: Object) -> bool:
    """Whether a ConfigMap belongs to this run, or to another one of the same workflow."""
    metadata, label = one["metadata"], names.RUN_LABEL
    owners = [owner["uid"] for owner in metadata.get("ownerReferences") or []]
    return metadata["labels"].get(label) == plan.own_labels[label] or bool(plan.owner and plan.owner["uid"] in owners)
