"""What `launch` refuses before it starts anything."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import TrainingConfig
from trainer.elastic.keys import SLOT_VARIABLE
from trainer.elastic.member import ElasticQuorum
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.launch.agent_process import environment_of_agents
from trainer.launch.local import launch
from trainer.launch.run_directory import locked
from trainer.process import listen, number_from


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_second_launch_is_refused_and_names_the_first(tmp_path: Path) -> None:
    config = TrainingConfig.from_flat({"run_id": "r", "run_dir": str(tmp_path), "device": "cpu"})
    with locked(tmp_path), pytest.raises(ConfigError, match=r"in use by another launch \(process \d+@.+\)"):
        launch(config, command=["true"])
    with locked(tmp_path):
        pass  # the first has given it back


def test_port_range_without_a_free_port(tmp_path: Path, taken: int) -> None:
    with pytest.raises(ConfigError, match=r"port_range.*has no free port left"):
        listen("127.0.0.1", f"{taken}-{taken}")
    values = {"run_id": "r", "run_dir": str(tmp_path / "run"), "device": "cpu", "port_range": f"{taken}-{taken}"}
    with pytest.raises(ConfigError, match=r"port_range.*must hold 3 ports"):
        launch(TrainingConfig.from_flat(values), command=["true"])
    assert not (tmp_path / "run").exists()


def test_nodes_that_cannot_come_from_elsewhere(tmp_path: Path) -> None:
    values = {"run_id": "r", "run_dir": str(tmp_path / "run"), "device": "cpu", "advertise_address": "127.0.0.1"}
    config = TrainingConfig.from_flat({**values, "nodes": 1, "elastic_min_nodes": 2, "elastic_max_nodes": 2})
    with pytest.raises(
        ConfigError, match=r"nodes = 1: must be at least elastic\.min_nodes \(2\), unless others can join"
    ):
        launch(config, command=["true"])


def test_refused_launch_leaves_nothing(tmp_path: Path) -> None:
    values = {"run_id": "r", "run_dir": str(tmp_path / "run"), "device": "cpu", "model": "gpt-neo-x:test"}
    with pytest.raises(ConfigError, match="run `python -m trainer precache` first"):
        launch(TrainingConfig.from_flat({**values, "dataset": "stdlib", "tokenizer": "bytes"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["LOCAL_RANK", SLOT_VARIABLE])
def test_worker_whose_agent_tells_it_no_number(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "first")
    with pytest.raises(ConfigError, match=f"{variable} = 'first': must be a number"):
        ElasticQuorum(TrainingConfig.from_flat({"run_id": "r"}), {})
    monkeypatch.setenv(variable, "3")
    assert number_from(variable) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network_interface", "nope0", r"must be one of .*\blo\b"),
        ("advertise_address", "nowhere.invalid", "is neither an address nor a resolvable name"),
        (
            "advertise_address",
            "127.0.0.1, nowhere.invalid",
            "'nowhere.invalid'.*is neither an address nor a resolvable name",
        ),
        ("transport_certificates", "/nowhere", "must hold ca.crt, tls.crt, tls.key in PEM: No such file"),
    ],
)
def test_network_that_this_machine_does_not_have(field: str, value: str, message: str, tmp_path: Path) -> None:
    config = TrainingConfig.from_flat({"run_id": "r", "run_dir": str(tmp_path / "run"), "device": "cpu", field: value})
    with pytest.raises(ConfigError, match=f"{field}.*{message}"):
        launch(config, command=["true"])
    assert not (tmp_path / "run").exists()


def test_worker_without_etcd() -> None:
    with pytest.raises(ConfigError, match=r"etcd\.endpoints.*launch"):
        EtcdClient.of(TrainingConfig.from_flat({"run_id": "r"}))


def test_port_range_passes_over_taken_ports(taken: int) -> None:
    with listen("127.0.0.1", f"{taken}-{taken + 20}") as listener:
        assert taken < listener.getsockname()[1] <= taken + 20


def test_embedded_etcd_on_a_taken_port(tmp_path: Path, taken: int) -> None:
    with pytest.raises(ConfigError, match=f"port = {taken}: is used"), EmbeddedEtcd(tmp_path, port=taken):
        pass


def test_workers_share_the_cores_and_get_their_configuration_from_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DILOCO_RUN_DIR", "elsewhere")
    monkeypatch.setenv("ETCD_PASSWORD", "kept")
    environment = environment_of_agents(processes=1000)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "DILOCO_RUN_DIR" not in environment
    assert environment["ETCD_PASSWORD"] == "kept"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment_of_agents(processes=1000)["OMP_NUM_THREADS"] == "7"
