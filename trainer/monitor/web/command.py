"""`python -m trainer dashboard`: a run in the browser."""

import threading
from pathlib import Path

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.monitor.find_run import no_run, run_directory
from trainer.monitor.web.looks import DirectoryView, EtcdView, View
from trainer.monitor.web.server import LivePage


def dashboard(config: TrainingConfig, run_dir: Path | None, address: str) -> int:
    """Serve the live page of a run until Ctrl-C.

    Args:
        config: Identifies the run, and its etcd if there is no directory.
        run_dir: The run's directory, which need not exist yet. None: from `config`.
        address: Where to listen, as host:port.

    Raises:
        ConfigError: There is no such run, or the address cannot be used.
    """
    if run_dir is None and not config.etcd.endpoints:
        run_dir = run_directory(config)
        if run_dir is None:
            raise ConfigError("RUN", "", "must name a run's directory; or give --etcd and --run-id")
    view: View
    if run_dir is None:
        if not config.run_id:
            raise ConfigError("run_id", "", "must name the run")
        view = EtcdView(config)
    elif run_dir.exists() and not run_dir.is_dir():
        raise ConfigError("RUN", run_dir, "must be a run's directory")
    elif any(run_dir.glob("*/worker-0/metrics.jsonl")):
        raise no_run(run_dir)
    else:
        view = DirectoryView(run_dir)
    with LivePage(view, address) as page:
        print(f"dashboard: {page.url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    return 0
