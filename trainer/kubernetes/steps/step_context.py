"""The shared parts of the pipeline's steps on a cluster: the training's clusters, the workflow, and cleaning up."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.kinds import Object
from trainer.kubernetes.api.notices import Show
from trainer.kubernetes.api.other_cluster import OtherClient
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import Plan, WorkerPlan, plan
from trainer.kubernetes.objects.sites import cluster_names
from trainer.kubernetes.steps.cluster import Cluster
from trainer.kubernetes.steps.served import launcher_of
from trainer.kubernetes.steps.workflow import Workflow, own_pod
from trainer.monitor.trackers import mlflow
from trainer.timeouts import KubernetesTimeouts

# Kinds of objects that may be left on an unreachable cluster
_LEFT = "trainjobs, pytorchjobs, jobs, trainingruntimes, configmaps, secrets, networkpolicies"


def show(line: str) -> None:
    """Print a line and flush."""
    with suppress(BrokenPipeError):  # SIGTERM ends KFP's launcher, which reads the output, before the step is done
        print(line, flush=True)


@dataclass(frozen=True)
class StepContext:
    """The context of a step."""

    home: Cluster  # the steps' own; it has no workers if all sites are in others
    show: Show
    workflow: Workflow | None = None  # None: a user runs the step, in a pod or elsewhere
    others: Sequence[Cluster] = ()

    @classmethod
    def open(
        cls, config: TrainingConfig, image: str, show: Show = show, timeouts: KubernetesTimeouts | None = None
    ) -> Self:
        """Find the clusters and the step's own pod and workflow, and plan the training.

        Args:
            image: The project's image, if neither the configuration nor the step's own pod has one.

        Raises:
            ConfigError: The configuration does not fit a cluster.
            TrainingError: There is no cluster, or it rejects the credentials.
        """
        client = Client(config.deployment_namespace, timeouts)
        owner, workflow, own_image = own_pod(client.namespace, show, client.timeouts)
        return cls.of(client, config, own_image or image, show, owner, workflow)

    @classmethod
    def of(
        cls,
        client: Client,
        config: TrainingConfig,
        image: str,
        show: Show,
        owner: Object | None = None,
        workflow: Workflow | None = None,
    ) -> Self:
        """Like `open`, but for a given cluster of the steps and a given workflow that owns the objects there."""
        tracking = mlflow.handed_on()
        mark = workflow.mark if workflow else ""
        own = "" if owner else mark
        made = plan(config, namespace=client.namespace, image=image, owner=owner, workflow=own, tracking=tracking)

        def plan_there(there: Client) -> Plan:
            own = config.with_values(launcher=launcher_of(there, config))
            place, cluster = there.namespace, there.cluster
            return plan(own, namespace=place, image=image, cluster=cluster, workflow=mark, tracking=tracking)

        def has_ended(mark: str) -> bool:
            return workflow is None or workflow.marked(mark).has_ended(client)

        others = [
            Cluster(name, partial(OtherClient, client, name), plan_there, show, has_ended)
            for name in cluster_names(config)[1:]
        ]
        return cls(Cluster("", lambda: client, lambda _: made, show, has_ended), show, workflow, others)

    @property
    def clusters(self) -> Iterator[Cluster]:
        """The clusters that have workers."""
        if self.plan.workers:
            yield self.home
        yield from self.others

    def cluster_of(self, worker: WorkerPlan) -> Cluster:
        """The cluster of a worker."""
        return next(one for one in self.clusters if one.name == worker.site.cluster)

    @cached_property
    def workers(self) -> tuple[WorkerPlan, ...]:
        """The training's workers, by index."""
        return tuple(sorted((it for one in self.clusters for it in one.plan.workers), key=lambda worker: worker.index))

    @property
    def client(self) -> Client:
        """The client of the steps' own cluster."""
        return self.home.client

    @property
    def plan(self) -> Plan:
        """The plan for the steps' own cluster."""
        return self.home.plan

    @property
    def timeouts(self) -> KubernetesTimeouts:
        return self.client.timeouts

    @property
    def kubectl(self) -> str:
        """The commands that show the run's objects."""
        own = names.selector({names.RUN_LABEL: self.plan.own_labels[names.RUN_LABEL]})
        return "\n".join(one.kubectl("get", f"{one.plan.kind.plural},jobs,pods,pvc", own) for one in self.clusters)

    # The end

    @cached_property  # read only once, because there may be no time for more
    def workflow_has_ended(self) -> bool:
        """Whether the step's workflow was terminated or is over, so that an interrupted step deletes its work.

        Otherwise only its pod stops (a drain, an eviction), and the step's next pod continues. A step without a
        workflow was ended by the user at its terminal. If the workflow cannot be read, the answer is no, with a
        warning: the exit handler and the owner references clean up after a finished workflow.
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
        """Delete the run's objects on all clusters at once. Workers that are still training save and leave.

        If another workflow continues the run, the objects that it uses are kept.

        Args:
            finished: Also delete ended jobs with their pods and logs. Otherwise they stay for `finished_ttl`.
            training: Also delete training jobs. Otherwise the settings also stay while training is under way.
            claims: Also delete the run's claims with all their data, unless another run uses them; and ended jobs,
                because a claim stays as long as a pod that has mounted it exists.

        Raises:
            TrainingError: A cluster rejects this, or is unreachable for `timeouts.outage`. The message names what may
                be left there.
        """

        def clean_up(cluster: Cluster) -> str:
            """Clean up one cluster. Returns why something may be left, or ""."""
            try:
                cluster.client.patience = max(cluster.client.patience, self.timeouts.outage)
                cluster.clean_up(finished=finished, training=training, claims=claims)
                return ""
            except (ConfigError, TrainingError) as error:
                left = (
                    f"objects of the run may be left behind on {cluster}: {_LEFT} with the labels {self.plan.selector}"
                )
                return f"{left}: {error}" if cluster.name else str(error)

        # All clusters at once, because a cancelled step has little time
        with ThreadPoolExecutor(max(1, len(self.others))) as pool:
            elsewhere = pool.map(clean_up, self.others)
            here = clean_up(self.home) if self.plan.workers else ""
        if errors := [error for error in (here, *elsewhere) if error]:
            raise TrainingError("; ".join(errors))
