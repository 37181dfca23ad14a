"""The pod template of all jobs of a run: resources, environment, volumes, security.

The training's ConfigMap holds the configuration as the file that `--config` reads. `DILOCO_*` variables, which override
the file, hold the values that differ between pods (address, device of the site). Secrets are passed by reference.
"""

from pathlib import Path
from typing import Literal, get_args

from trainer.config import TrainingConfig, given
from trainer.kubernetes.api.kinds import PYTORCH_JOB, TRAIN_JOB
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import DATA, ETCD_CREDENTIALS, Object, Plan, WorkerPlan
from trainer.kubernetes.objects.sites import GPU_RESOURCES, Site, Vendor
from trainer.timeouts import LaunchTimeouts
from trainer.transport.handover import TOKEN_VARIABLE
from trainer.volume import Volume

Result = Literal["held-out", "export", "evaluate"]
Step = Literal["train", "precache"] | Result
RESULTS: tuple[Result, ...] = get_args(Result)

CONFIG_DIRECTORY, CONFIG_NAME = "/etc/diloco", "config.yaml"
CONFIG_FILE = f"{CONFIG_DIRECTORY}/{CONFIG_NAME}"
RESULT_PORT = 6901  # of a pod that serves a result: anyone may connect to it, so it is in no usual `port_range`
TOKEN_KEY = "token"  # in the run's Secret: the token that authorises fetching a result
CONTAINERS = {PYTORCH_JOB: "pytorch", TRAIN_JOB: "node"}  # the controllers' names of a training pod's main container

_LEAST_CPU, _LEAST_MEMORY, _LEAST_STORAGE = 1, 2, 2  # smallest requests: cores, GiB, GiB

GRACE_PERIOD = LaunchTimeouts().shutdown + 30  # seconds; workers may save until the agent's shutdown timeout
_USER = 1000  # the image's user; not root

# A GPU model in nodes' product labels, which must match in full. NVIDIA's labels are the names in its driver, here with
# the variants of A100 and H100.
_PRODUCTS: dict[Vendor, tuple[str, ...]] = {
    "nvidia": (
        "NVIDIA-{}",
        "NVIDIA-{}-SXM4-80GB",
        "NVIDIA-{}-SXM4-40GB",
        "NVIDIA-{}-80GB-PCIe",
        "NVIDIA-{}-PCIE-40GB",
        "NVIDIA-{}-80GB-HBM3",
        "NVIDIA-{}-PCIe",
        "NVIDIA-{}-NVL",
    ),
    "amd": ("AMD_Instinct_{}", "AMD_Instinct_{}_OAM"),
}


def template(plan: Plan, step: Step, worker: WorkerPlan, arguments: tuple[str, ...]) -> Object:
    """A pod template.

    Args:
        step: The pod's command: `python -m trainer pod <step>`.
        worker: The worker that owns the pod or its claim; for the training pods of a site's job, any of its workers.
        arguments: Further arguments of the command.
    """
    site = worker.site
    spec: Object = {
        "automountServiceAccountToken": False,  # no process in it uses the API
        "enableServiceLinks": False,  # a Service named diloco-… would set DILOCO_* variables, which are parameters
        "terminationGracePeriodSeconds": GRACE_PERIOD,
        "securityContext": _security(plan, step),
        "containers": [_container(plan, step, worker, arguments)],
        "volumes": _volumes(plan, worker),
        "tolerations": _tolerations(site),
    }
    optional: Object = {
        "nodeSelector": dict(site.node_selector),
        "runtimeClassName": site.runtime_class,
        "affinity": _affinity(plan, site, step),
        "serviceAccountName": plan.config.service_account,
        "priorityClassName": plan.config.priority_class if step == "train" else "",
        "imagePullSecrets": [{"name": name} for name in plan.config.image_pull_secrets],
    }
    spec |= {key: value for key, value in optional.items() if value}
    # Kubeflow injects Istio's sidecar into pods. It would outlive the work and intercept workers' connections.
    no_sidecar = {"sidecar.istio.io/inject": "false"}
    labels, annotations = plan.labels(step, worker) | no_sidecar, dict(no_sidecar)
    if step == "train" and (port := given(plan.config.metrics_port)):
        scrape = {"scrape": "true", "port": str(port), "path": "/metrics"}
        annotations |= {f"prometheus.io/{key}": value for key, value in scrape.items()}
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def _container(plan: Plan, step: Step, worker: WorkerPlan, arguments: tuple[str, ...]) -> Object:
    site = worker.site
    container: Object = {
        "name": CONTAINERS[plan.kind] if step == "train" else step,
        "image": site.image,
        "command": ["python", "-m", "trainer", "pod", step],
        "args": ["--config", CONFIG_FILE, *arguments],
        "workingDir": DATA,
        "env": _environment(plan, site, step),
        "resources": _resources(plan, site, step),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": _mounts(plan, worker, step),
        "terminationMessagePolicy": "FallbackToLogsOnError",  # put the last lines of the log into the status
    }
    if step in RESULTS:
        container["ports"] = [{"name": "result", "containerPort": RESULT_PORT, "protocol": "TCP"}]
    if step == "train" and (port := given(plan.config.metrics_port)):
        container["ports"] = [{"name": "metrics", "containerPort": port, "protocol": "TCP"}]
    return container


def _resources(plan: Plan, site: Site, step: Step) -> Object:
    """The container's requests, which the scheduler reserves, and its limits, which come from the parameters.

    Only one core is requested, whatever `cpu_cores` allows: a busy node merely slows a process down, but a pod waits
    indefinitely if no node can meet its request. A worker's memory is requested in full because it will be used: when
    a node runs short of memory, it first evicts Burstable pods (like these) that exceed their request.
    """
    config = plan.config
    gpus = {site.gpu_resource: str(site.gpu_count)} if _has_gpus(site, step) else {}
    # Precaching processes data in pieces. Export and evaluation hold the model, and a checkpoint while loading it. A
    # worker holds at least six copies: parameters, gradients, two moments, the committed state and the outer momentum.
    third = -(-config.memory_gb // 3)
    needed = {"train": config.memory_gb, "export": third, "evaluate": third}.get(step, 0)

    def amounts(cpu: int, memory: int, storage: int) -> dict[str, str]:
        return {"cpu": str(cpu), "memory": f"{memory}Gi", "ephemeral-storage": f"{storage}Gi"} | gpus

    most = (config.cpu_cores, config.memory_gb, config.ephemeral_storage_gb)
    least = (_LEAST_CPU, max(_LEAST_MEMORY, needed), _LEAST_STORAGE)
    return {"requests": amounts(*map(min, least, most)), "limits": amounts(*most)}


def _has_gpus(site: Site, step: Step) -> bool:
    """Whether the pod requests GPUs: training and evaluation use them, and precaching binds the claim to a GPU node.

    The pod that serves the held-out data would only wait for a GPU: its claim is already bound.
    """
    return bool(site.gpu_resource) and step != "held-out"


def _environment(plan: Plan, site: Site, step: Step) -> list[Object]:
    config = plan.config
    # Fixed variables, and parameters that have another value at this pod's site
    values: dict[str, object] = {"HOME": "/tmp"}  # other images may have no writable home
    if step != "train" or plan.kind is not PYTORCH_JOB:  # for those pods, the training operator sets it
        values["PYTHONUNBUFFERED"] = 1
    if site.vendor == "nvidia" and not _has_gpus(site, step):
        values["NVIDIA_VISIBLE_DEVICES"] = "void"  # otherwise NVIDIA's runtime class exposes all GPUs to the pod
    if site.device == "cpu" and config.device != "cpu":
        values["DILOCO_DEVICE"] = "cpu"
    if step == "train" and (processes := plan.processes(site)) != config.elastic.nproc_per_node:
        values["DILOCO_ELASTIC_NPROC_PER_NODE"] = processes
    if step == "train" and site.vendor != "cpu" and (config.optim_method == "ddp" or config.island):
        values |= _nccl(config)
    if step == "train":
        values |= plan.tracking
    # Addresses: etcd's as seen from the site, and the pod's own, which is known only once it runs
    fields = {"POD_NAME": "metadata.name"}
    if step == "train" and site.etcd_endpoints:
        values["DILOCO_ETCD_ENDPOINTS"] = ",".join(site.etcd_endpoints)
    if step == "train" and site.advertise_address:
        fields["POD_IP"] = "status.podIP"
    elif step == "train" and not (config.advertise_address or config.network_interface):
        fields["DILOCO_ADVERTISE_ADDRESS"] = "status.podIP"
    environment: list[Object] = [{"name": name, "value": str(value)} for name, value in values.items()]
    environment += [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    if "POD_IP" in fields:  # a variable can refer to earlier ones
        environment.append({"name": "DILOCO_ADVERTISE_ADDRESS", "value": f"$(POD_IP),{site.advertise_address}"})
    # Secrets, each only for the steps that need it
    if step == "train":
        if config.wandb_logging:
            environment.append(_secret("WANDB_API_KEY", config.wandb_secret, "WANDB_API_KEY", optional=True))
        if config.etcd.user:
            environment.append(_secret("ETCD_PASSWORD", names.ETCD_SECRET, "password"))
    if step in ("precache", "export", "evaluate"):
        environment.append(_secret("HF_TOKEN", config.huggingface_secret, "HF_TOKEN", optional=not config.hf_upload))
    if step in RESULTS:
        environment.append(_secret(TOKEN_VARIABLE, names.name(plan.name, "run"), TOKEN_KEY))
    return environment


def _nccl(config: TrainingConfig) -> dict[str, object]:
    """NCCL's variables, also read by RCCL: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"""
    nccl = config.elastic.nccl
    return {
        "NCCL_DEBUG": nccl.debug,
        "NCCL_IB_TIMEOUT": nccl.ib_timeout,
        "NCCL_NSOCKS_PERTHREAD": nccl.nsocks_per_thread,
        "NCCL_SOCKET_NTHREADS": nccl.socket_nthreads,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": nccl.async_error_handling,
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": nccl.timeout,
        **({"NCCL_SOCKET_IFNAME": nccl.socket_ifname} if nccl.socket_ifname else {}),
    }


def _secret(variable: str, secret: str, key: str, *, optional: bool = False) -> Object:
    reference = {"name": secret, "key": key} | ({"optional": True} if optional else {})
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _volumes(plan: Plan, worker: WorkerPlan) -> list[Object]:
    # Shared memory counts as the pod's memory. An island keeps the global state and its synchronisation buffers there.
    part = 2 if plan.config.island else 4
    shared_memory = f"{max(1, plan.config.memory_gb // part)}Gi"
    volumes: list[Object] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": worker.claim}},
        {"name": "config", "configMap": {"name": names.name(plan.name, "config")}},
        # Data loaders and NCCL pass tensors through it; a container's default is 64 MB
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
        {"name": "temporary", "emptyDir": {}},
    ]
    if files := _certificates(plan):
        items = [{"key": name, "path": name} for name in files]
        volumes.append({"name": "etcd", "secret": {"secretName": names.ETCD_SECRET, "items": items}})
    return volumes


def _mounts(plan: Plan, worker: WorkerPlan, step: Step) -> list[Object]:
    mounts: list[Object] = [
        {"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "temporary", "mountPath": "/tmp"},
        *_data_mounts(plan, worker, step),
    ]
    if _certificates(plan):
        mounts.append({"name": "etcd", "mountPath": ETCD_CREDENTIALS, "readOnly": True})
    return mounts


def _data_mounts(plan: Plan, worker: WorkerPlan, step: Step) -> list[Object]:
    """The mounts of the claim.

    A worker's own claim is mounted at `/data`. With a shared claim, `/data` is the worker's folder in it, while all
    workers share the folders of models and datasets. Directories outside `/data` are also folders of the claim.
    """
    volume = Volume.of(plan.config)
    folders = {"models": volume.models, "datasets": volume.datasets, "checkpoints": volume.checkpoints.parent}
    several = step == "train" and not plan.a_job_a_worker  # pods share a template; each is named like its folder
    own = {"subPathExpr": "$(POD_NAME)"} if several else {"subPath": worker.folder}
    if plan.a_claim_a_worker:
        own = {}
    mounts: list[Object] = [{"name": "data", "mountPath": DATA, **own}]
    for folder, path in folders.items():
        inside = path.is_relative_to(DATA)
        if folder == "checkpoints" and own and not inside:
            key, value = next(iter(own.items()))
            mounts.append({"name": "data", "mountPath": str(path), key: f"{value}/checkpoints"})
        elif (own and folder != "checkpoints") or not inside:
            mounts.append({"name": "data", "mountPath": str(path), "subPath": folder})
    return mounts


def _certificates(plan: Plan) -> list[str]:
    """The files of etcd's Secret that the configuration refers to."""
    etcd = plan.config.etcd
    paths = [Path(path) for path in (etcd.ca, etcd.cert, etcd.key)]
    return [path.name for path in paths if path.parent == Path(ETCD_CREDENTIALS)]


def _security(plan: Plan, step: Step) -> Object:
    context: Object = {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,  # a new volume belongs to root
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if plan.config.port_range and step == "train":
        # gloo listens on ephemeral ports; this safe sysctl confines them to the range that a firewall admits
        low, high = plan.config.port_range.split("-")
        context["sysctls"] = [{"name": "net.ipv4.ip_local_port_range", "value": f"{low} {high}"}]
    return context


def _tolerations(site: Site) -> list[Object]:
    """The site's own tolerations, and one for the taint that reserves GPU nodes, which is named like the resource."""
    reserved = {"key": GPU_RESOURCES.get(site.vendor), "operator": "Exists", "effect": "NoSchedule"}
    return [*map(dict, site.tolerations), *([reserved] if site.vendor in GPU_RESOURCES else [])]


def _affinity(plan: Plan, site: Site, step: Step) -> Object:
    """The pod's preferred nodes: with the wanted kind of GPU, and without another worker or its precaching.

    Since each pod requests a single core, many workers could otherwise share a node.
    """
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    affinity: Object = {}
    if site.vendor != "cpu":
        affinity["nodeAffinity"] = {preferred: _gpu_preference(plan.config, site.vendor)}
    if step in ("train", "precache") and len(plan.workers) > 1:
        others = {"matchLabels": {**plan.own_labels, names.COMPONENT_LABEL: step}}
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": others}
        affinity["podAntiAffinity"] = {preferred: [{"weight": 100, "podAffinityTerm": term}]}
    return affinity


def _gpu_preference(config: TrainingConfig, vendor: Vendor) -> list[Object]:
    """Preferences by the node labels of NVIDIA's GPU feature discovery and AMD's node labeller."""
    products = [config.gpu_type]
    if config.gpu_type.isalnum():  # a model, not a full label
        products += [product.format(config.gpu_type) for product in _PRODUCTS[vendor]]
    if vendor == "nvidia":  # memory in MiB, a little less than the nominal size
        least = config.gpu_memory * 1024 * 9 // 10
        wanted = [("nvidia.com/gpu.product", "In", products), ("nvidia.com/gpu.memory", "Gt", [str(least)])]
    else:
        wanted = [
            ("amd.com/gpu.product-name", "In", products),
            ("amd.com/gpu.vram", "In", [f"{config.gpu_memory}G"]),
        ]
    terms = [{"key": key, "operator": operator, "values": values} for key, operator, values in wanted]
    return [{"weight": 50, "preference": {"matchExpressions": [term]}} for term in terms]
