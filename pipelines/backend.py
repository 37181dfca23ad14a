"""Run the pipeline on a Kubeflow Pipelines backend: once (`submit`), or repeatedly (`schedule`)."""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.parameters import folded
from pipelines.follower import Follower
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.timeouts import PipelineTimeouts
from trainer.version import VERSION

PIPELINES_NAMESPACE = "kubeflow"  # of the steps' pods on a single-user installation
# The fields of a cron expression, with the smallest and the largest number of each
_CRON = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}

_ANY = "any"  # a response type of ours: JSON, or text

_NO_API = (
    "Kubeflow Pipelines answered with a page instead of JSON: the host must be that of its API, and a login in front "
    "of it requires a cookie or a token (docs/guide/cluster.md)"
)


def arguments_of(config: TrainingConfig) -> dict[str, Any]:
    """The pipeline's arguments: only the parameters that differ from their defaults."""
    values = config.to_flat()
    return folded({p.name: values[p.name] for p in config.parameters() if values[p.name] != p.default})


def run_name(config: TrainingConfig) -> str:
    """A run's name in the UI.

    >>> run_name(TrainingConfig(model="gpt-neo-x:tiny", dataset="stdlib", total_steps=240))
    'gpt-neo-x:tiny on stdlib, 240 steps'
    """
    return f"{config.model} on {config.dataset}, {config.total_steps} steps"


@dataclass(frozen=True)
class Package:
    """A compiled pipeline for a backend."""

    text: str  # the compiled pipeline
    description: str  # of the pipeline
    pipeline_name: str = ""  # upload it under this name; empty: send it with each run
    service_account: str = ""  # of the steps' pods; empty: the backend's default

    @property
    def version(self) -> str:
        """The name of the pipeline version with this content."""
        return f"{VERSION}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    @contextmanager
    def file(self) -> Iterator[str]:
        """The pipeline as a temporary file."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "diloco-training.yaml"
            path.write_text(self.text, encoding="utf-8")
            yield str(path)


class PipelineBackend:
    """A Kubeflow Pipelines backend. All methods raise TrainingError if it refuses a request or cannot be reached.

    Args:
        host: URL of its API. Empty: KF_PIPELINES_ENDPOINT, the cluster that this process runs in, or the kubeconfig's.
        namespace: The user's namespace on a multi-user installation, else empty.
    """

    def __init__(self, host: str = "", namespace: str = "", timeouts: PipelineTimeouts | None = None) -> None:
        self._namespace = namespace or None
        self._timeouts = timeouts or PipelineTimeouts()
        with warnings.catch_warnings(), _readable_errors():
            warnings.simplefilter("ignore")
            self._client = _client(host)
            _reject_pages(self._client._run_api.api_client)
            self._get_object("/apis/v2beta1/healthz", {})

    def submit(self, package: "Package", config: TrainingConfig, experiment: str, name: str = "") -> str:
        """Start a run in an experiment, which is created if missing. Prints a link to the UI; returns the run's id.

        `name` is the run's name in the UI; empty: `run_name`.
        """
        import kfp_server_api

        with _readable_errors():
            run = kfp_server_api.V2beta1Run(  # kfp's own `run_pipeline` cannot set a description
                display_name=name or run_name(config),
                description=config.experiment_description,
                experiment_id=self._experiment(experiment),
                runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=arguments_of(config)),
                service_account=package.service_account or None,
            )
            if package.pipeline_name:
                pipeline_id, version_id = self._upload(package)
                run.pipeline_version_reference = kfp_server_api.V2beta1PipelineVersionReference(
                    pipeline_id=pipeline_id, pipeline_version_id=version_id
                )
            else:
                run.pipeline_spec = yaml.safe_load(package.text)
            run_id = _id(self._client._run_api.run_service_create_run(run=run).run_id)
        print(f"Run details: {self._client._get_url_prefix()}/#/runs/details/{run_id}")
        return run_id

    def cancel(self, run_id: str) -> None:
        """Terminate a run. What it created, except the claims, is deleted."""
        with _readable_errors():
            self._client.terminate_run(run_id)

    def show(self, run_id: str) -> str:
        """Print the state of a run and its steps, and why a step waits or failed. Returns the run's state."""
        return self._follower(run_id).show()

    def logs(self, run_id: str, step: str = "") -> None:
        """Print the output of the run's steps, or of one of them.

        Raises:
            ConfigError: The run has no such step yet.
        """
        self._follower(run_id).print_logs(step)

    def wait(self, run_id: str) -> None:
        """Print the steps' states until the run has succeeded. Raises TrainingError with the reason if it fails."""
        self._follower(run_id).follow()

    def _follower(self, run_id: str) -> Follower:
        return Follower(run_id, self._run, self._text, self._namespace or PIPELINES_NAMESPACE, self._timeouts)

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is created if missing."""
        return str(self._client.create_experiment(name, namespace=self._namespace).experiment_id)

    def _upload(self, package: "Package") -> tuple[str, str]:
        """The ids of the package's pipeline and of its version with this content. Uploads them if missing.

        "Create run" in the UI, and schedules created there, use a pipeline's newest version.
        """
        import kfp_server_api

        name, version = package.pipeline_name, package.version
        listed = self._client.list_pipelines(namespace=self._namespace, filter=_equals("display_name", name))
        if listed.pipelines:
            pipeline = listed.pipelines[0]
        else:
            wanted = kfp_server_api.V2beta1Pipeline(
                display_name=name, description=package.description, namespace=self._namespace
            )
            pipeline = self._client._pipelines_api.pipeline_service_create_pipeline(pipeline=wanted)
        versions = self._client.list_pipeline_versions(
            pipeline.pipeline_id, filter=_equals("display_name", version)
        ).pipeline_versions
        if versions:
            return pipeline.pipeline_id, versions[0].pipeline_version_id
        with package.file() as path:
            uploaded = self._client.upload_pipeline_version(
                path, version, pipeline_id=pipeline.pipeline_id, description=package.description
            )
        return pipeline.pipeline_id, uploaded.pipeline_version_id

    def _run(self, run_id: str) -> dict[str, Any]:
        """A run as JSON, because kfp's client (2.17) lacks the newest backend's `view` and `tasks`."""
        from kfp_server_api import ApiException

        path = f"/apis/v2beta1/runs/{run_id}"
        with _readable_errors():
            try:
                return self._get_object(path, {"view": "FULL"})
            except ApiException as error:
                if error.status != 400:
                    raise
                return self._get_object(path, {})  # an older backend without views

    def _text(self, path: str, query: Mapping[str, str]) -> str:
        """The text at a path; "" if there is none or the backend does not answer."""
        try:
            with _readable_errors():
                found = self._get(path, query)
        except TrainingError:
            return ""
        return found if isinstance(found, str) else ""  # JSON is an error, despite status 200

    def _get_object(self, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        """Like `_get`, for a JSON object. Raises TrainingError if the answer is anything else."""
        found = self._get(path, query)
        if not isinstance(found, dict):
            raise TrainingError(_NO_API)
        return found

    def _get(self, path: str, query: Mapping[str, str]) -> Any:
        """GET a path of the client's host, with its credentials. Returns JSON as an object, anything else as text.

        The generated API classes offer no such request, so this uses the transport below them.
        """
        return self._client._run_api.api_client.call_api(
            path,
            "GET",
            query_params=list(query.items()),
            header_params={"Accept": "application/json, text/plain"},
            auth_settings=["Bearer"],
            response_type=_ANY,
            _return_http_data_only=True,
            _request_timeout=(10, 60),
        )

    def schedule(self, package: "Package", config: TrainingConfig, experiment: str, name: str, cron: str) -> str:
        """Schedule runs by KFP's six-field cron expression, one at a time. Returns the schedule's id."""
        with _readable_errors(), package.file() as path:
            source: dict[str, Any] = {"pipeline_package_path": path}
            if package.pipeline_name:
                source = dict(zip(("pipeline_id", "version_id"), self._upload(package), strict=True))
            created = self._client.create_recurring_run(
                experiment_id=self._experiment(experiment),
                job_name=name,
                description=f"{run_name(config)}. {config.experiment_description}",
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=arguments_of(config),
                service_account=package.service_account or None,
                **source,
            )
            return _id(created.recurring_run_id)

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
            ConfigError: There is no such schedule, or more than one.
        """
        found = [one for one in self.schedules() if name in (one.display_name, one.recurring_run_id)]
        if len(found) != 1:
            why = "several schedules have this name: use an id" if found else "no such schedule"
            raise ConfigError("name", name, why)
        verb = {"pause": "disable", "resume": "enable", "delete": "delete"}[change]
        with _readable_errors():
            getattr(self._client, f"{verb}_recurring_run")(found[0].recurring_run_id)


def _id(created: str | None) -> str:
    """The id of what was created. Raises TrainingError without one: JSON of a proxy, for example, has none."""
    if not created:
        raise TrainingError("the backend's answer has no id: is there a proxy in front of it that asks for a login?")
    return created


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
            raise ConfigError("--cron", cron, f"its {name} {field!r} may contain only {low} to {high}, * , - and /")
    return " ".join(["0", *fields])


def _equals(key: str, value: str) -> str:
    """The backend's filter for objects with this value."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})


def _client(host: str) -> Any:
    """KFP's client. Its argument `namespace` is KFP's own namespace, not the user's."""
    from kfp import Client

    class AskingOnce(Client):
        """Checks only once whether the backend is healthy. KFP tries five times, and logs a traceback each time."""

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            return self._healthz_api.healthz_service_get_healthz()

    return AskingOnce(host=host or None)


def _reject_pages(api_client: Any) -> None:
    """Have an API client raise TrainingError for an answer that is not JSON, unless its type is `_ANY`.

    A login may let the health check pass and answer other requests with its page. The generated methods accept any
    text as an empty object.
    """
    deserialize = api_client.deserialize

    def checked(response: Any, response_type: Any) -> Any:
        try:
            found = json.loads(response.data)
        except ValueError:
            if response_type != _ANY:
                raise TrainingError(_NO_API) from None
            return response.data
        return found if response_type == _ANY else deserialize(response, response_type)

    api_client.deserialize = checked


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn the client's exceptions into TrainingErrors of one line."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        message = error.reason
        with suppress(TypeError, ValueError, AttributeError):  # the body is JSON only if the API server sent it
            body = json.loads(error.body)
            message = body.get("message") or body.get("error") or message
        hint = ": it is older than 2.16 and needs --no-literals" if "literals" in str(message) else ""
        raise TrainingError(f"Kubeflow Pipelines answered {error.status}: {message}{hint}") from None
    except HTTPError as error:
        raise TrainingError(f"Kubeflow Pipelines cannot be reached: {error}") from None
