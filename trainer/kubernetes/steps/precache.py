"""The precache step: a claim for each worker, filled by a Job that runs where the worker will run.

Claims outlive the run. A later run finds them, and its Jobs take only seconds to check their content.
"""

import time
from pathlib import Path
from typing import Any

from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes import pod_main
from trainer.kubernetes.api.client import ApiError
from trainer.kubernetes.api.kinds import CLAIM, JOB, Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects import jobs
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.steps.cluster import Cluster, refuse_foreign
from trainer.kubernetes.steps.fetch_results import fetch_result
from trainer.kubernetes.steps.job_runner import run_jobs
from trainer.kubernetes.steps.step_context import StepContext

Manifests = dict[str, dict[str, Any]]  # the manifest of the dataset on each claim, by claim, without the list of files


def precache(context: StepContext, held_out: Path) -> Manifests:
    """Create or find the workers' claims, put dataset and model onto each, and fetch the held-out shard.

    The pipeline's exit handler covers only the following steps, so this step cleans up after itself. If it fails, or
    its workflow is terminated, it deletes the Jobs that still run and the objects that only they need. Claims stay, as
    do ended Jobs after a failure, for their logs. If only the step's pod stops, the next one follows the Jobs.

    Args:
        held_out: Directory for the held-out shard of the dataset, with its manifest and tokenizer.

    Raises:
        ConfigError: The claims are used by another run.
        TrainingError: A claim cannot be filled (with the reason), or two claims contain different data.
    """
    # Refuse on all clusters before anything is created on one
    for cluster in context.clusters:
        cluster.refuse_claims_in_use()
    for cluster in context.clusters:
        for worker in cluster.plan.claimants:
            _ensure_claim(cluster, worker, context.show)
    try:
        return _precache(context, held_out)
    except (Interrupted, KeyboardInterrupt):
        if context.workflow_has_ended:
            context.clean_up(training=False)  # first, because there may be less than a second
            context.show("cancelled: the precaching jobs are deleted")
        else:
            context.show("this step's pod is stopped, and its jobs continue: the step's next pod follows them")
        raise
    except Exception:
        try:
            context.clean_up(finished=False, training=False)
        except TrainingError as error:  # the last line must be the step's own error
            context.show(f"warning: the step's objects are not cleaned up: {error}")
        raise


def _precache(context: StepContext, held_out: Path) -> Manifests:
    # Run a Job on each claim, all at once
    bodies: dict[Cluster, dict[str, Object]] = {}
    claims = {}  # by the Job's name
    for cluster in context.clusters:
        cluster.prepare()
        own = bodies[cluster] = {}
        for worker in cluster.plan.claimants:
            body = own[f"precaching for worker {worker.index}"] = jobs.step_job(cluster.plan, worker, "precache")
            claims[body["metadata"]["name"]] = worker.claim
    found: Manifests = {}
    for messages in run_jobs(context, bodies, "precache"):
        for message in messages:
            if message.word == pod_main.PRECACHED:
                found[claims[JOB.job_of(message.pod)]] = message.content

    # Compare the claims' content
    missing = [name for name in claims.values() if name not in found]
    if missing:
        raise TrainingError(f"the Job on claim {missing[0]} ended without reporting its content: precache again")
    found = {name: found[name] for name in claims.values()}
    if len({manifest["hash"] for manifest in found.values()}) > 1:
        different = ", ".join(f"{name}: {manifest['hash'][:12]}" for name, manifest in found.items())
        raise TrainingError(
            f"the claims hold different data, so the source has changed in the meantime ({different}): precache again"
        )
    context.show(f"{len(found)} claims are precached: {', '.join(found)}")
    first = next(iter(context.clusters))  # all claims contain the same data
    fetch_result(context, first.plan.claimants[:1], "held-out", held_out)
    return found


def _ensure_claim(cluster: Cluster, worker: WorkerPlan, show: Show) -> None:
    """Create or find a worker's claim. If an earlier claim is being deleted, wait until it is gone."""
    body, timeouts = jobs.claim(cluster.plan, worker), cluster.client.timeouts
    deadline, waits = time.monotonic() + timeouts.deleted, False
    while True:
        # Create it unless it exists
        try:
            cluster.client.create(body)
            show(f"claim {worker.claim} created")
            return
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        existing = cluster.client.get(CLAIM, worker.claim)
        if existing is None:
            continue
        refuse_foreign(body, existing)
        if not existing["metadata"].get("deletionTimestamp"):
            show(f"claim {worker.claim} found{_differences(body, existing)}")
            return

        # Wait until it is gone
        users = f"a pod still uses it (kubectl describe persistentvolumeclaim {worker.claim})"
        if time.monotonic() > deadline:
            left = f"was deleted, and still exists {timeouts.deleted:.0f} s later"
            raise TrainingError(f"claim {worker.claim} {left}: {users}")
        if not waits:
            show(f"claim {worker.claim} is being deleted: waiting until it is gone; {users}")
            waits = True
        time.sleep(timeouts.poll)


def _differences(wanted: Object, existing: Object) -> str:
    """A note on how an existing claim, which is used unchanged, differs from the wanted one."""
    spec, current = wanted["spec"], existing["spec"]
    pairs = {
        "access mode": (spec["accessModes"], current.get("accessModes")),
        "storage class": (spec.get("storageClassName"), current.get("storageClassName")),
        "size": tuple(one.get("resources", {}).get("requests", {}).get("storage") for one in (spec, current)),
    }
    different = {what: pair for what, pair in pairs.items() if pair[0] is not None and pair[0] != pair[1]}
    notes = ", ".join(f"its {what} is {theirs}, not {ours}" for what, (ours, theirs) in different.items())
    return f" (used unchanged: {notes})" if notes else ""
