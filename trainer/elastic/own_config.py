"""The configuration of a user's own loop: the address, the parameters, and the run's fingerprint."""

import hashlib
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.config import TrainingConfig, load_config
from trainer.config.parameters import put, unknown
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.errors import ConfigError
from trainer.etcd.client import Json
from trainer.protocol import PROTOCOL

if TYPE_CHECKING:
    from trainer.diloco.diloco import DiLoCo

PARAMETERS = (
    *("batch_size", "seed", "run_dir", "nodes", "elastic_min_nodes", "elastic_max_nodes"),
    *("grace_period", "collective_timeout", "lease_ttl", "etcd_outage_limit", "elastic_rdzv_timeout"),
    *("advertise_address", "network_interface", "port_range", "streams", "sync_threads", "catch_up_rounds"),
    *("transport_security", "transport_certificates"),
    *("etcd_ca", "etcd_cert", "etcd_key", "etcd_user", "elastic_etcd_prefix", "elastic_etcd_protocol"),
)
"""The parameters of a membership by flat name: those that affect a user's own loop."""

_ARGUMENTS = {
    **dict.fromkeys(("codec", "error_feedback", "compression_topk", "sparse_topk", "quantization"), "codec"),
    **dict.fromkeys(("outer_optimizer", "outer_lr", "outer_momentum"), "outer"),
    **dict.fromkeys(("async_communication", "overlap_tau", "overlap_alpha"), "overlap"),
    **{name: name for name in ("total_steps", "fragments", "late_policy", "merge", "clip_members")},
    "local_steps": "sync_every",
}
"""The parameters that are arguments of `DiLoCo`, by flat name."""

_NO_RULE = {"per_device_train_batch_size": 1, "warmup_steps": 0}  # values that satisfy every rule; they have no effect
_SHAPE = "must be etcd://host:port/run, for example etcd://localhost:2379/mine"


def config_of(address: str, config: TrainingConfig | None, parameters: Mapping[str, Any]) -> TrainingConfig:
    """The configuration of a membership; for the arguments, see `trainer.elastic.join`. Raises ConfigError."""
    # The address
    found = re.fullmatch(r"etcd://([^/?#]+)/([^/?#]+)/?", address)
    if "@" in address:
        hidden = re.sub(r"//.*@", "//…@", address)
        raise ConfigError("address", hidden, "must not contain credentials: pass etcd_user, and set ETCD_PASSWORD")
    if found is None:
        raise ConfigError("address", address, _SHAPE)

    # The parameters
    known = {parameter.name: parameter for parameter in TrainingConfig.parameters()}
    for name, value in parameters.items():
        if name in ("run_id", "etcd_endpoints"):
            raise ConfigError(name, value, "is part of the address")
        if name in _ARGUMENTS:
            raise ConfigError(name, value, f"is an argument of DiLoCo: {_ARGUMENTS[name]}")
        if name not in known:
            raise ConfigError(name, "…", unknown(name, dict.fromkeys(PARAMETERS)))
        if name not in PARAMETERS:
            raise ConfigError(name, value, f"has no effect on your own loop; these have: {', '.join(PARAMETERS)}")
    others = (config or load_config()).to_flat()
    values = {name: others[name] for name in PARAMETERS}
    if SLOT_VARIABLE in os.environ:  # the agent numbers the workers of its node
        values["elastic_nproc_per_node"] = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = {"etcd_endpoints": found[1].split(","), "run_id": found[2]}
    return TrainingConfig.from_flat({**values, **_NO_RULE, **place, **parameters})


def recorded(config: TrainingConfig, diloco: "DiLoCo") -> dict[str, Any]:
    """The tree of the effective parameters, with the loop's schedule, for the event log."""
    flat, tree = config.to_flat(), dict[str, Any]()
    for parameter in TrainingConfig.parameters():
        if parameter.name in ("run_id", "etcd_endpoints", *_NO_RULE, *PARAMETERS):
            put(tree, parameter.path, flat[parameter.name])
    fragments, schedule = diloco.contribution.fragments, diloco.schedule
    loop = {"local_steps": schedule.round_steps * fragments, "total_steps": schedule.total_steps}
    return {**tree, **loop, "fragments": fragments, "codec": diloco.state.full_model.codec.name}


def fingerprint_of(config: TrainingConfig, diloco: "DiLoCo") -> dict[str, Json]:
    """Values that must be equal in all workers, by name: parameter shapes, schedule, codec, outer optimizer."""
    shapes = [tuple(one.shape) for name, one in diloco.global_tensors().items() if name.startswith("model.")]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    codec, outer, schedule = diloco.state.full_model.codec, diloco.state.outer, diloco.schedule
    merge = diloco.state.full_model.merge
    settings = [f"{name}={value}" for name, value in sorted(vars(outer).items()) if isinstance(value, int | float)]
    return {
        "protocol": PROTOCOL,
        "parameters": f"{diloco.state.parameters.numel()} in {len(shapes)} tensors ({digest})",
        "sync_every": schedule.round_steps * diloco.contribution.fragments,
        "total_steps": schedule.total_steps,
        "fragments": diloco.contribution.fragments,
        "codec": f"{codec.name}, {codec.row} bytes for {codec.block} numbers, feedback {codec.feedback:g}",
        "outer": f"{type(outer).__name__}({', '.join(settings)})",
        "merge": f"{'rda' if merge.tensors else 'sqrt' if merge.root else 'mean'}, clip_members={merge.clip}",
        "overlap": repr(diloco.overlap),
        **{name: getattr(config, name) for name in ("batch_size", "seed", "transport_security")},
    }
