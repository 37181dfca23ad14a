"""The report's charts: one function a chart, from a `RunRecord` to SVG that a page can hold.

Each is drawn twice, for a wide page and for a phone, so that its letters stay legible; the style sheet shows one.
Colours are roles: matplotlib draws in sentinel colours, which become `var(--…)` of the page, so that light and dark
both work. Lines also differ in style and carry labels, so that colour is never needed.

To add a chart, write a function and list it in `CHARTS`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.report.record import FloatArray, RunRecord, last_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sentinel colour → the page's variable. Nothing else may be drawn in.
INK, MUTED, GRID, FIRST, SECOND, SURFACE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", SURFACE: "surface"}

# Width and height in the page's pixels: the first chart, over the whole page; the others, two in a row; on a phone.
WHOLE, HALF, NARROW = (1045, 330), (490, 270), (330, 240)
MOST_POINTS = 3000  # in a chart, over all its lines: keeps a report small however long the run was
MOST_LINES = 12  # more workers than this are drawn as the band from the lowest to the highest
MOST_BARS = 80
DASHED = (0, (4, 2))

Panel = Callable[["Axes"], None]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: SVG text of both widths, and the words around it."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


def losses_over_steps(run: RunRecord) -> Chart | None:
    """Every worker's training loss, faint, and their mean."""
    steps, mean = run.step_losses
    if not np.isfinite(mean).any():
        return None
    _, losses = run.over_steps("loss")
    x, lines = _thin(steps, np.vstack([mean, losses]))
    workers, over = lines[1:], len(losses)

    def draw(axes: "Axes") -> None:
        if 1 < over <= MOST_LINES:
            for line in workers:
                axes.plot(x, line, color=MUTED, linewidth=0.7, alpha=0.55, label="_")
            axes.plot([], [], color=MUTED, linewidth=0.7, label=f"each of {over} workers")
        elif over > MOST_LINES:
            low, high = _range(workers)
            axes.fill_between(x, low, high, color=MUTED, alpha=0.25, linewidth=0, label=f"range of {over} workers")
        axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=_marker(x), label="mean" if over > 1 else "loss")
        _end_label(axes, x, lines[0], FIRST)
        _robust_limits(axes, mean)
        axes.set_xlabel("inner step")
        axes.set_ylabel(f"loss ({run.loss_unit})" if run.loss_unit else "loss")

    skipped = run.skipped_steps
    caption = "The training loss of each inner step."
    if len(steps) > len(x):
        caption += f" Each point is the mean of about {round(len(steps) / len(x))} steps."
    if skipped:
        caption += f" {skipped} steps were skipped, because their loss or gradient was not finite."
    return _chart("losses-over-steps", "Loss over inner steps", caption, [draw], WHOLE)


def losses_over_rounds(run: RunRecord) -> Chart | None:
    """The mean training loss of each round, and the held-out loss where it was scored."""
    rounds, losses = run.round_losses
    scored, held_out = run.held_out_losses
    if not np.isfinite(losses).any() and not np.isfinite(held_out).any():
        return None
    x, lines = _thin(rounds, losses[None])

    def draw(axes: "Axes") -> None:
        if np.isfinite(losses).any():
            axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=_marker(x), label="training")
            _robust_limits(axes, losses, held_out)
        if np.isfinite(held_out).any():
            kept = np.isfinite(held_out)
            axes.plot(
                scored[kept],
                held_out[kept],
                color=SECOND,
                linewidth=1.4,
                linestyle=DASHED,
                marker="D" if kept.sum() <= 30 else "",
                markersize=4.5,
                markerfacecolor=SURFACE,
                label="held out",
            )
            _end_label(axes, scored, held_out, SECOND)
        elif np.isfinite(losses).any():
            _end_label(axes, x, lines[0], FIRST)
        _round_axis(axes, np.union1d(rounds, scored))
        axes.set_ylabel(f"loss ({run.loss_unit})" if run.loss_unit else "loss")

    caption = "Training: the samples-weighted mean of the workers' losses in the round."
    if np.isfinite(held_out).any():
        caption += " Held out: text that training never sees, scored with the global parameters after the round."
    return _chart("losses-over-rounds", "Loss over rounds", caption, [draw])


def bytes_over_rounds(run: RunRecord) -> Chart | None:
    """What the synchronisations moved, as the network counted it."""
    rounds, sent = run.over_rounds("bytes_sent")
    if not np.nansum(sent) > 0:
        return None
    total = np.nansum(sent, axis=0)
    scale, unit = _byte_unit(float(np.max(total)))

    def draw(axes: "Axes") -> None:
        _bars(axes, rounds, total / scale, FIRST)
        axes.set_ylim(bottom=0)
        _round_axis(axes, rounds)
        axes.set_ylabel(f"sent ({unit})")

    caption = f"Bytes that all workers together sent in each round; {_bytes(float(total.sum()))} in all."
    if len(sent) > 1:
        caption += f" A worker sent {_bytes(float(np.nanmean(sent)))} a round."
    return _chart("bytes-over-rounds", "Bytes sent in each round", caption, [draw])


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
        _bars(axes, rounds, mean, FIRST)
        if len(exposed) > 1 and len(rounds) <= MOST_BARS:
            axes.vlines(rounds, *_range(exposed), color=INK, linewidth=0.9, label="lowest to highest worker")
        axes.set_ylim(bottom=0)
        _round_axis(axes, rounds)
        axes.set_ylabel("exposed (s)")

    def draw_share(axes: "Axes") -> None:
        x, lines = _thin(rounds, share[None])
        axes.plot(x, lines[0], color=SECOND, linewidth=1.4, linestyle=DASHED, marker=_marker(x))
        _end_label(axes, x, lines[0], SECOND, " %")
        axes.set_ylim(bottom=0, top=max(1.0, 1.15 * float(np.nanmax(share))) if np.isfinite(share).any() else 1)
        _round_axis(axes, rounds)
        axes.set_ylabel("share (%)")

    caption = (
        "Exposed seconds: how long a worker's inner loop stood still for the round's synchronisation (waiting for the "
        "others included), mean over the workers; below, the share of the round that this was."
    )
    return _chart("exposed-over-rounds", "Exposed seconds in each round", caption, [draw_seconds, draw_share])


def throughput_over_rounds(run: RunRecord) -> Chart | None:
    """Samples a second of all workers together."""
    rounds, rate = run.round_throughput
    if not np.nansum(rate) > 0:
        return None
    kept = rate > 0
    x, lines = _thin(rounds[kept], rate[None, kept])

    def draw(axes: "Axes") -> None:
        axes.plot(x, lines[0], color=FIRST, linewidth=1.6, marker=_marker(x))
        _end_label(axes, x, lines[0], FIRST)
        axes.set_ylim(bottom=0, top=1.15 * float(np.nanmax(lines)))
        _round_axis(axes, rounds)
        axes.set_ylabel("samples a second")

    caption = "Samples that all workers together trained on, over the time of the round with its synchronisation."
    return _chart("throughput-over-rounds", "Throughput", caption, [draw])


CHARTS: Sequence[Callable[[RunRecord], Chart | None]] = (
    losses_over_steps,
    losses_over_rounds,
    bytes_over_rounds,
    exposed_over_rounds,
    throughput_over_rounds,
)


def draw_all(run: RunRecord) -> list[Chart]:
    """Every chart that the run has the data for."""
    return [chart for function in CHARTS if (chart := function(run)) is not None]


def _chart(name: str, title: str, caption: str, panels: Sequence[Panel], size: tuple[int, int] = HALF) -> Chart:
    return Chart(name, title, caption, *(_svg(name, title, panels, one) for one in (size, NARROW)))


def _svg(name: str, title: str, panels: Sequence[Panel], size: tuple[int, int]) -> str:
    """Draw panels below each other over one x axis, and return the SVG element."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    narrow = size == NARROW
    name = f"{name}-{'narrow' if narrow else 'wide'}"
    with _style(name):
        width, height = size[0] / 72, size[1] / 72 * (1 + 0.25 * (len(panels) - 1))  # an SVG has 72 units an inch
        layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.03, hspace=0.04)
        figure = Figure(figsize=(width, height), layout=layout)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for one, panel in zip(axes, panels, strict=True):
            panel(one)
            if one is not axes[-1]:
                one.set_xlabel("")
            one.yaxis.set_major_locator(_locator(4 if len(panels) > 1 else 5))
            one.grid(axis="y")
            if one.get_legend_handles_labels()[0]:
                one.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, borderpad=0)
        figure.align_ylabels(list(axes))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name, title)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Our matplotlib settings. The salt makes ids the same every time, and different between charts."""
    import matplotlib

    # fmt: off
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "DejaVu Sans", "font.size": 11.5,
        "text.color": INK, "axes.labelcolor": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
        "axes.edgecolor": GRID, "xtick.color": GRID, "ytick.color": GRID, "grid.color": GRID,
        "axes.labelsize": 11.5, "xtick.labelsize": 11, "ytick.labelsize": 11, "lines.markersize": 3.5,
        "grid.linewidth": 0.7, "axes.linewidth": 0.8, "xtick.major.size": 3, "ytick.major.size": 0,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "axes.xmargin": 0.02,
        "legend.frameon": False, "legend.fontsize": 11.5, "legend.handlelength": 1.8, "legend.columnspacing": 1.4,
    }
    # fmt: on
    with matplotlib.rc_context(settings):
        yield


def _inline(svg: str, name: str, title: str) -> str:
    """Matplotlib's SVG file as an element of a page: no header or metadata, ids of its own, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    view = re.search(r'viewBox="[^"]*"', svg)
    label = title.replace('"', "")
    opening = f'<svg {view.group() if view else ""} role="img" aria-label="{label}">'
    svg = re.sub(r"<svg[^>]*>", opening, svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    prefix = "c" + hashlib.sha256(name.encode()).hexdigest()[:6]
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for sentinel, variable in VARIABLES.items():
        svg = svg.replace(sentinel, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(\d+\.\d{2})\d+", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _thin(x: FloatArray, lines: FloatArray) -> tuple[FloatArray, FloatArray]:
    """About MOST_POINTS points over all lines that are drawn, each the mean of equally many neighbours.

    Args:
        x: Shape (points,).
        lines: Shape (lines, points); what is not finite counts for nothing.

    Returns:
        The same with fewer points.
    """
    lines = np.where(np.isfinite(lines), lines, np.nan)
    size = -(-x.size // max(50, min(600, MOST_POINTS // min(len(lines), MOST_LINES))))
    if size <= 1:
        return x, lines
    starts = np.arange(0, x.size, size)
    known = np.isfinite(lines)
    count = np.add.reduceat(known, starts, axis=1, dtype=float)
    total = np.add.reduceat(np.where(known, lines, 0.0), starts, axis=1)
    middle = np.add.reduceat(x, starts) / np.add.reduceat(np.ones_like(x), starts)
    return middle, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _range(lines: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The lowest and the highest of the lines at each point, NaN where there is none."""
    some = np.isfinite(lines).any(axis=0)
    low = np.where(some, np.min(np.where(np.isfinite(lines), lines, np.inf), axis=0), np.nan)
    high = np.where(some, np.max(np.where(np.isfinite(lines), lines, -np.inf), axis=0), np.nan)
    return low, high


def _bars(axes: "Axes", x: FloatArray, heights: FloatArray, color: str) -> None:
    """Bars, or, when they would be too many, a filled line."""
    if len(x) <= MOST_BARS:
        axes.bar(x, heights, width=0.72, color=color, alpha=0.85, linewidth=0)
        if len(x) < 4:  # one bar that fills the whole chart says nothing
            axes.set_xlim(float(x[0]) - 2, float(x[-1]) + 2)
        return
    x, lines = _thin(x, heights[None])
    axes.fill_between(x, 0, lines[0], color=color, alpha=0.2, linewidth=0)
    axes.plot(x, lines[0], color=color, linewidth=1.2)


def _marker(x: FloatArray) -> str:
    """Few points are marked, so that even a single one is seen."""
    return "o" if len(x) <= 30 else ""


def _end_label(axes: "Axes", x: FloatArray, y: FloatArray, color: str, unit: str = "") -> None:
    """Write the last value beside the end of its line."""
    known = np.isfinite(y)
    if known.any():
        axes.annotate(
            _digits(last_finite(y)) + unit,
            (float(x[known][-1]), last_finite(y)),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def _robust_limits(axes: "Axes", *lines: FloatArray) -> None:
    """Keep a few spikes from flattening everything else."""
    values = np.concatenate([line[np.isfinite(line)] for line in lines])
    usual = float(np.quantile(values, 0.97))
    if usual > 0 and values.max() > 4 * usual:
        low, high = float(values.min()), 1.3 * usual
        axes.set_ylim(low - 0.05 * (high - low), high)


def _locator(ticks: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10])


def _round_axis(axes: "Axes", rounds: FloatArray) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(rounds) <= 8:
        axes.set_xticks(rounds, [f"{number:.0f}" for number in rounds])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")


def _digits(value: float) -> str:
    """A number in about three digits: `1.59`, `12.3`, `1,358`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _byte_unit(largest: float) -> tuple[float, str]:
    """The unit for an axis that reaches to `largest` bytes."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((scale, unit) for scale, unit in units if largest >= scale), (1.0, "bytes"))


def _bytes(count: float) -> str:
    scale, unit = _byte_unit(count)
    return f"{count / scale:.3g} {unit}"
