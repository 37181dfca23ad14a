"""A stand-in for a Kubeflow Pipelines backend, at the HTTP edge: the real client speaks to it.

`Api` keeps experiments, runs and schedules; `Backend` also runs the runs.
"""

import json
import re
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.cluster.apiserver import ApiServer, Object, serving
from tests.kfp_backend.driver import Flavour, Ir, Refused, Values, validate
from tests.kfp_backend.launcher import stored
from tests.kfp_backend.workflow import Workflow

FINAL = {"SUCCEEDED", "FAILED"}
_OUTSIDE = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"  # as kfp asks through a Kubernetes API server


class Api(ABC, ThreadingHTTPServer):
    """Answers as the API server does. What a run is, is its subclasses'.

    Attributes:
        runs: What was posted, each with its id.
        pipelines: Uploaded ones.
        versions: Their versions, each with its content.
        outages: How many requests for a run go unanswered first.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments: list[Ir] = []
        self.runs: list[Ir] = []
        self.recurring: list[Ir] = []
        self.pipelines: list[Ir] = []
        self.versions: list[Ir] = []
        self.outages = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        """For `--host`."""
        return f"http://127.0.0.1:{self.server_port}"

    @abstractmethod
    def start(self, body: Ir) -> Ir:
        """Start a run. Raises Refused."""

    @abstractmethod
    def look(self, run_id: str, query: Mapping[str, str]) -> tuple[int, Ir]:
        """Status and body of `GetRun`."""

    @abstractmethod
    def terminate(self, run_id: str) -> None:
        """End a run."""

    def text(self, path: str, query: Mapping[str, str]) -> str | None:
        """The text at a path: a pod's log, or an artifact."""
        return None

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Status and body of an answer."""
        path = path.removeprefix(_OUTSIDE).removeprefix("/")
        if method == "GET" and (text := self.text(path, query)) is not None:
            return 200, text
        path = path.removeprefix("apis/v2beta1")
        wanted = [p["stringValue"] for p in json.loads(query.get("filter", "{}")).get("predicates", [])]
        if path == "/healthz":
            return 200, {"multi_user": False}
        if (method, path) == ("GET", "/experiments"):
            return 200, {"experiments": [one for one in self.experiments if one["display_name"] in wanted]}
        if (method, path) == ("POST", "/experiments"):
            self.experiments.append({**body, "experiment_id": f"experiment-{len(self.experiments)}"})
            return 200, self.experiments[-1]
        if path == "/pipelines" or path.startswith("/pipelines/"):
            return self._answer_about_pipelines(method, path.removeprefix("/pipelines"), query, wanted, body)
        if (method, path) == ("POST", "/runs"):
            try:
                if reference := body.get("pipeline_version_reference"):
                    (version,) = [one for one in self.versions if one.items() >= reference.items()]
                    body = {**body, "pipeline_spec": version["pipeline_spec"]}
                self.runs.append(self.start(body))
            except Refused as error:
                message = f"Failed to create a run: Invalid input error: {error}"
                return 400, {"error": message, "code": 3, "message": message}
            return 200, self.runs[-1]
        if found := re.fullmatch(r"/runs/([\w-]+)(:terminate)?", path):
            if not any(one["run_id"] == found[1] for one in self.runs):
                return 404, {"code": 5, "message": f"Run {found[1]} not found"}
            if found[2]:
                self.terminate(found[1])
                return 200, {}
            if self.outages:
                self.outages -= 1
                return 503, {"error": "upstream connect error"}
            return self.look(found[1], query)
        if (method, path) == ("POST", "/recurringruns"):
            made = {"recurring_run_id": f"schedule-{len(self.recurring)}", "status": "ENABLED"}
            self.recurring.append({**body, **made})
            return 200, self.recurring[-1]
        if (method, path) == ("GET", "/recurringruns"):  # one a page
            chosen = [one for one in self.recurring if not wanted or one["display_name"] in wanted]
            page = int(query.get("page_token") or 0)
            more = {"next_page_token": str(page + 1)} if page + 1 < len(chosen) else {}
            return 200, {"recurringRuns": chosen[page : page + 1], **more}
        if found := re.fullmatch(r"/recurringruns/([\w-]+)(?::(\w+))?", path):
            (one,) = [one for one in self.recurring if one["recurring_run_id"] == found[1]]
            if method == "DELETE":
                self.recurring.remove(one)
            else:
                one["status"] = f"{found[2].upper()}D"
            return 200, {}
        return 404, {"message": f"{method} {path} is unknown"}

    def _answer_about_pipelines(
        self, method: str, path: str, query: dict[str, str], wanted: list[str], body: Any
    ) -> tuple[int, Any]:
        if (method, path) == ("GET", ""):
            return 200, {"pipelines": [one for one in self.pipelines if one["display_name"] in wanted]}
        if (method, path) == ("POST", ""):
            if any(one["display_name"] == body["display_name"] for one in self.pipelines):
                return 409, {"code": 6, "message": "the name exists already"}
            self.pipelines.append({**body, "pipeline_id": f"pipeline-{len(self.pipelines)}"})
            return 200, self.pipelines[-1]
        if found := re.fullmatch(r"/([\w-]+)/versions", path):
            own = [one for one in self.versions if one["pipeline_id"] == found[1] and one["display_name"] in wanted]
            return 200, {"pipeline_versions": own}
        if (method, path) == ("POST", "/upload"):
            ids = {"pipeline_id": f"pipeline-{len(self.pipelines)}", "created_at": "2026-11-21T00:00:00Z"}
            self.pipelines.append({"display_name": query["name"], **ids})
            return 200, self.pipelines[-1]
        if (method, path) == ("POST", "/upload_version"):  # a form with one file
            text = body.decode().partition("\r\n\r\n")[2].rpartition("\r\n--")[0]
            ids = {"pipeline_id": query["pipelineid"], "pipeline_version_id": f"version-{len(self.versions)}"}
            about = {"display_name": query["name"], "description": query.get("description", "")}
            self.versions.append({**ids, **about, "pipeline_spec": next(yaml.safe_load_all(text))})
            return 200, self.versions[-1]
        return 404, {"message": f"{method} {path} is unknown"}


class Backend(Api):
    """Runs what is submitted: see `workflow`. Use it as a context manager.

    Args:
        kubernetes: Where the steps' pods are; else one of its own.
        namespace: Of the steps' pods and of their workflow.
        environment: Of each step, over its own.

    Attributes:
        cache: Outputs of steps that have succeeded, by cache key.
        before: Called with a step's pod, which waits for its node, by the task's name.
        closing: Set when everything is to end.
    """

    def __init__(
        self,
        flavour: Flavour,
        *,
        kubernetes: ApiServer | None = None,
        namespace: str = "default",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._resources = ExitStack()
        self.flavour, self.namespace = flavour, namespace
        self.kubernetes = kubernetes or self._resources.enter_context(serving())
        self.environment = dict(environment or {})
        self.root = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="kfp-")))
        self.kubernetes.kubeconfig(self.root / "kubeconfig")
        self.cache: dict[str, Values] = {}
        self.before: dict[str, Callable[[Object], None]] = {}
        self.closing = threading.Event()
        self._workflows: dict[str, Workflow] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        super().__exit__(kind, error, trace)
        for workflow in self._workflows.values():
            workflow.join()
        self._resources.close()

    # What tests do

    def submit(self, ir: Ir, **parameters: Any) -> str:
        """Start a run of a compiled pipeline, as a client does. Returns its id; raises Refused."""
        body = {"display_name": "a run", "pipeline_spec": ir, "runtime_config": {"parameters": parameters}}
        self.runs.append(self.start(json.loads(json.dumps(body))))
        return str(self.runs[-1]["run_id"])

    def wait(self, run_id: str, seconds: float = 300.0) -> Ir:
        """The run with its tasks, once it has ended."""
        self._workflows[run_id].join(seconds)
        found = self._workflows[run_id].described(full=True)
        assert found["state"] in FINAL, f"the run has not ended: {found}"
        return found

    def tasks(self, run_id: str) -> dict[str, Ir]:
        """The run's tasks, by name, in either flavour as the driver and the launcher have left them."""
        return {task["name"]: task for task in self._workflows[run_id].tasks}

    def pods(self, step: str) -> list[Object]:
        """The pods in which a step was run, oldest first; one that is gone as it was made."""
        there = self.kubernetes.all("pods", self.namespace)
        made = [pod for one in self._workflows.values() for name, pod in one.steps if name == step]
        return [there.get(pod["metadata"]["name"], pod) for pod in made]

    def log(self, step: str) -> str:
        """The output of all pods of a step, the launcher's included."""
        return "\n".join(map(self.log_of, self.pods(step)))

    def log_of(self, pod: Object) -> str:
        """The output of one pod."""
        return "\n".join(self.kubernetes.said(pod["metadata"]["uid"]))

    def drain(self, step: str) -> None:
        """Delete the pod of a running step, as `kubectl drain` does."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        name = self.pods(step)[-1]["metadata"]["name"]
        self.kubernetes.update(
            "pods", name, lambda one: one["metadata"].update(deletionTimestamp=moment), self.namespace
        )

    # What clients ask for

    def start(self, body: Ir) -> Ir:
        ir = body["pipeline_spec"].get("pipeline_spec", body["pipeline_spec"])
        parameters = body.get("runtime_config", {}).get("parameters", {})
        validate(ir, parameters)
        workflow = Workflow(self, str(uuid.uuid4()), body, parameters)
        self._workflows[workflow.record["run_id"]] = workflow
        posted = workflow.described(full=False)
        workflow.start()
        return posted

    def look(self, run_id: str, query: Mapping[str, str]) -> tuple[int, Ir]:
        return 200, self._workflows[run_id].described(full=query.get("view") == "FULL")

    def terminate(self, run_id: str) -> None:
        self._workflows[run_id].terminate()

    def text(self, path: str, query: Mapping[str, str]) -> str | None:
        if path == "artifacts/get" and self.flavour == "native":  # the UI's, which is what people reach
            file = stored(self.root / "store", f"{query['bucket']}/{query['key']}")
            return file.read_text() if file.is_file() else None
        if found := re.fullmatch(r"apis/v1alpha1/runs/[\w-]+/nodes/([\w-]+)/log", path):
            if pod := self.kubernetes.all("pods", self.namespace).get(found[1]):
                return "".join(f"{line}\n" for line in self.kubernetes.said(pod["metadata"]["uid"]))
            return json.dumps({"error_message": f"Failed to read logs from pod {found[1]}", "error_details": ""})
        return None


class _Handler(BaseHTTPRequestHandler):
    def reply(self) -> None:
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body: Any = self.rfile.read(size) if size else None
        if body and "json" in self.headers.get("Content-Type", ""):
            body = json.loads(body)
        assert isinstance(self.server, Api)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        status, content = self.server.answer(self.command, url.path, query, body)
        text = isinstance(content, str)
        data = content.encode() if text else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = reply  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass
