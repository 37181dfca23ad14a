"""The inner loop: what one worker does from its start to the run's final checkpoint."""

import importlib.metadata
import logging
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer import checkpoint, data, models
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.config import TrainingConfig
from trainer.diloco import DDP, Averaged, Commit, DiLoCo, OuterOptimizer, Overlap, Superseded, codecs, outer
from trainer.elastic.member import ElasticQuorum, Hooks
from trainer.elastic.quorum import FixedQuorum
from trainer.errors import ConfigError, Interrupted, TrainingError
from trainer.files import require_free_space
from trainer.monitor.events import EventLog
from trainer.monitor.sinks import sinks
from trainer.process import number_from
from trainer.protocol.rounds import Cursor, Range, Share, cursor_from_json, deal, unused, used_of
from trainer.tasks import scoring, tasks
from trainer.volume import Volume
from trainer.worker.compilation import compile_model
from trainer.worker.optimizer import inner_optimizer, learning_rate
from trainer.worker.profiling import Profile, profile

logger = logging.getLogger(__name__)

PROTOCOL = 2  # what members say to each other; those of another version are refused
CLIP_NORM = 1.0
DAMPING = 0.5  # weight of the last round's speed beside that of those before
CHECKPOINT_BYTES = 20  # a parameter: global copy, outer momentum, two Adam moments, and inside a round the local copy


def train(config: TrainingConfig) -> int:
    """Train as one worker, under a torchrun agent, until the run's final checkpoint is committed.

    Args:
        config: The worker's own (see `trainer.volume.worker_configs`); the data and the model are precached.

    Returns:
        0, the exit status: the run is complete.

    Raises:
        ConfigError: This worker cannot take part as it is configured.
        TrainingError: The run failed, or another worker is gone and this one should be started again.
        Interrupted: Told to leave (SIGTERM, SIGINT), with everything saved.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with ExitStack() as resources:
        return Worker(config, stopping, resources).run()


class Worker:
    """One worker of a run. `run` is the whole story; the rest says how each sentence of it is done."""

    def __init__(self, config: TrainingConfig, stopping: threading.Event, resources: ExitStack) -> None:
        self.config, self.stopping = config, stopping
        local_rank = number_from("LOCAL_RANK")
        self.volume = Volume.of(config, local_rank)
        self.device = device_of(config, local_rank)
        spec = models.resolve(config.model)
        self.task = tasks()[spec.family.task]
        self.dataset = data.open_dataset(data.directory(config, self.volume.datasets))
        manifest = self.dataset.manifest
        model = models.build(models.directory(config, manifest.for_model, self.volume.models), config.seed)
        self.model = model.to(self.device).train()
        self.shared = scoring.shared_tensors(self.dataset.shared, self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = inner_optimizer(config, self.model, self.task.parameter_groups(self.model))
        size = sum(parameter.numel() for parameter in self.parameters)
        missing = max(1, config.keep_checkpoints + 1 - len(checkpoint.paths(self.volume.checkpoints)))
        require_free_space(self.volume.checkpoints, size * CHECKPOINT_BYTES * missing, "checkpoint_path")

        fingerprint = {
            "protocol": PROTOCOL,
            "model": spec.name,
            "dataset": manifest.hash,
            **config.in_scope("fingerprint"),
        }
        # Data parallelism averages every step's gradients: a member less is a world that starts again.
        kind: type[FixedQuorum | ElasticQuorum] = FixedQuorum if config.optim_method == "ddp" else ElasticQuorum
        hooks = Hooks(
            self._go_on_with,
            self._rest_of_share,
            self._save_in_need,
            self._moments,
            self._speed,
            self._progress,
            lambda message: self.metrics.warn(message),  # which do not exist yet
        )
        self.quorum = kind(config, fingerprint, stopping.is_set, hooks)
        resources.enter_context(self.quorum)
        worker = self.quorum.worker
        self.metrics = resources.enter_context(EventLog(self.volume.metrics))
        self.diloco = (DDP if config.optim_method == "ddp" else DiLoCo)(
            self.model,
            self.optimizer,
            outer=Averaged.of(outer_of(config), spec.average_decay**config.round_steps),
            codec=codec_of(config),
            sync_every=config.local_steps,
            quorum=self.quorum,
            total_steps=config.total_steps,
            late_policy=config.late_policy,
            fragments=config.fragments,
            overlap=Overlap(config.overlap_tau, config.overlap_alpha) if config.overlaps else None,
            while_waiting=self._save_if_wanted,
        )
        self.metrics.sinks += sinks(config, worker, self.volume.root, self.metrics.warn, local_rank)
        self.checkpointer = resources.enter_context(
            closing(Checkpointer(self.volume.checkpoints, config.keep_checkpoints, self._saved))
        )
        checkpoint.seed_random_state(config.seed + 1 + worker)  # of dropout and the like: each worker its own
        self.order = data.SampleOrder(len(self.dataset.train), config.seed, self.dataset.group)
        self.share = Share(0, 0, ())  # the sample positions that this worker trains on
        self.used = 0  # how many of them it has consumed
        self.used_at_arrival = 0  # how many of them when the quorum has last been told
        self.skipped = self.skipped_in_a_row = 0
        self.samples = self.steps_taken = 0  # consumed, and made, by this process
        self.busy = (0, 0.0)  # inner steps but for the first, which is slow, and the seconds that they took
        self.since = 0.0  # when the last one ended
        self.ramp = 1  # inner steps over which a joiner's learning rate rises while its moments build up
        self.last_loss = math.nan
        self.held_out: float | None = None  # loss of this worker's share of the held-out samples
        self.bytes = 0  # sent and received by this process
        self.told = (0, time.time())  # samples, and when, that `status` has been told of
        self.last_saved_step = 0
        self.save_wanted = False
        self.saved: tuple[int, float] | None = None  # the last checkpoint's round and position
        self.members: tuple[str, ...] = ()  # of the last quorum; this worker's place among them
        self.rank, self.world_size = 0, 1
        random = checkpoint.random_state()  # what is only tried leaves no trace
        self.profile = Profile(config.per_device_train_batch_size, 0.0)
        if config.heterogeneous:
            cache = self.volume.root / "profile.json"
            self.profile = profile(config, self.task, self.model, self._some, cache, manifest.hash)
        self.speed = self.profile.speed  # samples a second, by the last rounds
        self.timed = self.busy  # those that are in it
        if config.compile_model:
            few = self._some(self.profile.batch_size)
            compile_model(config, self.task, self.model, few, self.metrics.warn)
        checkpoint.restore_random_state(random)
        own = self._own_checkpoint()
        self._join(own)
        self.metrics.write(
            "start",
            run_id=config.run_id,
            worker=worker,
            member=self.quorum.id,
            world_size=len(self.quorum.members),
            pid=os.getpid(),
            host=platform.node(),
            device=str(self.device),
            parameters=size,
            dataset=manifest.hash,
            resumed_round=self.diloco.round or None,
            config=config.model_dump(mode="json"),
            versions=versions(),
        )
        self.metrics.write("membership", change="joined", members=self.quorum.members, round=self.diloco.round)

    def _some(self, size: int) -> dict[str, Tensor]:
        """So many training samples, to try the model with: always the same ones."""
        chosen = np.arange(size) % len(self.dataset.train)
        return next(scoring.batches(self.dataset.train, chosen, size, self.shared, self.device))

    def run(self) -> int:
        """Train to the end."""
        try:
            if self.diloco.step == 0 and self.config.eval_interval:
                self._evaluate()
            while self.diloco.round_length or not self._settled():
                self._train_round()
            self._save(complete=True)
            self.checkpointer.wait()
            self.quorum.wait_for_others()
            self.quorum.finish("succeeded")
        except Interrupted:
            if self.diloco.in_flight:
                with suppress(Interrupted, TrainingError):  # it has not been, then: what there is is saved
                    self.diloco.land()
            self._save()
            self.checkpointer.wait()
            self._end("stopped", "told to leave")
            raise
        except Exception as error:
            self._end("failed", str(error) or type(error).__name__)
            raise
        self._end("complete")
        return 0

    def _train_round(self) -> None:
        """Inner steps up to the round's end, the synchronisation, and what is due after it."""
        started = time.perf_counter()
        losses: list[float] = []
        before = self.diloco.round
        commit = None
        # After a resume, everything but the synchronisation may have been done.
        while commit is None and self.diloco.round_length:
            if self.diloco.due:
                commit = self.diloco.synchronise()
                continue
            try:
                self._take_share()
            except Superseded:
                self.diloco.catch_up()
                continue
            if not self._unused():
                commit = self.diloco.land()  # what it brings is a new share
                continue
            share, self.since = self.share, time.perf_counter()
            with closing(self._batches()) as batches:
                while commit is None and not self.diloco.due and self.share is share and self._unused():
                    if self.stopping.is_set():
                        raise Interrupted
                    self._save_if_wanted()
                    commit = self._inner_step(batches, losses)
        self._report_round(commit, before, losses, time.perf_counter() - started)
        last = self.diloco.round_length == 0
        interval = self.config.eval_interval * self.config.fragments
        if interval and (last or self.diloco.round % interval == 0):
            self._evaluate()
        if not last and self.diloco.step - self.last_saved_step >= self.config.checkpoint_interval:
            self._save()

    def _settled(self) -> bool:
        """Whether the final state is the one that most members hold; if not, it has been taken anew."""
        try:
            self.quorum.settle(self.diloco.state)
        except Superseded:
            self.diloco.catch_up()
            return False
        return True

    def _take_share(self) -> None:
        """See that there are samples to train on: the rest of this worker's share, or a new one.

        While a synchronisation is on its way, the new one comes with it.
        """
        if not self._unused() and not self.diloco.in_flight:
            self.quorum.deal(after=self.share.place)

    def _go_on_with(self, share: Share) -> None:
        """Take a new share of the data."""
        if share.place > self.share.place:
            self.used = used_of(share, self.share, self.used, self.used_at_arrival)
            self.share = share

    def _inner_step(self, batches: Iterator[dict[str, Tensor]], losses: list[float]) -> Commit | None:
        """One inner step, over as many micro-batches as it takes; the round's commit if it was the round's last."""
        started = time.perf_counter()
        accumulation = self.config.batch_size // self.profile.batch_size
        step = self.diloco.position(1)  # where this one leads to
        lr = learning_rate(self.diloco.position(), self.config) * min(1.0, (self.steps_taken + 1) / self.ramp)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        total = torch.zeros((), device=self.device)
        tokens = 0
        for _ in range(accumulation):
            batch = scoring.on_device(next(batches), self.shared, self.device)
            with scoring.autocast(self.device):
                loss = self.task.loss(self.model, batch) / accumulation
            loss.backward()
            total += loss.detach()
            tokens += self.task.tokens(batch)
        self.diloco.before_optimizer_step(self.config.batch_size)
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        # One look for both, since on a GPU a look is a wait.
        mean_loss, gradient_norm = torch.stack([total, norm.to(total.dtype)]).tolist()
        finite = math.isfinite(mean_loss) and math.isfinite(gradient_norm)
        if finite:
            self.optimizer.step()
            losses.append(mean_loss)
        self.optimizer.zero_grad(set_to_none=True)
        samples = self.config.batch_size if finite else 0
        self.samples += samples
        _, positions = deal(Cursor(tails=self._unused()), self.config.batch_size)
        self.used += self.config.batch_size
        self.steps_taken += 1
        self.last_loss = mean_loss
        self.metrics.write(
            "step",
            round=self.diloco.open_round,
            step=step,
            loss=mean_loss,
            lr=lr,
            gradient_norm=gradient_norm,
            samples=samples,
            positions=positions,
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )
        self._count_skipped(finite, step)
        if self.steps_taken > 1:
            self.busy = self.busy[0] + 1, self.busy[1] + time.perf_counter() - self.since
        commit = self.diloco.after_inner_step(samples)
        self.since = time.perf_counter()
        return commit

    def _count_skipped(self, finite: bool, step: float) -> None:
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.metrics.warn(f"step {step:g} is skipped: its loss or gradient is not finite")
        if self.skipped_in_a_row > self.config.max_skipped_steps:
            reason = (
                f"{self.skipped_in_a_row} inner steps in a row had a loss or gradient that is not finite "
                f"(max_skipped_steps = {self.config.max_skipped_steps}): try a lower lr or a longer warm-up"
            )
            self.quorum.finish("failed", reason)  # it would end so again: nobody should start it again
            raise TrainingError(reason)

    def _report_round(self, commit: Commit | None, before: int, losses: list[float], seconds: float) -> None:
        """Tell of the round that this worker has taken part in, and of those that were committed without it."""
        own = self.diloco.round - (commit is not None)
        if own > before:
            self.metrics.write("membership", change="caught up", round=own, missed=own - before)
        if commit is None:
            return
        if commit.reduced.weight == 0:
            self.metrics.warn(f"round {self.diloco.round} moved nothing: no worker's pseudo-gradient was finite")
        self.bytes += (commit.bytes_sent or 0) + (commit.bytes_received or 0)
        self.rank, self.world_size = commit.members.index(self.quorum.id), len(commit.members)
        if commit.members != self.members:
            if set(self.members) - set(commit.members):
                self.last_saved_step = -self.config.checkpoint_interval  # their volumes may have the newest checkpoint
            self.members = commit.members
            self.metrics.write("membership", change="quorum", members=commit.members, round=self.diloco.round)
        self.metrics.write(
            "round",
            round=self.diloco.round,
            attempt=commit.attempt,
            step=self.diloco.state.step,
            world_size=len(commit.members),
            members=commit.members,
            loss=sum(losses) / len(losses) if losses else math.nan,
            bytes_sent=commit.bytes_sent,
            bytes_received=commit.bytes_received,
            sync_seconds=commit.seconds,
            exposed_seconds=self.diloco.exposed_seconds,
            seconds=seconds,
            inner_steps=len(losses),
            samples=len(losses) * self.config.batch_size,
        )

    def _evaluate(self) -> None:
        """Score this worker's share of the held-out samples: all workers' together are the score."""
        started = time.perf_counter()
        chosen = data.evenly(len(self.dataset.validation), self.config.eval_samples)[self.rank :: self.world_size]
        size = min(self.config.per_device_train_batch_size, self.profile.batch_size)
        sums: dict[str, Any] = {}
        with self.diloco.global_parameters(), scoring.evaluating(self.model, self.device, self.config.seed):
            scoring.recompute_buffers(self.task, self.model, self.dataset, size, self.device)
            with torch.inference_mode():
                for batch in scoring.batches(self.dataset.validation, chosen, size, self.shared, self.device):
                    if self.stopping.is_set():
                        raise Interrupted
                    scoring.add(sums, self.task.score(self.model, batch))
        if sums:
            scores = self.task.metrics(sums)
            self.held_out = scores["loss"] if math.isfinite(scores["loss"]) else None
            self.metrics.write(
                "eval",
                round=self.diloco.round,
                step=self.diloco.step,
                samples=len(chosen),
                seconds=time.perf_counter() - started,
                **scores,
            )

    def _join(self, own: Checkpoint | None) -> None:
        """Become a member, and go on where the run is: with this worker's own checkpoint, or with what others have."""
        cursor, term = Cursor(), 0
        if checkpoint.paths(self.volume.checkpoints) and (own is None or own.state["worker"] == self.quorum.worker):
            # This worker may have told of a newer one, which turned out to be corrupt: nobody need wait for it.
            self.quorum.durable(own.round if own else 0)
        if own is not None:
            self.diloco.load_global(own.global_tensors, own.round, own.state["base_step"])
            cursor, term = cursor_from_json(own.state["cursor"]), own.state["term"]
            if own.state["worker"] == self.quorum.worker:
                self.speed = own.state.get("speed") or self.speed
        self.quorum.join(self.diloco.state, cursor, term)
        self.diloco.begin_round()
        self.members = self.quorum.members
        if self.quorum.id in self.members:
            self.rank, self.world_size = self.members.index(self.quorum.id), len(self.members)
        self.last_saved_step = self.diloco.step
        if own is not None and own.state["worker"] == self.quorum.worker:
            self._take_own_state(own)
        elif self.diloco.round and not (self.config.joiner_moments == "donor" and self._take_moments()):
            self.ramp = self.config.local_steps

    def _own_checkpoint(self) -> Checkpoint | None:
        own = checkpoint.newest(self.volume.checkpoints, self.metrics.warn)
        if own is None and self.config.resume not in ("auto", "never"):
            own = checkpoint.read(Path(self.config.resume))
        return own

    def _take_own_state(self, own: Checkpoint) -> None:
        """The inner optimizer, and, if it belongs to the open round, what was done towards that."""
        state = own.worker()
        checkpoint.restore_random_state(state["random"])
        scoring.restore(self.model, state["buffers"])
        self.skipped, self.skipped_in_a_row = own.state["skipped"]
        share = tuple((start, stop) for start, stop in own.state["share"])
        dealt = self.quorum.dealt
        if own.round == self.diloco.round and dealt is not None and dealt.ranges == share:
            self.diloco.load_worker_state(state["diloco"])
            self.share, self.used = dealt, own.state["used"]
        else:  # the samples of the open round have been dealt anew: what was done with them is done again
            self.optimizer.load_state_dict(state["diloco"]["inner_optimizer"])

    def _take_moments(self) -> bool:
        """Another member's inner optimizer state: Adam's moments, which would take long to build up. Whether there was
        any."""
        found = self.quorum.fetch_moments()
        own = self.optimizer.state_dict()
        if not found:
            return False
        state: dict[int, dict[str, Tensor]] = {}
        shapes = [parameter.shape for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in found.items():
            index, _, key = name.partition(".")
            shape = shapes[int(index)] if tensor.numel() > 1 else torch.Size(())
            state.setdefault(int(index), {})[key] = tensor.view(shape) if tensor.numel() > 1 else tensor.reshape(())
        self.optimizer.load_state_dict({**own, "state": state})
        self.metrics.write("membership", change="took moments", round=self.diloco.round)
        return True

    def _moments(self) -> dict[str, Tensor]:
        """The inner optimizer's state, flat, for a joiner. It goes on changing meanwhile; that does no harm."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{index}.{key}": value.detach().to("cpu").reshape(-1)
            for index, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def _unused(self, used: int | None = None) -> tuple[Range, ...]:
        """What is left of this worker's share. Nothing in another term: that deals the same samples anew."""
        if self.share.term != self.quorum.term:
            return ()
        return unused(self.share.ranges, self.used if used is None else used)

    def _rest_of_share(self) -> Share:
        used = self.used_at_arrival = self.used  # once: inner steps may go on meanwhile
        return replace(self.share, ranges=self._unused(used))

    def _speed(self) -> float:
        """Samples a second of the inner steps, by the last rounds: asked whenever one ends."""
        busy = self.busy  # once: under `async_communication` inner steps go on meanwhile
        steps, seconds = busy[0] - self.timed[0], busy[1] - self.timed[1]
        if steps and seconds > 0:
            new = steps * self.config.batch_size / seconds
            self.speed += (new - self.speed) * (DAMPING if self.timed[0] else 1)
            self.timed = busy
        return self.speed

    def _progress(self) -> dict[str, float | int | None]:
        """What `status` shows of this worker: told after each commit, so the speed is the last round's."""
        (before, since), now = self.told, time.time()
        self.told = self.samples, now
        return {
            "step": self.diloco.step,
            "round": self.diloco.round,
            "loss": self.last_loss if math.isfinite(self.last_loss) else None,
            "samples": self.samples,
            "held_out": self.held_out,
            "bytes": self.bytes,
            "speed": (self.samples - before) / (now - since) if now > since else 0.0,
            "time": now,
        }

    def _save_in_need(self) -> None:
        """Too few workers are left to go on: what there is should be durable while the others are waited for."""
        self.save_wanted = True
        if threading.current_thread() is threading.main_thread():
            self._save_if_wanted()  # else inner steps go on meanwhile: between two of them

    def _save_if_wanted(self) -> None:
        if self.save_wanted:
            self.save_wanted = False
            self._save()

    def _save(self, *, complete: bool = False) -> None:
        base, place = self.quorum.base, (self.diloco.round, self.diloco.position())
        # There is nothing new; or it has been interrupted on the way to a newer state, and the older is on the disk.
        if not complete and (place == self.saved or base.round != self.diloco.round):
            return
        self.saved = place
        self.checkpointer.save(
            self.diloco.global_tensors(),
            {
                "diloco": self.diloco.worker_state(),
                "random": checkpoint.random_state(),
                "buffers": dict(self.model.named_buffers()),
            },
            {
                "round": self.diloco.round,
                "step": self.diloco.step,
                "base_step": self.diloco.state.step,
                "term": self.quorum.term,
                "cursor": asdict(base.cursor),
                "share": self.share.ranges,
                "used": self.used,
                "speed": self.speed,
                "skipped": [self.skipped, self.skipped_in_a_row],
                "run_id": self.config.run_id,
                "worker": self.quorum.worker,
                "global_hash": self.diloco.state.hash(),
                "config": self.config.model_dump(mode="json"),
                "dataset": self.dataset.manifest.hash,
                "versions": versions(),
            },
            complete=complete,
        )
        self.last_saved_step = self.diloco.step

    def _saved(self, path: Path, seconds: float, size: int) -> None:
        round, step = checkpoint.place_of(path)
        self.metrics.write("checkpoint", round=round, step=step, path=str(path), seconds=seconds, bytes=size)
        self.quorum.durable(round)

    def _end(self, status: str, reason: str = "") -> None:
        self.metrics.write(
            "end",
            status=status,
            reason=reason,
            round=self.diloco.round,
            step=self.diloco.step,
            skipped_steps=self.skipped,
            samples=self.samples,
            global_hash=self.diloco.state.hash(),
        )

    def _batches(self) -> Generator[dict[str, Tensor], None, None]:
        return data.batches(
            self.dataset.train,
            self.order,
            np.concatenate([np.arange(start, stop) for start, stop in self._unused()]),
            self.profile.batch_size,
            pin_memory=self.device.type == "cuda",
        )


def device_of(config: TrainingConfig, local_rank: int = 0) -> torch.device:
    """The device of a node's worker. Raises ConfigError if this machine does not have it."""
    if not config.device.startswith("cuda"):
        return torch.device(config.device)
    if not torch.cuda.is_available():
        raise ConfigError(
            "device", config.device, "there is no GPU here that torch can use; on a CPU, say --device cpu"
        )
    device = torch.device(config.device if ":" in config.device else f"cuda:{local_rank}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError("device", str(device), f"this machine has {torch.cuda.device_count()} GPUs")
    return device


def codec_of(config: TrainingConfig) -> codecs.Codec:
    """What the configuration puts pseudo-gradients on the wire with."""
    if config.optim_method == "demo":
        topk = config.compression_topk
        return codecs.make("demo", feedback=config.feedback, topk=topk, values=config.codec)
    return codecs.make(config.codec, feedback=config.feedback, topk=config.sparse_topk)


def outer_of(config: TrainingConfig) -> OuterOptimizer:
    """The outer optimizer that the configuration asks for."""
    return outer.make(config.outer_optimizer, config.outer_lr, config.momentum)


def versions() -> dict[str, str]:
    """Of what the run's numbers depend on."""
    packages = ("torch", "transformers", "datasets", "numpy", "diloco-pipelines")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
