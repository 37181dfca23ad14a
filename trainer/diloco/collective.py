"""The collective of a synchronisation: the weighted mean over a process group, in pieces, several on their way.

A piece of the vector is cut into as many equal parts as there are members, and each member owns one: (1) everybody
sends every owner its part, coded (a reduce-scatter); (2) the owner forms the mean in float32, codes it again, and (3)
sends that to everybody (an all-gather). So a member sends 2 (n − 1) / n times the coded vector, as with a ring, and all
of them, the owner too, decode the same bytes.

Two members send no more if each sends the other everything: so they do, and nothing needs to be coded again.

While a piece is on its way, later ones are coded, and earlier ones decoded and taken into the outer step: on a slow
link that costs next to nothing, and beside a fast one the link does. Members send to each other directly, from the
memory where the rows are and into that where they are kept: gloo's own collectives copy more often.

*What is lost in coding* can be kept (`Codec.feedback`): by each member what its own message has left out; by the
owner also what coding the mean has. Of that it keeps W / w times as much, which will count w / W, its share.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed import AllreduceOptions, ReduceOp, Work

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.jit import Floats, compiled
from trainer.diloco.outer import OuterOptimizer
from trainer.diloco.quorum import Coded, Reduced, Take, is_finite
from trainer.diloco.state import GlobalState

CHUNK_BYTES = 1 << 20  # of a piece, at most: twice as many on a slow link cost 5 %, eight times 15 %
IN_FLIGHT = 4  # pieces
EXPECTED = 16  # pieces that are expected before they are sent: a sender must not have to ask first
PIECES = 16  # so many at least, if they are not tiny: what cannot overlap is one piece's coding
SMALLEST = 1 << 18  # numbers
SLICE = 1 << 17  # numbers that are coded or summed at once: what that reads and writes stays in the cache


class Workspace:
    """Memory that a member's collectives use again and again: what one has given is valid until the next one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, rows: int, columns: int) -> Tensor:
        """float32 (`rows`, `columns`)."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)


def weighted_mean(
    group: Any,
    values: Tensor,
    weight: float,
    codec: Codec,
    timeout: timedelta,
    take: Take,
    workspace: Workspace | None = None,
) -> Reduced:
    """The mean of the members' `values`, weighted by their weights.

    Values that are not finite are sent as zeros with weight 0, since 0 × NaN is NaN.

    Args:
        group: A ProcessGroupGloo.
        values: float32 (n,), on the host, contiguous. Not changed, so that an attempt that fails can be made again.
        weight: At least 0.
        timeout: How long any one message may take.
        take: Gets the mean. It is not called if there is none, all weights being 0.
        workspace: Where `Reduced.error` is to be put. By default into fresh memory, which is slower.

    Raises:
        RuntimeError: A member is gone, or a piece took too long.
    """
    if not is_finite(values):
        weight = 0.0
    weights = torch.zeros(group.size(), dtype=torch.float64)
    weights[group.rank()] = weight
    options = AllreduceOptions()
    options.reduceOp, options.timeout = ReduceOp(ReduceOp.SUM), timeout
    group.allreduce([weights], options).wait(timeout)
    total = float(weights.sum())
    if total == 0:
        return Reduced.nothing(values)
    exchange = _OfTwo if group.size() == 2 else _OfMore
    shares = (weights / total).tolist()
    return exchange(group, codec, timeout, shares, take, workspace or Workspace()).run(values, total)


def warm_up(codec: Codec, outer: OuterOptimizer) -> None:
    """Compile what a synchronisation needs, so that nobody has to wait for that in the first one."""
    rows = codec.encode(torch.zeros(2, codec.block))
    mean = _sum(codec, [(0.5, rows), (0.5, rows)], Workspace())
    codec.mean.decode(codec.mean.encode(mean), mean)
    GlobalState(torch.zeros(mean.numel()), outer).apply(mean.view(-1), 1)


@dataclass
class _Piece:
    """Some blocks, and where in the coded vector their rows begin.

    Attributes:
        came: Every member's rows of what is this one's to sum, by rank.
        wanted, sent: What is on its way, in each of two stages.
    """

    number: int
    blocks: Tensor
    start: int
    came: list[Tensor] = field(default_factory=list)
    wanted: list[list[Work]] = field(default_factory=lambda: [[], []])
    sent: list[Work] = field(default_factory=list)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + len(self.blocks))


class _Exchange(ABC):
    """One member's part in one collective.

    Args:
        shares: Every member's share of the sum of weights, by rank.
    """

    def __init__(
        self, group: Any, codec: Codec, timeout: timedelta, shares: list[float], take: Take, workspace: Workspace
    ) -> None:
        self.group, self.codec, self.timeout, self.shares, self.take = group, codec, timeout, shares, take
        self.size, self.rank = group.size(), group.rank()
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.share = shares[self.rank]
        self.plain = isinstance(codec, Fp32)
        self.workspace = workspace
        self.digest = xxhash.xxh3_128()

    def run(self, values: Tensor, weight: float) -> Reduced:
        codec, self.n = self.codec, values.numel()
        parts = codec.arrange(values if self.share else torch.zeros_like(values))  # 0 × NaN is NaN
        pieces, count = list(self._pieces(parts)), sum(map(len, parts))
        keep = codec.feedback > 0 and self.share > 0
        self.error = self.workspace.empty("error", count, codec.block) if keep else None
        self.mean = None if codec.in_order else self.workspace.empty("mean", count, codec.block)
        codec_of_mean, shares = self.means()
        self.coded = [torch.empty(count, codec_of_mean.row, dtype=torch.uint8) for _ in shares]
        stages = [self.expect, *self.stages()]
        starts = [0, *(EXPECTED + number * IN_FLIGHT for number in range(len(stages) - 1))]
        for turn in range(len(pieces) + starts[-1]):
            for start, stage in zip(starts, stages, strict=True):
                if 0 <= turn - start < len(pieces):
                    stage(pieces[turn - start])
        if self.mean is not None:
            self.take(0, codec.restore(self.mean, self.n))
        coded = [self.coded[0].view(-1).view(torch.float32)[: self.n]] if self.plain else self.coded
        left = None if self.error is None else codec.restore(self.error, self.n)
        return Reduced(weight, tuple(zip(shares, coded, strict=True)), self.digest.hexdigest(), left)

    @abstractmethod
    def means(self) -> tuple[Codec, list[float]]:
        """What the mean is kept as: the sum of so many messages, each times its share; and their codec."""

    @abstractmethod
    def expect(self, piece: _Piece) -> None:
        """Begin to take what the others will send of the piece."""

    @abstractmethod
    def stages(self) -> list[Callable[[_Piece], None]]:
        """What is done to each piece, one after the other, while others are on their way."""

    def _pieces(self, parts: list[Tensor]) -> Iterator[_Piece]:
        block = self.codec.block
        numbers = min(max(sum(map(len, parts)) * block // PIECES, SMALLEST), CHUNK_BYTES * block // self.codec.row)
        step = max(numbers // (block * self.size), 1) * self.size
        start = 0
        for number, blocks in enumerate(blocks for part in parts for blocks in part.split(step) if len(blocks)):
            yield _Piece(number, blocks, start)
            start += len(blocks)

    def _encode(self, piece: _Piece, rows: Tensor) -> Tensor:
        """The piece, coded, in memory for it; numbers as they are, where they are. What that leaves out is kept."""
        if self.plain:
            return self.codec.encode(piece.blocks)
        for now in _slices(self.codec, rows):
            blocks, coded = piece.blocks[now], rows[now]
            coded.copy_(self.codec.encode(blocks))
            if self.error is not None:
                left = self.error[piece.rows][now]
                torch.sub(blocks, self.codec.decode(coded, left), out=left)
        return rows

    def _receive(self, piece: _Piece, stage: int, into: dict[int, Tensor]) -> None:
        """Begin to take the others' rows."""
        tag = 2 * piece.number + stage
        piece.wanted[stage] = [self.group.recv([into[rank]], rank, tag) for rank in self.others if len(into[rank])]

    def _send(self, piece: _Piece, stage: int, rows: dict[int, Tensor]) -> None:
        """Begin to send the others rows."""
        tag = 2 * piece.number + stage
        piece.sent += [self.group.send([rows[rank]], rank, tag) for rank in self.others if len(rows[rank])]

    def _wait(self, piece: _Piece, stage: int) -> None:
        for work in (*piece.wanted[stage], *piece.sent):
            work.wait(self.timeout)
        piece.wanted[stage], piece.sent = [], []

    def _give(self, start: int, mean: Tensor, *kept: Tensor) -> None:
        """Blocks of the mean, from the one of that number on, and what is kept of them."""
        for rows in kept:
            self.digest.update(cast(bytes, rows.numpy().data))
        if self.mean is None:
            start *= self.codec.block
            self.take(start, mean.view(-1)[: self.n - start])
        else:
            self.mean[start : start + len(mean)] = mean


class _OfTwo(_Exchange):
    """Each sends the other everything."""

    def means(self) -> tuple[Codec, list[float]]:
        return self.codec, [1.0] if self.plain else self.shares  # numbers as they are: the mean itself

    def stages(self) -> list[Callable[[_Piece], None]]:
        return [self._swap, self._join]

    def expect(self, piece: _Piece) -> None:
        """The other's rows come to where they are kept; numbers as they are, to where their mean will be."""
        piece.came = [coded[piece.rows] for coded in (self.coded[0], self.coded[-1])]
        other = 1 - self.rank
        self._receive(piece, 0, {other: piece.came[other]})

    def _swap(self, piece: _Piece) -> None:
        """Code the piece, and send it to the other."""
        piece.came[self.rank] = self._encode(piece, piece.came[self.rank])
        self._send(piece, 0, {1 - self.rank: piece.came[self.rank]})

    def _join(self, piece: _Piece) -> None:
        """Form the mean of what both have coded."""
        self._wait(piece, 0)
        for now in _slices(self.codec, piece.blocks):
            rows = [came[now] for came in piece.came]
            order = (1 - self.rank, self.rank)
            messages = [(self.shares[rank], rows[rank]) for rank in order]
            kept = rows[order[0]].view(torch.float32) if self.plain else None
            mean = _sum(self.codec, messages, self.workspace, kept)
            self._give(piece.start + now.start, mean, *([mean] if self.plain else rows))


class _OfMore(_Exchange):
    """Each sends every owner what is his, and what is its own to all."""

    def means(self) -> tuple[Codec, list[float]]:
        return self.codec.mean, [1.0]

    def stages(self) -> list[Callable[[_Piece], None]]:
        return [self._scatter, self._reduce, self._gather]

    def expect(self, piece: _Piece) -> None:
        """The others' rows of what this member owns, and what they make of what they own."""
        kept = self.coded[0][piece.rows].tensor_split(self.size)
        piece.came = list(torch.empty(self.size, len(kept[self.rank]), self.codec.row, dtype=torch.uint8))
        self._receive(piece, 0, dict(enumerate(piece.came)))
        self._receive(piece, 1, dict(enumerate(kept)))

    def _scatter(self, piece: _Piece) -> None:
        """Code the piece, and send each owner its part."""
        rows = self._encode(piece, torch.empty(len(piece.blocks), self.codec.row, dtype=torch.uint8))
        parts = rows.tensor_split(self.size)
        piece.came[self.rank] = parts[self.rank]
        self._send(piece, 0, dict(enumerate(parts)))

    def _reduce(self, piece: _Piece) -> None:
        """Form the mean of the part that this member owns, and send it to everybody."""
        self._wait(piece, 0)
        codec, rows = self.codec.mean, self.coded[0][piece.rows].tensor_split(self.size)[self.rank]
        for now in _slices(codec, rows):
            messages = [(share, came[now]) for share, came in zip(self.shares, piece.came, strict=True)]
            total = _sum(self.codec, messages, self.workspace)
            coded = rows[now].copy_(codec.encode(total))
            if self.error is not None:
                left = self.error[piece.rows].tensor_split(self.size)[self.rank][now]
                left.add_(total.sub_(codec.decode(coded, torch.empty_like(total))), alpha=1 / self.share)
        piece.came = []
        self._send(piece, 1, dict.fromkeys(self.others, rows))

    def _gather(self, piece: _Piece) -> None:
        """Decode the piece's mean."""
        self._wait(piece, 1)
        codec, rows = self.codec.mean, self.coded[0][piece.rows]
        for now in _slices(codec, rows):
            mean = codec.decode(rows[now], self.workspace.empty("sum", now.stop - now.start, codec.block))
            self._give(piece.start + now.start, mean, rows[now])


def decoded(coded: Coded, codec: Codec, size: int) -> Tensor:
    """The mean, float32 (`size`,), of what `Reduced.coded` holds: to the last bit what it was.

    Raises:
        ValueError, RuntimeError: It is none of this codec's.
    """
    if coded[0][1].dtype == torch.float32:
        return coded[0][1]
    inner = codec if len(coded) > 1 else codec.mean
    messages = [(share, rows.view(-1, inner.row)) for share, rows in coded]
    if any(rows.shape != messages[0][1].shape for _, rows in messages):
        raise ValueError("not a coded mean: its parts are not of the same length")
    blocks, workspace = torch.empty(len(messages[0][1]), codec.block), Workspace()
    for now in _slices(codec, blocks):
        _sum(inner, [(share, rows[now]) for share, rows in messages], workspace, blocks[now])
    return codec.restore(blocks, size)


def _sum(codec: Codec, messages: list[tuple[float, Tensor]], workspace: Workspace, out: Tensor | None = None) -> Tensor:
    """The sum of what rows hold, each times its share. Of two it is the same, to the last bit, in either order.

    Args:
        out: Where to put it; by default into the workspace's "sum". It may be where the first message's numbers are.
    """
    (share, rows), *others = messages
    shape = len(rows), codec.block
    out = workspace.empty("sum", *shape) if out is None else out
    first = codec.decode(rows, out)
    if first.data_ptr() != out.data_ptr():
        out.copy_(first)
    for other, rows in others:
        _add(
            out.numpy(),
            codec.decode(rows, workspace.empty("other", *shape)).numpy(),
            np.float32(share),
            np.float32(other),
        )
        share = 1.0
    return out if others else out.mul_(share)


@compiled
def _add(total: Floats, values: Floats, share: np.float32, other: np.float32) -> None:
    """In place: a `total` of its own would have to be compared with the others' memory, or be slow."""
    for row in range(len(total)):
        for i in range(total.shape[1]):
            total[row, i] = share * total[row, i] + other * values[row, i]


def _slices(codec: Codec, rows: Tensor) -> Iterator[slice]:
    """Of as many rows (or blocks), so large that what they hold stays in the cache."""
    step = max(1, SLICE // codec.block)
    return (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step))
