"""Checks before anything starts, so that bad input fails early and leaves nothing half-written."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from trainer import checkpoint, data, models
from trainer.config import ScopeName, TrainingConfig
from trainer.data.manifest import read_manifest
from trainer.errors import ConfigError, TrainingError, one_line
from trainer.etcd.client import local_address
from trainer.etcd.errors import EtcdError
from trainer.files import require_free_space, require_writable
from trainer.process import address_of, listen, loopback
from trainer.volume import Volume, worker_configs

LEAST_FREE_BYTES = 100 << 20


def check(config: TrainingConfig, *, precached: bool = False, network: bool = True, joins: bool = False) -> None:
    """Check a resolved configuration against this machine. Writes nothing.

    Args:
        config: The run's configuration.
        precached: Whether every worker's dataset must already exist; its source is then not required.
        network: Whether workers will listen on this machine.
        joins: Whether missing data can be fetched from another machine of the run.

    Raises:
        ConfigError: Something is missing, taken, or contradicts the run's checkpoints.
    """
    # Model, data and device
    models.check_blocks(config)
    if precached or joins:
        data.resolve(config).check_parameters()
    else:
        data.check(config)
    if config.device != "cpu":  # otherwise torch need not be imported
        from trainer.device import device_of

        device_of(config, max(config.island, 1) - 1)  # an island's last process
    if config.compile_model:
        from trainer.worker.compilation import check_backend

        check_backend(config)
    # What the run uses besides: etcd's certificates, the hub, an earlier checkpoint
    for name, path in config.etcd.model_dump(include={"ca", "cert", "key"}).items():
        if path and not Path(path).is_file():
            raise ConfigError(f"etcd.{name}", path, "no such file")
    _check_upload(config)
    _check_resume(config)
    # This machine's ports and disk
    if network:
        check_network(config)
    require_writable(Path(config.run_dir), "run_dir", make=False)
    require_free_space(Path(config.run_dir), LEAST_FREE_BYTES, "run_dir")
    # Each worker's own copy of the data
    if precached:
        try:
            for worker in worker_configs(config):
                data.require_dataset(data.directory(worker, Volume.of(worker).datasets))
        except ConfigError:
            data.check(config)  # prefer the reason why it cannot be precached, if there is one
            raise


def check_network(config: TrainingConfig) -> None:
    """Raise ConfigError unless the workers and the embedded etcd can listen as configured."""
    interfaces = psutil.net_if_addrs()
    if config.network_interface and config.network_interface not in interfaces:
        raise ConfigError("network_interface", config.network_interface, f"must be one of {', '.join(interfaces)}")
    for address in config.addresses:  # it may belong to a NAT rather than to this machine
        try:
            address_of(address)
        except OSError:
            raise ConfigError("advertise_address", address, "is neither an address nor a resolvable name") from None
    if config.transport_certificates:
        from trainer.transport.credentials import credentials

        credentials(b"any secret of a run", config.transport_security, config.transport_certificates)
    # The range must have a port for each process that listens
    if not config.port_range:
        return
    workers, etcds = config.nodes * config.workers_per_node, int(not config.etcd.endpoints)
    # Each worker listens for members that fetch its state; of the baseline's workers, only the first one listens
    needed = etcds + (1 if config.optim_method == "ddp" else workers)
    low, high = map(int, config.port_range.split("-"))
    if high - low + 1 < needed:
        allowed = f"must hold {needed} ports: {workers} workers" + (" and an etcd" if etcds else "") + " listen here"
        raise ConfigError("port_range", config.port_range, allowed)
    # That many of its ports must be free
    address = config.addresses[0] if config.addresses else loopback()
    if config.etcd.endpoints and not config.advertise_address:
        with suppress(EtcdError):
            address = local_address(config.etcd.endpoints[0])
    free = 0
    with ExitStack() as listeners, suppress(ConfigError):
        while free < needed:  # each socket stays open, so that the next one gets another port
            listeners.enter_context(listen(address, config.port_range))
            free += 1
    if free < needed:
        raise ConfigError("port_range", config.port_range, f"has {free} free ports, but {needed} are needed")


def _check_upload(config: TrainingConfig) -> None:
    if not config.hf_upload:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = config.trained_model_hf_name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError("trained_model_hf_name", name, f"is not a valid Hub repository: {one_line(error)}") from None
    if not os.environ.get("HF_TOKEN"):
        raise ConfigError("hf_upload", True, "needs HF_TOKEN in the environment")


def _check_resume(config: TrainingConfig) -> None:
    """Check the configuration against the run's checkpoints, and the checkpoint to start from. Raises ConfigError."""
    began_with = Path(config.resume).absolute() if config.resume not in ("auto", "never") else None
    if began_with:
        try:
            state = checkpoint.read(began_with).state
        except TrainingError as error:
            allowed = f"must be auto, never, or the directory of a checkpoint ({error})"
            raise ConfigError("resume", config.resume, allowed) from None
        _check_fit("resume", config.resume, config, state)
    for worker in worker_configs(config):
        for local_rank in range(config.workers_per_node):
            volume = Volume.of(worker, local_rank)
            if config.resume == "never" and checkpoint.paths(volume.checkpoints):
                where = f"run {config.run_id} has checkpoints in {volume.checkpoints}"
                raise ConfigError("resume", "never", f"{where}; choose another run_id")
            if state := checkpoint.newest_state(volume.checkpoints):
                # A run that started from that checkpoint and was interrupted resumes from its own checkpoints
                if began_with and Path(state["config"].get("resume", "")).absolute() != began_with:
                    where = f"run {config.run_id} has its own checkpoints in {volume.checkpoints}"
                    raise ConfigError("resume", config.resume, f"{where}: leave it out, or choose another run_id")
                _check_same(worker, volume, state)


def _check_same(worker: TrainingConfig, volume: Volume, state: dict[str, Any]) -> None:
    """Raise ConfigError if the run's newest checkpoint contradicts the configuration."""
    then, advice = state["config"], "keep that, or choose another run_id"
    where = f"the checkpoints in {volume.checkpoints}"
    _check_fit("model", worker.model, worker, state)
    embedded = not worker.etcd.endpoints and (Path(worker.run_dir).parent / "etcd").exists()
    scope: ScopeName = "fingerprint" if embedded else "fixed"
    try:
        recorded = TrainingConfig.from_tree({**worker.model_dump(mode="json"), **then}).in_scope(scope)
    except ConfigError as error:
        made = f"{where} were written by another version ({error}): choose another run_id"
        raise ConfigError("run_id", worker.run_id, made) from None
    for name, value in worker.in_scope(scope).items():
        if recorded[name] != value:
            raise ConfigError(name, value, f"{where} have {recorded[name]}: {advice}")
    manifest = read_manifest(data.directory(worker, volume.datasets))
    if manifest is not None and state.get("dataset", manifest.hash) != manifest.hash:
        other = f"{where} belong to other data ({then.get('dataset', 'unknown')}, tokenizer {then.get('tokenizer')!r})"
        raise ConfigError("dataset", worker.dataset, f"{other}: {advice}")


def _check_fit(field: str, value: str, config: TrainingConfig, state: dict[str, Any]) -> None:
    """Raise ConfigError if a checkpoint is of another model, or beyond the end of the run."""
    model = state["config"].get("model", "")
    try:
        same = models.resolve(model).name == models.resolve(config.model).name
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(field, value, f"the checkpoint is of model {model!r}, this run's is {config.model!r}")
    if (step := state.get("step", 0)) > config.total_steps:
        raise ConfigError("total_steps", config.total_steps, f"the checkpoint is already at step {step}")
