"""The Dockerfile agrees with the project: what it copies, who it runs as, what it is called."""

import fnmatch
import re
import tomllib
from pathlib import Path

from components.runtime import IMAGE
from trainer.config import TrainingConfig
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.objects.training_jobs import training_jobs

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in joined.splitlines() if line.startswith(name + " ")]


def test_everything_that_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"
    admitted = [line.removeprefix("!") for line in lines if line.startswith("!")]
    copied = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert sorted(copied) == sorted(admitted)
    assert all((ROOT / path).exists() for path in copied)
    packages = re.findall(r'"(\w+)\*"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(packages) <= set(copied)


def test_everything_installed_is_pinned() -> None:
    for line in instructions("RUN"):
        for command in re.split(r"&&|\|\|", line):
            if re.search(r"\bpip install\b", command):
                assert "--constraint constraints.txt" in command or "--no-deps" in command


def test_it_runs_as_the_user_of_the_pods() -> None:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "x"})
    job = training_jobs(plan(config, namespace="n", image="i"))[0]
    context = job.template["spec"]["securityContext"]
    assert instructions("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert instructions("WORKDIR")[-1] == "/data"


def test_its_name_is_the_same_everywhere() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert fnmatch.fnmatch(IMAGE, "*python*:*")
    name, _, tag = IMAGE.partition(":")
    assert f"IMAGE ?= {name}:$(VERSION)\n" in makefile
    prod = (ROOT / "manifests" / "overlays" / "prod" / "kustomization.yaml").read_text(encoding="utf-8")
    assert f"- name: {name}\n    newName: {name}\n    newTag: {tag}\n" in prod


def test_it_has_every_extra_that_a_run_may_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[(.*)\]'", DOCKERFILE)
    assert set(extras.split(",")) == set(project["optional-dependencies"]) - {"dev", "trackers"}  # `mlflow` is in it
