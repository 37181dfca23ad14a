"""Sets of sample positions, as ranges [start, stop)."""

import heapq
from collections.abc import Iterable, Iterator
from typing import TypeVar

from trainer.protocol.records import Range

Tag = TypeVar("Tag")


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same positions, as sorted ranges that neither overlap nor touch."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def minus(ranges: Iterable[Range], other: Iterable[Range]) -> list[Range]:
    """The positions of `ranges` that are not in `other`, sorted."""
    rest: list[Range] = []
    removed = union(other)
    first = 0
    for start, stop in union(ranges):
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        index = first
        while index < len(removed) and removed[index][0] < stop:
            if start < removed[index][0]:
                rest.append((start, removed[index][0]))
            start = max(start, removed[index][1])
            index += 1
        if start < stop:
            rest.append((start, stop))
    return rest


def common(ranges: Iterable[Range], other: Iterable[Range]) -> list[Range]:
    """The positions that are in both, sorted."""
    ranges = union(ranges)
    return minus(ranges, minus(ranges, other))


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same positions in the same order, in as few ranges as possible."""
    parts: list[Range] = []
    for start, stop in ranges:
        if start >= stop:
            continue
        if parts and parts[-1][1] == start:
            parts[-1] = parts[-1][0], stop
        else:
            parts.append((start, stop))
    return tuple(parts)


def text(ranges: Iterable[Range], most: int = 3) -> str:
    """The positions in words: "5, 8 to 11 and 40 more"."""
    parts = union(ranges)
    shown = [f"{start}" if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in parts[:most]]
    hidden = sum(stop - start for start, stop in parts[most:])
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")


def overlaps(tagged: Iterable[tuple[Range, Tag]]) -> Iterator[tuple[Range, Tag, Tag]]:
    """The positions that occur twice, with the tags of two ranges that contain them."""
    open_until: list[tuple[int, int, Tag]] = []
    for number, ((start, stop), tag) in enumerate(sorted(tagged, key=lambda one: one[0])):
        while open_until and open_until[0][0] <= start:
            heapq.heappop(open_until)
        if open_until:
            until, _, other = open_until[0]
            yield (start, min(stop, until)), other, tag
        if start < stop:
            heapq.heappush(open_until, (stop, number, tag))
