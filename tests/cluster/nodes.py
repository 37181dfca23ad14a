"""What makes a stand-in API server a cluster: the Job controller, the training operators, and kubelets.

A kubelet is a function that is called, in a thread, for each new pod, and says what becomes of it: `Processes` runs the
pod's command on this machine; a test's own tells a story, with the methods of `Cluster`.
"""

import base64
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.cluster.apiserver import ApiServer, Object
from tests.cluster.trainer import Trainer, condition, is_of_set
from trainer.kubernetes.objects.pod_template import RESULT_PORT

Kubelet = Callable[["Cluster", Object], None]


class Cluster:
    """The controllers of a stand-in, and what kubelets say of pods.

    Args:
        server: The API server.
        kubelet: What becomes of a pod.

    Attributes:
        operator: Whether the training operator and Kubeflow Trainer run.
        trainer: Kubeflow Trainer and JobSet.
        shared: Claims of one worker that two of its pods had at the same time, with these pods.
    """

    def __init__(self, server: ApiServer, kubelet: Kubelet) -> None:
        self.server, self.kubelet, self.operator = server, kubelet, True
        self.trainer = Trainer(self)
        self.shared: list[tuple[str, str, str]] = []
        self._known: set[str] = set()  # uids of pods that a kubelet has
        self._stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator["Cluster"]:
        """The controllers run meanwhile."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            thread.join()
            for pod in self.server.all("pods").values():
                self.server.remove("pods", pod["metadata"]["name"])

    # What happens to pods

    def start(self, pod: Object, node: str = "node-1") -> None:
        """The pod's container runs."""
        self._note_shared_claim(pod)

        def change(one: Object) -> None:
            one["spec"]["nodeName"] = node
            one["status"] = {"phase": "Running", "podIP": "127.0.0.1", **_container(one, {"running": {}})}

        self._update(pod, change)

    def say(self, pod: Object, line: str) -> None:
        """The pod's container says a line."""
        self.server.log(pod["metadata"]["uid"], line)

    def end(self, pod: Object, code: int, reason: str = "") -> None:
        """The pod's container ends."""

        def change(one: Object) -> None:
            state = {"terminated": {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error")}}
            phase = "Succeeded" if code == 0 else "Failed"
            one["status"] = {**one.get("status", {}), "phase": phase, **_container(one, state)}

        self._update(pod, change)

    def wait_for_image(self, pod: Object, message: str) -> None:
        """The pod's image cannot be pulled."""
        state = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
        self._update(pod, lambda one: one.update(status={"phase": "Pending", **_container(one, state)}))

    def refuse_place(self, pod: Object, message: str) -> None:
        """The scheduler finds no node."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        self._update(pod, lambda one: one.update(status={"phase": "Pending", "conditions": [condition]}))

    def lose_node(self, pod: Object) -> None:
        """The node controller gives the pod up: its node does not answer."""
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}

        def change(one: Object) -> None:
            one["metadata"]["deletionTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            one["status"].setdefault("conditions", []).append(condition)

        self._update(pod, change)

    def disrupt(self, pod: Object, reason: str) -> None:
        """The cluster ends the pod, and says why."""
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
        self._update(pod, lambda one: one["status"].setdefault("conditions", []).append(condition))

    def tell(self, about: str, reason: str, message: str, kind: str = "Pod") -> None:
        """An event about an object."""
        name = f"{about}.{_suffix()}"
        body = {"metadata": {"name": name}, "involvedObject": {"kind": kind, "name": about, "namespace": "default"}}
        self.server.put("events", {**body, "reason": reason, "message": message, "type": "Warning"})

    def is_wanted(self, pod: Object) -> bool:
        """Whether nobody has deleted the pod."""
        with self.server.changed:
            one = self.server.peek("pods", pod["metadata"]["name"])
            same = one is not None and one["metadata"]["uid"] == pod["metadata"]["uid"]
            return same and "deletionTimestamp" not in one["metadata"]

    def wait_while_wanted(self, pod: Object, until: Callable[[], Any] = lambda: False) -> None:
        """Return when somebody has deleted the pod, or `until` something else."""
        self.server.wait_until(lambda: until() or not self.is_wanted(pod) or self._stopping.is_set(), 600.0)

    def _update(self, pod: Object, change: Callable[[Object], None]) -> None:
        def same(one: Object) -> None:
            if one["metadata"]["uid"] == pod["metadata"]["uid"]:
                change(one)

        self.server.update("pods", pod["metadata"]["name"], same)

    def _note_shared_claim(self, pod: Object) -> None:
        claim = _own_claim(pod)
        for name, other in self.server.all("pods").items():
            runs = other.get("status", {}).get("phase") == "Running"
            if claim and runs and name != pod["metadata"]["name"] and _own_claim(other) == claim:
                self.shared.append((claim, name, pod["metadata"]["name"]))

    # The controllers

    def delete_pod(self, name: str) -> None:
        """As a controller does: the pod is given its time to end."""
        self.server.delete("pods", name)

    def _run(self) -> None:
        seen = -1
        while not self._stopping.is_set():
            with self.server.changed:  # lines of logs are no changes
                self.server.changed.wait_for(lambda before=seen: self.server.version != before, 0.2)
                seen = self.server.version
            for job in self.server.all("jobs").values():
                if not is_of_set(job):
                    self._control_job(job)
            if self.operator:
                self.trainer.run()
            for job in self.server.all("pytorchjobs").values() if self.operator else ():
                self._operate(job)
            for pod in self.server.all("pods").values():
                self._host(pod)

    def _host(self, pod: Object) -> None:
        if any(owner["kind"] == "Workflow" for owner in pod["metadata"].get("ownerReferences", [])):
            return  # a pipeline's own step: see tests/kfp_backend
        uid = pod["metadata"]["uid"]
        if uid not in self._known:
            self._known.add(uid)
            threading.Thread(target=self.kubelet, args=(self, pod), daemon=True).start()
        elif "deletionTimestamp" in pod["metadata"] and _ended(pod):
            self.server.remove("pods", pod["metadata"]["name"])

    def _control_job(self, job: Object) -> None:
        name, conditions = job["metadata"]["name"], job.get("status", {}).get("conditions")
        if conditions:
            return
        pods = self.pods_of(job)
        if not pods:
            self.make_pod("jobs", job, f"{name[:57]}-{_suffix()}", job["spec"]["template"], {})
        elif all(_ended(pod) for pod in pods):
            done = pods[-1]["status"]["phase"] == "Succeeded"
            condition = {"type": "Complete" if done else "Failed", "status": "True", "message": "Job has ended"}
            self.server.update("jobs", name, lambda one: one.update(status={"conditions": [condition]}))

    def _operate(self, job: Object) -> None:
        """As Kubeflow's training operator: pods by index, ExitCode's restarts, the job's conditions."""
        name, status = job["metadata"]["name"], job.get("status", {})
        ends = [one["type"] for one in status.get("conditions", []) if one["status"] == "True"]
        if "Succeeded" in ends or "Failed" in ends:
            return
        worker, pods = (
            job["spec"]["pytorchReplicaSpecs"]["Worker"],
            {p["metadata"]["name"]: p for p in self.pods_of(job)},
        )
        if job["spec"]["runPolicy"].get("suspend"):
            for pod in pods.values():
                if "deletionTimestamp" not in pod["metadata"]:
                    self.delete_pod(pod["metadata"]["name"])
            status = {"conditions": [condition("Created", True), condition("Suspended", True)]}
            self.server.update("pytorchjobs", name, lambda one: one.update(status=status))
            return
        states = {"Created"}
        for index in range(worker["replicas"]):
            pod = pods.get(f"{name}-worker-{index}")
            labels = {"training.kubeflow.org/job-name": name, "training.kubeflow.org/replica-index": str(index)}
            if pod is None:
                template = {**worker["template"], "spec": {**worker["template"]["spec"], "restartPolicy": "Never"}}
                self.make_pod("pytorchjobs", job, f"{name}-worker-{index}", template, labels)
            elif _ended(pod):
                code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
                states.add("Succeeded" if code == 0 else "Restarting" if code >= 128 else "Failed")
                if code >= 128:
                    self.server.remove("pods", pod["metadata"]["name"])
            elif pod.get("status", {}).get("phase") == "Running":
                states.add("Running")
        state = next(one for one in ("Succeeded", "Failed", "Restarting", "Running", "Created") if one in states)
        conditions = [{"type": "Created", "status": "True"}]
        conditions += [{"type": state, "status": "True", "message": f"{name} is {state}"}] if state != "Created" else []
        started = status.get("startTime") or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")  # it checks no deadline
        status = {"conditions": conditions, "startTime": started}
        self.server.update("pytorchjobs", name, lambda one: one.update(status=status))

    def make_pod(self, plural: str, job: Object, name: str, template: Object, labels: dict[str, str]) -> bool:
        """Whether a job's pod could be made."""
        kind = "Job" if plural == "jobs" else "PyTorchJob"
        if "pods" in self.server.quota:
            message = f'Error creating: pods "{name}" is forbidden: exceeded quota: {self.server.quota["pods"]}'
            if not any(
                e["involvedObject"]["name"] == job["metadata"]["name"] for e in self.server.all("events").values()
            ):
                self.tell(job["metadata"]["name"], "FailedCreate", message, kind)
            return False
        owner = {"kind": kind, "apiVersion": "v1", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
        metadata = {**template["metadata"], "name": name, "ownerReferences": [owner]}
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
        self.server.put("pods", {"metadata": metadata, "spec": template["spec"], "status": {"phase": "Pending"}})
        return True

    def pods_of(self, owner: Object) -> list[Object]:
        """The pods that an object owns."""
        uid = owner["metadata"]["uid"]
        pods = self.server.all("pods").values()
        return [p for p in pods if any(o["uid"] == uid for o in p["metadata"].get("ownerReferences", []))]


class Processes:
    """A kubelet that runs a pod's command as a process here, with its claim as a directory.

    Args:
        root: Holds the claims, and what pods are told.

    Attributes:
        environment: Of each process, over the pod's own.
        processes: By the pod's name.
    """

    def __init__(self, root: Path, **environment: str) -> None:
        self.root, self.environment = root, environment
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def claim(self, name: str) -> Path:
        """The directory that is a claim's volume."""
        return self.root / "claims" / name

    def __call__(self, cluster: Cluster, pod: Object) -> None:
        name, spec = pod["metadata"]["name"], pod["spec"]
        container = spec["containers"][0]
        (claim,) = (v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if v["name"] == "data")
        (config,) = (v["configMap"]["name"] for v in spec["volumes"] if v["name"] == "config")
        data = self.claim(claim)
        data.mkdir(parents=True, exist_ok=True)
        mounted = self.root / "pods" / pod["metadata"]["uid"]
        mounted.mkdir(parents=True)
        for file, text in cluster.server.all("configmaps")[config]["data"].items():
            (mounted / file).write_text(re.sub(r"(?<![\w/.-])/data\b", str(data), text))
        command = [*container["command"], *container.get("args", [])]
        places = {
            "/etc/diloco": str(mounted),
            "python": sys.executable,
            str(RESULT_PORT): "0",
        }  # a process has no ports of its own
        command = [places.get(word, word.replace("/etc/diloco", str(mounted))) for word in command]
        environment = {**_environment(cluster, pod, container), **self.environment}
        process = self.processes[name] = subprocess.Popen(
            command, cwd=data, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        cluster.start(pod)
        threading.Thread(target=self._stop_when_deleted, args=(cluster, pod, process), daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            cluster.say(pod, line.rstrip("\n"))
        code = process.wait()
        cluster.end(pod, code if code >= 0 else 128 - code)
        shutil.rmtree(mounted)

    def _stop_when_deleted(self, cluster: Cluster, pod: Object, process: "subprocess.Popen[str]") -> None:
        cluster.wait_while_wanted(pod, until=lambda: process.poll() is not None)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def _environment(cluster: Cluster, pod: Object, container: Object) -> dict[str, str]:
    fields = {"metadata.name": pod["metadata"]["name"], "status.podIP": "127.0.0.1"}
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    for variable in container["env"]:
        source: dict[str, Any] = variable.get("valueFrom", {})
        if "value" in variable:
            environment[variable["name"]] = variable["value"]
        elif "fieldRef" in source:
            environment[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
        elif secret := cluster.server.all("secrets").get(source["secretKeyRef"]["name"]):
            key = source["secretKeyRef"]["key"]
            value = secret.get("stringData", {}).get(key) or base64.b64decode(secret["data"][key]).decode()
            environment[variable["name"]] = value
    return environment


def _container(pod: Object, state: Object) -> Object:
    container = pod["spec"]["containers"][0]
    return {"containerStatuses": [{"name": container["name"], "image": container["image"], "state": state}]}


def _own_claim(pod: Object) -> str:
    """The claim that a worker's pod has for itself; "" if it shares it, or has none."""
    labels = pod["metadata"].get("labels", {})
    if labels.get("app.kubernetes.io/component") != "train" or labels.get("diloco-pipelines/worker") is None:
        return ""
    spec = pod["spec"]
    if any("subPath" in mount for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"] == "/data"):
        return ""
    return next(str(v["persistentVolumeClaim"]["claimName"]) for v in spec["volumes"] if v["name"] == "data")


def _ended(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _suffix() -> str:
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
