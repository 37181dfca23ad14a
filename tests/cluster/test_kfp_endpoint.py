"""The compiled pipeline on a Kubeflow Pipelines backend, as a person at a laptop runs it: `make test-cluster`.

KFP_ENDPOINT is the URL of its API (`kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`), DILOCO_TEST_IMAGE
the project's image, which its nodes can pull. Without either, the test is skipped. The cluster must have what
docs/guide/cluster.md sets up: an etcd and the rights of the steps (`manifests/overlays/dev`), and one of the operators.
KFP_NAMESPACE is the user's namespace on a multi-user installation.
"""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.follower import STEPS
from tests.cluster.test_cluster import PARAMETERS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
Pipelines = Callable[..., str]  # runs `python -m pipelines` with these words, and returns what that prints


def no_endpoint() -> str:
    """Why there is no backend to test on; "" if one is named."""
    if not os.environ.get("KFP_ENDPOINT"):
        return "KFP_ENDPOINT names no Kubeflow Pipelines backend"
    return "" if os.environ.get("DILOCO_TEST_IMAGE") else "DILOCO_TEST_IMAGE does not name the project's image"


def test_the_compiled_pipeline_runs_to_its_end() -> None:
    if reason := no_endpoint():
        pytest.skip(reason)
    where = ["--host", os.environ["KFP_ENDPOINT"], "--namespace", os.environ.get("KFP_NAMESPACE", "")]
    # Claims of its own, which go with the run
    values = {**PARAMETERS, "storage_retain": False, "deployment_name": f"diloco-test-{uuid.uuid4().hex[:8]}"}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    flags = [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]

    def pipelines(*words: str) -> str:
        command = [sys.executable, "-m", "pipelines", *words, *where]
        environment = {**os.environ, "PIPELINE_IMAGE": os.environ["DILOCO_TEST_IMAGE"]}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = pipelines("submit", "--wait", *flags)
    run = re.search(r"^run (\S+)$", printed, re.MULTILINE)
    assert run, printed
    assert f"run {run[1]} has succeeded" in printed
    check_run(pipelines, run[1])


def check_run(pipelines: Pipelines, run: str) -> None:
    """Check what a person is told of a run that has succeeded."""
    status = pipelines("status", run).splitlines()
    assert status[0] == f"run {run}: succeeded"
    assert set(status) >= {f"{step}: succeeded" for step in STEPS}, status
    for step, words in {"precache": "claims are precached", "train": "is complete", "evaluate": "held out: "}.items():
        assert words in pipelines("logs", run, "--step", step)
