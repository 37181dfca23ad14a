"""DiLoCo (arXiv 2311.08105): many inner steps, then one outer step on the workers' mean pseudo-gradient."""

import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.collective import warm_up
from trainer.diloco.contribution import Closed, Contribution
from trainer.diloco.flat import FlatLayout, Section
from trainer.diloco.loop import OwnLoop
from trainer.diloco.merge import Merge
from trainer.diloco.outer import Nesterov, OuterOptimizer
from trainer.diloco.overlap import Outcome, Overlap, Pending
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum, RoundReport, Superseded, is_finite
from trainer.diloco.schedule import Schedule, check_counts
from trainer.diloco.state import Fragment, GlobalState
from trainer.protocol.samples import Assignment

NO_REPORT = RoundReport()


class Stateful(Protocol):
    """The interface that `DiLoCo` needs of an inner optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class DiLoCo(OwnLoop):
    """Turns a training loop into a DiLoCo worker.

    The global parameters θ and the outer optimizer's state are float32 on the host (pinned, if the model is on a GPU);
    the device holds only the model. A round is `sync_every` inner steps followed by

        Δᵢ = θ − θᵢ,   Δ = Σ wᵢ Δᵢ / Σ wᵢ,   θ ← outer(θ, Δ),   θᵢ ← θ,

    where wᵢ counts the samples that worker i consumed in the round. For low-precision parameters,
    the θ in Δᵢ is rounded to their precision, as θᵢ was when the round began.

    *Fragments* (Streaming DiLoCo, arXiv 2501.18512): P fragments are synchronised in turn, each every `sync_every`
    inner steps. A round is then `sync_every` / P inner steps; the last round synchronises all fragments.

    *Error feedback*: the part of a worker's pseudo-gradient that a lossy codec drops (times `Codec.feedback`) is added
    to its next message.

    *Late workers*: a worker that misses the commit of a round adopts the new θ at its next inner step and carries its
    pseudo-gradient over, weighted by all samples in it. Its next round may be shorter, so that it arrives on time
    (`Schedule.keep_pace`). What it sends is scaled to one round's steps: for two whole rounds, their mean.

    Example:
        with DiLoCo(model, inner_optimizer, outer=Nesterov(lr=0.7), sync_every=128, quorum=quorum):
            for batch in loader:
                loss = step(model, batch); inner_optimizer.step(); inner_optimizer.zero_grad()

    Without the context, the loop calls `after_inner_step`. A loop that has other work to do while it is blocked calls
    `count_step` instead and, if `schedule.due`, `start`, `wait` and `finish`.

    Args:
        model: Its trainable parameters are synchronised. All workers must start from the same ones.
        inner_optimizer: Saved and restored with the worker's state; the caller steps it.
        outer: By default, DiLoCo's Nesterov.
        codec: Encodes pseudo-gradients for the wire; by default fp32.
        sync_every: Inner steps between two synchronisations of a parameter (H); a multiple of `fragments`.
        quorum: The members to synchronise with; by default, none.
        total_steps: The last round is shortened to end at this step.
        late_policy: Whether a late worker carries its pseudo-gradient over ("carry") or drops it ("drop").
        merge: How the workers' pseudo-gradients are merged, for example by their mean.
        clip_members: Whether a pseudo-gradient's norm is clipped to a multiple of the workers' median.
        fragments: P. A model that cannot be cut into P parts has fewer.
        overlap: How inner steps continue during a synchronisation. None: they wait.
        layout: Copies the parameters from and to the host; by default, for a model in this process.

    Raises:
        ValueError: An argument is not as above; a parameter cannot be synchronised (complex, sparse, without values,
            sharded, on a second GPU), or none is trainable; in `start`: parameters were added to the model.

    Attributes:
        assignment: The samples that the quorum last assigned to this worker; None: none yet.
        exposed_seconds: How long the last synchronisation blocked the inner loop.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: "Optimizer | Stateful",
        *,
        outer: OuterOptimizer | None = None,
        codec: Codec | None = None,
        sync_every: int,
        quorum: Quorum | None = None,
        total_steps: int | None = None,
        late_policy: Literal["carry", "drop"] = "carry",
        merge: Literal["mean", "sqrt", "rda"] = "mean",
        clip_members: bool = False,
        fragments: int = 1,
        overlap: Overlap | None = None,
        layout: FlatLayout | None = None,
    ) -> None:
        check_counts(sync_every=sync_every, fragments=fragments, total_steps=1 if total_steps is None else total_steps)
        if late_policy not in ("carry", "drop"):
            raise ValueError(f"late_policy = {late_policy!r}: must be 'carry' or 'drop'")
        if sync_every % fragments:
            raise ValueError(f"sync_every ({sync_every}) must be a multiple of fragments ({fragments})")
        self.model, self.inner_optimizer, self.quorum = model, inner_optimizer, quorum or LocalQuorum()
        self.late_policy, self.overlap = late_policy, overlap
        self.schedule = Schedule(sync_every // fragments, total_steps)
        self.assignment: Assignment | None = None
        self.exposed_seconds = 0.0

        # Cut the flat vector of the parameters into fragments; the last one is the full model
        codec, outer = codec or Fp32(), outer or Nesterov()
        warm_up(codec, outer)
        self._layout = layout or FlatLayout(model)
        self._sections = self._layout.sections(fragments) if fragments > 1 else []
        self._sections += self._layout.sections(1)
        shapes = [self._layout.shapes(section) for section in self._sections]
        cut = [
            Fragment(index, section.start, section.stop, codec.of(of), Merge.of(merge, clip_members, of))
            for index, (section, of) in enumerate(zip(self._sections, shapes, strict=True))
        ]
        self.state = GlobalState(self._layout.gather(self._layout.empty()), outer, cut, self._layout.like)
        self.contribution = Contribution(self.state, self._layout.rounded)

        # The synchronisation's buffers and its thread
        self._scratch = self._layout.empty()
        self._ended = self._layout.empty() if overlap else self._scratch  # the local parameters when the round ended
        self._pending: Pending | None = None
        self._blocked_since: float | None = None
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="synchronise")

    @property
    def round(self) -> int:
        """Committed rounds."""
        return self.state.round

    @property
    def open_round(self) -> int:
        """The round in which inner steps currently count."""
        return self.state.round + 1 + (self._pending is not None)

    @property
    def pending(self) -> bool:
        """Whether a synchronisation was started and has not been finished."""
        return self._pending is not None

    @property
    def complete(self) -> bool:
        """Whether all rounds are committed."""
        return self.schedule.length == 0 and not self.pending

    @property
    def blocked(self) -> bool:
        """Whether the pending synchronisation has to be finished before the next inner step."""
        delay = self.overlap.delay if self.overlap else 0
        return self._pending is not None and self._pending.blocks(self.schedule, delay)

    def after_inner_step(self, samples: float = 1.0, report: RoundReport = NO_REPORT) -> Commit | None:
        """Count an inner step. Synchronise if it ends the round; catch up if the others have moved on.

        Args:
            samples: Samples that the step consumed: the weight that it adds to this worker's pseudo-gradient. 0 for a
                skipped step.
            report: For the quorum, if the round ends here.

        Returns:
            A round's commit, if there was one. Raises the same errors as `finish`.
        """
        self.count_step(samples)
        commit = None
        if self.pending:
            commit = self.finish() if self.blocked else None
            if commit is None:
                return None
        elif self.quorum.superseded():
            self.catch_up()
            return None
        return (self.synchronise(report) if self.schedule.due else None) or commit

    def count_step(self, samples: float = 1.0) -> None:
        """Count an inner step; for `samples`, see `after_inner_step`."""
        if not 0 <= samples < math.inf:
            raise ValueError(f"samples = {samples}: must be a finite number, at least 0")
        self.schedule.inner_steps += 1
        self.contribution.count(samples, self.schedule.steps_per_cycle(self.contribution.fragments))

    def synchronise(self, report: RoundReport = NO_REPORT) -> Commit | None:
        """End the round here: exchange pseudo-gradients and take the outer step, or with `overlap`, start doing so.

        Returns:
            The commit; None if it is pending, or if the round was committed without this worker, which has caught up.
        """
        commit = self.finish() if self.pending else None
        return commit if self.start(report) else self.finish()

    def start(self, report: RoundReport = NO_REPORT) -> bool:
        """End the round and start the exchange on another thread. Returns whether inner steps may continue."""
        self._layout.check_unchanged()
        started, schedule, fragment = time.perf_counter(), self.schedule, self.state.full_model
        if not schedule.is_last:
            fragment = self.state.fragments[(self.open_round - 1) % self.contribution.fragments]
        overlaps = self.overlap is not None and not schedule.is_last

        # On a GPU, the copy runs on its own stream, and `_exchange` waits for it
        self.state.prepare()
        buffer = self._ended if overlaps else self._scratch
        ended = self._layout.gather(buffer[: fragment.stop - fragment.start], self._section(fragment), wait=False)
        closed = self.contribution.close(fragment, schedule.steps_per_cycle(self.contribution.fragments))
        outcome = self._sender.submit(self._exchange, fragment, ended, closed, report, overlaps)
        length, exposed = schedule.length, time.perf_counter() - started
        self._pending = Pending(outcome, fragment, length, schedule.inner_steps, closed, overlaps, exposed)
        schedule.start_round(schedule.begin + length)
        return overlaps

    def wait(self, seconds: float) -> bool:
        """Wait for the pending synchronisation. Returns whether `finish` can now return without blocking."""
        assert self._pending is not None
        self._blocked_since = self._blocked_since or time.perf_counter()
        return bool(wait_for([self._pending.outcome], seconds).done)

    def finish(self) -> Commit | None:
        """Wait for the pending synchronisation and take the outer step.

        Returns:
            The commit; None if the round was committed without this worker, which has caught up.

        Raises:
            TrainingError, Interrupted: From the quorum. The round is then still open.
        """
        started = self._blocked_since or time.perf_counter()
        self._blocked_since = None
        pending = self._pending
        assert pending is not None
        try:
            outcome = pending.outcome.result()
        except BaseException as error:
            # The round is still open and includes the inner steps made since
            self._pending = None
            self.schedule.start_round(self.state.step, self.schedule.inner_steps + pending.inner_steps)
            self.contribution.reopen(pending.closed)
            if not isinstance(error, Superseded):
                raise
            self.catch_up()
            return None

        # Take the outer step
        self._pending = None
        if outcome.outer_step is None:
            self.state.skip(pending.length)
        else:
            if outcome.exact:  # θ − (θ − θᵢ) is θᵢ except for rounding; a copy is exact
                self._layout.gather(outcome.outer_step.after["model"])
            self.state.commit(outcome.outer_step, pending.length)
        self.contribution.keep(pending.fragment, outcome.residual, outcome.offset)

        # Update the local parameters
        section = self._section(pending.fragment)
        if outcome.shift is not None and (self.schedule.inner_steps or outcome.offset is not None):
            self._layout.add(outcome.shift, section)
        else:
            self._layout.scatter(pending.fragment.of(self.state.parameters), section)
        self.accept(outcome.commit.assignment)
        self.quorum.announce(outcome.commit, self.state)
        self.exposed_seconds = pending.exposed + time.perf_counter() - started
        return outcome.commit

    def catch_up(self) -> None:
        """Adopt the last committed global state, and carry this worker's pseudo-gradient over."""
        # Keep the unsent work in separate memory
        own, full = self.contribution, self.state.full_model
        local = self._layout.gather(self._scratch)
        displacement = own.displacement(full, local, own.carried_over, out=local).clone()
        kept = list(own.samples), list(own.steps), list(own.steps_per_round)
        residual, before, round = own.residual, replace(self.schedule), self.round

        caught_up = self.quorum.catch_up(self.state)
        self.begin_round()
        self.accept(caught_up.assignment)
        if not caught_up.counts:
            return
        own.residual = residual
        self.schedule.keep_pace(before, self.round - round)
        if self.late_policy == "carry" and any(kept[1]):
            own.carried_over = displacement
            own.samples, own.steps, own.steps_per_round = kept

    def begin_round(self) -> None:
        """Start a round from the global state, discarding the inner steps of an open one."""
        self._layout.scatter(self.state.parameters)
        self.contribution.clear(self.state.full_model)
        self.contribution.keep(self.state.full_model, None, None)
        self.schedule.start_round(self.state.step)
        self.schedule.joined = True

    def accept(self, assignment: Assignment | None) -> None:
        """Adopt an assignment and its step multiplier; None: no change."""
        if assignment is not None:
            self.assignment = assignment
            self.schedule.step_multiplier = assignment.step_multiplier

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """Put the global parameters θ into the model for the duration of the block."""
        own, idle = self.contribution, not self.schedule.inner_steps and not self.pending
        if idle and own.fragments == 1 and own.offset is None:
            yield  # it already has them
            return
        local = self._layout.gather(self._layout.empty())
        self._layout.scatter(self.state.parameters)
        try:
            yield
        finally:
            self._layout.scatter(local)

    # Checkpoints

    def global_tensors(self) -> dict[str, Tensor]:
        """`model.<parameter>` and `outer.<state>.<parameter>`, float32, identical in all workers.

        These are views of the state, which change with the next commit: see `GlobalState.hold`.
        """
        return self._layout.parts(self.state.tensors)

    def load_global(self, tensors: Mapping[str, Tensor], round: int, step: int) -> None:
        """Start a round from saved `global_tensors`. ValueError if they belong to another model or outer optimizer."""
        own, given = ({(n, t.shape) for n, t in of.items()} for of in (self.global_tensors(), tensors))
        if own != given:
            raise ValueError(f"global state differs in {sorted({name for name, _ in own ^ given})[:3]}")
        self.state.replace(round, step, lambda name, flat: self._layout.fill(flat, tensors, name))
        self.begin_round()

    def worker_state(self) -> dict[str, Any]:
        """This worker's own state: inner optimizer, the open round's progress and, within a round, its parameters.

        A pending synchronisation counts as not started, so its round is the open one. The tensors are not copies.
        """
        pending = self._pending
        state: dict[str, Any] = {
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "inner_steps": self.schedule.inner_steps + (pending.inner_steps if pending else 0),
            **self.contribution.state(pending.closed if pending else None),
        }
        if state["inner_steps"] or self.contribution.fragments > 1 or self.contribution.offset is not None:
            state["parameters"] = self._layout.saved()
        return state

    def load_worker_state(self, state: Mapping[str, Any]) -> None:
        """Restore `worker_state`. Load the corresponding global state first."""
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.schedule.inner_steps = state["inner_steps"]
        self.contribution.load(state)
        if "parameters" in state:
            self._layout.restore(state["parameters"])

    def _section(self, fragment: Fragment) -> Section:
        return self._sections[fragment.index]

    def _exchange(
        self, fragment: Fragment, ended: Tensor, closed: Closed, report: RoundReport, overlaps: bool
    ) -> Outcome:
        """Exchange pseudo-gradients and compute the outer step, on the sender's thread. Changes nothing else.

        Args:
            ended: The local parameters when the round ended, float32 (n,); overwritten.
        """
        self._layout.wait_for_copies()
        out = self._scratch[: len(ended)]
        pseudo_gradient = self.contribution.pseudo_gradient(fragment, ended, closed, out)
        outer_step = self.state.begin(fragment)
        commit = self.quorum.synchronise(pseudo_gradient, closed.weight, report, fragment, outer_step.add)

        # The delay correction: move to the new base and keep the steps made meanwhile
        reduced, shift, offset = commit.reduced, None, None
        moved = reduced.weight > 0
        if overlaps:
            base = outer_step.after["model"] if moved else fragment.of(self.state.parameters)
            shift = torch.sub(base, ended, out=ended)
            if not is_finite(shift):  # no shift can repair these parameters: θ replaces them
                shift = None
            elif moved and self.overlap and self.overlap.mixing:
                offset = shift * -self.overlap.mixing
                shift.add_(offset)
        residual = self.contribution.left(fragment, reduced)
        replaced = moved and not overlaps and self.state.outer.replaces and self.contribution.is_plain(closed)
        taken = outer_step if moved else None
        return Outcome(commit, taken, shift, residual, offset, exact=replaced and reduced.lone)
