"""A release of the Helm chart on a stand-in for a cluster: its Job runs the pipeline; a `Story` plays the workers."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.cluster.apiserver import PLURALS, ApiServer, Object, serving
from tests.cluster.nodes import Cluster
from tests.cluster.story import Story, whole_results
from tests.kube_tools import helm

pytestmark = pytest.mark.timeout(600)

CHART = Path(__file__).parents[2] / "manifests" / "chart"


class Release:
    """A release in namespace `default`, and the nodes of its cluster."""

    def __init__(self, server: ApiServer, etcd: str, place: Path) -> None:
        self.server, self.story, self.place = server, Story(), place
        self.story.results = whole_results()
        self.results = place / "results"  # the claim
        self._kubeconfig = server.kubeconfig(place / "kubeconfig")
        values = {"diloco.device": "cpu", "diloco.maxSamples": "100", "etcd.endpoints": f"{{{etcd}}}"}
        sets = [word for pair in values.items() for word in ("--set", "=".join(pair))]
        made = helm("template", f"release-{uuid.uuid4().hex[:8]}", CHART, *sets)
        assert made.returncode == 0, made.stderr
        granted = set(server.granted)
        for obj in filter(None, yaml.safe_load_all(made.stdout)):
            plural, group = next((plural, one[0]) for plural, one in PLURALS.items() if one[2] == obj["kind"])
            server.granted.add(("create", group, plural, ""))  # what a person may, and the steps may not
            path = f"/{'apis' if group else 'api'}/{obj['apiVersion']}/namespaces/default/{plural}"
            server.answer("POST", path, {}, obj)
        server.granted = granted
        self.job, self.lines = next(iter(server.all("jobs"))), list[str]()

    def kubelet(self, cluster: Cluster, pod: Object) -> None:
        """Run the pipeline's pod as a process here; tell a story about the others."""
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] != "pipeline":
            self.story(cluster, pod)
            return
        (container,), volumes = pod["spec"]["containers"], {one["name"]: one for one in pod["spec"]["volumes"]}
        config = self.server.all("configmaps")[volumes["config"]["configMap"]["name"]]["data"]
        for name, text in config.items():
            (self.place / name).write_text(text)
        self.results.mkdir(exist_ok=True)
        command = [*container["command"], *container["args"]]
        command = [sys.executable if word == "python" else word for word in command]
        command = [word.replace("/etc/diloco", str(self.place)) for word in command]
        own = {one["name"]: one["value"] for one in container["env"]}
        here = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "JIT_CACHE_DIR") if name in os.environ}
        account = {"KUBECONFIG": str(self._kubeconfig), "KFP_POD_NAME": pod["metadata"]["name"], "NAMESPACE": "default"}
        process = subprocess.Popen(
            command, cwd=self.results, env={**own, **here, **account, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        cluster.start(pod)

        def stop() -> None:
            cluster.wait_while_wanted(pod, until=lambda: process.poll() is not None)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

        threading.Thread(target=stop, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))
        code = process.wait()
        cluster.end(pod, code if code >= 0 else 128 - code)

    def trains(self) -> bool:
        """Whether both workers' pods run."""
        assert not (self.server.peek("jobs", self.job) or {}).get("status"), self.lines
        pods = [pod for name, pod in self.server.all("pods").items() if "-worker-" in name]
        return len([pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]) == 2

    def ends(self) -> str:
        """How its Job has ended."""

        def condition() -> str:
            job = self.server.peek("jobs", self.job) or {}
            return str(job.get("status", {}).get("conditions", [{"type": ""}])[0]["type"])

        return str(self.server.wait_until(condition))

    def owners(self, *plurals: str) -> set[str]:
        """What the steps' objects of these kinds belong to."""
        found = [one for plural in plurals for one in self.server.all(plural).values()]
        return {
            owner["name"]
            for one in found
            if one["metadata"]["labels"]["app.kubernetes.io/component"] != "pipeline"
            for owner in one["metadata"].get("ownerReferences", [{"name": "nothing"}])
        }

    def uninstall(self) -> None:
        """`helm uninstall`, without the objects that the steps do not know."""
        self.server.remove("jobs", self.job)

    def nothing_but_claims(self) -> None:
        self.server.wait_until(lambda: not self.server.all("pods"))
        for plural in ("pytorchjobs", "jobs", "networkpolicies"):
            assert not self.server.all(plural), plural
        assert set(self.server.all("configmaps")) == {self.job}  # the chart's own
        claims = self.server.all("persistentvolumeclaims")
        assert len([name for name in claims if name.startswith("diloco-training-job-cpu-worker-")]) == 2
        assert len(claims) == 3


@pytest.fixture
def release(etcd: str, tmp_path: Path) -> Iterator[Release]:
    with ExitStack() as resources:
        server = resources.enter_context(serving())
        release = Release(server, etcd, tmp_path)
        resources.enter_context(Cluster(server, release.kubelet).running())
        yield release
        release.story.released.set()


@pytest.mark.faults
def test_its_job_runs_the_pipeline_keeps_the_results_and_leaves_the_claims(release: Release) -> None:
    release.story.released.clear()
    release.server.wait_until(release.trains)
    assert release.owners("pytorchjobs", "jobs", "configmaps", "networkpolicies") == {release.job}
    release.story.released.set()
    assert release.ends() == "Complete", release.lines
    (run,) = (release.results / "runs").iterdir()
    kept = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"export/training.json", "evaluation.json", "report.html", "summary.md", "logs/pipeline.log"} <= kept
    assert {f"worker-{worker}/metrics.jsonl" for worker in range(2)} <= kept
    assert any("train    | round 2" in line for line in release.lines)
    assert release.lines[-1] == f"report      runs/{run.name}/report.html"
    release.uninstall()
    release.nothing_but_claims()
