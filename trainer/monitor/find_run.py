"""Finding a run from outside: its directory, the etcd that `launch` recorded there, and whether it has completed."""

import os
from contextlib import suppress
from pathlib import Path

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, one_line
from trainer.events import EventReader
from trainer.files import read_json
from trainer.volume import worker_roots

LAUNCHED = "launch.json"  # in the run directory: the run's configuration, including the etcd started by `launch`
SECRETS = "secrets"  # folder in the run directory, readable only by the user: certificates, and `etcd.user`'s password
PASSWORD = "password"  # file in that folder
_TAIL = 65536  # bytes at the end of a `metrics.jsonl` that contain its last event


def find(config: TrainingConfig) -> TrainingConfig:
    """The configuration with run id and etcd: `config`, completed from the files of `launch` in the run directory.

    Raises:
        ConfigError: Neither an etcd nor a run directory is given, or the directory is not a run's.
    """
    # Read the files of `launch`
    directory, launched = run_directory(config), None
    if directory and (directory / LAUNCHED).exists():
        try:
            launched = TrainingConfig.from_tree(read_json(directory / LAUNCHED))
        except (OSError, ValueError) as error:
            raise ConfigError("run_dir", directory, f"its {LAUNCHED} cannot be used: {one_line(error)}") from None

    # Complete the configuration
    if config.etcd.endpoints:
        if not config.run_id and launched is None:
            raise ConfigError("run_id", "", "must name the run (or run_dir its directory)")
        return config if config.run_id or launched is None else config.with_values(run_id=launched.run_id)
    if directory is None:
        raise ConfigError("run_id", "", "must name the run, with its etcd (etcd.endpoints) or its directory (run_dir)")
    if launched is None:
        raise ConfigError("run_dir", directory, "`launch` has not run in this directory; or name an etcd: --etcd")
    if config.run_id not in ("", launched.run_id):
        raise ConfigError("run_id", config.run_id, f"the run in {directory} is {launched.run_id}")
    _take_password(directory)
    return launched.with_values(run_dir=str(directory.absolute()))


def _take_password(directory: Path) -> None:
    """Put the password for a run's etcd into the environment, where clients look for it."""
    with suppress(FileNotFoundError):
        os.environ.setdefault("ETCD_PASSWORD", (directory / SECRETS / PASSWORD).read_text(encoding="utf-8"))


def run_directory(config: TrainingConfig) -> Path | None:
    """The directory in which `launch` keeps the run; None if neither run_dir nor run_id is given."""
    if config.run_dir:
        return Path(config.run_dir)
    return Path("runs") / config.run_id if config.run_id else None


def no_run(directory: Path) -> ConfigError:
    """The error for a directory that is not a run's. It names the runs in the directory, if there are any."""
    runs = sorted(path.parent.parent.name for path in directory.glob("*/worker-0/metrics.jsonl"))
    if not runs:
        return ConfigError("run_dir", directory, "holds no run that was trained")
    named = ", ".join(runs[:5]) + (f" and {len(runs) - 5} more" if len(runs) > 5 else "")
    return ConfigError("run_dir", directory, f"contains runs, but is not a run itself: name one of {named}")


def has_completed(directory: Path) -> bool:
    """Whether a worker below the run directory has ended because the run is complete."""
    for root in worker_roots(directory):
        events = EventReader(root / "metrics.jsonl", last=_TAIL).read()
        # The `end` event need not be the last one: a sink may report something when it is closed
        last = next((event for event in reversed(events) if event["event"] not in ("warning", "link")), {})
        if (last.get("event"), last.get("status")) == ("end", "complete"):
            return True
    return False
