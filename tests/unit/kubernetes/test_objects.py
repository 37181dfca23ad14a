"""What is rendered is what the API server takes, is all owned and labelled, and holds no secret."""

import json
import operator
import os
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes_schemas import CRDS, needs_crd, validate
from trainer.config import TrainingConfig, load_config
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.jobs import STEP_LABELS, claim, config_map, network_policy, run_secret, step_job
from trainer.kubernetes.objects.plan import JobObjects, Plan, plan
from trainer.kubernetes.objects.pod_template import GRACE_PERIOD, RESULT_PORT
from trainer.kubernetes.objects.training_jobs import training_jobs
from trainer.launch.etcd3_diloco_rendezvous import BACKEND, client_of
from trainer.monitor.trackers import mlflow

OWNER = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "diloco-training-x7k2p",
    "uid": "7b1c0e9e-0000-4000-8000-000000000000",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "a volume a worker": {},
    "a volume a site": {"storage_access_mode": "ReadWriteMany", "nodes": 3},
    "no GPU": {"device": "cpu"},
    "two vendors": {"gpu_amd_image": "rocm", "nodes": 4},
    "everything": {
        "nodes": 3,
        "sites": [
            {"name": "east", "replicas": 2, "node_selector": {"zone": "east"}, "runtime_class_name": "x"},
            {"name": "west", "gpu_count": 0, "tolerations": [{"key": "a", "operator": "Exists"}]},
        ],
        "port_range": "7000-7999",
        "elastic_etcd_protocol": "https",
        "etcd_user": "me",
        "service_account": "workers",
        "image_pull_secrets": ["pull"],
        "model_cache_dir": "/models",
        "elastic_nproc_per_node": 4,
    },
}


LAUNCHERS = ("pytorchjob", "trainjob")


def planned(**values: Any) -> Plan:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "mine", **values})
    return plan(config, namespace="team", image="python:1", owner=OWNER)


def of_the_run(made: Plan) -> Iterator[dict[str, Any]]:
    """Every object that belongs to the run."""
    for worker in made.claimants:
        yield step_job(made, worker, "precache")
    for worker in made.workers:
        yield step_job(made, worker, "held-out")
        yield step_job(made, worker, "export")
        yield step_job(made, worker, "evaluate")
    for job in training_jobs(made):
        yield from job.all
    yield network_policy(made)
    yield config_map(made)
    yield run_secret(made, "t")


def pods(made: Plan) -> Iterator[dict[str, Any]]:
    for obj in of_the_run(made):
        if obj["kind"] == "Job":
            yield obj["spec"]["template"]
    for job in training_jobs(made):
        yield job.template


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LAYOUTS[request.param]


@pytest.fixture(params=LAUNCHERS)
def made(layout: dict[str, Any], request: pytest.FixtureRequest) -> Plan:
    return planned(launcher=request.param, **layout)


def test_core_objects_are_valid(made: Plan) -> None:
    for obj in [*of_the_run(made), *(claim(made, worker) for worker in made.claimants)]:
        if obj["kind"] not in CRDS:
            validate(obj)


@needs_crd
def test_training_jobs_are_what_the_crds_take(made: Plan) -> None:
    for job in training_jobs(made):
        for obj in job.all:
            validate(obj)


@needs_crd
@pytest.mark.parametrize(("kind", "path"), [("TrainJob", ("spec",)), ("TrainingRuntime", ("spec", "template", "spec"))])
def test_the_crds_schemas_refuse_what_the_api_server_would_drop(kind: str, path: tuple[str, ...]) -> None:
    (obj,) = (obj for obj in training_jobs(planned(launcher="trainjob", nodes=1))[0].all if obj["kind"] == kind)
    reduce(operator.getitem, path, obj)["restartPolicy"] = "Never"
    with pytest.raises(Exception, match="restartPolicy"):
        validate(obj)


def test_each_worker_is_a_trainjob_with_a_runtime_of_its_own(layout: dict[str, Any]) -> None:
    """With a claim of its own or not: each can be admitted, suspended and restarted by itself."""
    made = planned(launcher="trainjob", kueue_queue="team", **layout)
    jobs = training_jobs(made)
    assert [job.name for job in jobs] == [worker.job for worker in made.workers]
    for worker, job in zip(made.workers, jobs, strict=True):
        runtime, body = job.all
        assert (runtime["kind"], body["kind"]) == ("TrainingRuntime", "TrainJob")
        assert runtime["metadata"]["name"] == body["metadata"]["name"] == body["spec"]["runtimeRef"]["name"]
        (container,) = job.template["spec"]["containers"]
        assert container["name"] == "node"
        assert container["args"][-2:] == ["--slot", str(worker.index)]
        assert job.template["metadata"]["labels"][names.WORKER_LABEL] == str(worker.index)
        assert {"name": "PYTHONUNBUFFERED", "value": "1"} in container["env"]
        (data,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == "/data")
        assert data.get("subPath", "") == ("" if made.a_claim_a_worker else worker.folder)
        queues = [text.count("kueue.x-k8s.io/queue-name") for text in map(json.dumps, (runtime, body))]
        assert queues == [0, 1], "a JobSet or a pod with the label would be queued by itself"


def test_a_site_s_workers_have_the_same_folders_by_either_kind() -> None:
    shared = {"storage_access_mode": "ReadWriteMany", "nodes": 3}
    folders = [[worker.folder for worker in planned(launcher=one, **shared).workers] for one in LAUNCHERS]
    assert folders[0] == folders[1]


def test_what_belongs_to_the_run_is_labelled_and_owned_and_named_once(made: Plan) -> None:
    objects = list(of_the_run(made))
    assert len({(obj["kind"], obj["metadata"]["name"]) for obj in objects}) == len(objects)
    for obj in objects:
        metadata = obj["metadata"]
        assert metadata["ownerReferences"] == [OWNER]
        assert metadata["namespace"] == "team"
        assert metadata["annotations"]["diloco-pipelines/run-id"] == "mine"
        assert metadata["labels"]["app.kubernetes.io/instance"] == made.name
        assert metadata["name"].startswith(made.name)


def test_claims_outlive_the_run(made: Plan) -> None:
    for worker in made.claimants:
        metadata = claim(made, worker)["metadata"]
        assert "ownerReferences" not in metadata
        assert names.RUN_LABEL not in metadata["labels"]
        assert "mine" not in metadata["name"]


def test_every_worker_finds_its_claim_and_every_claim_is_precached(made: Plan) -> None:
    claims = {worker.claim for worker in made.workers}
    assert {claim(made, worker)["metadata"]["name"] for worker in made.claimants} == claims
    mounted = [volume["persistentVolumeClaim"]["claimName"] for pod in pods(made) for volume in pod["spec"]["volumes"]
               if volume["name"] == "data"]  # fmt: skip
    assert set(mounted) == claims
    assert sum(map(replicas, training_jobs(made))) == len(made.workers) == made.config.nodes


def replicas(job: JobObjects) -> int:
    """How many pods a job has."""
    roles = job.body["spec"].get("pytorchReplicaSpecs")
    return roles["Worker"]["replicas"] if roles else 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_result_is_taken_from_the_directory_that_the_worker_wrote(launcher: str) -> None:
    made = planned(launcher=launcher, storage_access_mode="ReadWriteMany")
    worker = made.workers[1]
    (mount,) = [
        mount
        for mount in step_job(made, worker, "export")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if mount["mountPath"] == "/data"
    ]
    job = training_jobs(made)[-1]
    (written,) = (m for m in job.template["spec"]["containers"][0]["volumeMounts"] if m["mountPath"] == "/data")
    pod_name = f"{job.name}-worker-1"  # by the training operator's rule
    folder = written.get("subPath") or written["subPathExpr"].replace("$(POD_NAME)", pod_name)
    assert mount["subPath"] == worker.folder == folder


def test_pods_are_harmless(made: Plan) -> None:
    """The `restricted` Pod Security Standard; no token of the API server; no variables of Services."""
    for pod in pods(made):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["terminationGracePeriodSeconds"] == GRACE_PERIOD > 120
        assert pod["metadata"]["labels"][names.RUN_LABEL] == "mine"
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_network_policy_lets_workers_at_each_other_and_steps_at_results(made: Plan) -> None:
    policy = network_policy(made)["spec"]
    labels = [pod["metadata"]["labels"] for pod in pods(made)]
    selected = policy["podSelector"]["matchLabels"]
    assert all(selected.items() <= own.items() for own in labels)
    workers, steps = policy["ingress"]
    assert workers["from"] == [{"podSelector": policy["podSelector"]}]
    assert steps["from"][0]["podSelector"]["matchLabels"] == STEP_LABELS
    assert steps["ports"] == [{"protocol": "TCP", "port": RESULT_PORT}]
    for job in (step_job(made, made.workers[0], "export"),):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["ports"][0]["containerPort"] == RESULT_PORT
        assert container["args"][-1] == str(RESULT_PORT)


def test_without_an_owner_there_is_no_reference() -> None:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "mine"})
    made = plan(config, namespace="team", image="i")
    assert all("ownerReferences" not in obj["metadata"] for obj in of_the_run(made))


def test_only_workers_learn_where_the_step_logs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@mlflow:5000")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hidden")
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "mine"})
    made = plan(config, namespace="team", image="i", tracking=mlflow.handed_on())
    templates = [*(job.template for job in training_jobs(made)), step_job(made, made.workers[0], "precache")]
    found = [re.findall(r'"(MLFLOW_[A-Z_]+)", "value": "([^"]*)"', json.dumps(one)) for one in templates]
    expected = [("MLFLOW_RUN_ID", "abc"), ("MLFLOW_TRACKING_URI", "http://mlflow:5000")]
    assert found == [*[expected] * (len(templates) - 1), []]


def test_no_secret_is_rendered(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted where the process could see them, they are in nothing; the run's own token is in its Secret alone."""
    for variable in ("WANDB_API_KEY", "HF_TOKEN", "ETCD_PASSWORD", "RESULT_TOKEN"):
        monkeypatch.setitem(os.environ, variable, f"planted-{variable}")
    objects = [
        *of_the_run(made),
        *(claim(made, worker) for worker in made.claimants),
        run_secret(made, "planted-token"),
    ]
    for obj in objects:
        text = json.dumps({key: value for key, value in obj.items() if key != "stringData"})
        assert "planted" not in text
    variables = [entry for pod in pods(made) for entry in pod["spec"]["containers"][0]["env"]]
    for entry in variables:
        if any(word in entry["name"] for word in ("KEY", "TOKEN", "PASSWORD")):
            assert set(entry) == {"name", "valueFrom"} and set(entry["valueFrom"]) == {"secretKeyRef"}


def test_the_pods_can_read_their_configuration(made: Plan, tmp_path: Path) -> None:
    """The file, and on top of it what the pod has in its environment: nothing is refused, and sites differ."""
    file = tmp_path / "config.yaml"
    file.write_text(config_map(made)["data"]["config.yaml"], encoding="utf-8")
    devices = set()
    for pod in pods(made):
        (container,) = pod["spec"]["containers"]
        environment = {
            entry["name"]: entry.get("value", "10.0.0.7")  # what a field of the pod gives
            for entry in container["env"]
            if "secretKeyRef" not in entry.get("valueFrom", {})
        }
        config = load_config(file, environ=environment)
        assert config.run_id == "mine"
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "train":
            assert config.advertise_address == "10.0.0.7"
        devices.add((pod["metadata"]["labels"][names.SITE_LABEL], config.device))
    assert devices == {(site.name, site.device) for site in made.sites}


def test_plain_torchrun_would_meet_the_same_etcd() -> None:
    """What the operator makes of the elastic policy (PET_RDZV_CONF and so on) and what the configuration says agree."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    made = planned(elastic_etcd_protocol="https", etcd_user="me", elastic_etcd_prefix="/mine", nodes=4)
    policy = training_jobs(made)[0].body["spec"]["elasticPolicy"]
    settings = _parse_rendezvous_config(",".join(f"{pair['key']}={pair['value']}" for pair in policy["rdzvConf"]))
    endpoint = f"{policy['rdzvHost']}:{policy['rdzvPort']}"
    parameters = RendezvousParameters(
        policy["rdzvBackend"], endpoint, policy["rdzvId"], policy["minReplicas"], policy["maxReplicas"], **settings
    )
    theirs, ours = client_of(parameters), EtcdClient.of(made.config)
    assert parameters.backend == BACKEND
    assert (parameters.min_nodes, parameters.max_nodes) == (made.config.min_nodes, made.config.max_nodes) == (1, 4)
    assert parameters.get_as_int("nodes") == made.config.nodes
    assert theirs.prefix == ours.prefix == "/mine/mine/"
    assert theirs.endpoints == ours.endpoints[:1]
    assert theirs._security == ours._security
    assert float(settings["timeout"]) == made.config.elastic.rdzv_timeout
    assert float(settings["lease_ttl"]) == made.config.lease_ttl


def test_the_configuration_names_no_file_of_this_machine() -> None:
    made = planned(run_dir="/home/me/runs/mine")
    config = yaml.safe_load(config_map(made)["data"]["config.yaml"])
    assert config["run_dir"] == "/data"
    assert "/home/me" not in json.dumps(config)


REFUSED = {
    "no vendor": ({"gpu_nvidia_enabled": False}, "gpu.nvidia.enabled = False: leaves no GPUs to train on"),
    "vendors want more": (
        {"gpu_nvidia_min_nodes": 3},
        "nodes = 2: must be at least gpu.nvidia.min_nodes (3)",
    ),
    "vendors admit fewer": ({"gpu_nvidia_max_nodes": 1}, "nodes = 2: must be at most gpu.nvidia.max_nodes (1)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sites_that_do_not_add_up_are_refused(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        planned(**values)
    assert str(caught.value).startswith(message)


def test_a_run_without_a_name_is_refused() -> None:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob"})
    with pytest.raises(ConfigError, match="run_id"):
        plan(config, namespace="team", image="i")


def test_a_batch_that_an_islands_gpus_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size = 512: must be a multiple of elastic.nproc_per_node \(3\)"):
        planned(inner_parallel="ddp", gpu_count=3)
