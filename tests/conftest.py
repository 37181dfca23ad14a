"""Fixtures that several rooms share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real etcd, for all tests of the session: use a run id of your own."""
    from trainer.etcd.embedded import EmbeddedEtcd

    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server.endpoint
