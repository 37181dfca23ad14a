"""The report's charts: one function a chart, from a `RunRecord` to SVG. To add one, list it in `CHARTS`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.monitor.report.drawing import (
    DASHED,
    FIRST,
    HALF,
    INK,
    MOST_BARS,
    MOST_LINES,
    MUTED,
    SECOND,
    SURFACE,
    WHOLE,
    Chart,
    bars,
    byte_text,
    byte_unit,
    drawn,
    end_label,
    end_labels,
    extent,
    finite_points,
    held_out_line,
    loss_label,
    marker_of,
    robust_limits,
    round_axis,
    samples_axis,
    styled_line,
    thin,
    time_axis,
)
from trainer.monitor.report.run import FloatArray, RunRecord, Worker, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40  # workers of the membership chart
MOST_TICKS = 400  # of the membership chart: more rounds are drawn as bars
BAR: Any = {"color": FIRST, "linewidth": 5, "alpha": 0.3, "solid_capstyle": "butt"}
TICK: Any = {"color": FIRST, "linestyle": "", "marker": "|", "markersize": 11, "markeredgewidth": 1.6}
MARKS: dict[str, Any] = {  # what happens to a worker
    "joined": {"color": SECOND, "marker": ">", "markersize": 7},
    "late": {"color": SECOND, "marker": "D", "markersize": 6},
    "died": {"color": INK, "marker": "X", "markersize": 8},
    "left": {"color": INK, "marker": "s", "markersize": 6},
}


def losses_over_steps(run: RunRecord) -> Chart | None:
    """Every worker's training loss, faint, and their mean."""
    steps, caption = run.step_losses[0], "The training loss of each inner step."
    if skipped := run.skipped_steps:
        caption += f" {skipped} steps were skipped, because their loss or gradient was not finite."
    return _losses(run, "losses-over-steps", "Loss over inner steps", caption, steps, "inner step", size=WHOLE)


def losses_over_samples(run: RunRecord) -> Chart | None:
    """The same over what was consumed, with the held-out loss."""
    scale, label = samples_axis(float(np.max(run.samples_at_steps, initial=0)))
    return _losses(
        run,
        "losses-over-samples",
        "Loss over samples",
        "Over the samples that all workers together had consumed.",
        run.samples_at_steps / scale,
        label,
        held_out=True,
    )


def losses_over_time(run: RunRecord) -> Chart | None:
    """The same over wall time, with the held-out loss."""
    scale, label = time_axis(float(np.max(run.seconds_at_steps, initial=0)))
    return _losses(
        run,
        "losses-over-time",
        "Loss over time",
        "Over wall time: when the last worker had made the step. Pauses after an orderly stop are left out.",
        run.seconds_at_steps / scale,
        label,
        held_out=True,
    )


def _losses(
    run: RunRecord,
    name: str,
    title: str,
    caption: str,
    at: FloatArray,
    label: str,
    held_out: bool = False,
    size: tuple[int, int] = HALF,
) -> Chart | None:
    """Training losses of all workers and their mean, over `at`: where each inner step lies on the x axis."""
    steps, mean = run.step_losses
    if not np.isfinite(mean).any():
        return None
    _, losses = run.over_steps("loss")
    x, lines = thin(at, np.vstack([mean, losses]))
    workers, over = lines[1:], len(losses)
    if len(steps) > len(x):
        caption += f" Each point is the mean of about {round(len(steps) / len(x))} steps."
    scored, scores = run.held_out_over_steps
    scored, scores = finite_points(scored, scores) if held_out else (np.empty(0), np.empty(0))
    scored = np.interp(scored, np.append(0, steps), np.append(0, at))

    def draw(axes: "Axes") -> None:
        if 1 < over <= MOST_LINES:
            for line in workers:
                axes.plot(x, line, color=MUTED, linewidth=0.7, alpha=0.55, label="_")
            axes.plot([], [], color=MUTED, linewidth=0.7, label=f"each of {over} workers")
        elif over > MOST_LINES:
            low, high = extent(workers)
            axes.fill_between(x, low, high, color=MUTED, alpha=0.25, linewidth=0, label=f"range of {over} workers")
        axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=marker_of(x), label="mean" if over > 1 else "loss")
        if len(scored):
            held_out_line(axes, scored, scores)
        else:
            end_label(axes, x, lines[0], FIRST)
        robust_limits(axes, mean, scores)
        axes.set_xlabel(label)
        axes.set_ylabel(loss_label(run.loss_unit))

    return drawn(name, title, caption, [draw], size)


def losses_over_rounds(run: RunRecord) -> Chart | None:
    """The mean training loss of each round, and the held-out loss where it was scored."""
    rounds, losses = run.round_losses
    scored, held_out = run.held_out_losses
    if not np.isfinite(losses).any() and not np.isfinite(held_out).any():
        return None
    x, lines = thin(rounds, losses[None])

    def draw(axes: "Axes") -> None:
        if np.isfinite(losses).any():
            axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=marker_of(x), label="training")
            robust_limits(axes, losses, held_out)
        if np.isfinite(held_out).any():
            held_out_line(axes, *finite_points(scored, held_out))
        elif np.isfinite(losses).any():
            end_label(axes, x, lines[0], FIRST)
        round_axis(axes, np.union1d(rounds, scored))
        axes.set_ylabel(loss_label(run.loss_unit))

    caption = "Training: the samples-weighted mean of the workers' losses in the round."
    if np.isfinite(held_out).any():
        caption += " Held out: samples that training never sees, scored with the global parameters after the round."
    return drawn("losses-over-rounds", "Loss over rounds", caption, [draw])


def bytes_over_rounds(run: RunRecord) -> Chart | None:
    """What the synchronisations moved, as the network counted it."""
    rounds, sent = run.over_rounds("bytes_sent")
    if not np.nansum(sent) > 0:
        return None
    total = np.nansum(sent, axis=0)
    scale, unit = byte_unit(float(np.max(total)))

    def draw(axes: "Axes") -> None:
        bars(axes, rounds, total / scale, FIRST)
        axes.set_ylim(bottom=0)
        round_axis(axes, rounds)
        axes.set_ylabel(f"sent ({unit})")

    caption = f"Bytes that all workers together sent in each round; {byte_text(float(total.sum()))} in all."
    if len(sent) > 1:
        caption += f" A worker sent {byte_text(float(np.nanmean(sent)))} a round."
    return drawn("bytes-over-rounds", "Bytes sent in each round", caption, [draw])


def exposed_over_rounds(run: RunRecord) -> Chart | None:
    """How long the inner loops stood still for each synchronisation, and the share of the round that this was."""
    rounds, exposed = run.over_rounds("exposed_seconds")
    if not np.isfinite(exposed).any():
        return None
    kept = np.isfinite(exposed).any(axis=0)
    rounds, exposed = rounds[kept], exposed[:, kept]
    mean = np.nanmean(exposed, axis=0)
    share = 100 * run.exposed_shares[1][kept]

    def draw_seconds(axes: "Axes") -> None:
        bars(axes, rounds, mean, FIRST)
        if len(exposed) > 1 and len(rounds) <= MOST_BARS:
            axes.vlines(rounds, *extent(exposed), color=INK, linewidth=0.9, label="lowest to highest worker")
        axes.set_ylim(bottom=0)
        round_axis(axes, rounds)
        axes.set_ylabel("exposed (s)")

    def draw_share(axes: "Axes") -> None:
        x, lines = thin(rounds, share[None])
        axes.plot(x, lines[0], color=SECOND, linewidth=1.4, linestyle=DASHED, marker=marker_of(x))
        end_label(axes, x, lines[0], SECOND, " %")
        axes.set_ylim(bottom=0, top=max(1.0, 1.15 * float(np.nanmax(share))) if np.isfinite(share).any() else 1)
        round_axis(axes, rounds)
        axes.set_ylabel("share (%)")

    caption = (
        "Exposed seconds: how long a worker's inner loop stood still for the round's synchronisation (waiting for the "
        "others included), mean over the workers; below, the share of the round that this was."
    )
    return drawn("exposed-over-rounds", "Exposed seconds in each round", caption, [draw_seconds, draw_share])


def throughput_over_rounds(run: RunRecord) -> Chart | None:
    """Samples a second of all workers together."""
    rounds, rate = run.round_throughput
    if not np.nansum(rate) > 0:
        return None
    kept = rate > 0
    x, lines = thin(rounds[kept], rate[None, kept])

    def draw(axes: "Axes") -> None:
        axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=marker_of(x))
        end_label(axes, x, lines[0], FIRST)
        axes.set_ylim(bottom=0, top=1.15 * float(np.nanmax(lines)))
        round_axis(axes, rounds)
        axes.set_ylabel("samples a second")

    caption = "Samples that all workers together trained on, over the time of the round with its synchronisation."
    return drawn("throughput-over-rounds", "Throughput", caption, [draw])


def steps_of_unequal_workers(run: RunRecord) -> Chart | None:
    """How many inner steps each worker made in a round, if they differ by design."""
    rounds, made = run.over_rounds("inner_steps")
    if not run.config.get("heterogeneous") or not np.isfinite(made).any() or len(made) > MOST_LINES:
        return None
    x, lines = thin(rounds, made)
    names = [worker.name.removeprefix("worker-") for worker in run.workers]

    def draw(axes: "Axes") -> None:
        ends = []
        for place, (name, line) in enumerate(zip(names, lines, strict=True)):
            known = np.isfinite(line)
            if known.any():
                color = styled_line(axes, place, x[known], line[known], f"worker {name}")
                ends.append((float(x[known][-1]), float(line[known][-1]), f"{name}: {line[known][-1]:.0f}", color))
        axes.set_ylim(bottom=0, top=1.15 * float(np.nanmax(lines)))
        end_labels(axes, ends)
        round_axis(axes, rounds)
        axes.set_ylabel("inner steps")

    caption = "Inner steps of each worker in a round: in proportion to its speed, so that all are done at once."
    return drawn("steps-of-unequal-workers", "Unequal workers", caption, [draw])


def membership_over_time(run: RunRecord) -> Chart | None:
    """Who was in which quorum, and who joined, died, came late or left."""
    workers = [worker for worker in run.workers if worker.lives]
    if not any(len(worker.rounds) for worker in workers) or len(workers) > MOST_ROWS:
        return None
    scale, label = time_axis(run.last - run.started)
    ticked = sum(len(worker.rounds) for worker in workers) <= MOST_TICKS

    def at(times: Iterable[float]) -> FloatArray:
        return (np.array(list(times), dtype=float) - run.started) / scale

    def draw(axes: "Axes") -> None:
        axes.plot([], [], **(TICK if ticked else BAR), label="in the quorum")
        marks: dict[str, tuple[list[float], list[int]]] = {name: ([], []) for name in MARKS}
        for row, worker in enumerate(workers):
            for life in worker.lives:
                axes.plot(at((life.start, life.last)), (row, row), color=MUTED, linewidth=1, label="_")
            for first, last in _stretches(worker.rounds["round"]):
                ends = at(worker.rounds["time"][[first, last]])
                axes.plot(ends, (row, row), **BAR, label="_")
            if ticked:
                axes.plot(at(worker.rounds["time"]), np.full(len(worker.rounds), row), **TICK, label="_")
            for name, times in _changes(run, worker).items():
                marks[name][0].extend(times)
                marks[name][1].extend([row] * len(times))
        for name, (times, rows) in marks.items():
            if times:
                axes.plot(at(times), rows, label=name, linestyle="", markerfacecolor=SURFACE, **MARKS[name])
        axes.set_yticks(range(len(workers)), [worker.name.removeprefix("worker-") for worker in workers])
        axes.set_ylim(len(workers) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.set_ylabel("worker")

    caption = (
        "A worker's thin line lasts while its process lives, the thick one while it is in every quorum; a tick is a "
        "round that was committed with it. Late: it took over what the others had committed without it."
    )
    height = 90 + 26 * len(workers)
    return drawn("membership-over-time", "Membership", caption, [draw], (WHOLE[0], height), rows=True)


def _stretches(rounds: FloatArray) -> list[tuple[int, int]]:
    """The first and the last index of each stretch of rounds without a gap."""
    gaps = np.flatnonzero(np.diff(rounds) > 1)
    starts, stops = np.append(0, gaps + 1), np.append(gaps, len(rounds) - 1)
    return list(zip(starts.tolist(), stops.tolist(), strict=True)) if len(rounds) else []


def _changes(run: RunRecord, worker: Worker) -> dict[str, list[float]]:
    """When a worker joined the run under way, came late, died and left, in Unix seconds; by the names of MARKS."""
    ends = [event for event in worker.events if event["event"] == "end" and event.get("status") != "complete"]
    begun = min((number(one.rounds["time"][0]) for one in run.workers if len(one.rounds)), default=math.inf)
    late = [event for event in worker.events if event.get("change") == "caught up"]
    return {
        "joined": [life.start for life in worker.lives if life.start > begun],
        "late": [number(event.get("time")) for event in late],
        "died": [life.last for life in worker.lives if run.died(worker, life)],
        "left": [number(event.get("time")) for event in ends],
    }


CHARTS: Sequence[Callable[[RunRecord], Chart | None]] = (
    losses_over_steps,
    losses_over_samples,
    losses_over_time,
    losses_over_rounds,
    bytes_over_rounds,
    exposed_over_rounds,
    throughput_over_rounds,
    steps_of_unequal_workers,
    membership_over_time,
)


def draw_all(run: RunRecord) -> list[Chart]:
    """Every chart that the run has the data for."""
    return [chart for function in CHARTS if (chart := function(run)) is not None]
