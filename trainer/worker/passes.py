"""Forward and backward passes: inner steps, and scoring of held-out samples, together in all processes of a worker."""

import math
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import checkpoint, data
from trainer.errors import Interrupted
from trainer.island.parallel import resharding, whole
from trainer.protocol.samples import Range
from trainer.tasks import scoring
from trainer.worker.ddp import World
from trainer.worker.setup import Process

CLIP_NORM = 1.0


@dataclass(frozen=True)
class Step:
    """The result of an inner step over all processes of the worker."""

    loss: float  # mean over its batches
    gradient_norm: float  # before clipping
    finite: bool  # otherwise it was skipped
    tokens: int
    flops: float  # required by the model; 0: unknown


class Passes:
    """This process's passes. In an island, only the leader's methods are called.

    Args:
        world: The quorum of the `ddp` baseline.
        stopping: Set when this process has to end.
    """

    def __init__(self, process: Process, stopping: threading.Event, world: World | None = None) -> None:
        self._process, self._world, self._stopping = process, world, stopping
        self._flops: dict[tuple[torch.Size, ...], float] = {}  # of a batch, by the shapes of its columns
        if process.island:
            process.island.on(step=self._step, score=self._score)

    def step(self, lr: float) -> Step:
        """Make one inner step, over batches that add up to `batch_size`."""
        island = self._process.island
        if island is None:
            return self._step(lr)
        step: Step = island.run("step", lr=lr, ranges=self._process.samples.to_read)
        return step

    def score(self, rank: int, world_size: int) -> tuple[dict[str, Any], int]:
        """Score the model on this worker's part of the held-out samples. Returns sums (`Task.score`) and sample count.

        Args:
            rank: This worker's rank among `world_size`.

        Raises:
            Interrupted: The process has to end.
        """
        island = self._process.island
        if island is None:
            return self._score(rank, world_size)
        sums: tuple[dict[str, Any], int] = island.run("score", rank=rank, world_size=world_size)
        return sums

    def _step(self, lr: float, ranges: list[Range] | None = None) -> Step:
        """Make an inner step in this process. `ranges`: new positions for an island's followers to read, if any."""
        process, optimizer = self._process, self._process.optimizer
        if ranges is not None and process.island and not process.island.leads:
            process.samples.read(tuple((start, stop) for start, stop in ranges))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        # Forward and backward; on a GPU, reading the loss and the norm waits only once for both
        total, tokens, flops = self._accumulate_gradients()
        norm = whole(nn.utils.clip_grad_norm_(process.parameters, CLIP_NORM))
        if process.island:
            loss, gradient_norm, tokens, flops = self._over_island(total, norm, tokens, flops)
        else:
            loss, gradient_norm = torch.stack([total, norm.to(total.dtype)]).tolist()
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(loss, gradient_norm, finite, tokens, flops)

    def _accumulate_gradients(self) -> tuple[Tensor, int, float]:
        """Run an inner step's batches forward and backward. Returns the mean loss (a scalar), tokens and FLOPs."""
        process, loss_of, world, tokens, flops = self._process, self._process.loss, self._world, 0, 0.0
        batches = process.config.process_batch_size // process.samples.per_device
        total = torch.zeros((), device=process.device)
        with world.lost_ranks() if world else nullcontext():
            for number in range(batches):
                batch = scoring.on_device(process.samples.next_batch(), process.shared, process.device)
                # Data parallelism averages the gradients in the last backward pass
                waits = isinstance(loss_of, DistributedDataParallel) and number < batches - 1
                with loss_of.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    with scoring.autocast(process.device):
                        loss = loss_of(batch) / batches
                    loss.backward()
                total += loss.detach()
                tokens += process.task.tokens(batch)
                flops += self._flops_of(batch)
            if world:
                total = world.mean_loss(total)
        return total, tokens, flops

    def _flops_of(self, batch: Mapping[str, Tensor]) -> float:
        shapes = tuple(column.shape for column in batch.values())
        if shapes not in self._flops:
            self._flops[shapes] = self._process.task.flops(self._process.model, batch)
        return self._flops[shapes]

    def _over_island(self, loss: Tensor, norm: Tensor, tokens: int, flops: float) -> tuple[float, float, int, float]:
        """Mean loss, gradient norm, total tokens and FLOPs. If one process has to end, all end together."""
        island = self._process.island
        assert island is not None
        counts = torch.tensor([self._stopping.is_set(), tokens, flops], dtype=torch.float64, device=loss.device)
        summed = island.total(torch.cat([(loss / island.size).double().view(1), counts]))
        mean, stopping, all_tokens, all_flops, norm_ = torch.cat([summed, norm.double().view(1)]).tolist()
        if stopping > 0:
            self._stopping.set()
        return mean, norm_, int(all_tokens), all_flops

    def _score(self, rank: int, world_size: int) -> tuple[dict[str, Any], int]:
        process, island = self._process, self._process.island
        task, model, split, samples = process.task, process.model, process.dataset.validation, process.samples
        of_worker = data.evenly(len(split), process.config.eval_samples)[rank::world_size]
        chosen = of_worker[island.rank :: island.size] if island else of_worker
        size = min(process.config.per_device_train_batch_size, samples.per_device)
        passes = math.ceil(math.ceil(len(of_worker) / (island.size if island else 1)) / size)
        # FSDP reuses memory between passes, so inference mode is not possible
        quietly = torch.no_grad() if process.is_sharded else torch.inference_mode()
        sums: dict[str, Any] = {}
        with scoring.evaluating(model, process.device, process.config.seed), resharding(model):
            scoring.recompute_buffers(task, model, process.dataset, size, process.device)
            with quietly:
                batches = scoring.batches(split, chosen, size, process.shared, process.device)
                for _ in range(passes):
                    self._raise_if_stopping()
                    if (batch := next(batches, None)) is not None:
                        scoring.add(sums, task.score(model, batch))
                    elif process.is_sharded:  # the other processes need this one for their passes
                        filler = scoring.batches(split, of_worker[:1], 1, process.shared, process.device)
                        task.score(model, next(filler))
        if island:
            found = [checkpoint.unpack(one) for one in island.collect(checkpoint.pack(sums))]
            sums = scoring.total(found)
        return sums, len(of_worker)

    def _raise_if_stopping(self) -> None:
        stopping, island = self._stopping.is_set(), self._process.island
        if island.agree(stopping) if island else stopping:
            raise Interrupted
