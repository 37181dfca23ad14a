"""A run's history from its files, and its judgement."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.monitor.find_run import no_run
from trainer.monitor.verify.lines import Process, WorkerFile, read_lines
from trainer.monitor.verify.records import checkpoints_of, commits_in_etcd, still_wrong
from trainer.protocol.history import History
from trainer.protocol.proof import Claim, Verdict, judge, refuted


@dataclass(frozen=True)
class Judgement:
    """The claims about a run that hold, are refuted, or are unknown."""

    run_id: str
    workers: int
    processes: int
    rounds: int  # the last committed one
    terms: int
    claims: tuple[Claim, ...]
    without: str  # why etcd's record is not among the evidence; "" if it is

    @property
    def refuted(self) -> bool:
        return refuted(self.claims)

    def names(self, verdict: Verdict) -> list[str]:
        """The claims with this verdict."""
        return [claim.name for claim in self.claims if claim.verdict == verdict]

    @property
    def headline(self) -> str:
        """The judgement in one line."""
        names = {verdict: self.names(verdict) for verdict in _ORDER}
        parts = [f"{len(names['holds'])} of {len(self.claims)} claims hold"]
        parts += [f"refuted: {', '.join(names['refuted'])}"] if names["refuted"] else []
        parts += [f"cannot be judged: {', '.join(names['unknown'])}"] if names["unknown"] else []
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The judgement as JSON values."""
        return {**asdict(self), "refuted": self.refuted, "headline": self.headline}

    def __str__(self) -> str:
        words = ("worker", "workers"), ("process", "processes"), ("round", "rounds"), ("term", "terms")
        counts = zip((self.workers, self.processes, self.rounds, self.terms), words, strict=True)
        counted = ", ".join(f"{number} {one if number == 1 else more}" for number, (one, more) in counts)
        lines = [f"run {self.run_id}: {counted}"]
        for claim in self.claims:
            lines += [f"  {claim.verdict.upper():<8} {claim.name:<17} {claim.sentence}", *_details(claim)]
        if self.without:
            lines.append(f"  by the files alone: {self.without}")
        return "\n".join([*lines, self.headline])


_ORDER: tuple[Verdict, ...] = ("refuted", "unknown", "holds")


def _details(claim: Claim) -> list[str]:
    lines = []
    for finding in claim.findings:
        lines += [f"{'':11}✗ {finding.text}", *(f"{'':15}{where}" for where in finding.where)]
    if claim.more:
        lines.append(f"{'':11}✗ and {claim.more} more")
    lines += [f"{'':11}? not judged: {reason}" for reason in claim.unknown]
    return [*lines, *(f"{'':11}  {remark}" for remark in claim.remarks)]


def verify(run_dirs: Sequence[Path | str], *, deep: bool = True) -> list[Judgement]:
    """Judge the newest run in each of these directories.

    The workers of a run may be in several directories, as in pods.

    Args:
        deep: Also hash the checkpoints' large files.

    Raises:
        ConfigError: A directory contains no run.
    """
    files: list[WorkerFile] = []
    run_ids: dict[str, Path] = {}
    for run_dir in map(Path, run_dirs):
        own = [read_lines(path) for path in _paths(run_dir)]
        newest = max((process for file in own for process in file.processes), key=lambda one: one.started, default=None)
        if newest is None:
            raise no_run(run_dir)
        run_ids.setdefault(newest.run_id, run_dir)
        files += own
    return [_judge(run_id, run_dir, files, deep) for run_id, run_dir in run_ids.items()]


def judged(run_dir: Path | str) -> Judgement | None:
    """The judgement of one run directory, without reading whole checkpoints; None if there is nothing to judge."""
    try:
        return verify([run_dir], deep=False)[0]
    except (ConfigError, OSError):
        return None


def _paths(run_dir: Path) -> list[Path]:
    own = run_dir / "metrics.jsonl"
    return [*([own] if own.is_file() else []), *sorted(run_dir.glob("worker-*/**/metrics.jsonl"))]


def _judge(run_id: str, run_dir: Path, files: Sequence[WorkerFile], deep: bool) -> Judgement:
    # The evidence: every process of the run, its checkpoints, and etcd
    by_file = [(file.path, [one for one in file.processes if one.run_id == run_id]) for file in files]
    processes = [one for _, found in by_file for one in found]
    config = _config(processes)
    saved = []
    for path, found in by_file:
        if found:
            saved += list(checkpoints_of(path.parent, run_id, _config(found), deep))
    recorded, without = commits_in_etcd(run_dir, run_id, config)
    saved = list(still_wrong(saved))

    # With data parallelism, a restart goes back to a checkpoint, and no terms distinguish the repetition
    elastic = config.get("optim_method") != "ddp"
    terms = elastic or all(len(found) <= 1 for _, found in by_file)
    lives = [one.life(str(path.parent), terms) for path, found in by_file for one in found]
    unreadable = tuple(line for file in files for run, line in file.unreadable if run == run_id)
    evidence = saved if terms else [replace(one, term=None) for one in saved]
    history = History(tuple(lives), tuple(evidence), recorded, unreadable, elastic)

    rounds = max((round for _, round in history.rounds), default=0)
    workers = sum(bool(found) for _, found in by_file)
    return Judgement(run_id, workers, len(lives), rounds, len(history.terms), judge(history), without)


def _config(processes: Sequence[Process]) -> dict[str, Any]:
    return next((dict(one.start.get("config") or {}) for one in reversed(processes) if one.start), {})


def show(judgements: Sequence[Judgement], as_json: bool) -> None:
    """Print judgements as text, or as one JSON object per line."""
    for judgement in judgements:
        print(json.dumps(judgement.as_json()) if as_json else judgement, flush=True)
