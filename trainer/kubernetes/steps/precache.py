"""The precache step: a claim for each worker, filled by a Job that runs where the worker will.

Claims outlive the run: a later one finds them, and its Jobs, which compare what lies there with what should, take
seconds.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import Interrupted, TrainingError
from trainer.kubernetes.api.client import CLAIM, ApiError, Object
from trainer.kubernetes.objects import jobs, names
from trainer.kubernetes.objects.claims import claim
from trainer.kubernetes.objects.plan import WorkerPlan
from trainer.kubernetes.steps.job_runner import Jobs
from trainer.kubernetes.steps.results import take
from trainer.kubernetes.steps.session import Session, refuse_foreign

CLAIM_TIMEOUT = 300.0  # seconds for a claim that was deleted to be gone
CLAIM_INTERVAL = 1.0  # seconds between two looks at it


@dataclass(frozen=True)
class Precached:
    """What the precache step has made, or found.

    Attributes:
        claims: By name, what lies on each: the dataset's manifest without its list of files.
    """

    claims: dict[str, dict[str, Any]]


def precache(session: Session, held_out: Path) -> Precached:
    """Make or find the workers' claims, put the dataset and the model onto each, and fetch the held-out part.

    Args:
        held_out: Directory that takes the held-out part of the dataset, with its manifest and tokenizer.

    Nothing cleans up after this step but itself: the pipeline's exit handler is only for the steps that follow. If it
    fails, or its workflow was terminated, what still runs is deleted, and what only that needed; claims stay, and after
    a failure ended jobs, to be read. If only its pod goes away the step's next one goes on with the jobs.

    Raises:
        ConfigError: The claims are in use by another run.
        TrainingError: A claim cannot be filled, with the reason; or two claims hold different data.
    """
    session.refuse_claims_in_use()
    for worker in session.plan.claimants:
        _ensure_claim(session, worker)
    try:
        return _precache(session, held_out)
    except (Interrupted, KeyboardInterrupt):
        if session.workflow_has_ended():
            session.clean_up_jobs(finished=True)  # before anything else: there may be less than a second
            session.say("cancelled: the precaching jobs are deleted")
        else:
            session.say("this step goes away, and its jobs go on: the step's next pod follows them")
        raise
    except Exception:
        try:
            session.clean_up_jobs(finished=False)
        except TrainingError as error:  # the step's own failure is what its last line must say
            session.say(f"warning: what the step has made is not cleaned up: {error}")
        raise


def _precache(session: Session, held_out: Path) -> Precached:
    session.prepare()
    found = _fill(session)
    hashes = {name: manifest["hash"] for name, manifest in found.items()}
    if len(set(hashes.values())) > 1:
        different = ", ".join(f"{name}: {hash[:12]}" for name, hash in hashes.items())
        raise TrainingError(
            f"the claims hold different data, so the source has changed meanwhile ({different}): precache again"
        )
    session.say(f"{len(found)} claims are precached: {', '.join(found)}")
    take(session, session.plan.claimants[:1], "held-out", held_out)
    return Precached(found)


def _ensure_claim(session: Session, worker: WorkerPlan) -> None:
    body = claim(session.plan, worker)
    deadline, waits = time.monotonic() + CLAIM_TIMEOUT, False
    while True:
        try:
            session.client.create(body)
            session.say(f"claim {worker.claim} made")
            return
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
        there = session.client.get(CLAIM, worker.claim)
        if there is None:
            continue
        refuse_foreign(body, there)
        if not there["metadata"].get("deletionTimestamp"):
            session.say(f"claim {worker.claim} found{_differs(body, there)}")
            return
        users = f"a pod still uses it (kubectl describe persistentvolumeclaim {worker.claim})"
        if time.monotonic() > deadline:
            raise TrainingError(f"claim {worker.claim} was deleted, and is there {CLAIM_TIMEOUT:.0f} s later: {users}")
        if not waits:
            session.say(f"claim {worker.claim} is being deleted: waiting until it is gone; {users}")
            waits = True
        time.sleep(CLAIM_INTERVAL)


def _differs(wanted: Object, there: Object) -> str:
    """In what a claim that is there differs from what one would make: it is used as it is, and that is said."""
    said = []
    for what, path in {
        "access mode": ("spec", "accessModes"),
        "storage class": ("spec", "storageClassName"),
        "size": ("spec", "resources", "requests", "storage"),
    }.items():
        ours, theirs = _at(wanted, path), _at(there, path)
        if ours is not None and ours != theirs:
            said.append(f"its {what} is {theirs}, not {ours}")
    return f" (used as it is: {', '.join(said)})" if said else ""


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = (tree or {}).get(key)
    return tree


def _fill(session: Session) -> dict[str, dict[str, Any]]:
    """Run a Job on each claim, all at once. Returns what lies on each claim then."""
    plan = session.plan
    workers = {jobs.precache_job(plan, worker)["metadata"]["name"]: worker for worker in plan.claimants}
    bodies = {f"precaching for worker {worker.index}": jobs.precache_job(plan, worker) for worker in workers.values()}
    found: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def told(job: str, pod: Object, word: str, content: dict[str, Any]) -> None:
        with lock:
            found[workers[job].claim] = content

    selector = f"{plan.selector},{names.selector({'app.kubernetes.io/component': 'precache'})}"
    timeout = plan.config.elastic.rdzv_timeout
    Jobs(session.client, bodies, selector, session.say, told, timeout=timeout).run()
    missing = [worker.claim for worker in plan.claimants if worker.claim not in found]
    if missing:
        raise TrainingError(f"the Job on claim {missing[0]} ended without a word about what lies there: precache again")
    return {worker.claim: found[worker.claim] for worker in plan.claimants}
