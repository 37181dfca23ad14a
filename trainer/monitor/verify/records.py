"""A run's other records: checkpoints on its volumes, and commits in its etcd, if that still runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.config import TrainingConfig
from trainer.elastic.keys import records_of
from trainer.errors import one_line
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.files import read_json, sha256
from trainer.monitor.find_run import LAUNCHED
from trainer.process import connect
from trainer.protocol.history import Recorded, Saved
from trainer.protocol.records import Cursor, Outcome, RoundState, decode
from trainer.timeouts import MonitorTimeouts

SMALL = 1 << 20  # bytes; the hashes of smaller files are always checked


def checkpoints_of(root: Path, run_id: str, config: Mapping[str, Any], deep: bool) -> Iterator[Saved]:
    """The checkpoints of the worker whose `metrics.jsonl` is in `root`.

    Args:
        config: The worker's configuration, which may name another directory.
        deep: Compare the hashes of all files with the manifest; otherwise, only the sizes of large files.
    """
    process = [root.name] if root.name.startswith("process-") else []
    volume = root.parent if process else root
    chosen = Path(str(config.get("checkpoint_path") or "checkpoints"))
    places = [volume / "checkpoints", chosen.parent if chosen.suffix in (".pth", ".pt") else chosen]
    found = dict.fromkeys(place.joinpath(*process, run_id).absolute() for place in places)
    for directory in found:
        for path in checkpoint.paths(directory):
            yield _saved(path, deep)


def still_wrong(saved: Iterable[Saved]) -> Iterator[Saved]:
    """The same checkpoints, without those that a running worker was just removing."""
    for one in saved:
        if not one.problem:
            yield one
        elif (path := Path(one.where)).exists():
            yield _saved(path, deep=True)


def _saved(path: Path, deep: bool) -> Saved:
    round, step = checkpoint.version_of(path)
    where = str(path)
    try:
        manifest = read_json(path / "manifest.json")
        for name, entry in manifest["files"].items():
            file = path / name
            size = file.stat().st_size
            checked = deep or size <= SMALL
            if size != entry["bytes"] or (checked and sha256(file) != entry["sha256"]):
                return Saved(where, None, round, problem=f"the checkpoint's {name} differs from what was written")
        state = read_json(path / "state.json")
        held = float(state["base_step"]), state["global_hash"], decode(Cursor, state["cursor"])
        saved = Saved(where, int(state["term"]), int(state["round"]), *held)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Saved(where, None, round, problem=f"the checkpoint is torn: {one_line(error)}")
    if (saved.round, state["step"]) != (round, step):
        return Saved(where, None, round, problem="the checkpoint's name is not that of its content")
    return saved


def commits_in_etcd(run_dir: Path, run_id: str, config: Mapping[str, Any]) -> tuple[tuple[Recorded, ...], str]:
    """The run's commits in etcd and, if there are none, why. Never waits for long, and never raises."""
    resolved: TrainingConfig | None = None
    with suppress(OSError, ValueError):
        tree = read_json(run_dir / LAUNCHED) if (run_dir / LAUNCHED).exists() else dict(config)
        resolved = TrainingConfig.from_tree(tree)
    if resolved is None or resolved.run_id != run_id or not resolved.etcd.endpoints:
        return (), "no record names the run's etcd"
    if not any(map(_answers, resolved.etcd.endpoints)):
        return (), f"its etcd does not answer at {', '.join(resolved.etcd.endpoints)}"
    try:
        with EtcdClient.of(resolved) as client:
            records = records_of(client)
    except (EtcdError, ValueError, OSError) as error:
        return (), f"its etcd cannot be read: {one_line(error)}"
    found = {key: entry.value for key, entry in records.items() if isinstance(entry.value, Outcome)}
    record = records["round"].value if "round" in records else None
    if isinstance(record, RoundState) and record.committed is not None:
        found["round"] = record.committed
    if not found:
        return (), "its etcd has no commits of it"
    return tuple(_recorded(f"etcd:{client.prefix}{key}", outcome) for key, outcome in found.items()), ""


def _recorded(where: str, outcome: Outcome) -> Recorded:
    votes = outcome.hash, outcome.weight, outcome.base.cursor
    return Recorded(where, outcome.term, outcome.round, outcome.attempt, outcome.members, *votes)


def _answers(endpoint: str) -> bool:
    """Whether anything listens there. The etcd of `launch` ends with the run, and a client would wait for it."""
    try:
        with connect(endpoint, MonitorTimeouts().look):
            return True
    except (OSError, ValueError):
        return False
