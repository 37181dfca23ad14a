"""A snapshot of a run as the parts of a live page: HTML by the id of the element that it fills."""

import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.monitor.report.charts import OF_ONE
from trainer.monitor.report.curves import Worker, last_finite
from trainer.monitor.report.html import VERDICTS, facts, templates, tiles, title
from trainer.monitor.web.looks import OVER, Look

if TYPE_CHECKING:
    from jinja2.environment import TemplateModule

WIDTHS = ("wide", "narrow")
CHARTS = len(OF_ONE)
_FOLDER = Path(__file__).parent
_LIVE = {  # replaces the report's texts for an unfinished run
    "unfinished": ("good", "●", "Training"),
    "not started": ("pause", "…", "Not started: waiting for workers"),
}
_LOST = ("pause", "…", "No worker is running here: the run can be resumed")


def text_parts(look: Look) -> dict[str, str]:
    """All parts except the charts."""
    run, board, over = look.run, look.board, look.run.status in OVER
    verdict = (VERDICTS | _LIVE)[run.status]
    if run.status == "unfinished" and board.rows and all(row.state in ("died", *OVER) for row in board.rows):
        verdict = _LOST
    heading = run.run_id if (name := title(run)) == "Training" else name
    workers = {worker.name.removeprefix("worker-"): worker for worker in run.workers}
    rows = [(row, _measures(workers.get(str(row.worker)))) for row in board.rows]
    module = _module()
    found: list[tuple[str, tuple[Any, ...]]] = [
        ("head", (run, heading, verdict, facts(run), look.notice)),
        ("progress", (board, over)),
        ("tiles", (tiles(run),)),
        ("workers", (rows,)),
        ("history", (look.history,)),
        ("proof", (look.judgement,)),
    ]
    return {name: str(getattr(module, name)(*values)).strip() for name, values in found}


def chart_part(look: Look, place: int, width: str) -> str:
    """One of the report's charts as HTML; "" if there is no data for it."""
    chart = OF_ONE[place](look.run)
    return "" if chart is None else str(_module().chart(chart, width)).strip()  # type: ignore[attr-defined]


def page(name: str, parts: dict[str, str]) -> str:
    """The page with the parts that exist so far."""
    return _templates().get_template("page.html").render(name=name, fragments=parts, charts=CHARTS)


def files() -> Iterator[tuple[str, str, bytes]]:
    """The files that the page loads: name, content type, content."""
    style = (_FOLDER.parent / "report" / "style.css").read_bytes() + (_FOLDER / "live.css").read_bytes()
    yield "style.css", "text/css; charset=utf-8", style
    yield "live.js", "text/javascript; charset=utf-8", (_FOLDER / "live.js").read_bytes()


def _measures(worker: Worker | None) -> dict[str, str]:
    if worker is None:
        return {}
    synchronised = last_finite(worker.rounds["sync_seconds"])
    return {
        "sync": f"{synchronised:.2f}" if math.isfinite(synchronised) else "",
        "goodput": f"{100 * worker.goodput:.0f}" if math.isfinite(worker.goodput) else "",
    }


def _templates() -> Any:
    environment = templates(_FOLDER)
    environment.filters["clock"] = lambda moment: time.strftime("%H:%M:%S", time.localtime(moment))
    return environment


@cache
def _module() -> "TemplateModule":
    module: TemplateModule = _templates().get_template("fragments.html").module
    return module
