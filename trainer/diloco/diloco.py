"""DiLoCo (arXiv 2311.08105): many inner steps, then one outer step on the workers' mean pseudo-gradient."""

import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.flat import FlatLayout
from trainer.diloco.outer import Nesterov, OuterOptimizer
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum, Superseded
from trainer.diloco.state import GlobalState


class DiLoCo:
    """Turns a training loop into a DiLoCo worker.

    The global parameters θ and the outer optimizer's state are float32 on the host (pinned, if the model is on a GPU);
    the device keeps the model alone. A round is `sync_every` inner steps and then

        Δᵢ = θ − θᵢ,   Δ = Σ wᵢ Δᵢ / Σ wᵢ,   θ ← outer(θ, Δ),   θᵢ ← θ,

    where wᵢ counts the samples that worker i consumed in the round.

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
        sync_every: Inner steps a round (H).
        quorum: With whom to synchronise; by default nobody.
        total_steps: The last round is shortened to end at this step.
        late_policy: What a late worker does with its work: "carry" it, or "drop" it.

    Attributes:
        state: The global state.
        inner_steps: Inner steps towards the open round so far.
        samples: Samples that the pseudo-gradient stands for so far, carried ones included.
        work: Inner steps that it stands for, carried ones included.
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
    ) -> None:
        self.inner_optimizer = inner_optimizer
        self.codec = codec or Fp32()
        self.sync_every = sync_every
        self.quorum = quorum or LocalQuorum()
        self.total_steps = total_steps
        self.late_policy = late_policy
        self.inner_steps = 0
        self.samples = 0.0
        self.work = 0
        self.exposed_seconds = 0.0
        self._layout = FlatLayout(model)
        self.state = GlobalState(self._layout.gather(self._layout.empty()), outer or Nesterov())
        self._scratch = self._layout.empty()
        self._carried: Tensor | None = None  # the displacements of carried steps: a sum, float32 (n,)

    @property
    def round(self) -> int:
        """Committed rounds."""
        return self.state.round

    @property
    def step(self) -> int:
        """The schedule position: inner steps since the training began."""
        return self.state.step + self.inner_steps

    @property
    def round_length(self) -> int:
        """Inner steps in the open round; 0: the training is complete."""
        if self.total_steps is None:
            return self.sync_every
        return max(0, min(self.sync_every, self.total_steps - self.state.step))

    @property
    def due(self) -> bool:
        """Whether the open round's inner steps are done, and its synchronisation is not."""
        return 0 < self.round_length <= self.inner_steps

    def before_optimizer_step(self, samples: float = 1.0) -> None:
        """DiLoCo has nothing to do here; a baseline that averages gradients does (`DDP`)."""

    def after_inner_step(self, samples: float = 1.0) -> Commit | None:
        """Count an inner step; synchronise if it was the round's last; catch up if the others have gone on.

        Args:
            samples: Samples that the step consumed: the weight it adds to this worker's pseudo-gradient. 0 for a step
                that was skipped.

        Returns:
            The round's commit if there was one.
        """
        self.inner_steps += 1
        self.samples += samples
        self.work += samples > 0
        if self.quorum.superseded():
            self.catch_up()
            return None
        return self.synchronise() if self.due else None

    def synchronise(self) -> Commit | None:
        """End the open round here: exchange pseudo-gradients and take the outer step.

        Returns:
            The commit; None if the round was committed without this worker, which has caught up then.

        Raises:
            TrainingError: From the quorum. The worker's state is then as before the call.
        """
        started = time.perf_counter()
        pseudo_gradient = self._displacement()
        if self.work > self.round_length:  # more than one round's: a whole one was carried
            pseudo_gradient.mul_(self.round_length / self.work)
        try:
            commit = self.quorum.synchronise(pseudo_gradient, self.samples, self.codec)
        except Superseded:
            self.catch_up()
            return None
        if commit.weight > 0:
            alone = len(commit.members) == 1 and torch.equal(commit.mean, pseudo_gradient)
            update = self.state.apply(commit.mean, self.round_length, self._scratch)
            if alone and update is commit.mean and self._carried is None:
                # θ − (θ − θᵢ) is θᵢ but for rounding: with one worker and outer SGD of rate 1, exactly so.
                self._layout.gather(self.state.parameters)
        else:
            self.state.skip(self.round_length)
        self.begin_round()
        self.quorum.applied(commit, self.state)
        self.exposed_seconds = time.perf_counter() - started
        return commit

    def catch_up(self) -> None:
        """Take over the global state of the last committed round, and carry this worker's work (or drop it)."""
        carried = self._displacement().clone()  # it is in the scratch memory that catching up needs
        samples, work, steps, round = self.samples, self.work, self.inner_steps, self.round
        counts = self.quorum.catch_up(self.state)
        self.begin_round()
        if not counts:
            return
        # Its steps count towards the open round even if it drops them: it is in step with the others then, and not late
        # for ever. But a whole round is followed by another one, unless it was this one (it has taken its state anew).
        self.inner_steps = steps if steps < self.round_length or self.round == round else 0
        if self.late_policy == "carry" and work:
            self._carried, self.samples, self.work = carried, samples, work

    def _displacement(self) -> Tensor:
        """How far this worker's steps have gone from θ, those that are carried included; in the scratch memory."""
        displacement = self._layout.gather(self._scratch)
        torch.sub(self.state.parameters, displacement, out=displacement)
        return displacement if self._carried is None else displacement.add_(self._carried)

    def begin_round(self) -> None:
        """Begin a round from the global state as it now stands: what was done towards an open one is given up."""
        self._layout.scatter(self.state.parameters)
        self.inner_steps, self.samples, self.work, self._carried = 0, 0.0, 0, None

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

        The tensors are the worker's own, not copies.
        """
        state: dict[str, Any] = {
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "inner_steps": self.inner_steps,
            "samples": self.samples,
            "work": self.work,
        }
        if self.inner_steps:
            state["parameters"] = [parameter.detach() for parameter in self._layout.parameters]
        if self._carried is not None:
            state["carried"] = self._carried
        return state

    def load_worker_state(self, state: Mapping[str, Any]) -> None:
        """Restore `worker_state`; the global state that it belongs to has been loaded before."""
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.inner_steps, self.samples, self.work = state["inner_steps"], state["samples"], state["work"]
        self._carried = state.get("carried")
        if self.inner_steps:
            with torch.no_grad():
                for parameter, saved in zip(self._layout.parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
