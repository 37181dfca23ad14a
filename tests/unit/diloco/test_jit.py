"""Compiled kernels: kept for others only where a test session asks for it."""

import fcntl
import os
from pathlib import Path

import numba
import numpy as np
import pytest

from trainer.diloco.jit import CACHE_VARIABLE, Floats, compiled


def doubled(numbers: Floats) -> Floats:
    return numbers + numbers


def cache_hits() -> int:
    """Compile anew, as another process does; 1 if the code was found."""
    kernel = compiled(doubled)
    assert kernel(np.ones(3, np.float32)).tolist() == [2, 2, 2]
    return sum(kernel.stats.cache_hits.values())  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def numba_s_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", numba.config.CACHE_DIR)


def test_code_is_shared_where_a_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert [cache_hits(), cache_hits()] == [0, 1]
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_hits() == 0


def test_a_process_that_finds_another_one_writing_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache_hits()
    assert [cache_hits(), cache_hits()] == [0, 1]


def test_a_test_session_names_one() -> None:
    assert Path(os.environ[CACHE_VARIABLE]).is_dir()
