"""The report's charts: one function per chart, from a run to SVG. To add one, list it in `OF_ONE` or `OF_SEVERAL`."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.events import number
from trainer.monitor.report import drawing
from trainer.monitor.report.curves import FloatArray, Points, Worker, extent
from trainer.monitor.report.drawing import Chart
from trainer.monitor.report.run import RunHistory
from trainer.monitor.report.words import BYTES, COUNTS, TIMES, Units, byte_count, labelled, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 40  # maximum number of workers in the membership chart
MOST_TICKS = 400  # maximum number of ticks in the membership chart; more rounds are drawn as bars
BAR: Any = {"color": drawing.FIRST, "linewidth": 5, "alpha": 0.3, "solid_capstyle": "butt"}
TICK: Any = {"color": drawing.FIRST, "linestyle": "", "marker": "|", "markersize": 11, "markeredgewidth": 1.6}
MARKS: dict[str, Any] = {  # events of a worker
    "joined": {"color": drawing.SECOND, "marker": ">", "markersize": 7},
    "late": {"color": drawing.SECOND, "marker": "D", "markersize": 6},
    "died": {"color": drawing.INK, "marker": "X", "markersize": 8},
    "left": {"color": drawing.INK, "marker": "s", "markersize": 6},
}


@dataclass(frozen=True)
class Axis:
    """A quantity that grows during a run, for the x axis of losses."""

    name: str
    units: Units
    at: Callable[[RunHistory], Points]  # steps of the schedule, and the quantity at their ends

    def along(self, run: RunHistory, steps: FloatArray) -> FloatArray:
        """The quantity at the given steps."""
        known, values = self.at(run)
        return np.interp(steps, np.append(0, known), np.append(0, values))


STEPS = Axis("inner step", ((1.0, ""),), lambda run: (run.step_losses[0], run.step_losses[0]))
SAMPLES = Axis("samples", COUNTS, lambda run: (run.step_losses[0], run.samples_at_steps))
TIME = Axis("time", TIMES, lambda run: (run.step_losses[0], run.seconds_at_steps))
SENT = Axis("sent by a worker", BYTES, lambda run: (run.round_ends, run.bytes_at_rounds))


# Losses of one run


def _losses(axis: Axis, caption: str, held_out: bool, size: tuple[int, int], run: RunHistory) -> Chart | None:
    """The workers' training losses (faint), their mean, and the held-out loss."""
    steps, mean = run.step_losses
    if not np.isfinite(mean).any():
        return None
    # Thin all lines to as many points as can be seen
    _, losses = run.over_steps("loss")
    at = axis.along(run, steps)
    scale, unit = unit_of(float(np.max(at, initial=0)), axis.units)
    x, (shown, *workers) = drawing.thin(at / scale, np.vstack([mean, losses]))
    scored, scores = _finite(*run.held_out_over_steps) if held_out else (np.empty(0), np.empty(0))
    if axis is STEPS and (skipped := run.skipped_steps):
        caption += f" {skipped} steps were skipped because their loss or gradient was not finite."
    if len(steps) > len(x):
        caption += f" Each point is the mean of about {round(len(steps) / len(x))} steps."

    def draw(axes: "Axes") -> None:
        # The workers' losses in the background; the range of too many
        over = len(workers)
        if 1 < over <= drawing.MOST_LINES:
            faint: Any = {"color": drawing.MUTED, "linewidth": 0.7}
            for one in workers:
                axes.plot(x, one, alpha=0.55, label="_", **faint)
            axes.plot([], [], label=f"each of {over} workers", **faint)
        elif over > drawing.MOST_LINES:
            band = extent(np.array(workers))
            axes.fill_between(x, *band, color=drawing.MUTED, alpha=0.25, linewidth=0, label=f"range of {over} workers")
        end = drawing.line(axes, x, shown, label="mean" if over > 1 else "loss")
        if len(scored):
            end = drawing.line(axes, axis.along(run, scored) / scale, scores, 1, "held out")
        drawing.robust_limits(axes, mean, scores)
        drawing.label(axes, (end, "{}"))
        axes.set_xlabel(labelled(axis.name, unit))
        axes.set_ylabel(labelled("loss", run.loss_unit))

    name = "steps" if axis is STEPS else axis.name
    title = "Loss over inner steps" if axis is STEPS else f"Loss over {name}"
    return drawing.chart(title, caption, draw, name=f"losses-over-{name}", size=size)


def losses_over_rounds(run: RunHistory) -> Chart | None:
    """The mean training loss of each round, and the held-out loss where measured."""
    rounds, losses = run.round_losses
    scored, scores = _finite(*run.held_out_losses)
    trained = np.isfinite(losses).any()
    if not trained and not len(scored):
        return None
    x, (shown,) = drawing.thin(rounds, losses[None])

    def draw(axes: "Axes") -> None:
        end = None
        if trained:
            end = drawing.line(axes, x, shown, label="training")
            drawing.robust_limits(axes, losses, scores)
        if len(scored):
            end = drawing.line(axes, scored, scores, 1, "held out")
        drawing.label(axes, (end, "{}"))
        drawing.over_rounds(axes, np.union1d(rounds, scored), labelled("loss", run.loss_unit))

    caption = "Training: the samples-weighted mean of the workers' losses in the round."
    if len(scored):
        caption += " Held out: samples that training never sees, scored with the global parameters after the round."
    return drawing.chart("Loss over rounds", caption, draw, name="losses-over-rounds")


def bits_over_rounds(run: RunHistory) -> Chart | None:
    """The held-out score of language models that is comparable across tokenizers."""
    scored, mean = _finite(*run.held_out_bits)
    if not len(scored):
        return None

    def draw(axes: "Axes") -> None:
        end = drawing.line(axes, scored, mean, 1, "held out")
        drawing.robust_limits(axes, mean)
        drawing.label(axes, (end, "{}"))
        drawing.over_rounds(axes, scored, "bits per byte")

    caption = "Held-out text, scored with the global parameters after the round: the bits needed for each byte."
    return drawing.chart("Bits per byte", caption, draw, name="bits-over-rounds")


# Rounds of one run


def bytes_over_rounds(run: RunHistory) -> Chart | None:
    """Bytes sent by synchronisations, as counted on the network."""
    rounds, sent = run.over_rounds("bytes_sent")
    if not np.nansum(sent) > 0:
        return None
    total = np.nansum(sent, axis=0)
    scale, unit = unit_of(float(np.max(total)), BYTES)

    def draw(axes: "Axes") -> None:
        drawing.bars(axes, rounds, total / scale, drawing.FIRST)
        axes.set_ylim(bottom=0)
        drawing.over_rounds(axes, rounds, labelled("sent", unit))

    caption = f"Bytes that all workers together sent in each round; {byte_count(float(total.sum()))} in all."
    if len(sent) > 1:
        caption += f" On average a worker sent {byte_count(float(np.nanmean(sent)))} per round."
    return drawing.chart("Bytes sent in each round", caption, draw, name="bytes-over-rounds")


def exposed_over_rounds(run: RunHistory) -> Chart | None:
    """How long each synchronisation blocked the inner loops, in seconds and as a share of the round."""
    rounds, exposed = run.over_rounds("exposed_seconds")
    kept = np.isfinite(exposed).any(axis=0)
    if not kept.any():
        return None
    rounds, exposed = rounds[kept], exposed[:, kept]
    x, (share,) = drawing.thin(rounds, 100 * run.exposed_shares[1][None, kept])

    def draw_seconds(axes: "Axes") -> None:
        drawing.bars(axes, rounds, np.nanmean(exposed, axis=0), drawing.FIRST)
        if len(exposed) > 1 and len(rounds) <= drawing.MOST_BARS:
            axes.vlines(rounds, *extent(exposed), color=drawing.INK, linewidth=0.9, label="lowest to highest worker")
        axes.set_ylim(bottom=0)
        drawing.over_rounds(axes, rounds, "exposed (s)")

    def draw_share(axes: "Axes") -> None:
        end = drawing.line(axes, x, share, 1)
        drawing.from_zero(axes, share)
        drawing.label(axes, (end, "{} %"))
        drawing.over_rounds(axes, rounds, "share (%)")

    caption = (
        "Exposed seconds: how long the round's synchronisation blocked a worker's inner loop, including waiting for "
        "the others; mean over the workers. Below: the same as a share of the round."
    )
    return drawing.chart("Exposed seconds in each round", caption, draw_seconds, draw_share, name="exposed-over-rounds")


def throughput_over_rounds(run: RunHistory) -> Chart | None:
    """Samples per second of all workers together."""
    rounds, rate = run.round_throughput
    if not np.nansum(rate) > 0:
        return None
    x, (shown,) = drawing.thin(rounds[rate > 0], rate[None, rate > 0])

    def draw(axes: "Axes") -> None:
        end = drawing.line(axes, x, shown)
        drawing.from_zero(axes, shown)
        drawing.label(axes, (end, "{}"))
        drawing.over_rounds(axes, rounds, "samples per second")

    caption = "Samples of all workers together, divided by the time of the round including its synchronisation."
    return drawing.chart("Throughput", caption, draw, name="throughput-over-rounds")


def steps_of_unequal_workers(run: RunHistory) -> Chart | None:
    """Inner steps of each worker in a round, if they differ by design."""
    rounds, made = run.over_rounds("inner_steps")
    if not run.config.get("heterogeneous") or not np.isfinite(made).any() or len(made) > drawing.MOST_LINES:
        return None
    x, lines = drawing.thin(rounds, made)

    def draw(axes: "Axes") -> None:
        ends = []
        for style, (worker, one) in enumerate(zip(run.workers, lines, strict=True)):
            if np.isfinite(one).any():
                name = worker.name.removeprefix("worker-")
                end = drawing.line(axes, *_finite(x, one), style, f"worker {name}", equal=True)
                ends.append((end, f"{name}: {one[np.isfinite(one)][-1]:.0f}"))
        drawing.from_zero(axes, *lines)
        drawing.label(axes, *ends)
        drawing.over_rounds(axes, rounds, "inner steps")

    caption = "Inner steps of each worker in a round, in proportion to its speed, so that all finish at the same time."
    return drawing.chart("Unequal workers", caption, draw, name="steps-of-unequal-workers")


# Membership of one run


def membership_over_time(run: RunHistory) -> Chart | None:
    """Which workers were in which quorum, and when each joined, died, came late or left."""
    workers = [worker for worker in run.workers if worker.lives]
    if not any(len(worker.rounds) for worker in workers) or len(workers) > MOST_ROWS:
        return None
    scale, unit = unit_of(run.last - run.started, TIMES)
    ticked = sum(len(worker.rounds) for worker in workers) <= MOST_TICKS

    def at(times: Iterable[float]) -> FloatArray:
        return (np.array(list(times), dtype=float) - run.started) / scale

    def draw(axes: "Axes") -> None:
        axes.plot([], [], **(TICK if ticked else BAR), label="in the quorum")
        marks: dict[str, tuple[list[float], list[int]]] = {name: ([], []) for name in MARKS}
        for row, worker in enumerate(workers):
            for life in worker.lives:
                axes.plot(at((life.start, life.last)), (row, row), color=drawing.MUTED, linewidth=1, label="_")
            # A bar for each stretch of rounds without a gap
            times = worker.rounds["time"]
            gaps = np.flatnonzero(np.diff(worker.rounds["round"]) > 1) + 1
            for stretch in np.split(times, gaps) if len(times) else ():
                axes.plot(at(stretch[[0, -1]]), (row, row), **BAR, label="_")
            if ticked:
                axes.plot(at(times), np.full(len(times), row), **TICK, label="_")
            for name, moments in _changes(run, worker).items():
                marks[name][0].extend(moments)
                marks[name][1].extend([row] * len(moments))
        for name, (moments, rows) in marks.items():
            if moments:
                axes.plot(at(moments), rows, label=name, linestyle="", markerfacecolor=drawing.SURFACE, **MARKS[name])
        axes.set_yticks(range(len(workers)), [worker.name.removeprefix("worker-") for worker in workers])
        axes.set_ylim(len(workers) - 0.5, -0.5)
        axes.set_xlabel(labelled("time", unit))
        axes.set_ylabel("worker")

    caption = (
        "A worker's thin line shows when its process is alive, the thick one when it is in every quorum; a tick is a "
        "round that was committed with it. Late: it caught up with rounds that the others had committed without it."
    )
    size = (drawing.WHOLE[0], 90 + 26 * len(workers))
    return drawing.chart("Membership", caption, draw, name="membership-over-time", size=size, rows=True)


def _changes(run: RunHistory, worker: Worker) -> dict[str, list[float]]:
    """When a worker joined the running run, was late, died and left, in Unix seconds, by the names in MARKS."""
    ends = [event for event in worker.events if event["event"] == "end" and event.get("status") != "complete"]
    begun = min((one.rounds["time"][0] for one in run.workers if len(one.rounds)), default=math.inf)
    late = [event for event in worker.events if event.get("change") == "caught up"]
    return {
        "joined": [life.start for life in worker.lives if life.start > begun],
        "late": [number(event.get("time")) for event in late],
        "died": [life.last for life in worker.lives if run.died(worker, life)],
        "left": [number(event.get("time")) for event in ends],
    }


# Several runs


def _overlaid(axis: Axis, held_out: bool, size: tuple[int, int], runs: Sequence[RunHistory]) -> Chart | None:
    """The held-out or training losses of all runs."""
    lines = []
    for run in runs:
        points = run.held_out_over_steps if held_out else (run.round_ends, run.round_losses[1])
        steps, losses = _finite(*points)
        lines.append((axis.along(run, steps), losses))
    longest = max((float(x[-1]) for x, _ in lines if len(x)), default=0.0)
    if not longest:
        return None
    scale, unit = unit_of(longest, axis.units)

    def draw(axes: "Axes") -> None:
        ends = []
        for place, (x, losses) in enumerate(lines):
            if len(x):
                x, (y,) = drawing.thin(x / scale, losses[None])
                ends.append((drawing.line(axes, x, y, place, letter(place), equal=True), f"{letter(place)} {{}}"))
        axes.set_xlim(0, longest / scale)
        # Leave out the steep start, because the end shows how runs differ
        shown = [losses for _, losses in lines if len(losses)]
        low = min(float(one.min()) for one in shown)
        high = max(float(one[len(one) // 5 :].max()) for one in shown)
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        drawing.label(axes, *ends)
        axes.set_xlabel(labelled(axis.name, unit))
        axes.set_ylabel(labelled("loss", common_unit(runs)))

    caption = (
        "Scored with the global parameters on samples that training never sees."
        if held_out
        else "The samples-weighted mean of the workers' losses in each round."
    )
    sent = " Bytes: sent per worker, on average." if axis is SENT else ""
    name = f"{'Held-out' if held_out else 'Training'} loss over {'bytes' if axis is SENT else axis.name}"
    return drawing.chart(name, f"{caption}{sent} The steep start is cut off.", draw, size=size)


def letter(place: int) -> str:
    """A run's short name: A to Z, then A1, B1, …"""
    turn, rest = divmod(place, 26)
    return chr(ord("A") + rest) + (str(turn) if turn else "")


def common_unit(runs: Sequence[RunHistory]) -> str:
    """The unit of all runs' losses; "" if they have none or different ones."""
    units = {run.loss_unit for run in runs}
    return units.pop() if len(units) == 1 else ""


def _finite(x: FloatArray, y: FloatArray) -> Points:
    """The points at which y is finite."""
    return x[np.isfinite(y)], y[np.isfinite(y)]


OVER_TIME = "Over the wall time at which the last worker finished the step. Pauses after a normal stop are excluded."
OF_ONE: Sequence[Callable[[RunHistory], Chart | None]] = (
    partial(_losses, STEPS, "The training loss of each inner step.", False, drawing.WHOLE),
    partial(_losses, SAMPLES, "Over the samples that all workers together had consumed.", True, drawing.HALF),
    partial(_losses, TIME, OVER_TIME, True, drawing.HALF),
    losses_over_rounds,
    bits_over_rounds,
    bytes_over_rounds,
    exposed_over_rounds,
    throughput_over_rounds,
    steps_of_unequal_workers,
    membership_over_time,
)
OF_SEVERAL: Sequence[Callable[[Sequence[RunHistory]], Chart | None]] = (
    partial(_overlaid, SAMPLES, True, drawing.WHOLE),
    partial(_overlaid, TIME, True, drawing.HALF),
    partial(_overlaid, SENT, True, drawing.HALF),
    partial(_overlaid, SAMPLES, False, drawing.HALF),
    partial(_overlaid, TIME, False, drawing.HALF),
)


def charts(runs: Sequence[RunHistory]) -> list[Chart]:
    """Every chart for which there is data: of one run, or of several runs overlaid."""
    drawings = [chart(runs[0]) for chart in OF_ONE] if len(runs) == 1 else [chart(runs) for chart in OF_SEVERAL]
    return [chart for chart in drawings if chart is not None]
