"""manifests/chart/: what helm renders is what an API server takes, what the code reads, and what manifests/base has."""

import base64
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import PLURALS, serving
from tests.kube_tools import helm, kubectl
from tests.kubernetes_schemas import validate
from trainer import data
from trainer.config import TrainingConfig, load_config
from trainer.kubernetes.api.kinds import PYTORCH_JOB, TRAIN_JOB, Kind
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.chart import chart_files, value_path
from trainer.kubernetes.objects.jobs import STEP_LABELS
from trainer.kubernetes.objects.plan import plan
from trainer.version import DEFAULT_IMAGE, VERSION

MANIFESTS = Path(__file__).parents[3] / "manifests"
CHART = MANIFESTS / "chart"

Object = dict[str, Any]

# The reference's values (its documentation, and its values file), by their names there.
REFERENCE = """
deploymentName deploymentNamespace deploymentImage nodes cpuCores memoryGb ephemeralStorageGb gpuCount gpuVendor gpuType
gpuMemory storage.enabled storage.sizeGb storage.storageClassName storage.accessMode elastic.minNodes elastic.maxNodes
elastic.nprocPerNode elastic.maxRestarts elastic.rdzvTimeout elastic.gpuDistribution elastic.nccl.debug
elastic.nccl.asyncErrorHandling elastic.nccl.timeout elastic.nccl.ibTimeout elastic.nccl.nsocksPerThread
elastic.nccl.socketNthreads elastic.nccl.socketIfname elastic.etcd.externalEndpoint elastic.etcd.prefix
elastic.etcd.protocol elastic.etcd.runId etcd.enabled etcd.replicaCount gpu.nvidia.enabled gpu.nvidia.image
gpu.nvidia.minNodes gpu.nvidia.maxNodes gpu.nvidia.runtimeClassName gpu.amd.enabled gpu.amd.image gpu.amd.minNodes
gpu.amd.maxNodes gpu.amd.runtimeClassName diloco.model diloco.dataset diloco.localSteps diloco.lr diloco.outerLr
diloco.warmupSteps diloco.totalSteps diloco.perDeviceTrainBatchSize diloco.batchSize diloco.optimMethod
diloco.quantization diloco.asyncCommunication diloco.modelCacheDir diloco.datasetCacheDir diloco.checkpointPath
diloco.checkpointInterval diloco.device diloco.wandbProjectName diloco.wandbGroup diloco.wandbRunId diloco.heterogeneous
diloco.minBatchSize diloco.maxBatchSize diloco.groupPercVariance diloco.compressionDecay diloco.compressionTopk
diloco.experimentDescription diloco.experimentTags diloco.seed diloco.wandbLogging diloco.compileModel
diloco.compileBackend diloco.compileMode diloco.wandbUserKey diloco.huggingfaceToken diloco.hfUpload
diloco.trainedModelHfName diloco.pgroupBackend
"""


@cache
def rendered(release: str, *values: str) -> tuple[Object, ...]:
    """The objects of a release in namespace `team`; each value as `--set` takes it."""
    sets = [word for value in values for word in ("--set", value)]
    made = helm("template", release, CHART, "--namespace", "team", *sets)
    assert made.returncode == 0, made.stderr
    return tuple(obj for obj in yaml.safe_load_all(made.stdout) if obj)


def one(objects: tuple[Object, ...], kind: str, name: str = "") -> Object:
    (found,) = [obj for obj in objects if obj["kind"] == kind and obj["metadata"]["name"].startswith(name)]
    return found


def config_text(objects: tuple[Object, ...]) -> str:
    job = one(objects, "Job")
    return str(one(objects, "ConfigMap", job["metadata"]["name"])["data"]["config.yaml"])


def config_of(objects: tuple[Object, ...], place: Path) -> TrainingConfig:
    """The configuration as the pipeline reads it."""
    file = place / "config.yaml"
    file.write_text(config_text(objects), encoding="utf-8")
    return load_config(file, {}, {})


def leaves(tree: Object, above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        known = any(".".join(one.path) == f"{above}{key}" for one in TrainingConfig.parameters())
        if isinstance(value, dict) and not known:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def test_the_rendered_files_are_current(tmp_path: Path) -> None:
    for path, text in chart_files(MANIFESTS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `make manifests`"
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == VERSION == DEFAULT_IMAGE.rpartition(":")[2]


def test_the_chart_passes_helms_lint() -> None:
    made = helm("lint", CHART, "--strict")
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_value_of_the_reference_has_its_name_here() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for name in REFERENCE.split():
        group, here = schema, values
        for key in name.split("."):
            assert group["additionalProperties"] is False
            group, here = group["properties"][key], here[key]
        assert group["description"] and group["default"] == here, name


VARIED = (
    (),
    ("diloco.huggingfaceToken=hf_planted", "diloco.wandbApiKey=wandb-planted", "etcd.replicaCount=1"),
    ("etcd.endpoints={etcd-0.elsewhere:2379}", "imagePullSecrets={pull}", "deploymentNamespace=training"),
    ("storage.storageClassName=fast", "pipeline.nodeSelector.pool=cpu", "pipeline.tolerations[0].key=cpu"),
)


@pytest.mark.parametrize("values", VARIED, ids=["defaults", "tokens", "another etcd", "places"])
def test_an_api_server_takes_every_object(values: tuple[str, ...]) -> None:
    objects = rendered("my-training", *values)
    plurals = {kind: (plural, group) for plural, (group, _, kind) in PLURALS.items()}
    with serving() as server:
        server.namespaces |= {"team", "training"}
        for obj in objects:
            plural, group = plurals[obj["kind"]]
            version, namespace = obj["apiVersion"], obj["metadata"]["namespace"]
            server.granted.add(("create", group, plural, ""))
            path = f"/{'apis' if group else 'api'}/{version}/namespaces/{namespace}/{plural}"
            server.answer("POST", path, {}, obj)
            assert obj["metadata"]["labels"]["app.kubernetes.io/part-of"] == names.PREFIX
    namespaces = {obj["metadata"]["namespace"] for obj in objects}
    assert namespaces == {"training" if "deploymentNamespace=training" in values else "team"}
    etcd = {"StatefulSet", "Service", "NetworkPolicy"}
    found = {obj["kind"] for obj in objects}
    assert found & etcd == (set() if any("endpoints" in value for value in values) else etcd)
    assert "PodDisruptionBudget" not in found or not values or "storage" in values[0]


MISTAKES = {
    "diloco.localStep=3": "at '/diloco': additional properties 'localStep' not allowed",
    "elastic.minnodes=3": "at '/elastic': additional properties 'minnodes' not allowed",
    "node=3": "at '': additional properties 'node' not allowed",
    "diloco.localSteps=many": "at '/diloco/localSteps': got string, want integer",
    "diloco.optimMethod=adam": "at '/diloco/optimMethod': value must be one of 'sgd', 'demo', 'ddp'",
    "elastic.minNodes=0": "at '/elastic/minNodes': exclusiveMinimum: got 0, want 0",
    "diloco.launcher=local": "at '/diloco/launcher': value must be one of 'auto', 'pytorchjob', 'trainjob'",
    "sites[0].nodeselector.a=b": "at '/sites/0': additional properties 'nodeselector' not allowed",
    "diloco.runDir=/mine": "at '/diloco': additional properties 'runDir' not allowed",
    "etcd.enabled=false": "etcd.endpoints must name an etcd when etcd.enabled is false",
    "elastic.etcd.protocol=https": "elastic.etcd.protocol=https needs your own etcd",
}


@pytest.mark.parametrize("value", MISTAKES)
def test_a_mistake_is_refused_in_helms_words(value: str) -> None:
    made = helm("template", "my-training", CHART, "--set", value)
    assert made.returncode != 0
    assert MISTAKES[value] in made.stderr


def test_the_defaults_are_the_parameters_own(tmp_path: Path) -> None:
    config = config_of(rendered("my-training"), tmp_path)
    members = [f"my-training-etcd-{member}.my-training-etcd.team.svc:2379" for member in range(3)]
    decided = {
        "run_id": "my-training", "launcher": "pytorchjob", "deployment_namespace": "team",
        "deployment_image": DEFAULT_IMAGE, "etcd_endpoints": members, "max_samples": 1_000_000,
    }  # fmt: skip
    assert config.to_flat() == TrainingConfig.from_flat(decided).to_flat()
    data.resolve(config).check_parameters()  # the pipeline takes it


@pytest.mark.parametrize(
    ("values", "samples"), [(("diloco.maxSamples=7",), 7), (("diloco.dataset=stdlib",), -1), ((), 1_000_000)]
)
def test_of_c4_a_part_is_read(values: tuple[str, ...], samples: int) -> None:
    assert json.loads(config_text(rendered("my-training", *values)))["max_samples"] == samples


def test_every_value_reaches_its_parameter(tmp_path: Path) -> None:
    sites = [
        {"name": "a", "nodeSelector": {"zone": "west_1"}, "tolerations": [{"key": "k", "tolerationSeconds": 3}]},
        {"name": "b", "replicas": 2, "gpuResource": "amd.com/gpu"},
    ]
    given = TrainingConfig.from_flat({
        "run_id": "mine", "launcher": "pytorchjob", "deployment_namespace": "team", "deployment_image": "r/i:1",
        "etcd_endpoints": ["e:1"], "sites": sites, "nodes": 3, "elastic_min_nodes": 2, "elastic_nproc_per_node": 2,
        "elastic_nccl_nsocks_per_thread": 2, "elastic_nccl_socket_nthreads": 3, "compression_topk": 30, "lr": 1e-7,
        "total_steps": 2_000_000_000, "seed": 2**53, "active_deadline": 12_096_000, "outer_momentum": 0.25,
        "experiment_tags": ["a", "b: c", "1"], "experiment_description": "é: '#'\n\"<x>\"", "max_samples": 10**9,
        "trained_model_hf_name": "me/it", "hf_upload": True, "metrics_port": 9000, "gpu_nvidia_max_nodes": 1,
        "wandb_run_id": "no", "storage_size_gb": 1_000_000, "quantization": True, "elastic_rdzv_timeout": 1e6,
    })  # fmt: skip
    values: Object = {}
    for parameter in TrainingConfig.parameters():
        if path := value_path(parameter):
            group = values
            for key in path[:-1]:
                group = group.setdefault(key, {})
            group[path[-1]] = given.to_flat()[parameter.name]
    values["sites"] = sites  # as the Kubernetes API writes them
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    made = helm("template", "my-training", CHART, "--namespace", "team", "--values", file)
    assert made.returncode == 0, made.stderr
    objects = tuple(obj for obj in yaml.safe_load_all(made.stdout) if obj)
    assert config_of(objects, tmp_path).to_flat() == given.to_flat()
    parameters = {".".join(parameter.path) for parameter in TrainingConfig.parameters()} - {"run_dir"}
    assert set(leaves(json.loads(config_text(objects)))) == parameters


@pytest.mark.parametrize(
    ("served", "value", "kind"),
    [
        (TRAIN_JOB, "auto", "trainjob"),
        (PYTORCH_JOB, "auto", "pytorchjob"),
        (TRAIN_JOB, "pytorchjob", "pytorchjob"),
    ],
)
def test_workers_are_of_the_kind_that_the_cluster_serves(served: Kind, value: str, kind: str) -> None:
    flags = ["--api-versions", f"{served.group}/{served.version}", "--set", f"diloco.launcher={value}"]
    made = helm("template", "my-training", CHART, *flags)
    assert f'"launcher": "{kind}"' in made.stdout


@pytest.mark.parametrize(("release", "run"), [("my-training", "my-training"), ("2.b", "2.b")])
def test_names_follow_from_the_release(release: str, run: str, tmp_path: Path) -> None:
    objects = rendered(release)
    for obj in objects:
        validate(obj)
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", obj["metadata"]["name"])  # as a Service needs it
    assert config_of(objects, tmp_path).run_id == run


def test_other_values_make_another_job_and_the_same_ones_the_same(tmp_path: Path) -> None:
    def job(*values: str) -> str:
        return str(one(rendered("my-training", *values), "Job")["metadata"]["name"])

    assert job() == job("diloco.localSteps=128")
    assert (
        len({job(), job("diloco.localSteps=64"), job("deploymentImage=other"), job("pipeline.nodeSelector.a=b")}) == 4
    )


def test_tokens_are_in_the_secret_alone() -> None:
    planted = ("hf_planted", "wandb-planted")
    objects = rendered("my-training", f"diloco.huggingfaceToken={planted[0]}", f"diloco.wandbUserKey={planted[1]}")
    for obj in objects:
        text = json.dumps(obj)
        plain = any(secret in text for secret in planted)
        coded = any(base64.b64encode(secret.encode()).decode() in text for secret in planted)
        assert (plain or coded) == (obj["kind"] == "Secret")
    secret = one(objects, "Secret")
    assert secret["stringData"] == {"HF_TOKEN": planted[0], "WANDB_API_KEY": planted[1]}
    config = json.loads(config_text(objects))
    assert config["huggingface_secret"] == config["wandb_secret"] == secret["metadata"]["name"]


def test_an_existing_secret_is_used_by_its_name(tmp_path: Path) -> None:
    objects = rendered("my-training", "diloco.huggingfaceSecret=ours", "diloco.wandbApiKey=wandb-planted")
    config = config_of(objects, tmp_path)
    assert (config.huggingface_secret, config.wandb_secret) == ("ours", "my-training-tokens")
    assert set(one(objects, "Secret")["stringData"]) == {"WANDB_API_KEY"}
    assert not [obj for obj in rendered("my-training") if obj["kind"] == "Secret"]


def kustomized(folder: str) -> tuple[Object, ...]:
    made = kubectl("kustomize", MANIFESTS / folder)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


def plain(obj: Object) -> Object:
    """An object without its namespace and the endings of ConfigMaps' names, which follow from their content."""
    text = re.sub(r"(diloco-etcd-(?:settings|members))-\w+", r"\1", json.dumps(obj))
    found: Object = json.loads(text)
    found["metadata"].pop("namespace", None)
    return found


@pytest.mark.parametrize("kind", ["StatefulSet", "Service", "ConfigMap"])
def test_etcd_is_that_of_the_overlay_dev(kind: str) -> None:
    theirs, ours = (
        {obj["metadata"]["name"]: obj for obj in map(plain, objects) if obj["kind"] == kind}
        for objects in (kustomized("overlays/dev"), rendered("diloco", "etcd.replicaCount=1"))
    )
    assert theirs
    assert {name: ours.get(name) for name in theirs} == theirs


def test_the_rights_are_those_of_the_base() -> None:
    theirs, ours = kustomized("base"), rendered("diloco-pipelines")
    for kind in ("ServiceAccount", "Role"):
        assert plain(one(ours, kind)) == plain(one(theirs, kind))
    binding = one(ours, "RoleBinding")
    assert binding["roleRef"] == one(theirs, "RoleBinding")["roleRef"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "diloco-pipelines"}]


def test_etcd_admits_what_the_release_runs(tmp_path: Path) -> None:
    objects = rendered("my-training")
    members = one(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    policy = one(objects, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= members.items()
    admitted = [peer["podSelector"]["matchLabels"] for peer in policy["ingress"][1]["from"]]
    steps = one(objects, "Job")["spec"]["template"]["metadata"]["labels"]
    workers = plan(config_of(objects, tmp_path), namespace="team", image="i").labels("train")
    for labels in (steps, workers):
        assert any(wanted.items() <= labels.items() for wanted in admitted)
    assert STEP_LABELS.items() <= steps.items(), "the run's own NetworkPolicy lets steps fetch results"


def notes(*values: str) -> str:
    sets = [word for value in values for word in ("--set", value)]
    made = helm("install", "my-training", CHART, "--dry-run=client", "--namespace", "team", *sets)
    assert made.returncode == 0, made.stderr
    return made.stdout.partition("NOTES:")[2]


def test_the_notes_commands_name_what_is_there(tmp_path: Path) -> None:
    objects = rendered("my-training", "imagePullSecrets={pull}")
    commands = [shlex.split(line) for line in notes("imagePullSecrets={pull}").splitlines() if line.startswith("  ")]
    assert {command[0] for command in commands} == {"kubectl"}
    job, claim = one(objects, "Job")["metadata"]["name"], one(objects, "PersistentVolumeClaim")["metadata"]
    assert f"job/{job}" in commands[0]
    made = plan(config_of(objects, tmp_path), namespace="team", image="i")
    label, _, value = commands[1][-1].partition("=")
    assert made.labels("train")[label] == value
    (fetching,) = [command for command in commands if command[1] == "run"]
    overrides = json.loads(fetching[-1].removeprefix("--overrides="))
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": fetching[2]}, **overrides})
    assert overrides["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["name"]
    assert overrides["spec"]["imagePullSecrets"] == [{"name": "pull"}]
    assert claim["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "planted" not in notes("diloco.huggingfaceToken=hf_planted")


def test_a_packaged_chart_holds_everything(tmp_path: Path) -> None:
    made = helm("package", CHART, "--destination", tmp_path)
    assert made.returncode == 0, made.stderr
    (package,) = tmp_path.glob("*.tgz")
    shutil.unpack_archive(package, tmp_path)
    packed = {path.relative_to(tmp_path / "diloco-training") for path in (tmp_path / "diloco-training").rglob("*")}
    assert {path.relative_to(CHART) for path in CHART.rglob("*")} <= packed
