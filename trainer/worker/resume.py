"""Where a worker goes on: with its own checkpoint, with what the other members hold, or at the beginning."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, OtherFormat
from trainer.diloco import RoundReport
from trainer.errors import ConfigError
from trainer.protocol.records import Cursor, decode
from trainer.tasks import scoring
from trainer.worker.progress import Progress
from trainer.worker.setup import Parts


def join(parts: Parts, progress: Progress, warn: Callable[[str], None]) -> bool:
    """Become a member of the run, and bring the worker to where the run is.

    `progress` receives the counters of the checkpoint; `warn` is called for each corrupt one.

    Returns:
        Whether the worker has taken over another member's moments.

    Raises:
        ConfigError: The checkpoint was written by another version of this program.
        TrainingError: The run does not take this worker, or does not begin.
        Interrupted: The process has to end.
    """
    config, quorum, diloco, directory = parts.config, parts.quorum, parts.diloco, parts.volume.checkpoints

    # Find this run's newest intact checkpoint on the worker's volume; else the one that `resume` names
    try:
        found = checkpoint.newest(directory, warn)
    except OtherFormat as error:
        raise ConfigError("run_id", config.run_id, str(error)) from None
    if found is None and config.resume not in ("auto", "never"):
        found = checkpoint.read(Path(config.resume))
    if parts.world is not None:
        found = parts.world.connect(directory, found)
    is_own = found is not None and found.state["worker"] == quorum.worker
    if checkpoint.paths(directory) and (found is None or is_own):
        # An earlier life may have announced a newer checkpoint, which is corrupt now: the run must not wait for it.
        quorum.durable(found.round if found else 0, found.state["term"] if found else 0)

    # Load the global state of the checkpoint, and join with it. The quorum replaces it if the run is further.
    cursor, term = Cursor(), 0
    if found is not None:
        diloco.load_global(found.global_tensors, found.round, found.state["base_step"])
        cursor, term = decode(Cursor, found.state["cursor"]), found.state["term"]
        if is_own:
            parts.speed.value = found.state["speed"] or parts.speed.value
    report = RoundReport(speed=parts.speed.value, progress={"time": time.time()})
    caught_up = quorum.join(diloco.state, cursor, term, report)
    diloco.begin_round()
    diloco.accept(caught_up.assignment)
    parts.samples.accept(caught_up.assignment, quorum.term)

    # Restore the worker's own state, or take over another member's moments, or build them up anew.
    if found is not None and (is_own or parts.world is not None):
        progress.skipped, progress.skipped_in_a_row = found.state["skipped"]
        _restore(parts, found, is_own)
    elif diloco.round > 0:
        if config.joiner_moments == "donor" and (moments := quorum.fetch_moments()):
            parts.optimizer.load_state_dict(_with_moments(parts.optimizer, moments))
            return True
        progress.ramp = config.local_steps
    return False


def _restore(parts: Parts, found: Checkpoint, is_own: bool) -> None:
    """Restore the inner optimizer and, if the checkpoint belongs to the open round, the progress towards that."""
    state, saved = found.worker(), found.state
    scoring.restore(parts.model, state["buffers"])
    if is_own:
        checkpoint.restore_random_state(state["random"])
    assignment, ranges = parts.diloco.assignment, tuple((start, stop) for start, stop in saved["assignment"])
    if found.round == parts.diloco.round and assignment is not None and assignment.ranges == ranges:
        parts.diloco.load_worker_state(state["diloco"])
        parts.samples.resume(assignment, saved["used"])
    else:  # the samples of the open round were assigned anew: its steps are made again
        parts.optimizer.load_state_dict(state["diloco"]["inner_optimizer"])


class Moments(Mapping[str, Tensor]):
    """The inner optimizer's state by name, flat, for a joiner. A tensor is copied to the host when it is read.

    The state may change while it is sent, which does no harm: the moments of a few steps later are as good.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __iter__(self) -> Iterator[str]:
        state = self._optimizer.state_dict()["state"]
        return (f"{i}.{key}" for i, values in state.items() for key in values if isinstance(values[key], Tensor))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        index, _, key = name.partition(".")
        value: Tensor = self._optimizer.state_dict()["state"][int(index)][key]
        return value.detach().to("cpu").reshape(-1)


def _with_moments(optimizer: Optimizer, found: Mapping[str, Tensor]) -> dict[str, object]:
    """The state dict of `optimizer` with the moments of another member (`Moments`)."""
    state: dict[int, dict[str, Tensor]] = {}
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in found.items():
        index, _, key = name.partition(".")
        shape = shapes[int(index)] if tensor.numel() > 1 else torch.Size(())
        state.setdefault(int(index), {})[key] = tensor.reshape(shape)
    return {**optimizer.state_dict(), "state": state}
