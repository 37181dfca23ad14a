"""Sites: pools of equal nodes, near or far, that take part in one run. They may mix NVIDIA, AMD and CPU nodes.

The parameter `sites` lists them. If it is empty, `nodes` is split over the GPU vendors that take part, according to
`elastic.gpu_distribution` and the vendors' `min_nodes` and `max_nodes`. Without GPUs, there is one CPU site.
"""

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config import UNSET, SiteConfig, TrainingConfig, VendorConfig, given
from trainer.errors import ConfigError

Vendor = Literal["nvidia", "amd", "cpu"]

GPU_RESOURCES: dict[Vendor, str] = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}


@dataclass(frozen=True)
class Site:
    """A pool of equal nodes."""

    name: str  # a DNS label
    replicas: int  # workers' nodes
    vendor: Vendor
    image: str
    gpu_resource: str  # the GPUs' extended resource; "" at a CPU site
    gpu_count: int  # in a worker's pod
    node_selector: dict[str, str]
    tolerations: tuple[dict[str, Any], ...]  # in the API's form
    runtime_class: str  # "": the nodes' default
    storage_class: str  # "": the cluster's default
    cluster: str  # the Secret with its cluster's kubeconfig; "": the cluster of the steps
    etcd_endpoints: tuple[str, ...]  # as seen by its pods; empty: `etcd.endpoints`
    advertise_address: str  # of its one worker, besides the pod's own; "": none

    @property
    def device(self) -> str:
        """The parameter `device` of its workers."""
        return "cpu" if self.vendor == "cpu" else "cuda"  # torch for ROCm also calls its devices cuda


def cluster_names(config: TrainingConfig) -> tuple[str, ...]:
    """The clusters of a run: first "" for the steps' own, then the other clusters' Secrets."""
    return tuple(dict.fromkeys(["", *(pool.cluster for pool in config.sites)]))


def sites_of(config: TrainingConfig, image: str) -> tuple[Site, ...]:
    """The sites of a run. Raises ConfigError if `nodes` cannot be split over the GPU vendors.

    Args:
        image: The project's image, used where neither site nor vendor nor deployment names one.
    """
    pools = config.sites
    if not pools and (config.device == "cpu" or config.gpu_count == 0):
        pools = [SiteConfig(name="cpu", replicas=config.nodes)]
    elif not pools:
        split = vendor_nodes(config).items()
        pools = [SiteConfig(name=it, replicas=nodes, gpu_resource=GPU_RESOURCES[it]) for it, nodes in split if nodes]
    return tuple(_site(config, pool, image) for pool in pools)


def _site(config: TrainingConfig, pool: SiteConfig, image: str) -> Site:
    # The GPU vendor, from the resource's name (`amd.com/gpu`, `nvidia.com/mig-1g.10gb`), else `gpu_vendor`
    count = config.gpu_count if pool.gpu_count == UNSET else pool.gpu_count
    vendor = _own_vendor(config)
    if pool.gpu_resource:
        vendor = "amd" if pool.gpu_resource.startswith("amd.com/") else "nvidia"
    if count == 0 or config.device == "cpu":
        vendor = "cpu"

    settings = {"nvidia": config.gpu.nvidia, "amd": config.gpu.amd}.get(vendor)
    return Site(
        name=pool.name,
        replicas=pool.replicas,
        vendor=vendor,
        image=pool.image or (settings.image if settings else "") or config.deployment_image or image,
        gpu_resource="" if vendor == "cpu" else pool.gpu_resource or GPU_RESOURCES[vendor],
        gpu_count=0 if vendor == "cpu" else count,
        node_selector=dict(pool.node_selector),
        tolerations=tuple(one.model_dump(by_alias=True, exclude_defaults=True) for one in pool.tolerations),
        runtime_class=pool.runtime_class_name or (settings.runtime_class_name if settings else ""),
        storage_class=pool.storage_class_name or config.storage.storage_class_name,
        cluster=pool.cluster,
        etcd_endpoints=tuple(pool.etcd_endpoints),
        advertise_address=pool.advertise_address,
    )


def _own_vendor(config: TrainingConfig) -> Vendor:
    return "amd" if config.gpu_vendor == "AMD" else "nvidia"


def vendor_nodes(config: TrainingConfig) -> dict[Vendor, int]:
    """The number of `nodes` for each GPU vendor.

    A vendor takes part if it is enabled and has an image: its own, or (`gpu_vendor`) the project's. Each gets its
    `min_nodes`. The rest is split evenly (`auto`; an odd node goes to NVIDIA), or goes to the preferred vendor first,
    up to each vendor's `max_nodes`.

    Raises:
        ConfigError: No vendor takes part, or their limits admit fewer or require more nodes than `nodes`.
    """
    # The vendors that take part, with their limits
    vendors: dict[Vendor, VendorConfig] = {"nvidia": config.gpu.nvidia, "amd": config.gpu.amd}
    limits: dict[Vendor, tuple[int, int]] = {}
    for vendor, settings in vendors.items():
        if settings.enabled and (settings.image or vendor == _own_vendor(config)):
            high = given(settings.max_nodes)
            limits[vendor] = given(settings.min_nodes) or 0, config.nodes if high is None else high
    if not limits:
        enabled = "gpu.nvidia.enabled" if _own_vendor(config) == "nvidia" else "gpu.amd.enabled"
        raise ConfigError(enabled, False, "leaves no GPUs to train on: enable a vendor and give it an image")
    split = {vendor: low for vendor, (low, _) in limits.items()}
    if sum(split.values()) > config.nodes:
        demanded = " + ".join(f"gpu.{vendor}.min_nodes ({low})" for vendor, (low, _) in limits.items() if low)
        raise ConfigError("nodes", config.nodes, f"must be at least {demanded}")

    # The rest, node by node
    preferred = config.elastic.gpu_distribution.removeprefix("prefer-")
    for _ in range(config.nodes - sum(split.values())):
        open_ = [vendor for vendor in limits if split[vendor] < limits[vendor][1]]
        if not open_:
            allowed = " + ".join(f"gpu.{vendor}.max_nodes ({high})" for vendor, (_, high) in limits.items())
            raise ConfigError("nodes", config.nodes, f"must be at most {allowed}")
        # The preferred vendor, or the one with the fewest nodes; if equal, NVIDIA, which is listed first
        chosen = min(open_, key=lambda vendor: (vendor != preferred) if preferred in limits else split[vendor])
        split[chosen] += 1
    return split
