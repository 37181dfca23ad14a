"""MLflow, configured by its environment variables: https://mlflow.org/docs/latest/tracking/"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig
from trainer.monitor.trackers.sink import numbers, step_of, without_login

if TYPE_CHECKING:
    from mlflow import MlflowClient

VARIABLES = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI")  # either one enables MLflow
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 6000  # limits of a request; characters of a parameter's value
_STATUS = {"complete": "FINISHED", "stopped": "KILLED", "": "KILLED", "failed": "FAILED"}


def asked_for() -> bool:
    """Whether MLflow's variables are set. Kubeflow Pipelines' plugin sets them in every step."""
    return any(os.environ.get(name) for name in VARIABLES)


def handed_on() -> dict[str, str]:
    """MLflow's variables that a pipeline step passes to its workers' pods: where to log, but no credentials."""
    names = (*VARIABLES, "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_WORKSPACE", "MLFLOW_TRACKING_AUTH")
    return {name: without_login(value) for name in names if asked_for() and (value := os.environ.get(name))}


class MlflowTracker:
    """One MLflow run per worker, as a child of MLFLOW_RUN_ID if that is set. A resumed worker continues its run.

    The experiment is that of MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME, else the parent run's, else the one with
    the project's name. x axes are steps of the schedule. MLflow itself reads its other variables, such as credentials.
    """

    name = "MLflow"
    retried = True

    def __init__(self, config: TrainingConfig, worker: int) -> None:
        self._config, self._worker = config, worker
        self._parent = os.environ.get("MLFLOW_RUN_ID", "")

    def begin(self) -> str:
        # MLflow's client would retry a request for minutes. We retry instead, so that the worker can end meanwhile
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient, get_tracking_uri

        self._client = client = MlflowClient()
        experiment = self._experiment(client)
        tags = {"diloco.run_id": self._config.run_id, "diloco.worker": str(self._worker)}
        tags |= {"mlflow.parentRunId": self._parent} if self._parent else {}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = client.search_runs([experiment], wanted, max_results=1)
        if found:
            self._run_id = str(found[0].info.run_id)
            client.update_run(self._run_id, status="RUNNING")
        else:
            name = f"{self._config.run_id} worker {self._worker}"
            self._run_id = str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)
            self._log_params()
        uri = str(get_tracking_uri())
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._run_id}" if uri.startswith("http") else ""

    def _experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        if self._parent and not name:
            return str(client.get_run(self._parent).info.experiment_id)
        name = name or self._config.wandb_project_name
        try:
            if found := client.get_experiment_by_name(name):
                return str(found.experiment_id)
            return str(client.create_experiment(name))
        except MlflowException:  # another worker has just created it
            if found := client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _log_params(self) -> None:
        from mlflow.entities import Param

        values = self._config.to_flat().items()
        params = [Param(name, str(value)[:_LONGEST]) for name, value in values]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MOST_PARAMS])

    def log(self, events: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), round(1000 * event["time"]), step_of(event))
            for event in events
            for name, value in numbers(event).items()
        ]
        for first in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _MOST_METRICS])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, _STATUS.get(status, "FAILED"))
