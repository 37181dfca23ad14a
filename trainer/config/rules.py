"""Rules between parameters: everything that can be checked without looking at the machine. Pure functions."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from trainer.config.fields import RUN_ID, UNSET
from trainer.config.parameters import find
from trainer.config.schema import CODECS, Schema
from trainer.errors import ConfigError

_ENDPOINT = re.compile(r"(?:[^\s/@:\[\]]+|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):([0-9]{1,5})")
_SHORTEST_ROUND = 8  # inner steps; a shorter round cannot be divided by speed into whole steps
_FEWEST_PORTS = 256  # of a pod: each of a node's workers connects to up to 63 others
_TRUE = ("true", "t", "yes", "y", "on", "1")  # as pydantic reads a bool
_WITHOUT_DDP = ("codec", "fragments", "async_communication", "overlap_tau")


# Rules: a condition that must hold, the path of the refused field, and the allowed values in words.
Rules = Iterator[tuple[object, str, str]]


def with_aliases(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree of parameters with the three aliases applied.

    A parameter that is also given under its own name keeps its value; `check` rejects the two if they disagree.
    """
    # quantization stands for codec=int8.
    tree = dict(tree)
    if str(tree.get("quantization")).lower() in _TRUE and tree.get("codec", "fp32") == "fp32":
        tree["codec"] = "int8"
    # elastic.etcd.run_id stands for run_id.
    run_id = find(tree, ("elastic", "etcd", "run_id"))
    if isinstance(run_id, str) and re.match(RUN_ID, run_id):  # otherwise it is rejected under its own name
        tree["run_id"] = tree.get("run_id") or run_id
    # elastic.etcd.external_endpoint stands for a single one of etcd.endpoints.
    external, etcd = find(tree, ("elastic", "etcd", "external_endpoint")), tree.get("etcd", {})
    if external and isinstance(etcd, dict):
        tree["etcd"] = {**etcd, "endpoints": etcd.get("endpoints") or [external]}
    return tree


def check(config: Schema) -> None:
    """Check that the parameters are consistent. Raises ConfigError."""
    groups = (_aliases, _synchronisation, _method, _islands, _batches, _nodes, _timeouts, _ports, _etcd, _cluster)
    for holds, field, allowed in itertools.chain.from_iterable(rules(config) for rules in groups):
        if not holds:
            raise ConfigError(field, attrgetter(field)(config), allowed)
    _check_other_clusters(config)


def _aliases(config: Schema) -> Rules:
    external, run_id = config.elastic.etcd.external_endpoint, config.elastic.etcd.run_id
    endpoints = config.etcd.endpoints
    disagrees = f"disagrees with etcd.endpoints {endpoints}"
    yield not external or endpoints == [external], "elastic.etcd.external_endpoint", disagrees
    yield not run_id or config.run_id == run_id, "elastic.etcd.run_id", f"disagrees with run_id {config.run_id!r}"
    disagrees = f"means codec = 'int8', and disagrees with codec = {config.codec!r}"
    yield not config.quantization or config.codec == "int8", "quantization", disagrees


def _synchronisation(config: Schema) -> Rules:
    yield config.local_steps % config.fragments == 0, "fragments", f"must divide local_steps ({config.local_steps})"
    allowed = f"must be less than local_steps / fragments ({config.round_steps})"
    yield config.overlap_tau < config.round_steps, "overlap_tau", allowed
    if config.heterogeneous:
        allowed = f"needs rounds of at least {_SHORTEST_ROUND} inner steps (local_steps / fragments) to divide by speed"
        yield config.round_steps >= _SHORTEST_ROUND, "heterogeneous", allowed


def _method(config: Schema) -> Rules:
    method, codec = config.optim_method, CODECS[config.codec]
    if method == "demo":
        excluded = "cannot be combined with optim_method = 'demo'"
        yield not codec.get("sparse"), "codec", f"{excluded}, which is sparse already"
        yield config.error_feedback == UNSET, "error_feedback", f"{excluded}: set compression_decay instead"
        together = codec.get("together", 1)
        allowed = f"must be a multiple of {together}: codec = {config.codec!r} packs {together} values together"
        yield config.compression_topk % together == 0, "compression_topk", allowed
    if method == "ddp":
        excluded = "cannot be combined with optim_method = 'ddp', which averages the gradients of every step"
        for name in _WITHOUT_DDP:
            yield getattr(config, name) == Schema.model_fields[name].default, name, excluded
        yield not config.heterogeneous, "heterogeneous", excluded
        allowed = "must equal elastic.max_nodes with optim_method = 'ddp'"
        yield config.min_nodes == config.max_nodes, "elastic.min_nodes", allowed
    allowed = "needs optim_method = 'ddp' and GPUs (device = 'cuda'): DiLoCo has its own transport, and CPUs use gloo"
    has_nccl = method == "ddp" and config.device != "cpu"
    yield config.pgroup_backend != "nccl" or has_nccl, "pgroup_backend", allowed


def _islands(config: Schema) -> Rules:
    if not config.island:
        return
    how = f"inner_parallel = {config.inner_parallel!r}"
    allowed = "cannot be combined with optim_method = 'ddp', whose workers are the processes of all nodes"
    yield config.optim_method != "ddp", "inner_parallel", allowed
    allowed = f"must be cuda without an index, or cpu, with {how}: each process has its own GPU"
    yield ":" not in config.device or config.island == 1, "device", allowed
    if config.inner_parallel == "fsdp":
        yield (
            config.inner_optimizer != "muon",
            "inner_optimizer",
            f"must be adamw with {how}: muon needs whole matrices",
        )


def _batches(config: Schema) -> Rules:
    part, processes = config.process_batch_size, max(config.island, 1)
    of_each = f"elastic.nproc_per_node ({processes}) times " if processes > 1 else ""
    if config.heterogeneous:
        low, high = config.min_batch_size, config.max_batch_size
        yield low <= high, "max_batch_size", f"must be at least min_batch_size ({low})"
        allowed = f"must be a multiple of {of_each}a number from min_batch_size ({low}) to max_batch_size ({high})"
        fits = any(part % size == 0 for size in range(low, high + 1))
    else:
        allowed = f"must be a multiple of {of_each}per_device_train_batch_size ({config.per_device_train_batch_size})"
        fits = part % config.per_device_train_batch_size == 0
    yield part > 0 and config.batch_size % processes == 0 and fits, "batch_size", allowed
    yield (
        config.warmup_steps <= config.total_steps,
        "warmup_steps",
        f"must be at most total_steps ({config.total_steps})",
    )


def _nodes(config: Schema) -> Rules:
    allowed = f"must be from elastic.min_nodes ({config.min_nodes}) to elastic.max_nodes ({config.max_nodes})"
    reached = config.etcd.endpoints or config.advertise_address
    elsewhere = reached and not config.on_cluster  # other nodes of the run may run elsewhere
    least = 1 if elsewhere else config.min_nodes
    yield least <= config.nodes <= config.max_nodes, "nodes", allowed
    names = [site.name for site in config.sites]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("sites", name, "is the name of two sites")
    replicas = sum(site.replicas for site in config.sites)
    if config.sites and replicas != config.nodes:
        raise ConfigError("sites", f"{replicas} replicas in total", f"must add up to nodes ({config.nodes})")


def _timeouts(config: Schema) -> Rules:
    """Each of these waits for the one before it, so it must be longer."""
    order = ("collective_timeout", "grace_period", "lease_ttl", "etcd_outage_limit", "elastic.rdzv_timeout")
    for shorter, longer in itertools.pairwise(order):
        low, high = attrgetter(shorter)(config), attrgetter(longer)(config)
        may_be_equal = shorter == "lease_ttl"
        allowed = f"must be {'at least' if may_be_equal else 'greater than'} {shorter} ({low})"
        yield low < high or (may_be_equal and low == high), longer, allowed


def _ports(config: Schema) -> Rules:
    if not config.port_range:
        return
    low, high = map(int, config.port_range.split("-"))
    yield 0 < low <= high < 65536, "port_range", "must be low-high with 1 ≤ low ≤ high ≤ 65535"
    # In a pod it becomes `net.ipv4.ip_local_port_range`, so outgoing connections also use it
    allowed = f"must be at least {_FEWEST_PORTS} ports from 1024 on, with launcher = {config.launcher!r}"
    enough = low >= 1024 and high - low >= _FEWEST_PORTS - 1
    yield not config.on_cluster or enough, "port_range", allowed


def _etcd(config: Schema) -> Rules:
    _check_endpoints("etcd.endpoints", config.etcd.endpoints)
    etcd, https = config.etcd, config.elastic.etcd.protocol == "https"
    if config.launcher == "local":  # on a cluster, pods get etcd's certificates from a Secret; auto may mean a cluster
        yield etcd.ca or not https, "etcd.ca", "must name a file when elastic.etcd.protocol is https"
        if not etcd.endpoints:
            external = "needs an external etcd (etcd.endpoints): the embedded one supports neither TLS nor users"
            for name in ("ca", "cert", "key", "user"):
                yield not getattr(etcd, name), f"etcd.{name}", external
            yield not https, "elastic.etcd.protocol", external
    both = "etcd.cert and etcd.key must be given together"
    yield etcd.key or not etcd.cert, "etcd.key", both
    yield etcd.cert or not etcd.key, "etcd.cert", both
    yield etcd.enabled or etcd.endpoints, "etcd.endpoints", "must name an etcd when etcd.enabled is false"
    allowed = f"must be at least 5 times etcd.heartbeat_interval ({etcd.heartbeat_interval}), as etcd requires"
    yield etcd.election_timeout >= 5 * etcd.heartbeat_interval, "etcd.election_timeout", allowed


def _check_endpoints(field: str, endpoints: Sequence[str]) -> None:
    for endpoint in endpoints:
        found = _ENDPOINT.fullmatch(endpoint)
        if not found or not 0 < int(found[1]) < 65536:
            allowed = "must be host:port or [IPv6 address]:port, with a port from 1 to 65535"
            raise ConfigError(field, endpoint, allowed)


def _cluster(config: Schema) -> Rules:
    allowed = f"must be true with launcher = {config.launcher!r}: otherwise the trained model is lost with its pods"
    yield not config.on_cluster or config.storage.enabled, "storage.enabled", allowed
    for name in ("kueue_priority_class", "managed_by"):
        yield config.kueue_queue or not getattr(config, name), name, "needs a queue (kueue_queue)"
    nccl = config.elastic.nccl
    allowed = f"times socket_nthreads ({nccl.socket_nthreads}) must be at most 64: NCCL's limit"
    within = nccl.nsocks_per_thread * nccl.socket_nthreads <= 64
    yield within, "elastic.nccl.nsocks_per_thread", allowed
    named = config.trained_model_hf_name or not config.hf_upload
    yield named, "trained_model_hf_name", "must name a repository when hf_upload is set"


def _check_other_clusters(config: Schema) -> None:
    """Rules for sites outside the steps' cluster."""
    if any(site.cluster for site in config.sites) and not config.port_range:
        allowed = "must be set with sites in several clusters: their firewalls and network policies admit these ports"
        raise ConfigError("port_range", "", allowed)
    launchers: dict[str, str] = {}  # of each cluster
    for index, site in enumerate(config.sites):
        field = f"sites.{index}"
        _check_endpoints(f"{field}.etcd_endpoints", site.etcd_endpoints)
        launcher = launchers.setdefault(site.cluster, site.launcher)
        sees_etcd = not site.cluster or site.etcd_endpoints or config.etcd.endpoints
        rules = [
            (site.cluster or site.launcher == "auto", "launcher", "needs another cluster: otherwise set the parameter"),
            (site.launcher == launcher, "launcher", f"must be that of the same cluster's other sites ({launcher})"),
            (sees_etcd, "etcd_endpoints", "must name etcd as this cluster sees it, because etcd.endpoints is empty"),
            (
                site.replicas == 1 or not site.advertise_address,
                "advertise_address",
                "needs a site of one replica: two workers cannot have one address",
            ),
        ]
        for holds, name, allowed in rules:
            if not holds:
                raise ConfigError(f"{field}.{name}", getattr(site, name), allowed)
