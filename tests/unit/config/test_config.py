"""`TrainingConfig`: precedence, names, refusals."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from trainer.config import UNSET, Parameter, TrainingConfig, given, load_config
from trainer.errors import ConfigError


def test_flag_beats_environment_beats_yaml_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("local_steps: 5\nlr: 0.5\nseed: 1\nelastic:\n  max_restarts: 7\n")
    config = load_config(
        file, {"local_steps": "9"}, {"DILOCO_LOCAL_STEPS": "8", "DILOCO_LR": "0.25", "DILOCO_ELASTIC_ETCD_PREFIX": "/x"}
    )
    assert (config.local_steps, config.lr, config.seed, config.compression_decay) == (9, 0.25, 1, 0.9)
    assert (config.elastic.max_restarts, config.elastic.etcd.prefix) == (7, "/x")


ELSEWHERE = {"name": "a", "cluster": "oslo", "etcd_endpoints": ["etcd.example:2379"]}
REFUSED = {
    "unknown flag value": ({"optim_method": "adam"}, "optim_method = 'adam': must be one of sgd, demo, ddp"),
    "indivisible batch": (
        {"batch_size": 30, "per_device_train_batch_size": 4},
        "batch_size = 30: must be a multiple of per_device_train_batch_size (4)",
    ),
    "too long a warm-up": ({"total_steps": 10}, "warmup_steps = 1000: must be at most total_steps (10)"),
    "timeouts out of order": ({"grace_period": 20}, "lease_ttl = 15.0: must be greater than grace_period (20.0)"),
    "nccl between DiLoCo workers": (
        {"pgroup_backend": "nccl"},
        "pgroup_backend = 'nccl': needs optim_method = 'ddp' and GPUs (device = 'cuda'): DiLoCo has its own transport",
    ),
    "nccl on CPUs": (
        {"pgroup_backend": "nccl", "optim_method": "ddp", "device": "cpu"},
        "pgroup_backend = 'nccl': needs optim_method = 'ddp' and GPUs (device = 'cuda')",
    ),
    "codec": (
        {"codec": "zip"},
        "codec = 'zip': must be one of fp32, bf16, int8, int4, int3, int2, ternary, sign, sparse",
    ),
    "outer optimizer": ({"outer_optimizer": "adam"}, "outer_optimizer = 'adam': must be one of nesterov"),
    "unequal, baseline": (
        {"heterogeneous": True, "optim_method": "ddp", "nodes": 2, "elastic_min_nodes": 2, "elastic_max_nodes": 2},
        "heterogeneous = True: cannot be combined with optim_method = 'ddp', which averages",
    ),
    "unequal, rounds": (
        {"heterogeneous": True, "local_steps": 16, "fragments": 4},
        "heterogeneous = True: needs rounds of at least 8 inner steps (local_steps / fragments) to divide by speed",
    ),
    "unequal, bounds": (
        {"heterogeneous": True, "min_batch_size": 64, "max_batch_size": 32},
        "max_batch_size = 32: must be at least min_batch_size (64)",
    ),
    "unequal, no size": (
        {"heterogeneous": True, "batch_size": 34, "per_device_train_batch_size": 34, "max_batch_size": 16},
        "batch_size = 34: must be a multiple of a number from min_batch_size (16) to max_batch_size (16)",
    ),
    "quantization and another codec": (
        {"quantization": True, "codec": "sign"},
        "quantization = True: means codec = 'int8', and disagrees with codec = 'sign'",
    ),
    "fragments": ({"fragments": 3}, "fragments = 3: must divide local_steps (128)"),
    "tau": ({"fragments": 4, "overlap_tau": 32}, "overlap_tau = 32: must be less than local_steps / fragments (32)"),
    "sparse twice": ({"optim_method": "demo", "codec": "sparse"}, "codec = 'sparse': cannot be combined with"),
    "two decays": ({"optim_method": "demo", "error_feedback": 0.5}, "error_feedback = 0.5: cannot be combined with"),
    "topk that does not fill bytes": (
        {"optim_method": "demo", "codec": "ternary"},
        "compression_topk = 32: must be a multiple of 5: codec = 'ternary' packs 5 values together",
    ),
    "ddp with a codec": (
        {"optim_method": "ddp", "codec": "int8"},
        "codec = 'int8': cannot be combined with optim_method = 'ddp'",
    ),
    "pods without volumes": (
        {"launcher": "pytorchjob", "storage_enabled": False},
        "storage.enabled = False: must be true with launcher = 'pytorchjob'",
    ),
    "too few ports for a pod": (
        {"launcher": "pytorchjob", "port_range": "7000-7009"},
        "port_range = '7000-7009': must be at least 256 ports from 1024 on",
    ),
    "sites that do not add up": (
        {"sites": [{"name": "a"}]},
        "sites = '1 replicas in total': must add up to nodes (2)",
    ),
    "two sites of a name": ({"sites": [{"name": "a"}, {"name": "a"}]}, "sites = 'a': is the name of two sites"),
    "field of a site": ({"sites": [{"name": "a", "replicas": 0}]}, "sites.0.replicas = 0: must be greater than 0"),
    "unknown field of a site": ({"sites": [{"name": "a", "replica": 2}]}, "sites.0.replica = 2: no such parameter"),
    "toleration of a site": (
        {"sites": [{"name": "a", "replicas": 2, "tolerations": [{"key": "x", "effect": "NoRun"}]}]},
        "sites.0.tolerations.0.effect = 'NoRun': must be '', 'NoSchedule', 'PreferNoSchedule' or 'NoExecute'",
    ),
    "namespace": ({"deployment_namespace": "My_team"}, "deployment_namespace = 'My_team': must be lower-case letters"),
    "launcher of a site of this cluster": (
        {"sites": [{"name": "a", "launcher": "trainjob"}], "nodes": 1},
        "sites.0.launcher = 'trainjob': needs another cluster",
    ),
    "launchers of a cluster's sites": (
        {"sites": [{**ELSEWHERE, "launcher": "trainjob"}, {**ELSEWHERE, "name": "b"}], "port_range": "7000-7999"},
        "sites.1.launcher = 'auto': must be that of the same cluster's other sites (trainjob)",
    ),
    "no etcd that another cluster sees": (
        {"sites": [{"name": "a", "cluster": "oslo"}], "nodes": 1, "port_range": "7000-7999"},
        "sites.0.etcd_endpoints = '[]': must name etcd as this cluster sees it, because etcd.endpoints is empty",
    ),
    "etcd's port for a site": (
        {"sites": [{"name": "a", "etcd_endpoints": ["etcd"]}], "nodes": 1},
        "sites.0.etcd_endpoints = 'etcd': must be host:port",
    ),
    "several clusters without known ports": (
        {"sites": [ELSEWHERE], "nodes": 1},
        "port_range = '': must be set with sites in several clusters",
    ),
    "one address for two workers": (
        {"sites": [{"name": "a", "replicas": 2, "advertise_address": "203.0.113.7"}]},
        "sites.0.advertise_address = '203.0.113.7': needs a site of one replica",
    ),
    "name of a cluster's Secret": (
        {"sites": [{"name": "a", "cluster": "Oslo"}]},
        "sites.0.cluster = 'Oslo': must be empty, or lower-case letters",
    ),
    "name of a site": ({"sites": [{"name": "A_b"}]}, "sites.0.name = 'A_b': must be lower-case letters"),
    "name of the deployment": (
        {"deployment_name": "x-"},
        "deployment_name = 'x-': must be lower-case letters, digits and -, begin with a letter",
    ),
    "election before heartbeats": (
        {"etcd_election_timeout": 1000},
        "etcd.election_timeout = 1000: must be at least 5 times etcd.heartbeat_interval (500)",
    ),
    "more sockets than NCCL has": (
        {"elastic_nccl_nsocks_per_thread": 16, "elastic_nccl_socket_nthreads": 8},
        "elastic.nccl.nsocks_per_thread = 16: times socket_nthreads (8) must be at most 64",
    ),
    "too few nodes": (
        {"elastic_min_nodes": 3},
        "nodes = 2: must be from elastic.min_nodes (3) to elastic.max_nodes (2)",
    ),
    "island of the baseline": (
        {"inner_parallel": "ddp", "optim_method": "ddp"},
        "inner_parallel = 'ddp': cannot be combined with optim_method = 'ddp'",
    ),
    "island on one GPU": (
        {"inner_parallel": "fsdp", "elastic_nproc_per_node": 2, "device": "cuda:1"},
        "device = 'cuda:1': must be cuda without an index, or cpu, with inner_parallel = 'fsdp'",
    ),
    "batch that an island cannot share": (
        {"inner_parallel": "ddp", "elastic_nproc_per_node": 3},
        "batch_size = 512: must be a multiple of elastic.nproc_per_node (3) times per_device_train_batch_size (32)",
    ),
    "muon on shards": (
        {"inner_parallel": "fsdp", "inner_optimizer": "muon"},
        "inner_optimizer = 'muon': must be adamw with inner_parallel = 'fsdp'",
    ),
    "elastic baseline": ({"optim_method": "ddp", "elastic_min_nodes": 1}, "elastic.min_nodes = 1: must equal"),
    "ports": ({"port_range": "9-3"}, "port_range = '9-3': must be low-high"),
    "port of etcd": ({"etcd_endpoints": ["etcd"]}, "etcd.endpoints = 'etcd': must be host:port"),
    "alias that disagrees": (
        {"etcd_endpoints": ["a:1"], "elastic_etcd_external_endpoint": "b:2"},
        "elastic.etcd.external_endpoint = 'b:2': disagrees",
    ),
    "half a client certificate": (
        {"etcd_cert": "c.pem"},
        "etcd.key = '': etcd.cert and etcd.key must be given together",
    ),
    "upload without a name": ({"hf_upload": True}, "trained_model_hf_name = '': must name a repository"),
    "text for a number": ({"lr": "fast"}, "lr = 'fast': must be a valid number"),
    "slash in the run id": ({"run_id": "../x"}, "run_id = '../x'"),
    "run id of dots": ({"run_id": ".."}, "run_id = '..': must be at most 63 letters, digits and . _ -"),
    "run id like a flag": ({"run_id": "-x"}, "run_id = '-x'"),
    "other name of the run id": ({"elastic_etcd_run_id": ".."}, "elastic.etcd.run_id = '..'"),
    "infinity": ({"lr": "inf"}, "lr = 'inf': must be a finite number"),
    "not a number": ({"grace_period": float("nan")}, "grace_period = nan: must be a finite number"),
    "true for a number": ({"nodes": True}, "nodes = True: must be a number"),
    "seed beyond 63 bits": ({"seed": 2**63}, f"seed = {2**63}: must be less than {2**63}"),
    "too many nodes": ({"nodes": 65}, "nodes = 65: must be less than or equal to 64"),
    "too many elastic nodes": ({"elastic_max_nodes": 65}, "elastic.max_nodes = 65: must be less than or equal to 64"),
    "port of etcd too high": ({"etcd_endpoints": ["h:65536"]}, "etcd.endpoints = 'h:65536': must be host:port"),
    "port of etcd in superscript": ({"etcd_endpoints": ["h:²"]}, "etcd.endpoints = 'h:²': must be host:port"),
    "IPv6 address without brackets": (
        {"etcd_endpoints": ["::1:2379"]},
        "etcd.endpoints = '::1:2379': must be host:port or [IPv6 address]:port",
    ),
    "URL of etcd": ({"etcd_endpoints": ["http://h:2379"]}, "etcd.endpoints = 'http://h:2379': must be host:port"),
    "user of an embedded etcd": (
        {"launcher": "local", "etcd_user": "me"},
        "etcd.user = 'me': needs an external etcd (etcd.endpoints)",
    ),
    "TLS of an embedded etcd": (
        {"launcher": "local", "elastic_etcd_protocol": "https", "etcd_ca": "ca.pem"},
        "etcd.ca = 'ca.pem': needs an external etcd",
    ),
    "project that W&B does not take": ({"wandb_project_name": "a/b"}, "wandb_project_name = 'a/b': must be at most"),
    "run id that W&B does not take": ({"wandb_run_id": "a:b"}, "wandb_run_id = 'a:b': must be at most"),
    "tag that W&B does not take": ({"experiment_tags": ["x" * 65]}, "experiment_tags = 'xxx"),
    "device": ({"device": "tpu"}, "device = 'tpu': must be cpu, cuda or cuda:<index>"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_values_are_refused_with_field_value_and_what_is_allowed(name: str) -> None:
    values, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainingConfig.from_flat(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("locl_steps: 3", "locl_steps = '3': no such parameter; did you mean local_steps?"),
        ("elastic:\n  min_node: 3", "elastic.min_node = '3': no such parameter; did you mean elastic.min_nodes?"),
        ("elastic: 3", "elastic = '3'"),
        ("- a", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("lr: 2001-99-99", "lr = '2001-99-99': must be a valid number"),
        ("a: {" * 5000, "is nested too deeply"),
        ("1: 2", "1 = '2': a parameter's name must be a word"),
        ("elastic: {yes: 2}", "elastic.yes = '2': no such parameter"),
        ("? [a]\n: 2", "a sequence = '2': a parameter's name must be a word"),
        ("lr: 1\nseed: 1\nlr: 2", "lr = '2': is given twice: in lines 1 and 3 of "),
        ("hf_token: s3cret\nhf_token: s3cret", "hf_token = '…': is given twice"),
        ("elastic: {min_nodes: true}", "elastic.min_nodes = 'true': must be a valid integer"),
        ("lr: .inf", "lr = '.inf': must be a valid number"),
        ("seed: 1\nrun_id:", "run_id = '': has no value: leave line 2 of "),
        ("elastic.max_restarts: ~", "elastic.max_restarts = '~': has no value: leave line 1 of "),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, {}, {})


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean DILOCO_LOCAL_STEPS"):
        load_config(None, {}, {"DILOCO_LOCAL_STEP": "3"})


@pytest.mark.parametrize("name", ["wandb_user_key", "huggingface_token", "etcd.password"])
def test_a_secret_is_refused_and_not_shown(tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.yaml"
    group, _, leaf = name.rpartition(".")
    file.write_text(yaml.safe_dump({group: {leaf: "s3cret"}} if group else {leaf: "s3cret"}))
    with pytest.raises(ConfigError, match="is a secret") as caught:
        load_config(file, {}, {})
    assert "s3cret" not in str(caught.value)


def test_lists_and_none_from_text() -> None:
    config = load_config(None, {"experiment_tags": "a, b", "max_samples": "none", "sites": "[]"}, {})
    assert (config.experiment_tags, config.max_samples, config.sites) == (["a", "b"], UNSET, [])
    assert load_config(None, {"experiment_tags": '["x, y"]'}, {}).experiment_tags == ["x, y"]


def test_flat_names_are_unique_and_round_trip() -> None:
    parameters = TrainingConfig.parameters()
    assert len({parameter.name for parameter in parameters}) == len(parameters)
    assert all(parameter.description.endswith(".") for parameter in parameters)
    assert {parameter.type for parameter in parameters} <= {str, int, float, bool, list, dict}
    assert all(parameter.type is type(parameter.default) for parameter in parameters), "none is null"
    config = TrainingConfig.from_flat({"nodes": 3, "etcd_endpoints": ["h:1"], "experiment_description": 'say "hi"'})
    assert TrainingConfig.from_flat(config.to_flat()) == config
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_parameter_of_the_reference_is_there() -> None:
    """The names of the reference, in snake_case, and their defaults."""
    reference = {
        "deployment_name": "diloco-training-job", "nodes": 2, "cpu_cores": 16,
        "memory_gb": 32, "ephemeral_storage_gb": 100, "gpu_count": 1, "gpu_vendor": "NVIDIA", "gpu_type": "A100",
        "gpu_memory": 80, "storage_enabled": True, "storage_size_gb": 100, "storage_storage_class_name": "",
        "storage_access_mode": "ReadWriteOnce", "elastic_nproc_per_node": 1, "elastic_max_restarts": 3,
        "elastic_rdzv_timeout": 1800, "elastic_gpu_distribution": "auto", "elastic_nccl_debug": "INFO",
        "elastic_nccl_async_error_handling": 1, "elastic_nccl_timeout": 1800, "elastic_nccl_ib_timeout": 22,
        "elastic_nccl_nsocks_per_thread": 8, "elastic_nccl_socket_nthreads": 4, "elastic_nccl_socket_ifname": "",
        "elastic_etcd_external_endpoint": "", "elastic_etcd_prefix": "/torchelastic", "elastic_etcd_protocol": "http",
        "elastic_etcd_run_id": "", "etcd_enabled": True, "etcd_replica_count": 3, "etcd_heartbeat_interval": 500,
        "etcd_election_timeout": 5000, "etcd_snapshot_count": 100000, "etcd_auto_compaction_mode": "periodic",
        "etcd_auto_compaction_retention": "1h", "gpu_nvidia_enabled": True, "gpu_nvidia_min_nodes": UNSET,
        "gpu_nvidia_max_nodes": UNSET, "gpu_nvidia_runtime_class_name": "nvidia", "gpu_amd_enabled": True,
        "gpu_amd_runtime_class_name": "", "model": "gpt-neo-x", "dataset": "c4", "local_steps": 128, "lr": 4e-4,
        "outer_lr": UNSET, "warmup_steps": 1000, "total_steps": 30000, "per_device_train_batch_size": 32,
        "batch_size": 512, "optim_method": "sgd", "quantization": False, "async_communication": False,
        "model_cache_dir": "/data/models", "dataset_cache_dir": "/data/datasets",
        "checkpoint_path": "/data/checkpoints/checkpoint.pth", "checkpoint_interval": 512, "device": "cuda",
        "wandb_project_name": "diloco", "wandb_group": "diloco-gptneo-c4", "wandb_run_id": "", "heterogeneous": False,
        "min_batch_size": 16, "max_batch_size": 512, "group_perc_variance": 0.15, "compression_decay": 0.9,
        "compression_topk": 32, "seed": 42, "wandb_logging": True, "compile_model": False,
        "compile_backend": "inductor", "compile_mode": "default", "hf_upload": False, "trained_model_hf_name": "",
        "pgroup_backend": "",
    }  # fmt: skip
    ours = TrainingConfig().to_flat()
    assert {name: ours[name] for name in reference} == reference
    assert TrainingConfig().outer_rate == 0.7
    assert {"deployment_image", "gpu_nvidia_image", "gpu_amd_image", "experiment_description"} <= ours.keys()
    # Two differ on purpose: a lost node does not stop the others, and the namespace is the pipeline's.
    config = TrainingConfig()
    assert (config.min_nodes, config.max_nodes) == (1, 2)
    assert TrainingConfig(optim_method="ddp").min_nodes == 2
    assert (config.deployment_namespace, config.resolved().deployment_namespace) == ("", "default")


UNSETTABLE = [parameter for parameter in TrainingConfig.parameters() if parameter.may_be_unset]


@pytest.mark.parametrize("parameter", UNSETTABLE, ids=lambda parameter: parameter.name)
def test_a_number_that_is_not_given_is_minus_one_however_that_is_written(parameter: Parameter) -> None:
    assert parameter.default == UNSET
    assert f"{UNSET}: " in parameter.description
    for empty in (None, "", " ", "none", "NULL", UNSET, float(UNSET), str(UNSET), f"{UNSET}.0"):
        value = TrainingConfig.from_flat({parameter.name: empty}).to_flat()[parameter.name]
        assert (value, type(value)) == (UNSET, parameter.type)
    with pytest.raises(ConfigError, match=rf"{parameter.path[-1]} = -2.*, or {UNSET}$"):
        TrainingConfig.from_flat({parameter.name: -2})


def test_what_a_number_that_is_not_given_means() -> None:
    assert [given(number) for number in (UNSET, float(UNSET), 0, 0.0, 7)] == [None, None, 0, 0.0, 7]
    assert TrainingConfig(outer_momentum=0).momentum == 0, "plain SGD, and not the default"
    assert TrainingConfig(codec="sign", error_feedback=0).feedback == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nodes": 1}, "1 node"),
        ({"nodes": 1, "elastic_max_nodes": 2}, "1 node; up to 2 can train (elastic.max_nodes)"),
        ({}, "2 nodes; training continues while at least 1 is available (elastic.min_nodes=1)"),
        ({"nodes": 4, "elastic_min_nodes": 3}, "4 nodes; training continues while at least 3 are available"),
        ({"elastic_min_nodes": 2}, "2 nodes, all of them required: if one is missing, the others wait"),
        ({"optim_method": "ddp"}, "2 nodes, all of them required"),
    ],
)
def test_a_run_says_what_the_fewest_nodes_mean(values: dict[str, object], words: str) -> None:
    said = TrainingConfig.from_flat(values).attendance
    assert said.startswith(words) and ("up to" in said) is ("up to" in words)


def test_text_that_may_not_be_empty_is_known() -> None:
    for parameter in TrainingConfig.parameters():
        if parameter.type is not str:
            continue
        try:
            TrainingConfig.from_flat({parameter.name: ""})
        except ConfigError as error:
            assert error.field == ".".join(parameter.path)
            assert not parameter.may_be_empty, parameter.name
        else:
            assert parameter.may_be_empty, parameter.name


def test_null_does_not_appear_among_the_values() -> None:
    sites = [{"name": "here", "replicas": 2, "tolerations": [{"key": "spot", "operator": "Exists"}]}]
    text = json.dumps(TrainingConfig.from_flat({"sites": sites}).to_flat())
    assert "null" not in text


def test_resolved_fills_run_id_and_run_dir() -> None:
    config = TrainingConfig().resolved()
    assert config.run_dir == f"runs/{config.run_id}"
    assert TrainingConfig(run_id="mine", run_dir="there").resolved().run_dir == "there"


def test_scopes_are_lists_of_parameters_with_their_effective_values() -> None:
    config = TrainingConfig(codec="sign", overlap_tau=3, group_perc_variance=0.5, elastic={"nproc_per_node": 2})
    fingerprint = config.in_scope("fingerprint")
    assert tuple(fingerprint) == TrainingConfig.names_in_scope("fingerprint")
    assert fingerprint["outer_momentum"] == 0.5, "as the codec's feedback makes it"
    assert fingerprint["async_communication"] is True, "overlap_tau overlaps, too"
    assert fingerprint["group_perc_variance"] == 0, "no effect unless heterogeneous"
    assert set(TrainingConfig.names_in_scope("fixed")) < set(fingerprint)
    assert {"run_id", "run_dir", "etcd_endpoints"} <= set(TrainingConfig.names_in_scope("identity"))


@pytest.mark.parametrize("yes", [True, "true", "Yes", "on", "1", 1])
def test_aliases_set_what_they_stand_for(yes: object) -> None:
    assert TrainingConfig.from_flat({"quantization": yes}).codec == "int8"
    given = {"elastic_etcd_run_id": "mine", "elastic_etcd_external_endpoint": "h:1"}
    config = TrainingConfig.from_flat(given)
    assert (config.run_id, config.etcd.endpoints) == ("mine", ["h:1"])
    assert TrainingConfig.from_flat(config.to_flat()) == config
    assert given == {"elastic_etcd_run_id": "mine", "elastic_etcd_external_endpoint": "h:1"}


@pytest.mark.parametrize(
    ("values", "backend"),
    [
        ({}, "gloo"),
        ({"optim_method": "ddp"}, "nccl"),
        ({"optim_method": "ddp", "pgroup_backend": "nccl", "device": "cuda:1"}, "nccl"),
        ({"optim_method": "ddp", "pgroup_backend": "gloo"}, "gloo"),
        ({"optim_method": "ddp", "device": "cpu"}, "gloo"),
    ],
)
def test_data_parallelism_on_gpus_uses_nccl(values: dict[str, object], backend: str) -> None:
    assert TrainingConfig.from_flat(values).process_group_backend == backend


def test_a_machine_that_joins_takes_the_runs_parameters_and_keeps_its_own(etcd: str) -> None:
    from trainer.elastic.keys import joined, record_config
    from trainer.etcd.client import EtcdClient

    values = {"dataset": "stdlib", "local_steps": 30, "batch_size": 12, "nodes": 1, "elastic_max_nodes": 3}
    values["per_device_train_batch_size"] = 4
    place = {"run_id": "to-be-joined", "etcd_endpoints": [etcd]}
    run = TrainingConfig.from_flat({**place, **values, "elastic_min_nodes": 1, "device": "cpu", "run_dir": "/founder"})
    with EtcdClient.of(run) as client:
        assert joined(client, run) == run  # it begins here
        record_config(client, run)
        here = joined(client, TrainingConfig.from_flat({**place, "lease_ttl": 30, "device": "cuda:1"}))
        assert (here.dataset, here.local_steps, here.batch_size) == ("stdlib", 30, 12)
        assert (here.max_nodes, here.nodes, here.lease_ttl, here.device, here.run_dir) == (3, 2, 30, "cuda:1", "")
        assert here.per_device_train_batch_size == 12, "the largest that divides the run's batch"
        assert joined(client, TrainingConfig.from_flat({**place, "nodes": 1})).nodes == 1
        for name, value in (("local_steps", 5), ("dataset", "c4"), ("codec", "int8")):
            with pytest.raises(
                ConfigError, match=f"{name} = .* run to-be-joined has .*: leave it out to join that run"
            ):
                joined(client, TrainingConfig.from_flat({**place, name: value}))


def test_a_machine_that_joins_may_have_a_layout_of_its_own(etcd: str) -> None:
    from trainer.elastic.keys import joined, record_config
    from trainer.etcd.client import EtcdClient

    place = {"run_id": "of-islands", "etcd_endpoints": [etcd]}
    values = {"batch_size": 24, "per_device_train_batch_size": 3, "elastic_nproc_per_node": 8, "inner_parallel": "fsdp"}
    run = TrainingConfig.from_flat({**place, **values})
    with EtcdClient.of(run) as client:
        record_config(client, run)
        for own, island, at_once in (
            ({}, 8, 3),
            ({"inner_parallel": "none"}, 0, 24),
            ({"inner_parallel": "ddp", "elastic_nproc_per_node": 2}, 2, 12),
            ({"elastic_nproc_per_node": 4}, 4, 6),
        ):
            here = joined(client, TrainingConfig.from_flat({**place, **own}))
            assert (here.island, here.workers_per_node, here.per_device_train_batch_size) == (island, 1, at_once)


def test_a_single_node_may_join_a_run_that_needs_two() -> None:
    values = {"nodes": 1, "elastic_min_nodes": 2, "elastic_max_nodes": 2}
    with pytest.raises(ConfigError, match="nodes = 1: must be from"):
        TrainingConfig.from_flat(values)
    config = TrainingConfig.from_flat({**values, "etcd_endpoints": ["elsewhere:2379"]})
    assert "1 of at least 2 nodes" in config.attendance
    with pytest.raises(ConfigError, match="nodes = 1: must be from"):
        TrainingConfig.from_flat({**values, "etcd_endpoints": ["elsewhere:2379"], "launcher": "pytorchjob"})


def test_what_belongs_to_a_machine_or_is_secret_is_not_the_runs() -> None:
    shared = TrainingConfig().of_the_run()
    assert {"model", "dataset", "local_steps", "lease_ttl", "elastic_min_nodes"} < shared.keys()
    local = {"device", "run_dir", "run_id", "advertise_address", "network_interface", "port_range", "nodes", "resume"}
    assert not shared.keys() & {*local, "etcd_user", "etcd_endpoints", "checkpoint_path"}


def from_yaml(text: str, folder: Path) -> TrainingConfig:
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "config.yaml", {}, {})


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("elastic:\n", "elastic_min_nodes", -1),
        ("elastic: {}\n", "elastic_min_nodes", -1),
        ("elastic.min_nodes: 2\n", "elastic_min_nodes", 2),
        ("elastic.etcd:\n  prefix: /x\n", "elastic_etcd_prefix", "/x"),
        ("run_id: 2024-01-01\n", "run_id", "2024-01-01"),
        ("run_id: 0123\n", "run_id", "0123"),
        ("run_id: no\n", "run_id", "no"),
        ("run_id: 12e3\n", "run_id", "12e3"),
        ("run_id: 1.10\n", "run_id", "1.10"),
        ("lr: 1e-3\n", "lr", 0.001),
        ("total_steps: 1_000\n", "total_steps", 1000),
        ("total_steps: 01000\n", "total_steps", 1000),
        ("heterogeneous: on\n", "heterogeneous", True),
        ("experiment_tags: [2024, no, 1.10]\n", "experiment_tags", ["2024", "no", "1.10"]),
        ("experiment_tags: [a]\n# after\n", "experiment_tags", ["a"]),
        ("\ufeffrun_id: marked\n", "run_id", "marked"),
        ("", "run_id", ""),
        ("base: &b {min_nodes: 2}\n", "", "base = "),
        ("total_steps: 12:30:00\n", "", "total_steps = '12:30:00'"),
        ("elastic: {min_nodes: 2}\nelastic.min_nodes: 3\n", "", "is given twice: in lines 1 and 2"),
        ("run_id: a\n---\nrun_id: b\n", "", "is not YAML"),
        ("elastic:\n\tmin_nodes: 2\n", "", "is not YAML"),
    ],
)
def test_yaml_is_read_as_it_is_written(text: str, name: str, value: Any, tmp_path: Path) -> None:
    values = {"warmup_steps": 0}
    if name:
        assert from_yaml(text + f"warmup_steps: {values['warmup_steps']}\n", tmp_path).to_flat()[name] == value
    else:
        with pytest.raises(ConfigError, match=re.escape(value)):
            from_yaml(text, tmp_path)


def test_the_values_of_sites_keep_their_types(tmp_path: Path) -> None:
    text = """
sites:
  - name: lab
    replicas: 2
    node_selector: {zone: "1", ready: "true"}
    tolerations: [{key: gpu, operator: Exists, tolerationSeconds: 300}]
"""
    (site,) = from_yaml(text, tmp_path).sites
    assert site.node_selector == {"zone": "1", "ready": "true"}
    assert site.tolerations[0].toleration_seconds == 300


@hypothesis.given(st.text(st.characters(categories=["L", "N", "P", "S"], max_codepoint=0x24F), min_size=1, max_size=12))
@hypothesis.example("0o17")
@hypothesis.example("1:30")
@hypothesis.example("0x1F")
@hypothesis.example(".inf")
@hypothesis.example("2001-01-01T00:00:00Z")
@hypothesis.settings(deadline=None)
def test_plain_text_in_yaml_never_changes_silently(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = from_yaml(f"experiment_description: {text}\n", Path(folder)).experiment_description
        except ConfigError:
            return  # it means something else to YAML, and is refused
        quoted = text[:1] in "'\"" or text[:1] in "|>&!" or text.startswith("#")
        assert found == text or quoted or " #" in text


@pytest.mark.parametrize(
    "variable",
    ["DILOCO_TEST_IMAGE", "DILOCO_ETCD_SERVICE_HOST", "DILOCO_ETCD_PORT_2379_TCP_ADDR", "DILOCO_X_SERVICE_PORT"],
)
def test_variables_that_are_no_parameters_are_left_alone(variable: str) -> None:
    assert load_config(None, {}, {variable: "10.0.0.1"}) == TrainingConfig()


def test_a_service_of_kubernetes_sets_no_parameter() -> None:
    assert load_config(None, {}, {"DILOCO_METRICS_PORT": "tcp://10.0.0.1:80"}) == TrainingConfig()


def test_a_year_is_a_tag() -> None:
    assert load_config(None, {}, {"DILOCO_EXPERIMENT_TAGS": "2024"}).experiment_tags == ["2024"]
    assert load_config(None, {}, {"DILOCO_EXPERIMENT_TAGS": "a, no"}).experiment_tags == ["a", "no"]
    assert load_config(None, {}, {"DILOCO_EXPERIMENT_TAGS": "[1.10, 0123]"}).experiment_tags == ["1.10", "0123"]


def test_a_codec_brings_its_recipe_and_what_is_given_beats_it() -> None:
    def recipe(**values: Any) -> tuple[float, float, str, float]:
        config = TrainingConfig.from_flat(values)
        return config.outer_rate, config.momentum, config.merged_by, config.feedback

    assert recipe() == (0.7, 0.9, "mean", 0.0)
    assert recipe(codec="ternary") == (0.7, 0.5, "mean", 0.5)
    assert recipe(codec="sparse") == (1.2, 0.0, "sqrt", 0.8)
    assert recipe(merge="rda") == (1.0, 0.0, "rda", 0.0)
    assert recipe(codec="sparse", merge="mean") == (0.7, 0.5, "mean", 0.8)
    assert recipe(codec="sparse", outer_lr=0.9, outer_momentum=0.1, error_feedback=0.3) == (0.9, 0.1, "sqrt", 0.3)
    shown = TrainingConfig.from_flat({"codec": "sparse"}).in_scope("card")
    assert (shown["outer_lr"], shown["outer_momentum"], shown["merge"]) == (1.2, 0.0, "sqrt")
