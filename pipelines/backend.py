"""Run the pipeline on a Kubeflow Pipelines backend, once (`submit`) or again and again (`schedule`)."""

import json
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.following import FINAL, Follower
from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300.0  # how long `wait` bears a backend that does not answer

_PIPELINES_NAMESPACE = "kubeflow"  # where the steps run on a single-user installation
# Field of a cron expression, and the smallest and largest number in it.
_CRON = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}


def arguments_of(config: TrainingConfig) -> dict[str, Any]:
    """The pipeline's arguments, by flat name: what differs from the defaults, which the pipeline has itself."""
    values = config.to_flat()
    return {p.name: values[p.name] for p in config.parameters() if values[p.name] != p.default}


class Cluster:
    """A Kubeflow Pipelines backend.

    Args:
        host: URL of its API; empty: KF_PIPELINES_ENDPOINT, the cluster that this runs in, or the kubeconfig's.
        namespace: The user's namespace, on a multi-user installation; else empty.

    Raises:
        TrainingError: From every method: the backend cannot be reached, or has refused.
    """

    def __init__(self, host: str = "", namespace: str = "") -> None:
        from kfp import Client

        self._namespace = namespace or None
        with warnings.catch_warnings(), _refusals():
            warnings.simplefilter("ignore")
            self._client = Client(host=host or None)  # its `namespace` is where KFP itself is, not the user's

    def submit(
        self, arguments: Mapping[str, Any], experiment: str, name: str = "", *, service_account: str = ""
    ) -> str:
        """Start a run, and print the UI's links to it. Returns its id.

        Args:
            arguments: The pipeline's.
            experiment: The experiment's name; it is made if it is missing.
            name: The run's, in the UI.
            service_account: Of the steps' pods; empty: the backend's choice.
        """
        with _refusals(), _package() as package:
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
        """Return when the run has succeeded. Meanwhile, print its steps' states and what they wait for.

        Raises:
            TrainingError: It has ended in another way, with the reason.
        """
        follower = Follower(run_id, self._text, self._namespace or _PIPELINES_NAMESPACE)
        answered = time.monotonic()
        while True:
            try:
                run = self._run(run_id)
                answered = time.monotonic()
            except TrainingError:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
            else:
                follower.show(run)
                if run.get("state") in FINAL:
                    break
            time.sleep(POLL_SECONDS)
        if run["state"] != "SUCCEEDED":
            raise TrainingError(follower.failure(run))

    def _run(self, run_id: str) -> dict[str, Any]:
        """A run as the backend gives it: kfp's client (2.17) lacks the newest one's `view` and `tasks`."""
        from kfp_server_api import ApiException

        path = f"/apis/v2beta1/runs/{run_id}"
        with _refusals():
            try:
                return dict(self._get(path, {"view": "FULL"}))
            except ApiException as error:
                if error.status != 400:
                    raise
                return dict(self._get(path, {}))  # an older backend, without views

    def _text(self, path: str, query: Mapping[str, str]) -> str:
        """The text that the backend has at a path; "" if it has none, or does not answer."""
        try:
            with _refusals():
                found = self._get(path, query)
        except TrainingError:
            return ""
        return found if isinstance(found, str) else ""  # JSON: an error, although with status 200

    def _get(self, path: str, query: Mapping[str, str]) -> Any:
        """What the client's own address has at a path, with its credentials: JSON as an object, all else as text."""
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
        """Start a run whenever the cron expression (five fields) says so, one at a time. Returns the schedule's id."""
        with _refusals(), _package() as package:
            created = self._client.create_recurring_run(
                experiment_id=self._client.create_experiment(experiment, namespace=self._namespace).experiment_id,
                job_name=name,
                cron_expression=six_fields(cron),
                max_concurrency=1,
                no_catchup=True,
                params=dict(arguments),
                pipeline_package_path=package,
                service_account=service_account or None,
            )
        return str(created.recurring_run_id)

    def schedules(self, name: str = "") -> list[Any]:
        """All schedules, or those of this name."""
        wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        found: list[Any] = []
        page = ""
        while True:
            with _refusals():
                answer = self._client.list_recurring_runs(
                    page_token=page,
                    page_size=100,
                    namespace=self._namespace,
                    filter=json.dumps({"predicates": [wanted]}) if name else None,
                )
            found += answer.recurring_runs or []
            page = answer.next_page_token
            if not page:
                return found

    def change(self, name: str, change: str) -> None:
        """`pause`, `resume` or `delete` the schedule of this name or id."""
        found = [one for one in self.schedules() if name in (one.display_name, one.recurring_run_id)]
        if len(found) != 1:
            many = "several schedules have this name: give one's id" if found else "no such schedule"
            raise ConfigError("name", name, many)
        call = {
            "pause": self._client.disable_recurring_run,
            "resume": self._client.enable_recurring_run,
            "delete": self._client.delete_recurring_run,
        }[change]
        with _refusals():
            call(found[0].recurring_run_id)


def six_fields(cron: str) -> str:
    """A usual cron expression as KFP wants it: with seconds in front.

    >>> six_fields("30 3 * * 1-5")
    '0 30 3 * * 1-5'

    Raises:
        ConfigError: It has not five fields, or a number is out of its range.
    """
    fields = cron.split()
    if len(fields) != len(_CRON):
        raise ConfigError("--cron", cron, "must have five fields: minute hour day month weekday")
    for field, (name, (low, high)) in zip(fields, _CRON.items(), strict=True):
        numbers = [int(number) for number in re.findall(r"(?<![/\d])\d+", field)]
        if not re.fullmatch(r"[\dA-Za-z*?,/-]+", field) or not all(low <= number <= high for number in numbers):
            raise ConfigError("--cron", cron, f"its {name} {field!r} must be made of {low} to {high}, * , - and /")
    return " ".join(["0", *fields])


@contextmanager
def _package() -> Iterator[str]:
    """The compiled pipeline as a file."""
    from pipelines.pipeline import compiled

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "diloco-training.yaml"
        path.write_text(compiled(), encoding="utf-8")
        yield str(path)


@contextmanager
def _refusals() -> Iterator[None]:
    """The client's exceptions in a person's words. Raises TrainingError."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise TrainingError(f"Kubeflow Pipelines answered {error.status}: {_message(error)}") from None
    except HTTPError as error:
        raise TrainingError(f"Kubeflow Pipelines cannot be reached: {error}") from None


def _message(error: Any) -> str:
    """The reason in an answer's body, which is JSON if it comes from the API server itself."""
    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error") or error.reason)
    except (TypeError, ValueError, AttributeError):
        return str(error.reason)
