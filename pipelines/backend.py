"""Run the pipeline on a Kubeflow Pipelines backend: once (`submit`), or repeatedly (`schedule`)."""

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.follower import Follower
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.timeouts import PipelineTimeouts

_PIPELINES_NAMESPACE = "kubeflow"  # of the steps' pods on a single-user installation
# The fields of a cron expression, with the smallest and the largest number of each.
_CRON = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}


def arguments_of(config: TrainingConfig) -> dict[str, Any]:
    """The pipeline's arguments by flat name: only those that differ from the pipeline's own defaults."""
    values = config.to_flat()
    return {p.name: values[p.name] for p in config.parameters() if values[p.name] != p.default}


class PipelineBackend:
    """A Kubeflow Pipelines backend. All methods raise TrainingError if it refuses a request or cannot be reached.

    Args:
        host: URL of its API. Empty: KF_PIPELINES_ENDPOINT, the cluster that this process runs in, or the kubeconfig's.
        namespace: The user's namespace on a multi-user installation, else empty.
    """

    def __init__(self, host: str = "", namespace: str = "", timeouts: PipelineTimeouts | None = None) -> None:
        from kfp import Client

        self._namespace = namespace or None
        self._timeouts = timeouts or PipelineTimeouts()
        with warnings.catch_warnings(), _readable_errors():
            warnings.simplefilter("ignore")
            self._client = Client(host=host or None)  # its `namespace` is where KFP itself runs, not the user's

    def submit(
        self, arguments: Mapping[str, Any], experiment: str, name: str = "", *, service_account: str = ""
    ) -> str:
        """Start a run in an experiment, which is created if missing; print the UI's links to it, and return its id.

        `service_account` is that of the steps' pods; empty: the backend's default.
        """
        with _readable_errors(), _package() as package:
            result = self._client.create_run_from_pipeline_package(
                package,
                arguments=dict(arguments),
                run_name=name or None,
                experiment_name=experiment,
                namespace=self._namespace,
                service_account=service_account or None,
            )
        return str(result.run_id)

    def wait(self, run_id: str) -> None:
        """Return when the run has succeeded, else raise TrainingError with the reason. Print its steps' states."""
        namespace = self._namespace or _PIPELINES_NAMESPACE
        Follower(run_id, self._run, self._text, namespace, self._timeouts).follow()

    def _run(self, run_id: str) -> dict[str, Any]:
        """A run as the backend returns it: kfp's client (2.17) lacks the newest backend's `view` and `tasks`."""
        from kfp_server_api import ApiException

        path = f"/apis/v2beta1/runs/{run_id}"
        with _readable_errors():
            try:
                return dict(self._get(path, {"view": "FULL"}))
            except ApiException as error:
                if error.status != 400:
                    raise
                return dict(self._get(path, {}))  # an older backend, without views

    def _text(self, path: str, query: Mapping[str, str]) -> str:
        """The text at a path; "" if there is none, or the backend does not answer."""
        try:
            with _readable_errors():
                found = self._get(path, query)
        except TrainingError:
            return ""
        return found if isinstance(found, str) else ""  # JSON is an error, despite status 200

    def _get(self, path: str, query: Mapping[str, str]) -> Any:
        """GET a path of the client's own host, with its credentials. Returns JSON as an object, anything else as text.

        The generated API classes offer no such request: this uses the transport below them.
        """
        return self._client._run_api.api_client.call_api(
            path,
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json, text/plain"},
            auth_settings=["Bearer"],
            response_type="object",
            _return_http_data_only=True,
            _request_timeout=(10, 60),
        )

    def schedule(
        self, arguments: Mapping[str, Any], experiment: str, name: str, cron: str, *, service_account: str = ""
    ) -> str:
        """Start runs, one at a time, whenever KFP's six-field cron expression is due. Returns the schedule's id."""
        with _readable_errors(), _package() as package:
            created = self._client.create_recurring_run(
                experiment_id=self._client.create_experiment(experiment, namespace=self._namespace).experiment_id,
                job_name=name,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=dict(arguments),
                pipeline_package_path=package,
                service_account=service_account or None,
            )
        return str(created.recurring_run_id)

    def schedules(self) -> Iterator[Any]:
        """All schedules."""
        page: str | None = ""
        while page is not None:
            with _readable_errors():
                answer = self._client.list_recurring_runs(page_token=page, page_size=100, namespace=self._namespace)
            yield from answer.recurring_runs or []
            page = answer.next_page_token or None

    def change(self, name: str, change: str) -> None:
        """`pause`, `resume` or `delete` the schedule with this name or id.

        Raises:
            ConfigError: There is no such schedule, or there are several.
        """
        found = [one for one in self.schedules() if name in (one.display_name, one.recurring_run_id)]
        if len(found) != 1:
            why = "several schedules have this name: use an id" if found else "no such schedule"
            raise ConfigError("name", name, why)
        verb = {"pause": "disable", "resume": "enable", "delete": "delete"}[change]
        with _readable_errors():
            getattr(self._client, f"{verb}_recurring_run")(found[0].recurring_run_id)


def six_fields(cron: str) -> str:
    """Convert a standard cron expression to KFP's, which starts with a field for seconds.

    >>> six_fields("30 3 * * 1-5")
    '0 30 3 * * 1-5'

    Raises:
        ConfigError: It does not have five fields, or a number is out of range.
    """
    fields = cron.split()
    if len(fields) != len(_CRON):
        raise ConfigError("--cron", cron, "must have five fields: minute hour day month weekday")
    for field, (name, (low, high)) in zip(fields, _CRON.items(), strict=True):
        numbers = [int(number) for number in re.findall(r"(?<![/\d])\d+", field)]
        if not re.fullmatch(r"[\dA-Za-z*?,/-]+", field) or not all(low <= number <= high for number in numbers):
            raise ConfigError("--cron", cron, f"its {name} {field!r} must consist of {low} to {high}, * , - and /")
    return " ".join(["0", *fields])


@contextmanager
def _package() -> Iterator[str]:
    """The compiled pipeline as a temporary file."""
    from pipelines.pipeline import compiled

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "diloco-training.yaml"
        path.write_text(compiled(), encoding="utf-8")
        yield str(path)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn the client's exceptions into TrainingErrors of one line."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        message = error.reason
        with suppress(TypeError, ValueError, AttributeError):  # the body is JSON if the API server itself sent it
            body = json.loads(error.body)
            message = body.get("message") or body.get("error") or message
        raise TrainingError(f"Kubeflow Pipelines answered {error.status}: {message}") from None
    except HTTPError as error:
        raise TrainingError(f"Kubeflow Pipelines cannot be reached: {error}") from None
