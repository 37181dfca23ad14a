"""The baseline, `optim_method=ddp`: torch's own DistributedDataParallel, in the world formed by torchrun.

All ranks take every inner step together, with averaged gradients, so that their parameters stay equal. A round is only
the unit of reports and checkpoints: its outer step replaces the global parameters with the local ones. When a rank
dies, torchrun (with the rendezvous `trainer.launch.etcd3_rendezvous`) restarts all ranks from the newest checkpoint of
any rank.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import TrainingConfig
from trainer.diloco import CatchUp, Commit, Fragment, GlobalState, LocalQuorum, RoundReport
from trainer.diloco.quorum import OnChunk
from trainer.elastic.keys import SLOT_VARIABLE, Status, agree, finish, verdict
from trainer.errors import Interrupted, TrainingError, one_line
from trainer.etcd.client import EtcdClient
from trainer.files import whole_directory
from trainer.process import number_from
from trainer.protocol.records import Cursor, State
from trainer.protocol.samples import Assignment
from trainer.tasks import Task
from trainer.worker.wire_meter import WireMeter

log = logging.getLogger(__name__)


class PeerLeft(TrainingError):
    """Another rank has to leave. This one is healthy and restarts with it."""


class Loss(nn.Module):
    """The task's loss as a module, so that data parallelism works for every task."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.task.loss(self.model, batch)


class World(LocalQuorum):
    """All ranks of torchrun's world, as a quorum with the interface of `trainer.elastic.member.ElasticQuorum`."""

    shortage, departing = False, frozenset[str]()  # there is no world without all ranks

    def __init__(self, config: TrainingConfig, fingerprint: Mapping[str, Any], stopping: threading.Event) -> None:
        super().__init__()
        self._config, self._fingerprint, self._stopping = config, fingerprint, stopping
        self.rank, self.world_size = number_from("RANK"), number_from("WORLD_SIZE") or 1
        self.worker = number_from(SLOT_VARIABLE) * config.elastic.nproc_per_node + number_from("LOCAL_RANK")
        self.members = tuple(f"{rank:04d}" for rank in range(self.world_size))
        self.id = self.members[self.rank]
        self.term, self.base = 1, State()
        self._client: EtcdClient | None = None
        self._meter = WireMeter()
        self._read: tuple[int, int] | None = None
        self._leaving = False
        self._cuda = config.device.startswith("cuda")

    def connect(self, directory: Path, found: Checkpoint | None) -> Checkpoint | None:
        """Join torchrun's world and return the newest checkpoint of any rank. Ranks without it receive its files.

        `found` is the newest one in this rank's `directory`.

        Raises:
            ConfigError: This rank does not fit the run.
            TrainingError: The run already has a verdict, or a rank is gone.
        """
        self._client = EtcdClient.of(self._config)
        if (result := verdict(self._client)).terminal:
            raise TrainingError(str(result))
        agree(self._client, f"worker {self.worker}", self._fingerprint)

        if self._config.network_interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", self._config.network_interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", self._config.network_interface)
        # torch chooses between the two backends by a tensor's device
        with self.lost_ranks(), WireMeter.watching() as self._meter:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self._cuda else "gloo",
                timeout=timedelta(seconds=self._config.elastic.rdzv_timeout),
                store=dist.HashStore() if self.world_size == 1 else None,
                rank=self.rank,
                world_size=self.world_size,
            )
        with self.lost_ranks():
            return self._newest(directory, found)

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The mean over all ranks, so that they skip the same inner steps. It also shares whether a rank has to end."""
        stopping = torch.full_like(loss, float(self._stopping.is_set()))
        both = torch.stack([loss / self.world_size, stopping])
        dist.all_reduce(both)
        self._leaving = both[1].item() > 0
        return both[0]

    def check_stopping(self) -> None:
        """Between two inner steps, raise Interrupted if this process has to end, and PeerLeft if another rank does."""
        if self._leaving:
            raise Interrupted if self._stopping.is_set() else PeerLeft("another worker was asked to leave")

    @contextmanager
    def lost_ranks(self) -> Iterator[None]:
        """Turn broken connections into TrainingErrors."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TrainingError | torch.OutOfMemoryError):
                raise
            raise TrainingError(f"the connection to another worker broke: {one_line(error)}") from None

    def synchronise(
        self, pseudo_gradient: Tensor, weight: float, report: RoundReport, fragment: Fragment, on_chunk: OnChunk
    ) -> Commit:
        """End a round. All ranks already have the same parameters."""
        commit = super().synchronise(pseudo_gradient, weight * self.world_size, report, fragment, on_chunk)
        (_, end), (sent, received) = self._assignment().ranges[0], self._bytes()
        self.base = State(self.base.round + 1, self.base.step + self._length(), Cursor(end))
        commit = replace(commit, round=self.base.round, members=self.members, assignment=self._assignment())
        return replace(commit, bytes_sent=sent, bytes_received=received, own_weight=weight, cursor=self.base.cursor)

    def join(self, state: GlobalState, cursor: Cursor, term: int = 0, report: RoundReport | None = None) -> CatchUp:
        """Start from rank 0's global state, because different CPUs may initialise different last bits."""
        with self.lost_ranks():
            for flat in state.tensors.values():
                dist.broadcast(flat, 0)
        self.base = State(state.round, state.step, cursor)
        self._bytes()
        return CatchUp(True, self._assignment())

    def assign(self, after: tuple[int, int]) -> Assignment:
        return self._assignment()

    def reconcile(self, state: GlobalState) -> None:
        """At the end of the run, warn if the ranks' states differ."""
        if len(set(self._gathered(int(state.hash()[:15], 16)))) > 1:
            log.warning("the workers' final states differ", extra={"event": True})

    def wait_for_others(self) -> None:
        """Wait until all final checkpoints are durable."""
        with self.lost_ranks():
            dist.barrier()

    def finish(self, status: Status, reason: str = "") -> None:
        """Write the run's verdict. The first one stands."""
        assert self._client is not None
        finish(self._client, status, reason)

    def durable(self, round: int, term: int = 0) -> None: ...
    def offer(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...
    def fetch_moments(self) -> None: ...

    def leave(self, rest: Assignment | None) -> None:
        """Close all connections."""
        self._meter.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._client is not None:
            self._client.close()

    def _length(self) -> int:
        return min(self._config.local_steps, max(0, self._config.total_steps - self.base.step))

    def _assignment(self) -> Assignment:
        """The samples of all ranks in the open round. `Samples` picks this rank's part of each inner step."""
        begin = self.base.cursor.position
        samples = self._length() * self._config.batch_size * self.world_size
        return Assignment(self.term, self.base.round + 1, ((begin, begin + samples),))

    def _newest(self, directory: Path, found: Checkpoint | None) -> Checkpoint | None:
        own = (found.round, found.step) if found else (-1, -1)
        held = list(zip(*map(self._gathered, own), strict=True))
        newest = max(held)
        if set(held) == {newest}:
            return found

        # One rank that has it broadcasts its files; ranks that lack it keep them
        lacks, source, path = own != newest, held.index(newest), directory / checkpoint.name_of(*newest)
        with whole_directory(path) if lacks or found is None else nullcontext(found.path) as folder:
            for name in checkpoint.FILES:
                content = np.fromfile(folder / name, np.uint8) if self.rank == source else np.empty(0, np.uint8)
                content.resize(max(self._gathered(len(content))), refcheck=False)
                dist.broadcast(torch.from_numpy(content), source)
                if lacks:
                    content.tofile(folder / name)
        return checkpoint.read(path) if lacks else found

    def _gathered(self, own: int) -> list[int]:
        """Every rank's number, by rank. Gathering objects would use pickle, which trusts the network."""
        found = list(torch.empty(self.world_size, 1, dtype=torch.int64))
        with self.lost_ranks():
            dist.all_gather(found, torch.tensor([own]))
        return [int(number) for number in found]

    def _bytes(self) -> tuple[int | None, int | None]:
        """Bytes sent and received since the last call; None with nccl, which is not counted."""
        before, self._read = self._read, None if self._cuda else self._meter.read()
        if before is None or self._read is None:
            return None, None
        return self._read[0] - before[0], self._read[1] - before[1]
