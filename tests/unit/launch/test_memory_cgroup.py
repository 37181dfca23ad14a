"""The kernel's count of processes that it has killed for their memory, as the two versions of cgroups have it."""

from pathlib import Path

import pytest

from trainer.launch.memory_cgroup import MemoryCgroup

V1 = "12:pids:/kubepods/pod1/abc\n4:memory:/kubepods/pod1/abc\n1:cpu,cpuacct:/\n0::/kubepods/pod1/abc\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
EVENTS = "low 0\nhigh 0\nmax 41\noom 4\noom_kill 2\noom_group_kill 1\n"
NO_LIMIT = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("membership", "files", "kills", "limit"),
    [
        # A container sees its own cgroup as the root.
        ("0::/\n", {"memory.events": EVENTS, "memory.max": "1073741824\n"}, 2, 1 << 30),
        ("0::/\n", {"memory.events": EVENTS, "memory.max": "max\n"}, 2, None),
        ("0::/user/run.scope\n", {"user/run.scope/memory.events": EVENTS, "memory.events": "oom_kill 9\n"}, 2, None),
        ("0::/\n", {}, None, None),  # the root of all has no such file
        ("0::/\n", {"memory.events": "low 0\n"}, None, None),
        # In version 1 the path is the machine's, and the container's part of it is mounted as the root.
        (V1, {"memory/memory.oom_control": CONTROL, "memory/memory.limit_in_bytes": "2147483648\n"}, 3, 1 << 31),
        (V1, {"memory/kubepods/pod1/abc/memory.oom_control": CONTROL, "memory/memory.oom_control": ""}, 3, None),
        (V1, {"memory/memory.oom_control": CONTROL, "memory/memory.limit_in_bytes": NO_LIMIT}, 3, None),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\n"}, None, None),  # before Linux 4.13
        ("", {"memory.events": EVENTS}, None, None),
    ],
)
def test_kills_and_limit(
    tmp_path: Path, membership: str, files: dict[str, str], kills: int | None, limit: int | None
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    group = MemoryCgroup(tmp_path / "cgroup", tmp_path / "membership")
    assert (group.kills(), group.limit()) == (kills, limit)


def test_where_there_is_nothing_to_read_nothing_is_known(tmp_path: Path) -> None:
    group = MemoryCgroup(tmp_path, tmp_path / "none")
    assert (group.kills(), group.limit()) == (None, None)
    MemoryCgroup().kills()  # whatever this machine has
