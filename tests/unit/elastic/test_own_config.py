"""What `trainer.elastic.join` takes, and refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import TrainingConfig
from trainer.diloco import DiLoCo, codecs
from trainer.elastic.own_config import PARAMETERS, config_of, fingerprint_of
from trainer.errors import ConfigError

ADDRESS = "etcd://one:2379,[::1]:2380/mine"


def test_the_address_names_etcd_and_the_run() -> None:
    config = config_of(ADDRESS, None, {"nodes": 3, "batch_size": 7})
    assert (config.etcd.endpoints, config.run_id) == (["one:2379", "[::1]:2380"], "mine")
    assert (config.nodes, config.batch_size, config.warmup_steps) == (3, 7, 0)


def test_variables_and_another_configuration_give_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILOCO_GRACE_PERIOD", "7")
    assert config_of(ADDRESS, None, {}).grace_period == 7
    other = TrainingConfig.from_flat({"grace_period": 8.0, "lr": 0.1, "optim_method": "demo", "run_id": "other"})
    config = config_of(ADDRESS, other, {"lease_ttl": 20.0})
    assert (config.grace_period, config.lease_ttl, config.run_id) == (8, 20, "mine")
    assert config.optim_method == "sgd"


@pytest.mark.parametrize(
    ("address", "parameters", "error"),
    [
        ("localhost:2379", {}, "address = 'localhost:2379': must be etcd://host:port/run"),
        ("etcd://localhost:2379", {}, "must be etcd://host:port/run"),
        ("etcd://localhost/mine", {}, r"etcd.endpoints = 'localhost': must be host:port"),
        ("etcd://one:1/a b", {}, "run_id = 'a b'"),
        ("etcd://me:secret@one:1/mine", {}, r"address = 'etcd://…@one:1/mine': must not contain credentials"),
        (ADDRESS, {"local_steps": 5}, "local_steps = 5: is an argument of DiLoCo: sync_every"),
        (ADDRESS, {"codec": "int8"}, "codec = 'int8': is an argument of DiLoCo: codec"),
        (ADDRESS, {"lr": 1e-3}, r"lr = 0.001: has no effect on your own loop"),
        (ADDRESS, {"run_id": "x"}, "run_id = 'x': is part of the address"),
        (ADDRESS, {"node": 2}, "node = '…': no such parameter; did you mean nodes?"),
        (ADDRESS, {"nodes": 0}, "nodes = 0: must be greater than 0"),
        (ADDRESS, {"etcd_password": "secret"}, "etcd_password = '…': is a secret, not a parameter"),
    ],
)
def test_what_does_not_fit_is_refused(address: str, parameters: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error) as refused:
        config_of(address, None, parameters)
    assert "secret'" not in str(refused.value)


def test_its_parameters_are_the_configuration_s() -> None:
    assert set(PARAMETERS) <= {parameter.name for parameter in TrainingConfig.parameters()}


def test_the_fingerprint_tells_models_codecs_and_schedules_apart() -> None:
    config = config_of(ADDRESS, None, {})

    def fingerprint(size: int = 4, **settings: Any) -> dict[str, Any]:
        model = nn.Linear(size, 1)
        optimizer = torch.optim.SGD(model.parameters())
        return fingerprint_of(config, DiLoCo(model, optimizer, **{"sync_every": 4, **settings}))

    own = fingerprint()
    assert own == fingerprint()
    for name, other in {
        "parameters": fingerprint(5),
        "sync_every": fingerprint(sync_every=8),
        "total_steps": fingerprint(total_steps=9),
        "codec": fingerprint(codec=codecs.Int8()),
    }.items():
        assert [key for key in own if own[key] != other[key]] == [name]
