"""Rules between parameters: everything that can be checked without looking at the machine. Pure functions."""

import itertools
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from trainer.config.fields import RUN_ID, UNSET
from trainer.config.parameters import find
from trainer.config.schema import CODECS, Schema
from trainer.errors import ConfigError

_ENDPOINT = re.compile(r"[^\s/@]+:([0-9]{1,5})")
_SHORTEST_ROUND = 8  # inner steps; below it, whole steps cannot be divided by speed
_FEWEST_PORTS = 256  # of a pod: each of a node's workers connects to up to 63 others
_TRUE = ("true", "t", "yes", "y", "on", "1")  # as pydantic reads a bool
_WITHOUT_DDP = ("codec", "fragments", "async_communication", "overlap_tau")


def with_aliases(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree of parameters in which the reference's three aliases have set the parameters they stand for.

    A parameter that is given as well stays; `check` refuses the two if they disagree.
    """
    tree = dict(tree)
    if str(tree.get("quantization")).lower() in _TRUE and tree.get("codec", "fp32") == "fp32":
        tree["codec"] = "int8"
    run_id = find(tree, ("elastic", "etcd", "run_id"))
    if isinstance(run_id, str) and re.match(RUN_ID, run_id):  # else it is refused under its own name
        tree["run_id"] = tree.get("run_id") or run_id
    external, etcd = find(tree, ("elastic", "etcd", "external_endpoint")), tree.get("etcd", {})
    if external and isinstance(etcd, dict):
        tree["etcd"] = {**etcd, "endpoints": etcd.get("endpoints") or [external]}
    return tree


def check(config: Schema) -> None:
    """Refuse parameters that do not go together. Raises ConfigError."""
    _check_aliases(config)
    _check_synchronisation(config)
    _check_method(config)
    _check_batches(config)
    _check_nodes(config)
    _check_timeouts(config)
    _check_ports(config)
    _check_etcd(config)
    _check_cluster(config)


def _require(condition: object, config: Schema, field: str, allowed: str) -> None:
    """Refuse the field, by its path, unless the condition holds."""
    if not condition:
        raise ConfigError(field, attrgetter(field)(config), allowed)


def _check_aliases(config: Schema) -> None:
    external, run_id = config.elastic.etcd.external_endpoint, config.elastic.etcd.run_id
    endpoints = config.etcd.endpoints
    disagrees = f"disagrees with etcd.endpoints {endpoints}"
    _require(not external or endpoints == [external], config, "elastic.etcd.external_endpoint", disagrees)
    disagrees = f"disagrees with run_id {config.run_id!r}"
    _require(not run_id or config.run_id == run_id, config, "elastic.etcd.run_id", disagrees)
    disagrees = f"means codec = 'int8', and disagrees with codec = {config.codec!r}"
    _require(not config.quantization or config.codec == "int8", config, "quantization", disagrees)


def _check_synchronisation(config: Schema) -> None:
    allowed = f"must divide local_steps ({config.local_steps})"
    _require(config.local_steps % config.fragments == 0, config, "fragments", allowed)
    allowed = f"must be less than local_steps / fragments ({config.round_steps})"
    _require(config.overlap_tau < config.round_steps, config, "overlap_tau", allowed)
    if config.heterogeneous:
        allowed = f"needs at least {_SHORTEST_ROUND} inner steps a round (local_steps / fragments) to divide by speed"
        _require(config.round_steps >= _SHORTEST_ROUND, config, "heterogeneous", allowed)


def _check_method(config: Schema) -> None:
    method, codec = config.optim_method, CODECS[config.codec]
    if method == "demo":
        excluded = "cannot be combined with optim_method = 'demo'"
        _require(not codec.get("sparse"), config, "codec", f"{excluded}, which is sparse already")
        _require(config.error_feedback == UNSET, config, "error_feedback", f"{excluded}: set compression_decay instead")
        per_byte = codec.get("per_byte", 1)
        allowed = f"must be a multiple of {per_byte}: codec = {config.codec!r} packs {per_byte} values into a byte"
        _require(config.compression_topk % per_byte == 0, config, "compression_topk", allowed)
    if method == "ddp":
        excluded = "cannot be combined with optim_method = 'ddp', which averages the gradients of every step"
        for name in _WITHOUT_DDP:
            _require(getattr(config, name) == Schema.model_fields[name].default, config, name, excluded)
        _require(not config.heterogeneous, config, "heterogeneous", excluded)
        allowed = "must equal elastic.max_nodes with optim_method = 'ddp'"
        _require(config.min_nodes == config.max_nodes, config, "elastic.min_nodes", allowed)
    allowed = "needs optim_method = 'ddp' and GPUs (device = 'cuda'): DiLoCo workers use gloo, and so do CPUs"
    has_nccl = method == "ddp" and config.device != "cpu"
    _require(config.pgroup_backend != "nccl" or has_nccl, config, "pgroup_backend", allowed)


def _check_batches(config: Schema) -> None:
    if config.heterogeneous:
        low, high = config.min_batch_size, config.max_batch_size
        _require(low <= high, config, "max_batch_size", f"must be at least min_batch_size ({low})")
        allowed = f"must be a multiple of a number from min_batch_size ({low}) to max_batch_size ({high})"
        fits = any(config.batch_size % size == 0 for size in range(low, high + 1))
    else:
        allowed = f"must be a multiple of per_device_train_batch_size ({config.per_device_train_batch_size})"
        fits = config.batch_size % config.per_device_train_batch_size == 0
    _require(fits, config, "batch_size", allowed)
    allowed = f"must be at most total_steps ({config.total_steps})"
    _require(config.warmup_steps <= config.total_steps, config, "warmup_steps", allowed)


def _check_nodes(config: Schema) -> None:
    allowed = f"must be from elastic.min_nodes ({config.min_nodes}) to elastic.max_nodes ({config.max_nodes})"
    _require(config.min_nodes <= config.nodes <= config.max_nodes, config, "nodes", allowed)
    names = [site.name for site in config.sites]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("sites", name, "is the name of two sites")
    replicas = sum(site.replicas for site in config.sites)
    if config.sites and replicas != config.nodes:
        raise ConfigError("sites", f"{replicas} replicas in total", f"must add up to nodes ({config.nodes})")


def _check_timeouts(config: Schema) -> None:
    """Each of these waits for the one before it, so it must be longer."""
    order = ("collective_timeout", "grace_period", "lease_ttl", "etcd_outage_limit", "elastic.rdzv_timeout")
    for shorter, longer in itertools.pairwise(order):
        low, high = attrgetter(shorter)(config), attrgetter(longer)(config)
        may_be_equal = shorter == "lease_ttl"
        allowed = f"must be {'at least' if may_be_equal else 'greater than'} {shorter} ({low})"
        _require(low < high or (may_be_equal and low == high), config, longer, allowed)


def _check_ports(config: Schema) -> None:
    if not config.port_range:
        return
    low, high = map(int, config.port_range.split("-"))
    _require(0 < low <= high < 65536, config, "port_range", "must be low-high with 1 ≤ low ≤ high ≤ 65535")
    # In a pod it becomes `net.ipv4.ip_local_port_range`, so outgoing connections use it as well.
    allowed = f"must be at least {_FEWEST_PORTS} ports from 1024 on, with launcher = 'pytorchjob'"
    enough = low >= 1024 and high - low >= _FEWEST_PORTS - 1
    _require(config.launcher != "pytorchjob" or enough, config, "port_range", allowed)


def _check_etcd(config: Schema) -> None:
    for endpoint in config.etcd.endpoints:
        found = _ENDPOINT.fullmatch(endpoint)
        if not found or not 0 < int(found[1]) < 65536:
            raise ConfigError("etcd.endpoints", endpoint, "must be host:port, with a port from 1 to 65535")
    etcd, https = config.etcd, config.elastic.etcd.protocol == "https"
    if config.launcher == "local":  # on a cluster, pods get etcd's certificates from a Secret; auto may mean a cluster
        _require(etcd.ca or not https, config, "etcd.ca", "must name a file when elastic.etcd.protocol is https")
        if not etcd.endpoints:
            external = "needs an external etcd (etcd.endpoints): the embedded one supports neither TLS nor users"
            for name in ("ca", "cert", "key", "user"):
                _require(not getattr(etcd, name), config, f"etcd.{name}", external)
            _require(not https, config, "elastic.etcd.protocol", external)
    both = "etcd.cert and etcd.key must be given together"
    _require(etcd.key or not etcd.cert, config, "etcd.key", both)
    _require(etcd.cert or not etcd.key, config, "etcd.cert", both)
    _require(etcd.enabled or etcd.endpoints, config, "etcd.endpoints", "must name an etcd when etcd.enabled is false")
    allowed = f"must be at least 5 times etcd.heartbeat_interval ({etcd.heartbeat_interval}), as etcd requires"
    _require(etcd.election_timeout >= 5 * etcd.heartbeat_interval, config, "etcd.election_timeout", allowed)


def _check_cluster(config: Schema) -> None:
    allowed = "must be true with launcher = 'pytorchjob': otherwise the trained model is lost with its pods"
    _require(config.launcher != "pytorchjob" or config.storage.enabled, config, "storage.enabled", allowed)
    nccl = config.elastic.nccl
    allowed = f"times socket_nthreads ({nccl.socket_nthreads}) must be at most 64: NCCL's limit"
    within = nccl.nsocks_per_thread * nccl.socket_nthreads <= 64
    _require(within, config, "elastic.nccl.nsocks_per_thread", allowed)
    named = config.trained_model_hf_name or not config.hf_upload
    _require(named, config, "trained_model_hf_name", "must name a repository when hf_upload is set")
