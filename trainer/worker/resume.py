"""Where a worker resumes: from its own checkpoint, from the other members' state, or from the start."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, OtherFormat
from trainer.diloco import RoundReport
from trainer.elastic.moments import Moments, ShardedMoments, with_moments
from trainer.elastic.progress import Progress
from trainer.errors import ConfigError, one_line
from trainer.protocol.records import Cursor, decode
from trainer.worker.optimizer import check_kind
from trainer.worker.setup import MOMENTS, Parts


def join(parts: Parts, progress: Progress, warn: Callable[[str], None]) -> list[str]:
    """Become a member of the run and bring the worker to the run's state.

    `progress` receives the checkpoint's counters; `warn` is called for each corrupt checkpoint, and for moments that do
    not fit.

    Returns:
        Notable changes for the event "membership": "took moments" (another member's), "took kept state" (from this
        node's memory).

    Raises:
        ConfigError: The checkpoint was written by another version of this program.
        TrainingError: The run does not accept this worker, or does not start.
        Interrupted: The process has to end.
    """
    process, quorum, diloco = parts.process, parts.quorum, parts.diloco
    config, directory = process.config, process.volume.checkpoints

    found = _newest_checkpoint(parts, warn)
    if parts.world is not None:
        found = parts.world.connect(directory, found)
    is_own = found is not None and found.state["worker"] == quorum.worker
    if checkpoint.paths(directory) and (found is None or is_own):
        # An earlier process may have announced a newer checkpoint that is now corrupt: the run must not wait for it
        quorum.durable(found.round if found else 0, found.state["term"] if found else 0)

    # Load the checkpoint's global state and join with it. The quorum replaces it if the run is ahead
    cursor, term, changes = Cursor(), 0, list[str]()
    if found is not None:
        diloco.load_global(found.global_tensors, found.round, found.state["base_step"])
        cursor, term = decode(Cursor, found.state["cursor"]), found.state["term"]
        if is_own:
            parts.speed.value = found.state["speed"] or parts.speed.value
    if parts.kept and (kept := parts.kept.find()) and (kept.term, kept.round) > (term, diloco.round):
        diloco.state.load(kept.round, kept.step, kept.tensors)
        cursor, term = decode(Cursor, kept.cursor), kept.term
        changes.append("took kept state")
    report = RoundReport(speed=parts.speed.value, progress={"time": time.time()})
    caught_up = quorum.join(diloco.state, cursor, term, report)
    if parts.kept:
        parts.kept.forget(diloco.state)
        parts.keep_state()
    diloco.begin_round()
    diloco.accept(caught_up.assignment)
    process.samples.accept(caught_up.assignment, quorum.term)

    # Restore the worker's own state, or adopt another member's moments, or build up new ones
    if found is not None and (is_own or parts.world is not None):
        progress.skipped, progress.skipped_in_a_row = found.state["skipped"]
        _restore(parts, found, is_own)
    elif diloco.round > 0:
        if config.joiner_moments == "donor" and _adopt_moments(parts, warn):
            return [*changes, "took moments"]
        progress.ramp = config.local_steps
    return changes


def _newest_checkpoint(parts: Parts, warn: Callable[[str], None]) -> Checkpoint | None:
    """This run's newest intact checkpoint on the worker's volume, or else the one named by `resume`, if any."""
    config = parts.process.config
    try:
        found = checkpoint.newest(parts.process.volume.checkpoints, warn)
    except OtherFormat as error:
        raise ConfigError("run_id", config.run_id, str(error)) from None
    if found is None and config.resume not in ("auto", "never"):
        return checkpoint.read(Path(config.resume))
    return found


def _adopt_moments(parts: Parts, warn: Callable[[str], None]) -> bool:
    """Adopt another member's moments. Returns whether a member offers them and they fit this worker's optimizer."""
    if not (found := parts.quorum.fetch_moments()):
        return False
    try:
        state = with_moments(parts.process.optimizer, found)
        check_kind(parts.process.optimizer, state["state"])
    except (LookupError, RuntimeError, ValueError) as error:  # for example, it has another `inner_optimizer`
        warn(f"another member's moments do not fit: {one_line(error)}; this worker builds up its own")
        return False
    parts.diloco.inner_optimizer.load_state_dict(state)
    return True


def _restore(parts: Parts, found: Checkpoint, is_own: bool) -> None:
    """Restore the inner optimizer and, if the checkpoint belongs to the open round, the progress in it."""
    state, saved = found.worker(), found.state
    parts.process.own_state.restore(state, random=is_own)
    assignment, ranges = parts.diloco.assignment, tuple((start, stop) for start, stop in saved["assignment"])
    same_round = found.round == parts.diloco.round
    if same_round and assignment is not None and assignment.ranges == ranges:
        parts.diloco.load_worker_state(state["diloco"])
        parts.process.samples.resume(assignment, saved["used"])
        return
    # The open round's samples were reassigned, so its steps are repeated
    parts.diloco.inner_optimizer.load_state_dict(state["diloco"]["inner_optimizer"])
    if same_round and is_own:  # the residual comes from earlier rounds
        parts.diloco.contribution.keep(parts.diloco.state.full_model, state["diloco"].get("residual"), None)


def offered_moments(parts: Parts) -> Moments | ShardedMoments:
    """This worker's inner optimizer state, for joiners."""
    if parts.process.is_sharded:
        room = partial(parts.diloco.state.has_room, MOMENTS)
        return ShardedMoments(parts.diloco.inner_optimizer, parts.process.config.local_steps, room)
    return Moments(parts.process.optimizer)
