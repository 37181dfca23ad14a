"""What Argo Workflows does with a compiled pipeline, and how the API describes the run.

Steps are real processes, each in a pod of its own, whose node is this machine. Within a DAG one task runs at a time.
Retries are those of Kubeflow's installation (`templateDefaults`: limit 2, OnError): a step is started again when its
pod was deleted, and not when it has failed. The exit task is a hook of the task that it follows: it runs once that task
has run, however it ended, and also in a workflow that was terminated.
"""

import copy
import json
import os
import random
import select
import signal
import string
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cluster.apiserver import Object
from tests.kfp_backend.driver import EXIT, Failed, Ir, Values, as_json, resolve, root_inputs
from tests.kfp_backend.launcher import LOGS, Launcher

if TYPE_CHECKING:
    from tests.kfp_backend.server import Backend

ROOT = Path(__file__).parents[2]
RETRIES = 2
# Seconds from SIGTERM to SIGKILL, whatever the pod's grace period: Argo's emissary passes the signal to the launcher as
# well, which dies of it, and the container ends with it. From then on what the step prints has no reader (EPIPE).
GRACE = 2.0
_RUN_ID = "pipeline/runid"
_MOUNT = """\
import io, os
opened = io.open
def mounted(path, *arguments, **options):
    if isinstance(path, (str, os.PathLike)):
        path = os.fspath(path).replace("/var/run/secrets/kubernetes.io/serviceaccount", {path!r})
    return opened(path, *arguments, **options)
io.open = mounted  # pathlib's
"""
_TYPES = {
    "system.Metrics": "Metric",
    "system.ClassificationMetrics": "ClassificationMetric",
    "system.SlicedClassificationMetrics": "SlicedClassificationMetric",
}


class _Deleted(Exception):
    """The pod was deleted: Argo takes that for an error, not for a failure."""


class _Stopped(Exception):
    """The workflow was terminated, or the backend ends: the launcher has died with its step, and reports nothing."""


class Workflow(threading.Thread):
    """A run.

    Attributes:
        record: The run in the API's words.
        tasks: Its tasks, as the `native` backend has them; of `mlmd` the workflow's nodes.
        steps: Pods of the steps that have been started, as they were last seen, each with its task's name.
        terminated: Set to terminate it.
    """

    def __init__(self, backend: "Backend", run_id: str, body: Ir, parameters: Mapping[str, Any]) -> None:
        super().__init__(name=f"run-{run_id}", daemon=True)
        self._backend, self._server, self._ir = backend, backend.kubernetes, body["pipeline_spec"]
        self._ir = self._ir.get("pipeline_spec", self._ir)  # beside a platform spec
        self._parameters, self._lock = parameters, threading.Lock()
        self._pipeline = self._ir["pipelineInfo"]["name"]
        self._name = f"{self._pipeline}-{_suffix()}"
        self.record: Ir = {**body, "run_id": run_id, "created_at": _now(), "state_history": []}
        self.tasks: list[Ir] = []
        self.steps: list[tuple[str, Object]] = []
        self.terminated = threading.Event()
        metadata = {"name": self._name, "labels": {_RUN_ID: run_id}}
        body = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": metadata, "spec": {}}
        self._workflow = self._server.put("workflows", {**body, "status": {"phase": "Running"}}, backend.namespace)
        self.become("PENDING")

    def become(self, state: str) -> None:
        """The run's state changes."""
        with self._lock:
            self.record["state"] = state
            self.record["state_history"].append({"update_time": _now(), "state": state})

    def terminate(self) -> None:
        """As the API server does it."""
        self.become("CANCELING")
        self._change_workflow(lambda one: one["spec"].update(activeDeadlineSeconds=0))
        self.terminated.set()

    def run(self) -> None:
        """Run the pipeline."""
        if not self.terminated.is_set():
            self.become("RUNNING")
        title = str(self.record.get("display_name", self._pipeline))
        task = self._task("ROOT" if self._native else "root", title, "ROOT", "")
        inputs = root_inputs(self._ir, self._parameters)
        well = self._dag(self._ir["root"], inputs, ("root",), task) is not None
        phase = "Succeeded" if well and not self.terminated.is_set() else "Failed"
        self._change_workflow(lambda one: one["status"].update(phase=phase, finishedAt=_now()))
        with self._lock:
            self.record["finished_at"] = _now()
        self.become(phase.upper())

    @property
    def _native(self) -> bool:
        return self._backend.flavour == "native"

    def _change_workflow(self, change: Any) -> None:
        self._server.update("workflows", self._name, change, self._backend.namespace)

    # The graph

    def _dag(self, component: Ir, inputs: Values, path: tuple[str, ...], task: Ir) -> Values | None:
        """Run a DAG's tasks; its outputs, or None if one of the tasks did not succeed."""
        tasks, done, well, failed = component["dag"]["tasks"], dict[str, Values](), True, False
        exits = {name for name, one in tasks.items() if one.get("triggerPolicy", {}).get("strategy") == EXIT}
        hooks = {before: name for name in exits for before in tasks[name]["dependentTasks"]}
        for name in _order({name: one for name, one in tasks.items() if name not in exits}):
            waits_for = tasks[name].get("dependentTasks", [])
            if any(one not in done for one in waits_for) or self.terminated.is_set() or self._backend.closing.is_set():
                well = False  # Argo omits it
                continue
            ran, outputs = self._run_task(name, tasks[name], inputs, done, path, task)
            if outputs is None:
                well, failed = False, failed or not self.terminated.is_set()
            else:
                done[name] = outputs
            if ran and name in hooks and not self._backend.closing.is_set():
                hook = hooks[name]
                well = self._run_task(hook, tasks[hook], inputs, done, path, task, hook=True)[1] is not None and well
        if well or failed:
            self._end(task, "SUCCEEDED" if well else "FAILED")
        return _outputs(component["dag"].get("outputs", {}), done) if well else None

    def _run_task(
        self,
        name: str,
        task: Ir,
        parent: Values,
        done: Mapping[str, Values],
        path: tuple[str, ...],
        above: Ir,
        *,
        hook: bool = False,
    ) -> tuple[bool, Values | None]:
        """Whether the task has run, which it does not when its driver fails; and its outputs, if it has succeeded."""
        component = self._ir["components"][task["componentRef"]["name"]]
        title, driver, kind = task["taskInfo"]["name"], self._pod((*path, f"{name}-driver"), ""), "RUNTIME"
        run = {"{{$.pipeline_job_uuid}}": self.record["run_id"], "{{$.pipeline_job_resource_name}}": self._name}
        node = None if self._native else self._task(f"{name}-driver", f"{name}-driver", "RUNTIME", "")
        try:
            inputs = resolve(self._backend.flavour, component, name, task, parent, done, run)
        except Failed as error:
            self._server.log(driver["metadata"]["uid"], _glog("F", "main.go:127", str(error)))
            self._finish_pod(driver, 1)
            if node is not None:
                self._end(node, "FAILED")
            elif "dag" not in component:  # a DAG's driver fails before it has made the task
                made = self._task(name, title, kind, above["task_id"], driver)
                self._end(made, "FAILED", str(error))
            return False, None
        self._finish_pod(driver, 0)
        if node is not None:
            self._end(node, "SUCCEEDED")
        made = self._task(name, title, "DAG" if "dag" in component else kind, above["task_id"], driver)
        if "dag" in component:
            return True, self._dag(component, inputs, (*path, name), made)
        return True, self._run_container(name, task, component, inputs, (*path, name), made, hook=hook)

    # A step

    def _run_container(
        self, name: str, task: Ir, component: Ir, inputs: Values, path: tuple[str, ...], made: Ir, *, hook: bool
    ) -> Values | None:
        backend = self._backend
        container = self._ir["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        names = component.get("outputDefinitions", {})
        key = as_json([self._pipeline, inputs.parameters, inputs.artifacts, names, container])
        if task.get("cachingOptions", {}).get("enableCache") and key in backend.cache:
            self._end(made, "CACHED" if self._native else "SUCCEEDED")
            return backend.cache[key]
        place = f"mlpipeline/v2/artifacts/{self._pipeline}/{self.record['run_id']}/{name}/{uuid.uuid4()}"
        for attempt in range(1 + RETRIES):
            pod = self._pod((*path, "executor"), container["image"], attempt)
            disk = backend.root / "pods" / pod["metadata"]["name"]
            (disk / "tmp").mkdir(parents=True)
            made["pods"].append(_reference(pod, "EXECUTOR"))
            self.steps.append((name, pod))
            launcher = Launcher(backend.flavour, component, inputs, backend.root / "store", disk, place)
            try:
                outputs = launcher.execute(
                    container, partial(self._process, name, container, launcher, pod, disk, hook)
                )
            except _Deleted:
                self._server.remove("pods", pod["metadata"]["name"], backend.namespace)
                continue
            except _Stopped:
                self._finish_pod(pod, 137)
                return None
            except Failed as error:
                self._server.log(pod["metadata"]["uid"], _glog("F", "main.go:49", str(error)))
                self._finish_pod(pod, 1)
                self._report(made, Values(artifacts={LOGS: launcher.logs_artifact()}))
                self._end(made, "FAILED", str(error))
                return None
            self._finish_pod(pod, 0)
            self._report(made, outputs)
            self._end(made, "SUCCEEDED")
            backend.cache[key] = outputs
            return outputs
        return None

    def _process(
        self, name: str, container: Ir, launcher: Launcher, pod: Object, disk: Path, hook: bool, command: list[str]
    ) -> int:
        """Run a step's command in its pod, and return its exit status."""
        if prepare := self._backend.before.get(name):
            prepare(pod)
        environment = self._environment(pod, disk) | {one["name"]: one["value"] for one in container.get("env", [])}
        printed, prints = os.pipe()
        alive, held = os.pipe()  # held by all of the step's processes: it is at its end when they are
        process = subprocess.Popen(
            command,
            cwd=disk,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=prints,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[held],
        )
        os.close(prints)
        os.close(held)
        self._start_pod(pod)
        self._server.log(pod["metadata"]["uid"], _glog("I", "launcher_v2.go:151", "launcher info:"))
        for line in json.dumps(command, indent=2).splitlines():
            self._server.log(pod["metadata"]["uid"], line)
        died = threading.Event()  # the launcher has
        reader = threading.Thread(target=self._read, args=(printed, pod, launcher.log, died), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(0.05)
                wanted, closing = self._is_wanted(pod), self._backend.closing.is_set()
                if wanted and not closing and (hook or not self.terminated.is_set()):
                    continue
                died.set()
                reader.join()
                _stop(process, alive, GRACE if not closing else 0.0)
                raise _Stopped if wanted else _Deleted
        finally:
            process.wait()
            os.close(alive)
        return process.returncode

    def _read(self, printed: int, pod: Object, log: Path, died: threading.Event) -> None:
        """The launcher takes what the step prints, until that has ended, or the launcher has died."""
        rest = b""
        with log.open("w") as file, os.fdopen(printed, "rb", buffering=0) as pipe:
            while not died.is_set():
                if not select.select([pipe], [], [], 0.02)[0]:
                    continue
                part = pipe.read(1 << 16)
                *lines, rest = (rest + part).split(b"\n") if part else ([rest] if rest else []) + [b""]
                for line in lines:
                    text = line.decode(errors="replace")
                    file.write(f"{text}\n")
                    self._server.log(pod["metadata"]["uid"], text)
                if not part:
                    return

    def _environment(self, pod: Object, disk: Path) -> dict[str, str]:
        metadata = pod["metadata"]
        account = disk / "serviceaccount"
        account.mkdir(exist_ok=True)
        (account / "namespace").write_text(metadata["namespace"])
        # Python runs it first: a process here has no mounts of its own.
        (account / "sitecustomize.py").write_text(_MOUNT.format(path=str(account)))
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join([str(account), str(ROOT)]),  # the image holds the project
            "HOME": os.environ.get("HOME", "/"),
            "TMPDIR": str(disk / "tmp"),
            "HOSTNAME": metadata["name"],
            "KFP_POD_NAME": metadata["name"],
            "KFP_POD_UID": metadata["uid"],
            **({"NAMESPACE": metadata["namespace"]} if self._native else {}),
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self._server.server_port),
            "KUBECONFIG": str(self._backend.root / "kubeconfig"),  # for the service account's token, which is a file
            **self._backend.environment,
        }

    # Pods

    def _pod(self, path: tuple[str, ...], image: str, attempt: int = 0) -> Object:
        """Create a pod, as Argo would: it waits for a node."""
        owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "controller": True}
        owner |= {"name": self._name, "uid": self._workflow["metadata"]["uid"]}
        node = ".".join([f"{self._name}(0)", *(f"{name}(0)" for name in path[:-1]), f"{path[-1]}({attempt})"])
        metadata = {
            "name": f"{self._name}-system-{'container-impl' if image else 'driver'}-{random.randrange(10**10)}",
            "labels": {_RUN_ID: self.record["run_id"], "workflows.argoproj.io/workflow": self._name},
            "annotations": {"workflows.argoproj.io/node-name": node},
            "ownerReferences": [owner],
        }
        spec = {"containers": [{"name": "main", "image": image or "kfp-driver"}, {"name": "wait", "image": "argoexec"}]}
        body = {"kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": "Pending"}}
        return self._server.put("pods", body, self._backend.namespace)

    def _start_pod(self, pod: Object) -> None:
        def change(one: Object) -> None:
            one["spec"]["nodeName"] = "node-1"
            one["status"] = {"phase": "Running", "containerStatuses": [_container(pod, {"running": {}})]}

        self._server.update("pods", pod["metadata"]["name"], change, self._backend.namespace)

    def _finish_pod(self, pod: Object, code: int) -> None:
        def change(one: Object) -> None:
            state = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
            phase = "Failed" if code else "Succeeded"
            one["status"] = {"phase": phase, "containerStatuses": [_container(pod, state)]}

        self._server.update("pods", pod["metadata"]["name"], change, self._backend.namespace)

    def _is_wanted(self, pod: Object) -> bool:
        with self._server.changed:
            one = self._server.peek("pods", pod["metadata"]["name"], self._backend.namespace)
            return one is not None and "deletionTimestamp" not in one["metadata"]

    # What the API says

    def _task(self, name: str, title: str, kind: str, parent: str, driver: Object | None = None) -> Ir:
        made = {
            "name": name,
            "display_name": title,
            "task_id": str(uuid.uuid4()),
            "run_id": self.record["run_id"],
            "pods": [_reference(driver, "DRIVER")] if driver else [],
            "create_time": _now(),
            "state": "RUNNING",
            "type": kind,
            "outputs": {},
        } | ({"parent_task_id": parent} if parent else {})
        with self._lock:
            self.tasks.append(made)
        return made

    def _end(self, task: Ir, state: str, message: str = "") -> None:
        with self._lock:
            task |= {"state": state, "end_time": _now()} | (
                {"status_metadata": {"message": message}} if message else {}
            )

    def _report(self, task: Ir, outputs: Values) -> None:
        """The outputs in the API's words."""
        producer = {"task_name": task["name"]}
        artifacts = []
        for key, one in outputs.artifacts.items():
            kind = _TYPES.get(one["type"].get("schemaTitle", ""), one["type"].get("schemaTitle", "")[7:])
            made = {"artifact_id": str(uuid.uuid4()), "name": key, "type": kind, "namespace": self._backend.namespace}
            made |= {"metadata": one["metadata"]} | ({} if kind in _TYPES.values() else {"uri": one["uri"]})
            artifacts.append({"artifact_key": key, "artifacts": [made], "type": "OUTPUT", "producer": producer})
        parameters = [
            {"parameter_key": key, "value": value, "type": "OUTPUT", "producer": producer}
            for key, value in outputs.parameters.items()
        ]
        task["outputs"] = {"artifacts": artifacts, "parameters": parameters}

    def described(self, *, full: bool) -> Ir:
        """The run as `GetRun` gives it."""
        with self._lock:
            record, tasks = copy.deepcopy(self.record), copy.deepcopy(self.tasks)
        if self._native:
            return record | {"task_count": len(tasks)} | ({"tasks": tasks} if full else {})
        return record | {"run_details": {"task_details": list(_nodes(tasks))}}


def _nodes(tasks: list[Ir]) -> Iterator[Ir]:
    """The workflow's nodes as tasks: each has a node for all its attempts, and one for each of them."""
    for task in tasks:
        known: Ir = {key: task[key] for key in ("run_id", "task_id", "create_time", "end_time", "state") if key in task}
        pods = [one for one in task["pods"] if one["type"] == "EXECUTOR"]
        for name, often in ((task["name"], 1), *([("executor", len(pods))] if pods else [])):
            for title in (name, *(f"{name}({attempt})" for attempt in range(often))):
                yield {**known, "display_name": title}


def _container(pod: Object, state: Object) -> Object:
    return {**pod["spec"]["containers"][0], "state": state}


def _reference(pod: Object, kind: str) -> Ir:
    return {"name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"], "type": kind}


def _stop(process: "subprocess.Popen[bytes]", alive: int, grace: float) -> None:
    """SIGTERM to all processes of a container, and SIGKILL to those that do not go."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        select.select([alive], [], [], grace)
        os.killpg(process.pid, signal.SIGKILL)


def _order(tasks: Mapping[str, Ir]) -> Iterator[str]:
    """The tasks, each after those that it depends on."""
    sorter = TopologicalSorter({name: task.get("dependentTasks", []) for name, task in sorted(tasks.items())})
    return iter(sorter.static_order())


def _outputs(selectors: Ir, done: Mapping[str, Values]) -> Values:
    """What a DAG hands on of its tasks' outputs."""
    parameters = {name: one["valueFromParameter"] for name, one in selectors.get("parameters", {}).items()}
    artifacts = {name: one["artifactSelectors"][0] for name, one in selectors.get("artifacts", {}).items()}
    return Values(
        {name: done[one["producerSubtask"]].parameters[one["outputParameterKey"]] for name, one in parameters.items()},
        {name: done[one["producerSubtask"]].artifacts[one["outputArtifactKey"]] for name, one in artifacts.items()},
    )


def _glog(level: str, place: str, text: str) -> str:
    return f"{level}{datetime.now(UTC):%m%d %H:%M:%S.%f}       1 {place}] {text}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _suffix() -> str:
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
