"""Fixtures for all tests, and the setup of a session."""

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

JIT_CACHE = "JIT_CACHE_DIR"  # of trainer/diloco/jit.py, which is too slow to import here


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of the session share compiled kernels and bytecode.

    xdist's workers and the processes that tests start, about a hundred in all, inherit the setting.
    """
    if not hasattr(config, "workerinput"):
        os.environ[JIT_CACHE] = tempfile.mkdtemp(prefix="jit-cache-")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import everything without the garbage collector, which would look at all of it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(JIT_CACHE, ""), ignore_errors=True)


@pytest.fixture(scope="session")
def etcd_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], str]]:
    """host:port of a real etcd, by its program; one of each for all tests of the session: use a run id of your own."""
    from trainer.etcd.embedded import EmbeddedEtcd

    with ExitStack() as servers:

        @functools.cache
        def endpoint(program: Path) -> str:
            return servers.enter_context(EmbeddedEtcd(tmp_path_factory.mktemp("etcd"), binary=program)).endpoint

        yield endpoint


@pytest.fixture(scope="session")
def etcd(etcd_of: Callable[[Path], str]) -> str:
    """host:port of a real etcd, for all tests of the session: use a run id of your own."""
    from trainer.etcd.embedded import etcd_binary

    return etcd_of(etcd_binary())


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """What the tested code sets in the environment of its process ends with the test."""
    before = dict(os.environ)
    yield
    for name in (os.environ.keys() | before.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]
