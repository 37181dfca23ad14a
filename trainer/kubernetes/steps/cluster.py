"""A cluster that runs a part of the training: its API server, its namespace, its kind of jobs, and that part."""

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import CLAIM, CONFIG_MAP, JOB, KINDS, SECRET, TRAINING_KINDS, JobKind, Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.jobs import config_map, network_policy, run_secret
from trainer.kubernetes.objects.plan import Plan
from trainer.kubernetes.steps.job_deletion import JobDeletion
from trainer.kubernetes.steps.other_runs import is_under_way, other_run


class Cluster:
    """One of the training's clusters.

    The client and the plan are created when first needed: the former reads the cluster's Secret, and the latter may
    query the cluster for its kinds of jobs. A failure there must not prevent cleaning up the other clusters.

    Args:
        name: The Secret with its kubeconfig; "": the steps' own cluster.
        connect: Creates the client for the training's namespace there.
        make_plan: Creates the plan of the training's part.
        has_ended: Whether the workflow with a `Workflow.mark` was terminated or is over. Raises TrainingError if it
            cannot be read.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Client],
        make_plan: Callable[[Client], Plan],
        show: Show,
        has_ended: Callable[[str], bool],
    ) -> None:
        self.name, self._connect, self._make_plan, self._show = name, connect, make_plan, show
        self._has_ended = has_ended

    @cached_property
    def client(self) -> Client:
        """The client. Raises ConfigError if the kubeconfig cannot be used."""
        return self._connect()

    @cached_property
    def plan(self) -> Plan:
        """The plan. Raises TrainingError if the cluster supports no training jobs or cannot be queried."""
        return self._make_plan(self.client)

    def __str__(self) -> str:
        return f"cluster {self.name}" if self.name else "the cluster"

    def kubectl(self, verb: str, plurals: str, selector: str) -> str:
        """A kubectl command for the user."""
        where = f"  # {self}" if self.name else ""
        return f"kubectl {verb} {plurals} -n {self.client.namespace} -l {selector}{where}"

    def prepare(self) -> None:
        """Apply the objects that pods need before they start: configuration and network policy."""
        for body in (config_map(self.plan), network_policy(self.plan)):
            try:
                self.client.create(body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                self.client.patch(KINDS[body["kind"]], body["metadata"]["name"], body)

    def new_token(self) -> str:
        """Put a new token, which authorises fetching a result, into the run's Secret."""
        token = secrets.token_urlsafe(32)
        body = run_secret(self.plan, token)
        self.client.delete(SECRET, body["metadata"]["name"])
        self.client.create(body)
        return token

    def refuse_claims_in_use(self, *, later: bool = False) -> None:
        """Raise ConfigError if another run of the same deployment, or other jobs of this one, use the claims.

        `later`: also consider runs that started after this one.
        """
        deployment = self.plan.config.deployment_name
        for kind in TRAINING_KINDS.values():
            for job in self._jobs_of_deployment(kind):
                metadata, own = job["metadata"], self.plan.own_labels[names.RUN_LABEL]
                is_own = metadata["labels"].get(names.RUN_LABEL) == own and kind is self.plan.kind
                if not is_own and not kind.has_ended(job):
                    run = metadata.get("annotations", {}).get(names.RUN_ID, metadata["name"])
                    by = "" if kind is self.plan.kind else f" by {kind.name}s"
                    allowed = f"run {run} uses its claims{by}: wait for it, or choose another deployment_name"
                    raise ConfigError("deployment_name", deployment, allowed)
        if run := other_run(self.client, self.plan, later=later):
            allowed = f"run {run} has its claims, and is not over: wait for it, or choose another deployment_name"
            raise ConfigError("deployment_name", deployment, allowed)

    def _jobs_of_deployment(self, kind: JobKind) -> list[Object]:
        labels = names.selector({names.DEPLOYMENT_LABEL: self.plan.config.deployment_name})
        try:
            return self.client.list(kind, labels)[0]
        except ApiError as error:  # the other kind may not exist here, or may not be listed
            if kind is self.plan.kind or (error.reason != "KindNotFound" and error.status != 403):
                raise
            return []

    def adopt(self, kind: JobKind, existing: Object) -> None:
        """Make this step's workflow the owner of a job of the run that another workflow owns."""
        if self._other_owner(existing):
            change = {"metadata": self.plan.ownership}
            for one in (kind.before, kind) if kind.before else (kind,):
                self.client.patch(one, existing["metadata"]["name"], change)

    # The end

    def clean_up(self, *, finished: bool, training: bool, claims: bool) -> None:
        """Delete the run's objects on this cluster; see `StepContext.clean_up`."""
        # Keep what other workflows that continue the run use: all settings and Jobs, and their own training jobs
        kind = self.plan.kind
        kinds = (kind, JOB) if training else (JOB,)
        with ThreadPoolExecutor(1 + len(kinds)) as pool:  # all at once: a cancelled step may have only a second
            listing = pool.submit(self._settings)
            found = dict(zip(kinds, pool.map(self._jobs_of, kinds), strict=True))
            settings = listing.result()
        running = {one: [job for job in jobs if not one.has_ended(job)] for one, jobs in found.items()}
        others = self._others([*settings, *(job for jobs in running.values() for job in jobs)])
        if others:
            self._show(f"workflow {min(others)} continues run {self.plan.config.run_id}: what it uses is not deleted")
            claims = False
        elif claims:
            try:
                self.refuse_claims_in_use(later=True)
            except ConfigError as error:
                self._show(f"warning: the claims are kept: {error}")
                claims = False
        due = found if finished or claims else running
        if others:
            # Listed again, because another workflow may have adopted jobs in the meantime
            jobs = self._jobs_of(kind) if due.get(kind) else []
            due = {
                JOB: [],
                kind: [
                    job
                    for job in jobs
                    if self._other_owner(job) not in others and (finished or not kind.has_ended(job))
                ],
            }

        # Jobs first, for the same reason
        deletions = [self._begin_deletion(one, due[one], every=due is found) for one in kinds]
        if not others and (training or not self._running(kind)):
            for body in (run_secret(self.plan, ""), config_map(self.plan), network_policy(self.plan)):
                self.client.delete(KINDS[body["kind"]], body["metadata"]["name"])
        for worker in self.plan.claimants if claims else ():
            self.client.delete(CLAIM, worker.claim)

        # Wait for pods, if their jobs must be deleted after them
        for deletion in filter(None, deletions):
            self._show("waiting for the workers to save and leave")
            deletion.finish(self.plan.selector)
        # A step may have died before it created a job
        if training and kind.before and not (self._jobs_of(kind) or self._others(self._settings())):
            self.client.delete_all(kind.before, self.plan.selector)

    def _begin_deletion(self, kind: JobKind, jobs: list[Object], *, every: bool) -> JobDeletion:
        """Start deleting jobs of the run. `every`: they are all of the run's jobs of this kind."""
        deletion = JobDeletion(self.client, kind)
        if every and kind.before is None:
            self.client.delete_all(kind, self.plan.selector)
        else:
            deletion.begin(jobs)
        return deletion

    def _settings(self) -> list[Object]:
        """The run's settings. A workflow that continues the run owns them, because its steps first apply them."""
        return self.client.list(CONFIG_MAP, self.plan.component("config"))[0]

    def _others(self, objects: Sequence[Object]) -> set[str]:
        """The names of other workflows that continue the run: they own some of these settings and jobs."""
        owned = {name: one for one in objects if (name := self._other_owner(one))}
        return {name for name, one in owned.items() if self._is_under_way(one)}

    def _is_under_way(self, one: Object) -> bool:
        """Whether the workflow of an object is under way, or cannot be read."""
        if mark := _mark(one):
            try:
                return not self._has_ended(mark)
            except TrainingError:
                return True
        return is_under_way(self.client, one, unknown=True)

    def _jobs_of(self, kind: JobKind) -> list[Object]:
        """The run's jobs of a kind."""
        return self.client.list(kind, self.plan.selector)[0]

    def _running(self, kind: JobKind) -> list[Object]:
        """The run's jobs of a kind that have not ended."""
        return [job for job in self._jobs_of(kind) if not kind.has_ended(job)]

    def _other_owner(self, one: Object) -> str:
        """The name of an object's workflow if it is not this step's; else ""."""
        own, owners = self.plan.owner, one["metadata"].get("ownerReferences") or []
        others = (it["name"] for it in owners if own and it["kind"] == own["kind"] and it["uid"] != own["uid"])
        mark = _mark(one)
        if self.plan.workflow and mark and mark != self.plan.workflow:
            return mark.split("/")[1]
        return next(others, "")


def _mark(one: Object) -> str:
    """The `Workflow.mark` of an object's workflow, if no owner reference names it."""
    return str((one["metadata"].get("annotations") or {}).get(names.WORKFLOW, ""))


def refuse_foreign(wanted: Object, existing: Object) -> None:
    """Raise ConfigError if an existing object with a wanted name belongs to another deployment or run.

    Names can collide, for example of deployment `llm` at a site `eu-west` and deployment `llm-eu` at a site `west`.
    """
    ours, theirs = (one["metadata"].get("labels") or {} for one in (wanted, existing))
    labels = {names.DEPLOYMENT_LABEL: "deployment", names.RUN_LABEL: "run"}
    if all(theirs.get(label, ours.get(label)) == ours.get(label) for label in labels):
        return

    def owner(has: Object) -> str:
        return " of ".join(f"{what} {has[label]}" for label, what in reversed(labels.items()) if label in has)

    name = f"{wanted['kind']} {wanted['metadata']['name']}"
    allowed = f"{name} of {owner(ours)} already exists as that of {owner(theirs)}: choose another name"
    raise ConfigError("deployment_name", ours[names.DEPLOYMENT_LABEL], allowed)
