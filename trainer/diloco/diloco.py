"""DiLoCo (arXiv 2311.08105): many inner steps, then one outer step on the workers' mean pseudo-gradient."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.collective import warm_up
from trainer.diloco.flat import FlatLayout, Section
from trainer.diloco.outer import Nesterov, OuterOptimizer
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum, Superseded
from trainer.diloco.state import Fragment, GlobalState, OuterStep

LOOK_INTERVAL = 0.25  # seconds


@dataclass(frozen=True)
class Overlap:
    """How communication overlaps with inner steps: they go on while a synchronisation is on its way.

    When the outer step is taken, the local parameters are not where they were when the pseudo-gradient was: the steps
    made meanwhile, δ, are kept whole, on top of the new base (the delay correction):

        θᵢ ← (1 − α) θ + α θᵢ' + δ,   θᵢ' = the local parameters when the round ended.

    With α > 0 a part of each worker's own place is kept, as Streaming DiLoCo does (arXiv 2501.18512, §2.2 and algorithm
    2, which mixes δ as well). Unlike eager updates (arXiv 2502.12996), which let every worker take an outer step of its
    own, this leaves one global state that all workers commit alike.

    Attributes:
        delay: τ, inner steps after which the outer step is taken. 0: as soon as the mean is there.
        mixing: α.
    """

    delay: int = 0
    mixing: float = 0.0


@dataclass(frozen=True)
class _Landing:
    """What a synchronisation that is over has left to do. It was worked out beside the inner steps.

    Attributes:
        made: The outer step; None: there is none.
        shift: What to add to the local parameters, float32 (n,).
        residual: What the codec has left out of this worker's message, float32 (n,); None: nothing.
        offset: How far from θ this worker begins, float32 (n,); None: it begins there.
    """

    commit: Commit
    made: OuterStep | None
    shift: Tensor
    residual: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class _Flight:
    """A synchronisation that is on its way, and what the round was when it ended."""

    landing: Future[_Landing]
    fragment: Fragment
    length: int
    inner_steps: int
    samples: list[float]
    work: list[int]
    carried: Tensor | None
    exposed: float  # seconds that its beginning took


class DiLoCo:
    """Turns a training loop into a DiLoCo worker.

    The global parameters θ and the outer optimizer's state are float32 on the host (pinned, if the model is on a GPU);
    the device keeps the model alone. A round is `sync_every` inner steps and then

        Δᵢ = θ − θᵢ,   Δ = Σ wᵢ Δᵢ / Σ wᵢ,   θ ← outer(θ, Δ),   θᵢ ← θ,

    where wᵢ counts the samples that worker i consumed in the round.

    *Fragments* (Streaming DiLoCo, arXiv 2501.18512): each of P synchronises every `sync_every` inner steps, one after
    the other. So a round here is `sync_every` / P inner steps, and moves 1 / P of the numbers; the last moves them all.

    *Error feedback*: what a lossy codec leaves out of a worker's message is kept (`Codec.feedback` of it), and added to
    its next one. It is this worker's own, and starts at zero.

    A worker that is late (its round has been committed without it) takes over the new θ at its next inner step, and
    carries its work, with the weight of all samples in it. If it had not finished the round, its inner steps count
    towards the one that it goes on with, and what it sends is the sum of all displacements: a round's worth. If it had,
    a whole round follows, and it sends their mean.

    Example:
        diloco = DiLoCo(model, inner_optimizer, outer=Nesterov(lr=0.7), sync_every=128, quorum=quorum)
        for batch in loader:
            loss = step(model, batch); inner_optimizer.step(); inner_optimizer.zero_grad()
            diloco.after_inner_step()

    Args:
        model: Its trainable parameters are synchronised. All workers must start from the same ones.
        inner_optimizer: Saved and restored with the worker's state; it is stepped by the caller.
        outer: The outer optimizer; DiLoCo's Nesterov by default.
        codec: How pseudo-gradients are put on the wire.
        sync_every: Inner steps between two synchronisations of a parameter (H); a multiple of `fragments`.
        quorum: With whom to synchronise; by default nobody.
        total_steps: The last round is shortened to end at this step.
        late_policy: What a late worker does with its work: "carry" it, or "drop" it.
        fragments: P. If the model cannot be cut into so many, there are fewer.
        overlap: Whether inner steps go on during a synchronisation, and how. None: they wait.
        while_waiting: Called now and then while they have to wait for one all the same.

    Attributes:
        state: The global state.
        inner_steps: Inner steps towards the open round so far.
        exposed_seconds: How long the inner loop stood still for the last synchronisation.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer,
        *,
        outer: OuterOptimizer | None = None,
        codec: Codec | None = None,
        sync_every: int,
        quorum: Quorum | None = None,
        total_steps: int | None = None,
        late_policy: Literal["carry", "drop"] = "carry",
        fragments: int = 1,
        overlap: Overlap | None = None,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        if sync_every % fragments:
            raise ValueError(f"sync_every ({sync_every}) must be a multiple of fragments ({fragments})")
        self.inner_optimizer = inner_optimizer
        self.sync_every = sync_every // fragments
        self.quorum = quorum or LocalQuorum()
        self.total_steps = total_steps
        self.late_policy = late_policy
        self.overlap = overlap
        self.while_waiting = while_waiting
        self.inner_steps = 0
        self.exposed_seconds = 0.0
        self._layout = FlatLayout(model)
        codec, outer = codec or Fp32(), outer or Nesterov()
        warm_up(codec, outer)
        self._sections = self._layout.sections(fragments) if fragments > 1 else []
        self._sections += self._layout.sections(1)  # the whole
        self._parts = max(1, len(self._sections) - 1)
        self.state = GlobalState(
            self._layout.gather(self._layout.empty()),
            outer,
            [
                Fragment(index, section.start, section.stop, codec.of([part.shape for part in self._local(section)]))
                for index, section in enumerate(self._sections)
            ],
        )
        self._samples = [0.0] * self._parts  # of each fragment: what its pseudo-gradient stands for so far
        self._work = [0] * self._parts  # and inner steps; carried ones included
        self._usual = [0] * self._parts  # how many are a round's worth: at most, if that has changed meanwhile
        self._scratch = self._layout.empty()
        self._ended = self._layout.empty() if overlap else self._scratch[:0]
        self._carried: Tensor | None = None  # the displacements of carried steps: a sum, float32 (n,)
        self._residual: Tensor | None = None  # what the codec has left out so far, float32 (n,)
        self._offset: Tensor | None = None  # how far from θ this worker began, float32 (n,); None: it began there
        self._flight: _Flight | None = None
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="synchronise")

    @property
    def round(self) -> int:
        """Committed rounds."""
        return self.state.round

    @property
    def open_round(self) -> int:
        """The round that inner steps are made for."""
        return self.state.round + 1 + (self._flight is not None)

    @property
    def samples(self) -> float:
        """Samples that the next pseudo-gradient stands for so far, carried ones included."""
        return sum(self._samples[part] for part in self._parts_of(self._fragment)) / len(self._parts_of(self._fragment))

    @property
    def work(self) -> int:
        """Inner steps that it stands for, carried ones included."""
        return max(self._work[part] for part in self._parts_of(self._fragment))

    @property
    def step(self) -> int:
        """The schedule position: steps since the training began."""
        return math.floor(self.position())

    def position(self, more: int = 0) -> float:
        """The same after so many more inner steps, in between for a worker that makes more or fewer than there are."""
        done, length, own = self.inner_steps + more, self.round_length, self.own_length
        return self._begun + (done if own == length else done * length / own)

    @property
    def round_length(self) -> int:
        """Steps of the schedule in the open round; 0: the training is complete."""
        if self.total_steps is None:
            return self.sync_every
        return max(0, min(self.sync_every, self.total_steps - self._begun))

    @property
    def own_length(self) -> int:
        """Inner steps that this worker makes in the open round (`Quorum.own_steps`)."""
        return self.quorum.own_steps(self.round_length)

    @property
    def due(self) -> bool:
        """Whether the open round's inner steps are done, and its synchronisation has not begun."""
        return 0 < self.own_length <= self.inner_steps

    @property
    def in_flight(self) -> bool:
        """Whether a synchronisation is on its way."""
        return self._flight is not None

    def before_optimizer_step(self, samples: float = 1.0) -> None:
        """DiLoCo has nothing to do here; a baseline that averages gradients does (`DDP`)."""

    def after_inner_step(self, samples: float = 1.0) -> Commit | None:
        """Count an inner step; synchronise if it was the round's last; catch up if the others have gone on.

        Args:
            samples: Samples that the step consumed: the weight it adds to this worker's pseudo-gradient. 0 for a step
                that was skipped.

        Returns:
            A round's commit if there was one.
        """
        self.inner_steps += 1
        for part in range(self._parts):
            self._samples[part] += samples
            self._work[part] += samples > 0
            self._usual[part] = max(self._usual[part], self._rounds_worth)
        if self._flight is not None:
            return self.land() if self._arrives(self._flight) else None
        if self.quorum.superseded():
            self.catch_up()
            return None
        return self.synchronise() if self.due else None

    def synchronise(self) -> Commit | None:
        """End the round here: exchange pseudo-gradients and take the outer step; with `overlap`, begin to.

        Returns:
            The commit; None if it is on its way now, or if the round was committed without this worker, which has
            caught up then.

        Raises:
            TrainingError: From the quorum. The worker's state is then as before the call.
        """
        if self._flight is not None and (commit := self.land()) is not None:
            return commit
        started = time.perf_counter()
        fragment = self._fragment
        if self.overlap is not None and self._begun + self.round_length != self.total_steps:
            self._take_off(fragment, started)
            return None
        scales = self._scales(fragment)
        pseudo_gradient = self._pseudo_gradient(fragment, self._gathered(fragment), self._carried, scales)
        made = self.state.begin(fragment)
        try:
            commit = self.quorum.synchronise(pseudo_gradient, self.samples, fragment, made.add)
        except Superseded:
            self.catch_up(arrived=True)
            return None
        if commit.reduced.weight == 0:
            self.state.skip(self.round_length)
        else:
            if len(commit.members) == 1 and self.state.outer.replaces and not scales and self._sends_its_steps_alone:
                # θ − (θ − θᵢ) is θᵢ but for rounding: here, exactly so.
                self._layout.gather(made.after["model"])
            self.state.take(made, self.round_length)
            self._keep(commit.reduced.error, fragment)
        self._layout.scatter(fragment.of(self.state.parameters), self._local(self._sections[fragment.index]))
        self._forget(fragment)
        self.inner_steps, self._offset = 0, None
        self.quorum.applied(commit, self.state)
        self.exposed_seconds = time.perf_counter() - started
        return commit

    def land(self) -> Commit | None:
        """Wait for the synchronisation that is on its way, and take the outer step.

        Returns:
            The commit; None if the round was committed without this worker, which has caught up then.

        Raises:
            TrainingError: From the quorum. The worker goes on as if the round had not ended.
        """
        started = time.perf_counter()
        flight = self._flight
        assert flight is not None
        while not wait([flight.landing], LOOK_INTERVAL).done:
            self.while_waiting()
        try:
            landing = flight.landing.result()
        except BaseException as error:
            self._turn_back(flight)
            if not isinstance(error, Superseded):
                raise
            self.catch_up(arrived=True)
            return None
        self._flight = None
        fragment, commit = flight.fragment, landing.commit
        if landing.made is None:
            self.state.skip(flight.length)
        else:
            self.state.take(landing.made, flight.length)
            self._residual = self._with(self._residual, fragment, landing.residual)
            self._offset = self._with(self._offset, fragment, landing.offset)
        local = self._local(self._sections[fragment.index])
        if self.inner_steps or landing.offset is not None:
            self._layout.add(landing.shift, local)
        else:  # to the last bit
            self._layout.scatter(fragment.of(self.state.parameters), local)
        self.quorum.applied(commit, self.state)
        self.exposed_seconds = flight.exposed + time.perf_counter() - started
        return (self.synchronise() if self.due else None) or commit

    def catch_up(self, arrived: bool = False) -> None:
        """Take over the global state of the last committed round, and carry this worker's work (or drop it).

        Args:
            arrived: It was about to synchronise, and the others did so without it.
        """
        whole = self.state.fragments[-1]
        carried = self._displacement(
            whole, self._gathered(whole), self._carried
        ).clone()  # catching up needs the scratch
        samples, work, usual, residual = list(self._samples), list(self._work), list(self._usual), self._residual
        steps, round, length = self.inner_steps, self.round, self.own_length
        counts = self.quorum.catch_up(self.state)
        self.begin_round()
        if not counts:
            return
        self._residual = residual
        # Its steps count towards the open round even if it drops them: it is in step with the others then, and not late
        # for ever. But a whole round that arrived too late is followed by another one, unless it was this one (and its
        # state has been taken anew).
        again = arrived and steps >= length and self.round != round
        self.inner_steps = 0 if again else min(steps, self.own_length)
        if self.late_policy == "carry" and any(work):
            self._carried, self._samples, self._work, self._usual = carried, samples, work, usual

    def begin_round(self) -> None:
        """Begin a round from the global state as it now stands: what was done towards an open one is given up."""
        self._layout.scatter(self.state.parameters)
        self._forget(self.state.fragments[-1])
        self.inner_steps, self._carried, self._offset, self._residual = 0, None, None, None

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """The model has the global parameters θ here, whatever this worker has done since."""
        if not self.inner_steps and self._flight is None and self._parts == 1:
            yield  # it has them
            return
        local = self._layout.gather(self._layout.empty())
        self._layout.scatter(self.state.parameters)
        try:
            yield
        finally:
            self._layout.scatter(local)

    def global_tensors(self) -> dict[str, Tensor]:
        """The global state, the same in every worker: `model.<parameter>` and `outer.<state>.<parameter>`, float32.

        These are views of the state itself: copy them before the next synchronisation.
        """
        return {
            f"{name}.{parameter}": view
            for name, flat in self.state.tensors.items()
            for parameter, view in self._layout.named(flat).items()
        }

    def load_global(self, tensors: Mapping[str, Tensor], round: int, step: int) -> None:
        """Take over a global state as `global_tensors` gave it, and begin a round from it.

        Raises:
            ValueError: It is not of this model and outer optimizer.
        """
        own = self.global_tensors()
        if own.keys() != tensors.keys():
            raise ValueError(f"global state differs in {sorted(own.keys() ^ tensors.keys())[:3]}")
        self.state.load(round, step, {name: self._layout.join(tensors, name) for name in self.state.tensors})
        self.begin_round()

    def worker_state(self) -> dict[str, Any]:
        """What is this worker's own: inner optimizer, the open round's progress and, inside a round, its parameters.

        A synchronisation that is on its way has not been: its round is the open one, and longer than it should be. The
        tensors are the worker's own, not copies.
        """
        flight = self._flight
        state: dict[str, Any] = {
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "inner_steps": self.inner_steps + (flight.inner_steps if flight else 0),
            "samples": _sums(self._samples, flight.samples) if flight else list(self._samples),
            "work": _sums(self._work, flight.work) if flight else list(self._work),
        }
        if state["inner_steps"] or self._parts > 1:
            state["parameters"] = [parameter.detach() for parameter in self._layout.parameters]
        carried = flight.carried if flight else self._carried
        tensors = {"carried": carried, "residual": self._residual, "offset": self._offset}
        return state | {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def load_worker_state(self, state: Mapping[str, Any]) -> None:
        """Restore `worker_state`; the global state that it belongs to has been loaded before."""
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.inner_steps = state["inner_steps"]
        self._samples, self._work = list(state["samples"]), list(state["work"])
        self._carried, self._residual, self._offset = map(state.get, ("carried", "residual", "offset"))
        if "parameters" in state:
            with torch.no_grad():
                for parameter, saved in zip(self._layout.parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)

    # The parts of a synchronisation

    @property
    def _begun(self) -> int:
        """The schedule position at which the open round began."""
        return self.state.step + (self._flight.length if self._flight else 0)

    @property
    def _fragment(self) -> Fragment:
        """What the open round synchronises."""
        if self.total_steps is not None and self._begun + self.round_length >= self.total_steps:
            return self.state.fragments[-1]
        return self.state.fragments[(self.open_round - 1) % self._parts]

    def _parts_of(self, fragment: Fragment) -> range:
        """The fragments that it consists of: itself, or all."""
        return range(self._parts) if self._is_whole(fragment) else range(fragment.index, fragment.index + 1)

    def _is_whole(self, fragment: Fragment) -> bool:
        return fragment is self.state.fragments[-1]

    def _local(self, section: Section) -> list[Tensor]:
        """This worker's parameters in a section."""
        return section.of(self._layout.parameters)

    def _part_of_scratch(self, fragment: Fragment) -> Tensor:
        return self._scratch[: fragment.stop - fragment.start]

    def _gathered(self, fragment: Fragment) -> Tensor:
        """This worker's parameters, float32 (n,); in the scratch memory."""
        return self._layout.gather(self._part_of_scratch(fragment), self._local(self._sections[fragment.index]))

    def _displacement(self, fragment: Fragment, local: Tensor, carried: Tensor | None) -> Tensor:
        """How far this worker's steps have gone from where they began, carried ones included; in the scratch memory."""
        displacement = torch.sub(fragment.of(self.state.parameters), local, out=self._part_of_scratch(fragment))
        for more in (carried, self._offset):
            if more is not None:
                displacement.add_(fragment.of(more))
        return displacement

    def _scales(self, fragment: Fragment) -> list[tuple[slice, float]]:
        """What a displacement has to be multiplied by, and where, to be a round's worth: a whole one may be carried."""
        scales = []
        for index in self._parts_of(fragment):
            usual = max(self._usual[index], self._rounds_worth)
            if self._work[index] > usual:
                part = self.state.fragments[index]
                scales.append(
                    (slice(part.start - fragment.start, part.stop - fragment.start), usual / self._work[index])
                )
        return scales

    @property
    def _rounds_worth(self) -> int:
        """Inner steps of this worker between two synchronisations of a parameter."""
        return self.own_length if self._parts == 1 else self.quorum.own_steps(self.sync_every) * self._parts

    @property
    def _sends_its_steps_alone(self) -> bool:
        """Whether the pseudo-gradient, if nothing scales it, is θ − θᵢ of all parameters."""
        return self._parts == 1 and self._carried is None and self._residual is None and self._offset is None

    def _pseudo_gradient(
        self, fragment: Fragment, local: Tensor, carried: Tensor | None, scales: list[tuple[slice, float]]
    ) -> Tensor:
        """What this worker sends; in the scratch memory."""
        pseudo_gradient = self._displacement(fragment, local, carried)
        for part, scale in scales:
            pseudo_gradient[part].mul_(scale)
        if self._residual is not None:
            pseudo_gradient.add_(fragment.of(self._residual), alpha=fragment.codec.feedback)
        return pseudo_gradient

    def _take_off(self, fragment: Fragment, started: float) -> None:
        """Begin to synchronise, and a new round."""
        local = self._local(self._sections[fragment.index])
        ended = self._layout.gather(self._ended[: fragment.stop - fragment.start], local, wait=False)
        carried = None if self._carried is None else self._carried.clone()
        parts = self._parts_of(fragment)
        landing = self._sender.submit(self._exchange, fragment, ended, carried, self._scales(fragment), self.samples)
        flight = _Flight(
            landing,
            fragment,
            self.round_length,
            self.inner_steps,
            [count if part in parts else 0.0 for part, count in enumerate(self._samples)],
            [count if part in parts else 0 for part, count in enumerate(self._work)],
            carried,
            time.perf_counter() - started,
        )
        self._forget(fragment)
        self._flight, self.inner_steps = flight, 0

    def _exchange(
        self,
        fragment: Fragment,
        ended: Tensor,
        carried: Tensor | None,
        scales: list[tuple[slice, float]],
        samples: float,
    ) -> _Landing:
        """Synchronise; on a thread, while inner steps are made. It changes nothing but `ended`, the scratch memory, and
        what the state has beside it for an outer step.

        Args:
            ended: The local parameters when the round ended, float32 (n,).
        """
        self._layout.settle()
        pseudo_gradient = self._pseudo_gradient(fragment, ended, carried, scales)
        made = self.state.begin(fragment)
        commit = self.quorum.synchronise(pseudo_gradient, samples, fragment, made.add)
        base = fragment.of(self.state.parameters)
        if commit.reduced.weight == 0:
            return _Landing(commit, None, torch.sub(base, ended, out=ended), None, None)
        shift, offset = torch.sub(made.after["model"], ended, out=ended), None
        if self.overlap is not None and self.overlap.mixing:
            offset = shift * -self.overlap.mixing
            shift.add_(offset)
        error = commit.reduced.error
        return _Landing(commit, made, shift, None if error is None else error.clone(), offset)

    def _arrives(self, flight: _Flight) -> bool:
        """Whether it is time to land: at the latest before the next synchronisation, or the last one's last step."""
        assert self.overlap is not None
        if self.inner_steps >= self.own_length - (self._begun + self.round_length == self.total_steps):
            return True
        return self.inner_steps >= self.overlap.delay if self.overlap.delay else flight.landing.done()

    def _turn_back(self, flight: _Flight) -> None:
        """The synchronisation has failed: its round is still open, and has gone on."""
        self._flight, self._carried = None, flight.carried
        self.inner_steps += flight.inner_steps
        self._samples, self._work = _sums(self._samples, flight.samples), _sums(self._work, flight.work)

    def _keep(self, error: Tensor | None, fragment: Fragment) -> None:
        """Keep what the codec has left out, by copy: its memory is the collective's."""
        if error is not None and self._residual is None:
            self._residual = torch.zeros_like(self.state.parameters)
        if self._residual is not None:
            kept = fragment.of(self._residual)
            kept.zero_() if error is None else kept.copy_(error)

    def _with(self, own: Tensor | None, fragment: Fragment, part: Tensor | None) -> Tensor | None:
        """`own`, (n,), with the fragment's part replaced; `part` may be taken over. None stands for zeros."""
        if self._is_whole(fragment) or (own is None and part is None):
            return part
        own = torch.zeros_like(self.state.parameters) if own is None else own
        fragment.of(own).zero_() if part is None else fragment.of(own).copy_(part)
        return own

    def _forget(self, fragment: Fragment) -> None:
        """The fragment's pseudo-gradient begins anew."""
        for part in self._parts_of(fragment):
            self._samples[part], self._work[part], self._usual[part] = 0.0, 0, 0
        if self._carried is not None:
            fragment.of(self._carried).zero_()
            if self._is_whole(fragment):
                self._carried = None


def _sums(first: list[Any], second: list[Any]) -> list[Any]:
    return [one + other for one, other in zip(first, second, strict=True)]
