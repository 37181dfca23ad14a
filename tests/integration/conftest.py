"""Fixtures of several integration tests."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.apiserver import serving
from tests.cluster.place import Place


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
