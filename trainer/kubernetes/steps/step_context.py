"""What all steps of the pipeline on a cluster share: the client, the plan, the workflow, and cleaning up."""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.kinds import CLAIM, JOB, KINDS, SECRET, TRAINING_KINDS, JobKind, Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.jobs import config_map, network_policy, run_secret
from trainer.kubernetes.objects.plan import Plan, plan
from trainer.kubernetes.steps.job_deletion import JobDeletion
from trainer.kubernetes.steps.workflow import Workflow, own_pod
from trainer.monitor.trackers import mlflow
from trainer.timeouts import KubernetesTimeouts


def show(line: str) -> None:
    """Print a line at once."""
    with suppress(BrokenPipeError):  # SIGTERM ends KFP's launcher, which reads it, before the step, which cleans up
        print(line, flush=True)


@dataclass(frozen=True)
class StepContext:
    """What a step works with."""

    client: Client  # of the training's namespace
    plan: Plan
    show: Show
    workflow: Workflow | None = None  # None: a person runs the step, in a pod or not

    @classmethod
    def open(
        cls, config: TrainingConfig, image: str, show: Show = show, timeouts: KubernetesTimeouts | None = None
    ) -> Self:
        """Find the cluster, the step's own pod and thereby its workflow, and plan the training.

        Args:
            image: The project's image, where neither the configuration nor the step's own pod has one.

        Raises:
            ConfigError: The configuration does not fit a cluster.
            TrainingError: There is no cluster, or it refuses the credentials.
        """
        client = Client(config.deployment_namespace, timeouts)
        owner, workflow, own_image = own_pod(client.namespace, show, client.timeouts)
        image, tracking = own_image or image, mlflow.handed_on()
        made = plan(config, namespace=client.namespace, image=image, owner=owner, tracking=tracking)
        return cls(client, made, show, workflow)

    @property
    def timeouts(self) -> KubernetesTimeouts:
        return self.client.timeouts

    @property
    def kubectl(self) -> str:
        """The command that shows the run's objects."""
        own = names.selector({names.RUN_LABEL: self.plan.own_labels[names.RUN_LABEL]})
        return f"kubectl get {self.plan.kind.plural},jobs,pods,pvc -n {self.client.namespace} -l {own}"

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
        """Put a new token, which entitles to a result, into the run's Secret."""
        token = secrets.token_urlsafe(32)
        body = run_secret(self.plan, token)
        self.client.delete(SECRET, body["metadata"]["name"])
        self.client.create(body)
        return token

    def refuse_claims_in_use(self) -> None:
        """Raise ConfigError if another run of the same deployment trains on the claims, or this one by other jobs."""
        deployment = self.plan.config.deployment_name
        for kind in TRAINING_KINDS.values():
            for job in self._jobs_of_deployment(kind):
                metadata, own = job["metadata"], self.plan.own_labels[names.RUN_LABEL]
                is_own = metadata["labels"].get(names.RUN_LABEL) == own and kind is self.plan.kind
                if not is_own and not kind.has_ended(job):
                    run = metadata.get("annotations", {}).get(f"{names.PREFIX}/run-id", metadata["name"])
                    by = "" if kind is self.plan.kind else f" by {kind.name}s"
                    allowed = f"run {run} uses its claims{by}: wait for it, or choose another deployment_name"
                    raise ConfigError("deployment_name", deployment, allowed)

    def _jobs_of_deployment(self, kind: JobKind) -> list[Object]:
        labels = names.selector({names.DEPLOYMENT_LABEL: self.plan.config.deployment_name})
        try:
            return self.client.list(kind, labels)[0]
        except ApiError as error:  # of the other kind there may be none, and no right to see them
            if kind is self.plan.kind or (error.reason != "KindNotFound" and error.status != 403):
                raise
            return []

    def adopt(self, kind: JobKind, existing: Object) -> None:
        """Make a job of the run that another workflow owns end with this step's workflow."""
        if self._other_owner(existing):
            change = {"metadata": {"ownerReferences": [self.plan.owner]}}
            for one in (kind.before, kind) if kind.before else (kind,):
                self.client.patch(one, existing["metadata"]["name"], change)

    # The end

    @cached_property  # asked once: there may be no time for more
    def workflow_has_ended(self) -> bool:
        """Whether the step's workflow was terminated, or is over: then an interrupted step deletes its work.

        Otherwise only its pod stops (a drain, an eviction), and the step's next pod continues. A step without a
        workflow was ended by the person at its terminal. If the workflow cannot be read, the answer is no, with a
        warning: the exit handler and the owner references clean up after a workflow that is over.
        """
        own, unknown = self.workflow, "warning: cannot find out whether"
        if own is None:
            return True
        if not own.name:
            self.show(f"{unknown} the workflow of this step was terminated")
            return False
        try:
            return own.has_ended(self.client)
        except TrainingError as error:
            self.show(f"{unknown} {own.kind.name.lower()} {own.name} was terminated: {error}")
            return False

    def clean_up(self, *, finished: bool = True, training: bool = True, claims: bool = False) -> None:
        """Delete the run's objects; workers that still train save and leave.

        Args:
            finished: Also delete jobs that have ended, with their pods and logs. Otherwise they stay for
                `finished_ttl`, and nothing is deleted if another workflow continues the run.
            training: Also delete training jobs. Otherwise the settings stay, too, while a training is under way.
            claims: Also delete the run's claims with all their data, unless another run uses them; and jobs that have
                ended, because a claim stays as long as a pod exists that has mounted it.
        """
        # Do nothing to a run that another workflow continues
        kind = self.plan.kind
        kinds = (kind, JOB) if training else (JOB,)
        running = {} if finished else {one: self._running(one) for one in kinds}
        owners = (self._other_owner(job) for jobs in running.values() for job in jobs)
        if other := next(filter(None, owners), ""):
            self.show(f"workflow {other} continues run {self.plan.config.run_id}: nothing is deleted")
            return
        if claims:
            try:
                self.refuse_claims_in_use()
            except ConfigError as error:
                self.show(f"warning: the claims are kept: {error}")
                claims = False

        # Jobs first, by one request if possible: a cancelled step may have a second
        deletions = [self._begin_deletion(one, None if finished or claims else running[one]) for one in kinds]
        if training or not self._running(kind):
            for body in (run_secret(self.plan, ""), config_map(self.plan), network_policy(self.plan)):
                self.client.delete(KINDS[body["kind"]], body["metadata"]["name"])
        for worker in self.plan.claimants if claims else ():
            self.client.delete(CLAIM, worker.claim)

        # Wait for pods, if their jobs must be deleted after them
        for deletion in filter(None, deletions):
            self.show("waiting for the workers to save and leave")
            deletion.finish(self.plan.selector)
        if training and kind.before and not self._jobs_of(kind):  # a step may have died before it made a job
            self.client.delete_all(kind.before, self.plan.selector)

    def _begin_deletion(self, kind: JobKind, jobs: list[Object] | None) -> JobDeletion:
        """Begin to delete jobs of the run; None: all of a kind."""
        deletion = JobDeletion(self.client, kind)
        if jobs is None and kind.before is None:
            self.client.delete_all(kind, self.plan.selector)
        else:
            deletion.begin(self._jobs_of(kind) if jobs is None else jobs)
        return deletion

    def _jobs_of(self, kind: JobKind) -> list[Object]:
        """The run's jobs of a kind."""
        return self.client.list(kind, self.plan.selector)[0]

    def _running(self, kind: JobKind) -> list[Object]:
        """The run's jobs of a kind that have not ended."""
        return [job for job in self._jobs_of(kind) if not kind.has_ended(job)]

    def _other_owner(self, one: Object) -> str:
        """The name of the workflow that owns an object, if it is not this step's; else ""."""
        own, owners = self.plan.owner, one["metadata"].get("ownerReferences") or []
        others = (it["name"] for it in owners if own and it["kind"] == own["kind"] and it["uid"] != own["uid"])
        return next(others, "")


def refuse_foreign(wanted: Object, existing: Object) -> None:
    """Raise ConfigError if an object that has a wanted name belongs to another deployment or another run.

    Names can collide: those of deployment `llm` at a site `eu-west`, and of deployment `llm-eu` at a site `west`.
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
