"""Draws the runs of `bench_quality.py`: held-out loss over bytes, and over the time that slow links would take.

    python tests/benchmarks/quality_curves.py [build/quality.json] [--output build/quality.svg] [--step-seconds 0.5]
        [--mbits 200 50] [--methods fp32 int4 ...]

Each row of panels is for a number of workers. The lines are means over the seeds; the bands extend from the lowest to
the highest. The first panel shows the bytes as measured, with the small model. (Of a method with overlap, an exchange
may be only partly counted at an evaluation, because it is under way.)

Time is simulated, not measured, because a model that trains in seconds has no bytes worth waiting for. The other panels
show the small model's losses at the times of a model with 124 million parameters (GPT-2 small): the bytes are those
measured, times the ratio of the numbers of parameters, and an inner step takes `--step-seconds`. Its default, 0.5 s, is
the time of 64 Ki tokens at 100 Tflop/s (6 · 124e6 · 65,536 flop). A round of H steps takes

    H · step + max(0, bytes · 8 / bandwidth − hidden · step).

The bytes are those of the busiest worker, in the direction with more of them, because links are full duplex: the mean
over the run's rounds. `hidden` is the number of steps that continue meanwhile: 0 without overlap. With H, this is the
maximum of the two times. `ddp` exchanges gradients after each step, without overlap. Latency, evaluation and waiting
for slower workers take no time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

ROOT = Path(__file__).parents[2]
PARAMETERS = 124e6  # of the model whose bytes are simulated: GPT-2 small
HEIGHT, WIDTH = 3.2, 13.0  # of a row of panels, in inches
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quality",  # the same runs give the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
LINES = ("-", "--", ":", "-.")  # and colours: ten by default
Row = dict[str, Any]


def megabytes(run: Row) -> np.ndarray:
    """The MB that a worker had sent at each point of a run's curve."""
    return np.array([point["mb"] or np.nan for point in run["curve"]])


def hours(run: Row, about: Row, step_seconds: float, mbits: float) -> np.ndarray:
    """The simulated time at each point of a run's curve."""
    steps, last = np.array([point["step"] for point in run["curve"]]), run["curve"][-1]
    of_round = last["busiest_mb"] * about["interval"] / last["step"] * PARAMETERS / run["parameters"]
    exposed = max(0.0, of_round * 8 / mbits - about["hidden"] * step_seconds)
    return steps * (step_seconds + exposed / about["interval"]) / 3600


def draw(axes: Axes, number: int, name: str, x: list[np.ndarray], runs: list[Row]) -> None:
    """Draw a method's line and band, over the mean of `x`."""
    losses = np.array([[point["loss"] for point in run["curve"]] for run in runs])
    across, color = np.mean(x, 0), f"C{number % 10}"
    axes.plot(across, losses.mean(0), LINES[number % len(LINES)], color=color, linewidth=1.4, label=name)
    axes.fill_between(across, losses.min(0), losses.max(0), color=color, alpha=0.15, linewidth=0)


def figure(results: Row, methods: list[str], step_seconds: float, mbits: list[float]) -> Figure:
    """Panels of loss over MB, and over hours at each bandwidth, with a row for each number of workers."""
    counts = list(results["runs"])
    drawn = Figure(figsize=(WIDTH, HEIGHT * len(counts)), layout="constrained")
    panels = drawn.subplots(len(counts), 1 + len(mbits), sharey="row", squeeze=False)
    for row, workers in zip(panels, counts, strict=True):
        for number, name in enumerate(methods):
            runs, about = results["runs"][workers][name], results["methods"][name]
            draw(row[0], number, name, [megabytes(run) for run in runs], runs)
            for axes, speed in zip(row[1:], mbits, strict=True):
                draw(axes, number, name, [hours(run, about, step_seconds, speed) for run in runs], runs)
        row[0].set_ylabel(f"held-out loss, {workers} workers")
        for axes, label in zip(
            row, ["MB sent by a worker", *(f"hours at {speed:g} Mbit/s" for speed in mbits)], strict=True
        ):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(methods), 4))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "build" / "quality.json")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "quality.svg", help="an SVG or PNG")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="of an inner step of the large model")
    parser.add_argument("--mbits", type=float, nargs="+", default=[200, 50], help="a worker's bandwidth, each way")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="by default, all that were run")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    with mpl.rc_context(STYLE):
        drawn = figure(results, arguments.methods or list(results["methods"]), arguments.step_seconds, arguments.mbits)
        metadata = {"Date": None} if arguments.output.suffix == ".svg" else None
        drawn.savefig(arguments.output, metadata=metadata)
    print(arguments.output)


if __name__ == "__main__":
    main()
