"""The memory that the processes of a node share, and the state that it keeps for the next ones."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trainer.diloco import Averaged, GlobalState, Nesterov
from trainer.elastic.catch_up import Replica
from trainer.errors import ConfigError
from trainer.island.kept import KeptState
from trainer.island.memory import ABANDONED, ROOT, NodeMemory

SIZE = 1000


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = ROOT / f"diloco-test-{os.getpid()}-{tmp_path.name}"
    yield path
    NodeMemory(path, 1, leads=True).close()


def files(directory: Path) -> int:
    gc.collect()
    return len([path for path in directory.rglob("*") if path.name.isdecimal()])


def test_what_one_process_writes_the_other_reads_until_the_last_tensor_is_gone(directory: Path) -> None:
    leader, follower = (NodeMemory(directory, SIZE, leads=leads) for leads in (True, False))
    leader.reserve(2)
    vectors = [leader.new() for _ in range(2)]
    part = vectors[1].fill_(3.0)[10:].view(2, -1)
    name, offset = leader.name_of(part)
    assert offset == 10
    assert leader.at(name).data_ptr() == vectors[1].data_ptr()
    follower.at(name)[10] += 1
    assert part[0, 0] == 4.0
    with pytest.raises(ValueError, match="not in the node's shared memory"):
        leader.name_of(torch.zeros(SIZE))
    assert [leader.holds(tensor) for tensor in (part, torch.zeros(SIZE))] == [True, False]

    # A vector is used again after its last tensor, and not before
    assert files(directory) == 2
    vectors.clear()
    gc.collect()
    again = [leader.name_of(leader.new())[0] for _ in range(2)]
    assert name not in again
    del part
    gc.collect()
    more = [leader.new(), leader.new()]
    assert name in [leader.name_of(vector)[0] for vector in more]
    assert files(directory) == 2
    leader.reserve(1)
    assert files(directory) == 3
    leader.close()
    assert not directory.exists()


def state_of(memory: NodeMemory) -> GlobalState:
    outer = Averaged.of(Nesterov(), 0.9)
    return GlobalState(memory.new().fill_(0.5), outer, like=lambda _: memory.new())


def test_a_state_is_kept_for_the_next_process_unless_it_has_changed(directory: Path) -> None:
    memory = NodeMemory(directory, SIZE, leads=True)
    state, kept = state_of(memory), KeptState(memory)
    assert kept.find() is None
    for number in range(3):
        state.apply(torch.full((SIZE,), float(number)), 10)
        kept.keep(state, 2, {"position": 7, "returned": ()})
    kept.close(remove=False)

    after = NodeMemory(directory, SIZE, leads=True)
    assert files(directory) > len(state.tensors)
    found = KeptState(after).find()
    assert files(directory) == len(state.tensors)
    assert found is not None
    assert (found.round, found.step, found.term, found.cursor["position"]) == (3, 30, 2, 7)
    other = state_of(after)
    other.load(found.round, found.step, found.tensors)
    assert other.hash() == state.hash()

    state.parameters[5] += 1
    assert KeptState(after).find() is None
    KeptState(after).forget(other)
    assert KeptState(after).find() is None
    assert files(directory) == 2 * len(other.tensors)


def test_a_state_is_lent_while_there_is_memory_to_go_on(directory: Path) -> None:
    memory = NodeMemory(directory, SIZE, leads=True)
    state, machine = state_of(memory), SimpleNamespace(term=1)
    most, none = 3 * len(state.tensors), cast(Any, None)
    state.room = lambda vectors: files(directory) - len(memory._free) + vectors <= most
    replica = Replica(none, state, cast(Any, machine), none, none)

    # Two joiners read the same state; a later one finds none until they are done
    state.prepare()
    offers = [replica.find("state/1.0"), replica.find("state/1.0")]
    assert all(offers)
    for round in (1, 2):
        state.apply(torch.ones(SIZE), 1)
        assert replica.find(f"state/1.{round}") is None
    assert files(directory) == most
    offers.clear()
    gc.collect()
    assert replica.find("state/1.2") is not None
    state.apply(torch.ones(SIZE), 1)
    assert files(directory) == most


def test_memory_that_is_too_small_is_an_error_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(ROOT).f_bavail * os.statvfs(ROOT).f_frsize
    with pytest.raises(RuntimeError, match="is too small for an island of this model"):
        NodeMemory(directory, free // 4 + (1 << 28), leads=True).new()
    memory = NodeMemory(directory, free // 40, leads=True)
    memory.require(5)
    with pytest.raises(
        ConfigError, match=r"needs .* GiB of shared memory for this model, and .* GiB are free in /dev/shm"
    ):
        memory.require(12)
    assert files(directory) == 0


def test_directories_of_killed_islands_are_removed_by_others_after_an_hour(directory: Path) -> None:
    living, dead = (directory.with_name(f"{directory.name}-{kind}") for kind in ("living", "dead"))
    held = NodeMemory(living, SIZE, leads=True)
    (dead / "life-1").mkdir(parents=True)
    for path in (living, dead):
        os.utime(path, (time.time() - 2 * ABANDONED,) * 2)
    NodeMemory(directory, SIZE, leads=True)
    assert living.exists()
    assert not dead.exists()
    held.close()
