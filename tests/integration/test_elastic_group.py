"""Process groups that are formed over a real etcd."""

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from trainer.elastic.mesh import MeshStore, form_group, gloo_device
from trainer.etcd.client import Entry, EtcdClient, Json
from trainer.etcd.errors import EtcdError
from trainer.timeouts import MemberTimeouts
from trainer.transport.wire_meter import WireMeter

WAIT = 60.0  # seconds until a test gives up


@pytest.fixture
def client(etcd: str) -> Iterator[EtcdClient]:
    with EtcdClient([etcd], f"/group/{uuid.uuid4().hex}") as client:
        yield client


@contextmanager
def mesh(
    client: EtcdClient,
    rank: int,
    size: int,
    attempt: str,
    over: Callable[[], bool] = lambda: False,
    wait: float = WAIT,
    timeouts: MemberTimeouts = MemberTimeouts(),
) -> Iterator[MeshStore]:
    def put(value: Json) -> None:
        client.put(f"meshes/{rank}", value)

    with MeshStore(client, put, [str(member) for member in range(size)], attempt, wait, over, timeouts) as store:
        yield store


def form(client: EtcdClient, rank: int, size: int, attempt: str) -> tuple[Any, WireMeter]:
    with mesh(client, rank, size, attempt) as store:
        store.gather()
        return form_group(store, rank, size, gloo_device("", "127.0.0.1"), timedelta(seconds=WAIT))


def test_members_of_one_attempt_after_the_other_find_each_other(client: EtcdClient) -> None:
    size = 3
    for attempt in ("1/1/1", "1/1/2"):  # the second time, etcd has the addresses of the first
        with ThreadPoolExecutor(size) as pool:
            groups = list(pool.map(lambda rank, attempt=attempt: form(client, rank, size, attempt), range(size)))
        values = [torch.full((5,), float(rank)) for rank in range(size)]
        for work in [each.allreduce([value]) for (each, _), value in zip(groups, values, strict=True)]:
            work.wait(timedelta(seconds=WAIT))
        assert all(value.tolist() == [3.0] * 5 for value in values)
    assert len(client.list("meshes/")) == size


def test_connections_that_are_opened_while_others_are_late_are_not_the_groups(client: EtcdClient) -> None:
    with ThreadPoolExecutor(2) as pool, socket.create_server(("127.0.0.1", 0)) as server:
        first = pool.submit(form, client, 0, 2, "1/1/1")
        assert client.wait_for(lambda: client.get("meshes/0"), WAIT)
        with socket.create_connection(server.getsockname()) as foreign:
            second = pool.submit(form, client, 1, 2, "1/1/1")
            for _, meter in (first.result(), second.result()):
                counted = [connection.getsockname() for connection in meter._sockets]
                assert counted and foreign.getsockname() not in counted


def test_no_member_waits_for_an_attempt_that_is_over(client: EtcdClient) -> None:
    client.put("meshes/1", {"attempt": "1/1/1", "values": {}})  # is not of this attempt

    def over() -> bool:
        mine = client.get("meshes/0")
        return mine is not None and mine.value["attempt"] == "1/1/2"

    with mesh(client, 0, 2, "1/1/2", over) as store, pytest.raises(RuntimeError, match="the attempt is over"):
        store.gather()


@pytest.mark.parametrize("away", [False, True])
def test_one_that_does_not_come_is_not_waited_for_without_a_limit(
    away: bool, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(prefix: str) -> dict[str, Entry]:
        threading.Event().wait(0.1)
        raise EtcdError("no answer", "unreachable")

    if away:
        monkeypatch.setattr(client, "list", slow)
    timeouts = MemberTimeouts(mesh_refresh=0.1)
    with (
        mesh(client, 0, 2, "1/1/1", wait=0.5, timeouts=timeouts) as store,
        pytest.raises(RuntimeError, match="not all"),
    ):
        store.gather()


def test_an_etcd_that_refuses_us_is_not_a_member_that_is_late(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prefix: str) -> dict[str, Entry]:
        raise EtcdError("not for you", "permission")

    with mesh(client, 0, 2, "1/1/1") as store, pytest.raises(EtcdError, match="not for you"):
        monkeypatch.setattr(client, "list", refuse)
        # Through gloo's constructor, where it waits for the other's address.
        form_group(store, 0, 2, gloo_device("", "127.0.0.1"), timedelta(seconds=WAIT))
