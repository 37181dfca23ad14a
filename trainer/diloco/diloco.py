"""DiLoCo (arXiv 2311.08105): many inner steps, then one outer step on the workers' mean pseudo-gradient."""

import hashlib
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.diloco.codecs import Codec, Fp32
from trainer.diloco.flat import FlatLayout
from trainer.diloco.outer import Nesterov, OuterOptimizer
from trainer.diloco.quorum import Commit, LocalQuorum, Quorum


class DiLoCo:
    """Turns a training loop into a DiLoCo worker.

    The global parameters θ and the outer optimizer's state are float32 on the host (pinned, if the model is on a GPU);
    the device keeps the model alone. A round is `sync_every` inner steps and then

        Δᵢ = θ − θᵢ,   Δ = Σ wᵢ Δᵢ / Σ wᵢ,   θ ← outer(θ, Δ),   θᵢ ← θ,

    where wᵢ counts the samples that worker i consumed in the round.

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

    Attributes:
        round: Committed rounds.
        round_start: Schedule position (inner steps) at which the open round began: part of the global state.
        inner_steps: Inner steps of the open round so far.
        samples: Samples consumed in the open round so far.
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
    ) -> None:
        self.inner_optimizer = inner_optimizer
        self.outer = outer or Nesterov()
        self.codec = codec or Fp32()
        self.sync_every = sync_every
        self.quorum = quorum or LocalQuorum()
        self.total_steps = total_steps
        self.round = self.round_start = self.inner_steps = 0
        self.samples = 0.0
        self.exposed_seconds = 0.0
        self._layout = FlatLayout(model)
        self._global = self._layout.gather(self._layout.empty())
        self._scratch = self._layout.empty()

    @property
    def step(self) -> int:
        """The schedule position: inner steps since the training began."""
        return self.round_start + self.inner_steps

    @property
    def round_length(self) -> int:
        """Inner steps in the open round."""
        if self.total_steps is None:
            return self.sync_every
        return min(self.sync_every, self.total_steps - self.round_start)

    @property
    def due(self) -> bool:
        """Whether the open round's inner steps are done, and its synchronisation is not."""
        return 0 < self.round_length <= self.inner_steps

    def before_optimizer_step(self, samples: float = 1.0) -> None:
        """DiLoCo has nothing to do here; a baseline that averages gradients does (`DDP`)."""

    def after_inner_step(self, samples: float = 1.0) -> Commit | None:
        """Count an inner step, and synchronise if it was the round's last.

        Args:
            samples: Samples that the step consumed: the weight it adds to this worker's pseudo-gradient. 0 for a step
                that was skipped.

        Returns:
            The round's commit if there was one.
        """
        self.inner_steps += 1
        self.samples += samples
        return self.synchronise() if self.due else None

    def synchronise(self) -> Commit:
        """End the open round here: exchange pseudo-gradients and take the outer step.

        Raises:
            TrainingError: From the quorum. The worker's state is then as before the call.
        """
        started = time.perf_counter()
        local = self._layout.gather(self._scratch)
        pseudo_gradient = self._global - local
        commit = self.quorum.synchronise(pseudo_gradient, self.samples, self.codec)
        if commit.weight > 0:
            update = self.outer.update(commit.mean)
            if len(commit.members) == 1 and torch.equal(update, pseudo_gradient):
                # θ − (θ − θᵢ) is θᵢ but for rounding: with one worker and outer SGD of rate 1, exactly so.
                self._global.copy_(local)
            else:
                self._global.sub_(update)
        self._layout.scatter(self._global)
        self.round += 1
        self.round_start += self.inner_steps
        self.inner_steps, self.samples = 0, 0.0
        self.exposed_seconds = time.perf_counter() - started
        return commit

    def global_tensors(self) -> dict[str, Tensor]:
        """The global state, the same in every worker: `model.<parameter>` and `outer.<state>.<parameter>`, float32.

        These are views of the state itself: copy them before the next synchronisation.
        """
        tensors = {f"model.{name}": view for name, view in self._layout.named(self._global).items()}
        for state, flat in self.outer.state(self._layout.size).items():
            tensors |= {f"outer.{state}.{name}": view for name, view in self._layout.named(flat).items()}
        return tensors

    def load_global(self, tensors: dict[str, Tensor], round: int, round_start: int) -> None:
        """Take over a global state, and begin a round from it: the open round's inner steps are given up.

        Raises:
            ValueError: A tensor is missing or has another shape.
        """
        own = self.global_tensors()
        if own.keys() != tensors.keys():
            raise ValueError(f"global state differs in {sorted(own.keys() ^ tensors.keys())[:3]}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(tensors[name])
        self.adopt(round, round_start)

    def flat_global_state(self) -> list[Tensor]:
        """The global state as few large vectors, float32 (n,): θ first. The state itself, to send or receive into."""
        return [self._global, *self.outer.state(self._layout.size).values()]

    def adopt(self, round: int, round_start: int) -> None:
        """Begin a round from the global state as it now stands, for example received into `flat_global_state`."""
        self._layout.scatter(self._global)
        self.round, self.round_start = round, round_start
        self.inner_steps, self.samples = 0, 0.0

    def global_hash(self) -> str:
        """sha256 of the global state's bytes: equal in all workers after every commit."""
        digest = hashlib.sha256()
        for flat in self.flat_global_state():
            digest.update(flat.numpy().data)
        return digest.hexdigest()

    def worker_state(self) -> dict[str, Any]:
        """What is this worker's own: inner optimizer, the open round's progress and, inside a round, its parameters.

        The tensors are the worker's own, not copies.
        """
        state: dict[str, Any] = {
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "inner_steps": self.inner_steps,
            "samples": self.samples,
        }
        if self.inner_steps:
            state["parameters"] = [parameter.detach() for parameter in self._layout.parameters]
        return state

    def load_worker_state(self, state: dict[str, Any]) -> None:
        """Restore `worker_state`; the global state that it belongs to has been loaded before."""
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.inner_steps, self.samples = state["inner_steps"], state["samples"]
        if self.inner_steps:
            with torch.no_grad():
                for parameter, saved in zip(self._layout.parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
