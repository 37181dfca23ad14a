"""Directories that are written whole: their temporaries are one process's own, and leftovers go."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import files
from trainer.errors import ConfigError
from trainer.files import require_free_space, whole_directory


def test_two_pods_that_are_both_process_1_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a claim that they share."""
    final = tmp_path / "model"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr("socket.gethostname", lambda: "worker-0")
    with whole_directory(final) as one:
        (one / "weights").write_text("one")
        monkeypatch.setattr("socket.gethostname", lambda: "worker-1.team.svc")
        with whole_directory(final) as other:
            (other / "weights").write_text("other")
        monkeypatch.setattr("socket.gethostname", lambda: "worker-0")
        assert (one / "weights").read_text() == "one"
    assert (final / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_the_dead_have_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = "import sys, os; from pathlib import Path; from trainer.files import whole_directory\n"
    write += "with whole_directory(Path(sys.argv[1])): os._exit(1)"
    subprocess.run([sys.executable, "-c", write, str(tmp_path / "torn")], check=False)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".torn.")]
    elsewhere = tmp_path / ".model.worker-7.1.tmp"
    elsewhere.mkdir()
    with whole_directory(tmp_path / "model"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model", elsewhere.name}  # that process may be alive
    os.utime(elsewhere, (0.0, 0.0))
    assert files._ABANDONED > 3600
    with whole_directory(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sizes_show_by_how_much_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    with pytest.raises(ConfigError, match=r"needs 3 GB, but its disk has only 2 GB free"):
        require_free_space(tmp_path, 3_000_000_000, "run_dir")
    with pytest.raises(ConfigError, match=r"needs 2,000,000,001 bytes, but its disk has only 2,000,000,000 bytes free"):
        require_free_space(tmp_path, 2_000_000_001, "run_dir")
