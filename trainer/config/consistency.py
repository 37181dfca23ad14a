"""What parameters must be to go together: everything that can be checked without looking at the machine."""

import itertools
import re
from typing import TYPE_CHECKING

from trainer.config.fields import UNSET
from trainer.config.parameters import find
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.training import TrainingConfig

_ENDPOINT = re.compile(r"[^\s/@]+:([0-9]{1,5})")
_SHORTEST_ROUND = 8  # that unequal workers can share: each makes whole inner steps
_FEWEST_PORTS = 256  # of a pod: a node's workers connect to up to 63 others


def settle(config: "TrainingConfig") -> None:
    """Refuse what does not go together, and fill in what goes with the rest. Raises ConfigError."""
    _refuse_what_is_not_available(config)
    _merge_aliases(config)
    _settle_the_wire(config)
    _check_training(config)
    _check_timeouts(config)
    _check_ports(config)
    _check_etcd(config)
    _check_cluster(config)


def _refuse_what_is_not_available(config: "TrainingConfig") -> None:
    tree = config.model_dump()
    for parameter in config.parameters():
        value = find(tree, parameter.path)
        if parameter.later and value != parameter.default:
            raise ConfigError(".".join(parameter.path), value, f"not available yet: {parameter.later}")


def _merge_aliases(config: "TrainingConfig") -> None:
    """Two of the reference's names say what a name of ours says: take either, refuse two that disagree."""
    external = config.elastic.etcd.external_endpoint
    if external and config.etcd.endpoints not in ([], [external]):
        raise ConfigError(
            "elastic.etcd.external_endpoint", external, f"disagrees with etcd.endpoints {config.etcd.endpoints}"
        )
    if external:
        config.etcd.endpoints = [external]
    for endpoint in config.etcd.endpoints:
        found = _ENDPOINT.fullmatch(endpoint)
        if not found or not 0 < int(found[1]) < 65536:
            raise ConfigError("etcd.endpoints", endpoint, "must be host:port, with a port from 1 to 65535")
    run_id = config.elastic.etcd.run_id
    if run_id and config.run_id not in ("", run_id):
        raise ConfigError("elastic.etcd.run_id", run_id, f"disagrees with run_id {config.run_id!r}")
    config.__dict__["run_id"] = config.run_id or run_id


def _settle_the_wire(config: "TrainingConfig") -> None:
    """What goes over the wire, and when: refuse what does not go together, fill in what goes with the rest."""
    if config.quantization and config.codec not in ("fp32", "int8"):
        raise ConfigError("quantization", True, f"means codec = 'int8', and disagrees with codec = {config.codec!r}")
    if config.quantization:
        config.__dict__["codec"] = "int8"
    if config.local_steps % config.fragments:
        raise ConfigError(
            "fragments", config.fragments, f"must divide local_steps ({config.local_steps}) without a rest"
        )
    if config.overlap_tau >= config.local_steps // config.fragments:
        allowed = f"must be less than local_steps / fragments ({config.local_steps // config.fragments})"
        raise ConfigError("overlap_tau", config.overlap_tau, allowed)
    if config.optim_method == "demo" and config.codec == "sparse":
        raise ConfigError("codec", "sparse", "does not go with optim_method = 'demo', which is sparse itself")
    per_byte = {"int4": 2, "ternary": 5, "sign": 8}.get(config.codec, 1)
    if config.optim_method == "demo" and config.compression_topk % per_byte:
        allowed = f"must be a multiple of {per_byte} with codec = {config.codec!r}, which puts so many into a byte"
        raise ConfigError("compression_topk", config.compression_topk, allowed)
    if config.optim_method == "demo" and config.error_feedback != UNSET:
        allowed = "does not go with optim_method = 'demo': compression_decay is its decay"
        raise ConfigError("error_feedback", config.error_feedback, allowed)
    if config.optim_method == "ddp":
        for name in ("codec", "fragments", "async_communication", "overlap_tau"):
            value = getattr(config, name)
            if value != type(config).model_fields[name].default:
                raise ConfigError(name, value, "does not go with optim_method = 'ddp', which averages gradients")


def _check_training(config: "TrainingConfig") -> None:
    if config.batch_size % config.per_device_train_batch_size and not config.heterogeneous:
        raise ConfigError(
            "batch_size",
            config.batch_size,
            f"must be a multiple of per_device_train_batch_size ({config.per_device_train_batch_size})",
        )
    if config.heterogeneous:
        _check_unequal(config)
    if config.warmup_steps > config.total_steps:
        raise ConfigError("warmup_steps", config.warmup_steps, f"must be at most total_steps ({config.total_steps})")
    if not config.min_nodes <= config.nodes <= config.max_nodes:
        allowed = f"must be from elastic.min_nodes ({config.min_nodes}) to elastic.max_nodes ({config.max_nodes})"
        raise ConfigError("nodes", config.nodes, allowed)
    if config.optim_method == "ddp" and config.min_nodes != config.max_nodes:
        raise ConfigError(
            "elastic.min_nodes", config.min_nodes, "must equal elastic.max_nodes when optim_method is ddp"
        )
    if config.hf_upload and not config.trained_model_hf_name:
        raise ConfigError("trained_model_hf_name", "", "must name a repository when hf_upload is set")


def _check_unequal(config: "TrainingConfig") -> None:
    if config.optim_method == "ddp":
        allowed = "does not go with optim_method = 'ddp', which averages every step's gradients"
        raise ConfigError("heterogeneous", True, allowed)
    if config.round_steps < _SHORTEST_ROUND:
        allowed = f"needs rounds of at least {_SHORTEST_ROUND} inner steps (local_steps / fragments), to share them out"
        raise ConfigError("heterogeneous", True, allowed)
    if config.max_batch_size < config.min_batch_size:
        allowed = f"must be at least min_batch_size ({config.min_batch_size})"
        raise ConfigError("max_batch_size", config.max_batch_size, allowed)
    if not any(config.batch_size % size == 0 for size in range(config.min_batch_size, config.max_batch_size + 1)):
        sizes = f"from min_batch_size ({config.min_batch_size}) to max_batch_size ({config.max_batch_size})"
        allowed = f"must be a multiple of some number {sizes}"
        raise ConfigError("batch_size", config.batch_size, allowed)


def _check_timeouts(config: "TrainingConfig") -> None:
    """Their one order: who waits for whom."""
    order = (
        ("collective_timeout", config.collective_timeout),
        ("grace_period", config.grace_period),
        ("lease_ttl", config.lease_ttl),
        ("etcd_outage_limit", config.etcd_outage_limit),
        ("elastic.rdzv_timeout", config.elastic.rdzv_timeout),
    )
    for (shorter, low), (longer, high) in itertools.pairwise(order):
        if low > high or (low == high and shorter != "lease_ttl"):
            relation = "at least" if shorter == "lease_ttl" else "greater than"
            raise ConfigError(longer, high, f"must be {relation} {shorter} ({low})")


def _check_ports(config: "TrainingConfig") -> None:
    if not config.port_range:
        return
    low, high = map(int, config.port_range.split("-"))
    if not 0 < low <= high < 65536:
        raise ConfigError("port_range", config.port_range, "must be low-high with 1 ≤ low ≤ high ≤ 65535")
    # In a pod, where it becomes `net.ipv4.ip_local_port_range`, connections to others are made from it, too.
    if config.launcher == "pytorchjob" and (low < 1024 or high - low < _FEWEST_PORTS - 1):
        allowed = f"must be at least {_FEWEST_PORTS} ports from 1024 on, with launcher = 'pytorchjob'"
        raise ConfigError("port_range", config.port_range, allowed)


def _check_etcd(config: "TrainingConfig") -> None:
    here = config.launcher == "local"  # on a cluster, pods have etcd's certificates from a Secret; auto: it may be one
    if config.elastic.etcd.protocol == "https" and not config.etcd.ca and here:
        raise ConfigError("etcd.ca", "", "must name a file when elastic.etcd.protocol is https")
    if bool(config.etcd.cert) != bool(config.etcd.key):
        missing = "etcd.key" if config.etcd.cert else "etcd.cert"
        raise ConfigError(missing, "", "etcd.cert and etcd.key must be given together")
    if not config.etcd.endpoints and here:
        _refuse_what_an_embedded_etcd_has_not(config)
    if not config.etcd.enabled and not config.etcd.endpoints:
        raise ConfigError("etcd.endpoints", "[]", "must name an etcd when etcd.enabled is false")
    if config.etcd.election_timeout < 5 * config.etcd.heartbeat_interval:
        allowed = f"must be at least 5 times etcd.heartbeat_interval ({config.etcd.heartbeat_interval}): etcd asks it"
        raise ConfigError("etcd.election_timeout", config.etcd.election_timeout, allowed)


def _refuse_what_an_embedded_etcd_has_not(config: "TrainingConfig") -> None:
    without = "needs an etcd of your own (etcd.endpoints): the embedded one has neither TLS nor users"
    for name in ("ca", "cert", "key", "user"):
        if value := getattr(config.etcd, name):
            raise ConfigError(f"etcd.{name}", value, without)
    if config.elastic.etcd.protocol == "https":
        raise ConfigError("elastic.etcd.protocol", "https", without)


def _check_cluster(config: "TrainingConfig") -> None:
    if config.launcher == "pytorchjob" and not config.storage.enabled:
        why = "must be true with launcher = 'pytorchjob': the trained model would be lost with its pods"
        raise ConfigError("storage.enabled", False, why)
    if config.elastic.nccl.nsocks_per_thread * config.elastic.nccl.socket_nthreads > 64:
        allowed = f"times socket_nthreads ({config.elastic.nccl.socket_nthreads}) must be at most 64: NCCL's limit"
        raise ConfigError("elastic.nccl.nsocks_per_thread", config.elastic.nccl.nsocks_per_thread, allowed)
    site_names = [site.name for site in config.sites]
    for site_name in site_names:
        if site_names.count(site_name) > 1:
            raise ConfigError("sites", site_name, "is the name of two sites")
    replicas = sum(site.replicas for site in config.sites)
    if config.sites and replicas != config.nodes:
        raise ConfigError("sites", f"{replicas} replicas in all", f"must be as many as nodes ({config.nodes})")
