"""Names and labels of what a training makes: valid, deterministic, never the same for two things."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import TrainingConfig
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.jobs import claim, step_job
from trainer.kubernetes.objects.plan import Plan, plan
from trainer.kubernetes.objects.training_jobs import training_jobs

DNS_1035 = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


def planned(**values: object) -> Plan:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "mine", **values})
    return plan(config, namespace="team", image="diloco-pipelines-python:0.1.0")


@pytest.mark.parametrize(
    ("launcher", "deployment", "run_id", "job"),
    [
        ("trainjob", "gpt", "mine", "gpt-mine-nvidia-w1"),
        # As KFP names a run
        (
            "trainjob",
            "diloco-training-job",
            "4f2c8a7b-90d1-4e1a-8b55-5c1f0e7d2a31",
            "diloco-training-job-4f2c8a7b-nvidia-w1",
        ),
        # As a laptop does
        (
            "pytorchjob",
            "diloco-training-job",
            "20261121-105017-ab12",
            "diloco-training-job-20261121-105017-ab12-nvidia-w1",
        ),
        ("trainjob", "diloco-training-job", "20261121-105017-ab12", "diloco-training-job-20261121-e4ac93d8-nvidia-w1"),
        # Not a random one: the first digits of a UUID1 or a UUID7 are the time
        ("trainjob", "gpt", "4f2c8a7b-90d1-1e1a-8b55-5c1f0e7d2a31", "gpt-4f2c8a7b-90d1-1e1a-8b55-5-74494947-nvidia-w1"),
    ],
)
def test_a_job_is_named_after_training_site_and_worker(launcher: str, deployment: str, run_id: str, job: str) -> None:
    made = planned(launcher=launcher, run_id=run_id, deployment_name=deployment)
    assert made.workers[1].job == job
    assert made.workers[1].claim == f"{deployment}-nvidia-worker-1-data"


def test_a_worker_s_folder_is_named_like_its_pod() -> None:
    assert planned(run_id="mine", deployment_name="gpt").workers[1].folder == "gpt-mine-nvidia-w1-worker-0"


@settings(max_examples=150, deadline=None)
@given(
    run_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    deployment=st.from_regex(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True),
    site=st.from_regex(r"[a-z]([a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True),
    mode=st.sampled_from(["ReadWriteOnce", "ReadWriteMany"]),
    launcher=st.sampled_from(["pytorchjob", "trainjob"]),
)
def test_every_name_is_a_dns_label_and_every_label_has_a_value_that_is_allowed(
    run_id: str, deployment: str, site: str, mode: str, launcher: str
) -> None:
    made = planned(
        launcher=launcher,
        run_id=run_id,
        deployment_name=deployment,
        storage_access_mode=mode,
        nodes=12,
        sites=[{"name": site, "replicas": 11}, {"name": "other-site-than-that", "replicas": 1}],
    )
    jobs = training_jobs(made)
    found = [job.name for job in jobs]
    assert all(len(name) <= {"pytorchjob": 53, "trainjob": 48}[launcher] for name in found)
    found += [step_job(made, worker, "precache")["metadata"]["name"] for worker in made.claimants]
    found += [worker.claim for worker in made.claimants] + [worker.folder for worker in made.workers]
    assert len(found) == len(set(found))
    for name in found:
        assert DNS_1035.fullmatch(name), name
    for job in jobs:
        for value in [*job.body["metadata"]["labels"].values(), *job.template["metadata"]["labels"].values()]:
            assert LABEL_VALUE.fullmatch(value), value


@pytest.mark.parametrize(
    ("one", "other"),
    itertools.combinations(["a-b", "A-b", "a.b", "a_b", "a-b-", "a--b", "x" * 60 + "a", "x" * 60 + "b"], 2),
)
def test_two_run_ids_never_share_a_name_or_a_selector(one: str, other: str) -> None:
    first, second = planned(run_id=one), planned(run_id=other)
    assert first.name != second.name
    assert first.selector != second.selector
    assert {worker.claim for worker in first.workers} == {worker.claim for worker in second.workers}


def test_what_is_too_long_keeps_its_end() -> None:
    assert names.name("a" * 60, "east", "12") == "a" * 46 + "-" + names.name("a" * 60, "east", "12")[47:55] + "-east-12"


def test_the_selector_finds_all_that_the_run_has_made_and_no_claim() -> None:
    made = planned()
    selected = dict(part.split("=") for part in made.selector.split(",")).items()
    for job in training_jobs(made):
        assert selected <= job.body["metadata"]["labels"].items()
        assert selected <= job.template["metadata"]["labels"].items()
    assert not selected <= claim(made, made.workers[0])["metadata"]["labels"].items()


def test_two_deployments_with_one_run_id_do_not_share_a_selector() -> None:
    assert planned(deployment_name="one").selector != planned(deployment_name="other").selector
