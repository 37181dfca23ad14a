"""The kernel's count of out-of-memory kills in this process's memory cgroup, version 1 or 2.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. In a container, the file system mounted at `ROOT` starts at
the container's own cgroup, although `/proc/self/cgroup` may give a longer path.
"""

from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # bytes; version 1 expresses "no limit" by a number near 2^63


class MemoryCgroup:
    """The memory cgroup of this process and its children."""

    def __init__(self, root: Path = ROOT, membership: Path = MEMBERSHIP) -> None:
        self._kills, self._limit = _files(root, membership)

    def kills(self) -> int | None:
        """Number of the group's processes that the kernel killed for lack of memory; None if it does not count them."""
        try:
            lines = self._kills.read_text().splitlines() if self._kills else []
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
        except (OSError, ValueError):
            return None

    def limit(self) -> int | None:
        """The group's own limit in bytes; None if it has none."""
        try:
            text = self._limit.read_text().strip() if self._limit else ""
        except OSError:
            return None
        return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None


def _files(root: Path, membership: Path) -> tuple[Path | None, Path | None]:
    """The files that hold the count of kills and the limit."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None, None
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            mount, kills, limit = root / "memory", "memory.oom_control", "memory.limit_in_bytes"
        elif not controllers:
            mount, kills, limit = root, "memory.events", "memory.max"
        else:
            continue
        for directory in (mount / path.lstrip("/"), mount):
            if (directory / kills).is_file():
                return directory / kills, directory / limit
    return None, None
