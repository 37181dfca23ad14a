"""Process groups that are formed over a real etcd."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch

from trainer.elastic.etcd import EtcdClient
from trainer.elastic.group import MeshStore, form_group, gloo_device

WAIT = 60.0  # seconds until a test gives up


@pytest.fixture
def client(etcd: str) -> Iterator[EtcdClient]:
    with EtcdClient([etcd], f"/group/{uuid.uuid4().hex}") as client:
        yield client


def form(
    client: EtcdClient, rank: int, size: int, place: str, over: Callable[[], bool] = lambda: False, wait: float = WAIT
) -> Any:
    with MeshStore(client, lambda value: client.put(f"meshes/{rank}", value), place, wait, over) as store:
        return form_group(store, rank, size, gloo_device("", "127.0.0.1"), timedelta(seconds=WAIT))[0]


def test_members_of_one_attempt_after_the_other_find_each_other(client: EtcdClient) -> None:
    size = 3
    for place in ("1/1/1", "1/1/2"):  # the second time, etcd has the first one's addresses
        with ExitStack() as resources:
            pool = resources.enter_context(ThreadPoolExecutor(size))
            groups = list(pool.map(lambda rank, place=place: form(client, rank, size, place), range(size)))
            values = [torch.full((5,), float(rank)) for rank in range(size)]
            for work in [group.allreduce([value]) for group, value in zip(groups, values, strict=True)]:
                work.wait(timedelta(seconds=WAIT))
            assert all(value.tolist() == [3.0] * 5 for value in values)
    assert len(client.list("meshes/")) == size


def test_nobody_waits_for_an_attempt_that_is_over(client: EtcdClient) -> None:
    client.put("meshes/1", {"place": "1/1/1", "values": {"0/1": "AAAA"}})  # is not of this attempt

    def over() -> bool:
        mine = client.get("meshes/0")
        return mine is not None and mine.value["place"] == "1/1/2"

    with pytest.raises(RuntimeError, match="the attempt is over"):
        form(client, 0, 2, "1/1/2", over)


def test_one_that_does_not_come_is_not_waited_for_without_a_limit(client: EtcdClient) -> None:
    with pytest.raises(RuntimeError, match="not all members of the attempt have come"):
        form(client, 0, 2, "1/1/1", wait=0.5)
