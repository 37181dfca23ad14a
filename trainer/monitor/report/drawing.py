"""The report's drawings: panels as SVG that can be embedded in a page.

Each chart is drawn twice, for a wide page and for a phone, so that its text stays legible; the style sheet shows one of
them. matplotlib draws in sentinel colours, which become the page's `var(--…)`, so that light and dark mode both work.
Lines also differ in style and have labels, so that they can be told apart without colour.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.monitor.report.curves import FloatArray, weighted_mean
from trainer.monitor.report.words import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sentinel colour → the page's variable. Charts use no other colours.
ROLES = ("ink", "muted", "grid", "first", "second", "surface", "third", "fourth")
VARIABLES = {"#" + 3 * f"{place:02d}": role for place, role in enumerate(ROLES, 1)}
INK, MUTED, GRID, FIRST, SECOND, SURFACE, THIRD, FOURTH = VARIABLES

# Width and height in the page's pixels: over the whole page; two in a row; on a phone
WHOLE, HALF, NARROW = (1045, 330), (490, 270), (330, 240)
MOST_POINTS = 3000  # per chart, over all its lines, so that reports of long runs stay small
MOST_LINES = 12  # more workers than this are drawn as a band from the lowest to the highest
MOST_BARS = 80
MOST_MARKED = 30  # lines with at most this many points have markers, so that even a single point is visible
LABEL_SIZE = (60.0, 13.0)  # of a label at a line's end, in points
# Colour, dashes and marker of lines: each of them alone distinguishes a line from its neighbours
STYLES: Sequence[tuple[str, Any, str]] = (
    (FIRST, "-", "o"),
    (SECOND, (0, (4, 2)), "D"),
    (THIRD, (0, (1, 1.4)), "s"),
    (FOURTH, (0, (6, 1.5, 1, 1.5)), "^"),
    (INK, "-", "v"),
    (MUTED, (0, (4, 2)), "X"),
)

# Our matplotlib settings
# fmt: off
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 11.5,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.edgecolor": GRID, "xtick.color": GRID, "ytick.color": GRID, "grid.color": GRID,
    "axes.labelsize": 11.5, "xtick.labelsize": 11, "ytick.labelsize": 11, "lines.markersize": 3.5,
    "grid.linewidth": 0.7, "axes.linewidth": 0.8, "xtick.major.size": 3, "ytick.major.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "axes.xmargin": 0.02,
    "legend.frameon": False, "legend.fontsize": 11.5, "legend.handlelength": 1.8, "legend.columnspacing": 1.4,
}
# fmt: on

Panel = Callable[["Axes"], None]


@dataclass(frozen=True)
class Chart:
    """A chart: its texts, and the SVGs for both widths, which are drawn lazily."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    size: tuple[int, int]
    rows: bool

    @property
    def whole(self) -> bool:
        """Whether it extends over the whole page."""
        return self.size[0] == WHOLE[0]

    @cached_property
    def wide(self) -> str:
        return _svg(self.name, self.title, self.panels, self.size, self.rows)

    @cached_property
    def narrow(self) -> str:
        size = (NARROW[0], self.size[1]) if self.rows else NARROW
        return _svg(self.name, self.title, self.panels, size, self.rows)


def chart(
    title: str, caption: str, *panels: Panel, name: str = "", size: tuple[int, int] = HALF, rows: bool = False
) -> Chart:
    """A chart of panels below each other with a common x axis.

    `name` is the chart's id on the page, by default derived from the title; `size` is for a wide page. `rows`: whether
    the y axis has names (set by the panels) instead of numbers, and so needs its full height on a phone.
    """
    return Chart(name or title.lower().replace(" ", "-"), title, caption, panels, size, rows)


def _svg(name: str, title: str, panels: Sequence[Panel], size: tuple[int, int], rows: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    narrow = size[0] == NARROW[0]
    name = f"{name}-{'narrow' if narrow else 'wide'}"
    # The salt makes ids reproducible and unique to each chart
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        width, height = size[0] / 72, size[1] / 72 * (1 + 0.25 * (len(panels) - 1))  # an SVG has 72 units an inch
        layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.03, hspace=0.04)
        figure = Figure(figsize=(width, height), layout=layout)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for one, panel in zip(axes, panels, strict=True):
            panel(one)
            if one is not axes[-1]:
                one.set_xlabel("")
            if not rows:
                ticks = 4 if len(panels) > 1 else 5
                one.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
            one.grid(axis="x" if rows else "y")
            if one.get_legend_handles_labels()[0]:
                one.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, borderpad=0)
        figure.align_ylabels(list(axes))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """Turn matplotlib's SVG file into an element of a page: no metadata, unique ids, colours as variables."""
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
    """Reduce lines, (lines, points), to about MOST_POINTS points, each the mean of the same number of neighbours.

    Values that are not finite are ignored.
    """
    size = -(-x.size // max(50, min(600, MOST_POINTS // min(len(lines), MOST_LINES))))
    if size <= 1:
        return x, np.where(np.isfinite(lines), lines, np.nan)
    # The last bin may be smaller; it is padded with NaN
    missing = -x.size % size
    filled = np.pad(np.vstack([x, lines]), ((0, 0), (0, missing)), constant_values=np.nan)
    means = weighted_mean(np.moveaxis(filled.reshape(len(lines) + 1, -1, size), -1, 0), np.ones(1))
    return means[0], means[1:]


def bars(axes: "Axes", x: FloatArray, heights: FloatArray, color: str) -> None:
    """Draw bars, or a filled line if there are too many."""
    if len(x) <= MOST_BARS:
        axes.bar(x, heights, width=0.72, color=color, alpha=0.85, linewidth=0)
        if len(x) < 4:  # a single bar would fill the whole chart
            axes.set_xlim(float(x[0]) - 2, float(x[-1]) + 2)
        return
    x, lines = thin(x, heights[None])
    axes.fill_between(x, 0, lines[0], color=color, alpha=0.2, linewidth=0)
    axes.plot(x, lines[0], color=color, linewidth=1.2)


def line(
    axes: "Axes", x: FloatArray, y: FloatArray, style: int = 0, label: str = "_", *, equal: bool = False
) -> tuple[float, float, str] | None:
    """Draw a line in one of the styles. `equal` marks one of several similar lines, which markers then distinguish.

    Returns:
        x, y and colour of its last finite point; None if there is none.
    """
    x, (y,) = thin(x, y[None])
    color, dashes, marker = STYLES[style % len(STYLES)]
    look: dict[str, Any] = {"color": color, "linestyle": dashes, "linewidth": 1.5, "label": label}
    if equal or len(x) <= MOST_MARKED:
        look |= {"marker": marker, "markevery": max(1, len(x) // 8) if equal else 1}
    if equal or style:
        look |= {"markersize": 4.5, "markerfacecolor": SURFACE}
    axes.plot(x, y, **look)
    known = np.isfinite(y)
    return (float(x[known][-1]), float(y[known][-1]), color) if known.any() else None


def label(axes: "Axes", *ends: tuple[tuple[float, float, str] | None, str]) -> None:
    """Write labels next to the ends of lines, without overlaps. Call this after setting the limits of the axes.

    Each of `ends` is the return value of `line`, and a text in which {} stands for the last value.
    """
    known = sorted(((*end, text) for end, text in ends if end is not None), key=lambda one: one[1])
    placed: list[tuple[float, float]] = []
    for x, y, color, text in known:
        left, wanted = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        bottom = wanted
        for other_left, other in sorted(placed, key=lambda one: one[1]):
            if abs(other_left - left) < LABEL_SIZE[0] and abs(other - bottom) < LABEL_SIZE[1]:
                bottom = other + LABEL_SIZE[1]
        placed.append((left, bottom))
        look: dict[str, Any] = {"va": "center", "fontweight": "bold", "color": color, "annotation_clip": False}
        axes.annotate(text.format(digits(y)), (x, y), (8, bottom - wanted), textcoords="offset points", **look)


def robust_limits(axes: "Axes", *lines: FloatArray) -> None:
    """Keep a few spikes from flattening everything else."""
    values = np.concatenate([one[np.isfinite(one)] for one in lines])
    usual = float(np.quantile(values, 0.97))
    if usual > 0 and values.max() > 4 * usual:
        low, high = float(values.min()), 1.3 * usual
        axes.set_ylim(low - 0.05 * (high - low), high)


def from_zero(axes: "Axes", *lines: FloatArray) -> None:
    """Start the y axis at 0, with room for a label above the highest value of the lines."""
    values = np.concatenate([one[np.isfinite(one)] for one in lines])
    axes.set_ylim(bottom=0, top=1.15 * float(values.max()) if len(values) and values.max() > 0 else 1)


def over_rounds(axes: "Axes", rounds: FloatArray, y_label: str) -> None:
    """Label the axes of a chart over rounds."""
    from matplotlib.ticker import MaxNLocator

    if len(rounds) <= 8:
        axes.set_xticks(rounds, [f"{number:.0f}" for number in rounds])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")
    axes.set_ylabel(y_label)
