"""The collective of a synchronisation: the weighted mean over a group of members, in pieces, several in flight.

A piece of the vector is cut into n equal parts, and each of the n members owns one: (1) every member encodes the parts
and sends each to its owner (a reduce-scatter); (2) the owner computes the mean in float32, re-encodes it, and (3) sends
it to all members (an all-gather). So a member sends (n − 1) / n of the encoded vector and of the encoded mean, as with
a ring, and all members, including the owner, decode the same bytes.

Where it takes no more bytes (`all_to_all`: two members, or a few with a sparse codec whose mean is finer), each member
sends everything to all others instead, and nothing is encoded twice.

While a piece is in flight, later pieces are encoded, and earlier ones are decoded and added to the outer step, so on a
slow link the arithmetic takes almost no extra time. Rows are sent from, and received into, the buffers where they stay.
The members' weights are sent along with the first pieces, which saves a round trip. Instead of a plain
mean, members may merge by RDA, or clip norms: see trainer/diloco/merge.py.

*Error feedback* (`Codec.feedback`): each member keeps the error of its own message; the owner also keeps the error of
the encoded mean, times W / w, because its contribution will be scaled by its fraction w / W of the total weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.group import Group
from trainer.diloco.jit import Floats, compiled
from trainer.diloco.merge import MEAN, Merge, Radial
from trainer.diloco.outer import OuterOptimizer
from trainer.diloco.prepared import Prepared
from trainer.diloco.quorum import Coded, OnChunk, Reduced
from trainer.diloco.state import GlobalState
from trainer.diloco.threads import Workspace

CHUNK_BYTES = 1 << 20  # maximum size of a piece; on a slow link, twice this costs 5 %, and eight times 15 %
IN_FLIGHT = 32  # pieces; a link of 500 Mbit/s and 100 ms holds six, its queue holds more, and some streams are slower
EXPECTED = IN_FLIGHT  # pieces for which receives are posted in advance: other members may be that far ahead
PIECES = 16  # minimum number of pieces unless they are tiny, because encoding the first one overlaps with nothing
SMALLEST = 1 << 18  # numbers
_WEIGHTS = 1 << 31  # the tag of the members' weights and norms
SLICE = 1 << 17  # numbers that are encoded or summed at once, so that they stay in the cache


def weighted_mean(
    group: Group,
    values: Tensor,
    weight: float,
    codec: Codec,
    on_chunk: OnChunk,
    workspace: Workspace | None = None,
    merge: Merge = MEAN,
) -> Reduced:
    """The weighted mean of the members' `values`, or the result of another `merge`. Calls `Prepared` and `reduce`."""
    workspace = workspace or Workspace()
    return reduce(group, Prepared(values, weight, codec, workspace, merge), on_chunk, workspace)


def reduce(group: Group, own: Prepared, on_chunk: OnChunk, workspace: Workspace) -> Reduced:
    """The weighted mean of the values that the members have prepared, or the result of another merge.

    Args:
        on_chunk: Receives the mean. Not called if all weights are 0.
        workspace: Memory for `Reduced.error`.

    Raises:
        OSError: A member is gone, or a message took too long.
    """
    codec = own.codec.among(group.size)
    exchange = _AllToAll if all_to_all(codec, group.size) else _ByOwners
    try:
        return exchange(group, codec, own, on_chunk, workspace).run()
    except _NothingToDo:
        return Reduced.nothing(own.values)


def all_to_all(codec: Codec, members: int) -> bool:
    """Whether each member sends everything to all others, because that takes no more bytes than using owners."""
    return members > 1 and members * codec.row <= codec.row + codec.mean.row


class _NothingToDo(Exception):
    """All weights are 0."""


@dataclass
class _Piece:
    """A run of blocks."""

    number: int
    blocks: Tensor
    start: int  # of its rows in the encoded vector
    came: list[Tensor] = field(default_factory=list)  # the rows that this member sums, by the sender's rank
    wanted: list[list[Any]] = field(default_factory=lambda: [[], []])  # receives in flight, in each of two stages
    sent: list[Any] = field(default_factory=list)  # sends in flight

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.blocks))


class _Exchange(ABC):
    """One member's part in one collective."""

    def __init__(self, group: Group, codec: Codec, own: Prepared, on_chunk: OnChunk, workspace: Workspace) -> None:
        self.group, self.codec, self.own, self.on_chunk, self.merge = group, codec, own, on_chunk, own.merge
        self.size, self.rank, self.workspace = group.size, group.rank, workspace
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.plain, self.digest = isinstance(codec, Fp32), xxhash.xxh3_128()

    def run(self) -> Reduced:
        # Exchange weights and norms, which are needed once the first pieces have arrived
        own, codec, self.n = self.own, self.codec, self.own.values.numel()
        self.weights = list(torch.zeros(self.size, 2, dtype=torch.float64))
        self.weights[self.rank][0], self.weights[self.rank][1] = own.weight, own.norm
        self.coming = [self.group.receive(rank, _WEIGHTS, self.weights[rank]) for rank in self.others]
        self.coming += [self.group.send(rank, _WEIGHTS, self.weights[self.rank]) for rank in self.others]

        # With RDA, norms are not encoded
        give, self.radial = self.on_chunk, None
        if own.directions:
            merged = self.workspace.empty("merged", 1, self.n)[0]
            self.radial = Radial(self.group, self.merge, own.directions, own.weight, merged)
            self.on_chunk = self.radial.collect

        # Allocate memory
        pieces, count = list(self._pieces(own.blocks)), sum(map(len, own.blocks))
        self.last = pieces[-1].number
        keep = (codec.feedback > 0 or (self.radial is not None and not self.plain)) and own.weight > 0
        self.error = self.workspace.empty("error", count, codec.block) if keep else None
        self.mean = None if codec.in_order else self.workspace.empty("mean", count, codec.block)
        codec_of_mean, messages = self.means()
        self.coded = [torch.empty(count, codec_of_mean.row, dtype=torch.uint8) for _ in range(messages)]

        # Pass the pieces through the stages, each of which is some pieces behind the previous one
        stages = [self.expect, *self.stages()]
        starts = [0, *(EXPECTED + number * IN_FLIGHT for number in range(len(stages) - 1))]
        for turn in range(len(pieces) + starts[-1]):
            for start, stage in zip(starts, stages, strict=True):
                if 0 <= turn - start < len(pieces):
                    stage(pieces[turn - start])

        # Return results in the order of the vector
        if self.mean is not None:
            self.on_chunk(0, codec.restore(self.mean, self.n))
        coded = [self.coded[0].view(-1).view(torch.float32)[: self.n]] if self.plain else self.coded
        scales = self.scales if len(coded) > 1 else [1.0]
        factors = None
        if self.radial:
            factors, merged = self.radial.result([float(weight) for weight, _ in self.weights])
            self.digest.update(cast(bytes, factors.numpy().data))
            give(0, merged)
        left = self._left() if codec.feedback > 0 else None
        if left is not None and self.radial:
            left = self.radial.restored(left)
        return Reduced(self.total, tuple(zip(scales, coded, strict=True)), self.digest.hexdigest(), left, factors)

    def _left(self) -> Tensor | None:
        """The error so far, in the order of the vector."""
        return None if self.error is None else self.codec.restore(self.error, self.n)

    @cached_property
    def total(self) -> float:
        """Wait for all members' weights and return their sum. Raises _NothingToDo if it is 0."""
        for pending in self.coming:
            self.group.wait(pending)
        total = sum(float(weight) for weight, _ in self.weights)  # in the order of ranks: the same bits everywhere
        if not total > 0:
            raise _NothingToDo
        return total

    @cached_property
    def shares(self) -> list[float]:
        """The members' fractions of the total weight, by rank."""
        return [float(weight) / self.total for weight, _ in self.weights]

    @cached_property
    def scales(self) -> list[float]:
        """The factors of the members' messages, by rank. With RDA, the messages are directions, scaled by shares."""
        shares = self.shares
        return shares if self.radial else self.merge.scales(shares, [float(norm) for _, norm in self.weights])

    @abstractmethod
    def means(self) -> tuple[Codec, int]:
        """The mean is kept as a sum of messages. Returns their codec and their number."""

    @abstractmethod
    def expect(self, piece: _Piece) -> None:
        """Post the receives of the others' messages for the piece."""

    @abstractmethod
    def stages(self) -> list[Callable[[_Piece], None]]:
        """The operations on each piece, in order, while other pieces are in flight."""

    def _pieces(self, parts: list[Tensor]) -> Iterator[_Piece]:
        block = self.codec.block
        numbers = min(max(sum(map(len, parts)) * block // PIECES, SMALLEST), CHUNK_BYTES * block // self.codec.row)
        step, start = max(numbers // (block * self.size), 1) * self.size, 0
        for number, blocks in enumerate(blocks for part in parts for blocks in torch.split(part, step) if len(blocks)):
            yield _Piece(number, blocks, start)
            start += len(blocks)

    def _encode(self, piece: _Piece, rows: Tensor) -> Tensor:
        """Encode a piece into `rows` (fp32 is passed through uncopied) and keep the error."""
        if self.plain:
            self._encoded(piece)
            return self.codec.encode(piece.blocks)

        def encode(now: slice) -> None:
            blocks, coded = piece.blocks[now], rows[now].copy_(self.codec.encode(piece.blocks[now]))
            if self.error is not None:
                left = self.error[piece.rows][now]
                torch.sub(blocks, self.codec.decode(coded, left), out=left)

        self.workspace.threads.run(encode, _slices(self.codec, rows))
        self._encoded(piece)
        return rows

    def _encoded(self, piece: _Piece) -> None:
        if self.radial and piece.number == self.last:
            self.radial.send_norms(self._left())

    def _receive(self, piece: _Piece, stage: int, into: dict[int, Tensor]) -> None:
        tag = 2 * piece.number + stage
        piece.wanted[stage] = [self.group.receive(rank, tag, into[rank]) for rank in self.others if len(into[rank])]

    def _send(self, piece: _Piece, stage: int, rows: dict[int, Tensor]) -> None:
        tag = 2 * piece.number + stage
        piece.sent += [self.group.send(rank, tag, rows[rank]) for rank in self.others if len(rows[rank])]

    def _wait(self, piece: _Piece, stage: int) -> None:
        for pending in (*piece.wanted[stage], *piece.sent):
            self.group.wait(pending)
        piece.wanted[stage], piece.sent = [], []

    def _hash(self, *kept: Tensor) -> None:
        """Hash the rows that encode a piece of the mean, slice by slice, in the same order in all members."""
        for now in _slices(self.codec, kept[0]):
            for rows in kept:
                self.digest.update(cast(bytes, rows[now].numpy().data))

    def _give(self, start: int, mean: Tensor) -> None:
        """Pass blocks of the mean, from block `start` on, to `on_chunk`."""
        if self.mean is None:
            start *= self.codec.block
            self.on_chunk(start, mean.view(-1)[: self.n - start])
        else:
            self.mean[start : start + len(mean)] = mean


class _AllToAll(_Exchange):
    """Each member sends everything to all others. With fp32 (two members), the mean itself is kept."""

    def means(self) -> tuple[Codec, int]:
        return self.codec, 1 if self.plain else self.size

    def stages(self) -> list[Callable[[_Piece], None]]:
        return [self._swap, self._join]

    def expect(self, piece: _Piece) -> None:
        """The others' rows are received where they stay; with fp32, where the mean will be."""
        piece.came = [self.coded[0 if self.plain else rank][piece.rows] for rank in range(self.size)]
        self._receive(piece, 0, dict(enumerate(piece.came)))

    def _swap(self, piece: _Piece) -> None:
        rows = piece.came[self.rank] = self._encode(piece, piece.came[self.rank])
        self._send(piece, 0, dict.fromkeys(self.others, rows))

    def _join(self, piece: _Piece) -> None:
        """Compute the mean of all members' rows, in rank order; with fp32, in place in the other's rows."""
        self._wait(piece, 0)
        order, scales = [*self.others, self.rank] if self.plain else range(self.size), self.scales

        def join(now: slice) -> None:
            messages = [(scales[rank], piece.came[rank][now]) for rank in order]
            kept = messages[0][1].view(torch.float32) if self.plain else None
            self._give(piece.start + now.start, weighted_sum(self.codec, messages, self.workspace, kept))

        self.workspace.threads.run(join, _slices(self.codec, piece.blocks))
        self._hash(*([piece.came[order[0]]] if self.plain else piece.came))


class _ByOwners(_Exchange):
    """Each member sends every owner its part, and sends the mean of its own part to all members."""

    def means(self) -> tuple[Codec, int]:
        return self.codec.mean, 1

    def stages(self) -> list[Callable[[_Piece], None]]:
        return [self._scatter, self._reduce, self._gather]

    def expect(self, piece: _Piece) -> None:
        """Post receives for the others' rows of this member's part, and for the means of their parts."""
        kept = self.coded[0][piece.rows].tensor_split(self.size)
        piece.came = list(torch.empty(self.size, len(kept[self.rank]), self.codec.row, dtype=torch.uint8))
        self._receive(piece, 0, dict(enumerate(piece.came)))
        self._receive(piece, 1, dict(enumerate(kept)))

    def _scatter(self, piece: _Piece) -> None:
        """Encode the piece and send each owner its part."""
        rows = self._encode(piece, torch.empty(len(piece.blocks), self.codec.row, dtype=torch.uint8))
        parts = rows.tensor_split(self.size)
        piece.came[self.rank] = parts[self.rank]
        self._send(piece, 0, dict(enumerate(parts)))

    def _reduce(self, piece: _Piece) -> None:
        """Compute the mean of the part that this member owns, and send it to all members."""
        self._wait(piece, 0)
        codec, rows = self.codec.mean, self.coded[0][piece.rows].tensor_split(self.size)[self.rank]
        scales = self.scales
        error = None if self.radial or self.merge.root else self.error  # otherwise its norm would be wrong

        def reduce(now: slice) -> None:
            messages = [(scale, came[now]) for scale, came in zip(scales, piece.came, strict=True)]
            total = weighted_sum(self.codec, messages, self.workspace)
            coded = rows[now].copy_(codec.encode(total))
            if error is not None:
                left = error[piece.rows].tensor_split(self.size)[self.rank][now]
                left.add_(total.sub_(codec.decode(coded, torch.empty_like(total))), alpha=1 / self.shares[self.rank])

        self.workspace.threads.run(reduce, _slices(codec, rows))
        piece.came = []
        self._send(piece, 1, dict.fromkeys(self.others, rows))

    def _gather(self, piece: _Piece) -> None:
        self._wait(piece, 1)
        codec, rows = self.codec.mean, self.coded[0][piece.rows]

        def gather(now: slice) -> None:
            mean = codec.decode(rows[now], self.workspace.empty("sum", now.stop - now.start, codec.block, own=True))
            self._give(piece.start + now.start, mean)

        self.workspace.threads.run(gather, _slices(codec, rows))
        self._hash(rows)


def decoded(coded: Coded, codec: Codec, size: int) -> Tensor:
    """Decode the mean in `Reduced.coded`, float32 (`size`,), to the same bits as in the collective.

    Raises:
        ValueError, RuntimeError: It was encoded by another codec.
    """
    if coded[0][1].dtype == torch.float32:
        return coded[0][1]
    inner = codec.among(len(coded)) if len(coded) > 1 else codec.mean
    messages = [(scale, rows.view(-1, inner.row)) for scale, rows in coded]
    if any(rows.shape != messages[0][1].shape for _, rows in messages):
        raise ValueError("not an encoded mean: its parts differ in length")
    blocks, workspace = torch.empty(len(messages[0][1]), codec.block), Workspace()
    for now in _slices(codec, blocks):
        weighted_sum(inner, [(scale, rows[now]) for scale, rows in messages], workspace, blocks[now])
    return codec.restore(blocks, size)


def weighted_sum(
    codec: Codec, messages: list[tuple[float, Tensor]], workspace: Workspace, out: Tensor | None = None
) -> Tensor:
    """The sum of encoded rows, each times its scale. The sum of two has the same bits in either order.

    Args:
        out: Memory for the sum; by default, the workspace's "sum". It may contain the first message's numbers.
    """
    (scale, rows), *others = messages
    shape = len(rows), codec.block
    out = workspace.empty("sum", *shape, own=True) if out is None else out
    first = codec.decode(rows, out)
    if first.data_ptr() != out.data_ptr():
        out.copy_(first)
    for other, rows in others:
        values = codec.decode(rows, workspace.empty("other", *shape, own=True))
        _add(out.numpy(), values.numpy(), np.float32(scale), np.float32(other))
        scale = 1.0
    return out if others else out.mul_(scale)


@compiled
def _add(total: Floats, values: Floats, scale: np.float32, other: np.float32) -> None:
    """Add in place; otherwise the compiler would check at run time whether the arrays overlap."""
    for row in range(len(total)):
        for i in range(total.shape[1]):
            total[row, i] = scale * total[row, i] + other * values[row, i]


def _slices(codec: Codec, rows: Tensor) -> Iterator[slice]:
    """Slices of the rows (or blocks) that are small enough to stay in the cache."""
    step = max(1, SLICE // codec.block)
    return (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step))


def warm_up(codec: Codec, outer: OuterOptimizer) -> None:
    """Run a synchronisation's arithmetic once, so that the first real one need not wait for the compiler."""
    rows = codec.encode(torch.zeros(2, codec.block))
    mean = weighted_sum(codec, [(0.5, rows), (0.5, rows)], Workspace())
    codec.mean.decode(codec.mean.encode(mean), mean)
    GlobalState(torch.zeros(mean.numel()), outer).apply(mean.view(-1), 1)
