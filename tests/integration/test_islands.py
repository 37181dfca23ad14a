"""Islands under real agents and an etcd: the processes of a node are one worker."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.tiny_models import COMMON, values_of
from trainer import checkpoint, data, models
from trainer.checkpoint import Checkpoint
from trainer.config import TrainingConfig
from trainer.elastic import keys
from trainer.etcd.client import EtcdClient
from trainer.files import read_json, write_json
from trainer.island.memory import directory_of
from trainer.monitor.verify import verify
from trainer.process import dying_with_parent
from trainer.volume import Volume

PROCESS = Path(__file__).with_name("island_process.py")
STEPS = 24
LAYOUTS = ((1, "none"), (2, "fsdp"))  # of two nodes: processes, inner_parallel
BASE: dict[str, Any] = {
    "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 64, "max_samples": 60,
    "validation_fraction": 0.1, "device": "cpu", "nodes": 1, "total_steps": STEPS, "local_steps": 8, "batch_size": 12,
    "per_device_train_batch_size": 2, "warmup_steps": 5, "checkpoint_interval": 8, "eval_interval": 1,
    "eval_samples": 15, "wandb_logging": False,
}  # fmt: skip

pytestmark = pytest.mark.timeout(900)  # a run takes a minute on a machine with other work


class Node:
    """A torchrun agent and its processes."""

    def __init__(self, config: TrainingConfig, slot: int = 0) -> None:
        self.config, self.slot, self.volume = config, slot, Volume.of(config)
        path = self.volume.root / "config.json"
        write_json(path, config.model_dump(mode="json"))
        command = [sys.executable, "-m", "trainer.launch.agent", "--config", str(path), "--slot", str(slot)]
        command += ["--", sys.executable, str(PROCESS), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPOIL": "29", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.log = self.volume.root / "log"
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(dying_with_parent(command), env=environment, stdout=log, stderr=log)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.volume.metrics
        lines = path.read_text().splitlines() if path.exists() else []
        parsed = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
        return [event for event in parsed if event["event"] == kind]

    def until(self, ready: Callable[[], Any]) -> None:
        while not ready():
            assert self.agent.poll() is None, self.log.read_text()
            threading.Event().wait(0.02)

    def ends(self, status: int = 0) -> "Node":
        assert self.agent.wait() == status, self.log.read_text()
        return self

    def losses(self) -> dict[int, float]:
        """By step; NaN if it was skipped. Of a repeated step, the last line counts."""
        return {event["step"]: math.nan if (loss := event["loss"]) is None else loss for event in self.events("step")}

    def final(self) -> Checkpoint:
        found = checkpoint.newest(self.volume.checkpoints, pytest.fail)
        assert found is not None
        assert found.complete
        return found

    def processes(self) -> list[psutil.Process]:
        """The island's, the leader last: it alone has written its process id."""
        found = psutil.Process(self.agent.pid).children(recursive=True)
        leader = self.events("start")[-1]["pid"]
        return sorted((one for one in found if str(PROCESS) in one.cmdline()), key=lambda one: one.pid == leader)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def start(tmp_path: Path, shared: Path, etcd: str) -> Iterator[Callable[..., Node]]:
    """Starts a node of a run; its data and model are precached."""
    nodes: list[Node] = []

    def start(run: str, processes: int, inner_parallel: str, slot: int = 0, **values: Any) -> Node:
        root = tmp_path / run / f"worker-{slot}"
        own = {
            "run_id": f"{tmp_path.name}-{run}", "run_dir": str(root), "checkpoint_path": str(root / "checkpoints"),
            "dataset_cache_dir": str(shared / "datasets"), "model_cache_dir": str(shared / "models"),
            "etcd_endpoints": [etcd], "elastic_nproc_per_node": processes, "inner_parallel": inner_parallel,
        }  # fmt: skip
        config = TrainingConfig.from_flat({**BASE, **own, **values})
        data.precache(config, Volume.of(config), lambda line: None)
        nodes.append(Node(config, slot))
        return nodes[-1]

    yield start
    for node in nodes:
        node.agent.kill()
        node.agent.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: Path, etcd: str) -> Node:
    """A run of one process that is not disturbed."""
    root = tmp_path_factory.mktemp("whole")
    own = {
        "run_id": root.name,
        "run_dir": str(root),
        "checkpoint_path": str(root / "checkpoints"),
        "etcd_endpoints": [etcd],
    }
    caches = {"dataset_cache_dir": str(shared / "datasets"), "model_cache_dir": str(shared / "models")}
    config = TrainingConfig.from_flat({**BASE, **own, **caches})
    data.precache(config, Volume.of(config), lambda line: None)
    return Node(config).ends()


def assert_equal(found: Node, expected: Node) -> None:
    """Up to rounding: the order in which gradients are added."""
    steps, others = found.events("step"), expected.events("step")
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5, nan_ok=True)
    assert sorted(found.losses()) == list(range(1, STEPS + 1))
    last = {event["step"]: event for event in steps}
    for event in others:
        for field in ("positions", "tokens", "samples", "lr"):
            assert last[event["step"]][field] == event[field]
        if event["loss"] is not None:
            assert last[event["step"]]["gradient_norm"] == pytest.approx(event["gradient_norm"], rel=1e-4)
    for event, other in zip(found.events("eval")[-1:], expected.events("eval")[-1:], strict=True):
        assert event["samples"] == other["samples"] == 15
        assert event["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-5)
    ours, theirs = found.final(), expected.final()
    for name, tensor in ours.global_tensors.items():
        torch.testing.assert_close(tensor, theirs.global_tensors[name], rtol=1e-4, atol=1e-6)
    moments, other_moments = (one.worker()["diloco"]["inner_optimizer"]["state"] for one in (ours, theirs))
    assert moments.keys() == other_moments.keys()
    for number, state in moments.items():
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, other_moments[number][key], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("inner_parallel", [pytest.param("ddp", marks=pytest.mark.faults), "fsdp"])
def test_an_island_of_two_is_one_worker_with_the_results_of_one_process(
    inner_parallel: str, start: Callable[..., Node], whole: Node
) -> None:
    skipped = [step for step, loss in whole.losses().items() if math.isnan(loss)]
    assert 1 <= len(skipped) <= 5
    node = start("island", 2, inner_parallel).ends()
    assert_equal(node, whole)
    assert [step for step, loss in node.losses().items() if math.isnan(loss)] == skipped
    assert node.events("end")[-1]["skipped_steps"] == len(skipped)

    assert base_hash(node) == base_hash(whole)  # of the initial parameters: the same bits

    # One member, one volume, and nothing left in shared memory
    (begun,) = node.events("start")
    assert (begun["processes"], begun["world_size"]) == (2, 1)
    assert not (node.volume.root / "process-1").exists()
    for event in node.events("round"):
        assert len(event["peak_memories"]) == 2
        assert event["peak_memory"] == max(event["peak_memories"]) >= min(event["peak_memories"]) > 0
    with EtcdClient.of(node.config) as client:
        durable = [key for key in keys.records_of(client) if key.startswith("durable/")]
    assert durable == ["durable/000"]
    assert not directory_of(node.config).exists()


@pytest.mark.faults
def test_unequal_islands_train_together_with_one_state(start: Callable[..., Node]) -> None:
    few = {"nodes": 3, "elastic_max_nodes": 3, "async_communication": True, "fragments": 2, "codec": "int8"}
    layouts = ((1, "none"), (2, "ddp"), (3, "fsdp"))
    nodes = [start("run", *layout, slot=slot, **few) for slot, layout in enumerate(layouts)]
    for node in nodes:
        node.ends()
    assert len({node.events("end")[-1]["global_hash"] for node in nodes}) == 1
    assert {len(event["members"]) for node in nodes for event in node.events("round")[1:]} == {3}
    used = [
        position
        for node in nodes
        for event in node.events("step")
        for begin, end in event["positions"]
        for position in range(begin, end)
    ]
    assert len(used) == len(set(used)) == 3 * STEPS * 12


@pytest.mark.faults
def test_a_run_goes_on_with_other_processes_as_if_nothing_had_been(start: Callable[..., Node], whole: Node) -> None:
    layouts = ((2, "ddp"), (3, "fsdp"), (1, "none"), (2, "fsdp"))
    for number, layout in enumerate(layouts):
        node = start("run", *layout)
        made = 5 * (number + 1)
        if number == len(layouts) - 1:
            node.ends()
            break
        node.until(lambda made=made, node=node: max(node.losses(), default=0) >= made)
        node.agent.send_signal(signal.SIGTERM)
        node.ends(143)
        assert node.events("end")[-1]["status"] == "stopped"
        with EtcdClient.of(node.config) as client:  # as `launch` does before it resumes a run
            for prefix in keys.LIVING:
                client.delete_prefix(prefix)
            keys.reopen(client)
    assert [event["processes"] for event in node.events("start")] == [2, 3, 1, 2]
    assert_equal(node, whole)


@pytest.mark.faults
def test_an_island_one_of_whose_processes_dies_starts_again_alone_from_its_memory(start: Callable[..., Node]) -> None:
    long = {"nodes": 2, "elastic_max_nodes": 2, "total_steps": 10**6, "checkpoint_interval": 10**6, "eval_interval": 0}
    fast = {"collective_timeout": 1.0, "grace_period": 2.0, "lease_ttl": 4.0}
    other, island = (start("run", *layout, slot=slot, **long, **fast) for slot, layout in enumerate(LAYOUTS))

    def trains_with_both(after: float) -> bool:
        return any(event["time"] > after and event["world_size"] == 2 for event in island.events("round"))

    begun = 0.0
    for victim in (0, -1):  # a follower, and the leader
        island.until(lambda begun=begun: trains_with_both(begun))
        lives, before = len(island.events("start")), island.events("round")[-1]["round"]
        island.processes()[victim].kill()
        island.until(lambda lives=lives: len(island.events("start")) > lives)
        again = island.events("start")[-1]
        assert again["resumed_round"] >= before
        begun = again["time"]
    island.until(lambda: trains_with_both(begun))
    assert changes(island).count("took kept state") == 2

    # The other worker has lost nothing. If it dies without a checkpoint, it takes the sharded optimizer's moments
    assert len(other.events("start")) == 1
    steps = [event["step"] for event in other.events("step")]
    assert steps == list(range(1, len(steps) + 1))
    assert "caught up" not in changes(other)
    assert "took moments" not in changes(other)
    other.processes()[0].kill()
    shutil.rmtree(other.volume.checkpoints, ignore_errors=True)
    other.until(lambda: "took moments" in changes(other))
    for node in (other, island):
        node.agent.terminate()
        node.ends(143)
    assert not directory_of(island.config).exists()
    (judgement,) = verify([other.volume.root.parent])
    assert not judgement.refuted, str(judgement)


def changes(node: Node) -> list[str]:
    return [event["change"] for event in node.events("membership")]


@pytest.mark.faults
def test_fragments_overlap_and_compiled_blocks_have_the_same_results_on_an_island(start: Callable[..., Node]) -> None:
    how = {"fragments": 2, "overlap_tau": 1, "eval_interval": 2}
    compiled = {"compile_model": True, "compile_backend": "aot_eager", "activation_checkpointing": "block"}
    single, island = start("one", 1, "none", **how), start("island", 2, "fsdp", **how, **compiled)
    assert_equal(island.ends(), single.ends())


@pytest.mark.faults
@pytest.mark.parametrize("inner_parallel", ["ddp", "fsdp"])
def test_an_island_finds_the_batch_size_of_its_processes(inner_parallel: str, start: Callable[..., Node]) -> None:
    few = {"total_steps": 16, "heterogeneous": True, "min_batch_size": 2}
    node = start("island", 2, inner_parallel, **few).ends()
    found = read_json(node.volume.root / "profile.json")
    assert found["sizes"] == [2, 6]
    assert found["profile"]["batch_size"] in found["sizes"]
    assert found["profile"]["speed"] > 0
    assert sorted(node.losses()) == list(range(1, 17))


OTHERS = [
    ("gpt-neo", "fsdp"),
    ("resnet50", "ddp"),
    ("biggan", "ddp"),
    ("gcn", "ddp"),
    ("wav2vec2", "ddp"),
    ("wav2vec2", "fsdp"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("name", "inner_parallel"), OTHERS)
def test_every_model_trains_on_an_island(
    name: str, inner_parallel: str, start: Callable[..., Node], shared: Path
) -> None:
    few = {"total_steps": 4, "local_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    node = start(name, 2, inner_parallel, **{**COMMON, **values_of(name, shared), **few}).ends()
    losses = node.losses()
    assert sorted(losses) == [1, 2, 3, 4]
    assert all(map(math.isfinite, losses.values()))
    assert [event["samples"] for event in node.events("eval")] == [node.events("eval")[0]["samples"]] * 3
    assert node.final().worker()["buffers"].keys() == dict(build(node).named_buffers()).keys()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gpt-neo", "gpt-neo-x", "wav2vec2"])
def test_a_pretrained_model_on_shards_has_the_results_of_one_process(
    name: str, start: Callable[..., Node], shared: Path, tmp_path: Path
) -> None:
    few = {"total_steps": 4, "local_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    values = {**COMMON, **values_of(name, shared), **few}
    first: Any = build(start("first", 1, "none", **values).ends())
    first.save_pretrained(tmp_path / "it")
    values |= {"model": f"{name}:{tmp_path / 'it'}", "seed": 8}
    single, island = start("one", 1, "none", **values).ends(), start("two", 2, "fsdp", **values).ends()
    assert base_hash(island) == base_hash(single)
    evals, others = island.events("eval"), single.events("eval")
    assert evals[0]["loss"] == pytest.approx(others[0]["loss"], rel=1e-5)
    assert sorted(island.losses()) == [1, 2, 3, 4]
    if name != "wav2vec2":  # each process has dropout of its own
        assert island.losses() == pytest.approx(single.losses(), rel=1e-5)


def base_hash(node: Node) -> str:
    """Of the state that the run's first round began from."""
    return str(node.events("round")[0]["base_hash"])


def build(node: Node) -> torch.nn.Module:
    config, volume = node.config, node.volume
    manifest = data.open_dataset(data.directory(config, volume.datasets)).manifest
    return models.build(models.directory(config, manifest.for_model, volume.models), config.seed)
