"""Every parameter reaches the field of the claim, the job, the pod or the environment that it is meant for."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import TrainingConfig, load_config
from trainer.kubernetes import pod_main
from trainer.kubernetes.objects.jobs import claim, config_map, network_policy, step_job
from trainer.kubernetes.objects.plan import Plan, plan
from trainer.kubernetes.objects.pod_template import RESULTS
from trainer.kubernetes.objects.render import ETCD_SETTINGS
from trainer.kubernetes.objects.training_jobs import training_jobs

CLUSTER = {"launcher": "pytorchjob", "run_id": "mine"}


class Rendered:
    """What a configuration becomes, and short ways to its fields."""

    def __init__(self, **values: Any) -> None:
        config = TrainingConfig.from_flat({**CLUSTER, **values})
        self.plan: Plan = plan(config, namespace=config.deployment_namespace, image="the-projects")
        found = training_jobs(self.plan)
        self.jobs, self.templates = [job.body for job in found], [job.template for job in found]
        self.job, self.before = self.jobs[0], found[0].before or {}
        self.claim = claim(self.plan, self.plan.workers[0])
        self.pod = self.templates[0]["spec"]
        self.container = self.pod["containers"][0]

    @property
    def env(self) -> dict[str, Any]:
        """A variable's value, or where it comes from."""
        return environment(self.container)

    @property
    def mounts(self) -> dict[str, Any]:
        return {mount["mountPath"]: mount for mount in self.container["volumeMounts"]}

    @property
    def replica(self) -> dict[str, Any]:
        return self.job["spec"]["pytorchReplicaSpecs"]["Worker"]

    @property
    def elastic(self) -> dict[str, Any]:
        return self.job["spec"]["elasticPolicy"]

    @property
    def rendezvous(self) -> dict[str, str]:
        return {pair["key"]: pair["value"] for pair in self.elastic["rdzvConf"]}

    def precache_env(self) -> dict[str, Any]:
        return environment(pod_of(step_job(self.plan, self.plan.workers[0], "precache"))["containers"][0])


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def shared_memory(rendered: Rendered) -> str:
    volumes = {volume["name"]: volume for volume in rendered.pod["volumes"]}
    return str(volumes["shared-memory"]["emptyDir"]["sizeLimit"])


def limits(rendered: Rendered) -> dict[str, str]:
    return rendered.container["resources"]["limits"]


def requests(rendered: Rendered) -> dict[str, str]:
    return rendered.container["resources"]["requests"]


def resources(job: dict[str, Any]) -> dict[str, dict[str, str]]:
    return pod_of(job)["containers"][0]["resources"]


def preferred(rendered: Rendered) -> dict[str, Any]:
    return {rule["key"]: rule["values"][0] for rule in _preferences(rendered)}


def products(rendered: Rendered, label: str) -> Any:
    """The values of a label that nodes are preferred with."""
    return next(rule["values"] for rule in _preferences(rendered) if rule["key"] == label)


def _preferences(rendered: Rendered) -> list[dict[str, Any]]:
    terms = rendered.pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    return [rule for term in terms for rule in term["preference"]["matchExpressions"]]


def apart_from(pod: dict[str, Any]) -> Any:
    """The pods beside which this one had better not be."""
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    return term["podAffinityTerm"]["labelSelector"]["matchLabels"]


def sites(rendered: Rendered) -> dict[str, int]:
    return {site.name: site.replicas for site in rendered.plan.sites}


def test_workers_are_on_nodes_of_their_own_where_there_are_enough() -> None:
    rendered = Rendered(nodes=3, device="cpu")
    assert apart_from(rendered.pod).items() <= rendered.templates[0]["metadata"]["labels"].items()
    precache = step_job(rendered.plan, rendered.plan.workers[1], "precache")
    assert apart_from(pod_of(precache)).items() <= precache["spec"]["template"]["metadata"]["labels"].items()
    result = pod_of(step_job(rendered.plan, rendered.plan.workers[0], "export"))
    assert "affinity" not in result, "it goes where the claim is"
    assert "affinity" not in Rendered(nodes=1, device="cpu").pod


BOTH = {"gpu_amd_image": "rocm", "nodes": 5}
DDP = {"optim_method": "ddp"}
ISLAND = {"inner_parallel": "fsdp", "gpu_count": 4}
PARAMETERS: list[tuple[dict[str, Any], Callable[[Rendered], Any], Any]] = [
    ({"deployment_name": "gpt"}, lambda r: r.job["metadata"]["name"], "gpt-mine-nvidia-w0"),
    ({"deployment_name": "gpt"}, lambda r: r.claim["metadata"]["name"], "gpt-nvidia-worker-0-data"),
    ({"deployment_namespace": "team"}, lambda r: r.job["metadata"]["namespace"], "team"),
    ({"deployment_namespace": "team"}, lambda r: r.claim["metadata"]["namespace"], "team"),
    ({}, lambda r: r.container["image"], "the-projects"),
    ({"deployment_image": "mine:1"}, lambda r: r.container["image"], "mine:1"),
    ({"nodes": 3}, lambda r: len(r.jobs), 3),
    ({"nodes": 3, "storage_access_mode": "ReadWriteMany"}, lambda r: r.replica["replicas"], 3),
    ({"cpu_cores": 7}, lambda r: limits(r)["cpu"], "7"),
    ({"cpu_cores": 7}, lambda r: (requests(r)["cpu"], "OMP_NUM_THREADS" in r.env), ("1", False)),
    ({"memory_gb": 48}, lambda r: (limits(r)["memory"], requests(r)["memory"]), ("48Gi", "48Gi")),
    ({"memory_gb": 48}, lambda r: r.pod["volumes"][2]["emptyDir"], {"medium": "Memory", "sizeLimit": "12Gi"}),
    ({"ephemeral_storage_gb": 9}, lambda r: limits(r)["ephemeral-storage"], "9Gi"),
    ({"ephemeral_storage_gb": 9}, lambda r: requests(r)["ephemeral-storage"], "2Gi"),
    ({"ephemeral_storage_gb": 1}, lambda r: requests(r)["ephemeral-storage"], "1Gi"),
    ({"gpu_count": 4}, lambda r: (limits(r)["nvidia.com/gpu"], requests(r)["nvidia.com/gpu"]), ("4", "4")),
    ({"gpu_count": 0}, lambda r: [key for key in limits(r) if "gpu" in key], []),
    ({"gpu_count": 0}, lambda r: r.env["DILOCO_DEVICE"], "cpu"),
    (
        {**DDP, "device": "cpu"},
        lambda r: ("NCCL_DEBUG" in r.env, r.pod["tolerations"], sites(r)),
        (False, [], {"cpu": 2}),
    ),
    ({"gpu_vendor": "AMD"}, lambda r: limits(r)["amd.com/gpu"], "1"),
    ({"gpu_type": "NVIDIA-H100-80GB-HBM3"}, lambda r: preferred(r)["nvidia.com/gpu.product"], "NVIDIA-H100-80GB-HBM3"),
    ({"gpu_type": "MI300X", "gpu_vendor": "AMD"}, lambda r: preferred(r)["amd.com/gpu.product-name"], "MI300X"),
    ({}, lambda r: "NVIDIA-A100-SXM4-80GB" in products(r, "nvidia.com/gpu.product"), True),
    (
        {"gpu_type": "MI300X", "gpu_vendor": "AMD"},
        lambda r: "AMD_Instinct_MI300X_OAM" in products(r, "amd.com/gpu.product-name"),
        True,
    ),
    ({"gpu_memory": 40}, lambda r: 35_000 < int(preferred(r)["nvidia.com/gpu.memory"]) < 40_000, True),
    ({"gpu_memory": 192, "gpu_vendor": "AMD"}, lambda r: preferred(r)["amd.com/gpu.vram"], "192G"),
    ({"storage_size_gb": 7}, lambda r: r.claim["spec"]["resources"]["requests"]["storage"], "7Gi"),
    ({"storage_storage_class_name": ""}, lambda r: "storageClassName" in r.claim["spec"], False),
    ({"storage_storage_class_name": "fast"}, lambda r: r.claim["spec"]["storageClassName"], "fast"),
    ({"storage_access_mode": "ReadWriteMany"}, lambda r: r.claim["spec"]["accessModes"], ["ReadWriteMany"]),
    ({"storage_access_mode": "ReadWriteMany"}, lambda r: r.mounts["/data"]["subPathExpr"], "$(POD_NAME)"),
    ({"nodes": 4, "elastic_min_nodes": 3}, lambda r: r.elastic["minReplicas"], 3),
    ({"elastic_max_nodes": 9}, lambda r: r.elastic["maxReplicas"], 9),
    ({"elastic_nproc_per_node": 4}, lambda r: r.job["spec"]["nprocPerNode"], "4"),
    (ISLAND, lambda r: r.job["spec"]["nprocPerNode"], "4"),
    (ISLAND, lambda r: (r.env["DILOCO_ELASTIC_NPROC_PER_NODE"], "NCCL_DEBUG" in r.env), ("4", True)),
    ({"gpu_count": 4}, lambda r: r.job["spec"]["nprocPerNode"], "1"),
    ({**ISLAND, "memory_gb": 64}, shared_memory, "32Gi"),
    ({"memory_gb": 64}, shared_memory, "16Gi"),
    (
        {**ISLAND, "metrics_port": 9000},
        lambda r: network_policy(r.plan)["spec"]["ingress"][2]["ports"],
        [{"protocol": "TCP", "port": 9000, "endPort": 9000}],
    ),
    ({"elastic_max_restarts": 8}, lambda r: r.elastic["maxRestarts"], 8),
    ({"elastic_rdzv_timeout": 900}, lambda r: r.rendezvous["timeout"], "900.0"),
    ({"lease_ttl": 20}, lambda r: r.rendezvous["lease_ttl"], "20.0"),
    ({**BOTH}, sites, {"nvidia": 3, "amd": 2}),
    ({**BOTH, "elastic_gpu_distribution": "prefer-amd"}, sites, {"amd": 5}),
    ({**BOTH, "elastic_gpu_distribution": "prefer-nvidia"}, sites, {"nvidia": 5}),
    ({**BOTH, "elastic_gpu_distribution": "prefer-nvidia", "gpu_nvidia_max_nodes": 2}, sites, {"nvidia": 2, "amd": 3}),
    ({**BOTH, "gpu_amd_min_nodes": 4}, sites, {"nvidia": 1, "amd": 4}),
    ({**BOTH, "gpu_nvidia_max_nodes": 1}, sites, {"nvidia": 1, "amd": 4}),
    ({**BOTH, "gpu_nvidia_min_nodes": 4}, sites, {"nvidia": 4, "amd": 1}),
    ({**BOTH, "gpu_amd_max_nodes": 0}, sites, {"nvidia": 5}),
    ({**BOTH, "gpu_amd_enabled": False}, sites, {"nvidia": 5}),
    ({**BOTH, "gpu_nvidia_enabled": False}, sites, {"amd": 5}),
    ({**BOTH}, lambda r: [site.image for site in r.plan.sites], ["the-projects", "rocm"]),
    ({"gpu_nvidia_image": "cuda"}, lambda r: r.container["image"], "cuda"),
    ({}, lambda r: r.pod["runtimeClassName"], "nvidia"),
    ({"gpu_nvidia_runtime_class_name": ""}, lambda r: "runtimeClassName" in r.pod, False),
    ({"gpu_vendor": "AMD", "gpu_amd_runtime_class_name": "rocm"}, lambda r: r.pod["runtimeClassName"], "rocm"),
    ({**DDP, "elastic_nccl_debug": "WARN"}, lambda r: r.env["NCCL_DEBUG"], "WARN"),
    ({**DDP, "elastic_nccl_async_error_handling": 3}, lambda r: r.env["TORCH_NCCL_ASYNC_ERROR_HANDLING"], "3"),
    ({**DDP, "elastic_nccl_timeout": 60}, lambda r: r.env["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"], "60"),
    ({**DDP, "elastic_nccl_ib_timeout": 14}, lambda r: r.env["NCCL_IB_TIMEOUT"], "14"),
    ({**DDP, "elastic_nccl_nsocks_per_thread": 2}, lambda r: r.env["NCCL_NSOCKS_PERTHREAD"], "2"),
    ({**DDP, "elastic_nccl_socket_nthreads": 2}, lambda r: r.env["NCCL_SOCKET_NTHREADS"], "2"),
    ({**DDP, "elastic_nccl_socket_ifname": "eth1"}, lambda r: r.env["NCCL_SOCKET_IFNAME"], "eth1"),
    ({**DDP}, lambda r: "NCCL_SOCKET_IFNAME" in r.env, False),
    ({}, lambda r: [name for name in r.env if "NCCL" in name], []),  # gloo alone connects workers
    ({"elastic_etcd_external_endpoint": "e:99"}, lambda r: (r.elastic["rdzvHost"], r.elastic["rdzvPort"]), ("e", 99)),
    ({"etcd_endpoints": ["a:1", "b:2"]}, lambda r: r.plan.config.etcd.endpoints, ["a:1", "b:2"]),
    (
        {"etcd_replica_count": 2, "deployment_namespace": "team"},
        lambda r: r.plan.config.etcd.endpoints,
        ["diloco-etcd-0.diloco-etcd.team.svc:2379", "diloco-etcd-1.diloco-etcd.team.svc:2379"],
    ),
    ({"elastic_etcd_prefix": "/mine"}, lambda r: r.rendezvous["prefix"], "/mine"),
    ({"elastic_etcd_protocol": "https"}, lambda r: r.rendezvous["ca"], "/etc/diloco-etcd/ca.crt"),
    ({"elastic_etcd_protocol": "https"}, lambda r: r.mounts["/etc/diloco-etcd"]["readOnly"], True),
    (
        {"elastic_etcd_protocol": "https", "etcd_ca": "/etc/diloco-etcd/ca.crt"},  # and no client certificate
        lambda r: r.pod["volumes"][-1]["secret"]["items"],
        [{"key": "ca.crt", "path": "ca.crt"}],
    ),
    ({"etcd_user": "me"}, lambda r: r.rendezvous["user"], "me"),
    (
        {"etcd_user": "me"},
        lambda r: r.env["ETCD_PASSWORD"],
        {"secretKeyRef": {"name": "diloco-etcd-client", "key": "password"}},
    ),
    ({"run_id": None, "elastic_etcd_run_id": "Other"}, lambda r: r.elastic["rdzvId"], "Other"),
    ({}, lambda r: r.elastic["rdzvBackend"], "etcd3-diloco"),
    ({}, lambda r: r.replica["restartPolicy"], "ExitCode"),
    ({"model_cache_dir": "/models"}, lambda r: r.mounts["/models"]["subPath"], "models"),
    ({"dataset_cache_dir": "/sets"}, lambda r: r.mounts["/sets"]["subPath"], "datasets"),
    ({"checkpoint_path": "/saved/x.pth"}, lambda r: r.mounts["/saved"]["subPath"], "checkpoints"),
    (
        {"checkpoint_path": "/saved", "storage_access_mode": "ReadWriteMany"},
        lambda r: r.mounts["/saved"]["subPathExpr"],
        "$(POD_NAME)/checkpoints",
    ),
    ({}, lambda r: sorted(path for path in r.mounts if path.startswith("/data")), ["/data"]),
    (
        {"storage_access_mode": "ReadWriteMany"},
        lambda r: {path: mount.get("subPath") for path, mount in r.mounts.items() if path.startswith("/data/")},
        {"/data/models": "models", "/data/datasets": "datasets"},
    ),
    ({"wandb_logging": False}, lambda r: "WANDB_API_KEY" in r.env, False),
    ({}, lambda r: r.env["WANDB_API_KEY"]["secretKeyRef"]["optional"], True),
    ({}, lambda r: ("HF_TOKEN" in r.env, r.precache_env()["HF_TOKEN"]["secretKeyRef"]["optional"]), (False, True)),
    (
        {"hf_upload": True, "trained_model_hf_name": "me/it"},
        lambda r: r.precache_env()["HF_TOKEN"]["secretKeyRef"],
        {"name": "diloco-huggingface", "key": "HF_TOKEN"},
    ),
    ({"wandb_secret": "team.keys"}, lambda r: r.env["WANDB_API_KEY"]["secretKeyRef"]["name"], "team.keys"),
    ({"huggingface_secret": "t"}, lambda r: r.precache_env()["HF_TOKEN"]["secretKeyRef"]["name"], "t"),
    ({}, lambda r: r.env["DILOCO_ADVERTISE_ADDRESS"], {"fieldRef": {"fieldPath": "status.podIP"}}),
    ({"advertise_address": "10.0.0.1"}, lambda r: "DILOCO_ADVERTISE_ADDRESS" in r.env, False),
    ({"network_interface": "wg0"}, lambda r: "DILOCO_ADVERTISE_ADDRESS" in r.env, False),
    (
        {"port_range": "7000-7999"},
        lambda r: r.pod["securityContext"]["sysctls"],
        [{"name": "net.ipv4.ip_local_port_range", "value": "7000 7999"}],
    ),
    (
        {"port_range": "7000-7999"},
        lambda r: network_policy(r.plan)["spec"]["ingress"][0]["ports"],
        [{"protocol": "TCP", "port": 7000, "endPort": 7999}],
    ),
    ({}, lambda r: "ports" in network_policy(r.plan)["spec"]["ingress"][0], False),
    (
        {"metrics_port": 9000},
        lambda r: [
            r.replica["template"]["metadata"]["annotations"][f"prometheus.io/{key}"] for key in ("scrape", "port")
        ],
        ["true", "9000"],
    ),
    (
        {"metrics_port": 9000, "elastic_nproc_per_node": 4},
        lambda r: network_policy(r.plan)["spec"]["ingress"][2]["ports"],
        [{"protocol": "TCP", "port": 9000, "endPort": 9003}],
    ),
    ({"service_account": "worker"}, lambda r: r.pod["serviceAccountName"], "worker"),
    ({"priority_class": "low"}, lambda r: r.pod["priorityClassName"], "low"),
    ({"kueue_queue": "team"}, lambda r: r.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team"),
    (
        {"kueue_queue": "team", "kueue_priority_class": "low"},
        lambda r: r.job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"],
        "low",
    ),
    ({"kueue_queue": "team"}, lambda r: r.pod.get("priorityClassName"), None),
    (
        {"kueue_queue": "team", "managed_by": "kueue.x-k8s.io/multikueue"},
        lambda r: r.job["spec"]["runPolicy"]["managedBy"],
        "kueue.x-k8s.io/multikueue",
    ),
    (
        {"kueue_queue": "team", "managed_by": "kueue.x-k8s.io/multikueue", "launcher": "trainjob"},
        lambda r: r.job["spec"]["managedBy"],
        "kueue.x-k8s.io/multikueue",
    ),
    ({"launcher": "trainjob"}, lambda r: r.job["spec"]["runtimeRef"]["name"], "diloco-training-job-mine-nvidia-w0"),
    ({"launcher": "trainjob", "active_deadline": 60}, lambda r: r.job["spec"]["activeDeadlineSeconds"], 60),
    (
        {"launcher": "trainjob", "finished_ttl": 60},
        lambda r: r.before["spec"]["template"]["spec"]["ttlSecondsAfterFinished"],
        60,
    ),
    ({"image_pull_secrets": ["pull"]}, lambda r: r.pod["imagePullSecrets"], [{"name": "pull"}]),
    ({"active_deadline": 99}, lambda r: r.job["spec"]["runPolicy"]["activeDeadlineSeconds"], 99),
    ({"finished_ttl": 98}, lambda r: r.job["spec"]["runPolicy"]["ttlSecondsAfterFinished"], 98),
    ({}, lambda r: r.job["spec"]["runPolicy"]["schedulingPolicy"], {"minAvailable": 1}),
    (
        {"storage_access_mode": "ReadWriteMany", "nodes": 4, "elastic_min_nodes": 3},
        lambda r: r.job["spec"]["runPolicy"]["schedulingPolicy"],
        {"minAvailable": 3},
    ),
]

SITES = [
    {
        "name": "east",
        "replicas": 2,
        "nodeSelector": {"zone": "east"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "image": "of-east",
        "gpu_resource": "amd.com/gpu",
        "gpu_count": 8,
        "runtimeClassName": "kata",
        "storage_class_name": "local",
    },
    {"name": "west", "gpuCount": 0},
]


@pytest.mark.parametrize(("values", "field", "expected"), PARAMETERS, ids=[str(row[0]) for row in PARAMETERS])
def test_parameter_reaches_its_field(values: dict[str, Any], field: Callable[[Rendered], Any], expected: Any) -> None:
    assert field(Rendered(**values)) == expected


def test_sites() -> None:
    rendered = Rendered(sites=SITES, nodes=3, gpu_type="MI300X")
    assert [worker.job for worker in rendered.plan.workers] == ["diloco-training-job-mine-" + end for end in
                                                                ("east-w0", "east-w1", "west-w0")]  # fmt: skip
    pod = rendered.pod
    assert pod["nodeSelector"] == {"zone": "east"}
    assert pod["tolerations"][0] == {"key": "spot", "operator": "Exists"}
    assert pod["tolerations"][1]["key"] == "amd.com/gpu"
    assert (pod["runtimeClassName"], rendered.container["image"]) == ("kata", "of-east")
    assert limits(rendered)["amd.com/gpu"] == "8"
    assert rendered.claim["spec"]["storageClassName"] == "local"
    west = rendered.templates[2]["spec"]
    assert environment(west["containers"][0])["DILOCO_DEVICE"] == "cpu"
    assert "nodeSelector" not in west and "runtimeClassName" not in west
    assert "nvidia.com/gpu" not in west["containers"][0]["resources"]["limits"]
    for step in (
        step_job(rendered.plan, rendered.plan.workers[0], "precache"),
        step_job(rendered.plan, rendered.plan.workers[0], "export"),
    ):
        assert pod_of(step)["nodeSelector"] == {"zone": "east"}
        assert pod_of(step)["tolerations"] == pod["tolerations"]
        assert resources(step)["limits"].items() <= limits(rendered).items()


@pytest.mark.parametrize(
    ("memory", "requested"),
    [
        (32, {"train": 32, "precache": 2, "held-out": 2, "export": 11, "evaluate": 11}),
        (3, {"train": 3, "precache": 2, "held-out": 2, "export": 2, "evaluate": 2}),
        (1, dict.fromkeys(("train", "precache", "held-out", "export", "evaluate"), 1)),
    ],
)
def test_each_pod_asks_for_what_it_needs_and_may_take_what_a_worker_may(memory: int, requested: dict[str, int]) -> None:
    rendered = Rendered(memory_gb=memory, gpu_count=2)
    worker = rendered.plan.workers[0]
    asked = {
        "train": rendered.container["resources"],
        "precache": resources(step_job(rendered.plan, worker, "precache")),
        **{what: resources(step_job(rendered.plan, worker, what)) for what in RESULTS},
    }
    assert {step: one["requests"]["memory"] for step, one in asked.items()} == {
        step: f"{gigabytes}Gi" for step, gigabytes in requested.items()
    }
    for step, one in asked.items():
        own = {name: amount for name, amount in one["limits"].items() if name != "nvidia.com/gpu"}
        assert own == {"cpu": "16", "memory": f"{memory}Gi", "ephemeral-storage": "100Gi"}
        assert (one["requests"]["cpu"], one["requests"]["ephemeral-storage"]) == ("1", "2Gi")
        gpus = None if step == "held-out" else "2"
        assert one["requests"].get("nvidia.com/gpu") == one["limits"].get("nvidia.com/gpu") == gpus


def test_a_pod_that_asks_for_no_gpu_sees_none_of_the_node_s() -> None:
    rendered = Rendered()
    worker = rendered.plan.workers[0]
    variables = {
        "train": rendered.env,
        "precache": rendered.precache_env(),
        **{what: environment(pod_of(step_job(rendered.plan, worker, what))["containers"][0]) for what in RESULTS},
    }
    hidden = {step for step, env in variables.items() if env.get("NVIDIA_VISIBLE_DEVICES") == "void"}
    assert hidden == {"held-out"}
    assert {step for step, env in variables.items() if "PYTHONUNBUFFERED" in env} == {
        "precache", "held-out", "export", "evaluate"
    }, "of a PyTorchJob's pods the operator sets it"  # fmt: skip


@pytest.mark.parametrize(
    ("what", "values", "cores", "threads"),
    [
        ("train", {"cpu_cores": 16}, 2, 2),
        ("train", {"cpu_cores": 16, "elastic_nproc_per_node": 4}, 64, 4),
        ("train", {"cpu_cores": 16, "elastic_nproc_per_node": 4}, 2, 1),
        ("evaluate", {"cpu_cores": 16, "elastic_nproc_per_node": 4}, 8, 8),
        ("export", {"cpu_cores": 3}, 64, 3),
    ],
)
def test_a_pod_s_threads_are_those_that_its_node_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, values: dict[str, Any], cores: int, threads: int
) -> None:
    seen: list[str] = []

    def work(*_: Any) -> Any:
        seen.append(os.environ["OMP_NUM_THREADS"])
        return 0 if what == "train" else {}

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(pod_main, "raise_on_sigterm", lambda: None)
    monkeypatch.setattr(pod_main, "_train", work)
    monkeypatch.setattr(pod_main, "_RESULTS", {what: work})
    monkeypatch.setattr(pod_main, "_serve", lambda files, port: 0)
    config = TrainingConfig.from_flat({**CLUSTER, **values})
    file = tmp_path / "config.yaml"
    file.write_text(config_map(plan(config, namespace="n", image="i"))["data"]["config.yaml"])
    monkeypatch.setenv("OMP_NUM_THREADS", "gone")  # so that it is as it was afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert pod_main.run(what, file) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # an image's, or a person's
    pod_main.run(what, file)
    assert seen == [str(threads), "7"]


def test_the_threads_are_set_before_torch_is_there() -> None:
    code = "import sys; from trainer.kubernetes import pod_main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_parameter_of_the_cluster_is_forgotten() -> None:
    """Each one of the cluster's groups is in the table, or it is said here where it goes."""
    elsewhere = {
        "storage_enabled": "refused without",
        "storage_retain": "the last step deletes the claims, or not",
        "etcd_enabled": "checked with etcd_endpoints",
        "etcd_cert": "as etcd_ca",
        "etcd_key": "as etcd_ca",
        "etcd_outage_limit": "the pods read it",
        **dict.fromkeys(ETCD_SETTINGS, "manifests/: test_kubernetes_manifests.py"),
    }
    groups = ("storage", "elastic", "etcd", "gpu", "deployment")
    cluster = {p.name for p in TrainingConfig.parameters() if p.path[0].split("_")[0] in groups}
    cluster |= {"nodes", "cpu_cores", "memory_gb", "ephemeral_storage_gb", "service_account", "image_pull_secrets"}
    cluster |= {"kueue_queue", "kueue_priority_class", "priority_class", "managed_by"}
    tested = {name for values, _, _ in PARAMETERS for name in values}
    assert cluster - tested == set(elsewhere)


def test_the_pods_read_every_parameter_as_it_was_given(tmp_path: Path) -> None:
    """What the ConfigMap's file gives, merged with no environment, is what was asked for."""
    others = {
        "launcher": "pytorchjob", "run_id": "mine", "run_dir": "/data", "resume": "never", "optim_method": "demo",
        "codec": "int8", "quantization": True, "local_steps": 16, "total_steps": 40_000, "batch_size": 64,
        "model": "gpt-neo-x:tiny", "dataset": "stdlib", "tokenizer": "bytes", "inner_optimizer": "muon",
        "device": "cpu", "late_policy": "drop", "joiner_moments": "warmup", "sites": SITES, "nodes": 3, "fragments": 2,
        "etcd_endpoints": ["a:1"], "etcd_ca": "/ca", "etcd_cert": "/cert", "etcd_key": "/key", "lease_ttl": 20,
        "elastic_etcd_protocol": "https", "elastic_gpu_distribution": "prefer-amd", "gpu_vendor": "AMD",
        "hf_upload": True, "trained_model_hf_name": "me/it", "port_range": "7000-7999", "validation_fraction": 0.5,
        "storage_access_mode": "ReadWriteMany", "etcd_auto_compaction_mode": "revision", "max_samples": 7,
        "etcd_auto_compaction_retention": "9", "elastic_nccl_debug": "WARN", "async_communication": True,
        "experiment_tags": ["a", "b: c"], "experiment_description": "é: '#'\n\"x\"", "storage_retain": False,
    }  # fmt: skip
    config = TrainingConfig.from_flat(others)
    file = tmp_path / "config.yaml"
    file.write_text(config_map(plan(config, namespace="n", image="i"))["data"]["config.yaml"], encoding="utf-8")
    assert load_config(file, {}, {}).to_flat() == config.to_flat()
