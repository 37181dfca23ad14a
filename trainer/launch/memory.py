"""What the kernel says of the memory of this process and its children: its memory cgroup, of either version.

Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files; version 1:
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. In a container the cgroup is the container's, and what is
mounted at `ROOT` begins with it, whatever `/proc/self/cgroup` calls it.
"""

from pathlib import Path

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # bytes: version 1 writes a number near 2^63 where there is none


class MemoryGroup:
    """This process's memory cgroup.

    Args:
        root: Where cgroups are mounted.
        membership: Says which one is this process's.
    """

    def __init__(self, root: Path = ROOT, membership: Path = MEMBERSHIP) -> None:
        self._kills, self._limit = _files(root, membership)

    def kills(self) -> int | None:
        """How many processes of it the kernel has killed because memory was short; None: it does not say."""
        try:
            lines = self._kills.read_text().splitlines() if self._kills else []
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
        except (OSError, ValueError):
            return None

    def limit(self) -> int | None:
        """Bytes that it may take; None: no limit of its own is known."""
        try:
            text = self._limit.read_text().strip() if self._limit else ""
        except OSError:
            return None
        return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None


def _files(root: Path, membership: Path) -> tuple[Path | None, Path | None]:
    """Those that count kills and that have the limit."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None, None
    places: list[tuple[Path, str, str, str]] = []
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            places.append((root / "memory", path, "memory.oom_control", "memory.limit_in_bytes"))
        elif not controllers:
            places.append((root, path, "memory.events", "memory.max"))
    for mount, path, kills, limit in places:
        for directory in (mount / path.lstrip("/"), mount):
            if (directory / kills).is_file():
                return directory / kills, directory / limit
    return None, None
