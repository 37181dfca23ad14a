"""The part of `DiLoCo` for loops that do not call it: a context that counts steps, and a state to save."""

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from trainer.diloco.quorum import LoopQuorum, Quorum
from trainer.diloco.state import GlobalState


class _DiLoCo(Protocol):
    """The part of `DiLoCo` that its context uses."""

    state: GlobalState

    def after_inner_step(self) -> object: ...
    def global_tensors(self) -> dict[str, Tensor]: ...
    def load_global(self, tensors: Mapping[str, Tensor], round: int, step: int) -> None: ...
    def worker_state(self) -> dict[str, Any]: ...
    def load_worker_state(self, state: Mapping[str, Any]) -> None: ...


class OwnLoop:
    """A context in which each `step()` of the inner optimizer is an inner step; the last step of a round synchronises.

    A `LoopQuorum` is joined when the context is entered, and left when it is exited.
    """

    inner_optimizer: Any
    quorum: Quorum
    _hook: RemovableHandle | None = None

    def __enter__(self) -> Self:
        """Start counting steps.

        Raises:
            ValueError: The inner optimizer is not one of torch's, or the context has already been entered.
            ConfigError, TrainingError: The quorum does not accept this worker.
        """
        optimizer = self.inner_optimizer
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):  # Accelerate's and Lightning's
            optimizer = wrapped
        if not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise ValueError(f"the inner optimizer is a {kind}, not torch's: call after_inner_step after each step")
        if self._hook is not None:
            raise ValueError("the context of this DiLoCo has already been entered")
        stepped: Callable[[], object] = self._diloco.after_inner_step
        if isinstance(self.quorum, LoopQuorum):
            self.quorum.enter(self._diloco)
            stepped = partial(self.quorum.stepped, self._diloco)

        def hook(*_: Any) -> None:
            stepped()

        self._hook = optimizer.register_step_post_hook(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting steps and leave the run; at `total_steps`, only once its members agree on the last state."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if isinstance(self.quorum, LoopQuorum):
            self.quorum.exit(self._diloco, error)

    def state_dict(self) -> dict[str, Any]:
        """The state from which a worker can continue, for `torch.save`. The tensors are not copies.

        It does not contain the model's buffers: save them with the model, if it has any.
        """
        own, state = self._diloco, self._diloco.state
        quorum = self.quorum.state_dict() if isinstance(self.quorum, LoopQuorum) else {}
        position = {"round": state.round, "step": state.step}
        return {**position, "global": own.global_tensors(), "worker": own.worker_state(), "quorum": quorum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, before the context is entered. Members of a run repeat the open round's steps.

        Raises:
            ValueError: It belongs to another model or outer optimizer.
        """
        self._diloco.load_global(state["global"], state["round"], state["step"])
        self._diloco.load_worker_state(state["worker"])
        if isinstance(self.quorum, LoopQuorum):
            self.quorum.load_state_dict(state["quorum"])

    @property
    def _diloco(self) -> _DiLoCo:
        return cast("_DiLoCo", self)
