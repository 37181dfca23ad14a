"""How the report draws: panels into SVG that a page can hold.

Each chart is drawn twice, for a wide page and for a phone, so that its letters stay legible; the style sheet shows one.
Colours are roles: matplotlib draws in sentinel colours, which become `var(--…)` of the page, so that light and dark
both work. Lines also differ in style and carry labels, so that colour is never needed.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.monitor.report.run import FloatArray, last_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sentinel colour → the page's variable. Nothing else may be drawn in.
ROLES = ("ink", "muted", "grid", "first", "second", "surface", "third", "fourth")
VARIABLES = {"#" + 3 * f"{place:02d}": role for place, role in enumerate(ROLES, 1)}
INK, MUTED, GRID, FIRST, SECOND, SURFACE, THIRD, FOURTH = VARIABLES

# Width and height in the page's pixels: the first chart, over the whole page; the others, two in a row; on a phone.
WHOLE, HALF, NARROW = (1045, 330), (490, 270), (330, 240)
MOST_POINTS = 3000  # in a chart, over all its lines: keeps a report small however long the run was
MOST_LINES = 12  # more workers than this are drawn as the band from the lowest to the highest
MOST_BARS = 80
LABEL_SIZE = (60.0, 13.0)  # of a label at a line's end, in points
DASHED = (0, (4, 2))
# Of lines that are equals: colour, dashes and marker. Any one of them tells a line from its neighbours.
STYLES: Sequence[tuple[str, Any, str]] = (
    (FIRST, "-", "o"),
    (SECOND, DASHED, "D"),
    (THIRD, (0, (1, 1.4)), "s"),
    (FOURTH, (0, (6, 1.5, 1, 1.5)), "^"),
    (INK, "-", "v"),
    (MUTED, DASHED, "X"),
)

COUNTS = ((1e6, "millions"), (1e3, "thousands"))
TIMES = ((7200.0, "h"), (120.0, "min"))

Panel = Callable[["Axes"], None]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: SVG text of both widths, and the words around it."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str
    whole: bool = False  # over the whole page


def drawn(
    name: str, title: str, caption: str, panels: Sequence[Panel], size: tuple[int, int] = HALF, rows: bool = False
) -> Chart:
    """Draw panels below each other over one x axis.

    Args:
        size: On a wide page.
        rows: The y axis has names that the panels have set, instead of numbers; each needs its height on a phone, too.
    """
    wide, narrow = (_svg(name, title, panels, one, rows) for one in (size, (NARROW[0], size[1]) if rows else NARROW))
    return Chart(name, title, caption, wide, narrow, whole=size[0] == WHOLE[0])


def _svg(name: str, title: str, panels: Sequence[Panel], size: tuple[int, int], rows: bool) -> str:
    import io

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    narrow = size[0] == NARROW[0]
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
            if not rows:
                one.yaxis.set_major_locator(_locator(4 if len(panels) > 1 else 5))
            one.grid(axis="x" if rows else "y")
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


def thin(x: FloatArray, lines: FloatArray) -> tuple[FloatArray, FloatArray]:
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


def extent(lines: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The lowest and the highest of the lines at each point, NaN where there is none."""
    some = np.isfinite(lines).any(axis=0)
    low = np.where(some, np.min(np.where(np.isfinite(lines), lines, np.inf), axis=0), np.nan)
    high = np.where(some, np.max(np.where(np.isfinite(lines), lines, -np.inf), axis=0), np.nan)
    return low, high


def bars(axes: "Axes", x: FloatArray, heights: FloatArray, color: str) -> None:
    """Bars, or, when they would be too many, a filled line."""
    if len(x) <= MOST_BARS:
        axes.bar(x, heights, width=0.72, color=color, alpha=0.85, linewidth=0)
        if len(x) < 4:  # one bar that fills the whole chart says nothing
            axes.set_xlim(float(x[0]) - 2, float(x[-1]) + 2)
        return
    x, lines = thin(x, heights[None])
    axes.fill_between(x, 0, lines[0], color=color, alpha=0.2, linewidth=0)
    axes.plot(x, lines[0], color=color, linewidth=1.2)


def marker_of(x: FloatArray) -> str:
    """Few points are marked, so that even a single one is seen."""
    return "o" if len(x) <= 30 else ""


def styled_line(axes: "Axes", place: int, x: FloatArray, y: FloatArray, label: str) -> str:
    """Draw one of several lines that are equals; returns its colour."""
    color, dashes, marker = STYLES[place % len(STYLES)]
    markers: Any = {"marker": marker, "markevery": max(1, len(x) // 8), "markersize": 5, "markerfacecolor": SURFACE}
    axes.plot(x, y, color=color, linestyle=dashes, linewidth=1.5, label=label, **markers)
    return color


def end_label(axes: "Axes", x: FloatArray, y: FloatArray, color: str, unit: str = "") -> None:
    """Write the last value beside the end of its line."""
    known = np.isfinite(y)
    if known.any():
        axes.annotate(
            digits(last_finite(y)) + unit,
            (float(x[known][-1]), last_finite(y)),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def end_labels(axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write beside the ends of lines what they are, none over another. After the limits of the axes are set.

    Args:
        ends: Of each line: x, y, text and color.
    """
    to_points = axes.transData.transform([(x, y) for x, y, _, _ in ends]) * 72 / axes.figure.dpi
    placed: list[tuple[float, float]] = []
    style: Any = {"verticalalignment": "center", "fontweight": "bold", "annotation_clip": False}
    for (left, wanted), (x, y, text, color) in sorted(
        zip(to_points.tolist(), ends, strict=True), key=lambda one: one[0][1]
    ):
        bottom = wanted
        for other_left, other in sorted(placed, key=lambda one: one[1]):
            if abs(other_left - left) < LABEL_SIZE[0] and abs(other - bottom) < LABEL_SIZE[1]:
                bottom = other + LABEL_SIZE[1]
        placed.append((left, bottom))
        axes.annotate(text, (x, y), xytext=(8, bottom - wanted), textcoords="offset points", color=color, **style)


def robust_limits(axes: "Axes", *lines: FloatArray) -> None:
    """Keep a few spikes from flattening everything else."""
    values = np.concatenate([line[np.isfinite(line)] for line in lines])
    usual = float(np.quantile(values, 0.97))
    if usual > 0 and values.max() > 4 * usual:
        low, high = float(values.min()), 1.3 * usual
        axes.set_ylim(low - 0.05 * (high - low), high)


def held_out_line(axes: "Axes", x: FloatArray, losses: FloatArray) -> None:
    """The held-out losses, all finite, with the last one's value."""
    axes.plot(
        x,
        losses,
        color=SECOND,
        linewidth=1.4,
        linestyle=DASHED,
        marker="D" if len(x) <= 30 else "",
        markersize=4.5,
        markerfacecolor=SURFACE,
        label="held out",
    )
    end_label(axes, x, losses, SECOND)


def loss_label(unit: str) -> str:
    return f"loss ({unit})" if unit else "loss"


def finite_points(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The points at which y is finite."""
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _locator(ticks: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10])


def round_axis(axes: "Axes", rounds: FloatArray) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(rounds) <= 8:
        axes.set_xticks(rounds, [f"{number:.0f}" for number in rounds])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")


def digits(value: float) -> str:
    """A number in about three digits: `1.59`, `12.3`, `1,358`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def byte_unit(largest: float) -> tuple[float, str]:
    """The unit for an axis that reaches to `largest` bytes."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((scale, unit) for scale, unit in units if largest >= scale), (1.0, "bytes"))


def byte_text(count: float) -> str:
    scale, unit = byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def samples_axis(largest: float) -> tuple[float, str]:
    """The scale and the label of an axis that reaches to `largest` samples."""
    scale, unit = next(((scale, f" ({unit})") for scale, unit in COUNTS if largest >= scale), (1.0, ""))
    return scale, f"samples{unit}"


def time_axis(longest: float) -> tuple[float, str]:
    """The scale and the label of an axis that reaches to `longest` seconds."""
    scale, unit = next(((scale, unit) for scale, unit in TIMES if longest >= scale), (1.0, "s"))
    return scale, f"time ({unit})"
