"""`summary.json`: a run in numbers, for other programs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.files import write_json
from trainer.monitor.report.curves import last_finite
from trainer.monitor.report.run import RunHistory, read_run
from trainer.monitor.verify import Judgement, judged


def write_summary(run_dir: Path | str, judgement: Judgement | None = None) -> Path:
    """Write `<run_dir>/summary.json`, atomically, and return its path. Unknown values are null.

    `judgement` is the result of `verify`; None: call it.
    """
    run = read_run(run_dir)
    judgement = judgement or judged(run.directory)
    write_json(path := run.directory / "summary.json", summary(run, judgement))
    return path


def summary(run: RunHistory, judgement: Judgement | None = None) -> dict[str, Any]:
    """The content of `summary.json`: plain JSON values, no NaN."""
    rounds, round_losses = run.round_losses
    steps, _ = run.step_losses
    wall = run.wall_seconds
    content = {
        **{name: getattr(run, name) for name in ("run_id", "status", "reason")},
        "rounds": int(rounds[-1]) if len(rounds) else 0,
        "steps": int(steps[-1]) if len(steps) else 0,
        **{name: getattr(run, name) for name in ("skipped_steps", "samples", "tokens", "parameters")},
        "final": {"loss": last_finite(round_losses), "held_out_loss": last_finite(run.held_out_losses[1])},
        "evaluation": run.evaluation,
        **{name: run.total(name) for name in ("bytes_sent", "bytes_received", "exposed_seconds")},
        **{name: getattr(run, name) for name in ("exposed_share", "wall_seconds")},
        "samples_per_second": run.samples / wall if wall > 0 else None,
        "tokens_per_second": run.tokens / wall if wall > 0 else None,
        **{name: run.typical(name) for name in ("flops_per_second", "mfu")},
        **{name: getattr(run, name) for name in ("peak_memory", "goodput")},
        "workers": {
            worker.name: {
                "status": worker.status,
                "steps": len(worker.steps),
                "goodput": worker.goodput,
                "peak_memories": worker.peak_memories,
            }
            for worker in run.workers
        },
        "verified": judgement
        and {
            "headline": judgement.headline,
            "refuted": judgement.names("refuted"),
            "unknown": judgement.names("unknown"),
        },
        "warnings": len(run.of_kind("warning")),
        **{name: getattr(run, name) for name in ("global_hashes", "dataset_hash", "versions", "config")},
    }
    return {name: finite(value) for name, value in content.items()}


def finite(value: Any) -> Any:
    """The JSON value with null for every number that is not finite, and integers for whole floats."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
