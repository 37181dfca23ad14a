"""The steps on a stand-in for a cluster, refusals: what cannot work is named before or when it is tried.

The API server (tests/cluster) enforces the Role of manifests/ and the published schemas; a `Story` says what pods do.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.place import QUICK, Place
from trainer.errors import TrainingError
from trainer.kubernetes.steps.precache import precache
from trainer.kubernetes.steps.training import train

pytestmark = pytest.mark.timeout(600)


OPERATORS = [("pytorchjob", "Kubeflow's training operator"), ("trainjob", "Kubeflow Trainer")]


@pytest.mark.parametrize(("launcher", "operator"), OPERATORS)
@pytest.mark.parametrize("step", [precache, train])
def test_without_the_crd_it_says_what_to_install(
    place: Place, tmp_path: Path, step: Callable[..., Any], operator: str
) -> None:
    place.server.missing.add(place.kind.plural)
    with pytest.raises(TrainingError, match=f"the cluster has no {place.kind.plural}: .* install {operator}"):
        step(place.context(), tmp_path / "out")


@pytest.mark.parametrize(("launcher", "operator"), OPERATORS)
def test_an_operator_that_does_not_run_is_noticed(place: Place, tmp_path: Path, operator: str) -> None:
    place.timeouts = replace(QUICK, controller=0.3)
    place.cluster.operator = False
    with pytest.raises(TrainingError, match=rf"is {operator} installed, .*running\?"):
        train(place.context(elastic_rdzv_timeout=2.0), tmp_path / "run")
    assert place.said(f"no controller acts on {place.kind.name}")


@pytest.mark.parametrize(
    ("launcher", "verb", "resource"),
    [
        ("pytorchjob", "create", "pytorchjobs"),
        ("pytorchjob", "watch", "pods"),
        ("pytorchjob", "list", "pytorchjobs"),
        ("trainjob", "create", "trainingruntimes"),
    ],
)
def test_a_missing_permission_is_named(place: Place, tmp_path: Path, verb: str, resource: str) -> None:
    place.server.forbidden.add((verb, resource))
    place.story.released.clear()
    with pytest.raises(TrainingError, match=f"not allowed to {verb} {resource} in namespace default.* manifests/"):
        train(place.context(), tmp_path / "run")


def test_a_namespace_that_is_not_there_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="there is no namespace nowhere: create it, or set deployment_namespace"):
        precache(place.context(deployment_namespace="nowhere"), tmp_path / "held-out")


def test_an_etcd_that_cannot_be_reached_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"127.0.0.1:1.*Is etcd running .manifests/ has one., is etcd.endpoints right"
    ):
        train(place.context(etcd_endpoints=["127.0.0.1:1"]), tmp_path / "run")
    assert not place.jobs()


def test_missing_etcd_credentials_are_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="there is no Secret diloco-etcd-client with etcd's credentials in namespace default"
    ):
        train(place.context(etcd_user="diloco"), tmp_path / "run")


def test_a_cluster_that_cannot_be_reached_is_named(place: Place, tmp_path: Path) -> None:
    place.server.outages = 10**6
    with pytest.raises(TrainingError, match=r"the Kubernetes API at http://127\.0\.0\.1:\d+ cannot be reached"):
        precache(place.context(), tmp_path / "held-out")
