"""The collective of a synchronisation: the weighted mean over a process group, in pieces, several on their way.

*Numbers as they are* (fp32) are summed by gloo's all-reduce.

*Coded numbers* cannot be summed on the way. A piece of the vector is cut into as many equal parts as there are members,
and each member owns one: (1) everybody sends every owner its part, coded (a reduce-scatter); (2) the owner forms the
mean in float32, codes it again, and (3) sends that to everybody (an all-gather). So a member sends 2 (n − 1) / n times
the coded vector, as with a ring, and all of them, the owner too, decode the same bytes.

Two members send no more if each sends the other everything: so they do, and nothing needs to be coded again.

While a piece is on its way, later ones are coded and earlier ones decoded: on a slow link the codec costs next to
nothing, and beside a fast one the link does.

*What is lost in coding* can be kept (`Codec.feedback`): by each member what its own message has left out; by the
owner also what coding the mean has. Of that it keeps W / w times as much, which will count w / W, its share.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions  # the only one that torch.distributed does not export
from torch.distributed import AllreduceOptions, AllToAllOptions, ReduceOp, Work

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.quorum import Coded, Reduced, is_finite

CHUNK_BYTES = 1 << 20  # of a piece, at most: twice as many on a slow link cost 5 %, eight times 15 %
IN_FLIGHT = 4  # pieces
PIECES = 16  # so many at least, if they are not tiny: what cannot overlap is one piece's coding
SMALLEST = 1 << 18  # numbers
SLICE = 1 << 18  # numbers that are coded at once: a megabyte, so that a codec's passes stay in the cache


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
    group: Any, values: Tensor, weight: float, codec: Codec, timeout: timedelta, workspace: Workspace | None = None
) -> Reduced:
    """The mean of the members' `values`, weighted by their weights.

    Values that are not finite are sent as zeros with weight 0, since 0 × NaN is NaN.

    Args:
        group: A ProcessGroupGloo.
        values: float32 (n,), on the host, contiguous. Not changed: the mean is formed in memory of its own, so that an
            attempt that fails can be made again.
        weight: At least 0.
        timeout: How long any one piece may take.
        workspace: Where the result is to be put, if it was coded. By default into fresh memory, which is slower.

    Raises:
        RuntimeError: A member is gone, or a piece took too long.
    """
    if not is_finite(values):
        weight = 0.0
    weights = torch.zeros(group.size(), dtype=torch.float64)
    weights[group.rank()] = weight
    _all_reduce(group, weights, timeout).wait(timeout)
    total = float(weights.sum())
    if total == 0:
        return Reduced.nothing(values)
    shares = (weights / total).tolist()
    if isinstance(codec, Fp32):
        return _summed(group, values, shares[group.rank()], total, timeout)
    return _Coded(group, codec, timeout, shares, workspace or Workspace()).run(values, total)


def _summed(group: Any, values: Tensor, share: float, total: float, timeout: timedelta) -> Reduced:
    """By all-reduce. Weights are applied before the sum, so that what comes out is the mean."""
    mean = torch.empty_like(values)
    works: deque[Work] = deque()
    pieces = CHUNK_BYTES // mean.element_size()
    for piece, own in zip(mean.split(pieces), values.split(pieces), strict=True):
        if len(works) == IN_FLIGHT:
            works.popleft().wait(timeout)
        torch.mul(own, share, out=piece) if share else piece.zero_()
        works.append(_all_reduce(group, piece, timeout))
    for work in works:
        work.wait(timeout)
    return Reduced(mean, total, ((1.0, mean),))


@dataclass
class _Piece:
    """Some blocks, and where in the coded vector their rows begin."""

    blocks: Tensor
    start: int
    work: Any = None  # what of it is on its way
    rows: Any = None  # uint8 (b, row): what that brings

    @property
    def stop(self) -> int:
        return self.start + len(self.blocks)


class _Coded:
    """One coded collective of one member.

    Args:
        shares: Every member's share of the sum of weights, by rank.
    """

    def __init__(self, group: Any, codec: Codec, timeout: timedelta, shares: list[float], workspace: Workspace) -> None:
        self.group, self.codec, self.timeout, self.shares = group, codec, timeout, shares
        self.size, self.rank = group.size(), group.rank()
        self.share = shares[self.rank]
        self.workspace = workspace

    def run(self, values: Tensor, weight: float) -> Reduced:
        codec, n = self.codec, values.numel()
        parts = codec.arrange(values if self.share else torch.zeros_like(values))  # 0 × NaN is NaN
        pieces, count = list(self._pieces(parts)), sum(map(len, parts))
        keep = codec.feedback > 0 and self.share > 0
        self.mean = self.workspace.empty("mean", count, codec.block)
        self.error = self.workspace.empty("error", count, codec.block) if keep else None
        # What the mean is the sum of.
        row, shares = (codec.row, self.shares) if self.size == 2 else (codec.mean.row, [1.0])
        self.coded = [torch.empty(count, row, dtype=torch.uint8) for _ in shares]
        stages = [self._swap, self._take] if self.size == 2 else [self._send, self._reduce, self._take]
        for turn in range(len(pieces) + (len(stages) - 1) * IN_FLIGHT):
            for number, stage in enumerate(stages):
                index = turn - number * IN_FLIGHT
                if 0 <= index < len(pieces):
                    stage(pieces[index])
        left = None if self.error is None else codec.restore(self.error, n)
        return Reduced(codec.restore(self.mean, n), weight, tuple(zip(shares, self.coded, strict=True)), left)

    def _pieces(self, parts: list[Tensor]) -> Iterator[_Piece]:
        block = self.codec.block
        numbers = min(max(sum(map(len, parts)) * block // PIECES, SMALLEST), CHUNK_BYTES * block // self.codec.row)
        step = max(numbers // (block * self.size), 1) * self.size
        start = 0
        for part in parts:
            for blocks in part.split(step):
                if len(blocks):
                    yield _Piece(blocks, start)
                    start += len(blocks)

    def _swap(self, piece: _Piece) -> None:
        """Code the piece, send it to the other, and put this member's share of it into the mean."""
        rows = torch.empty(len(piece.blocks), self.codec.row, dtype=torch.uint8)
        mean = self.mean[piece.start : piece.stop]
        left = mean if self.error is None else self.error[piece.start : piece.stop]
        for blocks, coded, out, lost in _slices(self.codec, piece.blocks, rows, mean, left):
            self.codec.decode(coded.copy_(self.codec.encode(blocks)), out)
            if self.error is not None:
                torch.sub(blocks, out, out=lost)
            out.mul_(self.share)
        self._gather(piece, rows)

    def _send(self, piece: _Piece) -> None:
        """Code the piece, and send each owner its part."""
        rows = _encode(self.codec, piece.blocks, -(-len(piece.blocks) // self.size) * self.size)
        if self.error is not None:
            left = self.error[piece.start : piece.stop]
            torch.sub(piece.blocks, _decode(self.codec, rows, left), out=left)
        piece.rows, options = torch.empty_like(rows), AllToAllOptions()
        options.timeout = self.timeout
        piece.work = self.group.alltoall_base(piece.rows, rows, [], [], options)

    def _reduce(self, piece: _Piece) -> None:
        """Form the mean of the part that this member owns, and send it to everybody."""
        piece.work.wait(self.timeout)
        part = len(piece.rows) // self.size
        messages = list(zip(self.shares, piece.rows.chunk(self.size), strict=True))
        total = _sum(self.codec, messages, torch.empty(part, self.codec.block))
        rows = _encode(self.codec.mean, total, part)
        if self.error is not None:
            left = self.error[piece.start : piece.stop][self.rank * part : (self.rank + 1) * part]
            total.sub_(_decode(self.codec.mean, rows, torch.empty_like(total)))
            left.add_(total[: len(left)], alpha=1 / self.share)
        self._gather(piece, rows)

    def _take(self, piece: _Piece) -> None:
        """Decode the piece's mean, or the other member's share of it."""
        piece.work.wait(self.timeout)
        mean = self.mean[piece.start : piece.stop]
        rows = [rows[: len(piece.blocks)] for rows in piece.rows.chunk(len(self.coded))]
        for coded, came in zip(self.coded, rows, strict=True):
            coded[piece.start : piece.stop] = came
        if self.size == 2:
            _add(self.codec, rows[1 - self.rank], self.shares[1 - self.rank], mean)
        else:
            _decode(self.codec.mean, rows[0], mean)
        piece.rows = piece.work = None

    def _gather(self, piece: _Piece, rows: Tensor) -> None:
        """Send rows to everybody."""
        piece.rows, options = torch.empty(self.size * len(rows), rows.shape[1], dtype=torch.uint8), AllgatherOptions()
        options.timeout = self.timeout
        piece.work = self.group._allgather_base(piece.rows, rows, options)


def decoded(coded: Coded, codec: Codec, size: int) -> Tensor:
    """The mean, float32 (`size`,), of what `Reduced.coded` holds: to the last bit what it was."""
    if coded[0][1].dtype == torch.float32:
        return coded[0][1]
    inner = codec if len(coded) > 1 else codec.mean
    messages = [(share, rows.view(-1, inner.row)) for share, rows in coded]
    return codec.restore(_sum(inner, messages, torch.empty(len(messages[0][1]), codec.block)), size)


def _all_reduce(group: Any, values: Tensor, timeout: timedelta) -> Work:
    """Begin to sum `values` in place."""
    options = AllreduceOptions()
    options.reduceOp, options.timeout = ReduceOp(ReduceOp.SUM), timeout
    return group.allreduce([values], options)


def _encode(codec: Codec, blocks: Tensor, count: int) -> Tensor:
    """`count` rows: blocks that are missing are zeros."""
    rows = torch.empty(count, codec.row, dtype=torch.uint8)
    for part, coded in _slices(codec, blocks, rows[: len(blocks)]):
        coded.copy_(codec.encode(part))
    if count > len(blocks):
        rows[len(blocks) :] = codec.encode(torch.zeros(count - len(blocks), codec.block))
    return rows


def _decode(codec: Codec, rows: Tensor, out: Tensor) -> Tensor:
    """Decode as many rows as `out` has blocks."""
    for part, coded in _slices(codec, out, rows[: len(out)]):
        codec.decode(coded, part)
    return out


def _sum(codec: Codec, messages: list[tuple[float, Tensor]], out: Tensor) -> Tensor:
    """The sum of what rows hold, each times its share. Of two it is the same, to the last bit, in either order."""
    (share, rows), *others = messages
    _decode(codec, rows, out).mul_(share)
    for share, rows in others:
        _add(codec, rows, share, out)
    return out


def _add(codec: Codec, rows: Tensor, share: float, total: Tensor) -> None:
    """Add `share` times what the rows hold: rounded before it is added, which `alpha` need not do."""
    scratch = torch.empty(max(1, SLICE // codec.block), codec.block)
    for part, coded in _slices(codec, total, rows):
        part.add_(codec.decode(coded, scratch[: len(part)]).mul_(share))


def _slices(codec: Codec, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of as many rows each, a slice at a time."""
    return zip(*(part.split(max(1, SLICE // codec.block)) for part in rows), strict=True)
